// What the binding hands to the CUDA kernels: pointers, sizes, strides (in elements) and the stream.
#pragma once
#include <cstdint>

namespace hstu_cuda {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 2, kFloat16 = 3 };

struct View {
  void* data;
  int64_t row, head;
};

// A table of one line for all heads (stride 0) or one a head, in float32.
struct Table {
  const float* data;
  int64_t stride;
  int width;
};

struct Problem {
  int dtype, batch, heads, width_qk, width_v, max_seqlen, longest_q;
  const int64_t *offsets, *q_offsets, *timestamps, *edges, *num_targets, *num_contextual;
  int max_attn_len, min_full_attn_len;
  bool causal;
  const float* divisors;
  Table position, time;
  float alpha, divisor, keep_scale;
  int time_shift;
  bool dropout;
  uint32_t keep_threshold, seed_key;
  View q, k, v, out, grad, dq, dk, dv;
  // Gradients of the tables, null where nobody asks, and the memory for their parts: `chunks` blocks share the rows of
  // a sequence and head, each writes [2 * max_seqlen - 1] and [time.width] numbers.
  float *d_position, *d_time, *position_parts, *time_parts;
  int chunks;
  // Widths, strides and addresses allow copies of 16 bytes.
  bool aligned;
};

// 0, or the cudaError_t of the launch.
int forward(const Problem& problem, void* stream);
int backward(const Problem& problem, void* stream);
const char* error_text(int error);
// 0 where there is no driver.
int device_count();

// The widest time table whose gradient fits a block's shared memory.
constexpr int kWidestTimeTable = 4096;
constexpr int kWidestHead = 256;

}  // namespace hstu_cuda
