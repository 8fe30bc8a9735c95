// Jagged HSTU attention, forward and backward, for one instruction set. A piece of work walks over tiles of 64 keys;
// scores live in a few rows of registers or in one tile, never in a matrix of the whole sequence.
#include <stdlib.h>

#include "hstu_cpu.h"
#include "math_cpu.h"
#include "pairs_cpu.h"

namespace hstu {
namespace FOOTFALL_ISA {
namespace {

// Query rows of a tile of the backward pass.
constexpr int kQueries = 8 * kRows;
constexpr int kFloatLanes = kBytes / 4;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

constexpr uint32_t kGolden = 0x9e3779b9u;

template <class F>
void zero(F* p, int64_t count) {
  memset(p, 0, sizeof(F) * count);
}

// A bump allocator over one thread's scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  size_t used = 0;
  template <class F>
  F* take(int64_t count) {
    char* at = base + used;
    used += size_t(round_up(int64_t(sizeof(F)) * count, 64));
    return base ? reinterpret_cast<F*>(at) : nullptr;
  }
};

// to[r, :] = rows of a view, or those that the slots name, padded with zeros to `padded`.
template <class F, class In>
void read_rows(const View& view, int64_t row, int64_t count, int64_t head, int64_t width, int64_t padded, F* to,
               const int64_t* slots = nullptr) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = slots ? slots[row + r] : row + r;
    const In* from = static_cast<const In*>(view.data) + at * view.row + head * view.head;
    read_line<F, In>(from, width, padded, to + r * padded);
  }
}

template <class F, class Out>
void write_row(const View& view, int64_t row, int64_t head, int64_t width, F scale, const F* from) {
  Out* to = static_cast<Out*>(view.data) + row * view.row + head * view.head;
  write_line<F, Out>(from, width, scale, to);
}

// The keys of the current tile that a query row sees: [begin, end), and [own, own_end) where it lies outside of them.
struct Span {
  int begin, end, own, own_end;
};

struct Group {
  int begin, end;
  bool full;
};

Span span_of(const Problem& p, int64_t q_row, int64_t position, int64_t tile, int keys) {
  Span s;
  s.begin = int(max64(0, min64(p.lo[q_row] - tile, keys)));
  s.end = int(max64(0, min64(p.hi[q_row] - tile, keys)));
  if (s.begin >= s.end) s.begin = s.end = 0;
  s.own = int(max64(0, min64(p.own[q_row] - tile, keys)));
  s.own_end = int(max64(0, min64(position + 1 - tile, keys)));
  if (s.own >= s.own_end || (s.own >= s.begin && s.own_end <= s.end)) s.own = s.own_end = 0;
  return s;
}

Group group_of(const Span* spans, int rows) {
  Group g{kKeys, 0, true};
  for (int r = 0; r < rows; ++r) {
    const Span s = spans[r];
    g.full = g.full && s.begin == 0 && s.end == kKeys;
    if (s.begin < s.end) {
      g.begin = s.begin < g.begin ? s.begin : g.begin;
      g.end = s.end > g.end ? s.end : g.end;
    }
    if (s.own < s.own_end) {
      g.begin = s.own < g.begin ? s.own : g.begin;
      g.end = s.own_end > g.end ? s.own_end : g.end;
    }
  }
  return g;
}

// Buckets of a strip of rows that the heads of one sequence share.
constexpr int64_t kStripBytes = 1 << 21;

// Time bias of one sequence. Where its time span fits 31 bits, buckets come from a float logarithm, and the few that
// lie near an edge are settled by the integer edges; else the edges decide alone.
struct Clock {
  const Problem* p;
  const int64_t* ts;
  int64_t length;
  int32_t* relative;
  // Buckets of the current group of rows: one byte where the span is narrow (below bucket 72), else four.
  int32_t* wide;
  uint8_t* narrow;
  uint8_t* strip;
  int64_t first_row, first_tile, strip_stride;
  // No time difference of the sequence reaches this bucket.
  int64_t bucket_count;
  bool narrow_span, shared, filled;

  void take(const Problem& problem, const Plan& plan, Arena& arena) {
    if (!problem.time.data) return;
    relative = arena.take<int32_t>(plan.max_keys + 2 * kKeys);
    wide = arena.take<int32_t>(kRows * kKeys);
    narrow = arena.take<uint8_t>(kRows * kKeys);
    strip = arena.take<uint8_t>(min64(plan.max_strip, kStripBytes));
  }

  // `again` says that the last piece had the same rows and keys, of another head.
  void start(const Problem& problem, const Piece& piece, int64_t at0, bool again) {
    filled = again;
    if (again) return;
    p = &problem;
    const int64_t first = problem.offsets[piece.sequence], n = problem.offsets[piece.sequence + 1] - first;
    ts = problem.timestamps + first;
    length = n;
    first_row = at0;
    first_tile = piece.key_begin / kKeys * kKeys;
    strip_stride = round_up(piece.key_end - first_tile, kKeys);
    int64_t least = ts[0], most = ts[0];
    for (int64_t j = 1; j < n; ++j) {
      least = min64(least, ts[j]);
      most = max64(most, ts[j]);
    }
    // The difference is taken without a sign, since it may be beyond int64.
    narrow_span = uint64_t(most) - uint64_t(least) < 0x7fffffffu;
    bucket_count = bucket(uint64_t(most) - uint64_t(least)) + 1;
    shared = problem.heads > 1 && narrow_span && strip_stride * (piece.row_end - piece.row_begin) <= kStripBytes;
    if (narrow_span) {
      for (int64_t j = 0; j < n; ++j) relative[j] = int32_t(ts[j] - least);
      for (int64_t j = n; j < n + kKeys; ++j) relative[j] = 0;
    }
  }

  int32_t bucket(uint64_t x) const {
    const int32_t last = int32_t(p->time.width - 1);
    if (x < 1) x = 1;
    // One short of the edges that int64 cannot hold.
    if (x > uint64_t(INT64_MAX) - 1) x = uint64_t(INT64_MAX) - 1;
    int32_t b = p->bucket_of_power[63 - __builtin_clzll(x)];
    while (b < last && x >= uint64_t(p->edges[b])) ++b;
    return b;
  }

  struct Buckets {
    const uint8_t* narrow;
    const int32_t* wide;
    int64_t stride;
  };

