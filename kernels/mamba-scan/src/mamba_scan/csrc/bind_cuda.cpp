// The only lines of the CUDA module that know Python: device pointers in, one call, an exception for a failed launch.

#include <stdexcept>

#include "bind_args.h"
#include "scan_cuda.h"

namespace py = pybind11;

namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("a CUDA kernel was not launched: ") + error);
}

float* floats(const scan::Reader& r, const char* name) { return static_cast<float*>(r.address(name)); }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
#ifdef FOOTFALL_SOURCES
  // What native.py knows an outdated module by.
  m.attr("sources") = FOOTFALL_SOURCES;
#endif
  m.doc() = "CUDA kernels of mamba_scan; see scan.h and scan_cuda.h for the arguments.";
  m.def("scan_blocks", &scan::scan_blocks, "Blocks of channels in a group.");
  m.def("conv_rows", [] { return scan::CONV_ROWS; }, "Rows of one part of the weights' gradient.");
  m.def("scan_forward",
        [](const py::kwargs& x) { check(scan::scan_forward(scan::scan_args(x), scan::Reader{x}.address("stream"))); });
  m.def("scan_backward", [](const py::kwargs& x) {
    const scan::Reader r{x};
    const scan::ScanParts parts = {r.number("parts"), floats(r, "row_B"), floats(r, "row_C"), floats(r, "state_sums"),
                                   floats(r, "channel_sums")};
    check(scan::scan_backward(scan::scan_args(x), parts, r.address("stream")));
  });
  m.def("conv_forward", [](const py::kwargs& x) {
    const scan::Reader r{x};
    check(scan::conv_forward(scan::conv_args(x), r.number("rows"), r.address("stream")));
  });
  m.def("conv_backward", [](const py::kwargs& x) {
    const scan::Reader r{x};
    check(scan::conv_backward(scan::conv_args(x), r.number("rows"), floats(r, "dpre"), floats(r, "parts"),
                              r.address("stream")));
  });
}
