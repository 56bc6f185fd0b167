// The dtypes of rows and their compute dtypes. crsam_ext/precision.py has the same table for Python.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "chunk_table.h"

namespace crsam {

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// The properties of rows of T.
//
// kBlocks: the number of blocks per multiprocessor, for 64 registers per thread, or 128 if a number takes two
// registers. Narrow dtypes have a master copy of w in the compute dtype. For their stochastic rounding, kDigits is the
// number of significand bits after the first one, and kSmallestExponent a lower bound on the exponent as float32 stores
// it, biased by 127.
template <typename T>
struct Precision;

template <>
struct Precision<double> {
  using Compute = double;
  static constexpr Dtype kDtype = Dtype::float64;
  static constexpr int kBlocks = 2;
  __device__ static double narrow(double x) { return x; }
};

template <>
struct Precision<float> {
  using Compute = float;
  static constexpr Dtype kDtype = Dtype::float32;
  static constexpr int kBlocks = 4;
  __device__ static float narrow(float x) { return x; }
};

template <>
struct Precision<__half> {
  using Compute = float;
  static constexpr Dtype kDtype = Dtype::float16;
  static constexpr int kBlocks = 4, kDigits = 10, kSmallestExponent = 113;
  __device__ static __half narrow(float x) { return __float2half_rn(x); }
};

template <>
struct Precision<__nv_bfloat16> {
  using Compute = float;
  static constexpr Dtype kDtype = Dtype::bfloat16;
  static constexpr int kBlocks = 4, kDigits = 7, kSmallestExponent = 8;
  __device__ static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

template <typename T>
using compute_t = typename Precision<T>::Compute;

template <typename T>
constexpr bool kHasMaster = !std::is_same_v<T, compute_t<T>>;

template <typename T>
struct Type {
  using type = T;
};

// Calls `body` with the C++ type of `dtype`.
template <typename Body>
void dispatch(Dtype dtype, Body body) {
  const auto try_types = [&](auto... types) {
    (void)((Precision<typename decltype(types)::type>::kDtype == dtype && (body(types), true)) || ...);
  };
  try_types(Type<double>{}, Type<float>{}, Type<__half>{}, Type<__nv_bfloat16>{});
}

}  // namespace crsam
