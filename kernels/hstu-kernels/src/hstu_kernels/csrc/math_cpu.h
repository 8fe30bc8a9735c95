// SiLU's sigmoid, a register-blocked matrix product, small transposes, lines of memory.
#pragma once
#include "simd.h"

namespace hstu {
namespace FOOTFALL_ISA {

using namespace footfall::FOOTFALL_ISA;

// Vectors and rows of a block of a product that the registers hold.
#if defined(__AVX512F__)
constexpr int kVectors = 4, kRows = 6;
#elif defined(__AVX2__)
constexpr int kVectors = 2, kRows = 6;
#else
constexpr int kVectors = 2, kRows = 4;
#endif

// What the two widths of numbers need for e to the power of x.
template <class F>
struct Exponential;

template <>
struct Exponential<float> {
  typedef Simd<float>::V V;
  static constexpr float log2e = 1.44269504088896341f, ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723e-6f;
  // Adding this number leaves the rounded integer in the low bits of the mantissa.
  static constexpr float rounder = 12582912.f, least = -87.f, most = 88.f;
  static constexpr int bias = 127, mantissa = 23;
  static inline V polynomial(V r) {
    V p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    return p * r + 1.f;
  }
};

template <>
struct Exponential<double> {
  typedef Simd<double>::V V;
  static constexpr double log2e = 1.44269504088896340736, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double rounder = 6755399441055744.0, least = -708., most = 709.;
  static constexpr int bias = 1023, mantissa = 52;
  static inline V polynomial(V r) {
    V p = r * (1. / 39916800.) + 1. / 3628800.;
    p = p * r + 1. / 362880.;
    p = p * r + 1. / 40320.;
    p = p * r + 1. / 5040.;
    p = p * r + 1. / 720.;
    p = p * r + 1. / 120.;
    p = p * r + 1. / 24.;
    p = p * r + 1. / 6.;
    p = p * r + .5;
    p = p * r + 1.;
    return p * r + 1.;
  }
};

template <class F>
static inline typename Simd<F>::V sigmoid(typename Simd<F>::V x) {
  typedef Exponential<F> S;
  typedef typename S::V V;
  V y = -x;
  y = y < S::least ? V{} + S::least : y;
  y = y > S::most ? V{} + S::most : y;
  V shifted = y * S::log2e + S::rounder;
  V whole = shifted - S::rounder;
  V rest = y - whole * S::ln2_high;
  rest = rest - whole * S::ln2_low;
  typename Simd<F>::I power = ((typename Simd<F>::I)shifted + S::bias) << S::mantissa;
  return 1 / (1 + S::polynomial(rest) * (V)power);
}

// c[rows, vectors] (+)= a * b over `depth`, all sizes known to the compiler so that c stays in registers. a is [rows,
// depth] with row stride lda, or [depth, rows] when Transposed.
template <class F, int Rows, int Vectors, bool Transposed, bool Add>
static inline void block(const F* a, int64_t lda, const F* b, int64_t ldb, int depth, F* c, int64_t ldc) {
  constexpr int lanes = Simd<F>::lanes;
  typename Simd<F>::V sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < Vectors; ++n) sum[i][n] = Add ? load(c + i * ldc + n * lanes) : typename Simd<F>::V{};
  for (int k = 0; k < depth; ++k) {
    typename Simd<F>::V right[Vectors];
#pragma GCC unroll 8
    for (int n = 0; n < Vectors; ++n) right[n] = load(b + n * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const F left = Transposed ? a[i] : a[i * lda];
#pragma GCC unroll 8
      for (int n = 0; n < Vectors; ++n) sum[i][n] += left * right[n];
    }
    a += Transposed ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < Vectors; ++n) store(c + i * ldc + n * lanes, sum[i][n]);
}

template <class F, int Vectors, bool Transposed, bool Add>
static inline void rows_block(int rows, const F* a, int64_t lda, const F* b, int64_t ldb, int depth, F* c,
                              int64_t ldc) {
  switch (rows) {
#define HSTU_ROWS(R) \
  case R:            \
    return block<F, R, Vectors, Transposed, Add>(a, lda, b, ldb, depth, c, ldc);
    HSTU_ROWS(1)
    HSTU_ROWS(2)
    HSTU_ROWS(3)
    HSTU_ROWS(4)
#if defined(__AVX2__)
    HSTU_ROWS(5)
    HSTU_ROWS(6)
#endif
#undef HSTU_ROWS
  }
}

// The product for at most kRows rows and any number of vectors.
template <class F, bool Transposed, bool Add>
static void multiply(int rows, int vectors, const F* a, int64_t lda, const F* b, int64_t ldb, int depth, F* c,
                     int64_t ldc) {
  constexpr int lanes = Simd<F>::lanes;
  for (; vectors >= kVectors; vectors -= kVectors, b += kVectors * lanes, c += kVectors * lanes)
    rows_block<F, kVectors, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
#if defined(__AVX512F__)
  if (vectors == 3) return rows_block<F, 3, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
  if (vectors == 2) return rows_block<F, 2, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
#endif
  if (vectors == 1) rows_block<F, 1, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
}

// to[d, r] = from[r, d]; rows and width are multiples of the lanes.
static inline void transpose(const double* from, int64_t ld_from, int rows, int width, double* to, int64_t ld_to) {
  for (int r = 0; r < rows; ++r)
    for (int d = 0; d < width; ++d) to[d * ld_to + r] = from[r * ld_from + d];
}

#if defined(__AVX512F__)
static inline void transpose16(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * ld_from);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(to + i * ld_to, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(to + (i + 8) * ld_to, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
}

static inline void transpose(const float* from, int64_t ld_from, int rows, int width, float* to, int64_t ld_to) {
  for (int r = 0; r < rows; r += 16)
    for (int d = 0; d < width; d += 16) transpose16(from + r * ld_from + d, ld_from, to + d * ld_to + r, ld_to);
}
#elif defined(__AVX2__)
static inline void transpose8(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * ld_from);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

static inline void transpose(const float* from, int64_t ld_from, int rows, int width, float* to, int64_t ld_to) {
  for (int r = 0; r < rows; r += 8)
    for (int d = 0; d < width; d += 8) transpose8(from + r * ld_from + d, ld_from, to + d * ld_to + r, ld_to);
}
#else
static inline void transpose(const float* from, int64_t ld_from, int rows, int width, float* to, int64_t ld_to) {
  for (int r = 0; r < rows; ++r)
    for (int d = 0; d < width; ++d) to[d * ld_to + r] = from[r * ld_from + d];
}
#endif

// A line of memory as F, filled up with zeros to `padded` elements, a multiple of the lanes.
template <class F, class In>
static inline void read_line(const In* from, int64_t width, int64_t padded, F* to) {
  constexpr int lanes = Simd<F>::lanes;
  int64_t d = 0;
  for (; d + lanes <= width; d += lanes)
    for (int l = 0; l < lanes; ++l) to[d + l] = widen(from[d + l]);
  for (; d < width; ++d) to[d] = widen(from[d]);
  for (; d < padded; ++d) to[d] = 0;
}

// to = scale * from, narrowed; `from` holds whole vectors.
template <class F, class Out>
static inline void write_line(const F* from, int64_t width, F scale, Out* to) {
  constexpr int lanes = Simd<F>::lanes;
  int64_t d = 0;
  for (; d + lanes <= width; d += lanes)
    for (int l = 0; l < lanes; ++l) narrow(from[d + l] * scale, to + d + l);
  for (; d < width; ++d) narrow(from[d] * scale, to + d);
}

#if defined(__F16C__)
template <>
inline void read_line<float, Float16>(const Float16* from, int64_t width, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    _mm256_storeu_ps(to + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d))));
  for (; d < width; ++d) to[d] = widen(from[d]);
  for (; d < padded; ++d) to[d] = 0;
}

