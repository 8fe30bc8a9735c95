// The selective scan and its gradient.
//
// LANES channels advance together, one per vector lane; the states are a loop, NB of them held in registers. Time runs
// in chunks of CHUNK steps counted from the start of a segment. The forward pass saves the state at every chunk start
// but the first; the backward pass walks the chunks in reverse, runs each forward again and then backward.
// A complex A doubles everything about states: real parts in the first plane, imaginary parts in the second one.
// No result depends on the number of threads, with one exception: a few very long segments are cut into spans (see
// make_spans) when there are more threads than other work.

#include <stdlib.h>

#include "math_cpu.h"
#include "scan.h"

namespace scan {
namespace FOOTFALL_ISA {

constexpr int CHUNK = 64;
// States the backward pass holds in registers; what it keeps of them for a chunk should stay near the first cache.
constexpr int BACK = 8;
constexpr int64_t SPAN = 16 * CHUNK;

// A segment, or a span of one: `steps` tokens from `time` of batch row `batch`, `begin` tokens into the segment.
struct Span {
  int64_t segment, batch, time, begin, steps, slot, row;
  bool first, final;
};

struct Spans {
  Span* list;
  int64_t count;
  bool cut;
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static int planes(const ScanArgs& a) { return a.complex ? 2 : 1; }
static int64_t channel_block(const ScanArgs& a) { return a.states <= 32 ? 64 : a.states <= 64 ? 128 : 256; }
static int64_t blocks_per_group(const ScanArgs& a) {
  const int64_t block = channel_block(a), width = a.channels / a.groups;
  return (width + block - 1) / block;
}

static Spans make_spans(const ScanArgs& a) {
  int64_t longest = 0, count = 0;
  for (int64_t s = 0; s < a.segments; s++) {
    const int64_t steps = a.offsets ? a.offsets[s + 1] - a.offsets[s] : a.length;
    longest = steps > longest ? steps : longest;
    count += 1 + steps / SPAN;
  }
  // Cutting costs a second pass over the states, so it has to buy threads that would otherwise stand idle.
  const bool cut = !a.complex && 2 * a.segments * a.groups * blocks_per_group(a) <= a.threads && longest >= 4 * SPAN;
  Spans spans = {static_cast<Span*>(malloc(sizeof(Span) * (count + 1))), 0, cut};
  for (int64_t s = 0; s < a.segments; s++) {
    const int64_t start = a.offsets ? a.offsets[s] : 0;
    const int64_t steps = a.offsets ? a.offsets[s + 1] - start : a.length;
    const int64_t row = a.offsets ? start : s * a.length;
    const int64_t slot = a.offsets ? start / CHUNK : s * ((a.length - 1) / CHUNK);
    int64_t begin = 0;
    do {
      const int64_t n = cut ? min64(SPAN, steps - begin) : steps;
      spans.list[spans.count++] = {s,           a.offsets ? 0 : s, start + begin,     begin, n, slot,
                                   row + begin, begin == 0,        begin + n >= steps};
      begin += n;
    } while (begin < steps);
  }
  return spans;
}

// One channel block of LANES channels and everything about it that does not change over time.
template <class R>
struct Lanes {
  int64_t channel, group;
  int lanes;
  R *A, *A2, *B, *C;  // [planes * states][LANES]; B and C only where constant
  R D[Simd<R>::lanes], bias[Simd<R>::lanes];
};

template <class R>
struct Work {
  R* memory;
  R *dt, *u, *du, *y, *z, *dy, *gB, *ddt;  // [CHUNK][LANES]
  R *h, *g, *dA, *dBc, *dCc;               // [planes * states][LANES]
  R *E, *X;                                // [CHUNK][BACK][LANES]
  Lanes<R> lanes;
};

template <class R>
static Work<R> make_work(const ScanArgs& a) {
  constexpr int W = Simd<R>::lanes;
  const int64_t tile = CHUNK * W, row = planes(a) * a.states * W, wide = (int64_t)CHUNK * BACK * W;
  Work<R> w;
  w.memory = static_cast<R*>(aligned_alloc(64, ((8 * tile + 9 * row + 2 * wide) * sizeof(R) + 63) / 64 * 64));
  R* p = w.memory;
  R** tiles[] = {&w.dt, &w.u, &w.du, &w.y, &w.z, &w.dy, &w.gB, &w.ddt};
  for (R** t : tiles) *t = p, p += tile;
  R** wides[] = {&w.E, &w.X};
  for (R** t : wides) *t = p, p += wide;
  R** rows[] = {&w.h, &w.g, &w.dA, &w.dBc, &w.dCc, &w.lanes.A, &w.lanes.A2, &w.lanes.B, &w.lanes.C};
  for (R** t : rows) *t = p, p += row;
  return w;
}

// Rows [planes * states][LANES] from and to entry `index` of `count` entries [channels, states].
template <class R>
static void load_states(R* rows, const void* x, const ScanArgs& a, int64_t index, int64_t count, const Lanes<R>& l) {
  const int64_t n = a.states, entry = a.channels * n;
  for (int plane = 0; plane < planes(a); plane++)
    load_tile<R>(rows + plane * n * Simd<R>::lanes, x, native_dtype<R>(),
                 (plane * count + index) * entry + l.channel * n, 1, n, (int)n, l.lanes);
}
template <class R>
static void store_states(const R* rows, void* x, const ScanArgs& a, int64_t index, int64_t count, const Lanes<R>& l) {
  const int64_t n = a.states, entry = a.channels * n;
  for (int plane = 0; plane < planes(a); plane++)
    store_tile<R>(rows + plane * n * Simd<R>::lanes, x, native_dtype<R>(),
                  (plane * count + index) * entry + l.channel * n, 1, n, (int)n, l.lanes);
}
// The same rows from and to a row-major block [planes * states, channels].
template <class R>
static void load_state_rows(R* rows, const R* x, const ScanArgs& a, const Lanes<R>& l) {
  load_tile<R>(rows, x, native_dtype<R>(), l.channel, a.channels, 1, planes(a) * (int)a.states, l.lanes);
}
template <class R>
static void store_state_rows(const R* rows, R* x, const ScanArgs& a, const Lanes<R>& l) {
  store_tile<R>(rows, x, native_dtype<R>(), l.channel, a.channels, 1, planes(a) * (int)a.states, l.lanes);
}

template <class R>
static void set_lanes(Lanes<R>& l, const ScanArgs& a, int64_t group, int64_t channel, int64_t end) {
  constexpr int W = Simd<R>::lanes;
  const int64_t n = a.states;
  l.channel = channel;
  l.group = group;
  l.lanes = (int)min64(W, end - channel);
  load_states<R>(l.A, a.A, a, 0, 1, l);
  // Exponents in powers of two, angles in quarter turns.
  for (int64_t i = 0; i < n * W; i++) l.A2[i] = l.A[i] * R(LOG2E);
  for (int64_t i = n * W; i < planes(a) * n * W; i++) l.A2[i] = l.A[i] * R(0.6366197723675814);
  if (!a.variable_B) load_states<R>(l.B, a.B, a, 0, 1, l);
  if (!a.variable_C) load_states<R>(l.C, a.C, a, 0, 1, l);
  for (int i = 0; i < W; i++) {
    const bool in = i < l.lanes;
    l.D[i] = in && a.D ? static_cast<const R*>(a.D)[channel + i] : R(0);
    l.bias[i] = in && a.bias ? static_cast<const R*>(a.bias)[channel + i] : R(0);
  }
}

template <class R>
static void load_array(R* tile, const Array& x, const Span& s, int64_t t, int steps, const Lanes<R>& l) {
  load_tile<R>(tile, x.p, x.dtype, s.batch * x.batch + (s.time + t) * x.time + l.channel * x.channel, x.time, x.channel,
               steps, l.lanes);
}
template <class R>
static void store_array(const R* tile, const Array& x, const Span& s, int64_t t, int steps, const Lanes<R>& l) {
  store_tile<R>(tile, x.p, x.dtype, s.batch * x.batch + (s.time + t) * x.time + l.channel * x.channel, x.time,
                x.channel, steps, l.lanes);
}

// Step sizes, inputs and their product for one chunk.
template <class R>
static void load_steps(Work<R>& w, const ScanArgs& a, const Span& s, int64_t t, int steps) {
  constexpr int W = Simd<R>::lanes;
  load_array<R>(w.dt, a.delta, s, t, steps, w.lanes);
  load_array<R>(w.u, a.u, s, t, steps, w.lanes);
  const Vec<R> bias = load<R>(w.lanes.bias);
  for (int i = 0; i < steps; i++) {
    Vec<R> dt = load<R>(w.dt + i * W) + bias;
    if (a.softplus) dt = softplus<R>(dt);
    store<R>(w.dt + i * W, dt);
    store<R>(w.du + i * W, dt * load<R>(w.u + i * W));
  }
}

// B or C at one step: a row of scalars shared by the lanes, or one vector for each state.
template <class R>
struct Coefficient {
  const R* rows;
  const R* lanes;
  int64_t stride;
  int64_t imaginary;  // distance of the imaginary parts, in rows as in lanes
};
template <class R, bool ROWS>
FOOTFALL_INLINE Vec<R> at(const Coefficient<R>& c, int t, int64_t n) {
  if (ROWS || c.rows) return splat<R>(c.rows[t * c.stride + n]);
  return load<R>(c.lanes + n * Simd<R>::lanes);
}
template <class R>
static Coefficient<R> coefficient(const void* x, int variable, const R* lanes, const ScanArgs& a, const Span& s,
                                  int64_t t, int64_t group) {
  if (!variable) return {nullptr, lanes, 0, a.states};
  return {static_cast<const R*>(x) + ((s.row + t) * a.groups + group) * a.states, nullptr, a.groups * a.states,
          a.rows * a.groups * a.states};
}

// h <- exp(dt A) h + dt u B;  y += C h, for NB states from n0 on.
template <class R, int NB, bool ROWS, bool OUTPUT>
static void forward_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, int n0, int steps) {
  constexpr int W = Simd<R>::lanes;
  Vec<R> h[NB];
  const R* A2 = w.lanes.A2 + n0 * W;
  for (int j = 0; j < NB; j++) h[j] = load<R>(w.h + (n0 + j) * W);
  for (int t = 0; t < steps; t++) {
    const Vec<R> dt = load<R>(w.dt + t * W), du = load<R>(w.du + t * W);
    Vec<R> y[2] = {};
#pragma GCC unroll 16
    for (int j = 0; j < NB; j++) {
      h[j] = exp2v(dt * load<R>(A2 + j * W)) * h[j] + du * at<R, ROWS>(B, t, n0 + j);
      if (OUTPUT) y[j & 1] += h[j] * at<R, ROWS>(C, t, n0 + j);
    }
    if (OUTPUT) store<R>(w.y + t * W, load<R>(w.y + t * W) + (y[0] + y[1]));
  }
  for (int j = 0; j < NB; j++) store<R>(w.h + (n0 + j) * W, h[j]);
}

template <class R>
constexpr int forward_block() {
  return kBytes == 64 && sizeof(R) == 4 ? 16 : 8;
}

template <class R, bool ROWS, bool OUTPUT>
static void forward_all_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, int states, int steps) {
  int n = 0;
  for (; n + forward_block<R>() <= states; n += forward_block<R>())
    forward_states<R, forward_block<R>(), ROWS, OUTPUT>(w, B, C, n, steps);
  for (; n + 4 <= states; n += 4) forward_states<R, 4, ROWS, OUTPUT>(w, B, C, n, steps);
  for (; n < states; n++) forward_states<R, 1, ROWS, OUTPUT>(w, B, C, n, steps);
}

// e = exp(dt A) for one state of a complex A.
template <class R>
FOOTFALL_INLINE void complex_decay(Vec<R> dt, const R* A2, int64_t imaginary, Vec<R>& re, Vec<R>& im) {
  const Vec<R> size = exp2v(dt * load<R>(A2));
  Vec<R> sine, cosine;
  sincos_quarter<R>(dt * load<R>(A2 + imaginary), sine, cosine);
  re = size * cosine;
  im = size * sine;
}

template <class R, bool OUTPUT>
static void forward_complex(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, int states, int steps) {
  constexpr int W = Simd<R>::lanes;
  for (int n = 0; n < states; n++) {
    Vec<R> h_re = load<R>(w.h + n * W), h_im = load<R>(w.h + (states + n) * W), e_re, e_im;
    for (int t = 0; t < steps; t++) {
      const Vec<R> du = load<R>(w.du + t * W);
      complex_decay<R>(load<R>(w.dt + t * W), w.lanes.A2 + n * W, states * W, e_re, e_im);
      const Vec<R> x = e_re * h_re - e_im * h_im;
      h_im = e_re * h_im + e_im * h_re + du * at<R, false>(B, t, n + B.imaginary);
      h_re = x + du * at<R, false>(B, t, n);
      const Vec<R> y = h_re * at<R, false>(C, t, n) - h_im * at<R, false>(C, t, n + C.imaginary);
      if (OUTPUT) store<R>(w.y + t * W, load<R>(w.y + t * W) + R(2) * y);
    }
    store<R>(w.h + n * W, h_re);
    store<R>(w.h + (states + n) * W, h_im);
  }
}

template <class R>
static void load_start(Work<R>& w, const ScanArgs& a, const Span& s, const R* span_starts) {
  constexpr int W = Simd<R>::lanes;
  if (span_starts && !s.first) {
    load_state_rows<R>(w.h, span_starts, a, w.lanes);
  } else if (s.first && a.initial) {
    load_states<R>(w.h, a.initial, a, s.segment, a.segments, w.lanes);
  } else {
    memset(w.h, 0, sizeof(R) * planes(a) * a.states * W);
  }
}

template <class R>
static R* slot_of(const ScanArgs& a, const Span& s, int64_t t) {
  return static_cast<R*>(a.saved) + (s.slot + (s.begin + t) / CHUNK - 1) * planes(a) * a.states * a.channels;
}

template <class R>
static void forward_span(Work<R>& w, const ScanArgs& a, const Span& s, const R* span_start) {
  constexpr int W = Simd<R>::lanes;
  const int64_t n = a.states;
  load_start<R>(w, a, s, span_start);
  for (int64_t t = 0; t < s.steps; t += CHUNK) {
    const int steps = (int)min64(CHUNK, s.steps - t);
    if (a.save && s.begin + t > 0) store_state_rows<R>(w.h, slot_of<R>(a, s, t), a, w.lanes);
    load_steps<R>(w, a, s, t, steps);
    const Vec<R> D = load<R>(w.lanes.D);
    for (int i = 0; i < steps; i++) store<R>(w.y + i * W, D * load<R>(w.u + i * W));
    const auto B = coefficient<R>(a.B, a.variable_B, w.lanes.B, a, s, t, w.lanes.group);
    const auto C = coefficient<R>(a.C, a.variable_C, w.lanes.C, a, s, t, w.lanes.group);
    if (a.complex)
      forward_complex<R, true>(w, B, C, (int)n, steps);
    else if (a.variable_B && a.variable_C)
      forward_all_states<R, true, true>(w, B, C, (int)n, steps);
    else
      forward_all_states<R, false, true>(w, B, C, (int)n, steps);
    if (a.z.p) {
      load_array<R>(w.z, a.z, s, t, steps, w.lanes);
      for (int i = 0; i < steps; i++) {
        const Vec<R> z = load<R>(w.z + i * W);
        store<R>(w.y + i * W, load<R>(w.y + i * W) * z * sigmoid<R>(z));
      }
    }
    store_array<R>(w.y, a.out, s, t, steps, w.lanes);
  }
  if (s.final) store_states<R>(w.h, a.last, a, s.segment, a.segments, w.lanes);
}

// The state a span ends in when it starts from zero (from the initial state if it is the first), and its summed steps.
template <class R>
static void forward_span_state(Work<R>& w, const ScanArgs& a, const Span& s, R* state, R* sum_dt) {
  constexpr int W = Simd<R>::lanes;
  const int64_t n = a.states;
  load_start<R>(w, a, s, static_cast<const R*>(nullptr));
  Vec<R> sum = {};
  for (int64_t t = 0; t < s.steps; t += CHUNK) {
    const int steps = (int)min64(CHUNK, s.steps - t);
    load_steps<R>(w, a, s, t, steps);
    for (int i = 0; i < steps; i++) sum += load<R>(w.dt + i * W);
    const auto B = coefficient<R>(a.B, a.variable_B, w.lanes.B, a, s, t, w.lanes.group);
    if (a.variable_B)
      forward_all_states<R, true, false>(w, B, B, (int)n, steps);
    else
      forward_all_states<R, false, false>(w, B, B, (int)n, steps);
  }
  store_state_rows<R>(w.h, state, a, w.lanes);
  for (int i = 0; i < w.lanes.lanes; i++) sum_dt[w.lanes.channel + i] = sum[i];
}

// Calls work(lane block) for the channels of one block of one group.
template <class R, class F>
static void for_lanes(Work<R>& w, const ScanArgs& a, int64_t block_index, F work) {
  const int64_t per_group = blocks_per_group(a), width = a.channels / a.groups, block = channel_block(a);
  const int64_t group = block_index / per_group, first = (block_index % per_group) * block;
  const int64_t end = group * width + min64(width, first + block);
  for (int64_t c = group * width + first; c < end; c += Simd<R>::lanes) {
    set_lanes<R>(w.lanes, a, group, c, end);
    work();
  }
}

// Calls work(buffers, k, block of the group) for k < count and all channels, the vector's worth of lanes set up.
template <class R, class F>
static void for_blocks(const ScanArgs& a, int64_t count, F work) {
  const int64_t per_group = blocks_per_group(a), blocks = a.groups * per_group;
#pragma omp parallel num_threads(a.threads)
  {
    Work<R> w = make_work<R>(a);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count * blocks; i++)
      for_lanes<R>(w, a, i % blocks, [&] { work(w, i / blocks, i % per_group); });
    free(w.memory);
  }
}

