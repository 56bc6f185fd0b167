#pragma once

#include "kernels.h"
#include "launch.cuh"
#include "update_math.cuh"

namespace crsam {

static_assert(Sgd<float>::kCount == kSgdOptions && Adam<float>::kCount == kAdamOptions, "options");

// What all threads of a block need to know, worked out by the first one.
template <typename C, typename Rule>
struct Shared {
  Weights<C> weights;
  Rule rule;
  bool ok;

  __device__ __forceinline__ void decide(const Row& row, const Scalar* options, const Decision& decision) {
    if (threadIdx.x == 0) {
      const Scalar* own = options + row.group * Rule::kCount;
      const C factor = decision.factor ? C(*decision.factor) : C(1);
      weights = {C(decision.a[row.group]), C(decision.b[row.group]), own[Rule::kMaximize].value != 0 ? -factor : factor};
      rule = Rule(own, C(*row.step));
      ok = *decision.ok;
    }
    __syncthreads();
  }
};

// N elements of ghat, times the factor: from three gradients, or from `grad` alone.
template <typename T, bool kDifferences, int N>
__device__ __forceinline__ void load_combined(const Row& row, int64_t i, const Weights<compute_t<T>>& weights,
                                              compute_t<T> (&g)[N]) {
  load(static_cast<const T*>(row.grad) + i, g);
  if constexpr (kDifferences) {
    compute_t<T> ascent[N], descent[N];
    load(static_cast<const T*>(row.grad_ascent) + i, ascent);
    load(static_cast<const T*>(row.grad_descent) + i, descent);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = combined(weights, g[j], ascent[j], descent[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] *= weights.factor;
  }
}

// w into `live`, and into the master where there is one.
template <typename T, int N>
__device__ __forceinline__ void store_parameters(const Row& row, int64_t i, const compute_t<T> (&w)[N]) {
  store(static_cast<T*>(row.live) + i, w);
  if constexpr (!std::is_same_v<T, compute_t<T>>) store(static_cast<compute_t<T>*>(row.saved) + i, w);
}

// A step that is skipped: live = w, and nothing else changes.
template <typename T>
__device__ __forceinline__ void restore(const Row& row, int32_t index) {
  if (row.live == row.saved) return;
  for_each<T>(row, index, [&](int64_t i, auto width) {
    compute_t<T> w[width];
    load(static_cast<const compute_t<T>*>(row.saved) + i, w);
    store(static_cast<T*>(row.live) + i, w);
  });
}

// torch.optim.SGD, see `Sgd`.   In float32: reads w, m, g0, g+, g-, writes m, live: 28 bytes an element.
template <typename T, bool kDifferences>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    sgd_step_kernel(Table table, const Scalar* options, Decision decision) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  __shared__ Shared<C, Sgd<C>> shared;
  shared.decide(row, options, decision);
  if (!shared.ok) return restore<T>(row, chunk.index);

  const Weights<C> weights = shared.weights;
  const Sgd<C> rule = shared.rule;
  const C* saved = static_cast<const C*>(row.saved);
  C* momentum_buffer = static_cast<C*>(row.first);
  for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
    C w[width], m[width], g[width];
    load(saved + i, w);
    if (momentum_buffer) load(momentum_buffer + i, m);  // with the others: after their first use, it would be waited for
    load_combined<T, kDifferences>(row, i, weights, g);
    if (momentum_buffer) {
#pragma unroll
      for (int j = 0; j < width; ++j) rule(w[j], m[j], g[j]);
      store(momentum_buffer + i, m);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) rule(w[j], g[j]);
    }
    store_parameters<T>(row, i, w);
  });
}

// torch.optim.Adam and AdamW, see `Adam`.   In float32: reads w, m, v, g0, g+, g-, writes m, v, live: 36 bytes an element.
template <typename T, bool kDifferences>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    adamw_step_kernel(Table table, const Scalar* options, Decision decision) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  __shared__ Shared<C, Adam<C>> shared;
  shared.decide(row, options, decision);
  if (!shared.ok) return restore<T>(row, chunk.index);

  const Weights<C> weights = shared.weights;
  const Adam<C> rule = shared.rule;
  const C* saved = static_cast<const C*>(row.saved);
  C* exp_avg = static_cast<C*>(row.first);
  C* exp_avg_sq = static_cast<C*>(row.second);
  for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
    C w[width], m[width], v[width], g[width];
    load(saved + i, w);
    load(exp_avg + i, m);
    load(exp_avg_sq + i, v);
    load_combined<T, kDifferences>(row, i, weights, g);
#pragma unroll
    for (int j = 0; j < width; ++j) rule(w[j], m[j], v[j], g[j]);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    store_parameters<T>(row, i, w);
  });
}

// ghat over the last gradient, and live = w.   In float32: reads g0, g+, g-, w, writes g-, live: 24 bytes an element.
template <typename T, bool kDifferences>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) combine_kernel(Table table, Decision decision) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  const C factor = decision.factor ? C(*decision.factor) : C(1);
  const Weights<C> weights = {C(decision.a[row.group]), C(decision.b[row.group]), factor};
  T* last = static_cast<T*>(kDifferences ? row.grad_descent : row.grad);
  if (kDifferences || decision.factor) {
    for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
      C g[width];
      load_combined<T, kDifferences>(row, i, weights, g);
      store(last + i, g);
    });
  }
  restore<T>(row, chunk.index);
}

}  // namespace crsam
