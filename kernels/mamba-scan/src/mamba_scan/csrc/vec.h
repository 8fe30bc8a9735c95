// Vectors of the widest kind this translation unit may use, the few functions the scan needs on them, and tiles:
// [time][lane] blocks of LANES channels loaded from and stored to any layout.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SCAN_VECTOR_BYTES 64
// gcc's own headers start some registers undefined on purpose and then warn of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#elif defined(__AVX2__)
#define SCAN_VECTOR_BYTES 32
#include <immintrin.h>
#else
#define SCAN_VECTOR_BYTES 16
#endif

#define SCAN_INLINE static inline __attribute__((always_inline))

namespace scan {
namespace FOOTFALL_ISA {

template <class R>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float V __attribute__((vector_size(SCAN_VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(SCAN_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t I __attribute__((vector_size(SCAN_VECTOR_BYTES)));
    static constexpr int LANES = SCAN_VECTOR_BYTES / 4;
};
template <>
struct VecOf<double> {
    typedef double V __attribute__((vector_size(SCAN_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(SCAN_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t I __attribute__((vector_size(SCAN_VECTOR_BYTES)));
    static constexpr int LANES = SCAN_VECTOR_BYTES / 8;
};

template <class R>
using Vec = typename VecOf<R>::V;

template <class R>
SCAN_INLINE Vec<R> load(const R* p) {
    return *reinterpret_cast<const typename VecOf<R>::Unaligned*>(p);
}
template <class R>
SCAN_INLINE void store(R* p, Vec<R> v) {
    *reinterpret_cast<typename VecOf<R>::Unaligned*>(p) = v;
}
template <class R>
SCAN_INLINE Vec<R> splat(R x) {
    return x - Vec<R>{};
}

// 2**x; overflows to inf, underflows to 0, keeps NaN.
SCAN_INLINE Vec<float> exp2_poly(Vec<float> r) {
    Vec<float> p = splat(0.0001546144746f);
    p = p * r + 0.0013390867351f;
    p = p * r + 0.0096180566699f;
    p = p * r + 0.0555035710425f;
    p = p * r + 0.2402265092234f;
    p = p * r + 0.6931471880293f;
    return p * r + 1.0f;
}
SCAN_INLINE Vec<double> exp2_poly(Vec<double> r) {
    const double c[] = {6.931471805599453e-01, 2.402265069591007e-01, 5.550410866482158e-02, 9.618129107628477e-03,
                        1.333355814642844e-03, 1.540353039338161e-04, 1.525273380405984e-05, 1.321548679014431e-06,
                        1.017808600923970e-07, 7.054911620801121e-09, 4.445538271870810e-10, 2.567843599348820e-11,
                        1.369148885390412e-12};
    Vec<double> p = splat(c[12]);
    for (int k = 11; k >= 0; k--) p = p * r + c[k];
    return p * r + 1.0;
}
#if SCAN_VECTOR_BYTES == 64
SCAN_INLINE Vec<float> exp2v(Vec<float> x) {
    const Vec<float> r = _mm512_reduce_ps(x, 0);
    return _mm512_scalef_ps(exp2_poly(r), _mm512_roundscale_ps(x, 0));
}
SCAN_INLINE Vec<double> exp2v(Vec<double> x) {
    const Vec<double> r = _mm512_reduce_pd(x, 0);
    return _mm512_scalef_pd(exp2_poly(r), _mm512_roundscale_pd(x, 0));
}
#else
// Adding 1.5 * 2**mantissa_bits leaves the rounded integer in the low bits of the sum.
SCAN_INLINE Vec<float> exp2v(Vec<float> x) {
    typedef VecOf<float>::I I;
    x = x < -127.0f ? splat(-127.0f) : x;
    x = x > 128.0f ? splat(128.0f) : x;
    const Vec<float> t = x + 12582912.0f;
    const I n = (I)t - 0x4b400000;
    return exp2_poly(x - (t - 12582912.0f)) * (Vec<float>)((n + 127) << 23);
}
SCAN_INLINE Vec<double> exp2v(Vec<double> x) {
    typedef VecOf<double>::I I;
    x = x < -1023.0 ? splat(-1023.0) : x;
    x = x > 1024.0 ? splat(1024.0) : x;
    const Vec<double> t = x + 6755399441055744.0;
    const I n = (I)t - 0x4338000000000000LL;
    return exp2_poly(x - (t - 6755399441055744.0)) * (Vec<double>)((n + 1023) << 52);
}
#endif

constexpr double LOG2E = 1.4426950408889634;

template <class R>
SCAN_INLINE Vec<R> expv(Vec<R> x) {
    return exp2v(x * R(LOG2E));
}
template <class R>
SCAN_INLINE Vec<R> sigmoid(Vec<R> x) {
    return R(1) / (R(1) + expv<R>(-x));
}
// log(1 + exp(x)), and x itself above 20: with w = exp(-|x|), log1p(w) = 2 atanh(w / (2 + w)) as a series.
template <class R>
SCAN_INLINE Vec<R> softplus(Vec<R> x) {
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
SCAN_INLINE void sincos_quarter(Vec<R> x, Vec<R>& sine, Vec<R>& cosine) {
    typedef typename VecOf<R>::I I;
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

// a0 b0 a1 b1 ... of the lower and of the upper halves.
#define SCAN_INTERLEAVE(TYPE, LO, HI)                                                           \
    SCAN_INLINE Vec<TYPE> interleave_lo(Vec<TYPE> a, Vec<TYPE> b) { return __builtin_shufflevector(a, b, LO); } \
    SCAN_INLINE Vec<TYPE> interleave_hi(Vec<TYPE> a, Vec<TYPE> b) { return __builtin_shufflevector(a, b, HI); }
#define SCAN_LIST(...) __VA_ARGS__
#if SCAN_VECTOR_BYTES == 64
SCAN_INTERLEAVE(float, SCAN_LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                SCAN_LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
SCAN_INTERLEAVE(double, SCAN_LIST(0, 8, 1, 9, 2, 10, 3, 11), SCAN_LIST(4, 12, 5, 13, 6, 14, 7, 15))
#elif SCAN_VECTOR_BYTES == 32
SCAN_INTERLEAVE(float, SCAN_LIST(0, 8, 1, 9, 2, 10, 3, 11), SCAN_LIST(4, 12, 5, 13, 6, 14, 7, 15))
SCAN_INTERLEAVE(double, SCAN_LIST(0, 4, 1, 5), SCAN_LIST(2, 6, 3, 7))
#else
SCAN_INTERLEAVE(float, SCAN_LIST(0, 4, 1, 5), SCAN_LIST(2, 6, 3, 7))
SCAN_INTERLEAVE(double, SCAN_LIST(0, 2), SCAN_LIST(1, 3))
#endif

// v[0..W) as rows of a square matrix, transposed in place.
template <class R>
SCAN_INLINE void transpose(Vec<R>* v) {
    constexpr int W = VecOf<R>::LANES;
    Vec<R> t[W];
    for (int stage = 1; stage < W; stage *= 2) {
        for (int i = 0; i < W / 2; i++) {
            t[2 * i] = interleave_lo(v[i], v[i + W / 2]);
            t[2 * i + 1] = interleave_hi(v[i], v[i + W / 2]);
        }
        for (int i = 0; i < W; i++) v[i] = t[i];
    }
}

// out[j] += the sum over the lanes of v[j], always in the same order; N is a power of two. Overwrites v.
template <class R, int N>
SCAN_INLINE void add_lane_sums(Vec<R>* v, R* out) {
    constexpr int W = VecOf<R>::LANES;
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

SCAN_INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
SCAN_INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x == x ? rounded : 0x7fc0);
}
#if defined(__F16C__)
SCAN_INLINE float from_f16(uint16_t x) { return _cvtsh_ss(x); }
SCAN_INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, 0); }
#else
SCAN_INLINE float from_f16(uint16_t x) {
    // Shifted into place the exponent is 112 too small; one multiplication mends that, denormals included.
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13;
    const uint32_t scale_bits = 0x77800000;
    float y, scale;
    memcpy(&y, &magnitude, 4);
    memcpy(&scale, &scale_bits, 4);
    y *= scale;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    if ((x & 0x7fff) >= 0x7c00) bits = 0x7f800000 | magnitude;
    bits |= (uint32_t)(x & 0x8000) << 16;
    memcpy(&y, &bits, 4);
    return y;
}
SCAN_INLINE uint16_t to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {
        // Below 2**-14 adding 0.5 leaves the rounded denormal in the low bits.
        float y;
        memcpy(&y, &bits, 4);
        y += 0.5f;
        memcpy(&bits, &y, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return sign | (uint16_t)((bits - 0x38000000) >> 13);
}
#endif

// One element of each kind of float, as R.
template <int DTYPE>
struct Element;
template <>
struct Element<F32> {
    template <class R>
    SCAN_INLINE R get(const void* p, int64_t i) { return (R) static_cast<const float*>(p)[i]; }
    template <class R>
    SCAN_INLINE void set(void* p, int64_t i, R x) { static_cast<float*>(p)[i] = (float)x; }
};
template <>
struct Element<F64> {
    template <class R>
    SCAN_INLINE R get(const void* p, int64_t i) { return (R) static_cast<const double*>(p)[i]; }
    template <class R>
    SCAN_INLINE void set(void* p, int64_t i, R x) { static_cast<double*>(p)[i] = (double)x; }
};
template <>
struct Element<BF16> {
    template <class R>
    SCAN_INLINE R get(const void* p, int64_t i) { return (R)from_bf16(static_cast<const uint16_t*>(p)[i]); }
    template <class R>
    SCAN_INLINE void set(void* p, int64_t i, R x) { static_cast<uint16_t*>(p)[i] = to_bf16((float)x); }
};
template <>
struct Element<F16> {
    template <class R>
    SCAN_INLINE R get(const void* p, int64_t i) { return (R)from_f16(static_cast<const uint16_t*>(p)[i]); }
    template <class R>
    SCAN_INLINE void set(void* p, int64_t i, R x) { static_cast<uint16_t*>(p)[i] = to_f16((float)x); }
};

// Rows begin..steps of a tile, element by element, along whichever way memory runs.
template <class R, int DTYPE>
static void copy_in(R* tile, const void* x, int64_t first, int64_t step_t, int64_t step_lane, int begin, int steps,
                    int lanes) {
    constexpr int W = VecOf<R>::LANES;
    typedef Element<DTYPE> E;
    if (step_lane == 1) {
        for (int t = begin; t < steps; t++)
            for (int lane = 0; lane < lanes; lane++)
                tile[t * W + lane] = E::template get<R>(x, first + t * step_t + lane);
    } else {
        for (int lane = 0; lane < lanes; lane++)
            for (int t = begin; t < steps; t++)
                tile[t * W + lane] = E::template get<R>(x, first + t * step_t + lane * step_lane);
    }
}
template <class R, int DTYPE>
static void copy_out(const R* tile, void* x, int64_t first, int64_t step_t, int64_t step_lane, int begin, int steps,
                     int lanes) {
    constexpr int W = VecOf<R>::LANES;
    typedef Element<DTYPE> E;
    if (step_lane == 1) {
        for (int t = begin; t < steps; t++)
            for (int lane = 0; lane < lanes; lane++)
                E::template set<R>(x, first + t * step_t + lane, tile[t * W + lane]);
    } else {
        for (int lane = 0; lane < lanes; lane++)
            for (int t = begin; t < steps; t++)
                E::template set<R>(x, first + t * step_t + lane * step_lane, tile[t * W + lane]);
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
    constexpr int W = VecOf<R>::LANES;
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
        case F64: return copy_in<R, F64>(tile, x, first, step_t, step_lane, t, steps, lanes);
        case BF16: return copy_in<R, BF16>(tile, x, first, step_t, step_lane, t, steps, lanes);
        case F16: return copy_in<R, F16>(tile, x, first, step_t, step_lane, t, steps, lanes);
        default: return copy_in<R, F32>(tile, x, first, step_t, step_lane, t, steps, lanes);
    }
}

template <class R>
static void store_tile(const R* tile, void* x, int dtype, int64_t first, int64_t step_t, int64_t step_lane, int steps,
                       int lanes) {
    constexpr int W = VecOf<R>::LANES;
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
        case F64: return copy_out<R, F64>(tile, x, first, step_t, step_lane, t, steps, lanes);
        case BF16: return copy_out<R, BF16>(tile, x, first, step_t, step_lane, t, steps, lanes);
        case F16: return copy_out<R, F16>(tile, x, first, step_t, step_lane, t, steps, lanes);
        default: return copy_out<R, F32>(tile, x, first, step_t, step_lane, t, steps, lanes);
    }
}

}  // namespace FOOTFALL_ISA
}  // namespace scan
