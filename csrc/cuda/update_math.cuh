// The formulas, element by element. Everything else in this folder moves data to them and away.
//
// Multiply-adds are written as fma, so that the result does not depend on what a compiler contracts.
#pragma once

#include <math.h>

#include "chunk_table.h"

namespace crsam {

// Overloads, where C has only names with suffixes.
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

// 13 random bits from those of w and g, by the finalizer of MurmurHash3: the same for w + e and w - e, and others in
// the next step.
__device__ __forceinline__ uint32_t hashed(float w, float g) {
  uint32_t h = __float_as_uint(w) ^ (__float_as_uint(g) * 0x9E3779B1u);
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return (h ^ (h >> 16)) >> 19;
}

// x rounded down after q u is added, where q is the distance of neighbours in T and u the random number in [0, 1): up
// with the probability of the part that is cut off. All but q u + x is exact. Numbers next to 0, which T could round
// more finely, are treated as larger ones.
template <typename T>
__device__ __forceinline__ float dithered(float x, uint32_t random) {
  constexpr uint32_t kDigits = std::is_same_v<T, __half> ? 10 : 7;
  constexpr uint32_t kSmallest = std::is_same_v<T, __half> ? 113 : 8;  // exponents are biased by 127
  uint32_t exponent = __float_as_uint(x) >> 23 & 255;
  exponent = exponent < kSmallest ? kSmallest : exponent;
  const float q = __uint_as_float((exponent - kDigits) << 23), inverse = __uint_as_float((254 + kDigits - exponent) << 23);
  return floorf(fmaf(x, inverse, random * 0x1p-13f)) * q;
}

// d1 = g+ - g-,  d2 = (g+ - g0) + (g- - g0)
template <typename C>
struct Differences {
  C d1, d2;
  __device__ __forceinline__ Differences(C grad, C ascent, C descent)
      : d1(ascent - descent), d2((ascent - grad) + (descent - grad)) {}
};

// The rows of the Gram matrix of (g0, d1, d2), then h with each of them.
template <typename C>
__device__ __forceinline__ void add_products(C (&sums)[9], C grad, C ascent, C descent) {
  const Differences<C> d(grad, ascent, descent);
  sums[0] = fused(grad, grad, sums[0]);
  sums[1] = fused(grad, d.d1, sums[1]);
  sums[2] = fused(grad, d.d2, sums[2]);
  sums[3] = fused(d.d1, d.d1, sums[3]);
  sums[4] = fused(d.d1, d.d2, sums[4]);
  sums[5] = fused(d.d2, d.d2, sums[5]);
}

template <typename C>
__device__ __forceinline__ void add_products_with(C (&sums)[9], C h, C grad, C ascent, C descent) {
  const Differences<C> d(grad, ascent, descent);
  sums[6] = fused(h, grad, sums[6]);
  sums[7] = fused(h, d.d1, sums[7]);
  sums[8] = fused(h, d.d2, sums[8]);
}

// What `coefficients` has decided, for one group. The factor is negative where the group is maximized.
template <typename C>
struct Weights {
  C a, b, factor;
};

// ghat = c (g+ + a d2 + b d1)
template <typename C>
__device__ __forceinline__ C combined(const Weights<C>& weights, C grad, C ascent, C descent) {
  const Differences<C> d(grad, ascent, descent);
  return weights.factor * fused(weights.b, d.d1, fused(weights.a, d.d2, ascent));
}

// torch.optim.SGD
template <typename C>
struct Sgd {
  // The order of a group's options in the array of scalars.
  enum Option { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize, kCount };

  C lr, momentum, undamped, weight_decay;
  bool nesterov;

  Sgd() = default;  // for shared memory
  __device__ __forceinline__ Sgd(const Scalar* options, C step)
      : lr(resolve<C>(options[kLr])),
        momentum(resolve<C>(options[kMomentum])),
        // torch's first momentum is the gradient itself, undamped
        undamped(step > 1 ? resolve_complement<C>(options[kDampening]) : C(1)),
        weight_decay(resolve<C>(options[kWeightDecay])),
        nesterov(options[kNesterov].value != 0) {}

  // w -= lr (g + weight_decay w)
  __device__ __forceinline__ void operator()(C& w, C g) const {
    if (weight_decay != 0) g = fused(weight_decay, w, g);
    w = fused(-lr, g, w);
  }

  // g += weight_decay w,  m = momentum m + (1 - dampening) g,  w -= lr m, or nesterov: w -= lr (g + momentum m)
  __device__ __forceinline__ void operator()(C& w, C& m, C g) const {
    if (weight_decay != 0) g = fused(weight_decay, w, g);
    m = fused(undamped, g, momentum * m);
    w = fused(-lr, nesterov ? fused(momentum, m, g) : m, w);
  }
};

// torch.optim.Adam and AdamW
template <typename C>
struct Adam {
  // The order of a group's options in the array of scalars.
  enum Option { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupledWeightDecay, kMaximize, kCount };

  C beta1, beta2, rest1, rest2, root_correction2, eps, step_size, weight_decay, shrink;

  Adam() = default;  // for shared memory
  __device__ __forceinline__ Adam(const Scalar* options, C step)
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
  // w = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps), and for Adam, before all
  // that, g += weight_decay w instead of the factor on w
  __device__ __forceinline__ void operator()(C& w, C& m, C& v, C g) const {
    if (weight_decay != 0) g = fused(weight_decay, w, g);
    m = fused(beta1, m, rest1 * g);
    v = fused(beta2, v, rest2 * g * g);
    w = fused(-step_size, m / (root(v) / root_correction2 + eps), shrink * w);
  }
};

}  // namespace crsam
