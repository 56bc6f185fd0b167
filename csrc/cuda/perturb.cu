// The perturbation.
#include "kernels.h"
#include "launch.cuh"
#include "update_math.cuh"

namespace crsam {

// N elements of what is read.
template <typename C, int N>
struct Elements {
  C g[N], live[N], w[N];
};

// live = w + s g, or w + s w^2 g (ASAM), where w is `saved`.   In float32: reads w, g, writes live: 12 bytes.
// kSave: first saves w.   In float32: reads live, g, writes saved, live: 16 bytes.
//
// For float16 and bfloat16 `saved` is a master that normally rounds to `live`, and holds then more digits of w. Where
// it does not, someone has changed the parameter since the last step, and w is `live`. Writes are rare, so they are
// skipped where nothing has changed.
//
// kStochastic, for these two: the step is made from w as the model has read it, rounded, and its end is rounded up or
// down at random, so that on average the model moves by e, however small that is.
template <typename T, bool kSave, bool kStochastic>
__global__ void __launch_bounds__(kThreads, Precision<T>::kBlocks)
    perturb_kernel(Table table, const double* scale, int sign) {
  using C = compute_t<T>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const Row row = table.rows[chunk.row];
  T* live = pointer<T>(row, kLive);
  C* saved = pointer<C>(row, kSaved);
  const T* grad = pointer<T>(row, kGrads);
  const C s = sign * C(scale[row.group]);

  const auto read = [&](int64_t i, auto width) {
    Elements<C, width> x;
    load(grad + i, x.g);
    if constexpr (kSave) load(live + i, x.live);
    if constexpr (!kSave || kHasMaster<T>) load(saved + i, x.w);
    return x;
  };
  const auto use = [&](int64_t i, auto x) {
    constexpr int kWidth = sizeof(x.w) / sizeof(C);
    if constexpr (kSave) {
      bool changed = !kHasMaster<T>;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if constexpr (kHasMaster<T>) {
          if (widen(Precision<T>::narrow(x.w[j])) == x.live[j]) continue;
          changed = true;
        }
        x.w[j] = x.live[j];
      }
      if (changed) store(saved + i, x.w);
    }
    C moved[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kStochastic) {
        const C rounded = widen(Precision<T>::narrow(x.w[j]));
        moved[j] = dithered<T>(perturbed(rounded, x.g[j], s, row.adaptive), hashed(x.w[j], x.g[j]));
      } else {
        moved[j] = perturbed(x.w[j], x.g[j], s, row.adaptive);
      }
    }
    store(live + i, moved);
  };
  // Of narrow dtypes, whose vectors have twice as many elements, a second vector would not fit into the registers.
  for_each_batch<T, kHasMaster<T> ? 1 : 2>(row, chunk.index, read, use);
}

void launch_perturb(Dtype dtype, const Table& table, const double* scale, int sign, bool stochastic,
                    cudaStream_t stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr bool kRounds = kHasMaster<T>;
    const auto kernel = sign > 0     ? stochastic ? perturb_kernel<T, true, kRounds> : perturb_kernel<T, true, false>
                        : stochastic ? perturb_kernel<T, false, kRounds>
                                     : perturb_kernel<T, false, false>;
    launch(kernel, table.num_chunks, stream, table, scale, sign);
  });
}

}  // namespace crsam