template <class R>
static R* zeros(int64_t count) {
  return static_cast<R*>(calloc(count > 0 ? count : 1, sizeof(R)));
}

// What enters every span from the one before it (back: from the one after it), given what each gives on its own and its
// summed steps. Frees both.
template <class R>
static R* chain(const ScanArgs& a, const Spans& spans, R* own, R* sums, bool back) {
  const int64_t n = a.states, d = a.channels, step = back ? -1 : 1;
  const R* A = static_cast<const R*>(a.A);
  R* entering = zeros<R>(spans.count * n * d);
  for (int64_t i = 1; i < spans.count; i++) {
    const int64_t k = back ? spans.count - 1 - i : i, from = k - step;
    if (back ? spans.list[k].final : spans.list[k].first) continue;
    const bool chained = !(back ? spans.list[from].final : spans.list[from].first);
    for (int64_t j = 0; j < n; j++)
      for (int64_t c = 0; c < d; c++) {
        const int64_t at = j * d + c, before = from * n * d + at;
        const R decay = expv<R>(splat<R>(A[c * n + j] * sums[from * d + c]))[0];
        entering[k * n * d + at] = own[before] + (chained ? decay * entering[before] : R(0));
      }
  }
  free(own);
  free(sums);
  return entering;
}

// States at the start of every span: the spans run from zero in parallel, then are chained in order.
template <class R>
static R* chain_forward(const ScanArgs& a, const Spans& spans) {
  const int64_t n = a.states, d = a.channels;
  R *ends = zeros<R>(spans.count * n * d), *sums = zeros<R>(spans.count * d);
  for_blocks<R>(a, spans.count, [&](Work<R>& w, int64_t k, int64_t) {
    if (!spans.list[k].final) forward_span_state<R>(w, a, spans.list[k], ends + k * n * d, sums + k * d);
  });
  return chain<R>(a, spans, ends, sums, false);
}

