// The Python face of the CUDA kernels: pointers as integers, sizes, the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "hstu_cuda.h"

namespace py = pybind11;

namespace {

using hstu_cuda::Problem;

template <class T>
T* pointer(const py::kwargs& a, const char* name) {
  return reinterpret_cast<T*>(a[name].cast<uintptr_t>());
}

hstu_cuda::View view(const py::kwargs& a, const char* name) {
  const auto [data, row, head] = a[name].cast<std::tuple<uintptr_t, int64_t, int64_t>>();
  return {reinterpret_cast<void*>(data), row, head};
}

hstu_cuda::Table table(const py::kwargs& a, const char* name) {
  const auto [data, stride, width] = a[name].cast<std::tuple<uintptr_t, int64_t, int>>();
  return {reinterpret_cast<const float*>(data), stride, width};
}

void need(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

Problem problem_of(const py::kwargs& a) {
  Problem p{};
  p.dtype = a["dtype"].cast<int>();
  p.batch = a["batch"].cast<int>();
  p.heads = a["heads"].cast<int>();
  p.width_qk = a["width_qk"].cast<int>();
  p.width_v = a["width_v"].cast<int>();
  p.max_seqlen = a["max_seqlen"].cast<int>();
  p.longest_q = a["longest_q"].cast<int>();
  p.offsets = pointer<const int64_t>(a, "offsets");
  p.q_offsets = pointer<const int64_t>(a, "q_offsets");
  p.timestamps = pointer<const int64_t>(a, "timestamps");
  p.edges = pointer<const int64_t>(a, "edges");
  p.num_targets = pointer<const int64_t>(a, "num_targets");
  p.num_contextual = pointer<const int64_t>(a, "num_contextual");
  p.max_attn_len = a["max_attn_len"].cast<int>();
  p.min_full_attn_len = a["min_full_attn_len"].cast<int>();
  p.causal = a["causal"].cast<bool>();
  p.divisors = pointer<const float>(a, "divisors");
  p.position = table(a, "position");
  p.time = table(a, "time");
  p.alpha = a["alpha"].cast<float>();
  p.divisor = a["divisor"].cast<float>();
  p.time_shift = a["time_shift"].cast<int>();
  p.dropout = a["dropout"].cast<bool>();
  p.keep_threshold = a["keep_threshold"].cast<uint32_t>();
  p.keep_scale = a["keep_scale"].cast<float>();
  p.seed_key = a["seed_key"].cast<uint32_t>();
  p.aligned = a["aligned"].cast<bool>();
  p.q = view(a, "q");
  p.k = view(a, "k");
  p.v = view(a, "v");
  need(p.dtype == hstu_cuda::kFloat32 || p.dtype == hstu_cuda::kBFloat16 || p.dtype == hstu_cuda::kFloat16,
       "dtype: got code " + std::to_string(p.dtype) + ", needs 0 (float32), 2 (bfloat16) or 3 (float16)");
  for (const auto& [name, width] : {std::make_pair("width_qk", p.width_qk), std::make_pair("width_v", p.width_v)})
    need(width >= 1 && width <= hstu_cuda::kWidestHead, std::string(name) + ": got " + std::to_string(width) +
                                                            ", needs 1 to " + std::to_string(hstu_cuda::kWidestHead));
  need(p.offsets && p.q_offsets, "offsets, q_offsets: got a null pointer, needs arrays on the device");
  need(!p.time.data || (p.timestamps && p.time.width >= 1 && (p.edges || p.time.width == 1)),
       "time: got a table without timestamps or edges, needs both");
  need(p.max_seqlen >= 1, "max_seqlen: got " + std::to_string(p.max_seqlen) + ", needs 1 or more");
  return p;
}

void raise(int error) {
  if (error) throw std::runtime_error(std::string("the CUDA kernel failed: ") + hstu_cuda::error_text(error));
}

void forward(const py::kwargs& arguments) {
  Problem p = problem_of(arguments);
  p.out = view(arguments, "out");
  raise(hstu_cuda::forward(p, pointer<void>(arguments, "stream")));
}

void backward(const py::kwargs& arguments) {
  Problem p = problem_of(arguments);
  p.grad = view(arguments, "grad");
  p.dq = view(arguments, "dq");
  p.dk = view(arguments, "dk");
  p.dv = view(arguments, "dv");
  p.d_position = pointer<float>(arguments, "d_position");
  p.d_time = pointer<float>(arguments, "d_time");
  p.position_parts = pointer<float>(arguments, "position_parts");
  p.time_parts = pointer<float>(arguments, "time_parts");
  p.chunks = arguments["chunks"].cast<int>();
  need(!p.d_time || p.time.width <= hstu_cuda::kWidestTimeTable,
       "time_weight: got width " + std::to_string(p.time.width) + ", needs at most " +
           std::to_string(hstu_cuda::kWidestTimeTable) + " for a gradient");
  need(p.chunks >= 1 && (!p.d_position || p.position_parts) && (!p.d_time || p.time_parts),
       "chunks, position_parts, time_parts: got none, needs memory for each table's parts");
  raise(hstu_cuda::backward(p, pointer<void>(arguments, "stream")));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
#ifdef FOOTFALL_SOURCES
  // What native.py knows an outdated module by.
  m.attr("sources") = FOOTFALL_SOURCES;
#endif
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("device_count", &hstu_cuda::device_count);
}
