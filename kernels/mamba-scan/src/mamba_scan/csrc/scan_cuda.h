// The CUDA kernels as their callers see them. Pointers are device pointers, the computation type is float, A is real;
// a stream comes as its address. They return null, or the message of a launch that failed.
#pragma once

#include "scan.h"

namespace scan {

// Sums of the backward pass in parts, for the caller to add in order.
struct ScanParts {
  int64_t count;         // segments s with the same s % count make a part
  float *row_B, *row_C;  // [blocks, rows, groups, states] where variable: over the channels of a block
  float* states;         // [3, count, channels, states]: A, and B and C where constant
  float* channels;       // [2, count, channels]: D and the bias
};

// Blocks of channels in a group: the first size of row_B and row_C.
int64_t scan_blocks(int64_t states, int64_t channels_of_group);
const char* scan_forward(const ScanArgs& a, void* stream);
const char* scan_backward(const ScanArgs& a, const ScanParts& parts, void* stream);

// Rows of one part of the weights' gradient.
constexpr int64_t CONV_ROWS = 512;

const char* conv_forward(const ConvArgs& a, int64_t rows, void* stream);
// dpre: room for [rows, channels]; parts: [ceil(rows / CONV_ROWS), width + 1, channels], the weights' and the bias's.
const char* conv_backward(const ConvArgs& a, int64_t rows, float* dpre, float* parts, void* stream);

}  // namespace scan