template <class R>
static void forward_typed(const ScanArgs& a) {
  const Spans spans = make_spans(a);
  R* starts = spans.cut ? chain_forward<R>(a, spans) : nullptr;
  for_blocks<R>(a, spans.count, [&](Work<R>& w, int64_t k, int64_t) {
    forward_span<R>(w, a, spans.list[k], starts ? starts + k * a.states * a.channels : nullptr);
  });
  free(starts);
  free(spans.list);
}

void scan_forward(const ScanArgs& a) {
  if (a.double_precision)
    forward_typed<double>(a);
  else
    forward_typed<float>(a);
}

int scan_chunk() { return CHUNK; }

// Runs a chunk forward again: keeps the decays E and the decayed states X = E h for the way back, adds to y and to dC.
template <class R, int NB, bool ROWS>
static void recompute_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, R* dC, int n0, int steps) {
  constexpr int W = Simd<R>::lanes;
  Vec<R> h[NB];
  const R* A2 = w.lanes.A2 + n0 * W;
  for (int j = 0; j < NB; j++) h[j] = load<R>(w.h + (n0 + j) * W);
  for (int t = 0; t < steps; t++) {
    const Vec<R> dt = load<R>(w.dt + t * W), du = load<R>(w.du + t * W), dy = load<R>(w.dy + t * W);
    R *E = w.E + t * NB * W, *X = w.X + t * NB * W;
    Vec<R> y[2] = {}, c[NB];
#pragma GCC unroll 16
    for (int j = 0; j < NB; j++) {
      const Vec<R> e = exp2v(dt * load<R>(A2 + j * W)), x = e * h[j];
      store<R>(E + j * W, e);
      store<R>(X + j * W, x);
      h[j] = x + du * at<R, ROWS>(B, t, n0 + j);
      y[j & 1] += h[j] * at<R, ROWS>(C, t, n0 + j);
      c[j] = dy * h[j];
    }
    store<R>(w.y + t * W, load<R>(w.y + t * W) + (y[0] + y[1]));
    if (ROWS || C.rows) {
      add_lane_sums<R, NB>(c, dC + t * C.stride + n0);
    } else {
      for (int j = 0; j < NB; j++) store<R>(w.dCc + (n0 + j) * W, load<R>(w.dCc + (n0 + j) * W) + c[j]);
    }
  }
}