  // Buckets of the keys tile + [begin, end) for `height` rows from position `at` on; whole vectors are filled.
  Buckets buckets(int64_t at, int height, int64_t tile, int begin, int end) const {
    begin = begin / kFloatLanes * kFloatLanes;
    if (!narrow_span) {
      for (int r = 0; r < height; ++r) wide_row(ts[row_time(at + r)], tile, begin, end, wide + r * kKeys);
      return {nullptr, wide, kKeys};
    }
    uint8_t* const to = shared ? strip + (at - first_row) * strip_stride + (tile - first_tile) : narrow;
    const int64_t stride = shared ? strip_stride : kKeys;
    if (!(shared && filled))
      for (int r = 0; r < height; ++r)
        narrow_row(relative[row_time(at + r)], relative + tile, begin, end, to + r * stride);
    return {to, nullptr, stride};
  }

  int64_t row_time(int64_t at) const { return min64(at + p->time_shift, length - 1); }

  void wide_row(int64_t now, int64_t tile, int begin, int end, int32_t* to) const {
    for (int c = begin; c < end; ++c) {
      const int64_t other = ts[min64(tile + c, length - 1)];
      to[c] = bucket(now > other ? uint64_t(now) - uint64_t(other) : uint64_t(other) - uint64_t(now));
    }
  }

  // ln |dt| / 0.301 = log2 |dt| * (ln 2 / 0.301); log2 of the mantissa is a polynomial, off by less than 2e-5.
  static constexpr float kScale = 2.3028146863453f, kUnsure = 1e-4f;
  static constexpr float kLog2[7] = {-0.025123486819730995f, 0.043929099810229265f, -0.07058958707028791f,
                                     0.1417180408864134f,    -0.3206323393495808f,  0.9618212338349935f,
                                     0.584962765399147f};

#if defined(__AVX512F__)
  void narrow_row(int32_t now, const int32_t* then, int begin, int end, uint8_t* to) const {
    const __m512i last = _mm512_set1_epi32(int32_t(p->time.width - 1)), from = _mm512_set1_epi32(now);
    for (int c = begin; c < end; c += 16) {
      __m512i dt = _mm512_abs_epi32(_mm512_sub_epi32(from, _mm512_loadu_si512(then + c)));
      const __mmask16 more = _mm512_cmpgt_epi32_mask(dt, _mm512_set1_epi32(1));
      const __m512 x = _mm512_cvtepi32_ps(dt);
      const __m512 t = _mm512_sub_ps(_mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero), _mm512_set1_ps(1.5f));
      __m512 log2 = _mm512_set1_ps(kLog2[0]);
      for (int i = 1; i < 7; ++i) log2 = _mm512_fmadd_ps(log2, t, _mm512_set1_ps(kLog2[i]));
      log2 = _mm512_add_ps(log2, _mm512_getexp_ps(x));
      // 0 and 1 second, the one without a logarithm and the other on an edge, both belong to bucket 0.
      const __m512 scaled = _mm512_maskz_mul_ps(more, log2, _mm512_set1_ps(kScale));
      const __m512i b = _mm512_cvttps_epi32(scaled);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), _mm512_cvtepi32_epi8(_mm512_min_epi32(b, last)));
      // Distance from the middle of the bucket.
      const __m512 off =
          _mm512_abs_ps(_mm512_sub_ps(_mm512_sub_ps(scaled, _mm512_cvtepi32_ps(b)), _mm512_set1_ps(0.5f)));
      uint32_t unsure = _mm512_mask_cmp_ps_mask(more, off, _mm512_set1_ps(0.5f - kUnsure), _CMP_GT_OQ);
      for (; __builtin_expect(unsure != 0, 0); unsure &= unsure - 1) {
        const int l = __builtin_ctz(unsure), d = now - then[c + l];
        to[c + l] = uint8_t(bucket(uint64_t(d < 0 ? -d : d)));
      }
    }
  }
#else
  inline __attribute__((always_inline)) void narrow_row(int32_t now, const int32_t* then, int begin, int end,
                                                        uint8_t* to) const {
    typedef Simd<float>::V V;
    typedef Simd<float>::I I;
    typedef int32_t LooseI __attribute__((vector_size(kBytes), aligned(4), may_alias));
    const int32_t last = int32_t(p->time.width - 1);
    for (int c = begin; c < end; c += kFloatLanes) {
      I dt = now - *reinterpret_cast<const LooseI*>(then + c);
      dt = dt < 0 ? -dt : dt;
      dt = dt < 1 ? I{} + 1 : dt;
      const I bits = (I) __builtin_convertvector(dt, V);
      const V t = (V)((bits & 0x7fffff) | 0x3f800000) - 1.5f;
      V log2 = V{} + kLog2[0];
      for (int i = 1; i < 7; ++i) log2 = log2 * t + kLog2[i];
      log2 += __builtin_convertvector((bits >> 23) - 127, V);
      V scaled = log2 * kScale;
      scaled = dt == 1 ? V{} + 0.5f : scaled;
      I b = __builtin_convertvector(scaled, I);
      const V rest = scaled - __builtin_convertvector(b, V);
      const I unsure = (rest < kUnsure) | (rest > 1 - kUnsure);
      b = b > last ? I{} + last : b;
      for (int l = 0; l < kFloatLanes; ++l) to[c + l] = uint8_t(b[l]);
      if (any(unsure))
        for (int l = 0; l < kFloatLanes; ++l)
          if (unsure[l]) to[c + l] = uint8_t(bucket(uint64_t(dt[l])));
    }
  }

  static bool any(Simd<float>::I x) {
#if defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    return (x[0] | x[1] | x[2] | x[3]) != 0;
#endif
  }
#endif
};

template <class F, class Index>
inline typename Simd<F>::V look_up(const F* table, const Index* buckets) {
  typename Simd<F>::V x{};
  for (int l = 0; l < Simd<F>::lanes; ++l) x[l] = table[buckets[l]];
  return x;
}

#if defined(__AVX512F__)
// Spans below 2^31 seconds stay below bucket 72: the table fits registers.
template <>
inline Simd<float>::V look_up<float, uint8_t>(const float* table, const uint8_t* buckets) {
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(buckets)));
  const __m512 low = _mm512_permutex2var_ps(_mm512_loadu_ps(table), b, _mm512_loadu_ps(table + 16));
  const __m512 middle = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), b, _mm512_loadu_ps(table + 48));
  const __m512 high = _mm512_permutexvar_ps(b, _mm512_loadu_ps(table + 64));
  const __m512 upper = _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(b, _mm512_set1_epi32(64)), high, middle);
  return (Simd<float>::V)_mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(b, _mm512_set1_epi32(32)), upper, low);
}
#endif

