// Global Response Normalization over groups of rows, and its gradient: launchers of the kernels in grn.cu.
#pragma once

#include "dtype.h"

namespace sparsecnx::cuda {

// Rows of features and the groups in which they are normalised together: group g is rows splits[g] to splits[g + 1].
struct GrnRows {
  int64_t rows, channels, groups;
  const int64_t* splits;  // (groups + 1), on the device, from 0 to rows
  Dtype dtype;
};

struct GrnForward {
  const void* x;       // (rows, C)
  const float* gamma;  // (C)
  const float* beta;   // (C)
  float eps;
  void* out;      // (rows, C)
  float* energy;  // (groups, C): sums of x^2
  float* work;    // grn_work(rows, 1) values
};

struct GrnBackward {
  const void* grad;     // (rows, C)
  const void* x;        // (rows, C)
  const float* gamma;   // (C)
  const float* energy;  // (groups, C), as forward gave it
  float eps;
  void* grad_x;       // (rows, C)
  float* grad_gamma;  // (C)
  float* grad_beta;   // (C)
  float* work;        // grn_work(rows, 2) values
};

// Values of float32 that forward (sums = 1) or backward (sums = 2) needs to work in.
int64_t grn_work(const GrnRows& rows, int sums);

void launch_grn(const GrnRows& rows, const GrnForward& values, cudaStream_t stream);
void launch_grn_backward(const GrnRows& rows, const GrnBackward& values, cudaStream_t stream);

}  // namespace sparsecnx::cuda
