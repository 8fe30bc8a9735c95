// What the kernels take: pointers, sizes and strides, in elements. No Python and no torch here.
#pragma once

#include <stdint.h>

namespace scan {

// A tensor [batch, time, channel] of any strides; packed layouts have one batch row. p is null where it is absent.
struct Array {
  void* p;
  int dtype;
  int64_t batch, time, channel;
};

// Computation type R is float or double. Where A is complex, what belongs to states (A, B, C, initial, last, saved and
// their gradients) has a leading plane of real parts and one of imaginary parts; saved has them within each slot. A
// token is a row: batch * length + time, or the position in the packed layout.
struct ScanArgs {
  int double_precision, complex, softplus, variable_B, variable_C, save, threads;
  int64_t segments, length, channels, states, groups, rows;
  const int64_t* offsets;           // [segments + 1], or null: every batch row is one segment of `length`
  Array u, delta, z, out;           // any float type; the backward pass fills out only where it is given
  const void *A, *D, *bias;         // R [channels, states], [channels], [channels]
  const void *B, *C;                // R [rows, groups, states] where variable, else [channels, states]
  const void* initial;              // R [segments, channels, states] or null
  void *last, *saved;               // R [segments, channels, states]; R [slots, states, channels]
  Array dout, du, ddelta, dz;       // backward only, as are the following
  const void* dlast;                // R [segments, channels, states] or null
  void *dA, *dD, *dbias, *dB, *dC;  // R, shaped as what they are gradients of; dD and dbias may be null
  void* dinitial;                   // R [segments, channels, states] or null
};

// A causal depthwise convolution; weight, bias, states and their gradients are R.
struct ConvArgs {
  int double_precision, silu, threads;
  int64_t segments, length, channels, width;
  const int64_t* offsets;    // as above
  const int32_t* documents;  // [rows] or null: taps do not reach across a change, rows of negative ones are zero
  Array x, out;
  const void *weight, *bias;         // [channels, width], [channels] or null
  const void* initial;               // [segments, channels, width - 1] or null
  void* final;                       // [segments, channels, width - 1]
  Array dout, dx;                    // backward only, as are the following
  const void* dfinal;                // may be null
  void *dweight, *dbias, *dinitial;  // dbias and dinitial may be null
};

}  // namespace scan
