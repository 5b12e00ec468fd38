// The shared library sparsecnx._C_cuda: loading it gives the operators of csrc/library.cpp their GPU implementations.
#include "implement.h"

STABLE_TORCH_LIBRARY_IMPL(sparsecnx_cuda, CUDA, m) { sparsecnx::cuda::implement(m); }
