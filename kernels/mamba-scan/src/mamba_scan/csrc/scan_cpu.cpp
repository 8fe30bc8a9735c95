// The selective scan and its gradient for real A.
//
// LANES channels advance together, one per vector lane; the states are a loop, NB of them held in registers. Time runs
// in chunks of CHUNK steps counted from the start of a segment. The forward pass saves the state at every chunk start
// but the first; the backward pass walks the chunks in reverse, runs each forward again and then backward.
// No result depends on the number of threads, with one exception: a few very long segments are cut into spans (see
// make_spans) when there are more threads than other work.

#include <omp.h>
#include <stdlib.h>

#include "scan.h"
#include "vec.h"

namespace scan {
namespace FOOTFALL_ISA {

#ifndef SCAN_CHUNK
#define SCAN_CHUNK 64
#endif
constexpr int CHUNK = SCAN_CHUNK;
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
    const bool cut = 2 * a.segments * a.groups * blocks_per_group(a) <= a.threads && longest >= 4 * SPAN;
    Spans spans = {static_cast<Span*>(malloc(sizeof(Span) * (count + 1))), 0, cut};
    for (int64_t s = 0; s < a.segments; s++) {
        const int64_t start = a.offsets ? a.offsets[s] : 0;
        const int64_t steps = a.offsets ? a.offsets[s + 1] - start : a.length;
        const int64_t row = a.offsets ? start : s * a.length;
        const int64_t slot = a.offsets ? start / CHUNK : s * ((a.length - 1) / CHUNK);
        int64_t begin = 0;
        do {
            const int64_t n = cut ? min64(SPAN, steps - begin) : steps;
            spans.list[spans.count++] = {s,        a.offsets ? 0 : s, start + begin, begin, n, slot, row + begin,
                                         begin == 0, begin + n >= steps};
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
    R *A, *A2, *B, *C;  // [states][LANES]; B and C only where constant
    R D[VecOf<R>::LANES], bias[VecOf<R>::LANES];
};

template <class R>
struct Work {
    R* memory;
    R *dt, *u, *du, *y, *z, *dy, *gB, *ddt;  // [CHUNK][LANES]
    R *h, *g, *dA, *dBc, *dCc;               // [states][LANES]
    R *E, *X;                                // [CHUNK][NB][LANES]
    Lanes<R> lanes;
};

template <class R>
constexpr int big_block() {
    return SCAN_VECTOR_BYTES == 64 && sizeof(R) == 4 ? 16 : 8;
}

template <class R>
static Work<R> make_work(int64_t states) {
    constexpr int W = VecOf<R>::LANES;
    const int64_t tile = CHUNK * W, row = states * W, wide = (int64_t)CHUNK * big_block<R>() * W;
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

template <class R>
static void set_lanes(Lanes<R>& l, const ScanArgs& a, int64_t group, int64_t channel, int64_t end) {
    constexpr int W = VecOf<R>::LANES;
    const int64_t n = a.states;
    l.channel = channel;
    l.group = group;
    l.lanes = (int)min64(W, end - channel);
    load_tile<R>(l.A, a.A, native_dtype<R>(), channel * n, 1, n, (int)n, l.lanes);
    for (int64_t i = 0; i < n * W; i++) l.A2[i] = l.A[i] * R(LOG2E);
    if (!a.variable_B) load_tile<R>(l.B, a.B, native_dtype<R>(), channel * n, 1, n, (int)n, l.lanes);
    if (!a.variable_C) load_tile<R>(l.C, a.C, native_dtype<R>(), channel * n, 1, n, (int)n, l.lanes);
    for (int i = 0; i < W; i++) {
        const bool in = i < l.lanes;
        l.D[i] = in && a.D ? static_cast<const R*>(a.D)[channel + i] : R(0);
        l.bias[i] = in && a.bias ? static_cast<const R*>(a.bias)[channel + i] : R(0);
    }
}

template <class R>
static void load_array(R* tile, const Array& x, const Span& s, int64_t t, int steps, const Lanes<R>& l) {
    load_tile<R>(tile, x.p, x.dtype, s.batch * x.batch + (s.time + t) * x.time + l.channel * x.channel, x.time,
                 x.channel, steps, l.lanes);
}
template <class R>
static void store_array(const R* tile, const Array& x, const Span& s, int64_t t, int steps, const Lanes<R>& l) {
    store_tile<R>(tile, x.p, x.dtype, s.batch * x.batch + (s.time + t) * x.time + l.channel * x.channel, x.time,
                  x.channel, steps, l.lanes);
}

// Step sizes, inputs and their product for one chunk.
template <class R>
static void load_steps(Work<R>& w, const ScanArgs& a, const Span& s, int64_t t, int steps) {
    constexpr int W = VecOf<R>::LANES;
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
};
template <class R, bool ROWS>
SCAN_INLINE Vec<R> at(const Coefficient<R>& c, int t, int n) {
    if (ROWS || c.rows) return splat<R>(c.rows[t * c.stride + n]);
    return load<R>(c.lanes + n * VecOf<R>::LANES);
}
template <class R>
static Coefficient<R> coefficient(const void* x, int variable, const R* lanes, const ScanArgs& a, const Span& s,
                                  int64_t t, int64_t group) {
    if (!variable) return {nullptr, lanes, 0};
    return {static_cast<const R*>(x) + ((s.row + t) * a.groups + group) * a.states, nullptr, a.groups * a.states};
}

// h <- exp(dt A) h + dt u B;  y += C h, for NB states from n0 on.
template <class R, int NB, bool ROWS, bool OUTPUT>
static void forward_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, int n0, int steps) {
    constexpr int W = VecOf<R>::LANES;
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

template <class R, bool ROWS, bool OUTPUT>
static void forward_all_states(Work<R>& w, const Coefficient<R>& B, const Coefficient<R>& C, int states, int steps) {
    int n = 0;
    for (; n + big_block<R>() <= states; n += big_block<R>())
        forward_states<R, big_block<R>(), ROWS, OUTPUT>(w, B, C, n, steps);
    for (; n + 4 <= states; n += 4) forward_states<R, 4, ROWS, OUTPUT>(w, B, C, n, steps);
    for (; n < states; n++) forward_states<R, 1, ROWS, OUTPUT>(w, B, C, n, steps);
}

template <class R>
static void load_start(Work<R>& w, const ScanArgs& a, const Span& s, const R* span_starts) {
    constexpr int W = VecOf<R>::LANES;
    const int64_t n = a.states;
    if (span_starts && !s.first) {
        load_tile<R>(w.h, span_starts, native_dtype<R>(), w.lanes.channel, a.channels, 1, (int)n, w.lanes.lanes);
    } else if (s.first && a.initial) {
        load_tile<R>(w.h, a.initial, native_dtype<R>(), (s.segment * a.channels + w.lanes.channel) * n, 1, n, (int)n,
                     w.lanes.lanes);
    } else {
        memset(w.h, 0, sizeof(R) * n * W);
    }
}

template <class R>
static R* slot_of(const ScanArgs& a, const Span& s, int64_t t) {
    return static_cast<R*>(a.saved) + (s.slot + (s.begin + t) / CHUNK - 1) * a.states * a.channels;
}

template <class R>
static void forward_span(Work<R>& w, const ScanArgs& a, const Span& s, const R* span_start) {
    constexpr int W = VecOf<R>::LANES;
    const int64_t n = a.states;
    load_start<R>(w, a, s, span_start);
    for (int64_t t = 0; t < s.steps; t += CHUNK) {
        const int steps = (int)min64(CHUNK, s.steps - t);
        if (a.save && s.begin + t > 0)
            store_tile<R>(w.h, slot_of<R>(a, s, t), native_dtype<R>(), w.lanes.channel, a.channels, 1, (int)n,
                          w.lanes.lanes);
        load_steps<R>(w, a, s, t, steps);
        const Vec<R> D = load<R>(w.lanes.D);
        for (int i = 0; i < steps; i++) store<R>(w.y + i * W, D * load<R>(w.u + i * W));
        const auto B = coefficient<R>(a.B, a.variable_B, w.lanes.B, a, s, t, w.lanes.group);
        const auto C = coefficient<R>(a.C, a.variable_C, w.lanes.C, a, s, t, w.lanes.group);
        if (a.variable_B && a.variable_C)
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
    if (s.final)
        store_tile<R>(w.h, a.last, native_dtype<R>(), (s.segment * a.channels + w.lanes.channel) * n, 1, n, (int)n,
                      w.lanes.lanes);
}

// The state a span ends in when it starts from zero (from the initial state if it is the first), and its summed steps.
template <class R>
static void forward_span_state(Work<R>& w, const ScanArgs& a, const Span& s, R* state, R* sum_dt) {
    constexpr int W = VecOf<R>::LANES;
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
    store_tile<R>(w.h, state, native_dtype<R>(), w.lanes.channel, a.channels, 1, (int)n, w.lanes.lanes);
    for (int i = 0; i < w.lanes.lanes; i++) sum_dt[w.lanes.channel + i] = sum[i];
}

// Calls work(lane block) for the channels of one block of one group.
template <class R, class F>
static void for_lanes(Work<R>& w, const ScanArgs& a, int64_t block_index, F work) {
    const int64_t per_group = blocks_per_group(a), width = a.channels / a.groups, block = channel_block(a);
    const int64_t group = block_index / per_group, first = (block_index % per_group) * block;
    const int64_t end = group * width + min64(width, first + block);
    for (int64_t c = group * width + first; c < end; c += VecOf<R>::LANES) {
        set_lanes<R>(w.lanes, a, group, c, end);
        work();
    }
}

template <class R>
static R* zeros(int64_t count) {
    return static_cast<R*>(calloc(count > 0 ? count : 1, sizeof(R)));
}

// States at the start of every span: the spans run from zero in parallel, then are chained in order.
template <class R>
static R* chain_forward(const ScanArgs& a, const Spans& spans) {
    const int64_t blocks = a.groups * blocks_per_group(a), n = a.states, d = a.channels;
    R* ends = zeros<R>(spans.count * n * d);
    R* sums = zeros<R>(spans.count * d);
#pragma omp parallel num_threads(a.threads)
    {
        Work<R> w = make_work<R>(n);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < spans.count * blocks; i++) {
            const int64_t k = i / blocks;
            if (spans.list[k].final) continue;
            for_lanes<R>(w, a, i % blocks,
                         [&] { forward_span_state<R>(w, a, spans.list[k], ends + k * n * d, sums + k * d); });
        }
        free(w.memory);
    }
    R* starts = zeros<R>(spans.count * n * d);
    const R* A = static_cast<const R*>(a.A);
    for (int64_t k = 1; k < spans.count; k++) {
        if (spans.list[k].first) continue;
        const bool chained = !spans.list[k - 1].first;
        for (int64_t j = 0; j < n; j++)
            for (int64_t c = 0; c < d; c++) {
                const int64_t at = ((k - 1) * n + j) * d + c;
                const R decay = expv<R>(splat<R>(A[c * n + j] * sums[(k - 1) * d + c]))[0];
                starts[at + n * d] = ends[at] + (chained ? decay * starts[at] : R(0));
            }
    }
    free(ends);
    free(sums);
    return starts;
}

template <class R>
static void forward_typed(const ScanArgs& a) {
    const Spans spans = make_spans(a);
    const int64_t blocks = a.groups * blocks_per_group(a), n = a.states, d = a.channels;
    R* starts = spans.cut ? chain_forward<R>(a, spans) : nullptr;
#pragma omp parallel num_threads(a.threads)
    {
        Work<R> w = make_work<R>(n);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < spans.count * blocks; i++) {
            const int64_t k = i / blocks;
            for_lanes<R>(w, a, i % blocks,
                         [&] { forward_span<R>(w, a, spans.list[k], starts ? starts + k * n * d : nullptr); });
        }
        free(w.memory);
    }
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
    constexpr int W = VecOf<R>::LANES;
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
    constexpr int W = VecOf<R>::LANES;
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
    for (; n + big_block<R>() <= states; n += big_block<R>())
        backward_states<R, big_block<R>(), ROWS>(w, B, C, dB, dC, n, steps);
    for (; n + 4 <= states; n += 4) backward_states<R, 4, ROWS>(w, B, C, dB, dC, n, steps);
    for (; n < states; n++) backward_states<R, 1, ROWS>(w, B, C, dB, dC, n, steps);
}

// dy of one chunk: the gradient of the scan's output before the gate. Keeps dout in w.ddt when there is a gate.
template <class R>
static void load_output_gradient(Work<R>& w, const ScanArgs& a, const Span& s, int64_t t, int steps) {
    constexpr int W = VecOf<R>::LANES;
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
    const int64_t n = a.states;
    if (!s.final && span_end) {
        load_tile<R>(w.g, span_end, native_dtype<R>(), w.lanes.channel, a.channels, 1, (int)n, w.lanes.lanes);
    } else if (s.final && a.dlast) {
        load_tile<R>(w.g, a.dlast, native_dtype<R>(), (s.segment * a.channels + w.lanes.channel) * n, 1, n, (int)n,
                     w.lanes.lanes);
    } else {
        memset(w.g, 0, sizeof(R) * n * VecOf<R>::LANES);
    }
}

template <class R>
static void backward_span(Work<R>& w, const ScanArgs& a, const Span& s, const R* span_end, R* dB, R* dC, Vec<R>& dD,
                          Vec<R>& dbias) {
    constexpr int W = VecOf<R>::LANES;
    const int64_t n = a.states;
    load_end_gradient<R>(w, a, s, span_end);
    for (int64_t t = s.steps > 0 ? (s.steps - 1) / CHUNK * CHUNK : -1; t >= 0; t -= CHUNK) {
        const int steps = (int)min64(CHUNK, s.steps - t);
        if (s.begin + t > 0)
            load_tile<R>(w.h, slot_of<R>(a, s, t), native_dtype<R>(), w.lanes.channel, a.channels, 1, (int)n,
                         w.lanes.lanes);
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
        if (a.variable_B && a.variable_C)
            backward_all_states<R, true>(w, B, C, dB_rows, dC_rows, (int)n, steps);
        else
            backward_all_states<R, false>(w, B, C, dB_rows, dC_rows, (int)n, steps);
        if (a.z.p) {
            // w.du has served: it takes dout, which the gate's own gradient needs.
            load_array<R>(w.du, a.dout, s, t, steps, w.lanes);
            for (int i = 0; i < steps; i++) {
                const Vec<R> z = load<R>(w.z + i * W), gate = sigmoid<R>(z);
                store<R>(w.z + i * W,
                         load<R>(w.du + i * W) * load<R>(w.y + i * W) * gate * (R(1) + z * (R(1) - gate)));
            }
            store_array<R>(w.z, a.dz, s, t, steps, w.lanes);
        }
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
    if (s.first && a.dinitial)
        store_tile<R>(w.g, a.dinitial, native_dtype<R>(), (s.segment * a.channels + w.lanes.channel) * n, 1, n, (int)n,
                      w.lanes.lanes);
}

// What the state before a span receives from inside it: g <- exp(dt A) (g + dy C), from the end to the start.
template <class R>
static void backward_span_state(Work<R>& w, const ScanArgs& a, const Span& s, R* state, R* sum_dt) {
    constexpr int W = VecOf<R>::LANES;
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
    store_tile<R>(w.g, state, native_dtype<R>(), w.lanes.channel, a.channels, 1, (int)n, w.lanes.lanes);
    for (int i = 0; i < w.lanes.lanes; i++) sum_dt[w.lanes.channel + i] = sum[i];
}

// Gradients arriving at the end of every span: each span alone in parallel, then chained from the last to the first.
template <class R>
static R* chain_backward(const ScanArgs& a, const Spans& spans) {
    const int64_t blocks = a.groups * blocks_per_group(a), n = a.states, d = a.channels;
    R* begins = zeros<R>(spans.count * n * d);
    R* sums = zeros<R>(spans.count * d);
#pragma omp parallel num_threads(a.threads)
    {
        Work<R> w = make_work<R>(n);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < spans.count * blocks; i++) {
            const int64_t k = i / blocks;
            if (spans.list[k].first) continue;
            for_lanes<R>(w, a, i % blocks,
                         [&] { backward_span_state<R>(w, a, spans.list[k], begins + k * n * d, sums + k * d); });
        }
        free(w.memory);
    }
    R* ends = zeros<R>(spans.count * n * d);
    const R* A = static_cast<const R*>(a.A);
    for (int64_t k = spans.count - 2; k >= 0; k--) {
        if (spans.list[k].final) continue;
        const bool chained = !spans.list[k + 1].final;
        for (int64_t j = 0; j < n; j++)
            for (int64_t c = 0; c < d; c++) {
                const int64_t at = ((k + 1) * n + j) * d + c;
                const R decay = expv<R>(splat<R>(A[c * n + j] * sums[(k + 1) * d + c]))[0];
                ends[at - n * d] = begins[at] + (chained ? decay * ends[at] : R(0));
            }
    }
    free(begins);
    free(sums);
    return ends;
}

// out[i] = the sum over the parts in their order; parts lie `count` apart.
template <class R>
static void add_parts(R* out, const R* parts, int64_t number, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < (count + 255) / 256; i++) {
        const int64_t end = min64(count, (i + 1) * 256);
        for (int64_t j = i * 256; j < end; j++) out[j] = parts[j];
        for (int64_t p = 1; p < number; p++)
            for (int64_t j = i * 256; j < end; j++) out[j] += parts[p * count + j];
    }
}

template <class R>
static void transpose_states(R* out, const R* in, int64_t n, int64_t d) {
    for (int64_t c = 0; c < d; c++)
        for (int64_t j = 0; j < n; j++) out[c * n + j] = in[j * d + c];
}

template <class R>
static void backward_typed(const ScanArgs& a) {
    const Spans spans = make_spans(a);
    const int64_t per_group = blocks_per_group(a), blocks = a.groups * per_group, n = a.states, d = a.channels;
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
    const int64_t row_sums = a.rows * a.groups * n, state_sums = n * d;
    R* dB = a.variable_B ? zeros<R>(per_group * row_sums) : nullptr;
    R* dC = a.variable_C ? zeros<R>(per_group * row_sums) : nullptr;
    R* dA = zeros<R>(parts * state_sums);
    R* dBc = a.variable_B ? nullptr : zeros<R>(parts * state_sums);
    R* dCc = a.variable_C ? nullptr : zeros<R>(parts * state_sums);
    R* dD = zeros<R>(parts * d);
    R* dbias = zeros<R>(parts * d);
#pragma omp parallel num_threads(a.threads)
    {
        Work<R> w = make_work<R>(n);
        constexpr int W = VecOf<R>::LANES;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < parts * blocks; i++) {
            const int64_t part = i / blocks, block = i % blocks % per_group;
            for_lanes<R>(w, a, i % blocks, [&] {
                memset(w.dA, 0, sizeof(R) * n * W);
                memset(w.dBc, 0, sizeof(R) * n * W);
                memset(w.dCc, 0, sizeof(R) * n * W);
                Vec<R> sum_D = {}, sum_bias = {};
                for (int64_t k = part_begin[part]; k < part_begin[part + 1]; k++)
                    backward_span<R>(w, a, spans.list[k], ends ? ends + k * n * d : nullptr,
                                     dB ? dB + block * row_sums : nullptr, dC ? dC + block * row_sums : nullptr, sum_D,
                                     sum_bias);
                const Lanes<R>& l = w.lanes;
                const int native = native_dtype<R>();
                store_tile<R>(w.dA, dA + part * state_sums, native, l.channel, d, 1, (int)n, l.lanes);
                if (dBc) store_tile<R>(w.dBc, dBc + part * state_sums, native, l.channel, d, 1, (int)n, l.lanes);
                if (dCc) store_tile<R>(w.dCc, dCc + part * state_sums, native, l.channel, d, 1, (int)n, l.lanes);
                for (int lane = 0; lane < l.lanes; lane++) {
                    dD[part * d + l.channel + lane] = sum_D[lane];
                    dbias[part * d + l.channel + lane] = sum_bias[lane];
                }
            });
        }
        free(w.memory);
    }
    R* sum = zeros<R>(state_sums);
    add_parts<R>(sum, dA, parts, state_sums, a.threads);
    transpose_states<R>(static_cast<R*>(a.dA), sum, n, d);
    if (dB) {
        add_parts<R>(static_cast<R*>(a.dB), dB, per_group, row_sums, a.threads);
    } else {
        add_parts<R>(sum, dBc, parts, state_sums, a.threads);
        transpose_states<R>(static_cast<R*>(a.dB), sum, n, d);
    }
    if (dC) {
        add_parts<R>(static_cast<R*>(a.dC), dC, per_group, row_sums, a.threads);
    } else {
        add_parts<R>(sum, dCc, parts, state_sums, a.threads);
        transpose_states<R>(static_cast<R*>(a.dC), sum, n, d);
    }
    if (a.dD) add_parts<R>(static_cast<R*>(a.dD), dD, parts, d, a.threads);
    if (a.dbias) add_parts<R>(static_cast<R*>(a.dbias), dbias, parts, d, a.threads);
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
