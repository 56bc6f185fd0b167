// The elementwise formulas. All other files in this folder move data to and from them.
//
// Multiply-adds are written as fma, so that the result does not depend on which operations a compiler contracts.
#pragma once

#include <math.h>

#include <string_view>

#include "chunk_table.h"
#include "precision.cuh"

namespace crsam {

// Overloads for functions that have different names in float and double.
__device__ __forceinline__ float fused(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double fused(double x, double y, double z) { return fma(x, y, z); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
// 1 - (1 - x)^t, to full precision for small x.
__device__ __forceinline__ float one_minus_power(float x, float t) { return -expm1f(t * log1pf(-x)); }
__device__ __forceinline__ double one_minus_power(double x, double t) { return -expm1(t * log1p(-x)); }

template <typename C>
__device__ __forceinline__ C resolve(const Scalar& x) {
  return x.single ? C(*x.single) : x.wide ? C(*x.wide) : C(x.value);
}

// 1 - x
template <typename C>
__device__ __forceinline__ C resolve_complement(const Scalar& x) {
  return x.single ? C(1) - C(*x.single) : x.wide ? C(1 - *x.wide) : C(x.complement);
}

// w + s g (SAM) or w + s w^2 g (ASAM)
template <typename C>
__device__ __forceinline__ C perturbed(C w, C g, C scale, bool adaptive) {
  return fused(scale, adaptive ? w * w * g : g, w);
}

// Hashes the bits of w and g to 13 random bits with the finalizer of MurmurHash3. w + e and w - e use the same bits;
// the next step uses others.
__device__ __forceinline__ uint32_t hashed(float w, float g) {
  uint32_t h = __float_as_uint(w) ^ (__float_as_uint(g) * 0x9E3779B1u);
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return (h ^ (h >> 16)) >> 19;
}

// Rounds x stochastically to T: adds q u and rounds down, where q is the distance between neighboring numbers in T, and
// u the random number in [0, 1). The probability of rounding up is the part that is cut off, divided by q. All
// operations except x + q u are exact. Below kSmallestExponent, q stays constant, although T may be finer there.
template <typename T>
__device__ __forceinline__ float dithered(float x, uint32_t random) {
  constexpr uint32_t kDigits = Precision<T>::kDigits, kSmallest = Precision<T>::kSmallestExponent;
  uint32_t exponent = __float_as_uint(x) >> 23 & 255;
  exponent = exponent < kSmallest ? kSmallest : exponent;
  const float q = __uint_as_float((exponent - kDigits) << 23),
              inverse = __uint_as_float((254 + kDigits - exponent) << 23);
  return floorf(fmaf(x, inverse, random * 0x1p-13f)) * q;
}

// g0 and the differences d1 = g+ - g- and d2 = (g+ - g0) + (g- - g0), of element j of the gradients of all passes.
template <typename C>
struct Basis {
  C vectors[kPasses];
  template <int N>
  __device__ __forceinline__ Basis(const C (&g)[kPasses][N], int j)
      : vectors{g[0][j], g[1][j] - g[2][j], (g[1][j] - g[0][j]) + (g[2][j] - g[0][j])} {}
};

// Adds the upper triangle of the Gram matrix of the basis to the sums.
template <typename C, int N>
__device__ __forceinline__ void add_products(C (&sums)[kGram], const C (&g)[kPasses][N], int j) {
  const Basis<C> basis(g, j);
  int k = 0;
#pragma unroll
  for (int x = 0; x < kPasses; ++x) {
#pragma unroll
    for (int y = x; y < kPasses; ++y, ++k) sums[k] = fused(basis.vectors[x], basis.vectors[y], sums[k]);
  }
}

// Adds the products of h with the basis to the sums.
template <typename C, int N>
__device__ __forceinline__ void add_products_with(C (&sums)[kGram], C h, const C (&g)[kPasses][N], int j) {
  const Basis<C> basis(g, j);
#pragma unroll
  for (int x = 0; x < kPasses; ++x) sums[kProducts + x] = fused(h, basis.vectors[x], sums[kProducts + x]);
}

// The results of `coefficients` for one group. The factor is negative if the group is maximized.
template <typename C>
struct Weights {
  C passes[kPasses - 1];  // weights of g_i - g0
  C direction;
  C factor;
};

// Loads the weights of a group. The caller negates the factor if the group is maximized.
template <typename C>
__device__ __forceinline__ Weights<C> weights_of(const Decision& decision, int32_t group, int32_t num_groups) {
  Weights<C> weights;
#pragma unroll
  for (int i = 0; i < kPasses - 1; ++i) weights.passes[i] = C(decision.pass_weights[i * num_groups + group]);
  weights.direction = decision.direction_weight ? C(*decision.direction_weight) : C(0);
  weights.factor = decision.factor ? C(*decision.factor) : C(1);
  return weights;
}

// start + sum of c_i (g_i - g0), of element j of the gradients of all passes.
template <typename C, int N>
__device__ __forceinline__ C with_differences(const Weights<C>& weights, C start, const C (&g)[kPasses][N], int j) {
#pragma unroll
  for (int i = kPasses - 1; i > 0; --i) start = fused(weights.passes[i - 1], g[i][j] - g[0][j], start);
  return start;
}

// ghat = c (g+ + sum of c_i (g_i - g0))
template <typename C, int N>
__device__ __forceinline__ C combined(const Weights<C>& weights, const C (&g)[kPasses][N], int j) {
  return weights.factor * with_differences(weights, g[1][j], g, j);
}

// h = c ((g+ - g0) + sum of c_i (g_i - g0)), the difference of ghat and g0
template <typename C, int N>
__device__ __forceinline__ C direction(const Weights<C>& weights, const C (&g)[kPasses][N], int j) {
  return weights.factor * with_differences(weights, g[1][j] - g[0][j], g, j);
}

// The update rules ---------------------------------------------------------------------------------------------------
//
// A rule defines its name, the number of its state buffers, and the order of a group's options in the array of scalars;
// `maximize` is the first option. It is constructed once per block, from the options of the group, the number of steps
// of the row, and whether the row has state. It is called for every element. If the row has no state, `state` is 0 on
// entry and its new value is discarded.

// torch.optim.SGD. Its state is momentum_buffer; a group without momentum has no state.
template <typename C>
struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr int kBuffers = 1;
  enum Option { kMaximize, kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kOptions };

  C lr, momentum, undamped, weight_decay;
  bool nesterov;

  Sgd() = default;  // for shared memory
  __device__ __forceinline__ Sgd(const Scalar* options, C step, bool has_state)
      : lr(resolve<C>(options[kLr])),
        momentum(has_state ? resolve<C>(options[kMomentum]) : C(0)),
        // In torch, the first momentum is the gradient itself, without dampening.
        undamped(has_state && step > 1 ? resolve_complement<C>(options[kDampening]) : C(1)),
        weight_decay(resolve<C>(options[kWeightDecay])),
        nesterov(options[kNesterov].value != 0) {}

  // g += weight_decay w,  m = momentum m + (1 - dampening) g,  w -= lr m, or with nesterov w -= lr (g + momentum m)
  __device__ __forceinline__ void operator()(C& w, C (&state)[kBuffers], C g) const {
    C& m = state[0];
    if (weight_decay != 0) g = fused(weight_decay, w, g);
    m = fused(undamped, g, momentum * m);
    w = fused(-lr, nesterov ? fused(momentum, m, g) : m, w);
  }
};

// torch.optim.Adam and AdamW. The state is exp_avg and exp_avg_sq.
template <typename C>
struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr int kBuffers = 2;
  enum Option { kMaximize, kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupledWeightDecay, kOptions };

  C beta1, beta2, rest1, rest2, root_correction2, eps, step_size, weight_decay, shrink;

  Adam() = default;  // for shared memory
  __device__ __forceinline__ Adam(const Scalar* options, C step, bool)
      : beta1(resolve<C>(options[kBeta1])),
        beta2(resolve<C>(options[kBeta2])),
        rest1(resolve_complement<C>(options[kBeta1])),
        rest2(resolve_complement<C>(options[kBeta2])),
        root_correction2(root(one_minus_power(rest2, step))),
        eps(resolve<C>(options[kEps])),
        step_size(resolve<C>(options[kLr]) / one_minus_power(rest1, step)),
        weight_decay(resolve<C>(options[kWeightDecay])),
        shrink(1) {
    if (options[kDecoupledWeightDecay].value != 0) {
      shrink = fused(-resolve<C>(options[kLr]), weight_decay, C(1));
      weight_decay = 0;
    }
  }

  // m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
  // w = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
  // Adam first computes g += weight_decay w, and has no factor on w.
  __device__ __forceinline__ void operator()(C& w, C (&state)[kBuffers], C g) const {
    C &m = state[0], &v = state[1];
    if (weight_decay != 0) g = fused(weight_decay, w, g);
    m = fused(beta1, m, rest1 * g);
    v = fused(beta2, v, rest2 * g * g);
    w = fused(-step_size, m / (root(v) / root_correction2 + eps), shrink * w);
  }
};

template <template <typename> typename R>
struct RuleType {
  template <typename C>
  using Rule = R<C>;
};

// Calls `body` with the rule of this name. Returns whether there is one.
template <typename Body>
bool with_rule(std::string_view name, Body body) {
  const auto among = [&](auto... rules) {
    return ((name == decltype(rules)::template Rule<float>::kName && (body(rules), true)) || ...);
  };
  return among(RuleType<Sgd>{}, RuleType<Adam>{});
}

}  // namespace crsam
