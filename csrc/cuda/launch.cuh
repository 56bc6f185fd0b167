// Launches kernels, reads and writes memory, and iterates over chunks.
#pragma once

#include <cuda_runtime.h>
#include <string.h>

#include <type_traits>

#include "chunk_table.h"
#include "precision.cuh"

namespace crsam {

// A number of elements as a type, so that generic lambdas can declare arrays of this size.
template <int N>
struct Width {
  __device__ constexpr operator int() const { return N; }
};

// Launching ----------------------------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // the caller checks the last error
}

// Memory -------------------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T* pointer(const Row& row, int which) {
  return static_cast<T*>(row.pointers[which]);
}

template <int kBytes>
using word_t = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, unsigned long long, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

// The words in which N elements of T are moved. They have at most 128 bits, the widest memory access.
template <typename T, int N>
struct Words {
  static constexpr int kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
  static constexpr int kElements = kBytes / sizeof(T);  // per word
  static constexpr int kCount = N / kElements;
  using type = word_t<kBytes>;
};

// Reads N elements and widens them. Streaming (evict first), because no operator reads an element twice.
template <int N, typename T>
__device__ __forceinline__ void load(const T* from, compute_t<T> (&x)[N]) {
  using W = Words<T, N>;
#pragma unroll
  for (int i = 0; i < W::kCount; ++i) {
    const typename W::type word = __ldcs(reinterpret_cast<const typename W::type*>(from) + i);
    T elements[W::kElements];
    memcpy(elements, &word, sizeof word);
#pragma unroll
    for (int j = 0; j < W::kElements; ++j) x[i * W::kElements + j] = widen(elements[j]);
  }
}

// Narrows N elements to T and writes them.
template <int N, typename T>
__device__ __forceinline__ void store(T* to, const compute_t<T> (&x)[N]) {
  using W = Words<T, N>;
#pragma unroll
  for (int i = 0; i < W::kCount; ++i) {
    T elements[W::kElements];
#pragma unroll
    for (int j = 0; j < W::kElements; ++j) elements[j] = Precision<T>::narrow(x[i * W::kElements + j]);
    typename W::type word;
    memcpy(&word, elements, sizeof word);
    __stcs(reinterpret_cast<typename W::type*>(to) + i, word);
  }
}

// Calls body(i, Width<N>) for all elements i of a chunk, N elements at a time. N is the number of elements of T in 128
// bits if the row is aligned, and 1 otherwise and for the remainder. kUnrolls: whether the compiler may unroll the
// loop, which takes more registers.
template <typename T, bool kUnrolls = true, typename Body>
__device__ __forceinline__ void for_each(const Row& row, int32_t index, Body body) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t begin = index * kChunk;
  const int count = static_cast<int>(row.numel - begin < kChunk ? row.numel - begin : kChunk);
  const int vectorized = row.aligned ? count / kWidth * kWidth : 0;
  if constexpr (kUnrolls) {
    for (int i = threadIdx.x * kWidth; i < vectorized; i += kThreads * kWidth) body(begin + i, Width<kWidth>{});
  } else {
#pragma unroll 1
    for (int i = threadIdx.x * kWidth; i < vectorized; i += kThreads * kWidth) body(begin + i, Width<kWidth>{});
  }
  for (int i = vectorized + threadIdx.x; i < count; i += kThreads) body(begin + i, Width<1>{});
}

}  // namespace crsam