// The way back through the chunk; w.g holds what the state receives from later steps.
template <class R, int NB, bool ROWS>
static void reverse_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, R* dB, int n0, int steps) {
  constexpr int W = Simd<R>::lanes;
  Vec<R> carry[NB];
  const R* A = w.lanes.A + n0 * W;
  R* dA = w.dA + n0 * W;
  for (int j = 0; j < NB; j++) carry[j] = load<R>(w.g + (n0 + j) * W);
  for (int t = steps - 1; t >= 0; t--) {
    const Vec<R> dt = load<R>(w.dt + t * W), du = load<R>(w.du + t * W), dy = load<R>(w.dy + t * W);
    const R *E = w.E + t * NB * W, *X = w.X + t * NB * W;
    Vec<R> gB[2] = {}, ddt[2] = {}, b[NB];
#pragma GCC unroll 16
    for (int j = 0; j < NB; j++) {
      const Vec<R> g = carry[j] + dy * at<R, ROWS>(C, t, n0 + j);
      gB[j & 1] += g * at<R, ROWS>(B, t, n0 + j);
      b[j] = g * du;
      const Vec<R> gx = g * load<R>(X + j * W);
      ddt[j & 1] += gx * load<R>(A + j * W);
      store<R>(dA + j * W, load<R>(dA + j * W) + gx * dt);
      carry[j] = g * load<R>(E + j * W);
    }
    store<R>(w.gB + t * W, load<R>(w.gB + t * W) + (gB[0] + gB[1]));
    store<R>(w.ddt + t * W, load<R>(w.ddt + t * W) + (ddt[0] + ddt[1]));
    if (ROWS || B.rows) {
      add_lane_sums<R, NB>(b, dB + t * B.stride + n0);
    } else {
      for (int j = 0; j < NB; j++) store<R>(w.dBc + (n0 + j) * W, load<R>(w.dBc + (n0 + j) * W) + b[j]);
    }
  }
  for (int j = 0; j < NB; j++) store<R>(w.g + (n0 + j) * W, carry[j]);
}

