// LayerNorm of one tensor times another, in one pass over memory, forward and backward.
#include "hstu_cpu.h"
#include "simd_cpu.h"

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace hstu {
namespace FOOTFALL_ISA {
namespace {

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class F>
F sum_of(typename Simd<F>::V x) {
  F sum = 0;
  for (int l = 0; l < Simd<F>::lanes; ++l) sum += x[l];
  return sum;
}

// One row as F, filled up with zeros to whole vectors.
template <class F, class In>
void read_line(const View& view, int64_t row, int64_t width, int64_t padded, F* to) {
  const In* from = static_cast<const In*>(view.data) + row * view.row;
  for (int64_t d = 0; d < width; ++d) to[d] = widen(from[d]);
  for (int64_t d = width; d < padded; ++d) to[d] = 0;
}

template <class F, class Out>
void write_line(const View& view, int64_t row, int64_t width, const F* from) {
  Out* to = static_cast<Out*>(view.data) + row * view.row;
  for (int64_t d = 0; d < width; ++d) narrow(from[d], to + d);
}

// x becomes (x - mean) / sqrt(var + eps), its padding 0; returns 1 / sqrt(var + eps).
template <class F>
F normalize(F* x, int64_t width, int64_t padded, F eps) {
  typedef typename Simd<F>::V V;
  V sum{};
  for (int64_t d = 0; d < padded; d += Simd<F>::lanes) sum += load(x + d);
  const F mean = sum_of<F>(sum) / F(width);
  for (int64_t d = width; d < padded; ++d) x[d] = mean;
  V squares{};
  for (int64_t d = 0; d < padded; d += Simd<F>::lanes) {
    const V centered = load(x + d) - mean;
    squares += centered * centered;
    store(x + d, centered);
  }
  const F variance = sum_of<F>(squares) / F(width) + eps;
  const F scale = F(1 / __builtin_sqrt(double(variance)));
  for (int64_t d = 0; d < padded; d += Simd<F>::lanes) store(x + d, load(x + d) * scale);
  return scale;
}

struct Lines {
  void* data = nullptr;
  size_t size;
  bool allocate(size_t bytes, int threads) {
    size = size_t(round_up(int64_t(bytes), 64));
    return posix_memalign(&data, 64, size * size_t(threads) + 64) == 0;
  }
  template <class F>
  F* of(int thread) const {
    return reinterpret_cast<F*>(static_cast<char*>(data) + size * size_t(thread));
  }
  ~Lines() { free(data); }
};

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class F, class In>
bool run_forward(const NormGate& g) {
  const int64_t padded = round_up(g.width, Simd<F>::lanes);
  Lines lines;
  if (!lines.allocate(size_t(2 * padded) * sizeof(F), g.threads)) return false;
  const F *weight = static_cast<const F*>(g.weight), *bias = static_cast<const F*>(g.bias);
#pragma omp parallel for schedule(static) num_threads(g.threads)
  for (int64_t r = 0; r < g.rows; ++r) {
    F *x = lines.of<F>(thread_number()), *gate = x + padded;
    read_line<F, In>(g.x, r, g.width, padded, x);
    read_line<F, In>(g.gate, r, g.width, padded, gate);
    normalize(x, g.width, padded, F(g.eps));
    for (int64_t d = 0; d < padded; d += Simd<F>::lanes)
      store(x + d, (load(x + d) * load(weight + d) + load(bias + d)) * load(gate + d));
    write_line<F, In>(g.out, r, g.width, x);
  }
  return true;
}

template <class F, class In>
bool run_backward(const NormGate& g) {
  typedef typename Simd<F>::V V;
  const int64_t padded = round_up(g.width, Simd<F>::lanes);
  const int64_t blocks = (g.rows + kNormGateRows - 1) / kNormGateRows;
  Lines lines;
  if (!lines.allocate(size_t(3 * padded) * sizeof(F), g.threads)) return false;
  const F *weight = static_cast<const F*>(g.weight), *bias = static_cast<const F*>(g.bias);
#pragma omp parallel for schedule(static) num_threads(g.threads)
  for (int64_t block = 0; block < blocks; ++block) {
    F *x = lines.of<F>(thread_number()), *gate = x + padded, *grad = gate + padded;
    // Each block of rows sums its own part, so that the order of sums does not depend on the threads.
    F *d_weight = static_cast<F*>(g.partial) + block * 2 * g.partial_stride, *d_bias = d_weight + g.partial_stride;
    memset(d_weight, 0, size_t(2 * g.partial_stride) * sizeof(F));
    const int64_t last = block * kNormGateRows + kNormGateRows < g.rows ? block * kNormGateRows + kNormGateRows : g.rows;
    for (int64_t r = block * kNormGateRows; r < last; ++r) {
      read_line<F, In>(g.x, r, g.width, padded, x);
      read_line<F, In>(g.gate, r, g.width, padded, gate);
      read_line<F, In>(g.grad, r, g.width, padded, grad);
      const F scale = normalize(x, g.width, padded, F(g.eps));
      V sum{}, product{};
      for (int64_t d = 0; d < padded; d += Simd<F>::lanes) {
        const V n = load(x + d), w = load(weight + d), up = load(grad + d);
        const V dy = up * load(gate + d), dn = dy * w;
        store(gate + d, up * (n * w + load(bias + d)));
        store(grad + d, dn);
        store(d_weight + d, load(d_weight + d) + dy * n);
        store(d_bias + d, load(d_bias + d) + dy);
        sum += dn;
        product += dn * n;
      }
      const F mean = sum_of<F>(sum) / F(g.width), along = sum_of<F>(product) / F(g.width);
      for (int64_t d = 0; d < padded; d += Simd<F>::lanes) store(grad + d, (load(grad + d) - mean - load(x + d) * along) * scale);
      write_line<F, In>(g.d_x, r, g.width, grad);
      write_line<F, In>(g.d_gate, r, g.width, gate);
    }
  }
  return true;
}

}  // namespace

bool norm_gate(const NormGate& g) {
  switch (g.dtype) {
    case kFloat64:
      return run_forward<double, double>(g);
    case kBFloat16:
      return run_forward<float, BFloat16>(g);
    case kFloat16:
      return run_forward<float, Float16>(g);
    default:
      return run_forward<float, float>(g);
  }
}

bool norm_gate_backward(const NormGate& g) {
  switch (g.dtype) {
    case kFloat64:
      return run_backward<double, double>(g);
    case kBFloat16:
      return run_backward<float, BFloat16>(g);
    case kFloat16:
      return run_backward<float, Float16>(g);
    default:
      return run_backward<float, float>(g);
  }
}

}  // namespace FOOTFALL_ISA
}  // namespace hstu
