// Sums over all elements of a group, the same bits in every run.
#pragma once

#include "launch.cuh"

namespace crsam {

// Adds up x over the threads of a block, in a fixed order; the K totals are in `total` when it returns.
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

// Adds up `sums` over all threads of all blocks whose chunks are in `group`: out[group * K + k].
//
// Every thread has summed its 64 elements in the compute dtype; from here on it is float64. A block leaves its partial
// sums, and takes a ticket of its group; the block with the last ticket adds up those of all, whichever block it is, in
// the order of the chunks. So the result does not depend on the order in which blocks run, and one launch is enough.
template <int K, typename C>
__device__ __forceinline__ void group_sum(const Table& table, int group, const C (&sums)[K], double* partial,
                                          double* out) {
  double x[K];
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = sums[k];
  block_sum(x, partial + static_cast<int64_t>(blockIdx.x) * K);

  if (blockIdx.x == 0) {  // nobody else writes the sums of groups without rows
    for (int g = threadIdx.x; g < table.num_groups; g += kThreads) {
      if (table.group_begin[g] < table.group_begin[g + 1]) continue;
      for (int k = 0; k < K; ++k) out[static_cast<int64_t>(g) * K + k] = 0;
    }
  }

  const int64_t begin = table.group_begin[group], end = table.group_begin[group + 1];
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // what the block has summed is seen before its ticket
    last = atomicAdd(&table.tickets[group], 1u) == end - begin - 1;
    __threadfence();  // other blocks' partial sums are read after their tickets
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
