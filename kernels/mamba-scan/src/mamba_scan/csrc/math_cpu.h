// The few functions that the scan needs on vectors, and tiles: [time][lane] blocks of as many channels as a vector has
// lanes, loaded from and stored to any layout.
#pragma once
#include "simd.h"

namespace scan {
namespace FOOTFALL_ISA {

using namespace footfall::FOOTFALL_ISA;

// 2**x; overflows to inf, underflows to 0, keeps NaN.
FOOTFALL_INLINE Vec<float> exp2_poly(Vec<float> r) {
  Vec<float> p = splat(0.0001546144746f);
  p = p * r + 0.0013390867351f;
  p = p * r + 0.0096180566699f;
  p = p * r + 0.0555035710425f;
  p = p * r + 0.2402265092234f;
  p = p * r + 0.6931471880293f;
  return p * r + 1.0f;
}
FOOTFALL_INLINE Vec<double> exp2_poly(Vec<double> r) {
  const double c[] = {6.931471805599453e-01, 2.402265069591007e-01, 5.550410866482158e-02, 9.618129107628477e-03,
                      1.333355814642844e-03, 1.540353039338161e-04, 1.525273380405984e-05, 1.321548679014431e-06,
                      1.017808600923970e-07, 7.054911620801121e-09, 4.445538271870810e-10, 2.567843599348820e-11,
                      1.369148885390412e-12};
  Vec<double> p = splat(c[12]);
  for (int k = 11; k >= 0; k--) p = p * r + c[k];
  return p * r + 1.0;
}
#if FOOTFALL_VECTOR_BYTES == 64
FOOTFALL_INLINE Vec<float> exp2v(Vec<float> x) {
  const Vec<float> r = _mm512_reduce_ps(x, 0);
  return _mm512_scalef_ps(exp2_poly(r), _mm512_roundscale_ps(x, 0));
}
FOOTFALL_INLINE Vec<double> exp2v(Vec<double> x) {
  const Vec<double> r = _mm512_reduce_pd(x, 0);
  return _mm512_scalef_pd(exp2_poly(r), _mm512_roundscale_pd(x, 0));
}
#else
// Adding 1.5 * 2**mantissa_bits leaves the rounded integer in the low bits of the sum.
FOOTFALL_INLINE Vec<float> exp2v(Vec<float> x) {
  typedef Simd<float>::I I;
  x = x < -127.0f ? splat(-127.0f) : x;
  x = x > 128.0f ? splat(128.0f) : x;
  const Vec<float> t = x + 12582912.0f;
  const I n = (I)t - 0x4b400000;
  return exp2_poly(x - (t - 12582912.0f)) * (Vec<float>)((n + 127) << 23);
}
FOOTFALL_INLINE Vec<double> exp2v(Vec<double> x) {
  typedef Simd<double>::I I;
  x = x < -1023.0 ? splat(-1023.0) : x;
  x = x > 1024.0 ? splat(1024.0) : x;
  const Vec<double> t = x + 6755399441055744.0;
  const I n = (I)t - 0x4338000000000000LL;
  return exp2_poly(x - (t - 6755399441055744.0)) * (Vec<double>)((n + 1023) << 52);
}
#endif

constexpr double LOG2E = 1.4426950408889634;

template <class R>
FOOTFALL_INLINE Vec<R> expv(Vec<R> x) {
  return exp2v(x * R(LOG2E));
}
template <class R>
FOOTFALL_INLINE Vec<R> sigmoid(Vec<R> x) {
  return R(1) / (R(1) + expv<R>(-x));
}
// log(1 + exp(x)), and x itself above 20: with w = exp(-|x|), log1p(w) = 2 atanh(w / (2 + w)) as a series.
template <class R>
FOOTFALL_INLINE Vec<R> softplus(Vec<R> x) {
  const Vec<R> zero = {};
  const Vec<R> w = expv<R>(x > zero ? -x : x);
  const Vec<R> s = w / (R(2) + w);
  const Vec<R> q = s * s;
  const int terms = sizeof(R) == 4 ? 8 : 18;
  Vec<R> p = splat(R(2) / R(2 * terms - 1));
  for (int k = terms - 2; k >= 0; k--) p = p * q + R(2.0 / (2 * k + 1));
  const Vec<R> y = (x > zero ? x : zero) + p * s;
  return x > splat(R(20)) ? x : y;
}

// Sine and cosine of x quarter turns.
template <class R>
FOOTFALL_INLINE void sincos_quarter(Vec<R> x, Vec<R>& sine, Vec<R>& cosine) {
  typedef typename Simd<R>::I I;
  // Adding 1.5 * 2**mantissa_bits leaves the rounded integer in the low bits of the sum.
  const R magic = sizeof(R) == 4 ? R(12582912.0) : R(6755399441055744.0);
  const Vec<R> t = x + magic;
  const I quarter = (I)t;
  const Vec<R> angle = (x - (t - magic)) * R(1.5707963267948966), q = angle * angle;
  Vec<R> s = splat(R(1)), c = s;
  for (int k = sizeof(R) == 4 ? 10 : 18; k > 0; k -= 2) {
    s = R(1) - q * s * R(1.0 / (k * (k + 1)));
    c = R(1) - q * c * R(1.0 / (k * (k - 1)));
  }
  s *= angle;
  const I odd = (quarter & 1) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  sine = (quarter & 2) != 0 ? -sine : sine;
  cosine = ((quarter + 1) & 2) != 0 ? -cosine : cosine;
}

// out[j] += the sum over the lanes of v[j], always in the same order; N is a power of two. Overwrites v.
template <class R, int N>
FOOTFALL_INLINE void add_lane_sums(Vec<R>* v, R* out) {
  constexpr int W = Simd<R>::lanes;
  if constexpr (N > W) {
    add_lane_sums<R, N / 2>(v, out);
    return add_lane_sums<R, N / 2>(v + N / 2, out + N / 2);
  }
  for (int half = N / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; i++) v[i] = interleave_lo(v[i], v[i + half]) + interleave_hi(v[i], v[i + half]);
  Vec<R> s = v[0];
  for (int copies = W / N; copies > 1; copies /= 2) s = interleave_lo(s, s) + interleave_hi(s, s);
  if (N == W) {
    store<R>(out, load<R>(out) + s);
  } else {
    for (int j = 0; j < N; j++) out[j] += s[j * (W / N)];
  }
}

enum Dtype { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

// What a number of memory is widened to.
template <class In>
using Wide = decltype(widen(In{}));

// Rows begin..steps of a tile, element by element, along whichever way memory runs.
template <class R, class In>
static void copy_in(R* tile, const In* x, int64_t first, int64_t step_t, int64_t step_lane, int begin, int steps,
                    int lanes) {
  constexpr int W = Simd<R>::lanes;
  if (step_lane == 1) {
    for (int t = begin; t < steps; t++)
      for (int lane = 0; lane < lanes; lane++) tile[t * W + lane] = R(widen(x[first + t * step_t + lane]));
  } else {
    for (int lane = 0; lane < lanes; lane++)
      for (int t = begin; t < steps; t++) tile[t * W + lane] = R(widen(x[first + t * step_t + lane * step_lane]));
  }
}
template <class R, class Out>
static void copy_out(const R* tile, Out* x, int64_t first, int64_t step_t, int64_t step_lane, int begin, int steps,
                     int lanes) {
  constexpr int W = Simd<R>::lanes;
  if (step_lane == 1) {
    for (int t = begin; t < steps; t++)
      for (int lane = 0; lane < lanes; lane++) narrow(Wide<Out>(tile[t * W + lane]), x + first + t * step_t + lane);
  } else {
    for (int lane = 0; lane < lanes; lane++)
      for (int t = begin; t < steps; t++)
        narrow(Wide<Out>(tile[t * W + lane]), x + first + t * step_t + lane * step_lane);
  }
}

template <class R>
constexpr int native_dtype() {
  return sizeof(R) == 4 ? F32 : F64;
}

// tile[t][lane] = x[first + t * step_t + lane * step_lane], zero in the lanes past `lanes`.
template <class R>
static void load_tile(R* tile, const void* x, int dtype, int64_t first, int64_t step_t, int64_t step_lane, int steps,
                      int lanes) {
  constexpr int W = Simd<R>::lanes;
  int t = 0;
  if (dtype == native_dtype<R>() && lanes == W) {
    const R* p = static_cast<const R*>(x) + first;
    if (step_lane == 1) {
      for (; t < steps; t++) store<R>(tile + t * W, load<R>(p + t * step_t));
    } else if (step_t == 1) {
      for (; t + W <= steps; t += W) {
        Vec<R> v[W];
        for (int lane = 0; lane < W; lane++) v[lane] = load<R>(p + t + lane * step_lane);
        transpose<R>(v);
        for (int i = 0; i < W; i++) store<R>(tile + (t + i) * W, v[i]);
      }
    }
  }
  if (t == steps) return;
  if (lanes < W) memset(tile + t * W, 0, sizeof(R) * W * (steps - t));
  switch (dtype) {
    case F64:
      return copy_in<R>(tile, static_cast<const double*>(x), first, step_t, step_lane, t, steps, lanes);
    case BF16:
      return copy_in<R>(tile, static_cast<const BFloat16*>(x), first, step_t, step_lane, t, steps, lanes);
    case F16:
      return copy_in<R>(tile, static_cast<const Float16*>(x), first, step_t, step_lane, t, steps, lanes);
    default:
      return copy_in<R>(tile, static_cast<const float*>(x), first, step_t, step_lane, t, steps, lanes);
  }
}

template <class R>
static void store_tile(const R* tile, void* x, int dtype, int64_t first, int64_t step_t, int64_t step_lane, int steps,
                       int lanes) {
  constexpr int W = Simd<R>::lanes;
  int t = 0;
  if (dtype == native_dtype<R>() && lanes == W) {
    R* p = static_cast<R*>(x) + first;
    if (step_lane == 1) {
      for (; t < steps; t++) store<R>(p + t * step_t, load<R>(tile + t * W));
    } else if (step_t == 1) {
      for (; t + W <= steps; t += W) {
        Vec<R> v[W];
        for (int i = 0; i < W; i++) v[i] = load<R>(tile + (t + i) * W);
        transpose<R>(v);
        for (int lane = 0; lane < W; lane++) store<R>(p + t + lane * step_lane, v[lane]);
      }
    }
  }
  switch (dtype) {
    case F64:
      return copy_out<R>(tile, static_cast<double*>(x), first, step_t, step_lane, t, steps, lanes);
    case BF16:
      return copy_out<R>(tile, static_cast<BFloat16*>(x), first, step_t, step_lane, t, steps, lanes);
    case F16:
      return copy_out<R>(tile, static_cast<Float16*>(x), first, step_t, step_lane, t, steps, lanes);
    default:
      return copy_out<R>(tile, static_cast<float*>(x), first, step_t, step_lane, t, steps, lanes);
  }
}

}  // namespace FOOTFALL_ISA
}  // namespace scan
