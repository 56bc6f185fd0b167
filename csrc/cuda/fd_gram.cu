// The Gram matrix of the gradient and its finite differences, and ghat.
#include "kernels.h"
#include "reduce.cuh"
#include "update_math.cuh"

namespace crsam {

// Computes, per group, the inner products of (g0, d1, d2), and of h with each of them, where h is g0, or w^2 g0 (ASAM).
// Reads g0, g+, g-, and w for ASAM: 12 bytes per element in float32 (16 with w).
// kCombines: also writes ghat times the factor to the row's kLive, which may be the memory of g-: 16 bytes.
//
// Narrow dtypes have 8 elements of each gradient in flight, besides the nine sums. This takes 80 registers, so there is
// one block less per multiprocessor.
template <typename T, bool kCombines>
__global__ void __launch_bounds__(kThreads, Precision<T>::kBlocks - kHasMaster<T>)
    fd_gram_kernel(Table table, Decision decision, double* partial, double* gram) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  const C* w = pointer<C>(row, kSaved);
  C sums[kGram] = {};
  Weights<C> weights;
  if constexpr (kCombines) weights = weights_of<C>(decision, row.group, table.num_groups);

  for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
    C g[kPasses][width];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) load(pointer<T>(row, kGrads + pass) + i, g[pass]);
#pragma unroll
    for (int j = 0; j < width; ++j) add_products(sums, g, j);
    if (row.adaptive) {
      C v[width];
      load(w + i, v);
#pragma unroll
      for (int j = 0; j < width; ++j) add_products_with(sums, v[j] * v[j] * g[0][j], g, j);
    }
    if constexpr (kCombines) {
      C ghat[width];
#pragma unroll
      for (int j = 0; j < width; ++j) ghat[j] = combined(weights, g, j);
      store(pointer<T>(row, kLive) + i, ghat);
    }
  });
  if (!row.adaptive) {
#pragma unroll
    for (int k = 0; k < kPasses; ++k) sums[kProducts + k] = sums[k];
  }
  group_sum(table, row.group, sums, partial, gram);
}

void launch_fd_gram(Dtype dtype, const Table& table, double* partial, double* gram, cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    launch(fd_gram_kernel<typename decltype(t)::type, false>, table.num_chunks, stream, table, Decision{}, partial,
           gram);
  });
}

void launch_fd_combine(Dtype dtype, const Table& table, Decision decision, double* partial, double* gram,
                       cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    launch(fd_gram_kernel<typename decltype(t)::type, true>, table.num_chunks, stream, table, decision, partial, gram);
  });
}

}  // namespace crsam
