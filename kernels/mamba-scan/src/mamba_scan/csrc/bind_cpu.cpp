// The only lines of the CPU module that know Python: pointers in, one call of the right instruction set, GIL released.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "bind_args.h"

namespace py = pybind11;
using scan::conv_args;
using scan::scan_args;

#define DECLARE(isa)                   \
  namespace scan {                     \
  namespace isa {                      \
  void scan_forward(const ScanArgs&);  \
  void scan_backward(const ScanArgs&); \
  void conv_forward(const ConvArgs&);  \
  void conv_backward(const ConvArgs&); \
  int scan_chunk();                    \
  }                                    \
  }
#define KERNELS(isa)         \
  {#isa,                     \
   scan::isa::scan_forward,  \
   scan::isa::scan_backward, \
   scan::isa::conv_forward,  \
   scan::isa::conv_backward, \
   scan::isa::scan_chunk}

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
  throw std::runtime_error("FOOTFALL_ISA=" + wanted +
                           " is not available here: unset it, or use portable, avx2 or "
                           "avx512 as this processor and build allow");
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

template <class Args>
void run(void (*kernel)(const Args&), const Args& a) {
  py::gil_scoped_release release;
  kernel(a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
#ifdef FOOTFALL_SOURCES
  // What native.py knows an outdated module by.
  m.attr("sources") = FOOTFALL_SOURCES;
#endif
  m.doc() = "CPU kernels of mamba_scan; see scan.h for the arguments.";
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("scan_chunk", [] { return kernels().scan_chunk(); }, "Steps between two saved states.");
  m.def("scan_forward", [](const py::kwargs& x) { run(kernels().scan_forward, scan_args(x)); });
  m.def("scan_backward", [](const py::kwargs& x) { run(kernels().scan_backward, scan_args(x)); });
  m.def("conv_forward", [](const py::kwargs& x) { run(kernels().conv_forward, conv_args(x)); });
  m.def("conv_backward", [](const py::kwargs& x) { run(kernels().conv_backward, conv_args(x)); });
}
