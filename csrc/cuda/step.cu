#include "step.cuh"

namespace crsam {

void launch_sgd_step(Dtype dtype, const Table& table, const Scalar* options, Decision decision, bool differences,
                     cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = differences ? sgd_step_kernel<T, true> : sgd_step_kernel<T, false>;
    launch(kernel, table.num_chunks, stream, table, options, decision);
  });
}

void launch_adamw_step(Dtype dtype, const Table& table, const Scalar* options, Decision decision, bool differences,
                       cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = differences ? adamw_step_kernel<T, true> : adamw_step_kernel<T, false>;
    launch(kernel, table.num_chunks, stream, table, options, decision);
  });
}

void launch_combine(Dtype dtype, const Table& table, Decision decision, bool differences, cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = differences ? combine_kernel<T, true> : combine_kernel<T, false>;
    launch(kernel, table.num_chunks, stream, table, decision);
  });
}

}  // namespace crsam