template <>
inline void write_line<float, Float16>(const float* from, int64_t width, float scale, Float16* to) {
  const __m256 by = _mm256_set1_ps(scale);
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d),
                     _mm256_cvtps_ph(_mm256_mul_ps(by, _mm256_loadu_ps(from + d)), 0));
  for (; d < width; ++d) narrow(from[d] * scale, to + d);
}
#endif

#if defined(__AVX512F__)
template <>
inline void read_line<float, float>(const float* from, int64_t width, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) _mm512_storeu_ps(to + d, _mm512_loadu_ps(from + d));
  if (d < width) _mm512_storeu_ps(to + d, _mm512_maskz_loadu_ps(__mmask16((1u << (width - d)) - 1), from + d));
}

template <>
inline void write_line<float, float>(const float* from, int64_t width, float scale, float* to) {
  const __m512 by = _mm512_set1_ps(scale);
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) _mm512_storeu_ps(to + d, _mm512_mul_ps(by, _mm512_loadu_ps(from + d)));
  if (d < width)
    _mm512_mask_storeu_ps(to + d, __mmask16((1u << (width - d)) - 1), _mm512_mul_ps(by, _mm512_loadu_ps(from + d)));
}
#endif

}  // namespace FOOTFALL_ISA
}  // namespace hstu
