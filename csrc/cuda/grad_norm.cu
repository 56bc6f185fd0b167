#include "grad_norm.cuh"

namespace crsam {

void launch_grad_norm(Dtype dtype, const Table& table, double* partial, double* norms, cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    launch(grad_norm_kernel<typename decltype(t)::type>, table.num_chunks, stream, table, partial, norms);
  });
}

}  // namespace crsam
