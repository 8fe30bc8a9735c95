// The Python face of the CPU kernels: masks as intervals, the list of pieces, the choice of instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "hstu_cpu.h"

namespace py = pybind11;

namespace {

using hstu::Piece;
using hstu::Problem;
using ViewArgument = std::tuple<uintptr_t, int64_t, int64_t>;
using TableArgument = std::tuple<uintptr_t, int64_t, int64_t>;

// Query rows of a forward piece: a multiple of the kernel's row block, so large that packing the keys is paid for.
constexpr int64_t kForwardRows = 240;
// Keys of a backward piece, and the most pieces of a sequence: each holds its own dq, so this bounds memory.
constexpr int64_t kBackwardKeys = 512, kBackwardPieces = 8;
// Rows of 64-byte vectors, the widest of all instruction sets.
constexpr int64_t kWidest = 16;
constexpr int64_t kTablePadding = 128;
static_assert(kTablePadding >= hstu::kKeys, "a row of the last tile reads that far behind the position table");

struct Masks {
  bool causal;
  int64_t max_attn_len, min_full_attn_len;
  const int64_t *targets, *contextual;
  int64_t target_group_size;
};

struct Isa {
  const char* name;
  bool (*forward)(const Problem&, const hstu::Plan&);
  bool (*backward)(const Problem&, const hstu::Plan&);
  bool bfloat16_pairs = false;
};

std::vector<Isa> supported() {
  std::vector<Isa> found{{"portable", hstu::portable::forward, hstu::portable::backward}};
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef FOOTFALL_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back({"avx2", hstu::avx2::forward, hstu::avx2::backward});
#endif
#ifdef FOOTFALL_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx512", hstu::avx512::forward, hstu::avx512::backward});
    if (__builtin_cpu_supports("avx512bf16"))
      found.push_back({"avx512_bf16", hstu::avx512::forward, hstu::avx512::backward, true});
  }
#endif
#endif
  return found;
}

const Isa& chosen() {
  static const std::vector<Isa> found = supported();
  const char* wanted = std::getenv("FOOTFALL_ISA");
  if (wanted == nullptr || *wanted == '\0') return found.back();
  std::string names;
  for (const Isa& isa : found) {
    if (wanted == std::string(isa.name)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa.name;
  }
  throw std::runtime_error("FOOTFALL_ISA=" + std::string(wanted) + " cannot run here, needs one of " + names);
}

int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::min(std::max(x, low), high); }

// The masks of the op, one interval a row. Ids: contextual rows share 0, targets share last_id, the history counts up
// between them, so that "id in [a, b]" is an interval of positions.
void intervals(const Problem& p, const Masks& masks, std::vector<int32_t>* lo, std::vector<int32_t>* hi,
               std::vector<int32_t>* own) {
  const int64_t total = p.q_offsets[p.batch];
  lo->resize(total);
  hi->resize(total);
  own->resize(total);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = p.offsets[b + 1] - p.offsets[b], m = p.q_offsets[b + 1] - p.q_offsets[b];
    const int64_t contextual = masks.contextual ? masks.contextual[b] : 0,
                  targets = masks.targets ? masks.targets[b] : 0;
    const int64_t first = std::max<int64_t>(contextual - 1, 0), last_id = n - first - targets;
    // Least position with id >= x.
    const auto begin_of = [&](int64_t x) {
      return x <= std::min<int64_t>(0, last_id) ? 0 : (x > last_id ? n : std::min(x + first, n));
    };
    for (int64_t r = 0; r < m; ++r) {
      const int64_t i = n - m + r, id = std::min(std::max<int64_t>(i - first, 0), last_id);
      const bool windowed =
          masks.max_attn_len > 0 && !(masks.min_full_attn_len > 0 && id >= last_id - masks.min_full_attn_len);
      int64_t low = windowed ? begin_of(id - masks.max_attn_len) : 0, high = begin_of(id);
      if (!masks.causal) {
        const int64_t history = begin_of(last_id);
        const int64_t above = windowed ? std::min(begin_of(id + masks.max_attn_len + 1), history) : history;
        // A history row sees both sides, contextual rows have nothing on their left, targets nothing on their right.
        const int64_t next = begin_of(id + 1);
        if (next == i + 1 && high == i)
          high = std::max(above, next);
        else if (high <= low)
          low = next, high = above;
      }
      if (contextual > 0 && id == 0) {
        const int64_t history = begin_of(last_id);
        if (last_id > 0) {
          low = 0;
          high = std::max(high, history);
        }
      }
      (*lo)[p.q_offsets[b] + r] = int32_t(low);
      (*hi)[p.q_offsets[b] + r] = int32_t(std::max(low, high));
      const int64_t before = i - (n - targets);
      (*own)[p.q_offsets[b] + r] = int32_t(before < 0 ? i : i - before % masks.target_group_size);
    }
  }
}

