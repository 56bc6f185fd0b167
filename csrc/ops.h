// The operators as C++ functions; ops.cpp has their schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "column.h"

namespace crsam {

at::Tensor grad_norm(const Column& grads, const Groups& groups, int64_t num_groups, Optional weights);

at::Tensor perturbation_scale(const at::Tensor& squared_norm, const at::Tensor& rho, double epsilon);

void perturb_(const Column& live, const Column& saved, const Column& grads, const Groups& groups,
              const at::Tensor& scale, const std::vector<bool>& adaptive, int64_t sign, bool stochastic);

at::Tensor fd_gram(const Column& grad, const Column& grad_ascent, const Column& grad_descent, const Groups& groups,
                   int64_t num_groups, Optional weights);

std::tuple<at::Tensor, at::Tensor> coefficients(const std::optional<at::Tensor>& gram, const Column& squared_norms,
                                                const at::Tensor& scale, const at::Tensor& alpha,
                                                const at::Tensor& beta, at::Tensor counters, const Column& taken,
                                                const Column& part, int64_t passes, bool log, const Column& losses,
                                                const std::optional<at::Tensor>& grad_scale,
                                                double max_regularizer_ratio, double max_grad_norm);

void sgd_step_(const Column& live, const Column& saved, const Column& momentum_buffer, const Column& grad,
               const Column& grad_ascent, const Column& grad_descent, const Groups& groups, const Column& steps,
               const std::vector<double>& options, Optional option_tensors, const at::Tensor& a,
               const at::Tensor& b, const std::optional<at::Tensor>& factor, const at::Tensor& ok);

void adamw_step_(const Column& live, const Column& saved, const Column& exp_avg, const Column& exp_avg_sq,
                 const Column& grad, const Column& grad_ascent, const Column& grad_descent, const Groups& groups,
                 const Column& steps, const std::vector<double>& options, Optional option_tensors,
                 const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& factor,
                 const at::Tensor& ok);

void combine_(const Column& live, const Column& saved, const Column& grad, const Column& grad_ascent,
              const Column& grad_descent, const Groups& groups, const at::Tensor& a, const at::Tensor& b,
              const std::optional<at::Tensor>& factor);

}  // namespace crsam
