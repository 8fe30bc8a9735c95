// Jagged HSTU attention in tiles: one kernel for the output, one for dq and the tables' gradients, one for dk and dv.
// No kernel adds into memory that another block writes, so that every result is the same in every run.
#pragma once
#include "fragments_cuda.h"
#include "hstu_cuda.h"

namespace hstu_cuda {
namespace {

// Rows of the block's own tile, rows of the tiles it walks over, and the widest head it takes.
template <class E, int D>
struct Shape {
  static constexpr int warps = sizeof(E) == 4 && D > 128 ? 2 : 4;
  static constexpr int own = 16 * warps;
  static constexpr int walked = sizeof(E) == 2 ? (D > 128 ? 32 : 64) : (D > 64 ? 16 : 32);
  static constexpr int line = kLine<E, D>;
};

// What the mask and the bias ask of a query row.
struct Row {
  int64_t now;
  int at, lo, hi;
  uint32_t key;
  float inverse;
};

struct Sequence {
  int64_t first, first_q;
  // Ids of the mask: contextual rows share 0, targets share last_id, the history counts up between them.
  int n, m, head, contextual, before_ids, last_id;

  // Least position with that id or a higher one.
  __device__ int begin_of(int id) const {
    if (id <= (last_id < 0 ? last_id : 0)) return 0;
    if (id > last_id) return n;
    return id + before_ids < n ? id + before_ids : n;
  }
};

__device__ inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

constexpr uint32_t kGolden = 0x9e3779b9u;

__device__ inline Sequence sequence_of(const Problem& p) {
  const int b = blockIdx.x / p.heads;
  Sequence s;
  s.head = blockIdx.x % p.heads;
  s.first = p.offsets[b];
  s.first_q = p.q_offsets[b];
  s.n = int(p.offsets[b + 1] - s.first);
  s.m = int(p.q_offsets[b + 1] - s.first_q);
  s.contextual = p.num_contextual ? int(p.num_contextual[b]) : 0;
  s.before_ids = s.contextual > 1 ? s.contextual - 1 : 0;
  s.last_id = s.n - s.before_ids - (p.num_targets ? int(p.num_targets[b]) : 0);
  return s;
}

// The keys [lo, hi) that a row sees besides itself; ids make every condition of the mask an interval of positions.
__device__ inline void interval_of(const Problem& p, const Sequence& s, Row* row) {
  const int counted = row->at > s.before_ids ? row->at - s.before_ids : 0,
            id = counted < s.last_id ? counted : s.last_id;
  const bool windowed = p.max_attn_len > 0 && !(p.min_full_attn_len > 0 && id >= s.last_id - p.min_full_attn_len);
  int lo = windowed ? s.begin_of(id - p.max_attn_len) : 0, hi = s.begin_of(id);
  if (!p.causal) {
    const int history = s.begin_of(s.last_id), reach = windowed ? s.begin_of(id + p.max_attn_len + 1) : history;
    const int above = reach < history ? reach : history, next = s.begin_of(id + 1);
    // A history row sees both sides, contextual rows have nothing on their left, targets nothing on their right.
    if (next == row->at + 1 && hi == row->at)
      hi = above > next ? above : next;
    else if (hi <= lo)
      lo = next, hi = above;
  }
  if (s.contextual > 0 && id == 0 && s.last_id > 0) {
    const int history = s.begin_of(s.last_id);
    lo = 0;
    hi = hi > history ? hi : history;
  }
  row->lo = lo;
  row->hi = hi > lo ? hi : lo;
}

// Row r of the sequence's queries; one past the last sees nothing.
__device__ inline Row row_of(const Problem& p, const Sequence& s, int r) {
  if (r >= s.m) return Row{0, -1, 0, 0, 0, 0.f};
  Row row;
  row.at = s.n - s.m + r;
  interval_of(p, s, &row);
  row.inverse = 1.f / (p.divisors ? p.divisors[s.first_q + r] : p.divisor);
  const int next = row.at + p.time_shift < s.n ? row.at + p.time_shift : s.n - 1;
  row.now = p.time.data ? p.timestamps[s.first + next] : 0;
  row.key = mix(mix(p.seed_key + uint32_t(s.head) * kGolden) + uint32_t(s.first + row.at));
  return row;
}

__device__ inline bool sees(const Row& row, int j) { return (j >= row.lo && j < row.hi) || j == row.at; }

// The logarithm may be one off beside an edge; the integer edges decide. Edge b is the least |dt| of bucket b + 1.
__device__ inline int bucket_of(const Problem& p, int64_t now, int64_t then) {
  uint64_t dt = now > then ? uint64_t(now) - uint64_t(then) : uint64_t(then) - uint64_t(now);
  dt = dt < 1 ? 1 : dt;
  // One short of the edges that int64 cannot hold.
  dt = dt > uint64_t(INT64_MAX) - 1 ? uint64_t(INT64_MAX) - 1 : dt;
  const int last = p.time.width - 1;
  int b = int(logf(float(dt)) * (1.f / 0.301f));
  b = b < last ? b : last;
  if (b < last && uint64_t(p.edges[b]) <= dt) return b + 1;
  return b > 0 && uint64_t(p.edges[b - 1]) > dt ? b - 1 : b;
}

struct Term {
  float score, kept;
  int bucket;
};

// The score of a pair that is seen, from its q·k.
__device__ inline Term term_of(const Problem& p, const Sequence& s, const Row& row, int j, int64_t then, float dot) {
  Term term{p.alpha * dot, 1.f, 0};
  if (p.position.data) term.score += p.position.data[s.head * p.position.stride + p.position.width / 2 + j - row.at];
  if (p.time.data) {
    term.bucket = bucket_of(p, row.now, then);
    term.score += p.time.data[s.head * p.time.stride + term.bucket];
  }
  if (p.dropout) term.kept = mix(row.key ^ (uint32_t(j) * kGolden)) >= p.keep_threshold ? p.keep_scale : 0.f;
  return term;
}

__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

__device__ inline float weight_of(const Term& term, const Row& row) {
  return term.score * sigmoid(term.score) * term.kept * row.inverse;
}

__device__ inline float d_score_of(const Term& term, const Row& row, float d_weight) {
  const float s = sigmoid(term.score);
  return d_weight * s * (1.f + term.score * (1.f - s)) * term.kept * row.inverse;
}

template <int Count>
__device__ inline void clear(float (*sums)[4]) {
#pragma unroll
  for (int j = 0; j < Count; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = 0.f;
}

template <class E>
__device__ inline const E* start_of(const View& view, int64_t row, int head) {
  return static_cast<const E*>(view.data) + row * view.row + head * view.head;
}

// Takes pieces of the block's shared memory in order; each begins on 16 bytes.
struct Memory {
  unsigned char* next;
  template <class T>
  __device__ T* take(int count) {
    T* at = reinterpret_cast<T*>(next);
    next += (count * int(sizeof(T)) + 15) / 16 * 16;
    return at;
  }
};

// The strip of this warp, rows [first, ...) below `limit`, to memory.
template <class E, int D>
__device__ inline void write_strip(const View& view, int64_t row0, int first, int limit, int head, int width,
                                   float scale, const float (*sums)[4]) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + warp() * 16 + g + i / 2 * 8, d = 8 * j + 2 * t + i % 2;
      if (r < limit && d < width) write(const_cast<E*>(start_of<E>(view, row0 + r, head)) + d, sums[j][i] * scale);
    }
}

// First and one past the last key that any row of the tile sees.
__device__ inline void key_range(const Row* rows, int count, int* begin, int* end) {
  *begin = 0x7fffffff;
  *end = 0;
  for (int r = 0; r < count; ++r) {
    if (rows[r].at < 0) continue;
    const int least = rows[r].lo < rows[r].hi && rows[r].lo < rows[r].at ? rows[r].lo : rows[r].at;
    const int most = rows[r].hi > rows[r].at + 1 ? rows[r].hi : rows[r].at + 1;
    *begin = least < *begin ? least : *begin;
    *end = most > *end ? most : *end;
  }
}

template <class E, int D>
__global__ void forward_kernel(const Problem p) {
  typedef Shape<E, D> Z;
  const Sequence s = sequence_of(p);
  const int start = blockIdx.y * Z::own;
  if (start >= s.m) return;
  Memory memory{shared_memory()};
  E* const queries = memory.take<E>(Z::own * Z::line);
  E* const keys = memory.take<E>(2 * Z::walked * Z::line);
  E* const values = memory.take<E>(2 * Z::walked * Z::line);
  Row* const rows = memory.take<Row>(Z::own);
  float* const strip = memory.take<float>(Z::own * (Z::walked + 1)) + warp() * 16 * (Z::walked + 1);
  for (int r = threadIdx.x; r < Z::own; r += blockDim.x) rows[r] = row_of(p, s, start + r);
  copy_tile<E, D, Z::own>(queries, start_of<E>(p.q, s.first_q, s.head), p.q.row, start, s.m, p.width_qk, p.aligned);
  __syncthreads();
  int begin, end;
  key_range(rows, Z::own, &begin, &end);
  begin = begin / Z::walked * Z::walked;
  const auto fetch = [&](int tile, int stage) {
    const int at = stage * Z::walked * Z::line;
    copy_tile<E, D, Z::walked>(keys + at, start_of<E>(p.k, s.first, s.head), p.k.row, tile, s.n, p.width_qk, p.aligned);
    copy_tile<E, D, Z::walked>(values + at, start_of<E>(p.v, s.first, s.head), p.v.row, tile, s.n, p.width_v,
                               p.aligned);
  };
  float sums[D / 8][4];
  clear<D / 8>(sums);
  fetch(begin, 0);
  copies_commit();
  const int g = lane() / 4, t = lane() % 4;
  int stage = 0;
  for (int tile = begin; tile < end; tile += Z::walked, stage ^= 1) {
    if (tile + Z::walked < end) fetch(tile + Z::walked, stage ^ 1);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    float w[Z::walked / 8][4];
    clear<Z::walked / 8>(w);
    multiply_rows<E, D, Z::walked>(w, queries + warp() * 16 * Z::line, keys + stage * Z::walked * Z::line);
#pragma unroll
    for (int j = 0; j < Z::walked / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Row& row = rows[warp() * 16 + g + i / 2 * 8];
        const int key = tile + 8 * j + 2 * t + i % 2;
        const bool seen = sees(row, key);
        const int64_t then = seen && p.time.data ? p.timestamps[s.first + key] : 0;
        w[j][i] = seen ? weight_of(term_of(p, s, row, key, then, w[j][i]), row) : 0.f;
      }
    multiply_weights<E, D, Z::walked>(sums, w, values + stage * Z::walked * Z::line, strip);
    __syncthreads();
  }
  write_strip<E, D>(p.out, s.first_q, start, s.m, s.head, p.width_v, 1.f, sums);
}

// dq of the rows of one chunk, and the chunk's part of the tables' gradients.
template <class E, int D>
__global__ void rows_kernel(const Problem p, int copies) {
  typedef Shape<E, D> Z;
  const Sequence s = sequence_of(p);
  const int g = lane() / 4, t = lane() % 4, positions = 2 * p.max_seqlen - 1;
  const int64_t part = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  const bool tables = p.d_position || p.d_time;
  Memory memory{shared_memory()};
  E* const queries = memory.take<E>(Z::own * Z::line);
  E* const grads = memory.take<E>(Z::own * Z::line);
  E* const keys = memory.take<E>(2 * Z::walked * Z::line);
  E* const values = memory.take<E>(2 * Z::walked * Z::line);
  Row* const rows = memory.take<Row>(Z::own);
  // d_scores of the tile, for the tables; in float32 the products write the same numbers there.
  float* const d_tile = memory.take<float>(Z::own * (Z::walked + 1));
  float* const strip = d_tile + warp() * 16 * (Z::walked + 1);
  uint16_t* const buckets = memory.take<uint16_t>(p.d_time ? Z::own * (Z::walked + 1) : 0);
  float* const d_time = memory.take<float>(p.d_time ? copies * p.time.width : 0);
  float* const d_position = p.d_position ? p.position_parts + part * positions : nullptr;
  if (p.d_time)
    for (int i = threadIdx.x; i < copies * p.time.width; i += blockDim.x) d_time[i] = 0.f;
  if (p.d_position)
    for (int i = threadIdx.x; i < positions; i += blockDim.x) d_position[i] = 0.f;
  __syncthreads();
  for (int start = blockIdx.y * Z::own; start < s.m; start += gridDim.y * Z::own) {
    for (int r = threadIdx.x; r < Z::own; r += blockDim.x) rows[r] = row_of(p, s, start + r);
    copy_tile<E, D, Z::own>(queries, start_of<E>(p.q, s.first_q, s.head), p.q.row, start, s.m, p.width_qk, p.aligned);
    copy_tile<E, D, Z::own>(grads, start_of<E>(p.grad, s.first_q, s.head), p.grad.row, start, s.m, p.width_v,
                            p.aligned);
    __syncthreads();
    int begin, end;
    key_range(rows, Z::own, &begin, &end);
    begin = begin / Z::walked * Z::walked;
    const auto fetch = [&](int tile, int stage) {
      const int at = stage * Z::walked * Z::line;
      copy_tile<E, D, Z::walked>(keys + at, start_of<E>(p.k, s.first, s.head), p.k.row, tile, s.n, p.width_qk,
                                 p.aligned);
      copy_tile<E, D, Z::walked>(values + at, start_of<E>(p.v, s.first, s.head), p.v.row, tile, s.n, p.width_v,
                                 p.aligned);
    };
    float sums[D / 8][4];
    clear<D / 8>(sums);
    fetch(begin, 0);
    copies_commit();
    int stage = 0;
    for (int tile = begin; tile < end; tile += Z::walked, stage ^= 1) {
      if (tile + Z::walked < end) fetch(tile + Z::walked, stage ^ 1);
      copies_commit();
      copies_wait<1>();
      __syncthreads();
      const int at = stage * Z::walked * Z::line;
      float w[Z::walked / 8][4], d[Z::walked / 8][4];
      clear<Z::walked / 8>(w);
      clear<Z::walked / 8>(d);
      multiply_rows<E, D, Z::walked>(w, queries + warp() * 16 * Z::line, keys + at);
      multiply_rows<E, D, Z::walked>(d, grads + warp() * 16 * Z::line, values + at);
#pragma unroll
      for (int j = 0; j < Z::walked / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = warp() * 16 + g + i / 2 * 8, c = 8 * j + 2 * t + i % 2;
          const bool seen = sees(rows[r], tile + c);
          const int64_t then = seen && p.time.data ? p.timestamps[s.first + tile + c] : 0;
          int bucket = 0;
          if (seen) {
            const Term term = term_of(p, s, rows[r], tile + c, then, w[j][i]);
            d[j][i] = d_score_of(term, rows[r], d[j][i]);
            bucket = term.bucket;
          } else {
            d[j][i] = 0.f;
          }
          if (tables) d_tile[r * (Z::walked + 1) + c] = d[j][i];
          if (p.d_time) buckets[r * (Z::walked + 1) + c] = uint16_t(bucket);
        }
      multiply_weights<E, D, Z::walked>(sums, d, keys + at, strip);
      __syncthreads();
      if (p.d_position)
        // One thread a diagonal: its pairs share an entry of the table.
        for (int i = threadIdx.x; i < Z::own + Z::walked - 1; i += blockDim.x) {
          const int off = i - (Z::own - 1), entry = tile - (s.n - s.m + start) + off + p.max_seqlen - 1;
          float sum = 0.f;
          for (int r = off < 0 ? -off : 0; r < Z::own && r + off < Z::walked; ++r)
            sum += d_tile[r * (Z::walked + 1) + r + off];
          if (entry >= 0 && entry < positions) d_position[entry] += sum;
        }
      if (p.d_time && int(threadIdx.x) < copies)
        for (int i = threadIdx.x; i < Z::own * Z::walked; i += copies) {
          const int from = i / Z::walked * (Z::walked + 1) + i % Z::walked;
          d_time[buckets[from] * copies + threadIdx.x] += d_tile[from];
        }
      __syncthreads();
    }
    write_strip<E, D>(p.dq, s.first_q, start, s.m, s.head, p.width_qk, p.alpha, sums);
    // The tiles are filled again.
    __syncthreads();
  }
  if (p.d_time)
    for (int b = threadIdx.x; b < p.time.width; b += blockDim.x) {
      float sum = 0.f;
      for (int i = 0; i < copies; ++i) sum += d_time[b * copies + i];
      p.time_parts[part * p.time.width + b] = sum;
    }
}

// dk and dv of a tile of keys. Strips are transposed here: their rows are keys, their columns queries.
template <class E, int D>
__global__ void keys_kernel(const Problem p) {
  typedef Shape<E, D> Z;
  const Sequence s = sequence_of(p);
  const int start = blockIdx.y * Z::own;
  if (start >= s.n) return;
  Memory memory{shared_memory()};
  E* const keys = memory.take<E>(Z::own * Z::line);
  E* const values = memory.take<E>(Z::own * Z::line);
  E* const queries = memory.take<E>(2 * Z::walked * Z::line);
  E* const grads = memory.take<E>(2 * Z::walked * Z::line);
  Row* const rows = memory.take<Row>(2 * Z::walked);
  float* const strip = memory.take<float>(Z::own * (Z::walked + 1)) + warp() * 16 * (Z::walked + 1);
  copy_tile<E, D, Z::own>(keys, start_of<E>(p.k, s.first, s.head), p.k.row, start, s.n, p.width_qk, p.aligned);
  copy_tile<E, D, Z::own>(values, start_of<E>(p.v, s.first, s.head), p.v.row, start, s.n, p.width_v, p.aligned);
  // The first tile of rows, from `tile` on, with one that sees these keys; its rows are left in `stage`.
  const auto find = [&](int tile, int stage) {
    for (; tile < s.m; tile += Z::walked) {
      int any = 0;
      for (int r = threadIdx.x; r < Z::walked; r += blockDim.x) {
        const Row row = row_of(p, s, tile + r);
        rows[stage * Z::walked + r] = row;
        any |= (row.lo < row.hi && row.lo < start + Z::own && row.hi > start) ||
               (row.at >= start && row.at < start + Z::own);
      }
      if (__syncthreads_or(any)) break;
    }
    return tile;
  };
  const auto fetch = [&](int tile, int stage) {
    const int at = stage * Z::walked * Z::line;
    copy_tile<E, D, Z::walked>(queries + at, start_of<E>(p.q, s.first_q, s.head), p.q.row, tile, s.m, p.width_qk,
                               p.aligned);
    copy_tile<E, D, Z::walked>(grads + at, start_of<E>(p.grad, s.first_q, s.head), p.grad.row, tile, s.m, p.width_v,
                               p.aligned);
  };
  float dk[D / 8][4], dv[D / 8][4];
  clear<D / 8>(dk);
  clear<D / 8>(dv);
  const int g = lane() / 4, t = lane() % 4;
  int stage = 0, tile = find(0, 0);
  if (tile < s.m) fetch(tile, 0);
  copies_commit();
  while (tile < s.m) {
    const int next = find(tile + Z::walked, stage ^ 1);
    if (next < s.m) fetch(next, stage ^ 1);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    const int at = stage * Z::walked * Z::line;
    float w[Z::walked / 8][4], d[Z::walked / 8][4];
    clear<Z::walked / 8>(w);
    clear<Z::walked / 8>(d);
    multiply_rows<E, D, Z::walked>(w, keys + warp() * 16 * Z::line, queries + at);
    multiply_rows<E, D, Z::walked>(d, values + warp() * 16 * Z::line, grads + at);
#pragma unroll
    for (int j = 0; j < Z::walked / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = start + warp() * 16 + g + i / 2 * 8;
        const Row& row = rows[stage * Z::walked + 8 * j + 2 * t + i % 2];
        const bool seen = sees(row, key);
        const int64_t then = seen && p.time.data ? p.timestamps[s.first + key] : 0;
        if (seen) {
          const Term term = term_of(p, s, row, key, then, w[j][i]);
          w[j][i] = weight_of(term, row);
          d[j][i] = d_score_of(term, row, d[j][i]);
        } else {
          w[j][i] = d[j][i] = 0.f;
        }
      }
    multiply_weights<E, D, Z::walked>(dv, w, grads + at, strip);
    multiply_weights<E, D, Z::walked>(dk, d, queries + at, strip);
    __syncthreads();
    tile = next;
    stage ^= 1;
  }
  copies_wait<0>();
  write_strip<E, D>(p.dk, s.first, start, s.n, s.head, p.width_qk, p.alpha, dk);
  write_strip<E, D>(p.dv, s.first, start, s.n, s.head, p.width_v, 1.f, dv);
}

// What a block of the smallest of the architectures (sm_80) may have.
constexpr int kSharedBytes = 163 * 1024;

constexpr int padded(int bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of shared memory; `own` and `walked` count the tiles of each kind.
template <class E, int D>
int bytes_of(int own, int walked, int rows) {
  typedef Shape<E, D> Z;
  return (own * Z::own + walked * Z::walked) * Z::line * int(sizeof(E)) + padded(rows * int(sizeof(Row))) +
         padded(Z::own * (Z::walked + 1) * 4);
}

template <class... Arguments>
int launch(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, void* stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0) return 0;
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads, 1, 1);
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return int(error != cudaSuccess ? error : cudaGetLastError());
}

