// Kernels for any machine: 16-byte registers through the compiler's vector types.

#include "kernels.h"

#define SPARSECNX_ISA baseline
#define SPARSECNX_BYTES 16
#include "kernels_table.h"
