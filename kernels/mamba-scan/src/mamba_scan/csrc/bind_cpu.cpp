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
    void conv_forward(const ConvArgs&);       \
    void conv_backward(const ConvArgs&);      \
    int scan_chunk();                         \
    }                                         \
    }
#define KERNELS(isa)                                                                                        \
    {                                                                                                       \
        #isa, scan::isa::scan_forward, scan::isa::scan_backward, scan::isa::conv_forward, scan::isa::conv_backward, \
            scan::isa::scan_chunk                                                                           \
    }

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
    void (*conv_forward)(const scan::ConvArgs&);
    void (*conv_backward)(const scan::ConvArgs&);
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

// Numbers are always given; tensors may be left out.
struct Reader {
    const py::dict& x;
    int64_t number(const char* name) const { return x[name].cast<int64_t>(); }
    void* address(const char* name) const { return x.contains(name) ? pointer(x[name]) : nullptr; }
    scan::Array strided(const char* name) const { return x.contains(name) ? array(x[name]) : scan::Array{}; }
};

scan::ScanArgs scan_args(const py::dict& x) {
    scan::ScanArgs a = {};
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

scan::ConvArgs conv_args(const py::dict& x) {
    scan::ConvArgs a = {};
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

template <class Args>
void run(void (*kernel)(const Args&), const Args& a) {
    py::gil_scoped_release release;
    kernel(a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of mamba_scan; see scan.h for the arguments.";
    m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
    m.def("scan_chunk", [] { return kernels().scan_chunk(); }, "Steps between two saved states.");
    m.def("scan_forward", [](const py::kwargs& x) { run(kernels().scan_forward, scan_args(x)); });
    m.def("scan_backward", [](const py::kwargs& x) { run(kernels().scan_backward, scan_args(x)); });
    m.def("conv_forward", [](const py::kwargs& x) { run(kernels().conv_forward, conv_args(x)); });
    m.def("conv_backward", [](const py::kwargs& x) { run(kernels().conv_backward, conv_args(x)); });
}
