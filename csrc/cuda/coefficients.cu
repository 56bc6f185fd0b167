// Kernels that work on a few numbers per group.
#include "kernels.h"
#include "reduce.cuh"

namespace crsam {

// scale = rho / (sqrt(sum of squared norms) + epsilon), per group. One block.
__global__ void __launch_bounds__(kThreads)
    perturbation_scale_kernel(const double* squared_norm, const double* rho, double epsilon, double* scale,
                              int32_t num_groups) {
  __shared__ double total[1];
  double x[1] = {0};
  for (int g = threadIdx.x; g < num_groups; g += kThreads) x[0] += squared_norm[g];
  block_sum(x, total);
  for (int g = threadIdx.x; g < num_groups; g += kThreads) scale[g] = rho[g] / (sqrt(total[0]) + epsilon);
}

// weight = min(decay * grad_scale, max_ratio |g| / (|h| + epsilon)); grad_scale is 1 if null. One block.
__global__ void __launch_bounds__(kThreads)
    direction_weight_kernel(const double* squared_norm, const double* squared_direction, const double* decay,
                            const double* grad_scale, double max_ratio, double epsilon, double* weight,
                            int32_t num_groups) {
  __shared__ double total[2];
  double x[2] = {};
  for (int g = threadIdx.x; g < num_groups; g += kThreads) {
    x[0] += squared_norm[g];
    x[1] += squared_direction[g];
  }
  block_sum(x, total);
  if (threadIdx.x > 0) return;
  const double most = max_ratio * sqrt(total[0]) / (sqrt(total[1]) + epsilon);
  const double decayed = *decay * (grad_scale ? *grad_scale : 1);
  *weight = most > decayed ? decayed : most;  // NaN stays NaN
}

// The squared norm of x g0 + y d1 + z d2 of one group, from its row of the Gram matrix.
__device__ inline double quadratic_form(const double* gram, double x, double y, double z) {
  return x * x * gram[0] + y * y * gram[3] + z * z * gram[5] +
         2 * (x * y * gram[1] + x * z * gram[2] + y * z * gram[4]);
}

// torch.nn.utils.clip_grad_norm_ adds this value to the norm.
constexpr double kClipEpsilon = 1e-6;

// The factor in a = alpha * weight_of(kappa) and b = beta * weight_of(sigma).
__device__ inline double weight_of(Regularizer regularizer, double x) {
  switch (regularizer) {
    case Regularizer::linear: return 1;
    case Regularizer::log: return x > 0 ? 1 / x : 0;
  }
  return 0;
}

// Rounding can make a squared norm slightly negative. NaN stays NaN.
__device__ inline double norm_of(double squared) { return sqrt(squared < 0 ? 0 : squared); }

// Computes a, b, the clip factor and whether the step is finite, from sums over all elements; advances the counters.
// One block, because the inputs are a few numbers per group. See `Operators.coefficients` for the mathematics.
__global__ void __launch_bounds__(kThreads) coefficients_kernel(CoefficientsArguments p) {
  const int groups = p.num_groups;
  const bool measures = p.regularizer != Regularizer::linear;

  // Sums over groups: of all inputs, to detect NaN and Inf; of the last pass's squared norm; of kappa and sigma.
  enum { everything, last_norm, kappa_sum, sigma_sum, num_sums };
  __shared__ double total[num_sums];
  double sums[num_sums] = {};
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    for (int i = 0; i < p.num_norms; ++i) sums[everything] += p.norms[i][g];
    if (p.num_norms > 0) sums[last_norm] += p.norms[p.num_norms - 1][g];
    if (p.gram) {
      const double *gram = p.gram + kGram * g, *h = gram + kProducts;
      for (int k = 0; k < kGram; ++k) sums[everything] += gram[k];
      sums[kappa_sum] += p.scale[g] * h[1];
      sums[sigma_sum] += p.scale[g] * (2 * h[0] + h[2] / 3);
    }
  }
  block_sum(sums, total);
  const bool ok = isfinite(total[everything]);
  const double grad_scale = p.grad_scale ? *p.grad_scale : 1;  // scale of gradients and norms; e is not scaled
  double kappa = total[kappa_sum] / 2 / grad_scale, sigma = total[sigma_sum] / grad_scale;
  if (p.losses[0]) {
    kappa = *p.losses[1] + *p.losses[2] - 2 * *p.losses[0];
    sigma = *p.losses[1] - *p.losses[2];
  }

