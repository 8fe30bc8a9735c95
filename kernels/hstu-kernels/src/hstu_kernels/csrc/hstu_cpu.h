// What the binding hands to the kernels: pointers, sizes and strides (in elements), and the list of pieces to work on.
#pragma once
#include <cstdint>

namespace hstu {

// Width of a tile of keys.
constexpr int kKeys = 64;

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct View {
  void* data;
  int64_t row, head;
};

struct Table {
  const void* data;
  int64_t heads, width, stride;
};

struct Problem {
  int dtype;
  int64_t batch, heads, width_qk, width_v;
  const int64_t *offsets, *q_offsets, *timestamps, *edges;
  const double* divisors;
  // Row r, at position i of its sequence, sees the keys [lo[r], hi[r]) and [own[r], i].
  const int32_t *lo, *hi, *own;
  // Where the packed rows of k and v lie; null where they are packed.
  const int64_t* slots;
  Table position, time;
  // One entry for each pair of a row and a key of its sequence; bias_begin is the first one of each sequence. d_bias
  // has a line for every head.
  Table bias;
  const int64_t* bias_begin;
  // Bucket of the time difference 2^e.
  int32_t bucket_of_power[64];
  double alpha, divisor, keep_scale;
  int time_shift;
  bool dropout, bfloat16_pairs;
  uint32_t keep_threshold, seed_key;
  View q, k, v, out, grad, dq, dk, dv;
  void *d_position, *d_time, *d_bias;
};

// A piece of one sequence and head. Forward: query rows [row_begin, row_end). Backward: keys [key_begin, key_end) with
// all query rows that see any of them. The *_at fields are element offsets into the partial results, -1 where the piece
// writes the result itself.
struct Piece {
  int32_t sequence, head;
  int64_t row_begin, row_end, key_begin, key_end;
  int64_t dq_at, position_at, time_at;
};

// Pieces of the same rows and keys but of different heads, done by one thread: first, first + step, ...
struct Task {
  int64_t first, step, count;
};

struct Plan {
  const Piece* pieces;
  int64_t count;
  // By falling cost.
  const Task* tasks;
  int64_t task_count;
  // First piece of each (sequence, head) whose dq is summed from several pieces, and one past its last.
  const int64_t* merges;
  int64_t merge_count;
  int64_t max_rows, max_keys, max_strip;
  void* partial;
  int threads;
};

}  // namespace hstu

#define HSTU_DECLARE(ISA)                                  \
  namespace hstu {                                         \
  namespace ISA {                                          \
  bool forward(const Problem& problem, const Plan& plan);  \
  bool backward(const Problem& problem, const Plan& plan); \
  }                                                        \
  }

HSTU_DECLARE(portable)
#ifdef FOOTFALL_HAS_AVX2
HSTU_DECLARE(avx2)
#endif
#ifdef FOOTFALL_HAS_AVX512
HSTU_DECLARE(avx512)
#endif
