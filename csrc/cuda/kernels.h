// The launchers, as the host sees them: pointers, counts and a stream, never tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string_view>

#include "chunk_table.h"

namespace crsam {

// norms [groups] <- squared norm of the gradient, times `live` where `adaptive`, or, where there is a weight, with the
// weighted direction added to it. partial [chunks] is scratch.
void launch_grad_norm(Dtype dtype, const Table& table, const double* direction_weight, double* partial, double* norms,
                      cudaStream_t stream);

// scale [groups] <- rho / (norm + epsilon)
void launch_perturbation_scale(const double* squared_norm, const double* rho, double epsilon, double* scale,
                               int32_t num_groups, cudaStream_t stream);

// weight (0-dim) <- min(decay, max_ratio |g| / (|h| + epsilon)), times the scale of g where there is one.
void launch_direction_weight(const double* squared_norm, const double* squared_direction, const double* decay,
                             const double* grad_scale, double max_ratio, double epsilon, double* weight,
                             int32_t num_groups, cudaStream_t stream);

// live <- w + sign e. With sign +1, w is saved first. Float16 and bfloat16 may be rounded stochastically.
void launch_perturb(Dtype dtype, const Table& table, const double* scale, int sign, bool stochastic,
                    cudaStream_t stream);

// gram [groups, kGram] <- inner products of (g0, d1, d2), and with h, which weighs with `saved` where `adaptive`.
// partial [chunks, kGram] is scratch.
void launch_fd_gram(Dtype dtype, const Table& table, double* partial, double* gram, cudaStream_t stream);

// What `coefficients` has decided.
struct Decision {
  const double* pass_weights;      // [kPasses - 1, groups]
  const double* factor;            // 0-dim or null
  const bool* ok;                  // 0-dim
  const double* direction_weight;  // 0-dim, or null: of what is added where there is one gradient
};

// Likewise, and live <- ghat times the factor.
void launch_fd_combine(Dtype dtype, const Table& table, Decision decision, double* partial, double* gram,
                       cudaStream_t stream);

// direction <- what ghat adds to g0, times the factor; 0 in a step that is skipped.
void launch_fd_direction(Dtype dtype, const Table& table, Decision decision, cudaStream_t stream);

struct StepCounter {
  float* taken;       // [count]
  const float* part;  // [count], 1 for those that take part
  int64_t count;
};

// The regularizers, in the order of crsam_ext.ops.REGULARIZERS.
enum class Regularizer : int32_t { linear, log };

// Nothing for a name that no regularizer has.
std::optional<Regularizer> regularizer_named(std::string_view name);

// The results of `coefficients` that are no vectors, in the order of crsam_ext.ops.Coefficients.
struct Numbers {
  double factor, kappa, sigma, regularizer_ratio;
};
struct Flags {
  bool ok, capped;
};

struct CoefficientsArguments {
  static constexpr int kCounters = 4;  // dtypes of a device

  const double* gram;            // [groups, kGram] or null
  const double* norms[kPasses];  // [groups] each
  const double* scale;           // [groups]
  const double* alpha;           // [groups]
  const double* beta;            // [groups]
  const double* losses[3];       // 0-dim, or null: kappa and sigma come from the gradients
  const double* grad_scale;      // 0-dim, what all gradients were multiplied with, or null
  StepCounter steps[kCounters];
  int64_t* counters;  // [4]
  double max_regularizer_ratio;
  double max_grad_norm;  // infinite for no clipping
  int32_t num_groups, num_norms, num_steps;
  Regularizer regularizer;

  // The results.
  double* pass_weights;  // [kPasses - 1, groups]
  Numbers* numbers;
  Flags* flags;
};

void launch_coefficients(const CoefficientsArguments& arguments, cudaStream_t stream);

// What an update rule asks of its caller.
struct RuleShape {
  int buffers;  // of its state
  int options;  // of a group
};

// Nothing for a name that no rule has.
std::optional<RuleShape> shape_of_rule(std::string_view rule);

// The step of a rule. `all_passes`: whether the gradients of all passes are given; else there is one, in kGrads.
// options: [groups, RuleShape::options], in the order of the rule.
void launch_step(std::string_view rule, Dtype dtype, const Table& table, const Scalar* options, Decision decision,
                 bool all_passes, cudaStream_t stream);

// ghat over the last gradient, w into live.
void launch_combine(Dtype dtype, const Table& table, Decision decision, bool all_passes, cudaStream_t stream);

}  // namespace crsam