struct Pieces {
  std::vector<Piece> all;
  std::vector<hstu::Task> tasks;
  std::vector<double> cost;
  std::vector<int64_t> merges;
  int64_t max_rows = 0, max_keys = 0, max_strip = 0, partial = 0;

  // Heads share the buckets of the time bias, so one thread takes several of them, where there are tasks enough for all
  // threads.
  void add_tasks(const Piece& piece, int64_t first, int64_t step, int64_t heads, double work, int64_t together) {
    for (int64_t h = 0; h < heads; h += together) {
      tasks.push_back({first + h * step, step, std::min(together, heads - h)});
      cost.push_back(work * double(tasks.back().count));
    }
    const int64_t first_tile = piece.key_begin / hstu::kKeys * hstu::kKeys;
    const int64_t tiles = (piece.key_end - first_tile + hstu::kKeys - 1) / hstu::kKeys;
    max_strip = std::max(max_strip, (piece.row_end - piece.row_begin) * tiles * hstu::kKeys);
  }

  void sort() {
    std::vector<int64_t> order(tasks.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    std::vector<hstu::Task> sorted;
    sorted.reserve(tasks.size());
    for (const int64_t i : order) sorted.push_back(tasks[i]);
    tasks.swap(sorted);
  }
};

// All heads, where the largest bundle is still small beside a thread's share; else one.
int64_t heads_together(const Problem& p, int threads, double total, double largest) {
  if (p.time.data == nullptr) return 1;
  return total / double(threads) >= 3 * largest * double(p.heads) ? p.heads : 1;
}

Pieces forward_pieces(const Problem& p, int threads) {
  Pieces pieces;
  std::vector<double> cost;
  double total = 0, largest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = p.offsets[b + 1] - p.offsets[b], m = p.q_offsets[b + 1] - p.q_offsets[b];
    pieces.max_keys = std::max(pieces.max_keys, n);
    for (int64_t begin = 0; begin < m; begin += kForwardRows) {
      const int64_t end = std::min(begin + kForwardRows, m);
      int64_t low = n, high = 0;
      double work = 0;
      for (int64_t r = begin; r < end; ++r) {
        const int64_t row = p.q_offsets[b] + r, at = n - m + r;
        low = std::min({low, int64_t(p.lo[row] < p.hi[row] ? p.lo[row] : at), int64_t(p.own[row])});
        high = std::max({high, int64_t(p.hi[row]), at + 1});
        work += p.hi[row] - p.lo[row] + 1;
      }
      for (int64_t h = 0; h < p.heads; ++h)
        pieces.all.push_back({int32_t(b), int32_t(h), begin, end, low, high, -1, -1, -1});
      pieces.max_rows = std::max(pieces.max_rows, end - begin);
      cost.push_back(work);
      total += work * double(p.heads);
      largest = std::max(largest, work);
    }
  }
  const int64_t together = heads_together(p, threads, total, largest);
  for (size_t i = 0; i < cost.size(); ++i) {
    const int64_t first = int64_t(i) * p.heads;
    pieces.add_tasks(pieces.all[first], first, 1, p.heads, cost[i], together);
  }
  pieces.sort();
  return pieces;
}

