// The choice of type, and the sums of the tables' gradients over the parts that blocks wrote.
#include "tiles_cuda.h"

namespace hstu_cuda {

int forward_float32(const Problem& problem, void* stream);
int forward_bfloat16(const Problem& problem, void* stream);
int forward_float16(const Problem& problem, void* stream);
int backward_float32(const Problem& problem, void* stream);
int backward_bfloat16(const Problem& problem, void* stream);
int backward_float16(const Problem& problem, void* stream);

namespace {

// One thread an entry; parts [batch, heads, chunks, count] are added in their order. Entry x of the table is entry x -
// shift of a part.
__global__ void sum_parts(const float* parts, int batch, int heads, int chunks, int count, int shift, int width,
                          float* table) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, entry = x - shift;
  if (x >= width) return;
  const bool shared = gridDim.y == 1;
  double sum = 0;
  if (entry >= 0 && entry < count)
    for (int b = 0; b < batch; ++b)
      for (int h = shared ? 0 : blockIdx.y; h < (shared ? heads : int(blockIdx.y) + 1); ++h)
        for (int c = 0; c < chunks; ++c) sum += double(parts[((int64_t(b) * heads + h) * chunks + c) * count + entry]);
  table[int64_t(blockIdx.y) * width + x] = float(sum);
}

int sum_table(const Problem& p, const Table& table, const float* parts, int count, int shift, float* to, void* stream) {
  const dim3 grid((table.width + 127) / 128, table.stride == 0 ? 1 : p.heads, 1);
  return launch(sum_parts, grid, 128, 0, stream, parts, p.batch, p.heads, p.chunks, count, shift, table.width, to);
}

}  // namespace

int forward(const Problem& p, void* stream) {
  if (p.dtype == kBFloat16) return forward_bfloat16(p, stream);
  return p.dtype == kFloat16 ? forward_float16(p, stream) : forward_float32(p, stream);
}

int backward(const Problem& p, void* stream) {
  int error = p.dtype == kBFloat16  ? backward_bfloat16(p, stream)
              : p.dtype == kFloat16 ? backward_float16(p, stream)
                                    : backward_float32(p, stream);
  if (error == 0 && p.d_position)
    error = sum_table(p, p.position, p.position_parts, 2 * p.max_seqlen - 1, p.position.width / 2 - (p.max_seqlen - 1),
                      p.d_position, stream);
  if (error == 0 && p.d_time) error = sum_table(p, p.time, p.time_parts, p.time.width, 0, p.d_time, stream);
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace hstu_cuda
