// Products of bfloat16 pairs (AVX512-BF16). These functions alone are compiled for that extension; the caller asks the
// chip first. A word holds two neighbours along the summed axis, the first in its low half.
#pragma once
#include "hstu_cpu.h"
#include "math_cpu.h"

#if defined(__AVX512F__)
namespace hstu {
namespace FOOTFALL_ISA {
namespace {

#define HSTU_PAIRS __attribute__((target("avx512bf16")))

// c[rows, vectors] (+)= a * b; a is [rows, depth] words with row stride lda, or [depth, rows] when Transposed.
template <int Rows, int Vectors, bool Transposed, bool Add>
HSTU_PAIRS void pair_block(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int depth, float* c,
                           int64_t ldc) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < Vectors; ++n) sum[i][n] = Add ? _mm512_loadu_ps(c + i * ldc + n * 16) : _mm512_setzero_ps();
  for (int k = 0; k < depth; ++k) {
    __m512i right[Vectors];
#pragma GCC unroll 8
    for (int n = 0; n < Vectors; ++n) right[n] = _mm512_loadu_si512(b + n * 16);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const __m512i left = _mm512_set1_epi32(int(Transposed ? a[i] : a[i * lda]));
#pragma GCC unroll 8
      for (int n = 0; n < Vectors; ++n) sum[i][n] = _mm512_dpbf16_ps(sum[i][n], (__m512bh)left, (__m512bh)right[n]);
    }
    a += Transposed ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < Vectors; ++n) _mm512_storeu_ps(c + i * ldc + n * 16, sum[i][n]);
}

template <int Vectors, bool Transposed, bool Add>
void pair_rows(int rows, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int depth, float* c,
               int64_t ldc) {
  switch (rows) {
#define HSTU_ROWS(R) \
  case R:            \
    return pair_block<R, Vectors, Transposed, Add>(a, lda, b, ldb, depth, c, ldc);
    HSTU_ROWS(1)
    HSTU_ROWS(2)
    HSTU_ROWS(3)
    HSTU_ROWS(4)
    HSTU_ROWS(5)
    HSTU_ROWS(6)
#undef HSTU_ROWS
  }
}

template <bool Transposed, bool Add>
void multiply_pairs(int rows, int vectors, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int depth,
                    float* c, int64_t ldc) {
  for (; vectors >= 4; vectors -= 4, b += 64, c += 64)
    pair_rows<4, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
  if (vectors == 3) return pair_rows<3, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
  if (vectors == 2) return pair_rows<2, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
  if (vectors == 1) pair_rows<1, Transposed, Add>(rows, a, lda, b, ldb, depth, c, ldc);
}

inline const uint16_t* row_at(const View& view, int64_t row, int64_t head) {
  return static_cast<const uint16_t*>(view.data) + row * view.row + head * view.head;
}

// Rows as words along their width, padded with zeros.
inline void read_words(const View& view, int64_t row, int64_t count, int64_t head, int64_t width, int64_t padded,
                       uint32_t* to) {
  for (int64_t r = 0; r < count; ++r) {
    char* line = reinterpret_cast<char*>(to + r * padded);
    memcpy(line, row_at(view, row + r, head), size_t(width) * 2);
    memset(line + width * 2, 0, size_t(padded * 4 - width * 2));
  }
}

// The same, transposed: to[word, row] with kKeys rows. A transpose moves words about whatever they mean.
inline void read_transposed_words(const View& view, int64_t row, int count, int64_t head, int64_t width, int64_t padded,
                                  uint32_t* rows, uint32_t* to) {
  const int whole = (count + 15) / 16 * 16;
  read_words(view, row, count, head, width, padded, rows);
  memset(rows + count * padded, 0, size_t(whole - count) * size_t(padded) * 4);
  transpose(reinterpret_cast<const float*>(rows), padded, whole, int(padded), reinterpret_cast<float*>(to), kKeys);
}

// Words of row pairs: to[pair, d] = (row 2 * pair, row 2 * pair + 1), padded with zeros.
inline void read_row_pairs(const View& view, int64_t row, int count, int64_t head, int64_t width, int64_t padded,
                           uint32_t* to) {
  for (int r = 0; r < count; r += 2) {
    const uint16_t* low = row_at(view, row + r, head);
    uint32_t* line = to + r / 2 * padded;
    if (r + 1 < count) {
      const uint16_t* high = row_at(view, row + r + 1, head);
      for (int64_t d = 0; d < width; ++d) line[d] = uint32_t(low[d]) | uint32_t(high[d]) << 16;
    } else {
      for (int64_t d = 0; d < width; ++d) line[d] = low[d];
    }
    for (int64_t d = width; d < padded; ++d) line[d] = 0;
  }
}

// Columns [begin, end) of a row of floats as words along the row; both are multiples of 16.
HSTU_PAIRS inline void narrow_row(const float* from, int begin, int end, uint32_t* to) {
  for (int c = begin; c < end; c += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + c)));
}

// Two rows of kKeys floats, the second behind the first, as words across them.
HSTU_PAIRS inline void narrow_row_pair(const float* from, uint32_t* to) {
  for (int c = 0; c < kKeys; c += 16) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + c)));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + kKeys + c)));
    _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

}  // namespace
}  // namespace FOOTFALL_ISA
}  // namespace hstu
#endif