  // The weights before the cap, and the norms of a d2 + b d1 and of g+ = g0 + d1 / 2 + d2 / 2.
  __shared__ double squared[2];
  double forms[2] = {0, 0};
  const double weight_a = weight_of(p.regularizer, kappa), weight_b = weight_of(p.regularizer, sigma);
  for (int g = threadIdx.x; p.gram && g < groups; g += kThreads) {
    forms[0] += quadratic_form(p.gram + kGram * g, 0, p.beta[g] * weight_b, p.alpha[g] * weight_a);
    forms[1] += quadratic_form(p.gram + kGram * g, 1, 0.5, 0.5);
  }
  block_sum(forms, squared);
  const double ratio = p.gram ? norm_of(squared[0]) / norm_of(squared[1]) : 0;
  const bool capped = ratio > p.max_regularizer_ratio;
  const double cap = capped ? p.max_regularizer_ratio / ratio : 1;

  // The weights after the cap, and the norm of ghat = g0 + (1/2 + b) d1 + (1/2 + a) d2.
  __shared__ double squared_hat[1];
  double form[1] = {0};
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    const double a = p.alpha[g] * weight_a * cap, b = p.beta[g] * weight_b * cap;
    p.pass_weights[g] = a + b;  // a d2 + b d1 = (a + b) (g+ - g0) + (a - b) (g- - g0)
    p.pass_weights[groups + g] = a - b;
    if (p.gram) form[0] += quadratic_form(p.gram + kGram * g, 1, b + 0.5, a + 0.5);
  }
  block_sum(form, squared_hat);

  for (int i = 0; i < p.num_steps; ++i) {
    const StepCounter& steps = p.steps[i];
    if (!ok) break;
    for (int64_t j = threadIdx.x; j < steps.count; j += kThreads) steps.taken[j] += steps.part[j];
  }
  if (threadIdx.x > 0) return;
  const double norm_hat = norm_of(p.gram ? squared_hat[0] : total[last_norm]) / grad_scale;
  const double factor = p.max_grad_norm / (norm_hat + kClipEpsilon);
  const double clip = factor > 1 || isinf(p.max_grad_norm) ? 1 : factor;
  *p.numbers = {clip / grad_scale, kappa, sigma, ratio};
  *p.flags = {ok, capped};
  p.counters[0] += !ok;
  p.counters[1] += ok && measures && kappa <= 0;
  p.counters[2] += ok && measures && sigma <= 0;
  p.counters[3] += ok && capped;
}

std::optional<Regularizer> regularizer_named(std::string_view name) {
  if (name == "linear") return Regularizer::linear;
  if (name == "log") return Regularizer::log;
  return std::nullopt;
}

void launch_perturbation_scale(const double* squared_norm, const double* rho, double epsilon, double* scale,
                               int32_t num_groups, cudaStream_t stream) {
  launch(perturbation_scale_kernel, 1, stream, squared_norm, rho, epsilon, scale, num_groups);
}

void launch_direction_weight(const double* squared_norm, const double* squared_direction, const double* decay,
                             const double* grad_scale, double max_ratio, double epsilon, double* weight,
                             int32_t num_groups, cudaStream_t stream) {
  launch(direction_weight_kernel, 1, stream, squared_norm, squared_direction, decay, grad_scale, max_ratio, epsilon,
         weight, num_groups);
}

void launch_coefficients(const CoefficientsArguments& arguments, cudaStream_t stream) {
  launch(coefficients_kernel, 1, stream, arguments);
}

}  // namespace crsam
