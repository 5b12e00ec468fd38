// How the operators were built, for `sparsecnx doctor`. setup.py defines the SPARSECNX_ macros.

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "How the compiled operators of sparsecnx were built.";
  py::dict facts;
  facts["version"] = SPARSECNX_VERSION;
#if defined(__clang__)
  facts["compiler"] = __VERSION__;
#else
  facts["compiler"] = "GCC " __VERSION__;
#endif
  facts["flags"] = SPARSECNX_FLAGS;
  facts["torch"] = SPARSECNX_TORCH;                // compiled with
  facts["oldest_torch"] = SPARSECNX_OLDEST_TORCH;  // runs on this and every later one
#ifdef SPARSECNX_CUDA
  facts["cuda"] = SPARSECNX_CUDA;  // version of the toolkit
  facts["cuda_architectures"] = SPARSECNX_CUDA_ARCHITECTURES;
  facts["cuda_flags"] = SPARSECNX_CUDA_FLAGS;
#else
  facts["cuda"] = py::none();
  facts["cuda_architectures"] = py::none();
  facts["cuda_flags"] = py::none();
#endif
  module.attr("facts") = facts;
}