template <class R, int NB, bool ROWS>
static void backward_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, R* dB, R* dC, int n0,
                            int steps) {
  recompute_states<R, NB, ROWS>(w, B, C, dC, n0, steps);
  reverse_states<R, NB, ROWS>(w, B, C, dB, n0, steps);
}

template <class R, bool ROWS>
static void backward_all_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, R* dB, R* dC, int states,
                                int steps) {
  int n = 0;
  for (; n + BACK <= states; n += BACK) backward_states<R, BACK, ROWS>(w, B, C, dB, dC, n, steps);
  for (; n + 4 <= states; n += 4) backward_states<R, 4, ROWS>(w, B, C, dB, dC, n, steps);
  for (; n < states; n++) backward_states<R, 1, ROWS>(w, B, C, dB, dC, n, steps);
}

// Both ways for a complex A, one state after the other. A gradient of a complex number is that of its real part plus i
// times that of its imaginary part, as in torch.
template <class R>
static void backward_complex(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, R* dB, R* dC, int states,
                             int steps) {
  constexpr int W = Simd<R>::lanes;
  R *E_re = w.E, *E_im = w.E + CHUNK * W, *X_re = w.X, *X_im = w.X + CHUNK * W;
  const auto add = [](R* p, Vec<R> v) { store<R>(p, load<R>(p) + v); };
  for (int n = 0; n < states; n++) {
    const int im = (states + n) * W, re = n * W;
    Vec<R> h_re = load<R>(w.h + re), h_im = load<R>(w.h + im), e_re, e_im;
    for (int t = 0; t < steps; t++) {
      const Vec<R> du = load<R>(w.du + t * W), dy = R(2) * load<R>(w.dy + t * W);
      complex_decay<R>(load<R>(w.dt + t * W), w.lanes.A2 + n * W, states * W, e_re, e_im);
      const Vec<R> x_re = e_re * h_re - e_im * h_im, x_im = e_re * h_im + e_im * h_re;
      store<R>(E_re + t * W, e_re);
      store<R>(E_im + t * W, e_im);
      store<R>(X_re + t * W, x_re);
      store<R>(X_im + t * W, x_im);
      h_re = x_re + du * at<R, false>(B, t, n);
      h_im = x_im + du * at<R, false>(B, t, n + B.imaginary);
      add(w.y + t * W, R(2) * (h_re * at<R, false>(C, t, n) - h_im * at<R, false>(C, t, n + C.imaginary)));
      Vec<R> c_re = dy * h_re, c_im = -dy * h_im;
      if (C.rows) {
        add_lane_sums<R, 1>(&c_re, dC + t * C.stride + n);
        add_lane_sums<R, 1>(&c_im, dC + t * C.stride + n + C.imaginary);
      } else {
        add(w.dCc + re, c_re);
        add(w.dCc + im, c_im);
      }
    }
    const Vec<R> A_re = load<R>(w.lanes.A + re), A_im = load<R>(w.lanes.A + im);
    Vec<R> g_re = load<R>(w.g + re), g_im = load<R>(w.g + im), dA_re = {}, dA_im = {};
    for (int t = steps - 1; t >= 0; t--) {
      const Vec<R> dt = load<R>(w.dt + t * W), du = load<R>(w.du + t * W), dy = R(2) * load<R>(w.dy + t * W);
      g_re += dy * at<R, false>(C, t, n);
      g_im -= dy * at<R, false>(C, t, n + C.imaginary);
      add(w.gB + t * W, g_re * at<R, false>(B, t, n) + g_im * at<R, false>(B, t, n + B.imaginary));
      Vec<R> b_re = g_re * du, b_im = g_im * du;
      if (B.rows) {
        add_lane_sums<R, 1>(&b_re, dB + t * B.stride + n);
        add_lane_sums<R, 1>(&b_im, dB + t * B.stride + n + B.imaginary);
      } else {
        add(w.dBc + re, b_re);
        add(w.dBc + im, b_im);
      }
      const Vec<R> x_re = load<R>(X_re + t * W), x_im = load<R>(X_im + t * W);
      const Vec<R> q_re = x_re * g_re + x_im * g_im, q_im = x_re * g_im - x_im * g_re;
      add(w.ddt + t * W, A_re * q_re + A_im * q_im);
      dA_re += dt * q_re;
      dA_im += dt * q_im;
      e_re = load<R>(E_re + t * W);
      e_im = load<R>(E_im + t * W);
      const Vec<R> carry = e_re * g_re + e_im * g_im;
      g_im = e_re * g_im - e_im * g_re;
      g_re = carry;
    }
    add(w.dA + re, dA_re);
    add(w.dA + im, dA_im);
    store<R>(w.g + re, g_re);
    store<R>(w.g + im, g_im);
  }
}

