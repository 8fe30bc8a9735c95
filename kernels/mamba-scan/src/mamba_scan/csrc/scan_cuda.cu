// The selective scan and its gradient on a card.
//
// A channel belongs to `lanes` threads of a warp with NS states each, held in registers while time runs step by step;
// blocks are segments times blocks of channels. Signals pass through shared memory in tiles of a few steps, so that any
// strides are read along memory. The forward pass saves the state every CHUNK steps; the backward pass walks chunks in
// reverse, runs each forward for the states its tiles start from, then each tile forward once more and back. Sums over
// segments and blocks of channels are left to the caller in parts, to be added in order: no atomics.

#include "scan_cuda.h"
#include "step.h"

namespace scan {
namespace {

constexpr int CHUNK = 64;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

// Where a thread stands, and the sizes that its block shares.
struct Place {
  int lanes, channels;      // threads of a channel; channels of the block
  int lane, slot;           // of this thread: its share of the states, its channel within the block
  int64_t group, channel0;  // the block's group and first channel
  int inside;               // channels of the block that exist
};

struct Span {
  int64_t segment, batch, time, row, steps, slot;
};

__device__ Place place(const ScanArgs& a, int lanes) {
  Place p;
  p.lanes = lanes;
  p.channels = THREADS / lanes;
  p.lane = threadIdx.x % lanes;
  p.slot = threadIdx.x / lanes;
  const int64_t width = a.channels / a.groups, blocks = (width + p.channels - 1) / p.channels;
  const int64_t first = blockIdx.y % blocks * p.channels;
  p.group = blockIdx.y / blocks;
  p.channel0 = p.group * width + first;
  p.inside = (int)(width - first < p.channels ? width - first : p.channels);
  return p;
}

__device__ Span span(const ScanArgs& a, int64_t s) {
  if (a.offsets) {
    const int64_t begin = a.offsets[s];
    return {s, 0, begin, begin, a.offsets[s + 1] - begin, begin / CHUNK};
  }
  return {s, s, 0, s * a.length, a.length, s * ((a.length > 0 ? a.length - 1 : 0) / CHUNK)};
}

// Calls f(step, channel, element) for the steps first..first + count of the block's channels, neighbours in memory by
// neighbouring threads.
template <class F>
__device__ void for_tile(const Array& x, const Span& s, const Place& p, int64_t first, int count, F f) {
  const bool along_time = x.time < x.channel;
  for (int i = threadIdx.x; i < count * p.inside; i += THREADS) {
    const int t = along_time ? i % count : i / p.inside, c = along_time ? i / count : i % p.inside;
    f(t, c, s.batch * x.batch + (s.time + first + t) * x.time + (p.channel0 + c) * x.channel);
  }
}

// Rows of a tile are a little apart from each other, so that a column lies in all banks of shared memory.
__device__ int tile_row(const Place& p) { return p.channels + 1; }

__device__ void load_tile(float* tile, const Array& x, const Span& s, const Place& p, int64_t first, int count) {
  for_tile(x, s, p, first, count, [&](int t, int c, int64_t i) { tile[t * tile_row(p) + c] = read(x.p, x.dtype, i); });
}

__device__ void store_tile(const float* tile, const Array& x, const Span& s, const Place& p, int64_t first, int count) {
  for_tile(x, s, p, first, count, [&](int t, int c, int64_t i) { write(x.p, x.dtype, i, tile[t * tile_row(p) + c]); });
}

__device__ void load_step_sizes(float* tile, const ScanArgs& a, const Span& s, const Place& p, int64_t first,
                                int count) {
  const float* bias = static_cast<const float*>(a.bias);
  for_tile(a.delta, s, p, first, count, [&](int t, int c, int64_t i) {
    const float raw = read(a.delta.p, a.delta.dtype, i) + (bias ? bias[p.channel0 + c] : 0.0f);
    tile[t * tile_row(p) + c] = a.softplus ? softplus(raw) : raw;
  });
}

// NS values of a thread's states: from the coefficients of a row, or from an array [channels, states].
template <int NS>
__device__ void load_states(float* values, const float* x, const ScanArgs& a, const Place& p, int64_t step = 1) {
  for (int j = 0; j < NS; j++) {
    const int64_t n = p.lane * NS + j;
    values[j] = n < a.states && p.slot < p.inside && x ? x[n * step] : 0.0f;
  }
}

template <int NS>
__device__ void store_states(const float* values, float* x, const ScanArgs& a, const Place& p, int64_t step = 1) {
  for (int j = 0; j < NS; j++) {
    const int64_t n = p.lane * NS + j;
    if (n < a.states && p.slot < p.inside) x[n * step] = values[j];
  }
}

__device__ int64_t parameter(const ScanArgs& a, const Place& p) { return (p.channel0 + p.slot) * a.states; }
__device__ int64_t state(const ScanArgs& a, const Place& p, const Span& s) {
  return s.segment * a.channels * a.states + parameter(a, p);
}
__device__ int64_t coefficient(const ScanArgs& a, const Place& p, const Span& s, int64_t t) {
  return ((s.row + t) * a.groups + p.group) * a.states;
}
// Chunk starts lie as [slots, states, channels].
__device__ float* saved(const ScanArgs& a, const Place& p, const Span& s, int64_t t) {
  return static_cast<float*>(a.saved) + (s.slot + t / CHUNK - 1) * a.states * a.channels + p.channel0 + p.slot;
}

// The sum over the threads of a channel, in all of them.
__device__ float over_lanes(float x, const Place& p) {
  for (int apart = p.lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL, x, apart);
  return x;
}
// The sum over the channels of a warp.
__device__ float over_channels(float x, const Place& p) {
  for (int apart = 16; apart >= p.lanes; apart /= 2) x += __shfl_xor_sync(ALL, x, apart);
  return x;
}

template <int NS>
struct Parameters {
  float A[NS], A2[NS], B[NS], C[NS], D;

