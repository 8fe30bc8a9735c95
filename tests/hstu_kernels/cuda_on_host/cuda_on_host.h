// CUDA on a CPU, slowly, for tests: the threads of a block are fibers that take turns and meet at barriers, one block after another.
//
// The tensor-core instructions are written out one number at a time from the layouts in the PTX manual. Asynchronous copies leave NaN
// behind until they are waited for, and shared memory starts as NaN, so that a missing wait or barrier shows.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#define __device__
#define __global__
#define __align__(x)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace on_host {

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

struct Barrier {
  int arrived = 0, generation = 0, votes = 0, result = 0;
};

struct Warp {
  Barrier barrier;
  // What the lanes hand in, twice: a lane may be one instruction ahead of another.
  uint32_t words[2][32][6];
  const void* rows[2][32];
  int turn[32] = {};
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline int now = 0;
inline std::vector<unsigned char> memory;
inline std::function<void()> body;

inline void wait(Barrier& barrier, int count, int vote = 0) {
  barrier.votes |= vote;
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.result = barrier.votes;
    barrier.votes = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&fibers[now].context, &scheduler);
}

inline void run_fiber() {
  body();
  fibers[now].done = true;
  swapcontext(&fibers[now].context, &scheduler);
}

inline float half_to_float(uint16_t x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                         : std::ldexp(float(mantissa), -24);
  return x & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t float_to_half(float x) {
  // To a whole number of units in the last place, ties to even.
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (a != a) return 0x7e00;
  if (a == 0) return sign;
  if (a >= 65520.f) return sign | 0x7c00;
  int exponent;
  std::frexp(a, &exponent);
  const int unit = exponent < -13 ? -24 : exponent - 11;
  const float steps = std::nearbyint(std::ldexp(a, -unit));
  const int whole = int(steps);
  if (unit == -24) return uint16_t(sign | whole);
  return uint16_t(sign | (((unit + 25) << 10) + (whole - 1024)));
}

inline float bfloat_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace on_host

struct HostThread {
  struct Axis {
    int index;
    operator unsigned() const { return index ? 0u : unsigned(on_host::now); }
  } x{0};
};
inline HostThread threadIdx;
inline dim3 blockIdx, blockDim, gridDim;

inline void __syncthreads() { on_host::wait(on_host::block_barrier, int(blockDim.x)); }
inline int __syncthreads_or(int vote) {
  on_host::wait(on_host::block_barrier, int(blockDim.x), vote);
  return on_host::block_barrier.result;
}
inline void __syncwarp() { on_host::wait(on_host::warps[on_host::now / 32].barrier, 32); }

typedef int cudaError_t;
typedef struct HostStream* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) { return bytes <= 163 * 1024 ? 0 : 1; }
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, 0; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  using namespace on_host;
  ::gridDim = config->gridDim;
  ::blockDim = config->blockDim;
  const int threads = int(config->blockDim.x);
  for (unsigned y = 0; y < config->gridDim.y; ++y)
    for (unsigned x = 0; x < config->gridDim.x; ++x) {
      ::blockIdx = dim3(x, y, 0);
      memory.assign(config->dynamicSmemBytes + 64, 0xff);
      fibers = std::vector<Fiber>(threads);
      warps.assign((threads + 31) / 32, Warp());
      block_barrier = Barrier();
      body = [&] { kernel(arguments...); };
      for (now = 0; now < threads; ++now) {
        Fiber& fiber = fibers[now];
        fiber.stack.reset(new char[1 << 17]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 1 << 17;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
      }
      for (int left = threads; left;)
        for (now = 0; now < threads; ++now)
          if (!fibers[now].done) {
            swapcontext(&scheduler, &fibers[now].context);
            left -= fibers[now].done;
          }
    }
  return cudaSuccess;
}

namespace hstu_cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t pack(BFloat16, float low, float high) {
  return on_host::float_to_bfloat(low) | uint32_t(on_host::float_to_bfloat(high)) << 16;
}
inline uint32_t pack(Float16, float low, float high) {
  return on_host::float_to_half(low) | uint32_t(on_host::float_to_half(high)) << 16;
}

inline unsigned char* shared_memory() {
  const uintptr_t at = reinterpret_cast<uintptr_t>(on_host::memory.data());
  return reinterpret_cast<unsigned char*>((at + 15) / 16 * 16);
}

template <float (*Widen)(uint16_t)>
void product(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  on_host::Warp& warp = on_host::warps[on_host::now / 32];
  const int lane = on_host::now % 32, turn = warp.turn[lane] ^= 1;
  for (int i = 0; i < 4; ++i) warp.words[turn][lane][i] = a[i];
  warp.words[turn][lane][4] = b0;
  warp.words[turn][lane][5] = b1;
  on_host::wait(warp.barrier, 32);
  const auto number = [&](int holder, int word, int half) { return Widen(uint16_t(warp.words[turn][holder][word] >> 16 * half)); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k)
      sum += number(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2) * number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    c[i] = sum;
  }
}

inline void mma(BFloat16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  product<on_host::bfloat_to_float>(c, a, b0, b1);
}
inline void mma(Float16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) { product<on_host::half_to_float>(c, a, b0, b1); }

template <bool Transposed>
void load_eights(uint32_t* x, const void* row) {
  on_host::Warp& warp = on_host::warps[on_host::now / 32];
  const int lane = on_host::now % 32, turn = warp.turn[lane] ^= 1;
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  warp.rows[turn][lane] = row;
  on_host::wait(warp.barrier, 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int r = Transposed ? lane % 4 * 2 + half : lane / 4, c = Transposed ? lane / 4 : lane % 4 * 2 + half;
      pair[half] = static_cast<const uint16_t*>(warp.rows[turn][matrix * 8 + r])[c];
    }
    x[matrix] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

inline void load_matrices(uint32_t* x, const void* row) { load_eights<false>(x, row); }
inline void load_matrices_transposed(uint32_t* x, const void* row) { load_eights<true>(x, row); }

inline void copy_16(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
  std::memset(to, 0xff, 16);
  on_host::fibers[on_host::now].open.push_back({to, from, inside});
}

inline void copies_commit() {
  on_host::Fiber& fiber = on_host::fibers[on_host::now];
  fiber.committed.push_back(fiber.open);
  fiber.open.clear();
}

template <int Left>
void copies_wait() {
  auto& committed = on_host::fibers[on_host::now].committed;
  for (; int(committed.size()) > Left; committed.pop_front())
    for (const on_host::Copy& copy : committed.front()) {
      if (copy.inside)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
}

}  // namespace hstu_cuda
