// What the CUDA sources need of their compiler. A compiler without CUDA takes them too, with an emulator that runs the
// threads of a block in turns (tests/mamba_scan/cuda_emulator.h): so the kernels are tested where there is no card.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define HOST_DEVICE __host__ __device__
#define SHARED_FLOATS(name) extern __shared__ float name[]
#define LAUNCH(kernel, grid, threads, shared, stream, ...) \
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace scan {
// The message of the last launch that failed, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
}  // namespace scan

#else
#include "cuda_emulator.h"
#endif