// Everything that turns the rows of a group from alpha * q·k into scores and weights. Row r of the group reads position
// - r.
template <class F>
struct Terms {
  typedef Simd<F> S;
  typedef typename S::V V;
  typedef typename S::I I;
  const F* position = nullptr;
  const F* time = nullptr;
  Clock::Buckets buckets{};
  const F* kept = nullptr;
  const F* bias = nullptr;
  const Span* spans = nullptr;
  bool masked = false;
  F alpha = 1;

  template <bool Position, bool Time>
  inline V score(V x, int r, int c) const {
    if (Position) x += load(position - r + c);
    if (Time) {
      const int64_t at = r * buckets.stride + c;
      x += buckets.narrow ? look_up<F, uint8_t>(time, buckets.narrow + at)
                          : look_up<F, int32_t>(time, buckets.wide + at);
    }
    return x;
  }

  static inline I seen(const Span& span, int c) {
    I column{};
    for (int l = 0; l < S::lanes; ++l) column[l] = l;
    column += c;
    return ((column >= span.begin) & (column < span.end)) | ((column >= span.own) & (column < span.own_end));
  }

  void weigh(F* rows, int height, int begin, int end) const {
    if (position)
      time ? weigh_as<true, true>(rows, height, begin, end) : weigh_as<true, false>(rows, height, begin, end);
    else
      time ? weigh_as<false, true>(rows, height, begin, end) : weigh_as<false, false>(rows, height, begin, end);
  }

  template <bool Position, bool Time>
  void weigh_as(F* rows, int height, int begin, int end) const {
    for (int r = 0; r < height; ++r) {
      F* const row = rows + r * kKeys;
      for (int c = begin; c < end; c += S::lanes) {
        V x = score<Position, Time>(alpha * load(row + c), r, c);
        if (bias) x += load(bias + r * kKeys + c);
        V w = x * sigmoid<F>(x);
        if (kept) w *= load(kept + r * kKeys + c);
        if (masked) w = seen(spans[r], c) ? w : V{};
        store(row + c, w);
      }
    }
  }

  // q·k -> weights, d_weights -> d_scores, both divided by the row's divisor; adds d_scores to the position table's
  // gradient.
  void weigh_back(F* rows, F* d_rows, int height, int begin, int end, const F* inverse, F* d_position) const {
    if (position)
      time ? weigh_back_as<true, true>(rows, d_rows, height, begin, end, inverse, d_position)
           : weigh_back_as<true, false>(rows, d_rows, height, begin, end, inverse, d_position);
    else
      time ? weigh_back_as<false, true>(rows, d_rows, height, begin, end, inverse, d_position)
           : weigh_back_as<false, false>(rows, d_rows, height, begin, end, inverse, d_position);
  }

  template <bool Position, bool Time>
  void weigh_back_as(F* rows, F* d_rows, int height, int begin, int end, const F* inverse, F* d_position) const {
    for (int r = 0; r < height; ++r) {
      F *const row = rows + r * kKeys, *const d_row = d_rows + r * kKeys;
      for (int c = begin; c < end; c += S::lanes) {
        V x = score<Position, Time>(alpha * load(row + c), r, c);
        if (bias) x += load(bias + r * kKeys + c);
        const V s = sigmoid<F>(x);
        V w = x * s, d = load(d_row + c) * (s + w * (1 - s)) * inverse[r];
        w *= inverse[r];
        if (kept) {
          const V k = load(kept + r * kKeys + c);
          w *= k;
          d *= k;
        }
        if (masked) {
          const I m = seen(spans[r], c);
          w = m ? w : V{};
          d = m ? d : V{};
        }
        store(row + c, w);
        store(d_row + c, d);
        if (Position && d_position) store(d_position - r + c, load(d_position - r + c) + d);
      }
    }
  }
};

// The parts of the terms that belong to one sequence and head.
template <class F>
struct HeadTerms {
  const Problem& p;
  const Piece& piece;
  Clock* clock;
  // Of one group of rows: what dropout keeps, and behind that the bias.
  F* kept;
  const F* position = nullptr;
  const F* time = nullptr;
  const F* bias = nullptr;
  uint32_t key = 0;
  int64_t first_key, length, first_at;

  HeadTerms(const Problem& problem, const Piece& work, int64_t at0, bool again, Clock* c, F* k)
      : p(problem),
        piece(work),
        clock(c),
        kept(k),
        first_key(problem.offsets[work.sequence]),
        length(problem.offsets[work.sequence + 1] - first_key),
        first_at(length - (problem.q_offsets[work.sequence + 1] - problem.q_offsets[work.sequence])) {
    if (p.bias.data) bias = row_of(p.bias) + p.bias_begin[work.sequence];
    if (p.position.data) position = row_of(p.position) + p.position.width / 2;
    if (p.time.data) {
      time = row_of(p.time);
      clock->start(p, piece, at0, again);
    }
    if (p.dropout) key = mix(p.seed_key + uint32_t(piece.head) * kGolden);
  }

  const F* row_of(const Table& table) const {
    return static_cast<const F*>(table.data) + (table.heads == 1 ? 0 : piece.head) * table.stride;
  }

  Terms<F> rows(int64_t at, int height, int64_t tile, int begin, int end, const Span* spans, bool masked) const {
    Terms<F> terms;
    terms.spans = spans;
    terms.masked = masked;
    terms.alpha = F(p.alpha);
    if (position) terms.position = position + tile - at;
    if (time) {
      terms.time = time;
      terms.buckets = clock->buckets(at, height, tile, begin, end);
    }
    if (p.dropout) {
      for (int r = 0; r < height; ++r) keep(at + r, tile, begin, end, kept + r * kKeys);
      terms.kept = kept;
    }
    if (bias) {
      F* const to = kept + kRows * kKeys;
      const int64_t columns = min64(end, length - tile);
      for (int r = 0; r < height; ++r) {
        const F* const from = bias + bias_at(at + r, tile);
        for (int64_t c = begin; c < columns; ++c) to[r * kKeys + c] = from[c];
        for (int64_t c = columns; c < end; ++c) to[r * kKeys + c] = 0;
      }
      terms.bias = to;
    }
    return terms;
  }