// dy of one chunk: the gradient of the scan's output before the gate. Keeps dout in w.ddt when there is a gate.
template <class R>
static void load_output_gradient(Work<R>& w, const ScanArgs& a, const Span& s, int64_t t, int steps) {
  constexpr int W = Simd<R>::lanes;
  load_array<R>(w.dy, a.dout, s, t, steps, w.lanes);
  if (!a.z.p) return;
  load_array<R>(w.z, a.z, s, t, steps, w.lanes);
  for (int i = 0; i < steps; i++) {
    const Vec<R> z = load<R>(w.z + i * W);
    store<R>(w.dy + i * W, load<R>(w.dy + i * W) * z * sigmoid<R>(z));
  }
}

// What the state at the end of a span receives: from the last state's gradient, or from the span after it.
template <class R>
static void load_end_gradient(Work<R>& w, const ScanArgs& a, const Span& s, const R* span_end) {
  if (!s.final && span_end) {
    load_state_rows<R>(w.g, span_end, a, w.lanes);
  } else if (s.final && a.dlast) {
    load_states<R>(w.g, a.dlast, a, s.segment, a.segments, w.lanes);
  } else {
    memset(w.g, 0, sizeof(R) * planes(a) * a.states * Simd<R>::lanes);
  }
}

template <class R>
static void backward_span(Work<R>& w, const ScanArgs& a, const Span& s, const R* span_end, R* dB, R* dC, Vec<R>& dD,
                          Vec<R>& dbias) {
  constexpr int W = Simd<R>::lanes;
  const int64_t n = a.states;
  load_end_gradient<R>(w, a, s, span_end);
  for (int64_t t = s.steps > 0 ? (s.steps - 1) / CHUNK * CHUNK : -1; t >= 0; t -= CHUNK) {
    const int steps = (int)min64(CHUNK, s.steps - t);
    if (s.begin + t > 0)
      load_state_rows<R>(w.h, slot_of<R>(a, s, t), a, w.lanes);
    else
      load_start<R>(w, a, s, static_cast<const R*>(nullptr));
    load_steps<R>(w, a, s, t, steps);
    load_output_gradient<R>(w, a, s, t, steps);
    const Vec<R> D = load<R>(w.lanes.D);
    const Vec<R> none = {};
    for (int i = 0; i < steps; i++) {
      store<R>(w.y + i * W, D * load<R>(w.u + i * W));
      store<R>(w.gB + i * W, none);
      store<R>(w.ddt + i * W, none);
    }
    const auto B = coefficient<R>(a.B, a.variable_B, w.lanes.B, a, s, t, w.lanes.group);
    const auto C = coefficient<R>(a.C, a.variable_C, w.lanes.C, a, s, t, w.lanes.group);
    const int64_t row = ((s.row + t) * a.groups + w.lanes.group) * n;
    R* dB_rows = a.variable_B ? dB + row : nullptr;
    R* dC_rows = a.variable_C ? dC + row : nullptr;
    if (a.complex)
      backward_complex<R>(w, B, C, dB_rows, dC_rows, (int)n, steps);
    else if (a.variable_B && a.variable_C)
      backward_all_states<R, true>(w, B, C, dB_rows, dC_rows, (int)n, steps);
    else
      backward_all_states<R, false>(w, B, C, dB_rows, dC_rows, (int)n, steps);
    if (a.z.p) {
      // w.du has served: it takes dout, which the gate's own gradient needs.
      load_array<R>(w.du, a.dout, s, t, steps, w.lanes);
      for (int i = 0; i < steps; i++) {
        const Vec<R> z = load<R>(w.z + i * W), gate = sigmoid<R>(z), y = load<R>(w.y + i * W);
        store<R>(w.z + i * W, load<R>(w.du + i * W) * y * gate * (R(1) + z * (R(1) - gate)));
        store<R>(w.y + i * W, y * z * gate);
      }
      store_array<R>(w.z, a.dz, s, t, steps, w.lanes);
    }
    if (a.out.p) store_array<R>(w.y, a.out, s, t, steps, w.lanes);
    const Vec<R> bias = load<R>(w.lanes.bias);
    if (a.softplus) load_array<R>(w.z, a.delta, s, t, steps, w.lanes);
    for (int i = 0; i < steps; i++) {
      const Vec<R> u = load<R>(w.u + i * W), dy = load<R>(w.dy + i * W), gB = load<R>(w.gB + i * W);
      Vec<R> ddt = load<R>(w.ddt + i * W) + u * gB;
      if (a.softplus) {
        const Vec<R> x = load<R>(w.z + i * W) + bias;
        ddt = x > splat(R(20)) ? ddt : ddt * sigmoid<R>(x);
      }
      store<R>(w.ddt + i * W, ddt);
      store<R>(w.du + i * W, D * dy + load<R>(w.dt + i * W) * gB);
      dD += dy * u;
      dbias += ddt;
    }
    store_array<R>(w.ddt, a.ddelta, s, t, steps, w.lanes);
    store_array<R>(w.du, a.du, s, t, steps, w.lanes);
  }
  if (s.first && a.dinitial) store_states<R>(w.g, a.dinitial, a, s.segment, a.segments, w.lanes);
}

