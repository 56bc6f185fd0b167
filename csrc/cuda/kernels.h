// The launchers, as the host sees them: pointers, counts and a stream, never tensors.
#pragma once

#include <cuda_runtime_api.h>

#include "chunk_table.h"

namespace crsam {

// norms [groups] <- squared norm of the gradient, times `live` where `adaptive`. partial [chunks] is scratch.
void launch_grad_norm(Dtype dtype, const Table& table, double* partial, double* norms, cudaStream_t stream);

// scale [groups] <- rho / (norm + epsilon)
void launch_perturbation_scale(const double* squared_norm, const double* rho, double epsilon, double* scale,
                               int32_t num_groups, cudaStream_t stream);

// live <- w + sign e. With sign +1, w is saved first. Float16 and bfloat16 may be rounded stochastically.
void launch_perturb(Dtype dtype, const Table& table, const double* scale, int sign, bool stochastic,
                    cudaStream_t stream);

// gram [groups, 9] <- inner products of (g0, d1, d2), and with h, which weighs with `saved` where `adaptive`.
// partial [chunks, 9] is scratch.
void launch_fd_gram(Dtype dtype, const Table& table, double* partial, double* gram, cudaStream_t stream);

struct StepCounter {
  float* taken;       // [count]
  const float* part;  // [count], 1 for those that take part
  int64_t count;
};

struct CoefficientsArguments {
  static constexpr int kNorms = 3;     // passes
  static constexpr int kCounters = 4;  // dtypes of a device

  const double* gram;             // [groups, 9] or null
  const double* norms[kNorms];    // [groups] each
  const double* scale;            // [groups]
  const double* alpha;            // [groups]
  const double* beta;             // [groups]
  const double* losses[3];        // 0-dim, or null: kappa and sigma come from the gradients
  const double* grad_scale;       // 0-dim, what all gradients were multiplied with, or null
  StepCounter steps[kCounters];
  int64_t* counters;              // [4]
  double* values;                 // a [groups], b [groups], factor, kappa, sigma, ratio
  bool* flags;                    // ok, capped
  double max_regularizer_ratio;
  double max_grad_norm;           // infinite for no clipping
  int32_t num_groups, num_norms, num_steps, passes;
  bool log;
};

void launch_coefficients(const CoefficientsArguments& arguments, cudaStream_t stream);

// What `coefficients` has decided: [groups] each, the factor 0-dim or null, and whether the step is sound.
struct Decision {
  const double* a;
  const double* b;
  const double* factor;
  const bool* ok;
};

constexpr int kSgdOptions = 6;
constexpr int kAdamOptions = 7;

// `differences`: whether all three gradients are given; with one only, it is `grad`.
// options: [groups, kSgdOptions] and [groups, kAdamOptions], in the order of `Sgd` and `Adam`.
void launch_sgd_step(Dtype dtype, const Table& table, const Scalar* options, Decision decision, bool differences,
                     cudaStream_t stream);
void launch_adamw_step(Dtype dtype, const Table& table, const Scalar* options, Decision decision, bool differences,
                       cudaStream_t stream);

// ghat over the last gradient, w into live.
void launch_combine(Dtype dtype, const Table& table, Decision decision, bool differences, cudaStream_t stream);

}  // namespace crsam
