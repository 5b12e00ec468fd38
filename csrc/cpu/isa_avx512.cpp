// Kernels compiled for AVX-512, whatever the flags of the build. Standard headers come before the pragma, because their
// inline functions must not be compiled for an instruction set that a machine may lack.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <new>
#include <vector>

#include "kernels.h"

// GCC 12 warns of its own intrinsics headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")
#define SPARSECNX_ISA avx512
#define SPARSECNX_BYTES 64
#define SPARSECNX_AVX512
#include "kernels_table.h"
#pragma GCC pop_options
#endif