// What the state before a span receives from inside it: g <- exp(dt A) (g + dy C), from the end to the start.
template <class R>
static void backward_span_state(Work<R>& w, const ScanArgs& a, const Span& s, R* state, R* sum_dt) {
  constexpr int W = Simd<R>::lanes;
  const int64_t n = a.states;
  load_end_gradient<R>(w, a, s, static_cast<const R*>(nullptr));
  Vec<R> sum = {};
  for (int64_t t = (s.steps - 1) / CHUNK * CHUNK; t >= 0; t -= CHUNK) {
    const int steps = (int)min64(CHUNK, s.steps - t);
    load_steps<R>(w, a, s, t, steps);
    load_output_gradient<R>(w, a, s, t, steps);
    for (int i = 0; i < steps; i++) sum += load<R>(w.dt + i * W);
    const auto C = coefficient<R>(a.C, a.variable_C, w.lanes.C, a, s, t, w.lanes.group);
    for (int j = 0; j < n; j++) {
      Vec<R> g = load<R>(w.g + j * W);
      const Vec<R> A2 = load<R>(w.lanes.A2 + j * W);
      for (int i = steps - 1; i >= 0; i--)
        g = exp2v(load<R>(w.dt + i * W) * A2) * (g + load<R>(w.dy + i * W) * at<R, false>(C, i, j));
      store<R>(w.g + j * W, g);
    }
  }
  store_state_rows<R>(w.g, state, a, w.lanes);
  for (int i = 0; i < w.lanes.lanes; i++) sum_dt[w.lanes.channel + i] = sum[i];
}

// Gradients arriving at the end of every span: each span alone in parallel, then chained from the last to the first.
template <class R>
static R* chain_backward(const ScanArgs& a, const Spans& spans) {
  const int64_t n = a.states, d = a.channels;
  R *begins = zeros<R>(spans.count * n * d), *sums = zeros<R>(spans.count * d);
  for_blocks<R>(a, spans.count, [&](Work<R>& w, int64_t k, int64_t) {
    if (!spans.list[k].first) backward_span_state<R>(w, a, spans.list[k], begins + k * n * d, sums + k * d);
  });
  return chain<R>(a, spans, begins, sums, true);
}

