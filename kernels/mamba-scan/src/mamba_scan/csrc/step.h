// The arithmetic of one thread of the CUDA kernels: no thread index, no shared memory, nothing that only a card knows.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "device.h"

namespace scan {

HOST_DEVICE inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
HOST_DEVICE inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
// The derivative of softplus from its value, exact for small ones too.
HOST_DEVICE inline float softplus_slope(float y) { return -expm1f(-y); }

HOST_DEVICE inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
HOST_DEVICE inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

HOST_DEVICE inline float from_f16(uint16_t x) {
  // Shifted into place the exponent is 112 too small; one multiplication mends that, denormals included.
  const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
  if ((x & 0x7fff) >= 0x7c00) return from_bits(0x7f800000u | magnitude | sign);
  return from_bits(to_bits(from_bits(magnitude) * from_bits(0x77800000u)) | sign);
}
HOST_DEVICE inline uint16_t to_f16(float x) {
  uint32_t bits = to_bits(x);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  // Below 2**-14 adding 0.5 leaves the rounded denormal in the low bits.
  if (bits < 0x38800000) return (uint16_t)(sign | (to_bits(from_bits(bits) + 0.5f) - 0x3f000000));
  bits += 0xfff + ((bits >> 13) & 1);
  return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}
HOST_DEVICE inline uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  return x == x ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : (uint16_t)0x7fc0;
}

enum Dtype { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

HOST_DEVICE inline float read(const void* p, int dtype, int64_t i) {
  if (dtype == F32) return static_cast<const float*>(p)[i];
  const uint16_t x = static_cast<const uint16_t*>(p)[i];
  return dtype == BF16 ? from_bits((uint32_t)x << 16) : from_f16(x);
}
HOST_DEVICE inline void write(void* p, int dtype, int64_t i, float x) {
  if (dtype == F32)
    static_cast<float*>(p)[i] = x;
  else
    static_cast<uint16_t*>(p)[i] = dtype == BF16 ? to_bf16(x) : to_f16(x);
}

// One step of NS states: h <- exp(dt A) h + dt u B; the share of y = C h. A2 is A in powers of two.
template <int NS>
HOST_DEVICE inline float forward_step(float* h, const float* A2, float dt, float u, const float* B, const float* C) {
  float y = 0.0f;
  for (int j = 0; j < NS; j++) {
    h[j] = exp2f(dt * A2[j]) * h[j] + dt * u * B[j];
    y += h[j] * C[j];
  }
  return y;
}

// The same without the output; keeps the decay and the state before the step.
template <int NS>
HOST_DEVICE inline void recompute_step(float* h, float* decay, float* before, const float* A2, float dt, float u,
                                       const float* B) {
  for (int j = 0; j < NS; j++) {
    decay[j] = exp2f(dt * A2[j]);
    before[j] = h[j];
    h[j] = decay[j] * h[j] + dt * u * B[j];
  }
}

// Shares of NS states in y, <g, B> and the step's own gradient through the decay.
struct StepSums {
  float y, gB, decay;
};

// One step back. g: what the state after the step receives from later ones, becomes that of the state before it.
template <int NS>
HOST_DEVICE inline StepSums backward_step(float* g, float* dA, float* dB, float* dC, const float* decay,
                                          const float* before, const float* A, float dt, float u, float dy,
                                          const float* B, const float* C) {
  StepSums s = {0.0f, 0.0f, 0.0f};
  for (int j = 0; j < NS; j++) {
    const float decayed = decay[j] * before[j], h = decayed + dt * u * B[j];
    s.y += h * C[j];
    dC[j] = dy * h;
    g[j] += dy * C[j];
    s.gB += g[j] * B[j];
    dB[j] = dt * u * g[j];
    const float q = g[j] * decayed;
    dA[j] += dt * q;
    s.decay += q * A[j];
    g[j] *= decay[j];
  }
  return s;
}

}  // namespace scan
