// The launchers for the host. They take pointers, counts and a stream, never tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string_view>

#include "chunk_table.h"

namespace crsam {

// norms [groups] <- squared norm of the gradient, times `live` if `adaptive`; if direction_weight is not null, of the
// gradient plus the weighted direction. partial [chunks] is scratch.
void launch_grad_norm(Dtype dtype, const Table& table, const double* direction_weight, double* partial, double* norms,
                      cudaStream_t stream);

// scale [groups] <- rho / (norm + epsilon)
void launch_perturbation_scale(const double* squared_norm, const double* rho, double epsilon, double* scale,
                               int32_t num_groups, cudaStream_t stream);

// weight (0-dim) <- min(decay * grad_scale, max_ratio |g| / (|h| + epsilon)); grad_scale is 1 if null.
void launch_direction_weight(const double* squared_norm, const double* squared_direction, const double* decay,
                             const double* grad_scale, double max_ratio, double epsilon, double* weight,
                             int32_t num_groups, cudaStream_t stream);

// live <- w + sign e. With sign +1, w is saved first. `stochastic` applies to float16 and bfloat16.
void launch_perturb(Dtype dtype, const Table& table, const double* scale, int sign, bool stochastic,
                    cudaStream_t stream);

// gram [groups, kGram] <- inner products of (g0, d1, d2), then of h with each of them; h is weighted with `saved` if
// `adaptive`. partial [chunks, kGram] is scratch.
void launch_fd_gram(Dtype dtype, const Table& table, double* partial, double* gram, cudaStream_t stream);

// The results of `coefficients`, and the weight of a direction.
struct Decision {
  const double* pass_weights;      // [kPasses - 1, groups]
  const double* factor;            // 0-dim or null
  const bool* ok;                  // 0-dim
  const double* direction_weight;  // 0-dim; null if no direction is added to the single gradient
};

// gram as for launch_fd_gram, and live <- ghat times the factor.
void launch_fd_combine(Dtype dtype, const Table& table, Decision decision, double* partial, double* gram,
                       cudaStream_t stream);

// direction <- (ghat - g0) times the factor; 0 if the step is skipped.
void launch_fd_direction(Dtype dtype, const Table& table, Decision decision, cudaStream_t stream);

struct StepCounter {
  float* taken;       // [count]
  const float* part;  // [count], 1 for parameters that take part in the step
  int64_t count;
};

// The regularizers, in the order of crsam_ext.ops.REGULARIZERS.
enum class Regularizer : int32_t { linear, log };

// Returns nullopt for an unknown name.
std::optional<Regularizer> regularizer_named(std::string_view name);

// The scalar results of `coefficients`, in the order of crsam_ext.ops.Coefficients.
struct Numbers {
  double factor, kappa, sigma, regularizer_ratio;
};
struct Flags {
  bool ok, capped;
};

struct CoefficientsArguments {
  static constexpr int kCounters = 4;  // at most one bucket per dtype on a device

  const double* gram;            // [groups, kGram] or null
  const double* norms[kPasses];  // [groups] each
  const double* scale;           // [groups]
  const double* alpha;           // [groups]
  const double* beta;            // [groups]
  const double* losses[3];       // 0-dim, or null to compute kappa and sigma from the gradients
  const double* grad_scale;      // 0-dim, the scale of all gradients, or null
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

// The sizes of an update rule's arguments.
struct RuleShape {
  int buffers;  // state buffers
  int options;  // options per group
};

// Returns nullopt for an unknown name.
std::optional<RuleShape> shape_of_rule(std::string_view rule);

// Applies an update rule. `all_passes`: whether the gradients of all passes are given; otherwise there is one gradient,
// in kGrads. options: [groups, RuleShape::options], in the order of the rule.
void launch_step(std::string_view rule, Dtype dtype, const Table& table, const Scalar* options, Decision decision,
                 bool all_passes, cudaStream_t stream);

// last gradient <- ghat, live <- w.
void launch_combine(Dtype dtype, const Table& table, Decision decision, bool all_passes, cudaStream_t stream);

}  // namespace crsam