Pieces backward_pieces(const Problem& p, int threads, bool position, bool time) {
  Pieces pieces;
  struct Bundle {
    int64_t first, step;
    double work;
  };
  std::vector<Bundle> bundles;
  double total_work = 0, largest = 0;
  const int64_t padded = (p.width_qk + kWidest - 1) / kWidest * kWidest;
  std::vector<double> seen;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = p.offsets[b + 1] - p.offsets[b], m = p.q_offsets[b + 1] - p.q_offsets[b];
    if (n == 0) continue;
    pieces.max_keys = std::max(pieces.max_keys, n);
    const int64_t tiles = (n + hstu::kKeys - 1) / hstu::kKeys;
    const int64_t count = std::min((n + kBackwardKeys - 1) / kBackwardKeys, kBackwardPieces);
    // Work per tile of keys, from the number of rows that see each key: a difference array, summed.
    seen.assign(n + 1, 0.0);
    for (int64_t r = 0; r < m; ++r) {
      const int64_t row = p.q_offsets[b] + r;
      seen[p.lo[row]] += 1;
      seen[p.hi[row]] -= 1;
    }
    std::vector<double> tile_work(tiles, 1.0);
    double rows_now = 0, total = double(tiles);
    for (int64_t j = 0; j < n; ++j) {
      rows_now += seen[j];
      tile_work[j / hstu::kKeys] += rows_now + 1;
      total += rows_now + 1;
    }
    int64_t tile = 0;
    double done = 0;
    std::vector<std::pair<Piece, double>> split;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t begin = tile;
      const double before = done;
      while (tile < tiles && (tile == begin || c == count - 1 || done < total * double(c + 1) / double(count)))
        done += tile_work[tile++];
      if (tile == begin) break;
      Piece piece{int32_t(b), 0, m, 0, begin * hstu::kKeys, std::min(tile * hstu::kKeys, n), -1, -1, -1};
      for (int64_t r = 0; r < m; ++r) {
        const int64_t row = p.q_offsets[b] + r, at = n - m + r;
        const bool sees = (p.lo[row] < piece.key_end && p.hi[row] > piece.key_begin && p.lo[row] < p.hi[row]) ||
                          (at >= piece.key_begin && p.own[row] < piece.key_end);
        if (!sees) continue;
        piece.row_begin = std::min(piece.row_begin, r);
        piece.row_end = r + 1;
      }
      if (piece.row_begin > piece.row_end) piece.row_begin = piece.row_end = 0;
      split.emplace_back(piece, done - before);
    }
    // A sequence in one piece writes its dq itself, and so must own all of its rows.
    if (split.size() == 1) split[0].first.row_begin = 0, split[0].first.row_end = m;
    for (const auto& [piece, work] : split) pieces.max_rows = std::max(pieces.max_rows, split.size() == 1 ? m : 0);
    for (size_t c = 0; c < split.size(); ++c) {
      bundles.push_back({int64_t(pieces.all.size() + c), int64_t(split.size()), split[c].second});
      total_work += split[c].second * double(p.heads);
      largest = std::max(largest, split[c].second);
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t begin = int64_t(pieces.all.size());
      for (auto [piece, work] : split) {
        piece.head = int32_t(h);
        const int64_t rows = piece.row_end - piece.row_begin;
        if (split.size() > 1) {
          piece.dq_at = pieces.partial;
          pieces.partial += rows * padded;
        }
        if (position) {
          piece.position_at = pieces.partial;
          pieces.partial += (piece.key_end - piece.key_begin + rows + hstu::kKeys + 15) / 16 * 16;
        }
        if (time) {
          piece.time_at = pieces.partial;
          pieces.partial += (p.time.width + 15) / 16 * 16;
        }
        pieces.all.push_back(piece);
      }
      if (split.size() > 1) {
        pieces.merges.push_back(begin);
        pieces.merges.push_back(int64_t(pieces.all.size()));
      }
    }
  }
  const int64_t together = heads_together(p, threads, total_work, largest);
  for (const Bundle& bundle : bundles)
    pieces.add_tasks(pieces.all[bundle.first], bundle.first, bundle.step, p.heads, bundle.work, together);
  pieces.sort();
  return pieces;
}

template <class T>
T* pointer(const py::kwargs& a, const char* name) {
  return reinterpret_cast<T*>(a[name].cast<uintptr_t>());
}

hstu::View view(const py::kwargs& a, const char* name) {
  const auto [data, row, head] = a[name].cast<ViewArgument>();
  return {reinterpret_cast<void*>(data), row, head};
}

// A copy of a table, with zeros behind every line for kernels that read whole vectors and registers of entries.
hstu::Table padded_table(const py::kwargs& a, const char* name, size_t element, std::vector<char>* copy) {
  const auto [data, heads, width] = a[name].cast<TableArgument>();
  if (data == 0) return {};
  const int64_t stride = width + kTablePadding;
  copy->assign(size_t(heads * stride) * element, 0);
  for (int64_t h = 0; h < heads; ++h)
    std::memcpy(copy->data() + size_t(h * stride) * element,
                reinterpret_cast<const char*>(data) + size_t(h * width) * element, size_t(width) * element);
  return {copy->data(), heads, width, stride};
}

uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

struct Call {
  Problem problem{};
  hstu::Plan plan{};
  Masks masks{};
  std::vector<int32_t> lo, hi, own;
  std::vector<char> position, time;
  const Isa& isa = chosen();

