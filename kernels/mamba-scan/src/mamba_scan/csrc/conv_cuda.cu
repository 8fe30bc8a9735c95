// The causal depthwise convolution and its gradient on a card: a thread an element, rows found in their segments.

#include "scan_cuda.h"
#include "step.h"

namespace scan {
namespace {

constexpr int THREADS = 128;

// A row: its segment, its position there, the segment's length, and where its element 0 lies.
struct Row {
  int64_t segment, step, steps, batch, time;
};

HOST_DEVICE inline Row find_row(const ConvArgs& a, int64_t r) {
  if (!a.offsets) return {r / a.length, r % a.length, a.length, r / a.length, r % a.length};
  // The last segment that begins at or before the row; empty ones before it begin there too.
  int64_t low = 0, high = a.segments - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (a.offsets[middle] <= r)
      low = middle;
    else
      high = middle - 1;
  }
  return {low, r - a.offsets[low], a.offsets[low + 1] - a.offsets[low], 0, r};
}

HOST_DEVICE inline int64_t first_row(const ConvArgs& a, int64_t segment) {
  return a.offsets ? a.offsets[segment] : segment * a.length;
}

HOST_DEVICE inline int64_t element(const Array& x, const Row& row, int64_t tap, int64_t channel) {
  return row.batch * x.batch + (row.time - tap) * x.time + channel * x.channel;
}

HOST_DEVICE inline bool silent(const ConvArgs& a, int64_t r) { return a.documents && a.documents[r] < 0; }
// Whether a tap counts that reaches from row r back to r - tap.
HOST_DEVICE inline bool connected(const ConvArgs& a, int64_t r, int64_t tap) {
  return !a.documents || tap == 0 || a.documents[r - tap] == a.documents[r];
}

// What the tap of row r sees: an earlier row, the state before the segment, or zero.
HOST_DEVICE inline float seen(const ConvArgs& a, const Row& row, int64_t r, int64_t tap, int64_t channel) {
  const int64_t kept = a.width - 1;
  if (tap <= row.step) return connected(a, r, tap) ? read(a.x.p, a.x.dtype, element(a.x, row, tap, channel)) : 0.0f;
  if (!a.initial || a.documents) return 0.0f;
  return static_cast<const float*>(a.initial)[(row.segment * a.channels + channel) * kept + kept + row.step - tap];
}

HOST_DEVICE inline float weight(const ConvArgs& a, int64_t channel, int64_t tap) {
  return static_cast<const float*>(a.weight)[channel * a.width + a.width - 1 - tap];
}

// Row r before the activation.
HOST_DEVICE inline float convolved(const ConvArgs& a, const Row& row, int64_t r, int64_t channel) {
  float y = a.bias ? static_cast<const float*>(a.bias)[channel] : 0.0f;
  for (int64_t tap = 0; tap < a.width; tap++) y += weight(a, channel, tap) * seen(a, row, r, tap, channel);
  return y;
}

// The number of this thread's element, and its row and channel: neighbouring threads lie beside each other in x.
__device__ bool my_element(const ConvArgs& a, int64_t rows, int64_t& r, int64_t& channel) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  const bool along_time = a.x.time < a.x.channel;
  r = along_time ? i % rows : i / a.channels;
  channel = along_time ? i / rows : i % a.channels;
  return i < rows * a.channels;
}

__global__ void __launch_bounds__(THREADS) conv_forward_kernel(ConvArgs a, int64_t rows) {
  int64_t r, channel;
  if (!my_element(a, rows, r, channel)) return;
  const Row row = find_row(a, r);
  float y = convolved(a, row, r, channel);
  if (a.silu) y *= sigmoid(y);
  write(a.out.p, a.out.dtype, element(a.out, row, 0, channel), silent(a, r) ? 0.0f : y);
}

// Row number of a segment's final state j, counted from the segment's start; negative ones lie in the initial state.
HOST_DEVICE inline int64_t final_step(const ConvArgs& a, int64_t steps, int64_t j) { return steps - (a.width - 1) + j; }

HOST_DEVICE inline int64_t length_of(const ConvArgs& a, int64_t s) {
  return a.offsets ? a.offsets[s + 1] - a.offsets[s] : a.length;
}

__global__ void __launch_bounds__(THREADS) conv_final_kernel(ConvArgs a) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, kept = a.width - 1;
  if (i >= a.segments * a.channels * kept) return;
  const int64_t j = i % kept, channel = i / kept % a.channels, s = i / kept / a.channels;
  const int64_t step = final_step(a, length_of(a, s), j);
  float value = 0.0f;
  if (step >= 0) {
    const int64_t time = a.offsets ? a.offsets[s] + step : step;
    value = read(a.x.p, a.x.dtype, (a.offsets ? 0 : s) * a.x.batch + time * a.x.time + channel * a.x.channel);
  } else if (a.initial) {
    value = static_cast<const float*>(a.initial)[(s * a.channels + channel) * kept + kept + step];
  }
  static_cast<float*>(a.final)[i] = value;
}

