#pragma once

#include "kernels.h"
#include "reduce.cuh"
#include "update_math.cuh"

namespace crsam {

// Inner products of (g0, d1, d2) and of h = g0, or w^2 g0 (ASAM), with each of them, per group.
// Reads g0, g+, g-, and w for ASAM: 12 bytes an element in float32.
//
// 16-bit types have 8 elements of each gradient in flight beside the nine sums: 80 registers, hence a block less.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : kBlocks<T>)
    fd_gram_kernel(Table table, double* partial, double* gram) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  const T* grad = static_cast<const T*>(row.grad);
  const T* grad_ascent = static_cast<const T*>(row.grad_ascent);
  const T* grad_descent = static_cast<const T*>(row.grad_descent);
  const C* w = static_cast<const C*>(row.saved);
  C sums[9] = {};

  for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
    C g0[width], gp[width], gm[width];
    load(grad + i, g0);
    load(grad_ascent + i, gp);
    load(grad_descent + i, gm);
#pragma unroll
    for (int j = 0; j < width; ++j) add_products(sums, g0[j], gp[j], gm[j]);
    if (row.adaptive) {
      C v[width];
      load(w + i, v);
#pragma unroll
      for (int j = 0; j < width; ++j) add_products_with(sums, v[j] * v[j] * g0[j], g0[j], gp[j], gm[j]);
    }
  });
  if (!row.adaptive) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[6 + k] = sums[k];
  }
  group_sum(table, row.group, sums, partial, gram);
}

}  // namespace crsam
