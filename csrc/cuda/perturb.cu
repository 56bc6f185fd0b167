#include "perturb.cuh"

namespace crsam {

void launch_perturb(Dtype dtype, const Table& table, const double* scale, int sign, bool stochastic,
                    cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr bool kRounds = !std::is_same_v<T, compute_t<T>>;
    const auto kernel = sign > 0 ? stochastic ? perturb_kernel<T, true, kRounds> : perturb_kernel<T, true, false>
                        : stochastic ? perturb_kernel<T, false, kRounds> : perturb_kernel<T, false, false>;
    launch(kernel, table.num_chunks, stream, table, scale, sign);
  });
}

}  // namespace crsam
