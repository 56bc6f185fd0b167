// Sums over all elements of a group, with the same bits in every run.
#pragma once

#include "launch.cuh"

namespace crsam {

// Sums x over the threads of a block, in a fixed order, and writes the K totals to `total`.
template <int K>
__device__ __forceinline__ void block_sum(double (&x)[K], double* total) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double of_warp[K][kWarps];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    for (int offset = 16; offset > 0; offset /= 2) x[k] += __shfl_down_sync(0xffffffffu, x[k], offset);
    if (threadIdx.x % 32 == 0) of_warp[k][threadIdx.x / 32] = x[k];
  }
  __syncthreads();
  if (threadIdx.x < K) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[threadIdx.x][warp];
    total[threadIdx.x] = sum;
  }
  __syncthreads();
}

// Sums `sums` over all threads of all blocks whose chunks are in `group`, and writes out[group * K + k].
//
// Every thread has summed its 64 elements in the compute dtype; all further sums are in float64. A block writes its
// partial sums, then takes a ticket of its group. The block with the last ticket, whichever it is, adds the partial
// sums of all blocks in the order of the chunks. So the result does not depend on the order in which blocks run, and
// one launch is enough.
template <int K, typename C>
__device__ __forceinline__ void group_sum(const Table& table, int group, const C (&sums)[K], double* partial,
                                          double* out) {
  double x[K];
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = sums[k];
  block_sum(x, partial + static_cast<int64_t>(blockIdx.x) * K);

  if (blockIdx.x == 0) {  // no other block writes the sums of groups without rows
    for (int g = threadIdx.x; g < table.num_groups; g += kThreads) {
      if (table.group_begin[g] < table.group_begin[g + 1]) continue;
      for (int k = 0; k < K; ++k) out[static_cast<int64_t>(g) * K + k] = 0;
    }
  }

  const int64_t begin = table.group_begin[group], end = table.group_begin[group + 1];
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // makes the partial sums of this block visible before its ticket
    last = atomicAdd(&table.tickets[group], 1u) == end - begin - 1;
    __threadfence();  // orders reads of other blocks' partial sums after their tickets
  }
  __syncthreads();
  if (!last) return;

#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = 0;
  for (int64_t chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) {
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] += __ldcg(&partial[chunk * K + k]);
  }
  block_sum(x, out + static_cast<int64_t>(group) * K);
  if (threadIdx.x == 0) table.tickets[group] = 0;
}

}  // namespace crsam