// The gradient before the activation, [rows, channels].
__global__ void __launch_bounds__(THREADS) conv_before_kernel(ConvArgs a, int64_t rows, float* dpre) {
  int64_t r, channel;
  if (!my_element(a, rows, r, channel)) return;
  const Row row = find_row(a, r);
  float g = read(a.dout.p, a.dout.dtype, element(a.dout, row, 0, channel));
  if (a.silu) {
    const float y = convolved(a, row, r, channel), gate = sigmoid(y);
    g *= gate * (1.0f + y * (1.0f - gate));
  }
  dpre[r * a.channels + channel] = silent(a, r) ? 0.0f : g;
}

// What the row at `step` of a segment, negative in the state, gives to the final states' gradient.
HOST_DEVICE inline float from_final(const ConvArgs& a, int64_t s, int64_t steps, int64_t step, int64_t channel) {
  const int64_t j = step - final_step(a, steps, 0);
  if (!a.dfinal || j < 0 || j >= a.width - 1) return 0.0f;
  return static_cast<const float*>(a.dfinal)[(s * a.channels + channel) * (a.width - 1) + j];
}

__global__ void __launch_bounds__(THREADS) conv_input_kernel(ConvArgs a, int64_t rows, const float* dpre) {
  int64_t r, channel;
  if (!my_element(a, rows, r, channel)) return;
  const Row row = find_row(a, r);
  float g = from_final(a, row.segment, row.steps, row.step, channel);
  for (int64_t tap = 0; tap < a.width && row.step + tap < row.steps; tap++)
    if (connected(a, r + tap, tap)) g += weight(a, channel, tap) * dpre[(r + tap) * a.channels + channel];
  write(a.dx.p, a.dx.dtype, element(a.dx, row, 0, channel), g);
}

__global__ void __launch_bounds__(THREADS) conv_initial_kernel(ConvArgs a, const float* dpre) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, kept = a.width - 1;
  if (i >= a.segments * a.channels * kept) return;
  const int64_t j = i % kept, channel = i / kept % a.channels, s = i / kept / a.channels;
  const int64_t steps = length_of(a, s), first = first_row(a, s), step = j - kept;
  float g = from_final(a, s, steps, step, channel);
  for (int64_t tap = -step; tap < a.width && step + tap < steps && !a.documents; tap++)
    g += weight(a, channel, tap) * dpre[(first + step + tap) * a.channels + channel];
  static_cast<float*>(a.dinitial)[i] = g;
}

// One tap of the weights' gradient, or (tap = width) the bias's, over the rows of a part.
__global__ void __launch_bounds__(THREADS)
    conv_weight_kernel(ConvArgs a, int64_t rows, const float* dpre, float* parts) {
  const int64_t channel = (int64_t)blockIdx.y * THREADS + threadIdx.x, tap = blockIdx.z;
  if (channel >= a.channels) return;
  const int64_t begin = blockIdx.x * CONV_ROWS, end = begin + CONV_ROWS < rows ? begin + CONV_ROWS : rows;
  float sum = 0.0f;
  for (int64_t r = begin; r < end; r++) {
    const float x = tap < a.width ? seen(a, find_row(a, r), r, tap, channel) : 1.0f;
    sum += dpre[r * a.channels + channel] * x;
  }
  const int64_t place = tap < a.width ? a.width - 1 - tap : tap;
  parts[(blockIdx.x * (a.width + 1) + place) * a.channels + channel] = sum;
}

unsigned blocks(int64_t threads) { return (unsigned)((threads + THREADS - 1) / THREADS); }

}  // namespace

const char* conv_forward(const ConvArgs& a, int64_t rows, void* stream) {
  const unsigned elements = blocks(rows * a.channels), states = blocks(a.segments * a.channels * (a.width - 1));
  if (elements) LAUNCH(conv_forward_kernel, elements, THREADS, 0, stream, a, rows);
  if (states) LAUNCH(conv_final_kernel, states, THREADS, 0, stream, a);
  return launch_error();
}

const char* conv_backward(const ConvArgs& a, int64_t rows, float* dpre, float* parts, void* stream) {
  const unsigned elements = blocks(rows * a.channels), states = blocks(a.segments * a.channels * (a.width - 1));
  if (elements) {
    LAUNCH(conv_before_kernel, elements, THREADS, 0, stream, a, rows, dpre);
    LAUNCH(conv_input_kernel, elements, THREADS, 0, stream, a, rows, dpre);
    const dim3 sums((unsigned)((rows + CONV_ROWS - 1) / CONV_ROWS), blocks(a.channels), (unsigned)(a.width + 1));
    LAUNCH(conv_weight_kernel, sums, THREADS, 0, stream, a, rows, dpre, parts);
  }
  if (states && a.dinitial) LAUNCH(conv_initial_kernel, states, THREADS, 0, stream, a, dpre);
  return launch_error();
}

}  // namespace scan
