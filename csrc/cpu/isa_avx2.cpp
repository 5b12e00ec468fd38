// Kernels compiled for AVX2, whatever the flags of the build. Standard headers come before the pragma, because their
// inline functions must not be compiled for an instruction set that a machine may lack.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <new>
#include <vector>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define SPARSECNX_ISA avx2
#define SPARSECNX_BYTES 32
#define SPARSECNX_AVX2
#include "kernels_table.h"
#pragma GCC pop_options
#endif
