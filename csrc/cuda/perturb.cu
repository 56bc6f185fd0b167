// The perturbation.
#include "kernels.h"
#include "launch.cuh"
#include "update_math.cuh"

namespace crsam {

// Writes live = w + s g, or w + s w^2 g (ASAM), where w is `saved`. In float32: reads w, g, writes live: 12 bytes.
// kSave: first saves w. In float32: reads live, g, writes saved, live: 16 bytes.
//
// For float16 and bfloat16, `saved` is a master. Normally it rounds to `live` and contains more digits of w. If it does
// not round to `live`, the user changed the parameter since the last step, and w is `live`. Such changes are rare, so
// the master is written only if one was found.
//
// kStochastic, for these two dtypes: e is added to w as the model reads it, rounded. The sum is rounded up or down at
// random, so that the model moves by e on average, even if e is very small.
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

  for_each<T>(row, chunk.index, [&](int64_t i, auto width) {
    C w[width], g[width], moved[width];
    load(grad + i, g);
    if constexpr (!kSave) {
      load(saved + i, w);
    } else if constexpr (!kHasMaster<T>) {
      load(live + i, w);
      store(saved + i, w);
    } else {
      C now[width];
      load(saved + i, w);
      load(live + i, now);
      bool changed = false;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (widen(Precision<T>::narrow(w[j])) == now[j]) continue;
        w[j] = now[j];
        changed = true;
      }
      if (changed) store(saved + i, w);
    }
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if constexpr (kStochastic) {
        moved[j] = dithered<T>(perturbed(widen(Precision<T>::narrow(w[j])), g[j], s, row.adaptive), hashed(w[j], g[j]));
      } else {
        moved[j] = perturbed(w[j], g[j], s, row.adaptive);
      }
    }
    store(live + i, moved);
  });
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
