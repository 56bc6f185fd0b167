// The operators as C++ functions; ops.cpp has their schemas.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace crsam {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

at::Tensor grad_norm(at::TensorList grads, at::IntArrayRef groups, int64_t num_groups, const OptionalTensors& weights);

at::Tensor perturbation_scale(const at::Tensor& squared_norm, const at::Tensor& rho, double epsilon);

void perturb_(at::TensorList live, at::TensorList saved, at::TensorList grads, at::IntArrayRef groups,
              const at::Tensor& scale, const c10::List<bool>& adaptive, int64_t sign, bool stochastic);

at::Tensor fd_gram(at::TensorList grad, at::TensorList grad_ascent, at::TensorList grad_descent, at::IntArrayRef groups,
                   int64_t num_groups, const OptionalTensors& weights);

std::tuple<at::Tensor, at::Tensor> coefficients(const std::optional<at::Tensor>& gram, at::TensorList squared_norms,
                                                const at::Tensor& scale, const at::Tensor& alpha,
                                                const at::Tensor& beta, at::Tensor counters, at::TensorList taken,
                                                at::TensorList part, int64_t passes, bool log, at::TensorList losses,
                                                const std::optional<at::Tensor>& grad_scale,
                                                double max_regularizer_ratio, double max_grad_norm);

void sgd_step_(at::TensorList live, at::TensorList saved, at::TensorList momentum_buffer, at::TensorList grad,
               at::TensorList grad_ascent, at::TensorList grad_descent, at::IntArrayRef groups, at::TensorList steps,
               at::ArrayRef<double> options, const OptionalTensors& option_tensors, const at::Tensor& a,
               const at::Tensor& b, const std::optional<at::Tensor>& factor, const at::Tensor& ok);

void adamw_step_(at::TensorList live, at::TensorList saved, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                 at::TensorList grad, at::TensorList grad_ascent, at::TensorList grad_descent, at::IntArrayRef groups,
                 at::TensorList steps, at::ArrayRef<double> options, const OptionalTensors& option_tensors,
                 const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& factor,
                 const at::Tensor& ok);

void combine_(at::TensorList live, at::TensorList saved, at::TensorList grad, at::TensorList grad_ascent,
              at::TensorList grad_descent, at::IntArrayRef groups, const at::Tensor& a, const at::Tensor& b,
              const std::optional<at::Tensor>& factor);

}  // namespace crsam
