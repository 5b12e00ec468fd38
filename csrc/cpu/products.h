// Matrix products of rows that lie in memory (products.cpp).
#pragma once

#include "op.h"

namespace sparsecnx {

// A row-major matrix in memory that it does not own, or the transpose of one.
template <class T>
struct Matrix {
  const T* at;
  int64_t rows, columns;
  bool transposed = false;  // `at` holds (columns, rows)

  Matrix t() const { return {at, columns, rows, !transposed}; }
};

// Whether products of S go to torch, which takes oneDNN: bfloat16, where the processor multiplies it.
template <class S>
bool by_torch();

// The right-hand matrix of products. For many rows it is packed once. For few rows they are packed instead, at every product,
// and the matrix is read where it lies. All threads share the work of a member function, but for `put`; in a parallel region
// the calling thread does it alone.
template <class S>
class Factor {
  using A = Compute<S>;

 public:
  Factor(Matrix<S> b, bool many_rows);
  // A matrix whose rows are put one after another.
  Factor(int64_t rows, int64_t columns);

  // Copies a piece of rows from memory into rows [first, first + rows).
  void put(int64_t first, const S* from, int64_t rows);

  // out = a b or, with `add`, out += a b
  void multiply(Matrix<S> a, S* out, bool add = false) const;
  // The same in the computing type. By torch, each product is rounded once and the sum is not.
  void accumulate(Matrix<S> a, A* out, bool add) const;

 private:
  // Multiplies rows [first, last) of a by panels [from, to).
  void part(Matrix<S> a, int64_t first, int64_t last, int64_t from, int64_t to, A* out, int64_t out_step,
            bool add) const;
  void few_rows(Matrix<S> a, A* out, bool add) const;

  Matrix<S> b_;
  bool packed_;
  Scratch<S> rows_;    // for torch, if rows are put
  Scratch<A> panels_;  // otherwise
};

}  // namespace sparsecnx
