#include "fd_gram.cuh"

namespace crsam {

void launch_fd_gram(Dtype dtype, const Table& table, double* partial, double* gram, cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    launch(fd_gram_kernel<typename decltype(t)::type>, table.num_chunks, stream, table, partial, gram);
  });
}

}  // namespace crsam
