// The causal depthwise convolution and its gradient, over the same layouts as the scan.
//
// A sequence is seen with its width - 1 rows of state in front. Time runs in tiles, a tile holding the rows before it
// (and, on the way back, after it) that the taps reach. Sums over tokens are split as the shapes say, not the threads.

#include <stdlib.h>

#include "math_cpu.h"
#include "scan.h"

namespace scan {
namespace FOOTFALL_ISA {

namespace {

constexpr int64_t STEPS = 64;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Segment {
  int64_t index, batch, time, steps, row;
};

Segment segment(const ConvArgs& a, int64_t s) {
  if (a.offsets) return {s, 0, a.offsets[s], a.offsets[s + 1] - a.offsets[s], a.offsets[s]};
  return {s, s, 0, a.length, s * a.length};
}

template <class R>
struct Buffers {
  R* memory;
  R *x, *y, *weight;          // [STEPS + 3 width][LANES] twice, [width][LANES]
  R *dpre, *dx, *dw, *state;  // the same, and [width][LANES] twice
  int64_t channel;
  int lanes;
};

template <class R>
Buffers<R> make_buffers(const ConvArgs& a) {
  constexpr int W = Simd<R>::lanes;
  const int64_t tile = (STEPS + 3 * a.width) * W, row = a.width * W;
  Buffers<R> b;
  b.memory = static_cast<R*>(aligned_alloc(64, ((4 * tile + 3 * row) * sizeof(R) + 63) / 64 * 64));
  R* p = b.memory;
  R** tiles[] = {&b.x, &b.y, &b.dpre, &b.dx};
  for (R** t : tiles) *t = p, p += tile;
  R** rows[] = {&b.weight, &b.dw, &b.state};
  for (R** t : rows) *t = p, p += row;
  return b;
}

// Rows begin..end of the sequence with its state in front; rows before the state and after the sequence are zero.
template <class R>
void load_rows(R* tile, const ConvArgs& a, const Segment& s, const Buffers<R>& b, int64_t begin, int64_t end) {
  constexpr int W = Simd<R>::lanes;
  const int64_t kept = a.width - 1;
  int64_t t = begin;
  if (begin < 0) {
    memset(tile, 0, sizeof(R) * W * (smaller(end, 0) - begin));
    if (a.initial && kept > 0) {
      const int64_t first = larger(begin, -kept);
      const int64_t at = (s.index * a.channels + b.channel) * kept + kept + first;
      load_tile<R>(tile + (first - begin) * W, a.initial, native_dtype<R>(), at, 1, kept,
                   (int)(smaller(end, 0) - first), b.lanes);
    }
    t = 0;
  }
  const int64_t stop = smaller(end, s.steps);
  if (stop > t) {
    const Array& x = a.x;
    load_tile<R>(tile + (t - begin) * W, x.p, x.dtype,
                 s.batch * x.batch + (s.time + t) * x.time + b.channel * x.channel, x.time, x.channel, (int)(stop - t),
                 b.lanes);
    t = stop;
  }
  if (end > larger(t, begin))
    memset(tile + (larger(t, begin) - begin) * W, 0, sizeof(R) * W * (end - larger(t, begin)));
}

// Whether the tap that reaches back `tap` rows from row t counts: it must not reach into another document.
bool connected(const ConvArgs& a, const Segment& s, int64_t t, int64_t tap) {
  if (!a.documents || tap == 0) return true;
  return t >= tap && a.documents[s.row + t - tap] == a.documents[s.row + t];
}
bool silent(const ConvArgs& a, const Segment& s, int64_t t) { return a.documents && a.documents[s.row + t] < 0; }

// y before the activation for rows begin..end; x holds rows from begin - (width - 1) on.
template <class R>
void convolve(const ConvArgs& a, const Segment& s, const Buffers<R>& b, R* y, int64_t begin, int64_t end, Vec<R> bias) {
  constexpr int W = Simd<R>::lanes;
  const int64_t kept = a.width - 1;
  for (int64_t t = begin; t < end; t++) {
    Vec<R> sum = bias;
    for (int64_t tap = 0; tap <= kept; tap++)
      if (connected(a, s, t, tap))
        sum += load<R>(b.weight + (kept - tap) * W) * load<R>(b.x + (t - begin + kept - tap) * W);
    store<R>(y + (t - begin) * W, sum);
  }
}

template <class R>
Vec<R> start_lanes(Buffers<R>& b, const ConvArgs& a, int64_t channel) {
  R bias[Simd<R>::lanes] = {};
  b.channel = channel;
  b.lanes = (int)smaller(Simd<R>::lanes, a.channels - channel);
  load_tile<R>(b.weight, a.weight, native_dtype<R>(), channel * a.width, 1, a.width, (int)a.width, b.lanes);
  for (int i = 0; i < b.lanes && a.bias; i++) bias[i] = static_cast<const R*>(a.bias)[channel + i];
  return load<R>(bias);
}

template <class R>
void forward_typed(const ConvArgs& a) {
  constexpr int W = Simd<R>::lanes;
  const int64_t blocks = (a.channels + W - 1) / W, kept = a.width - 1;
#pragma omp parallel num_threads(a.threads)
  {
    Buffers<R> b = make_buffers<R>(a);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.segments * blocks; i++) {
      const Segment s = segment(a, i / blocks);
      const Vec<R> bias = start_lanes<R>(b, a, i % blocks * W);
      for (int64_t begin = 0; begin < s.steps; begin += STEPS) {
        const int64_t end = smaller(begin + STEPS, s.steps);
        load_rows<R>(b.x, a, s, b, begin - kept, end);
        convolve<R>(a, s, b, b.y, begin, end, bias);
        for (int64_t t = begin; t < end; t++) {
          Vec<R> y = load<R>(b.y + (t - begin) * W);
          if (a.silu) y *= sigmoid<R>(y);
          if (silent(a, s, t)) y = Vec<R>{};
          store<R>(b.y + (t - begin) * W, y);
        }
        store_tile<R>(b.y, a.out.p, a.out.dtype,
                      s.batch * a.out.batch + (s.time + begin) * a.out.time + b.channel * a.out.channel, a.out.time,
                      a.out.channel, (int)(end - begin), b.lanes);
      }
      if (kept == 0) continue;
      load_rows<R>(b.x, a, s, b, s.steps - kept, s.steps);
      store_tile<R>(b.x, a.final, native_dtype<R>(), (s.index * a.channels + b.channel) * kept, 1, kept, (int)kept,
                    b.lanes);
    }
    free(b.memory);
  }
}

// The gradient of rows begin..end, which may begin in the state; adds the weights' gradient of rows begin..end >= 0.
template <class R>
void backward_rows(const ConvArgs& a, const Segment& s, Buffers<R>& b, int64_t begin, int64_t end, Vec<R> bias,
                   Vec<R>& dbias) {
  constexpr int W = Simd<R>::lanes;
  const int64_t kept = a.width - 1, first = larger(begin, 0), reach = smaller(end + kept, s.steps);
  const Vec<R> none = {};
  for (int64_t t = begin; t < end; t++) store<R>(b.dx + (t - begin) * W, none);
  if (reach > first) {
    load_rows<R>(b.x, a, s, b, first - kept, reach);
    const Array& g = a.dout;
    load_tile<R>(b.dpre, g.p, g.dtype, s.batch * g.batch + (s.time + first) * g.time + b.channel * g.channel, g.time,
                 g.channel, (int)(reach - first), b.lanes);
    if (a.silu) convolve<R>(a, s, b, b.y, first, reach, bias);
    for (int64_t t = first; t < reach; t++) {
      Vec<R> g = load<R>(b.dpre + (t - first) * W);
      if (a.silu) {
        const Vec<R> y = load<R>(b.y + (t - first) * W), gate = sigmoid<R>(y);
        g *= gate * (R(1) + y * (R(1) - gate));
      }
      if (silent(a, s, t)) g = none;
      store<R>(b.dpre + (t - first) * W, g);
      if (t < end) dbias += g;
      for (int64_t tap = 0; tap <= kept; tap++) {
        if (!connected(a, s, t, tap)) continue;
        R *w = b.weight + (kept - tap) * W, *dw = b.dw + (kept - tap) * W;
        if (t < end) store<R>(dw, load<R>(dw) + g * load<R>(b.x + (t - first + kept - tap) * W));
        if (t - tap < begin || t - tap >= end) continue;
        R* dx = b.dx + (t - tap - begin) * W;
        store<R>(dx, load<R>(dx) + g * load<R>(w));
      }
    }
  }
  if (a.dfinal && kept > 0 && end > s.steps - kept) {
    load_tile<R>(b.state, a.dfinal, native_dtype<R>(), (s.index * a.channels + b.channel) * kept, 1, kept, (int)kept,
                 b.lanes);
    for (int64_t t = larger(begin, s.steps - kept); t < end; t++) {
      R* dx = b.dx + (t - begin) * W;
      store<R>(dx, load<R>(dx) + load<R>(b.state + (t - s.steps + kept) * W));
    }
  }
}

template <class R>
void backward_typed(const ConvArgs& a) {
  constexpr int W = Simd<R>::lanes;
  const int64_t blocks = (a.channels + W - 1) / W, kept = a.width - 1, d = a.channels;
  const int64_t parts = smaller(larger(a.segments, 1), 32);
  R* dw = static_cast<R*>(calloc(parts * d * a.width + 1, sizeof(R)));
  R* db = static_cast<R*>(calloc(parts * d + 1, sizeof(R)));
#pragma omp parallel num_threads(a.threads)
  {
    Buffers<R> b = make_buffers<R>(a);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < parts * blocks; i++) {
      const int64_t part = i / blocks;
      const Vec<R> bias = start_lanes<R>(b, a, i % blocks * W);
      Vec<R> dbias = {};
      memset(b.dw, 0, sizeof(R) * a.width * W);
      for (int64_t k = a.segments * part / parts; k < a.segments * (part + 1) / parts; k++) {
        const Segment s = segment(a, k);
        for (int64_t begin = 0; begin < s.steps; begin += STEPS) {
          const int64_t end = smaller(begin + STEPS, s.steps);
          backward_rows<R>(a, s, b, begin, end, bias, dbias);
          store_tile<R>(b.dx, a.dx.p, a.dx.dtype,
                        s.batch * a.dx.batch + (s.time + begin) * a.dx.time + b.channel * a.dx.channel, a.dx.time,
                        a.dx.channel, (int)(end - begin), b.lanes);
        }
        if (a.dinitial && kept > 0) {
          backward_rows<R>(a, s, b, -kept, 0, bias, dbias);
          store_tile<R>(b.dx, a.dinitial, native_dtype<R>(), (k * d + b.channel) * kept, 1, kept, (int)kept, b.lanes);
        }
      }
      store_tile<R>(b.dw, dw + part * d * a.width, native_dtype<R>(), b.channel * a.width, 1, a.width, (int)a.width,
                    b.lanes);
      for (int lane = 0; lane < b.lanes; lane++) db[part * d + b.channel + lane] = dbias[lane];
    }
    free(b.memory);
  }
  R *weight = static_cast<R*>(a.dweight), *bias = static_cast<R*>(a.dbias);
  for (int64_t j = 0; j < d * a.width; j++) {
    weight[j] = dw[j];
    for (int64_t p = 1; p < parts; p++) weight[j] += dw[p * d * a.width + j];
  }
  for (int64_t j = 0; j < d && bias; j++) {
    bias[j] = db[j];
    for (int64_t p = 1; p < parts; p++) bias[j] += db[p * d + j];
  }
  free(dw);
  free(db);
}

}  // namespace

void conv_forward(const ConvArgs& a) {
  if (a.double_precision)
    forward_typed<double>(a);
  else
    forward_typed<float>(a);
}

void conv_backward(const ConvArgs& a) {
  if (a.double_precision)
    backward_typed<double>(a);
  else
    backward_typed<float>(a);
}

}  // namespace FOOTFALL_ISA
}  // namespace scan