  // Entry of a row's first key of a tile, counted from the sequence's first one.
  int64_t bias_at(int64_t at, int64_t tile) const { return (at - first_at) * length + tile; }

  void keep(int64_t at, int64_t tile, int begin, int end, F* to) const {
    const uint32_t row_key = mix(key + uint32_t(first_key + at)), threshold = p.keep_threshold;
    const F scale = F(p.keep_scale);
    for (int c = begin; c < end; ++c) to[c] = mix(row_key ^ (uint32_t(tile + c) * kGolden)) >= threshold ? scale : F(0);
  }
};

template <class F>
F divisor_of(const Problem& p, int64_t q_row) {
  return F(p.divisors ? p.divisors[q_row] : p.divisor);
}

template <class F, class In, class Pass>
void walk_forward(Pass& pass, const Problem& p, const Piece& piece, bool again);
template <class F, class In, class Pass>
void walk_backward(Pass& pass, const Problem& p, const Piece& piece, bool again);

template <class F, class In>
struct Forward {
  static constexpr int lanes = Simd<F>::lanes;
  int64_t padded_qk, padded_v;
  F *queries, *sums, *key_rows, *keys, *values, *scores, *kept;
  Clock clock;

  Forward(const Problem& p, const Plan& plan, Arena& arena)
      : padded_qk(round_up(p.width_qk, lanes)), padded_v(round_up(p.width_v, lanes)) {
    queries = arena.take<F>(plan.max_rows * padded_qk);
    sums = arena.take<F>(plan.max_rows * padded_v);
    key_rows = arena.take<F>(kKeys * padded_qk);
    keys = arena.take<F>(kKeys * padded_qk);
    values = arena.take<F>(kKeys * padded_v);
    scores = arena.take<F>(kRows * kKeys);
    kept = arena.take<F>(2 * kRows * kKeys);
    clock.take(p, plan, arena);
  }

  void run(const Problem& p, const Piece& piece, bool again) { walk_forward<F, In>(*this, p, piece, again); }

  void pack_queries(const Problem& p, int64_t head, int64_t row, int64_t count) {
    read_rows<F, In>(p.q, row, count, head, p.width_qk, padded_qk, queries);
  }

  void pack_keys(const Problem& p, int64_t head, int64_t row, int count) {
    const int whole = int(round_up(count, lanes));
    read_rows<F, In>(p.k, row, count, head, p.width_qk, padded_qk, key_rows, p.slots);
    zero(key_rows + count * padded_qk, (whole - count) * padded_qk);
    transpose(key_rows, padded_qk, whole, int(padded_qk), keys, kKeys);
    read_rows<F, In>(p.v, row, count, head, p.width_v, padded_v, values, p.slots);
  }

  // scores = q·k for rows r0.. and the keys [begin, begin + vectors).
  void multiply_keys(const Problem& p, int64_t r0, int height, int begin, int vectors) {
    multiply<F, false, false>(height, vectors, queries + r0 * padded_qk, padded_qk, keys + begin, kKeys,
                              int(p.width_qk), scores + begin, kKeys);
  }

  // sums += weights * v over the keys [begin, end).
  void multiply_values(int64_t r0, int height, int begin, int end) {
    multiply<F, false, true>(height, int(padded_v / lanes), scores + begin, kKeys, values + begin * padded_v, padded_v,
                             end - begin, sums + r0 * padded_v, padded_v);
  }
};

