// Runs every kernel once on small rows, with a separate allocation for each array, for the sanitizers; compares the
// sums with float64.
//
//     program [order]
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_runtime.h"
#include "kernels.h"
#include "layout.h"

namespace {

#ifdef EMU_PARALLEL  // few blocks, because ThreadSanitizer takes a millisecond to create a fiber
const std::vector<int64_t> kLengths = {crsam::kChunk + 3, 3};
#else
const std::vector<int64_t> kLengths = {1, 3, crsam::kChunk + 4097, 300};
#endif
constexpr int kNumGroups = 3;  // one of them empty

float narrow(float x, float) { return x; }
__nv_bfloat16 narrow(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }
double widen(float x) { return x; }
double widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Arrays without padding at the end, for AddressSanitizer.
struct Memory {
  std::vector<std::unique_ptr<char[]>> blocks;
  template <class T>
  T* make(int64_t count, auto value) {
    blocks.emplace_back(new char[count * sizeof(T)]);
    T* array = reinterpret_cast<T*>(blocks.back().get());
    for (int64_t i = 0; i < count; ++i) array[i] = value(i);
    return array;
  }
};

int failures = 0;
void expect_near(double found, double expected, const char* what) {
  if (std::abs(found - expected) <= 1e-5 * (std::abs(expected) + 1)) return;
  std::printf("%s is %.9g, not %.9g\n", what, found, expected);
  ++failures;
}

template <class T>
void run(crsam::Dtype dtype) {
  using namespace crsam;
  Memory memory;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto some = [&](int64_t) { return narrow(normal(random), T{}); };
  const auto wide = [&](int64_t) { return std::abs(normal(random)); };
  const auto zero = [](int64_t) { return 0; };

  std::vector<Row> rows;
  for (size_t i = 0; i < kLengths.size(); ++i) {
    const int64_t n = kLengths[i];
    Row row = {};
    row.pointers[kLive] = memory.make<T>(n, some);
    row.pointers[kSaved] = memory.make<float>(n, wide);
    row.pointers[kDirection] = memory.make<float>(n, wide);
    for (int b = 0; b < kBuffers; ++b) row.pointers[kState + b] = memory.make<float>(n, wide);
    for (int pass = 0; pass < kPasses; ++pass) row.pointers[kGrads + pass] = memory.make<T>(n, some);
    row.step = memory.make<float>(1, [](int64_t) { return 2.0f; });
    row.numel = n;
    row.group = i % 2;
    rows.push_back(row);
  }
  arrange(rows);
  Layout layout(rows, kNumGroups);
  const Table table = {rows.data(),           layout.chunks.data(),          layout.group_begin.data(),
                       layout.tickets.data(), int64_t(layout.chunks.size()), kNumGroups};

  double* partial = memory.make<double>(table.num_chunks * 9, zero);
  double* norms = memory.make<double>(kNumGroups, [](int64_t) { return -1; });
  double* gram = memory.make<double>(kNumGroups * 9, [](int64_t) { return -1; });
  double* half = memory.make<double>(kNumGroups, [](int64_t) { return 0.5; });
  double* scale = memory.make<double>(kNumGroups, zero);
  for (int repetition = 0; repetition < 2; ++repetition) {  // in the second one, the tickets must be 0 again
    launch_grad_norm(dtype, table, half, partial, norms, nullptr);
    launch_grad_norm(dtype, table, nullptr, partial, norms, nullptr);
    launch_fd_gram(dtype, table, partial, gram, nullptr);
    double expected[kNumGroups][2] = {};
    for (const Row& row : rows) {
      const auto grad = [&](int pass, int64_t i) { return widen(static_cast<T*>(row.pointers[kGrads + pass])[i]); };
      for (int64_t i = 0; i < row.numel; ++i) {
        const double g0 = grad(0, i), d1 = grad(1, i) - grad(2, i);
        expected[row.group][0] += g0 * g0;
        expected[row.group][1] += d1 * d1;
      }
    }
    for (int g = 0; g < kNumGroups; ++g) {
      expect_near(norms[g], expected[g][0], "norm");
      expect_near(gram[9 * g], expected[g][0], "gram[0]");
      expect_near(gram[9 * g + 3], expected[g][1], "gram[3]");
    }
  }

  launch_perturbation_scale(norms, half, 1e-12, scale, kNumGroups, nullptr);
  expect_near(scale[0], 0.5 / std::sqrt(norms[0] + norms[1]), "scale");
  launch_perturb(dtype, table, scale, +1, false, nullptr);
  launch_perturb(dtype, table, scale, -1, true, nullptr);

  CoefficientsArguments p = {};
  p.gram = gram;
  p.norms[0] = norms;
  p.num_norms = 1;
  p.scale = scale;
  p.alpha = p.beta = half;
  p.steps[0] = {memory.make<float>(300, zero), memory.make<float>(300, [](int64_t) { return 1; }), 300};
  p.num_steps = 1;
  p.counters = memory.make<int64_t>(4, zero);
  p.pass_weights = memory.make<double>((kPasses - 1) * kNumGroups, zero);
  p.numbers = memory.make<Numbers>(1, [](int64_t) { return Numbers{}; });
  p.flags = memory.make<Flags>(1, [](int64_t) { return Flags{}; });
  p.max_regularizer_ratio = 1;
  p.max_grad_norm = 1;
  p.num_groups = kNumGroups;
  p.regularizer = Regularizer::log;
  launch_coefficients(p, nullptr);
  expect_near(p.flags->ok, 1, "ok");
  expect_near(p.steps[0].taken[299], 1, "steps");

  const Scalar number = {nullptr, nullptr, 0.25, 0.75};
  const Decision decision = {p.pass_weights, &p.numbers->factor, &p.flags->ok, half};
  const bool never = false;
  const Decision skip = {p.pass_weights, nullptr, &never, nullptr};
  const auto update = [&](const Table& t) {
    for (const bool all_passes : {true, false}) {
      for (const char* rule : {"sgd", "adam"}) {
        const std::vector<Scalar> options(kNumGroups * shape_of_rule(rule)->options, number);
        launch_step(rule, dtype, t, options.data(), decision, all_passes, nullptr);
        launch_step(rule, dtype, t, options.data(), skip, all_passes, nullptr);
      }
      launch_combine(dtype, t, decision, all_passes, nullptr);
    }
    launch_fd_direction(dtype, t, decision, nullptr);
    launch_fd_direction(dtype, t, skip, nullptr);
  };
  update(table);

  // Tests 64-bit offsets with a row of 2^33 elements, of which only the last chunk exists.
  const int64_t before = int64_t(1) << 33, n = 1027;
  Row row = {};
  const auto shifted = [&](auto* array) { return array - before; };
  row.pointers[kLive] = shifted(memory.make<T>(n, some));
  row.pointers[kSaved] = shifted(memory.make<float>(n, wide));
  row.pointers[kDirection] = shifted(memory.make<float>(n, wide));
  for (int b = 0; b < kBuffers; ++b) row.pointers[kState + b] = shifted(memory.make<float>(n, wide));
  T* grad = memory.make<T>(n, some);
  row.pointers[kGrads] = shifted(grad);
  for (int pass = 1; pass < kPasses; ++pass) row.pointers[kGrads + pass] = shifted(memory.make<T>(n, some));
  row.step = rows[0].step;
  row.numel = before + n;
  std::vector<Row> one = {row};
  arrange(one);
  const Chunk last = {0, int32_t(before / kChunk)};
  const int64_t group_begin[] = {0, 1, 1, 1};
  const Table far = {one.data(), &last, group_begin, layout.tickets.data(), 1, kNumGroups};
  launch_grad_norm(dtype, far, nullptr, partial, norms, nullptr);
  double expected = 0;
  for (int64_t i = 0; i < n; ++i) expected += widen(grad[i]) * widen(grad[i]);
  expect_near(norms[0], expected, "norm of the last chunk");
  launch_fd_gram(dtype, far, partial, gram, nullptr);
  expect_near(gram[0], expected, "gram[0] of the last chunk");
  launch_perturb(dtype, far, scale, +1, true, nullptr);
  launch_perturb(dtype, far, scale, -1, false, nullptr);
  update(far);
}

}  // namespace

int main(int argc, char** argv) {
  emu::order = argc > 1 ? std::atoi(argv[1]) : 0;
  run<float>(crsam::Dtype::float32);
#ifndef EMU_PARALLEL
  run<__nv_bfloat16>(crsam::Dtype::bfloat16);
#endif
  return failures > 0;
}
