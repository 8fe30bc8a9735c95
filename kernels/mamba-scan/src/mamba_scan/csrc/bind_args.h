// The arguments of the kernels from Python: addresses and sizes by name.
#pragma once

#include <pybind11/pybind11.h>

#include "scan.h"

namespace scan {

namespace py = pybind11;

inline void* pointer(const py::handle& x) { return reinterpret_cast<void*>(x.cast<uintptr_t>()); }

// (address, dtype, batch stride, time stride, channel stride), or None.
inline Array array(const py::object& x) {
  if (x.is_none()) return {nullptr, 0, 0, 0, 0};
  const py::tuple t = x;
  return {pointer(t[0]), t[1].cast<int>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

// Numbers are always given; tensors may be left out.
struct Reader {
  const py::dict& x;
  int64_t number(const char* name) const { return x[name].cast<int64_t>(); }
  void* address(const char* name) const { return x.contains(name) ? pointer(x[name]) : nullptr; }
  Array strided(const char* name) const { return x.contains(name) ? array(x[name]) : Array{}; }
};

inline ScanArgs scan_args(const py::dict& x) {
  ScanArgs a = {};
  const Reader r{x};
  a.double_precision = (int)r.number("double_precision");
  a.complex = (int)r.number("complex");
  a.softplus = (int)r.number("softplus");
  a.variable_B = (int)r.number("variable_B");
  a.variable_C = (int)r.number("variable_C");
  a.save = (int)r.number("save");
  a.threads = (int)r.number("threads");
  a.segments = r.number("segments");
  a.length = r.number("length");
  a.channels = r.number("channels");
  a.states = r.number("states");
  a.groups = r.number("groups");
  a.rows = r.number("rows");
  a.offsets = static_cast<const int64_t*>(r.address("offsets"));
  a.u = r.strided("u");
  a.delta = r.strided("delta");
  a.z = r.strided("z");
  a.out = r.strided("out");
  a.A = r.address("A");
  a.D = r.address("D");
  a.bias = r.address("bias");
  a.B = r.address("B");
  a.C = r.address("C");
  a.initial = r.address("initial");
  a.last = r.address("last");
  a.saved = r.address("saved");
  a.dout = r.strided("dout");
  a.du = r.strided("du");
  a.ddelta = r.strided("ddelta");
  a.dz = r.strided("dz");
  a.dlast = r.address("dlast");
  a.dA = r.address("dA");
  a.dD = r.address("dD");
  a.dbias = r.address("dbias");
  a.dB = r.address("dB");
  a.dC = r.address("dC");
  a.dinitial = r.address("dinitial");
  return a;
}

inline ConvArgs conv_args(const py::dict& x) {
  ConvArgs a = {};
  const Reader r{x};
  a.double_precision = (int)r.number("double_precision");
  a.silu = (int)r.number("silu");
  a.threads = (int)r.number("threads");
  a.segments = r.number("segments");
  a.length = r.number("length");
  a.channels = r.number("channels");
  a.width = r.number("width");
  a.offsets = static_cast<const int64_t*>(r.address("offsets"));
  a.documents = static_cast<const int32_t*>(r.address("documents"));
  a.x = r.strided("x");
  a.out = r.strided("out");
  a.weight = r.address("weight");
  a.bias = r.address("bias");
  a.initial = r.address("initial");
  a.final = r.address("final");
  a.dout = r.strided("dout");
  a.dx = r.strided("dx");
  a.dfinal = r.address("dfinal");
  a.dweight = r.address("dweight");
  a.dbias = r.address("dbias");
  a.dinitial = r.address("dinitial");
  return a;
}

}  // namespace scan