template <class F, class In, class Pass>
void walk_forward(Pass& pass, const Problem& p, const Piece& piece, bool again) {
  constexpr int lanes = Simd<F>::lanes;
  const int64_t first_key = p.offsets[piece.sequence], n = p.offsets[piece.sequence + 1] - first_key;
  const int64_t first_row = p.q_offsets[piece.sequence], m = p.q_offsets[piece.sequence + 1] - first_row;
  const int64_t rows = piece.row_end - piece.row_begin, row0 = first_row + piece.row_begin;
  // Position of the piece's first row in its sequence.
  const int64_t at0 = n - m + piece.row_begin;
  const HeadTerms<F> head(p, piece, at0, again, &pass.clock, pass.kept);
  pass.pack_queries(p, piece.head, row0, rows);
  zero(pass.sums, rows * pass.padded_v);
  for (int64_t tile = piece.key_begin / kKeys * kKeys; tile < piece.key_end; tile += kKeys) {
    const int count = int(min64(kKeys, n - tile));
    bool packed = false;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int height = int(min64(kRows, rows - r0));
      Span spans[kRows];
      for (int r = 0; r < height; ++r) spans[r] = span_of(p, row0 + r0 + r, at0 + r0 + r, tile, count);
      const Group group = group_of(spans, height);
      if (group.begin >= group.end) continue;
      if (!packed) pass.pack_keys(p, piece.head, first_key + tile, count);
      packed = true;
      const int begin = group.begin / lanes * lanes, end = int(round_up(group.end, lanes));
      pass.multiply_keys(p, r0, height, begin, (end - begin) / lanes);
      head.rows(at0 + r0, height, tile, begin, end, spans, !group.full).weigh(pass.scores, height, begin, end);
      pass.multiply_values(r0, height, group.begin, group.end);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    write_row<F, In>(p.out, row0 + r, piece.head, p.width_v, 1 / divisor_of<F>(p, row0 + r),
                     pass.sums + r * pass.padded_v);
}

template <class F, class In>
struct Backward {
  static constexpr int lanes = Simd<F>::lanes;
  int64_t padded_qk, padded_v;
  F *queries, *grads, *key_rows, *keys, *value_rows, *values, *weights, *d_scores, *dk, *dv, *own_dq, *d_time, *kept;
  F* partial;
  Clock clock;

  Backward(const Problem& p, const Plan& plan, Arena& arena)
      : padded_qk(round_up(p.width_qk, lanes)),
        padded_v(round_up(p.width_v, lanes)),
        partial(static_cast<F*>(plan.partial)) {
    queries = arena.take<F>(kQueries * padded_qk);
    grads = arena.take<F>(kQueries * padded_v);
    key_rows = arena.take<F>(kKeys * padded_qk);
    keys = arena.take<F>(kKeys * padded_qk);
    value_rows = arena.take<F>(kKeys * padded_v);
    values = arena.take<F>(kKeys * padded_v);
    weights = arena.take<F>(kQueries * kKeys);
    d_scores = arena.take<F>(kQueries * kKeys);
    dk = arena.take<F>(kKeys * padded_qk);
    dv = arena.take<F>(kKeys * padded_v);
    own_dq = arena.take<F>(plan.max_rows * padded_qk);
    d_time = arena.take<F>(p.d_time ? p.time.width * lanes : 0);
    kept = arena.take<F>(2 * kRows * kKeys);
    clock.take(p, plan, arena);
  }

  void run(const Problem& p, const Piece& piece, bool again) { walk_backward<F, In>(*this, p, piece, again); }

  void pack_keys(const Problem& p, int64_t head, int64_t row, int count) {
    const int whole = int(round_up(count, lanes));
    read_rows<F, In>(p.k, row, count, head, p.width_qk, padded_qk, key_rows);
    zero(key_rows + count * padded_qk, (whole - count) * padded_qk);
    transpose(key_rows, padded_qk, whole, int(padded_qk), keys, kKeys);
    read_rows<F, In>(p.v, row, count, head, p.width_v, padded_v, value_rows);
    zero(value_rows + count * padded_v, (whole - count) * padded_v);
    transpose(value_rows, padded_v, whole, int(padded_v), values, kKeys);
  }

  void pack_queries(const Problem& p, int64_t head, int64_t row, int count) {
    read_rows<F, In>(p.q, row, count, head, p.width_qk, padded_qk, queries);
    read_rows<F, In>(p.grad, row, count, head, p.width_v, padded_v, grads);
  }

  // Rows r0.. of weights = q·k and d_scores = grad·v.
  void multiply_keys(const Problem& p, int r0, int height, int begin, int vectors) {
    multiply<F, false, false>(height, vectors, queries + r0 * padded_qk, padded_qk, keys + begin, kKeys,
                              int(p.width_qk), weights + r0 * kKeys + begin, kKeys);
    multiply<F, false, false>(height, vectors, grads + r0 * padded_v, padded_v, values + begin, kKeys, int(p.width_v),
                              d_scores + r0 * kKeys + begin, kKeys);
  }

  void multiply_dq(int r0, int height, int begin, int end, F* dq) {
    multiply<F, false, true>(height, int(padded_qk / lanes), d_scores + r0 * kKeys + begin, kKeys,
                             key_rows + begin * padded_qk, padded_qk, end - begin, dq, padded_qk);
  }

  void finish_rows(int height) {}

  // dv and dk of `some` keys from c on, over the rows [begin, end) of the tile.
  void multiply_dkv(int c, int some, int begin, int end) {
    multiply<F, true, true>(some, int(padded_v / lanes), weights + begin * kKeys + c, kKeys, grads + begin * padded_v,
                            padded_v, end - begin, dv + c * padded_v, padded_v);
    multiply<F, true, true>(some, int(padded_qk / lanes), d_scores + begin * kKeys + c, kKeys,
                            queries + begin * padded_qk, padded_qk, end - begin, dk + c * padded_qk, padded_qk);
  }
};

// Each lane has its own copy of the time table's gradient, so that keys which share a bucket, as neighbours often do,
// do not wait for each other's sum. begin and end are multiples of the lanes.
template <class F>
void spread(const int32_t* buckets, const F* d_row, int begin, int end, F* d_time) {
  constexpr int lanes = Simd<F>::lanes;
  for (int c = begin; c < end; c += lanes)
    for (int l = 0; l < lanes; ++l) d_time[buckets[c + l] * lanes + l] += d_row[c + l];
}

template <class F>
void spread(const uint8_t* buckets, const F* d_row, int begin, int end, F* d_time) {
  constexpr int lanes = Simd<F>::lanes;
  for (int c = begin; c < end; c += lanes) {
    const uint8_t* const here = buckets + c;
#if defined(__AVX512F__)
    if constexpr (lanes == 16) {
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(here));
      const __m512 d = _mm512_loadu_ps(d_row + c);
      // One step for each bucket that occurs: one or two where time is far away.
      for (uint32_t rest = 0xffff; rest;) {
        const uint8_t first = here[__builtin_ctz(rest)];
        const __mmask16 same = _mm_cmpeq_epi8_mask(b, _mm_set1_epi8(char(first)));
        float* const to = d_time + first * lanes;
        _mm512_storeu_ps(to, _mm512_mask_add_ps(_mm512_loadu_ps(to), same, _mm512_loadu_ps(to), d));
        rest &= ~uint32_t(same);
      }
      continue;
    }
#endif
    bool same = true;
    for (int l = 1; l < lanes; ++l) same &= here[l] == here[0];
    if (same) {
      F* const to = d_time + here[0] * lanes;
      store(to, load(to) + load(d_row + c));
    } else {
      for (int l = 0; l < lanes; ++l) d_time[here[l] * lanes + l] += d_row[c + l];
    }
  }
}

// Fills rows r0.. of the weights and d_scores tiles, zeros included, and adds to dq and the tables.
template <class F, class Pass>
void back_through_scores(Pass& pass, const Problem& p, const HeadTerms<F>& head, const Span* spans, int r0, int height,
                         int64_t row, int64_t at, int64_t tile, F* dq, F* d_position) {
  constexpr int lanes = Simd<F>::lanes;
  F* const w = pass.weights + r0 * kKeys;
  F* const d = pass.d_scores + r0 * kKeys;
  const Group group = group_of(spans, height);
  if (group.begin >= group.end) {
    zero(w, height * kKeys);
    zero(d, height * kKeys);
    return;
  }
  const int begin = group.begin / lanes * lanes, end = int(round_up(group.end, lanes));
  pass.multiply_keys(p, r0, height, begin, (end - begin) / lanes);
  F inverse[kRows];
  for (int r = 0; r < height; ++r) inverse[r] = 1 / divisor_of<F>(p, row + r);
  const Terms<F> terms = head.rows(at, height, tile, begin, end, spans, !group.full);
  terms.weigh_back(w, d, height, begin, end, inverse, d_position);
  F* const d_bias = p.d_bias ? static_cast<F*>(p.d_bias) + head.piece.head * p.bias.width : nullptr;
  for (int r = 0; r < height; ++r) {
    F *w_row = w + r * kKeys, *d_row = d + r * kKeys;
    if (d_bias) {
      F* const to = d_bias + p.bias_begin[head.piece.sequence] + head.bias_at(at + r, tile);
      for (int64_t c = begin; c < min64(end, head.length - tile); ++c) to[c] = d_row[c];
    }
    const int64_t bucket_row = r * terms.buckets.stride;
    if (p.d_time && terms.buckets.narrow)
      spread(terms.buckets.narrow + bucket_row, d_row, begin, end, pass.d_time);
    else if (p.d_time)
      spread(terms.buckets.wide + bucket_row, d_row, begin, end, pass.d_time);
    zero(w_row, begin);
    zero(d_row, begin);
    zero(w_row + end, kKeys - end);
    zero(d_row + end, kKeys - end);
  }
  pass.multiply_dq(r0, height, group.begin, group.end, dq);
}

