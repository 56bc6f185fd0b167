#include "perturb.cuh"

namespace crsam {

void launch_perturb(Dtype dtype, const Table& table, const double* scale, int sign, cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = sign > 0 ? perturb_kernel<T, true> : perturb_kernel<T, false>;
    launch(kernel, table.num_chunks, stream, table, scale, sign);
  });
}

}  // namespace crsam
