// The update kernels: one for each rule of update_math.cuh, and one that only combines gradients for other optimizers.
#include "kernels.h"
#include "launch.cuh"
#include "update_math.cuh"

namespace crsam {

// Values for all threads of a block, computed by the first thread.
template <typename C, typename Rule>
struct Shared {
  Weights<C> weights;
  Rule rule;
  bool ok;

  __device__ __forceinline__ void decide(const Row& row, const Table& table, const Scalar* options,
                                         const Decision& decision) {
    if (threadIdx.x == 0) {
      const Scalar* own = options + row.group * Rule::kOptions;
      weights = weights_of<C>(decision, row.group, table.num_groups);
      if (own[Rule::kMaximize].value != 0) weights.factor = -weights.factor;
      rule = Rule(own, C(*row.step), row.pointers[kState] != nullptr);
      ok = *decision.ok;
    }
    __syncthreads();
  }
};

// The inputs of ghat: one gradient, one gradient and a direction, or the gradients of all passes.
enum Given { kOne, kOneAndDirection, kAll };

// Computes N elements of ghat, times the factor.
template <typename T, Given kGiven, int N>
__device__ __forceinline__ void load_combined(const Row& row, int64_t i, const Weights<compute_t<T>>& weights,
                                              compute_t<T> (&ghat)[N]) {
  using C = compute_t<T>;
  if constexpr (kGiven == kAll) {
    C g[kPasses][N];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) load(pointer<const T>(row, kGrads + pass) + i, g[pass]);
#pragma unroll
    for (int j = 0; j < N; ++j) ghat[j] = combined(weights, g, j);
  } else {
    load(pointer<const T>(row, kGrads) + i, ghat);
    if constexpr (kGiven == kOneAndDirection) {
      C h[N];
      load(pointer<const C>(row, kDirection) + i, h);
#pragma unroll
      for (int j = 0; j < N; ++j) ghat[j] = fused(weights.direction, h[j], ghat[j]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) ghat[j] *= weights.factor;
  }
}

// Restores live = w, for a skipped step; nothing else changes.
template <typename T>
__device__ __forceinline__ void restore(const Row& row, int32_t index) {
  if (row.pointers[kLive] == row.pointers[kSaved]) return;
  for_each<T>(row, index, [&](int64_t i, auto width) {
    compute_t<T> w[width];
    load(pointer<const compute_t<T>>(row, kSaved) + i, w);
    store(pointer<T>(row, kLive) + i, w);
  });
}

// Applies an update rule. In float32, with three gradients and n state buffers: reads w, the state and the gradients,
// writes the state and live: 20 + 8 n bytes per element.
template <typename T, template <typename> typename RuleOf, Given kGiven>
__global__ void __launch_bounds__(kThreads, Precision<T>::kBlocks)
    step_kernel(Table table, const Scalar* options, Decision decision) {
  using C = compute_t<T>;
  using Rule = RuleOf<C>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  __shared__ Shared<C, Rule> shared;
  shared.decide(row, table, options, decision);
  if (!shared.ok) return restore<T>(row, chunk.index);

  const Weights<C> weights = shared.weights;
  const Rule rule = shared.rule;
  const bool has_state = row.pointers[kState] != nullptr;
  // If unrolled, the fourth stream would not fit into the registers.
  for_each<T, kGiven != kOneAndDirection>(row, chunk.index, [&](int64_t i, auto width) {
    C w[width], state[Rule::kBuffers][width] = {}, g[width];
    load(pointer<const C>(row, kSaved) + i, w);
    if (has_state) {  // load it before the gradients: a load after their first use would stall
#pragma unroll
      for (int b = 0; b < Rule::kBuffers; ++b) load(pointer<const C>(row, kState + b) + i, state[b]);
    }
    load_combined<T, kGiven>(row, i, weights, g);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      C own[Rule::kBuffers];
#pragma unroll
      for (int b = 0; b < Rule::kBuffers; ++b) own[b] = state[b][j];
      rule(w[j], own, g[j]);
#pragma unroll
      for (int b = 0; b < Rule::kBuffers; ++b) state[b][j] = own[b];
    }
    if (has_state) {
#pragma unroll
      for (int b = 0; b < Rule::kBuffers; ++b) store(pointer<C>(row, kState + b) + i, state[b]);
    }
    store(pointer<T>(row, kLive) + i, w);
    if constexpr (kHasMaster<T>) store(pointer<C>(row, kSaved) + i, w);
  });
}

// Writes ghat over the last gradient, and restores live = w.
// In float32: reads g0, g+, g-, w, writes g-, live: 24 bytes per element.
template <typename T, Given kGiven>
__global__ void __launch_bounds__(kThreads, Precision<T>::kBlocks) combine_kernel(Table table, Decision decision) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  const Weights<C> weights = weights_of<C>(decision, row.group, table.num_groups);
  T* last = pointer<T>(row, kGiven == kAll ? kGrads + kPasses - 1 : kGrads);
  if (kGiven != kOne || decision.factor) {
    for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
      C g[width];
      load_combined<T, kGiven>(row, i, weights, g);
      store(last + i, g);
    });
  }
  restore<T>(row, chunk.index);
}

// Writes h = ghat - g0, times the factor; 0 if the step is skipped.
// In float32: reads g0, g+, g-, writes the direction: 16 bytes per element.
template <typename T>
__global__ void __launch_bounds__(kThreads, Precision<T>::kBlocks) fd_direction_kernel(Table table, Decision decision) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  const Weights<C> weights = weights_of<C>(decision, row.group, table.num_groups);
  if (!*decision.ok) {
    return for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
      const C nothing[width] = {};
      store(pointer<C>(row, kDirection) + i, nothing);
    });
  }
  for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
    C g[kPasses][width], h[width];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) load(pointer<const T>(row, kGrads + pass) + i, g[pass]);
#pragma unroll
    for (int j = 0; j < width; ++j) h[j] = direction(weights, g, j);
    store(pointer<C>(row, kDirection) + i, h);
  });
}

std::optional<RuleShape> shape_of_rule(std::string_view rule) {
  std::optional<RuleShape> shape;
  with_rule(rule, [&](auto type) {
    using Rule = typename decltype(type)::template Rule<float>;
    static_assert(Rule::kBuffers <= kBuffers && Rule::kMaximize == 0, "the rule does not fit into a row");
    shape = RuleShape{Rule::kBuffers, Rule::kOptions};
  });
  return shape;
}

void launch_step(std::string_view rule, Dtype dtype, const Table& table, const Scalar* options, Decision decision,
                 bool all_passes, cudaStream_t stream) {
  with_rule(rule, [&](auto type) {
    dispatch(dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      using R = decltype(type);
      const auto kernel = all_passes                  ? step_kernel<T, R::template Rule, kAll>
                          : decision.direction_weight ? step_kernel<T, R::template Rule, kOneAndDirection>
                                                      : step_kernel<T, R::template Rule, kOne>;
      launch(kernel, table.num_chunks, stream, table, options, decision);
    });
  });
}

void launch_fd_direction(Dtype dtype, const Table& table, Decision decision, cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    launch(fd_direction_kernel<typename decltype(t)::type>, table.num_chunks, stream, table, decision);
  });
}

void launch_combine(Dtype dtype, const Table& table, Decision decision, bool all_passes, cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = all_passes                  ? combine_kernel<T, kAll>
                        : decision.direction_weight ? combine_kernel<T, kOneAndDirection>
                                                    : combine_kernel<T, kOne>;
    launch(kernel, table.num_chunks, stream, table, decision);
  });
}

}  // namespace crsam
