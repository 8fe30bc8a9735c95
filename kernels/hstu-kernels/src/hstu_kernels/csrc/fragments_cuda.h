// Products of 16-row strips on tensor cores (mma.sync m16n8k16, float32 sums) and, for float32, by plain multiply-adds
// in the same layout.
//
// A strip's sums live in registers: of the tile of 8 columns j, lane 4 * g + t holds rows g (two numbers) and g + 8
// (two), columns 8 * j + 2 * t and the next. The instructions themselves are at the top; a host compiler takes a scalar
// stand-in for them, with which the tests run these kernels without a card.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "cuda_on_host.h"
#endif

namespace hstu_cuda {

#ifdef __CUDACC__
struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

__device__ inline uint32_t pack(BFloat16, float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

__device__ inline uint32_t pack(Float16, float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

__device__ inline void mma(BFloat16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(Float16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t* x, const void* row) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t* x, const void* row) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

// 16 bytes to shared memory, zeros where not `inside`; done when copies_wait says so.
__device__ inline void copy_16(void* to, const void* from, bool inside) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Left>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#endif

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

// Columns of a line in shared memory: 16 bytes more than the tile, so that eight lines lie in different banks.
template <class E, int D>
constexpr int kLine = D + 16 / int(sizeof(E));

// sums[16, N] += a[16, D] * b[N, D]^T, both tiles in shared memory.
template <class E, int D, int N>
__device__ inline void multiply_rows(float (*sums)[4], const E* a, const E* b) {
  constexpr int line = kLine<E, D>;
  if constexpr (sizeof(E) == 2) {
    const int l = lane();
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t left[4];
      load_matrices(left, a + l % 16 * line + k + l / 16 * 8);
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        uint32_t right[4];
        load_matrices(right, b + (n * 16 + l / 16 * 8 + l % 8) * line + k + l / 8 % 2 * 8);
        mma(E{}, sums[2 * n], left, right[0], right[1]);
        mma(E{}, sums[2 * n + 1], left, right[2], right[3]);
      }
    }
  } else {
    const int g = lane() / 4, t = lane() % 4;
    for (int k = 0; k < D; ++k) {
      const float low = a[g * line + k], high = a[(g + 8) * line + k];
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float first = b[(8 * j + 2 * t) * line + k], second = b[(8 * j + 2 * t + 1) * line + k];
        sums[j][0] += low * first;
        sums[j][1] += low * second;
        sums[j][2] += high * first;
        sums[j][3] += high * second;
      }
    }
  }
}

// sums[16, D] += w[16, N] * b[N, D]; w in registers, b in shared memory. `strip` is [16, N + 1] numbers of this warp,
// for float32 only.
template <class E, int D, int N>
__device__ inline void multiply_weights(float (*sums)[4], const float (*w)[4], const E* b, float* strip) {
  constexpr int line = kLine<E, D>;
  if constexpr (sizeof(E) == 2) {
    const int l = lane();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      const uint32_t left[4] = {pack(E{}, w[2 * k][0], w[2 * k][1]), pack(E{}, w[2 * k][2], w[2 * k][3]),
                                pack(E{}, w[2 * k + 1][0], w[2 * k + 1][1]),
                                pack(E{}, w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t right[4];
        load_matrices_transposed(right, b + (k * 16 + l % 16) * line + d * 16 + l / 16 * 8);
        mma(E{}, sums[2 * d], left, right[0], right[1]);
        mma(E{}, sums[2 * d + 1], left, right[2], right[3]);
      }
    }
  } else {
    const int g = lane() / 4, t = lane() % 4;
    for (int j = 0; j < N / 8; ++j)
      for (int i = 0; i < 4; ++i) strip[(g + i / 2 * 8) * (N + 1) + 8 * j + 2 * t + i % 2] = w[j][i];
    __syncwarp();
    for (int k = 0; k < N; ++k) {
      const float low = strip[g * (N + 1) + k], high = strip[(g + 8) * (N + 1) + k];
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const float first = b[k * line + 8 * j + 2 * t], second = b[k * line + 8 * j + 2 * t + 1];
        sums[j][0] += low * first;
        sums[j][1] += low * second;
        sums[j][2] += high * first;
        sums[j][3] += high * second;
      }
    }
    __syncwarp();
  }
}

__device__ inline void write(float* to, float x) { *to = x; }
template <class E>
__device__ inline void write(E* to, float x) {
  to->bits = uint16_t(pack(E{}, x, 0.f));
}

// Rows [first, first + Rows) of a matrix with `limit` rows of `width` numbers into a tile, zeros around them.
template <class E, int D, int Rows>
__device__ inline void copy_tile(E* tile, const E* from, int64_t stride, int first, int limit, int width,
                                 bool aligned) {
  constexpr int unit = 16 / int(sizeof(E));
  for (int at = threadIdx.x; at < Rows * (D / unit); at += blockDim.x) {
    const int r = at / (D / unit), c = at % (D / unit) * unit;
    E* const to = tile + r * kLine<E, D> + c;
    const bool row_inside = first + r < limit;
    if (aligned) {
      const bool inside = row_inside && c < width;
      copy_16(to, inside ? from + (first + r) * stride + c : from, inside);
    } else {
      for (int i = 0; i < unit; ++i) to[i] = row_inside && c + i < width ? from[(first + r) * stride + c + i] : E{};
    }
  }
}

}  // namespace hstu_cuda