// out[i] = the sum over the parts in their order; parts lie `count` apart. Shared by the threads of a parallel region.
template <class R>
static void add_parts(R* out, const R* parts, int64_t number, int64_t count) {
  if (!out) return;
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < (count + 1023) / 1024; i++) {
    const int64_t end = min64(count, (i + 1) * 1024);
    for (int64_t j = i * 1024; j < end; j++) out[j] = number > 0 ? parts[j] : R(0);
    for (int64_t p = 1; p < number; p++)
      for (int64_t j = i * 1024; j < end; j++) out[j] += parts[p * count + j];
  }
}

template <class R>
static void transpose_states(void* out, const R* in, const ScanArgs& a) {
  const int64_t n = a.states, d = a.channels;
  for (int64_t plane = 0; plane < planes(a) * n * d; plane += n * d)
    for (int64_t c = 0; c < d; c++)
      for (int64_t j = 0; j < n; j++) static_cast<R*>(out)[plane + c * n + j] = in[plane + j * d + c];
}

template <class R>
static void backward_typed(const ScanArgs& a) {
  const Spans spans = make_spans(a);
  const int64_t per_group = blocks_per_group(a), n = a.states, d = a.channels;
  R* ends = spans.cut ? chain_backward<R>(a, spans) : nullptr;

  // Sums over tokens are taken within fixed parts of the tokens and then over the parts in order; sums over channels
  // likewise within channel blocks. Both splits follow from the shapes alone.
  const int64_t fit = (int64_t(1) << 23) / (n * d);
  const int64_t parts = min64(spans.count, fit > 32 ? 32 : fit < 1 ? 1 : fit);
  int64_t* part_begin = zeros<int64_t>(parts + 1);
  for (int64_t k = 0, p = 0; p <= parts; p++) {
    while (k < spans.count && spans.list[k].row * parts < p * (a.rows > 0 ? a.rows : 1)) k++;
    part_begin[p] = p == parts ? spans.count : k;
  }
  part_begin[0] = 0;
  const int64_t row_sums = planes(a) * a.rows * a.groups * n, state_sums = planes(a) * n * d;
  R* dB = a.variable_B ? zeros<R>(per_group * row_sums) : nullptr;
  R* dC = a.variable_C ? zeros<R>(per_group * row_sums) : nullptr;
  R* dA = zeros<R>(parts * state_sums);
  R* dBc = a.variable_B ? nullptr : zeros<R>(parts * state_sums);
  R* dCc = a.variable_C ? nullptr : zeros<R>(parts * state_sums);
  R* dD = zeros<R>(parts * d);
  R* dbias = zeros<R>(parts * d);
  for_blocks<R>(a, parts, [&](Work<R>& w, int64_t part, int64_t block) {
    constexpr int W = Simd<R>::lanes;
    R* sums[] = {w.dA, w.dBc, w.dCc};
    for (R* rows : sums) memset(rows, 0, sizeof(R) * planes(a) * n * W);
    Vec<R> sum_D = {}, sum_bias = {};
    for (int64_t k = part_begin[part]; k < part_begin[part + 1]; k++)
      backward_span<R>(w, a, spans.list[k], ends ? ends + k * n * d : nullptr, dB ? dB + block * row_sums : nullptr,
                       dC ? dC + block * row_sums : nullptr, sum_D, sum_bias);
    const Lanes<R>& l = w.lanes;
    store_state_rows<R>(w.dA, dA + part * state_sums, a, l);
    if (dBc) store_state_rows<R>(w.dBc, dBc + part * state_sums, a, l);
    if (dCc) store_state_rows<R>(w.dCc, dCc + part * state_sums, a, l);
    for (int lane = 0; lane < l.lanes; lane++) {
      dD[part * d + l.channel + lane] = sum_D[lane];
      dbias[part * d + l.channel + lane] = sum_bias[lane];
    }
  });
  R* sum = zeros<R>(3 * state_sums);
  R *sum_B = sum + state_sums, *sum_C = sum_B + state_sums;
#pragma omp parallel num_threads(a.threads)
  {
    add_parts<R>(dB ? static_cast<R*>(a.dB) : sum_B, dB ? dB : dBc, dB ? per_group : parts, dB ? row_sums : state_sums);
    add_parts<R>(dC ? static_cast<R*>(a.dC) : sum_C, dC ? dC : dCc, dC ? per_group : parts, dC ? row_sums : state_sums);
    add_parts<R>(sum, dA, parts, state_sums);
    add_parts<R>(static_cast<R*>(a.dD), dD, parts, d);
    add_parts<R>(static_cast<R*>(a.dbias), dbias, parts, d);
  }
  transpose_states<R>(a.dA, sum, a);
  if (!dB) transpose_states<R>(a.dB, sum_B, a);
  if (!dC) transpose_states<R>(a.dC, sum_C, a);
  void* temporary[] = {sum, dB, dC, dA, dBc, dCc, dD, dbias, part_begin, ends, spans.list};
  for (void* p : temporary) free(p);
}

void scan_backward(const ScanArgs& a) {
  if (a.double_precision)
    backward_typed<double>(a);
  else
    backward_typed<float>(a);
}

}  // namespace FOOTFALL_ISA
}  // namespace scan
