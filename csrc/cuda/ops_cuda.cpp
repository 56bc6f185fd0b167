// Converts tensors to pointers: checks arguments, selects device and stream, builds the table, launches the kernel.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "kernels.h"
#include "layout.h"
#include "table_cache.h"

namespace crsam {
namespace {

cudaStream_t current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

TableCache& cache() {
  static TableCache* const cache = new TableCache;  // never destroyed: the driver may be unloaded first
  return *cache;
}

template <typename T>
std::string bytes_of(const std::vector<T>& items) {
  return std::string(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
}

// The rows of one call, collected from its lists of tensors, which must outlive this object.
class Rows {
 public:
  // `like` determines the number, lengths, dtype and device of the rows.
  Rows(const char* op, const Column& like, const Argument& argument, const Groups& groups, int64_t num_groups)
      : op(op),
        device(first_of(like, argument).device()),
        type(like[0].scalar_type()),
        numels_(like.numels()),
        groups_(groups),
        num_groups_(num_groups) {
    check_count(groups.numbers().size(), {op, "groups"}, size());
    check_groups(groups, op, num_groups);
    check(like, argument, type);
  }

  // Adds a list of tensors, in the dtype of the rows or in their compute dtype.
  void enter(int pointer, const Column& tensors, const Argument& argument, at::ScalarType of_type) {
    check_count(tensors.size(), argument, size());
    check(tensors, argument, of_type);
    columns_[num_columns_++] = {pointer, tensors.addresses().data()};
  }

  // Adds a list of optional tensors. A tensor without elements counts as missing.
  void enter(int pointer, Optional tensors, const Argument& argument, at::ScalarType of_type) {
    const Column& column = tensors.column;
    check_count(column.size(), argument, size());
    if (!is_as_expected(column, of_type)) {
      for (size_t i = 0; i < size(); ++i) {
        if (column.addresses()[i] != 0) check_tensor(column[i], argument.at(i), device, of_type, numels_[i]);
      }
    }
    columns_[num_columns_++] = {pointer, column.addresses().data()};
  }

  // Adds the tensors that weight the rows (ASAM), if any.
  void enter_weights(int pointer, Optional weights, at::ScalarType of_type) {
    enter(pointer, weights, {op, "weights"}, of_type);
    weights_ = weights.column.addresses().data();
  }

  void enter_adaptive(const std::vector<bool>& adaptive) {
    check_count(adaptive.size(), {op, "adaptive"}, num_groups_);
    adaptive_ = adaptive;
  }

  void enter_steps(const Column& steps) {
    const Argument argument = {op, "steps"};
    check_count(steps.size(), argument, size());
    if (!steps.consists_of(device, at::kFloat) || !all_are(steps.numels(), 1)) {
      for (size_t i = 0; i < size(); ++i) check_tensor(steps[i], argument.at(i), device, at::kFloat, 1);
    }
    steps_ = steps.addresses().data();
  }

  Table table(cudaStream_t stream) const {
    Table table = {};
    for (const int64_t numel : numels_) table.num_chunks += chunks_of(numel);
    TORCH_CHECK(table.num_chunks <= INT32_MAX, op, ": too many elements for one launch");
    table.rows = static_cast<const Row*>(cache().get(key(), device, stream, [&] { return bytes_of(arranged()); }));
    // Lengths and groups rarely change between steps, so this long part is cached separately.
    std::string lengths = "layout";
    append(lengths, &num_groups_, 1);
    append(lengths, numels_.data(), size());
    append(lengths, groups_.numbers().data(), size());
    char* layout = static_cast<char*>(cache().get(std::move(lengths), device, stream, [&] {
      const Layout layout(arranged(), num_groups_);
      return bytes_of(layout.group_begin) + bytes_of(layout.chunks) + bytes_of(layout.tickets);
    }));
    table.num_groups = static_cast<int32_t>(num_groups_);
    table.group_begin = reinterpret_cast<const int64_t*>(layout);
    layout += (num_groups_ + 1) * sizeof(int64_t);
    table.chunks = reinterpret_cast<const Chunk*>(layout);
    layout += table.num_chunks * sizeof(Chunk);
    table.tickets = reinterpret_cast<unsigned*>(layout);
    return table;
  }

  Dtype dtype() const {
    switch (type) {
      case at::kDouble: return Dtype::float64;
      case at::kFloat: return Dtype::float32;
      case at::kHalf: return Dtype::float16;
      case at::kBFloat16: return Dtype::bfloat16;
      default: TORCH_CHECK(false, op, ": rows are ", type, ", not float64, float32, float16 or bfloat16");
    }
  }
  // The dtype of the computation, the masters and the state.
  at::ScalarType compute_type() const { return type == at::kDouble ? at::kDouble : at::kFloat; }
  size_t size() const { return numels_.size(); }
  bool empty() const { return all_are(numels_, 0); }

  const char* const op;
  const at::Device device;
  const at::ScalarType type;

 private:
  struct Entered {
    int pointer;
    const int64_t* addresses;
  };

  static const at::Tensor& first_of(const Column& like, const Argument& argument) {
    TORCH_CHECK(!like.empty(), argument, " is empty");
    TORCH_CHECK(like[0].defined(), argument.at(0), " is None");
    return like[0];
  }

  static bool all_are(const std::vector<int64_t>& numbers, int64_t number) {
    return std::all_of(numbers.begin(), numbers.end(), [=](int64_t x) { return x == number; });
  }

  template <typename T>
  static void append(std::string& bytes, const T* items, size_t count) {
    bytes.append(reinterpret_cast<const char*>(items), count * sizeof(T));
  }

  bool is_as_expected(const Column& tensors, at::ScalarType of_type) const {
    return tensors.consists_of(device, of_type) && tensors.numels() == numels_;
  }

  void check(const Column& tensors, const Argument& argument, at::ScalarType of_type) const {
    if (is_as_expected(tensors, of_type)) return;
    for (size_t i = 0; i < size(); ++i) check_tensor(tensors[i], argument.at(i), device, of_type, numels_[i]);
  }

  // A cache key that determines the content of the rows.
  std::string key() const {
    std::string key = "rows";
    key.reserve((num_columns_ + 4) * (size() + 1) * sizeof(int64_t));
    for (size_t i = 0; i < num_columns_; ++i) {
      key.push_back(static_cast<char>(columns_[i].pointer));
      append(key, columns_[i].addresses, size());
    }
    key.push_back(weights_ != nullptr);
    key.push_back(steps_ != nullptr);
    if (steps_ != nullptr) append(key, steps_, size());
    for (const bool adaptive : adaptive_) key.push_back(adaptive ? 2 : 1);
    append(key, numels_.data(), size());
    append(key, groups_.numbers().data(), size());
    return key;
  }

  std::vector<Row> arranged() const {
    std::vector<Row> rows(size());
    for (size_t i = 0; i < size(); ++i) {
      for (size_t c = 0; c < num_columns_; ++c) {
        rows[i].pointers[columns_[c].pointer] = reinterpret_cast<void*>(columns_[c].addresses[i]);
      }
      if (steps_ != nullptr) rows[i].step = reinterpret_cast<const float*>(steps_[i]);
      rows[i].numel = numels_[i];
      rows[i].group = static_cast<int32_t>(groups_.numbers()[i]);
      rows[i].adaptive = weights_ != nullptr ? weights_[i] != 0 : !adaptive_.empty() && adaptive_[rows[i].group];
    }
    arrange(rows);
    return rows;
  }

  const std::vector<int64_t>& numels_;
  const Groups& groups_;
  const int64_t num_groups_;
  std::array<Entered, kPointers> columns_ = {};
  size_t num_columns_ = 0;
  const int64_t* steps_ = nullptr;
  const int64_t* weights_ = nullptr;
  std::vector<bool> adaptive_;  // for each group; empty if no group is adaptive
};

const double* numbers(const at::Tensor& tensor, const Argument& argument, at::Device device, int64_t count) {
  check_tensor(tensor, argument, device, at::kDouble, count);
  return tensor.const_data_ptr<double>();
}

at::Tensor new_numbers(at::IntArrayRef sizes, at::Device device) {
  return at::empty(sizes, at::TensorOptions(at::kDouble).device(device));
}

const double* number(const std::optional<at::Tensor>& tensor, const Argument& argument, at::Device device) {
  return tensor ? numbers(*tensor, argument, device, 1) : nullptr;
}

const bool* flag(const at::Tensor& tensor, const Argument& argument, at::Device device) {
  check_tensor(tensor, argument, device, at::kBool, 1);
  return tensor.const_data_ptr<bool>();
}

Decision decision_of(const Rows& rows, const at::Tensor& pass_weights, const std::optional<at::Tensor>& factor,
                     const bool* ok, const double* direction_weight = nullptr) {
  return {numbers(pass_weights, {rows.op, "pass_weights"}, rows.device, pass_weights.numel()),
          number(factor, {rows.op, "factor"}, rows.device), ok, direction_weight};
}

// Adds a direction to the rows and returns its weight; returns null if there is no direction.
const double* enter_direction(Rows& rows, const Column& direction, const std::optional<at::Tensor>& weight) {
  if (!weight) return nullptr;
  rows.enter(kDirection, direction, {rows.op, "direction"}, rows.compute_type());
  return number(weight, {rows.op, "direction_weight"}, rows.device);
}

}  // namespace

at::Tensor grad_norm(const Column& grads, const Groups& groups, int64_t num_groups, Optional weights,
                     const Column& direction, const std::optional<at::Tensor>& direction_weight) {
  Rows rows("grad_norm", grads, {"grad_norm", "grads"}, groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  rows.enter(kGrads, grads, {rows.op, "grads"}, rows.type);
  rows.enter_weights(kLive, weights, rows.type);
  const double* weight = enter_direction(rows, direction, direction_weight);
  if (rows.empty()) return at::zeros({num_groups}, at::TensorOptions(at::kDouble).device(rows.device));
  const cudaStream_t stream = current_stream(rows.device);
  const Table table = rows.table(stream);
  const at::Tensor partial = new_numbers({table.num_chunks}, rows.device);
  at::Tensor norms = new_numbers({num_groups}, rows.device);
  launch_grad_norm(rows.dtype(), table, weight, partial.mutable_data_ptr<double>(), norms.mutable_data_ptr<double>(),
                   stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return norms;
}

at::Tensor perturbation_scale(const at::Tensor& squared_norm, const at::Tensor& rho, double epsilon) {
  const char* op = "perturbation_scale";
  const at::Device device = squared_norm.device();
  const c10::DeviceGuard guard(device);
  const int64_t groups = squared_norm.numel();
  at::Tensor scale = new_numbers({groups}, device);
  launch_perturbation_scale(numbers(squared_norm, {op, "squared_norm"}, device, groups),
                            numbers(rho, {op, "rho"}, device, groups), epsilon, scale.mutable_data_ptr<double>(),
                            static_cast<int32_t>(groups), current_stream(device));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return scale;
}

at::Tensor direction_weight(const at::Tensor& squared_norm, const at::Tensor& squared_direction,
                            const at::Tensor& decay, const std::optional<at::Tensor>& grad_scale, double max_ratio,
                            double epsilon) {
  const char* op = "direction_weight";
  const at::Device device = squared_norm.device();
  const c10::DeviceGuard guard(device);
  const int64_t groups = squared_norm.numel();
  at::Tensor weight = new_numbers({}, device);
  launch_direction_weight(numbers(squared_norm, {op, "squared_norm"}, device, groups),
                          numbers(squared_direction, {op, "squared_direction"}, device, groups),
                          numbers(decay, {op, "decay"}, device, 1), number(grad_scale, {op, "grad_scale"}, device),
                          max_ratio, epsilon, weight.mutable_data_ptr<double>(), static_cast<int32_t>(groups),
                          current_stream(device));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return weight;
}

void perturb_(const Column& live, const Column& saved, const Column& grads, const Groups& groups,
              const at::Tensor& scale, const std::vector<bool>& adaptive, int64_t sign, bool stochastic) {
  if (live.empty()) return;
  const char* op = "perturb_";
  TORCH_CHECK(sign == 1 || sign == -1, op, ": sign is ", sign, ", not 1 or -1");
  const int64_t num_groups = scale.numel();
  Rows rows(op, live, {op, "live"}, groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  rows.enter(kLive, live, {op, "live"}, rows.type);
  rows.enter(kSaved, saved, {op, "saved"}, rows.compute_type());
  rows.enter(kGrads, grads, {op, "grads"}, rows.type);
  rows.enter_adaptive(adaptive);
  if (rows.empty()) return;
  const cudaStream_t stream = current_stream(rows.device);
  launch_perturb(rows.dtype(), rows.table(stream), numbers(scale, {op, "scale"}, rows.device, num_groups),
                 static_cast<int>(sign), stochastic, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

namespace {

// Prepares a launch that computes a Gram matrix, calls `launch` and returns the matrix.
template <typename Launch>
at::Tensor gram_of(Rows& rows, const Columns& grads, int64_t num_groups, Optional weights, Launch launch) {
  const auto passes = grads.of(rows.size());
  for (int pass = 0; pass < kPasses; ++pass)
    rows.enter(kGrads + pass, *passes[pass], {rows.op, "grads", pass}, rows.type);
  rows.enter_weights(kSaved, weights, rows.compute_type());
  if (rows.empty()) return at::zeros({num_groups, kGram}, at::TensorOptions(at::kDouble).device(rows.device));
  const cudaStream_t stream = current_stream(rows.device);
  const Table table = rows.table(stream);
  const at::Tensor partial = new_numbers({table.num_chunks, kGram}, rows.device);
  at::Tensor gram = new_numbers({num_groups, kGram}, rows.device);
  launch(table, partial.mutable_data_ptr<double>(), gram.mutable_data_ptr<double>(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return gram;
}

}  // namespace

at::Tensor fd_gram(const Columns& grads, const Groups& groups, int64_t num_groups, Optional weights) {
  const char* op = "fd_gram";
  const auto passes = grads.of(groups.numbers().size());
  check_count(passes.size(), {op, "grads"}, kPasses);
  Rows rows(op, *passes[0], {op, "grads", 0}, groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  return gram_of(rows, grads, num_groups, weights,
                 [&](const Table& table, auto... rest) { launch_fd_gram(rows.dtype(), table, rest...); });
}

at::Tensor fd_combine_(const Column& out, const Columns& grads, const Groups& groups, int64_t num_groups,
                       Optional weights, const at::Tensor& pass_weights, const at::Tensor& factor) {
  const char* op = "fd_combine_";
  check_count(grads.of(groups.numbers().size()).size(), {op, "grads"}, kPasses);
  Rows rows(op, out, {op, "out"}, groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  rows.enter(kLive, out, {op, "out"}, rows.type);
  check_tensor(pass_weights, {op, "pass_weights"}, rows.device, at::kDouble, (kPasses - 1) * num_groups);
  const Decision decision = decision_of(rows, pass_weights, factor, nullptr);
  return gram_of(rows, grads, num_groups, weights,
                 [&](const Table& table, auto... rest) { launch_fd_combine(rows.dtype(), table, decision, rest...); });
}

void fd_direction_(const Column& out, const Columns& grads, const Groups& groups, const at::Tensor& pass_weights,
                   const at::Tensor& factor, const at::Tensor& ok) {
  if (out.empty()) return;
  const char* op = "fd_direction_";
  const auto passes = grads.of(groups.numbers().size());
  check_count(passes.size(), {op, "grads"}, kPasses);
  const int64_t num_groups = pass_weights.numel() / (kPasses - 1);
  Rows rows(op, *passes[0], {op, "grads", 0}, groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  for (int pass = 0; pass < kPasses; ++pass) rows.enter(kGrads + pass, *passes[pass], {op, "grads", pass}, rows.type);
  rows.enter(kDirection, out, {op, "out"}, rows.compute_type());
  const bool* sound = flag(ok, {op, "ok"}, rows.device);
  if (rows.empty()) return;
  const cudaStream_t stream = current_stream(rows.device);
  launch_fd_direction(rows.dtype(), rows.table(stream), decision_of(rows, pass_weights, factor, sound), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> coefficients(
    const std::optional<at::Tensor>& gram, const Column& squared_norms, const at::Tensor& scale,
    const at::Tensor& alpha, const at::Tensor& beta, at::Tensor counters, const Column& taken, const Column& part,
    const std::string& regularizer, const Column& losses, const std::optional<at::Tensor>& grad_scale,
    double max_regularizer_ratio, double max_grad_norm) {
  const char* op = "coefficients";
  using Arguments = CoefficientsArguments;
  const at::Device device = alpha.device();
  const c10::DeviceGuard guard(device);
  const int64_t groups = alpha.numel();
  const auto per_group = [&](const at::Tensor& tensor, const Argument& argument) {
    return numbers(tensor, argument, device, groups);
  };
  TORCH_CHECK(squared_norms.size() <= kPasses, op, ": squared_norms has ", squared_norms.size(), " entries, more than ",
              kPasses);
  TORCH_CHECK(taken.size() <= Arguments::kCounters, op, ": taken has ", taken.size(), " entries, more than ",
              Arguments::kCounters);
  check_count(part.size(), {op, "part"}, taken.size());
  check_tensor(counters, {op, "counters"}, device, at::kLong, 4);
  if (!losses.empty()) check_count(losses.size(), {op, "losses"}, 3);

  Arguments p = {};
  p.gram = gram ? numbers(*gram, {op, "gram"}, device, kGram * groups) : nullptr;
  for (const at::Tensor& norm : squared_norms) {
    p.norms[p.num_norms] = per_group(norm, {op, "squared_norms", p.num_norms});
    ++p.num_norms;
  }
  p.scale = per_group(scale, {op, "scale"});
  p.alpha = per_group(alpha, {op, "alpha"});
  p.beta = per_group(beta, {op, "beta"});
  for (size_t i = 0; i < losses.size(); ++i) {
    p.losses[i] = numbers(losses[i], Argument{op, "losses"}.at(i), device, 1);
  }
  for (size_t i = 0; i < taken.size(); ++i) {
    const int64_t count = taken[i].numel();
    check_tensor(taken[i], Argument{op, "taken"}.at(i), device, at::kFloat, count);
    check_tensor(part[i], Argument{op, "part"}.at(i), device, at::kFloat, count);
    p.steps[p.num_steps++] = {taken[i].mutable_data_ptr<float>(), part[i].const_data_ptr<float>(), count};
  }
  p.grad_scale = grad_scale ? numbers(*grad_scale, {op, "grad_scale"}, device, 1) : nullptr;
  p.counters = counters.mutable_data_ptr<int64_t>();
  p.max_regularizer_ratio = max_regularizer_ratio;
  p.max_grad_norm = max_grad_norm;
  p.num_groups = static_cast<int32_t>(groups);
  const std::optional<Regularizer> known = regularizer_named(regularizer);
  TORCH_CHECK(known, op, ": unknown regularizer ", regularizer);
  p.regularizer = *known;

  at::Tensor pass_weights = new_numbers({kPasses - 1, groups}, device);
  at::Tensor decided = new_numbers({sizeof(Numbers) / sizeof(double)}, device);
  at::Tensor flags = at::empty({sizeof(Flags) / sizeof(bool)}, at::TensorOptions(at::kBool).device(device));
  p.pass_weights = pass_weights.mutable_data_ptr<double>();
  p.numbers = reinterpret_cast<Numbers*>(decided.mutable_data_ptr<double>());
  p.flags = reinterpret_cast<Flags*>(flags.mutable_data_ptr<bool>());
  launch_coefficients(p, current_stream(device));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {pass_weights, decided, flags};
}

namespace {

// Adds the gradients of a step to the rows, for one pass or all passes. Returns whether all passes are given.
bool enter_gradients(Rows& rows, const std::vector<std::shared_ptr<const Column>>& passes) {
  TORCH_CHECK(passes.size() == 1 || passes.size() == kPasses, rows.op, ": grads has ", passes.size(),
              " entries, not 1 or ", kPasses);
  for (size_t pass = 0; pass < passes.size(); ++pass) {
    rows.enter(kGrads + pass, *passes[pass], {rows.op, "grads", static_cast<int64_t>(pass)}, rows.type);
  }
  return passes.size() == kPasses;
}

// Copies the options of all groups to the device.
const Scalar* scalars(const Rows& rows, const std::vector<double>& options, Optional tensors, cudaStream_t stream) {
  const Argument argument = {rows.op, "option_tensors"};
  check_count(tensors.column.size(), argument, options.size());
  std::vector<Scalar> scalars(options.size());
  for (size_t i = 0; i < options.size(); ++i) {
    scalars[i] = {nullptr, nullptr, options[i], 1 - options[i]};
    const at::Tensor& tensor = tensors.column[i];
    if (!tensor.defined()) continue;
    scalars[i].value = scalars[i].complement = 0;
    if (tensor.scalar_type() == at::kDouble) {
      scalars[i].wide = numbers(tensor, argument.at(i), rows.device, 1);
    } else {
      check_tensor(tensor, argument.at(i), rows.device, at::kFloat, 1);
      scalars[i].single = tensor.const_data_ptr<float>();
    }
  }
  const std::string bytes = bytes_of(scalars);
  return static_cast<const Scalar*>(cache().get("options" + bytes, rows.device, stream, [&] { return bytes; }));
}

}  // namespace

void step_(const Column& live, const Column& saved, const Columns& state, const Columns& grads, const Groups& groups,
           const Column& steps, const std::string& rule, const std::vector<double>& options, Optional option_tensors,
           const at::Tensor& pass_weights, const std::optional<at::Tensor>& factor, const at::Tensor& ok,
           const Column& direction, const std::optional<at::Tensor>& direction_weight) {
  if (live.empty()) return;
  const char* op = "step_";
  const std::optional<RuleShape> shape = shape_of_rule(rule);
  TORCH_CHECK(shape, op, ": unknown rule ", rule);
  const int64_t num_groups = pass_weights.numel() / (kPasses - 1);
  Rows rows(op, live, {op, "live"}, groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  rows.enter(kLive, live, {op, "live"}, rows.type);
  rows.enter(kSaved, saved, {op, "saved"}, rows.compute_type());
  const auto buffers = state.of(live.size());
  check_count(buffers.size(), {op, "state"}, shape->buffers);
  for (int b = 0; b < shape->buffers; ++b) {
    rows.enter(kState + b, Optional{*buffers[b]}, {op, "state", b}, rows.compute_type());
  }
  rows.enter_steps(steps);
  const auto passes = grads.of(live.size());
  const bool all_passes = enter_gradients(rows, passes);
  const double* weight = enter_direction(rows, direction, direction_weight);
  const bool* sound = flag(ok, {op, "ok"}, rows.device);
  check_count(options.size(), {op, "options"}, num_groups * shape->options);
  if (rows.empty()) return;
  const cudaStream_t stream = current_stream(rows.device);
  launch_step(rule, rows.dtype(), rows.table(stream), scalars(rows, options, option_tensors, stream),
              decision_of(rows, pass_weights, factor, sound, weight), all_passes, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void combine_(const Column& live, const Column& saved, const Columns& earlier, const Column& last, const Groups& groups,
              const at::Tensor& pass_weights, const std::optional<at::Tensor>& factor, const Column& direction,
              const std::optional<at::Tensor>& direction_weight) {
  if (live.empty()) return;
  const char* op = "combine_";
  Rows rows(op, live, {op, "live"}, groups, pass_weights.numel() / (kPasses - 1));
  const c10::DeviceGuard guard(rows.device);
  rows.enter(kLive, live, {op, "live"}, rows.type);
  rows.enter(kSaved, saved, {op, "saved"}, rows.compute_type());
  auto passes = earlier.of(live.size());
  passes.emplace_back(std::shared_ptr<void>(), &last);
  const bool all_passes = enter_gradients(rows, passes);
  const double* weight = enter_direction(rows, direction, direction_weight);
  if (rows.empty()) return;
  const cudaStream_t stream = current_stream(rows.device);
  launch_combine(rows.dtype(), rows.table(stream), decision_of(rows, pass_weights, factor, nullptr, weight), all_passes,
                 stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace crsam