  explicit Call(const py::kwargs& a) {
    Problem& p = problem;
    p.dtype = a["dtype"].cast<int>();
    p.batch = a["batch"].cast<int64_t>();
    p.heads = a["heads"].cast<int64_t>();
    p.width_qk = a["width_qk"].cast<int64_t>();
    p.width_v = a["width_v"].cast<int64_t>();
    p.offsets = pointer<const int64_t>(a, "offsets");
    p.q_offsets = pointer<const int64_t>(a, "q_offsets");
    if (p.q_offsets == nullptr) p.q_offsets = p.offsets;
    p.timestamps = pointer<const int64_t>(a, "timestamps");
    p.edges = pointer<const int64_t>(a, "edges");
    p.divisors = pointer<const double>(a, "divisors");
    p.divisor = a["divisor"].cast<double>();
    p.alpha = a["alpha"].cast<double>();
    const size_t element = p.dtype == hstu::kFloat64 ? 8 : 4;
    p.position = padded_table(a, "position", element, &position);
    p.time = padded_table(a, "time", element, &time);
    p.time_shift = a["time_shift"].cast<int>();
    const double dropout = a["dropout"].cast<double>();
    p.dropout = dropout > 0;
    p.keep_scale = 1 / (1 - dropout);
    p.keep_threshold = a["keep_threshold"].cast<uint32_t>();
    const auto seed = uint64_t(a["seed"].cast<int64_t>());
    p.seed_key = mix(mix(uint32_t(seed)) ^ uint32_t(seed >> 32));
    p.q = view(a, "q");
    p.k = view(a, "k");
    p.v = view(a, "v");
    masks = {a["causal"].cast<bool>(),
             a["max_attn_len"].cast<int64_t>(),
             a["min_full_attn_len"].cast<int64_t>(),
             pointer<const int64_t>(a, "num_targets"),
             pointer<const int64_t>(a, "num_contextual"),
             a["target_group_size"].cast<int64_t>()};
    p.slots = pointer<const int64_t>(a, "slots");
    // Products of pairs read packed rows.
    p.bfloat16_pairs = isa.bfloat16_pairs && p.slots == nullptr;
    const auto [bias, bias_heads, bias_width] = a["bias"].cast<TableArgument>();
    p.bias = {reinterpret_cast<const void*>(bias), bias_heads, bias_width, bias_width};
    p.bias_begin = pointer<const int64_t>(a, "bias_begin");
    plan.threads = std::max(1, a["threads"].cast<int>());
    int32_t b = 0;
    for (int e = 0; e < 64 && p.time.data; ++e) {
      while (b < p.time.width - 1 && p.edges[b] <= (e < 63 ? int64_t(1) << e : INT64_MAX)) ++b;
      p.bucket_of_power[e] = b;
    }
  }

  void use(const Pieces& pieces) {
    plan.pieces = pieces.all.data();
    plan.count = int64_t(pieces.all.size());
    plan.tasks = pieces.tasks.data();
    plan.task_count = int64_t(pieces.tasks.size());
    plan.merges = pieces.merges.data();
    plan.merge_count = int64_t(pieces.merges.size()) / 2;
    plan.max_rows = pieces.max_rows;
    plan.max_keys = pieces.max_keys;
    plan.max_strip = pieces.max_strip;
    plan.threads = int(std::min<int64_t>(plan.threads, std::max<int64_t>(plan.task_count, 1)));
  }

  void cut() {
    intervals(problem, masks, &lo, &hi, &own);
    problem.lo = lo.data();
    problem.hi = hi.data();
    problem.own = own.data();
  }
};

void forward(const py::kwargs& arguments) {
  Call call(arguments);
  call.problem.out = view(arguments, "out");
  const py::gil_scoped_release release;
  call.cut();
  const Pieces pieces = forward_pieces(call.problem, call.plan.threads);
  call.use(pieces);
  if (!call.isa.forward(call.problem, call.plan)) throw std::bad_alloc();
}

void backward(const py::kwargs& arguments) {
  Call call(arguments);
  Problem& p = call.problem;
  p.grad = view(arguments, "grad");
  p.dq = view(arguments, "dq");
  p.dk = view(arguments, "dk");
  p.dv = view(arguments, "dv");
  p.d_position = pointer<void>(arguments, "d_position");
  p.d_time = pointer<void>(arguments, "d_time");
  p.d_bias = pointer<void>(arguments, "d_bias");
  const py::gil_scoped_release release;
  call.cut();
  const Pieces pieces = backward_pieces(p, call.plan.threads, p.d_position != nullptr, p.d_time != nullptr);
  call.use(pieces);
  const std::unique_ptr<char[]> partial(new char[(pieces.partial + 16) * (p.dtype == hstu::kFloat64 ? 8 : 4)]);
  call.plan.partial = partial.get();
  if (!call.isa.backward(p, call.plan)) throw std::bad_alloc();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
#ifdef FOOTFALL_SOURCES
  // What native.py knows an outdated module by.
  m.attr("sources") = FOOTFALL_SOURCES;
#endif
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("isa", [] { return chosen().name; });
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