inline void rows_that_see(const Span* spans, int height, int first, int last, int* begin, int* end) {
  *begin = height;
  *end = 0;
  for (int r = 0; r < height; ++r) {
    const Span s = spans[r];
    if ((s.begin < last && s.end > first) || (s.own < last && s.own_end > first)) {
      if (*begin == height) *begin = r;
      *end = r + 1;
    }
  }
}

template <class F, class In, class Pass>
void walk_backward(Pass& pass, const Problem& p, const Piece& piece, bool again) {
  const int64_t padded_qk = pass.padded_qk, padded_v = pass.padded_v;
  const int64_t first_key = p.offsets[piece.sequence], n = p.offsets[piece.sequence + 1] - first_key;
  const int64_t first_row = p.q_offsets[piece.sequence], m = p.q_offsets[piece.sequence + 1] - first_row;
  const int64_t rows = piece.row_end - piece.row_begin, row0 = first_row + piece.row_begin;
  const int64_t at0 = n - m + piece.row_begin;
  const HeadTerms<F> head(p, piece, at0, again, &pass.clock, pass.kept);
  F* const dq = piece.dq_at < 0 ? pass.own_dq : pass.partial + piece.dq_at;
  // Entry 0 of the piece's position gradient belongs to the first key and the last row.
  F* const d_position = p.d_position ? pass.partial + piece.position_at : nullptr;
  zero(dq, rows * padded_qk);
  if (d_position) zero(d_position, piece.key_end - piece.key_begin + rows + kKeys);
  const int64_t buckets = p.d_time ? pass.clock.bucket_count : 0;
  zero(pass.d_time, buckets * Simd<F>::lanes);
  for (int64_t tile = piece.key_begin; tile < piece.key_end; tile += kKeys) {
    const int count = int(min64(kKeys, n - tile));
    bool packed = false;
    zero(pass.dk, count * padded_qk);
    zero(pass.dv, count * padded_v);
    for (int64_t q0 = 0; q0 < rows; q0 += kQueries) {
      const int height = int(min64(kQueries, rows - q0));
      Span spans[kQueries];
      for (int r = 0; r < height; ++r) spans[r] = span_of(p, row0 + q0 + r, at0 + q0 + r, tile, count);
      const Group all = group_of(spans, height);
      if (all.begin >= all.end) continue;
      if (!packed) pass.pack_keys(p, piece.head, first_key + tile, count);
      packed = true;
      pass.pack_queries(p, piece.head, row0 + q0, height);
      F* position_row = d_position ? d_position + (tile - piece.key_begin) + (rows - 1 - q0) : nullptr;
      for (int r0 = 0; r0 < height; r0 += kRows) {
        const int some = height - r0 < kRows ? height - r0 : kRows;
        back_through_scores<F>(pass, p, head, spans + r0, r0, some, row0 + q0 + r0, at0 + q0 + r0, tile,
                               dq + (q0 + r0) * padded_qk, position_row ? position_row - r0 : nullptr);
      }
      pass.finish_rows(height);
      for (int c = 0; c < count; c += kRows) {
        const int some = count - c < kRows ? count - c : kRows;
        int begin = 0, end = height;
        if (!all.full) rows_that_see(spans, height, c, c + some, &begin, &end);
        if (begin < end) pass.multiply_dkv(c, some, begin, end);
      }
    }
    for (int r = 0; r < count; ++r) {
      write_row<F, In>(p.dk, first_key + tile + r, piece.head, p.width_qk, F(p.alpha), pass.dk + r * padded_qk);
      write_row<F, In>(p.dv, first_key + tile + r, piece.head, p.width_v, F(1), pass.dv + r * padded_v);
    }
  }
  if (piece.dq_at < 0)
    for (int64_t r = 0; r < rows; ++r)
      write_row<F, In>(p.dq, row0 + r, piece.head, p.width_qk, F(p.alpha), dq + r * padded_qk);
  if (p.d_time) {
    F* const to = pass.partial + piece.time_at;
    for (int64_t b = 0; b < buckets; ++b) {
      to[b] = 0;
      for (int l = 0; l < Simd<F>::lanes; ++l) to[b] += pass.d_time[b * Simd<F>::lanes + l];
    }
    zero(to + buckets, p.time.width - buckets);
  }
}

#if defined(__AVX512F__)
// The same passes with products of bfloat16 pairs, for chips that have them. A word holds two neighbours along the
// summed axis.
struct PairForward {
  static constexpr int lanes = 16;
  int64_t padded_v, words_qk, padded_words;
  uint32_t *queries, *key_rows, *keys, *values, *pairs;
  float *sums, *scores, *kept;
  Clock clock;

  PairForward(const Problem& p, const Plan& plan, Arena& arena)
      : padded_v(round_up(p.width_v, lanes)), words_qk((p.width_qk + 1) / 2), padded_words(round_up(words_qk, lanes)) {
    queries = arena.take<uint32_t>(plan.max_rows * padded_words);
    sums = arena.take<float>(plan.max_rows * padded_v);
    key_rows = arena.take<uint32_t>(kKeys * padded_words);
    keys = arena.take<uint32_t>(kKeys * padded_words);
    values = arena.take<uint32_t>(kKeys / 2 * padded_v);
    pairs = arena.take<uint32_t>(kRows * kKeys / 2);
    scores = arena.take<float>(kRows * kKeys);
    kept = arena.take<float>(2 * kRows * kKeys);
    clock.take(p, plan, arena);
  }

  void run(const Problem& p, const Piece& piece, bool again) { walk_forward<float, BFloat16>(*this, p, piece, again); }

  void pack_queries(const Problem& p, int64_t head, int64_t row, int64_t count) {
    read_words(p.q, row, count, head, p.width_qk, padded_words, queries);
  }

