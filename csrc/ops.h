// The operators as C++ functions. crsam_ext/backends/fused.py has their schemas, crsam_ext/ops.py documents what they
// compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "column.h"

// Expands X for every operator. Each name is also the name of the schema.
#define CRSAM_FOR_EACH_OPERATOR(X) \
  X(grad_norm)                     \
  X(perturbation_scale)            \
  X(direction_weight)              \
  X(perturb_)                      \
  X(fd_gram)                       \
  X(fd_combine_)                   \
  X(fd_direction_)                 \
  X(coefficients)                  \
  X(step_)                         \
  X(combine_)

namespace crsam {

at::Tensor grad_norm(const Column& grads, const Groups& groups, int64_t num_groups, Optional weights,
                     const Column& direction, const std::optional<at::Tensor>& direction_weight);

at::Tensor perturbation_scale(const at::Tensor& squared_norm, const at::Tensor& rho, double epsilon);

at::Tensor direction_weight(const at::Tensor& squared_norm, const at::Tensor& squared_direction,
                            const at::Tensor& decay, const std::optional<at::Tensor>& grad_scale, double max_ratio,
                            double epsilon);

void perturb_(const Column& live, const Column& saved, const Column& grads, const Groups& groups,
              const at::Tensor& scale, const std::vector<bool>& adaptive, int64_t sign, bool stochastic);

at::Tensor fd_gram(const Columns& grads, const Groups& groups, int64_t num_groups, Optional weights);

at::Tensor fd_combine_(const Column& out, const Columns& grads, const Groups& groups, int64_t num_groups,
                       Optional weights, const at::Tensor& pass_weights, const at::Tensor& factor);

void fd_direction_(const Column& out, const Columns& grads, const Groups& groups, const at::Tensor& pass_weights,
                   const at::Tensor& factor, const at::Tensor& ok);

// Returns pass_weights, numbers and flags.
std::tuple<at::Tensor, at::Tensor, at::Tensor> coefficients(
    const std::optional<at::Tensor>& gram, const Column& squared_norms, const at::Tensor& scale,
    const at::Tensor& alpha, const at::Tensor& beta, at::Tensor counters, const Column& taken, const Column& part,
    const std::string& regularizer, const Column& losses, const std::optional<at::Tensor>& grad_scale,
    double max_regularizer_ratio, double max_grad_norm);

void step_(const Column& live, const Column& saved, const Columns& state, const Columns& grads, const Groups& groups,
           const Column& steps, const std::string& rule, const std::vector<double>& options, Optional option_tensors,
           const at::Tensor& pass_weights, const std::optional<at::Tensor>& factor, const at::Tensor& ok,
           const Column& direction, const std::optional<at::Tensor>& direction_weight);

void combine_(const Column& live, const Column& saved, const Columns& earlier, const Column& last, const Groups& groups,
              const at::Tensor& pass_weights, const std::optional<at::Tensor>& factor, const Column& direction,
              const std::optional<at::Tensor>& direction_weight);

}  // namespace crsam
