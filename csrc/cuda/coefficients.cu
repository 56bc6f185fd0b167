#include "coefficients.cuh"

namespace crsam {

void launch_perturbation_scale(const double* squared_norm, const double* rho, double epsilon, double* scale,
                               int32_t num_groups, cudaStream_t stream) {
  launch(perturbation_scale_kernel, 1, stream, squared_norm, rho, epsilon, scale, num_groups);
}

void launch_coefficients(const CoefficientsArguments& arguments, cudaStream_t stream) {
  launch(coefficients_kernel, 1, stream, arguments);
}

}  // namespace crsam
