// The squared norm of a gradient.
#include "kernels.h"
#include "reduce.cuh"
#include "update_math.cuh"

namespace crsam {

// Computes |g|^2 per group, or | |w| g |^2 if weighted, or |g + x h|^2 with a direction h.
// Reads g, and w or h if given: 4 or 8 bytes per element in float32.
template <typename T>
__global__ void __launch_bounds__(kThreads, Precision<T>::kBlocks)
    grad_norm_kernel(Table table, const double* direction_weight, double* partial, double* norms) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  const T *grad = pointer<T>(row, kGrads), *live = pointer<T>(row, kLive);
  C sums[1] = {0};

  if (direction_weight != nullptr) {
    const C* direction = pointer<C>(row, kDirection);
    const C weight = C(*direction_weight);
    for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
      C g[width], h[width];
      load(grad + i, g);
      load(direction + i, h);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const C x = fused(weight, h[j], g[j]);
        sums[0] = fused(x, x, sums[0]);
      }
    });
  } else if (!row.adaptive) {
    for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
      C g[width];
      load(grad + i, g);
#pragma unroll
      for (int j = 0; j < width; ++j) sums[0] = fused(g[j], g[j], sums[0]);
    });
  } else {
    for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
      C g[width], w[width];
      load(grad + i, g);
      load(live + i, w);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const C x = g[j] * w[j];
        sums[0] = fused(x, x, sums[0]);
      }
    });
  }
  group_sum(table, row.group, sums, partial, norms);
}

void launch_grad_norm(Dtype dtype, const Table& table, const double* direction_weight, double* partial, double* norms,
                      cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    launch(grad_norm_kernel<typename decltype(t)::type>, table.num_chunks, stream, table, direction_weight, partial,
           norms);
  });
}

}  // namespace crsam