template <class E, int D>
int forward_in(const Problem& p, void* stream) {
  typedef Shape<E, D> Z;
  const dim3 grid(p.batch * p.heads, (p.longest_q + Z::own - 1) / Z::own, 1);
  return launch(forward_kernel<E, D>, grid, 32 * Z::warps, bytes_of<E, D>(1, 4, Z::own), stream, p);
}

template <class E, int D>
int backward_in(const Problem& p, void* stream) {
  typedef Shape<E, D> Z;
  const int tiles = (p.longest_q + Z::own - 1) / Z::own, threads = 32 * Z::warps;
  int copies = threads, bytes = bytes_of<E, D>(2, 4, Z::own);
  if (p.d_time) {
    bytes += padded(Z::own * (Z::walked + 1) * 2);
    while (copies > 1 && bytes + padded(copies * p.time.width * 4) > kSharedBytes) copies /= 2;
    bytes += padded(copies * p.time.width * 4);
  }
  const dim3 by_rows(p.batch * p.heads, p.d_position || p.d_time ? p.chunks : tiles, 1);
  if (const int error = launch(rows_kernel<E, D>, by_rows, threads, bytes, stream, p, copies)) return error;
  const dim3 by_keys(p.batch * p.heads, (p.max_seqlen + Z::own - 1) / Z::own, 1);
  return launch(keys_kernel<E, D>, by_keys, threads, bytes_of<E, D>(2, 4, 2 * Z::walked), stream, p);
}

template <class E>
int forward_of(const Problem& p, void* stream) {
  const int width = p.width_qk > p.width_v ? p.width_qk : p.width_v;
  if (width <= 32) return forward_in<E, 32>(p, stream);
  if (width <= 64) return forward_in<E, 64>(p, stream);
  if (width <= 128) return forward_in<E, 128>(p, stream);
  return forward_in<E, 256>(p, stream);
}

template <class E>
int backward_of(const Problem& p, void* stream) {
  const int width = p.width_qk > p.width_v ? p.width_qk : p.width_v;
  if (width <= 32) return backward_in<E, 32>(p, stream);
  if (width <= 64) return backward_in<E, 64>(p, stream);
  if (width <= 128) return backward_in<E, 128>(p, stream);
  return backward_in<E, 256>(p, stream);
}

}  // namespace
}  // namespace hstu_cuda