  __device__ Parameters(const ScanArgs& a, const Place& p) {
    const int64_t at = parameter(a, p);
    load_states<NS>(A, static_cast<const float*>(a.A) + at, a, p);
    if (!a.variable_B) load_states<NS>(B, static_cast<const float*>(a.B) + at, a, p);
    if (!a.variable_C) load_states<NS>(C, static_cast<const float*>(a.C) + at, a, p);
    for (int j = 0; j < NS; j++) A2[j] = A[j] * 1.4426950408889634f;
    D = a.D && p.slot < p.inside ? static_cast<const float*>(a.D)[p.channel0 + p.slot] : 0.0f;
  }
  __device__ void at_step(const ScanArgs& a, const Place& p, const Span& s, int64_t t) {
    const int64_t at = coefficient(a, p, s, t);
    if (a.variable_B) load_states<NS>(B, static_cast<const float*>(a.B) + at, a, p);
    if (a.variable_C) load_states<NS>(C, static_cast<const float*>(a.C) + at, a, p);
  }
};

template <int NS>
__device__ void load_start(float* h, const ScanArgs& a, const Place& p, const Span& s) {
  const float* initial = static_cast<const float*>(a.initial);
  load_states<NS>(h, initial ? initial + state(a, p, s) : nullptr, a, p);
}

constexpr int FORWARD_TILE = 16;

template <int NS>
__global__ void __launch_bounds__(THREADS) scan_forward_kernel(ScanArgs a, int lanes) {
  SHARED_FLOATS(memory);
  const Place p = place(a, lanes);
  const int size = FORWARD_TILE * tile_row(p);
  float *dt = memory, *u = dt + size, *y = u + size;
  const Span s = span(a, blockIdx.x);
  Parameters<NS> w(a, p);
  float h[NS];
  load_start<NS>(h, a, p, s);
  for (int64_t first = 0; first < s.steps; first += FORWARD_TILE) {
    const int count = (int)(s.steps - first < FORWARD_TILE ? s.steps - first : FORWARD_TILE);
    if (a.save && first > 0 && first % CHUNK == 0) store_states<NS>(h, saved(a, p, s, first), a, p, a.channels);
    __syncthreads();
    load_step_sizes(dt, a, s, p, first, count);
    load_tile(u, a.u, s, p, first, count);
    __syncthreads();
    for (int t = 0; t < count; t++) {
      const int at = t * tile_row(p) + p.slot;
      w.at_step(a, p, s, first + t);
      const float share = p.slot < p.inside ? forward_step<NS>(h, w.A2, dt[at], u[at], w.B, w.C) : 0.0f;
      const float sum = over_lanes(share, p);
      if (p.lane == 0 && p.slot < p.inside) y[at] = sum + w.D * u[at];
    }
    __syncthreads();
    if (a.z.p)
      for_tile(a.z, s, p, first, count, [&](int t, int c, int64_t i) {
        const float z = read(a.z.p, a.z.dtype, i);
        y[t * tile_row(p) + c] *= z * sigmoid(z);
      });
    __syncthreads();
    store_tile(y, a.out, s, p, first, count);
  }
  store_states<NS>(h, static_cast<float*>(a.last) + state(a, p, s), a, p);
}

// Steps the backward pass holds in registers: fewer where a thread has more states.
template <int NS>
HOST_DEVICE constexpr int backward_tile() {
  return NS <= 4 ? 8 : 4;
}

template <int NS>
__global__ void __launch_bounds__(THREADS) scan_backward_kernel(ScanArgs a, ScanParts parts, int lanes) {
  constexpr int TILE = backward_tile<NS>();
  SHARED_FLOATS(memory);
  const Place p = place(a, lanes);
  const int size = TILE * tile_row(p), states = (int)a.states;
  float *dt = memory, *u = dt + size, *dy = u + size, *z = dy + size, *y = z + size, *du = y + size, *ddt = du + size;
  float* rows = ddt + size;  // [WARPS][TILE][B or C][states]
  const int warp = threadIdx.x / 32;
  const int64_t width = a.channels / a.groups, blocks = (width + p.channels - 1) / p.channels;
  const int64_t block = blockIdx.y % blocks;
  const bool mine = p.slot < p.inside;
  Parameters<NS> w(a, p);
  float sum_A[NS] = {}, sum_B[NS] = {}, sum_C[NS] = {}, sum_D = 0.0f, sum_bias = 0.0f;
  for (int64_t segment = blockIdx.x; segment < a.segments; segment += parts.count) {
    const Span s = span(a, segment);
    float g[NS];
    const float* dlast = static_cast<const float*>(a.dlast);
    load_states<NS>(g, dlast ? dlast + state(a, p, s) : nullptr, a, p);
    for (int64_t chunk = s.steps > 0 ? (s.steps - 1) / CHUNK * CHUNK : -1; chunk >= 0; chunk -= CHUNK) {
      const int64_t stop = s.steps - chunk < CHUNK ? s.steps : chunk + CHUNK;
      const int tiles = (int)((stop - chunk + TILE - 1) / TILE);
      float h[NS], starts[CHUNK / TILE][NS];
      if (chunk > 0)
        load_states<NS>(h, saved(a, p, s, chunk), a, p, a.channels);
      else
        load_start<NS>(h, a, p, s);
      for (int tile = 0; tile < tiles; tile++) {
        for (int j = 0; j < NS; j++) starts[tile][j] = h[j];
        if (tile == tiles - 1) break;
        const int64_t first = chunk + tile * TILE;
        __syncthreads();
        load_step_sizes(dt, a, s, p, first, TILE);
        load_tile(u, a.u, s, p, first, TILE);
        __syncthreads();
        for (int t = 0; t < TILE; t++) {
          w.at_step(a, p, s, first + t);
          const int at = t * tile_row(p) + p.slot;
          if (mine) forward_step<NS>(h, w.A2, dt[at], u[at], w.B, w.C);
        }
      }
      for (int tile = tiles - 1; tile >= 0; tile--) {
        const int64_t first = chunk + tile * TILE;
        const int count = (int)(stop - first < TILE ? stop - first : TILE);
        __syncthreads();
        load_step_sizes(dt, a, s, p, first, count);
        load_tile(u, a.u, s, p, first, count);
        load_tile(dy, a.dout, s, p, first, count);
        if (a.z.p) load_tile(z, a.z, s, p, first, count);
        __syncthreads();
        float decay[TILE][NS], before[TILE][NS];
        for (int j = 0; j < NS; j++) h[j] = starts[tile][j];
#pragma unroll
        for (int t = 0; t < TILE; t++) {
          const int at = t * tile_row(p) + p.slot;
          if (t >= count || !mine) continue;
          w.at_step(a, p, s, first + t);
          recompute_step<NS>(h, decay[t], before[t], w.A2, dt[at], u[at], w.B);
        }
#pragma unroll
        for (int t = TILE - 1; t >= 0; t--) {
          // The same for all threads of the block, so that they meet in the sums below.
          if (t >= count) continue;
          const int at = t * tile_row(p) + p.slot;
          w.at_step(a, p, s, first + t);
          float dB[NS] = {}, dC[NS] = {}, grad_y = 0.0f;
          StepSums sums = {0.0f, 0.0f, 0.0f};
          if (mine) {
            grad_y = a.z.p ? dy[at] * z[at] * sigmoid(z[at]) : dy[at];
            sums = backward_step<NS>(g, sum_A, dB, dC, decay[t], before[t], w.A, dt[at], u[at], grad_y, w.B, w.C);
          }
          if (a.z.p || a.out.p) sums.y = over_lanes(sums.y, p);
          sums.gB = over_lanes(sums.gB, p);
          sums.decay = over_lanes(sums.decay, p);
          if (mine && p.lane == 0) {
            y[at] = sums.y + w.D * u[at];
            du[at] = w.D * grad_y + dt[at] * sums.gB;
            ddt[at] = (sums.decay + u[at] * sums.gB) * (a.softplus ? softplus_slope(dt[at]) : 1.0f);
            sum_D += grad_y * u[at];
            sum_bias += ddt[at];
          }
          for (int j = 0; j < NS; j++) {
            const int n = p.lane * NS + j;
            float* row = rows + (warp * TILE + t) * 2 * states;
            const bool writes = (int)threadIdx.x % 32 < lanes && n < states;
            if (a.variable_B) {
              const float sum = over_channels(dB[j], p);
              if (writes) row[n] = sum;
            } else {
              sum_B[j] += dB[j];
            }
            if (a.variable_C) {
              const float sum = over_channels(dC[j], p);
              if (writes) row[states + n] = sum;
            } else {
              sum_C[j] += dC[j];
            }
          }
        }
        __syncthreads();
        store_tile(du, a.du, s, p, first, count);
        store_tile(ddt, a.ddelta, s, p, first, count);
        if (a.dz.p)
          for_tile(a.dz, s, p, first, count, [&](int t, int c, int64_t i) {
            const int at = t * tile_row(p) + c;
            const float gate = sigmoid(z[at]);
            write(a.dz.p, a.dz.dtype, i, dy[at] * y[at] * gate * (1.0f + z[at] * (1.0f - gate)));
          });
        if (a.out.p)
          for_tile(a.out, s, p, first, count, [&](int t, int c, int64_t i) {
            const int at = t * tile_row(p) + c;
            write(a.out.p, a.out.dtype, i, a.z.p ? y[at] * z[at] * sigmoid(z[at]) : y[at]);
          });
        for (int i = threadIdx.x; i < count * states; i += THREADS) {
          const int t = i / states, n = i % states;
          float sum_b = 0.0f, sum_c = 0.0f;
          for (int k = 0; k < WARPS; k++) {
            const float* row = rows + (k * TILE + t) * 2 * states;
            if (a.variable_B) sum_b += row[n];
            if (a.variable_C) sum_c += row[states + n];
          }
          const int64_t at = block * a.rows * a.groups * states + coefficient(a, p, s, first + t) + n;
          if (a.variable_B) parts.row_B[at] = sum_b;
          if (a.variable_C) parts.row_C[at] = sum_c;
        }
      }
    }
    if (a.dinitial) store_states<NS>(g, static_cast<float*>(a.dinitial) + state(a, p, s), a, p);
  }
  const int64_t own = blockIdx.x * a.channels * a.states + parameter(a, p);
  const int64_t kind = parts.count * a.channels * a.states;
  store_states<NS>(sum_A, parts.states + own, a, p);
  store_states<NS>(sum_B, parts.states + kind + own, a, p);
  store_states<NS>(sum_C, parts.states + 2 * kind + own, a, p);
  if (mine && p.lane == 0) {
    const int64_t at = blockIdx.x * a.channels + p.channel0 + p.slot;
    parts.channels[at] = sum_D;
    parts.channels[parts.count * a.channels + at] = sum_bias;
  }
}

// Threads of a channel for NS states each: a power of two.
int lanes_for(int64_t states, int per_thread) {
  int lanes = 1;
  while (lanes * per_thread < states) lanes *= 2;
  return lanes;
}

dim3 grid(int64_t x, const ScanArgs& a, int lanes) {
  const int64_t width = a.channels / a.groups, channels = THREADS / lanes;
  return dim3((unsigned)x, (unsigned)(a.groups * ((width + channels - 1) / channels)));
}

template <int NS>
void forward(const ScanArgs& a, void* stream) {
  const int lanes = lanes_for(a.states, NS);
  const size_t shared = sizeof(float) * 3 * FORWARD_TILE * (THREADS / lanes + 1);
  LAUNCH(scan_forward_kernel<NS>, grid(a.segments, a, lanes), THREADS, shared, stream, a, lanes);
}

template <int NS>
void backward(const ScanArgs& a, const ScanParts& parts, void* stream) {
  const int lanes = lanes_for(a.states, NS), tile = backward_tile<NS>();
  const size_t shared = sizeof(float) * tile * (7 * (THREADS / lanes + 1) + WARPS * 2 * a.states);
  LAUNCH(scan_backward_kernel<NS>, grid(parts.count, a, lanes), THREADS, shared, stream, a, parts, lanes);
}

}  // namespace

int64_t scan_blocks(int64_t states, int64_t channels_of_group) {
  const int64_t channels = THREADS / lanes_for(states, states <= 128 ? 4 : 8);
  return (channels_of_group + channels - 1) / channels;
}

const char* scan_forward(const ScanArgs& a, void* stream) {
  a.states <= 128 ? forward<4>(a, stream) : forward<8>(a, stream);
  return launch_error();
}

const char* scan_backward(const ScanArgs& a, const ScanParts& parts, void* stream) {
  a.states <= 128 ? backward<4>(a, parts, stream) : backward<8>(a, parts, stream);
  return launch_error();
}

}  // namespace scan