  void pack_keys(const Problem& p, int64_t head, int64_t row, int count) {
    read_transposed_words(p.k, row, count, head, p.width_qk, padded_words, key_rows, keys);
    read_row_pairs(p.v, row, count, head, p.width_v, padded_v, values);
  }

  void multiply_keys(const Problem& p, int64_t r0, int height, int begin, int vectors) {
    multiply_pairs<false, false>(height, vectors, queries + r0 * padded_words, padded_words, keys + begin, kKeys,
                                 int(words_qk), scores + begin, kKeys);
  }

  void multiply_values(int64_t r0, int height, int begin, int end) {
    const int first = begin / lanes * lanes, last = int(round_up(end, lanes));
    for (int r = 0; r < height; ++r) narrow_row(scores + r * kKeys, first, last, pairs + r * kKeys / 2);
    begin /= 2;
    multiply_pairs<false, true>(height, int(padded_v / lanes), pairs + begin, kKeys / 2, values + begin * padded_v,
                                padded_v, (end + 1) / 2 - begin, sums + r0 * padded_v, padded_v);
  }
};

struct PairBackward {
  static constexpr int lanes = 16;
  int64_t padded_qk, padded_v, words_qk, words_v, padded_words_qk, padded_words_v;
  uint32_t *queries, *grads, *query_pairs, *grad_pairs, *word_rows, *keys, *values, *key_pairs, *d_words, *w_pairs,
      *d_pairs;
  float *weights, *d_scores, *dk, *dv, *own_dq, *d_time, *kept;
  float* partial;
  Clock clock;

  PairBackward(const Problem& p, const Plan& plan, Arena& arena)
      : padded_qk(round_up(p.width_qk, lanes)),
        padded_v(round_up(p.width_v, lanes)),
        words_qk((p.width_qk + 1) / 2),
        words_v((p.width_v + 1) / 2),
        padded_words_qk(round_up(words_qk, lanes)),
        padded_words_v(round_up(words_v, lanes)),
        partial(static_cast<float*>(plan.partial)) {
    queries = arena.take<uint32_t>(kQueries * padded_words_qk);
    grads = arena.take<uint32_t>(kQueries * padded_words_v);
    query_pairs = arena.take<uint32_t>(kQueries / 2 * padded_qk);
    grad_pairs = arena.take<uint32_t>(kQueries / 2 * padded_v);
    word_rows = arena.take<uint32_t>(kKeys * max64(padded_words_qk, padded_words_v));
    keys = arena.take<uint32_t>(kKeys * padded_words_qk);
    values = arena.take<uint32_t>(kKeys * padded_words_v);
    key_pairs = arena.take<uint32_t>(kKeys / 2 * padded_qk);
    d_words = arena.take<uint32_t>(kRows * kKeys / 2);
    w_pairs = arena.take<uint32_t>(kQueries / 2 * kKeys);
    d_pairs = arena.take<uint32_t>(kQueries / 2 * kKeys);
    weights = arena.take<float>(kQueries * kKeys);
    d_scores = arena.take<float>(kQueries * kKeys);
    dk = arena.take<float>(kKeys * padded_qk);
    dv = arena.take<float>(kKeys * padded_v);
    own_dq = arena.take<float>(plan.max_rows * padded_qk);
    d_time = arena.take<float>(p.d_time ? p.time.width * lanes : 0);
    kept = arena.take<float>(2 * kRows * kKeys);
    clock.take(p, plan, arena);
  }

  void run(const Problem& p, const Piece& piece, bool again) { walk_backward<float, BFloat16>(*this, p, piece, again); }

  void pack_keys(const Problem& p, int64_t head, int64_t row, int count) {
    read_transposed_words(p.k, row, count, head, p.width_qk, padded_words_qk, word_rows, keys);
    read_transposed_words(p.v, row, count, head, p.width_v, padded_words_v, word_rows, values);
    read_row_pairs(p.k, row, count, head, p.width_qk, padded_qk, key_pairs);
  }

  void pack_queries(const Problem& p, int64_t head, int64_t row, int count) {
    read_words(p.q, row, count, head, p.width_qk, padded_words_qk, queries);
    read_words(p.grad, row, count, head, p.width_v, padded_words_v, grads);
    read_row_pairs(p.q, row, count, head, p.width_qk, padded_qk, query_pairs);
    read_row_pairs(p.grad, row, count, head, p.width_v, padded_v, grad_pairs);
  }

  void multiply_keys(const Problem& p, int r0, int height, int begin, int vectors) {
    multiply_pairs<false, false>(height, vectors, queries + r0 * padded_words_qk, padded_words_qk, keys + begin, kKeys,
                                 int(words_qk), weights + r0 * kKeys + begin, kKeys);
    multiply_pairs<false, false>(height, vectors, grads + r0 * padded_words_v, padded_words_v, values + begin, kKeys,
                                 int(words_v), d_scores + r0 * kKeys + begin, kKeys);
  }

  void multiply_dq(int r0, int height, int begin, int end, float* dq) {
    const int first = begin / lanes * lanes, last = int(round_up(end, lanes));
    for (int r = 0; r < height; ++r) narrow_row(d_scores + (r0 + r) * kKeys, first, last, d_words + r * kKeys / 2);
    begin /= 2;
    multiply_pairs<false, true>(height, int(padded_qk / lanes), d_words + begin, kKeys / 2,
                                key_pairs + begin * padded_qk, padded_qk, (end + 1) / 2 - begin, dq, padded_qk);
  }

  void finish_rows(int height) {
    if (height % 2) {
      zero(weights + height * kKeys, kKeys);
      zero(d_scores + height * kKeys, kKeys);
    }
    for (int r = 0; r < height; r += 2) {
      narrow_row_pair(weights + r * kKeys, w_pairs + r / 2 * kKeys);
      narrow_row_pair(d_scores + r * kKeys, d_pairs + r / 2 * kKeys);
    }
  }

  void multiply_dkv(int c, int some, int begin, int end) {
    begin /= 2;
    const int depth = (end + 1) / 2 - begin;
    multiply_pairs<true, true>(some, int(padded_v / lanes), w_pairs + begin * kKeys + c, kKeys,
                               grad_pairs + begin * padded_v, padded_v, depth, dv + c * padded_v, padded_v);
    multiply_pairs<true, true>(some, int(padded_qk / lanes), d_pairs + begin * kKeys + c, kKeys,
                               query_pairs + begin * padded_qk, padded_qk, depth, dk + c * padded_qk, padded_qk);
  }
};
#endif

