// The only lines of the CPU module that know Python: pointers in, one call of the right instruction set, GIL released.

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "scan.h"

namespace py = pybind11;
using namespace pybind11::literals;

#define DECLARE(isa)                          \
    namespace scan {                          \
    namespace isa {                           \
    void scan_forward(const ScanArgs&);       \
    void scan_backward(const ScanArgs&);      \
    int scan_chunk();                         \
    }                                         \
    }
#define KERNELS(isa) {#isa, scan::isa::scan_forward, scan::isa::scan_backward, scan::isa::scan_chunk}

DECLARE(portable)
#ifdef FOOTFALL_HAS_AVX2
DECLARE(avx2)
#endif
#ifdef FOOTFALL_HAS_AVX512
DECLARE(avx512)
#endif

namespace {

struct Kernels {
    const char* isa;
    void (*scan_forward)(const scan::ScanArgs&);
    void (*scan_backward)(const scan::ScanArgs&);
    int (*scan_chunk)();
};

Kernels choose() {
    const char* forced = std::getenv("FOOTFALL_ISA");
    const std::string wanted = forced ? forced : "";
#ifdef FOOTFALL_HAS_AVX512
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (wanted.empty() || wanted == "avx512")) return KERNELS(avx512);
#endif
#ifdef FOOTFALL_HAS_AVX2
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && (wanted.empty() || wanted == "avx2")) return KERNELS(avx2);
#endif
    if (wanted.empty() || wanted == "portable") return KERNELS(portable);
    throw std::runtime_error("FOOTFALL_ISA=" + wanted + " is not available here: unset it, or use portable, avx2 or "
                             "avx512 as this processor and build allow");
}

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

void* pointer(const py::handle& x) { return reinterpret_cast<void*>(x.cast<uintptr_t>()); }

// (address, dtype, batch stride, time stride, channel stride), or None.
scan::Array array(const py::object& x) {
    if (x.is_none()) return {nullptr, 0, 0, 0, 0};
    const py::tuple t = x;
    return {pointer(t[0]), t[1].cast<int>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

scan::ScanArgs scan_args(const py::dict& x) {
    scan::ScanArgs a = {};
    const auto number = [&](const char* name) { return x[name].cast<int64_t>(); };
    const auto address = [&](const char* name) { return x.contains(name) ? pointer(x[name]) : nullptr; };
    const auto strided = [&](const char* name) { return x.contains(name) ? array(x[name]) : scan::Array{}; };
    a.double_precision = (int)number("double_precision");
    a.complex = (int)number("complex");
    a.softplus = (int)number("softplus");
    a.variable_B = (int)number("variable_B");
    a.variable_C = (int)number("variable_C");
    a.save = (int)number("save");
    a.threads = (int)number("threads");
    a.segments = number("segments");
    a.length = number("length");
    a.channels = number("channels");
    a.states = number("states");
    a.groups = number("groups");
    a.rows = number("rows");
    a.offsets = static_cast<const int64_t*>(address("offsets"));
    a.u = strided("u");
    a.delta = strided("delta");
    a.z = strided("z");
    a.out = strided("out");
    a.A = address("A");
    a.D = address("D");
    a.bias = address("bias");
    a.B = address("B");
    a.C = address("C");
    a.initial = address("initial");
    a.last = address("last");
    a.saved = address("saved");
    a.dout = strided("dout");
    a.du = strided("du");
    a.ddelta = strided("ddelta");
    a.dz = strided("dz");
    a.dlast = address("dlast");
    a.dA = address("dA");
    a.dD = address("dD");
    a.dbias = address("dbias");
    a.dB = address("dB");
    a.dC = address("dC");
    a.dinitial = address("dinitial");
    return a;
}

void scan_forward(const py::kwargs& args) {
    const scan::ScanArgs a = scan_args(args);
    py::gil_scoped_release release;
    kernels().scan_forward(a);
}

void scan_backward(const py::kwargs& args) {
    const scan::ScanArgs a = scan_args(args);
    py::gil_scoped_release release;
    kernels().scan_backward(a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of mamba_scan; see scan.h for the arguments.";
    m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
    m.def("scan_chunk", [] { return kernels().scan_chunk(); }, "Steps between two saved states.");
    m.def("scan_forward", &scan_forward);
    m.def("scan_backward", &scan_backward);
}
