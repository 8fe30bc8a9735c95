// Vectors of the widest kind that this source may use, their transposition, and the number formats of memory.
//
// The same text in every kernel package (`python kernels/native.py --sync`).
#pragma once
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define FOOTFALL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FOOTFALL_VECTOR_BYTES 32
#else
#define FOOTFALL_VECTOR_BYTES 16
#endif
#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc's own headers start some registers undefined on purpose and then warn of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#define FOOTFALL_INLINE static inline __attribute__((always_inline))

namespace footfall {
namespace FOOTFALL_ISA {

constexpr int kBytes = FOOTFALL_VECTOR_BYTES;

template <class F>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int lanes = kBytes / 4;
  typedef float V __attribute__((vector_size(kBytes)));
  typedef float Loose __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kBytes)));
};
template <>
struct Simd<double> {
  static constexpr int lanes = kBytes / 8;
  typedef double V __attribute__((vector_size(kBytes)));
  typedef double Loose __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kBytes)));
};

template <class F>
using Vec = typename Simd<F>::V;

template <class F>
FOOTFALL_INLINE Vec<F> load(const F* p) {
  return *reinterpret_cast<const typename Simd<F>::Loose*>(p);
}
template <class F>
FOOTFALL_INLINE void store(F* p, typename Simd<F>::V x) {
  *reinterpret_cast<typename Simd<F>::Loose*>(p) = x;
}
template <class F>
FOOTFALL_INLINE Vec<F> splat(F x) {
  return x - Vec<F>{};
}

// gcc has the shuffle of clang since version 12, and before that one that takes its indices as a vector.
#if defined(__clang__) || __GNUC__ >= 12
#define FOOTFALL_SHUFFLE(F, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FOOTFALL_SHUFFLE(F, a, b, ...) __builtin_shuffle(a, b, Simd<F>::I{__VA_ARGS__})
#endif
// a0 b0 a1 b1 ... of the lower and of the upper halves.
#define FOOTFALL_INTERLEAVE(F, LO, HI)                                                               \
  FOOTFALL_INLINE Vec<F> interleave_lo(Vec<F> a, Vec<F> b) { return FOOTFALL_SHUFFLE(F, a, b, LO); } \
  FOOTFALL_INLINE Vec<F> interleave_hi(Vec<F> a, Vec<F> b) { return FOOTFALL_SHUFFLE(F, a, b, HI); }
#define FOOTFALL_LIST(...) __VA_ARGS__
#if FOOTFALL_VECTOR_BYTES == 64
FOOTFALL_INTERLEAVE(float, FOOTFALL_LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                    FOOTFALL_LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
FOOTFALL_INTERLEAVE(double, FOOTFALL_LIST(0, 8, 1, 9, 2, 10, 3, 11), FOOTFALL_LIST(4, 12, 5, 13, 6, 14, 7, 15))
#elif FOOTFALL_VECTOR_BYTES == 32
FOOTFALL_INTERLEAVE(float, FOOTFALL_LIST(0, 8, 1, 9, 2, 10, 3, 11), FOOTFALL_LIST(4, 12, 5, 13, 6, 14, 7, 15))
FOOTFALL_INTERLEAVE(double, FOOTFALL_LIST(0, 4, 1, 5), FOOTFALL_LIST(2, 6, 3, 7))
#else
FOOTFALL_INTERLEAVE(float, FOOTFALL_LIST(0, 4, 1, 5), FOOTFALL_LIST(2, 6, 3, 7))
FOOTFALL_INTERLEAVE(double, FOOTFALL_LIST(0, 2), FOOTFALL_LIST(1, 3))
#endif
#undef FOOTFALL_INTERLEAVE
#undef FOOTFALL_LIST
#undef FOOTFALL_SHUFFLE

// v[0..lanes) as rows of a square matrix, transposed in place.
template <class F>
FOOTFALL_INLINE void transpose(Vec<F>* v) {
  constexpr int W = Simd<F>::lanes;
  Vec<F> t[W];
  for (int stage = 1; stage < W; stage *= 2) {
    for (int i = 0; i < W / 2; i++) {
      t[2 * i] = interleave_lo(v[i], v[i + W / 2]);
      t[2 * i + 1] = interleave_hi(v[i], v[i + W / 2]);
    }
    for (int i = 0; i < W; i++) v[i] = t[i];
  }
}

// Number formats of memory; arithmetic is float or double.
struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

FOOTFALL_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

FOOTFALL_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FOOTFALL_INLINE float widen(float x) { return x; }
FOOTFALL_INLINE double widen(double x) { return x; }
FOOTFALL_INLINE float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
FOOTFALL_INLINE void narrow(float x, float* to) { *to = x; }
FOOTFALL_INLINE void narrow(double x, double* to) { *to = x; }
FOOTFALL_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = to_bits(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#if defined(__F16C__)
FOOTFALL_INLINE float widen(Float16 x) { return _cvtsh_ss(x.bits); }
FOOTFALL_INLINE void narrow(float x, Float16* to) { to->bits = _cvtss_sh(x, 0); }
#else
FOOTFALL_INLINE float widen(Float16 x) {
  // The exponent is moved by a product, which takes care of subnormal numbers; infinity and NaN keep the largest one.
  const float magnitude = from_bits(uint32_t(x.bits & 0x7fff) << 13) * 5.192296858534828e33f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return from_bits(to_bits(magnitude) | special | (uint32_t(x.bits & 0x8000) << 16));
}
FOOTFALL_INLINE void narrow(float x, Float16* to) {
  const uint32_t sign = (to_bits(x) >> 16) & 0x8000, bits = to_bits(x) & 0x7fffffff;
  uint32_t half;
  if (bits >= 0x7f800001) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;
  } else if (bits < 0x38800000) {
    // Subnormal: adding 0.5 lets the float unit round at the right bit.
    half = to_bits(from_bits(bits) + 0.5f) - 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  to->bits = uint16_t(half | sign);
}
#endif

}  // namespace FOOTFALL_ISA
}  // namespace footfall