// dq of a sequence that was split: the pieces' parts are added in their order, whatever thread made them.
template <class F, class In>
void merge_dq(const Problem& p, const Plan& plan, int64_t begin, int64_t end, F* line) {
  const int64_t padded = round_up(p.width_qk, Simd<F>::lanes);
  const Piece& first = plan.pieces[begin];
  const int64_t first_row = p.q_offsets[first.sequence], m = p.q_offsets[first.sequence + 1] - first_row;
  for (int64_t r = 0; r < m; ++r) {
    zero(line, padded);
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = plan.pieces[i];
      if (r < piece.row_begin || r >= piece.row_end) continue;
      const F* part = static_cast<const F*>(plan.partial) + piece.dq_at + (r - piece.row_begin) * padded;
      for (int64_t d = 0; d < padded; ++d) line[d] += part[d];
    }
    write_row<F, In>(p.dq, first_row + r, first.head, p.width_qk, F(p.alpha), line);
  }
}

constexpr int64_t kSegment = 256;

// Columns [begin, end) of one row of a table's gradient: pieces are added in their order, in double.
template <class F, bool Time>
void merge_table(const Problem& p, const Plan& plan, int64_t head, int64_t begin, int64_t end) {
  const Table& table = Time ? p.time : p.position;
  double sums[kSegment] = {};
  for (int64_t i = 0; i < plan.count; ++i) {
    const Piece& piece = plan.pieces[i];
    if (table.heads != 1 && piece.head != head) continue;
    const int64_t first_key = p.offsets[piece.sequence], n = p.offsets[piece.sequence + 1] - first_key;
    const int64_t m = p.q_offsets[piece.sequence + 1] - p.q_offsets[piece.sequence];
    int64_t first = 0, count = table.width;
    const F* part = static_cast<const F*>(plan.partial) + (Time ? piece.time_at : piece.position_at);
    if (!Time) {
      const int64_t last_at = n - m + piece.row_end - 1;
      first = table.width / 2 + piece.key_begin - last_at;
      count = piece.key_end - piece.key_begin + (piece.row_end - piece.row_begin) - 1;
      if (piece.row_end <= piece.row_begin) continue;
    }
    const int64_t low = max64(begin, first), high = min64(end, first + count);
    for (int64_t c = low; c < high; ++c) sums[c - begin] += part[c - first];
  }
  F* to = static_cast<F*>(Time ? p.d_time : p.d_position) + head * table.width;
  for (int64_t c = begin; c < end; ++c) to[c] = F(sums[c - begin]);
}

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  bool allocate(size_t bytes, int threads) {
    size = (bytes + 4095) / 4096 * 4096;
    return posix_memalign(&data, 4096, size * size_t(threads) + 4096) == 0;
  }
  Arena of(int thread) const { return Arena{static_cast<char*>(data) + size * size_t(thread)}; }
  ~Scratch() { free(data); }
};

template <class Pass>
bool walk(const Problem& p, const Plan& plan, Scratch& scratch) {
  Arena measure{nullptr};
  Pass sizes(p, plan, measure);
  if (!scratch.allocate(measure.used, plan.threads)) return false;
#pragma omp parallel num_threads(plan.threads)
  {
    Arena arena = scratch.of(thread_number());
    Pass pass(p, plan, arena);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan.task_count; ++i) {
      const Task task = plan.tasks[i];
      for (int64_t t = 0; t < task.count; ++t) pass.run(p, plan.pieces[task.first + t * task.step], t > 0);
    }
  }
  return true;
}

template <class F, class In, class Pass>
bool run_backward(const Problem& p, const Plan& plan) {
  Scratch scratch;
  if (!walk<Pass>(p, plan, scratch)) return false;
  const int64_t position_segments = p.d_position ? (p.position.width + kSegment - 1) / kSegment : 0;
  const int64_t time_segments = p.d_time ? (p.time.width + kSegment - 1) / kSegment : 0;
  const int64_t position_jobs = position_segments * p.position.heads, time_jobs = time_segments * p.time.heads;
  const int64_t jobs = plan.merge_count + position_jobs + time_jobs;
  if (jobs == 0) return true;
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
  for (int64_t job = 0; job < jobs; ++job) {
    int64_t i = job;
    if (i < plan.merge_count) {
      merge_dq<F, In>(p, plan, plan.merges[2 * i], plan.merges[2 * i + 1],
                      scratch.of(thread_number()).template take<F>(round_up(p.width_qk, Simd<F>::lanes)));
    } else if ((i -= plan.merge_count) < position_jobs) {
      const int64_t begin = i % position_segments * kSegment;
      merge_table<F, false>(p, plan, i / position_segments, begin, min64(begin + kSegment, p.position.width));
    } else {
      i -= position_jobs;
      const int64_t begin = i % time_segments * kSegment;
      merge_table<F, true>(p, plan, i / time_segments, begin, min64(begin + kSegment, p.time.width));
    }
  }
  return true;
}

template <class Pass>
bool run_forward(const Problem& p, const Plan& plan) {
  Scratch scratch;
  return walk<Pass>(p, plan, scratch);
}

}  // namespace

// False when memory runs out.
bool forward(const Problem& p, const Plan& plan) {
  switch (p.dtype) {
    case kFloat64:
      return run_forward<Forward<double, double>>(p, plan);
    case kBFloat16:
#if defined(__AVX512F__)
      if (p.bfloat16_pairs) return run_forward<PairForward>(p, plan);
#endif
      return run_forward<Forward<float, BFloat16>>(p, plan);
    case kFloat16:
      return run_forward<Forward<float, Float16>>(p, plan);
    default:
      return run_forward<Forward<float, float>>(p, plan);
  }
}

bool backward(const Problem& p, const Plan& plan) {
  switch (p.dtype) {
    case kFloat64:
      return run_backward<double, double, Backward<double, double>>(p, plan);
    case kBFloat16:
#if defined(__AVX512F__)
      if (p.bfloat16_pairs) return run_backward<float, BFloat16, PairBackward>(p, plan);
#endif
      return run_backward<float, BFloat16, Backward<float, BFloat16>>(p, plan);
    case kFloat16:
      return run_backward<float, Float16, Backward<float, Float16>>(p, plan);
    default:
      return run_backward<float, float, Backward<float, float>>(p, plan);
  }
}

}  // namespace FOOTFALL_ISA
}  // namespace hstu
