// Launchers that launch nothing. Linked with csrc/cuda/ops_cuda.cpp, they give operators that only do the host work.
#include "kernels.h"

namespace crsam {

void launch_grad_norm(Dtype, const Table&, const double*, double*, double*, cudaStream_t) {}
void launch_perturbation_scale(const double*, const double*, double, double*, int32_t, cudaStream_t) {}
void launch_direction_weight(const double*, const double*, const double*, const double*, double, double, double*,
                             int32_t, cudaStream_t) {}
void launch_perturb(Dtype, const Table&, const double*, int, bool, cudaStream_t) {}
void launch_fd_gram(Dtype, const Table&, double*, double*, cudaStream_t) {}
void launch_fd_combine(Dtype, const Table&, Decision, double*, double*, cudaStream_t) {}
void launch_fd_direction(Dtype, const Table&, Decision, cudaStream_t) {}
// Report a finite step, so that parameters enter the optimizer's state as in training.
void launch_coefficients(const CoefficientsArguments& arguments, cudaStream_t) { arguments.flags->ok = true; }
std::optional<Regularizer> regularizer_named(std::string_view) { return Regularizer::linear; }
std::optional<RuleShape> shape_of_rule(std::string_view rule) {
  return rule == "sgd" ? RuleShape{1, 6} : RuleShape{2, 7};
}
void launch_step(std::string_view, Dtype, const Table&, const Scalar*, Decision, bool, cudaStream_t) {}
void launch_combine(Dtype, const Table&, Decision, bool, cudaStream_t) {}

}  // namespace crsam
