// From tensors to pointers: checks, device, stream, table, launch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "kernels.h"
#include "layout.h"
#include "table_cache.h"

#ifndef CRSAM_DISPATCH_KEY  // tests/cuda_on_cpu runs this file on a CPU
#define CRSAM_DISPATCH_KEY CUDA
#endif

namespace crsam {
namespace {

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Dtype::float64;
    case at::kFloat: return Dtype::float32;
    case at::kHalf: return Dtype::float16;
    case at::kBFloat16: return Dtype::bfloat16;
    default: TORCH_CHECK(false, "rows are ", type, ", not float64, float32, float16 or bfloat16");
  }
}

at::ScalarType compute_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

cudaStream_t current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

TableCache& cache() {
  static TableCache* const cache = new TableCache;  // never destroyed: the driver may be gone before it
  return *cache;
}

template <typename T>
std::string bytes_of(const std::vector<T>& items) {
  return std::string(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
}

// The rows of one call, as they are collected from its lists of tensors, which outlive it.
class Rows {
 public:
  // `like` gives the rows their number, lengths, dtype and device.
  Rows(const Column& like, const char* name, const Groups& groups, int64_t num_groups)
      : device(first_of(like, name).device()),
        type(like[0].scalar_type()),
        numels_(like.numels()),
        groups_(groups),
        num_groups_(num_groups) {
    check_count(groups.numbers().size(), "groups", size());
    check_groups(groups, num_groups);
    check(like, name, type);
  }

  // Enters a list of tensors.
  void enter(void* Row::*column, const Column& tensors, const char* name, at::ScalarType of_type) {
    check_count(tensors.size(), name, size());
    check(tensors, name, of_type);
    columns_[num_columns_++] = {column, tensors.addresses().data()};
  }

  // Enters a list in which some may be missing, or have no elements, which is the same.
  void enter(void* Row::*column, Optional tensors, const char* name, at::ScalarType of_type) {
    check_count(tensors.column.size(), name, size());
    if (!is_as_expected(tensors.column, of_type)) {
      for (size_t i = 0; i < size(); ++i) {
        if (tensors.column.addresses()[i] != 0) check_tensor(tensors.column[i], name, device, of_type, numels_[i]);
      }
    }
    columns_[num_columns_++] = {column, tensors.column.addresses().data()};
  }

  // The tensors that rows are weighted with, where there are any.
  void enter_weights(void* Row::*column, Optional weights, at::ScalarType of_type) {
    enter(column, weights, "weights", of_type);
    weights_ = weights.column.addresses().data();
  }

  void enter_adaptive(const std::vector<bool>& adaptive) {
    check_count(adaptive.size(), "adaptive", num_groups_);
    adaptive_ = adaptive;
  }

  void enter_steps(const Column& steps) {
    check_count(steps.size(), "steps", size());
    if (!steps.consists_of(device, at::kFloat) || !all_are(steps.numels(), 1)) {
      for (const at::Tensor& step : steps) check_tensor(step, "steps", device, at::kFloat, 1);
    }
    steps_ = steps.addresses().data();
  }

  Table table(cudaStream_t stream) const {
    Table table = {};
    for (const int64_t numel : numels_) table.num_chunks += chunks_of(numel);
    TORCH_CHECK(table.num_chunks <= INT32_MAX, "too many elements for one launch");
    table.rows = static_cast<const Row*>(cache().get(key(), device, stream, [&] { return bytes_of(arranged()); }));
    // Lengths and groups stay from step to step, so this part, which is long, is not built again.
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

  Dtype dtype() const { return dtype_of(type); }
  size_t size() const { return numels_.size(); }
  bool empty() const { return all_are(numels_, 0); }

  const at::Device device;
  const at::ScalarType type;

 private:
  struct Entered {
    void* Row::*column;
    const int64_t* addresses;
  };

  static const at::Tensor& first_of(const Column& like, const char* name) {
    TORCH_CHECK(!like.empty(), name, " is empty");
    TORCH_CHECK(like[0].defined(), name, " is None");
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

  void check(const Column& tensors, const char* name, at::ScalarType of_type) const {
    if (is_as_expected(tensors, of_type)) return;
    for (size_t i = 0; i < size(); ++i) check_tensor(tensors[i], name, device, of_type, numels_[i]);
  }

  // What decides on the rows.
  std::string key() const {
    std::string key = "rows";
    key.reserve((num_columns_ + 4) * (size() + 1) * sizeof(int64_t));
    for (size_t i = 0; i < num_columns_; ++i) {
      append(key, &columns_[i].column, 1);
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
        rows[i].*columns_[c].column = reinterpret_cast<void*>(columns_[c].addresses[i]);
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
  std::array<Entered, 7> columns_ = {};
  size_t num_columns_ = 0;
  const int64_t* steps_ = nullptr;
  const int64_t* weights_ = nullptr;
  std::vector<bool> adaptive_;  // for each group; empty if none is
};

const double* numbers(const at::Tensor& tensor, const char* name, at::Device device, int64_t count) {
  check_tensor(tensor, name, device, at::kDouble, count);
  return tensor.const_data_ptr<double>();
}

at::Tensor new_numbers(at::IntArrayRef sizes, at::Device device) {
  return at::empty(sizes, at::TensorOptions(at::kDouble).device(device));
}

}  // namespace

at::Tensor grad_norm(const Column& grads, const Groups& groups, int64_t num_groups, Optional weights) {
  Rows rows(grads, "grads", groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  rows.enter(&Row::grad, grads, "grads", rows.type);
  rows.enter_weights(&Row::live, weights, rows.type);
  if (rows.empty()) return at::zeros({num_groups}, at::TensorOptions(at::kDouble).device(rows.device));
  const cudaStream_t stream = current_stream(rows.device);
  const Table table = rows.table(stream);
  const at::Tensor partial = new_numbers({table.num_chunks}, rows.device);
  at::Tensor norms = new_numbers({num_groups}, rows.device);
  launch_grad_norm(rows.dtype(), table, partial.mutable_data_ptr<double>(), norms.mutable_data_ptr<double>(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return norms;
}

at::Tensor perturbation_scale(const at::Tensor& squared_norm, const at::Tensor& rho, double epsilon) {
  const at::Device device = squared_norm.device();
  const c10::DeviceGuard guard(device);
  const int64_t groups = squared_norm.numel();
  at::Tensor scale = new_numbers({groups}, device);
  launch_perturbation_scale(numbers(squared_norm, "squared_norm", device, groups), numbers(rho, "rho", device, groups),
                            epsilon, scale.mutable_data_ptr<double>(), static_cast<int32_t>(groups),
                            current_stream(device));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return scale;
}

void perturb_(const Column& live, const Column& saved, const Column& grads, const Groups& groups,
              const at::Tensor& scale, const std::vector<bool>& adaptive, int64_t sign, bool stochastic) {
  if (live.empty()) return;
  TORCH_CHECK(sign == 1 || sign == -1, "sign is ", sign);
  const int64_t num_groups = scale.numel();
  Rows rows(live, "live", groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  rows.enter(&Row::live, live, "live", rows.type);
  rows.enter(&Row::saved, saved, "saved", compute_type(rows.type));
  rows.enter(&Row::grad, grads, "grads", rows.type);
  rows.enter_adaptive(adaptive);
  if (rows.empty()) return;
  const cudaStream_t stream = current_stream(rows.device);
  launch_perturb(rows.dtype(), rows.table(stream), numbers(scale, "scale", rows.device, num_groups),
                 static_cast<int>(sign), stochastic, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor fd_gram(const Column& grad, const Column& grad_ascent, const Column& grad_descent, const Groups& groups,
                   int64_t num_groups, Optional weights) {
  Rows rows(grad, "grad", groups, num_groups);
  const c10::DeviceGuard guard(rows.device);
  rows.enter(&Row::grad, grad, "grad", rows.type);
  rows.enter(&Row::grad_ascent, grad_ascent, "grad_ascent", rows.type);
  rows.enter(&Row::grad_descent, grad_descent, "grad_descent", rows.type);
  rows.enter_weights(&Row::saved, weights, compute_type(rows.type));
  if (rows.empty()) return at::zeros({num_groups, 9}, at::TensorOptions(at::kDouble).device(rows.device));
  const cudaStream_t stream = current_stream(rows.device);
  const Table table = rows.table(stream);
  const at::Tensor partial = new_numbers({table.num_chunks, 9}, rows.device);
  at::Tensor gram = new_numbers({num_groups, 9}, rows.device);
  launch_fd_gram(rows.dtype(), table, partial.mutable_data_ptr<double>(), gram.mutable_data_ptr<double>(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return gram;
}

std::tuple<at::Tensor, at::Tensor> coefficients(const std::optional<at::Tensor>& gram, const Column& squared_norms,
                                                const at::Tensor& scale, const at::Tensor& alpha,
                                                const at::Tensor& beta, at::Tensor counters, const Column& taken,
                                                const Column& part, int64_t passes, bool log, const Column& losses,
                                                const std::optional<at::Tensor>& grad_scale,
                                                double max_regularizer_ratio, double max_grad_norm) {
  using Arguments = CoefficientsArguments;
  const at::Device device = alpha.device();
  const c10::DeviceGuard guard(device);
  const int64_t groups = alpha.numel();
  TORCH_CHECK(squared_norms.size() <= Arguments::kNorms, "squared_norms of more than three passes");
  TORCH_CHECK(taken.size() <= Arguments::kCounters, "more step counters than dtypes");
  check_count(part.size(), "part", taken.size());
  check_tensor(counters, "counters", device, at::kLong, 4);
  at::Tensor values = new_numbers({2 * groups + 4}, device);
  at::Tensor flags = at::empty({2}, at::TensorOptions(at::kBool).device(device));

  Arguments p = {};
  p.gram = gram ? numbers(*gram, "gram", device, 9 * groups) : nullptr;
  for (const at::Tensor& norm : squared_norms) p.norms[p.num_norms++] = numbers(norm, "squared_norms", device, groups);
  p.scale = numbers(scale, "scale", device, groups);
  p.alpha = numbers(alpha, "alpha", device, groups);
  p.beta = numbers(beta, "beta", device, groups);
  if (!losses.empty()) check_count(losses.size(), "losses", 3);
  for (size_t i = 0; i < losses.size(); ++i) p.losses[i] = numbers(losses[i], "losses", device, 1);
  for (size_t i = 0; i < taken.size(); ++i) {
    const int64_t count = taken[i].numel();
    check_tensor(taken[i], "taken", device, at::kFloat, count);
    check_tensor(part[i], "part", device, at::kFloat, count);
    p.steps[p.num_steps++] = {taken[i].mutable_data_ptr<float>(), part[i].const_data_ptr<float>(), count};
  }
  p.grad_scale = grad_scale ? numbers(*grad_scale, "grad_scale", device, 1) : nullptr;
  p.counters = counters.mutable_data_ptr<int64_t>();
  p.values = values.mutable_data_ptr<double>();
  p.flags = flags.mutable_data_ptr<bool>();
  p.max_regularizer_ratio = max_regularizer_ratio;
  p.max_grad_norm = max_grad_norm;
  p.num_groups = static_cast<int32_t>(groups);
  p.log = log && passes == 3;
  launch_coefficients(p, current_stream(device));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {values, flags};
}

namespace {

// Enters the gradients of a step, and says whether there are all three.
bool enter_gradients(Rows& rows, const Column& grad, const Column& grad_ascent, const Column& grad_descent) {
  rows.enter(&Row::grad, grad, "grad", rows.type);
  if (grad_ascent.empty()) return false;
  rows.enter(&Row::grad_ascent, grad_ascent, "grad_ascent", rows.type);
  rows.enter(&Row::grad_descent, grad_descent, "grad_descent", rows.type);
  return true;
}

Decision decision_of(at::Device device, const at::Tensor& a, const at::Tensor& b,
                     const std::optional<at::Tensor>& factor, const bool* ok) {
  return {numbers(a, "a", device, a.numel()), numbers(b, "b", device, a.numel()),
          factor ? numbers(*factor, "factor", device, 1) : nullptr, ok};
}

// The options of all groups on the device.
const Scalar* scalars(const std::vector<double>& options, Optional tensors, at::Device device,
                      cudaStream_t stream) {
  check_count(tensors.column.size(), "option_tensors", options.size());
  std::vector<Scalar> scalars(options.size());
  for (size_t i = 0; i < options.size(); ++i) {
    scalars[i] = {nullptr, nullptr, options[i], 1 - options[i]};
    const at::Tensor& tensor = tensors.column[i];
    if (!tensor.defined()) continue;
    scalars[i].value = scalars[i].complement = 0;
    if (tensor.scalar_type() == at::kDouble) {
      scalars[i].wide = numbers(tensor, "option_tensors", device, 1);
    } else {
      check_tensor(tensor, "option_tensors", device, at::kFloat, 1);
      scalars[i].single = tensor.const_data_ptr<float>();
    }
  }
  const std::string bytes = bytes_of(scalars);
  return static_cast<const Scalar*>(cache().get("options" + bytes, device, stream, [&] { return bytes; }));
}

// The step of a base optimizer: `enter_buffers` enters its state, `launch` launches its kernel, with so many options a
// group.
template <typename EnterBuffers>
void step(decltype(launch_sgd_step)* launch, int64_t num_options, EnterBuffers enter_buffers, const Column& live, const Column& saved, const Column& grad, const Column& grad_ascent,
          const Column& grad_descent, const Groups& groups, const Column& steps, const std::vector<double>& options,
          Optional option_tensors, const at::Tensor& a, const at::Tensor& b,
          const std::optional<at::Tensor>& factor, const at::Tensor& ok) {
  if (live.empty()) return;
  Rows rows(live, "live", groups, a.numel());
  const c10::DeviceGuard guard(rows.device);
  rows.enter(&Row::live, live, "live", rows.type);
  rows.enter(&Row::saved, saved, "saved", compute_type(rows.type));
  enter_buffers(rows);
  rows.enter_steps(steps);
  const bool differences = enter_gradients(rows, grad, grad_ascent, grad_descent);
  check_tensor(ok, "ok", rows.device, at::kBool, 1);
  check_count(options.size(), "options", a.numel() * num_options);
  if (rows.empty()) return;
  const cudaStream_t stream = current_stream(rows.device);
  launch(rows.dtype(), rows.table(stream), scalars(options, option_tensors, rows.device, stream),
         decision_of(rows.device, a, b, factor, ok.const_data_ptr<bool>()), differences, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void sgd_step_(const Column& live, const Column& saved, const Column& momentum_buffer, const Column& grad,
               const Column& grad_ascent, const Column& grad_descent, const Groups& groups, const Column& steps,
               const std::vector<double>& options, Optional option_tensors, const at::Tensor& a,
               const at::Tensor& b, const std::optional<at::Tensor>& factor, const at::Tensor& ok) {
  const auto enter = [&](Rows& rows) {
    rows.enter(&Row::first, Optional{momentum_buffer}, "momentum_buffer", compute_type(rows.type));
  };
  step(launch_sgd_step, kSgdOptions, enter, live, saved, grad,
       grad_ascent, grad_descent, groups, steps, options, option_tensors, a, b, factor, ok);
}

void adamw_step_(const Column& live, const Column& saved, const Column& exp_avg, const Column& exp_avg_sq,
                 const Column& grad, const Column& grad_ascent, const Column& grad_descent, const Groups& groups,
                 const Column& steps, const std::vector<double>& options, Optional option_tensors,
                 const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& factor,
                 const at::Tensor& ok) {
  const auto enter = [&](Rows& rows) {
    rows.enter(&Row::first, exp_avg, "exp_avg", compute_type(rows.type));
    rows.enter(&Row::second, exp_avg_sq, "exp_avg_sq", compute_type(rows.type));
  };
  step(launch_adamw_step, kAdamOptions, enter, live, saved, grad, grad_ascent,
       grad_descent, groups, steps, options, option_tensors, a, b, factor, ok);
}

void combine_(const Column& live, const Column& saved, const Column& grad, const Column& grad_ascent,
              const Column& grad_descent, const Groups& groups, const at::Tensor& a, const at::Tensor& b,
              const std::optional<at::Tensor>& factor) {
  if (live.empty()) return;
  Rows rows(live, "live", groups, a.numel());
  const c10::DeviceGuard guard(rows.device);
  rows.enter(&Row::live, live, "live", rows.type);
  rows.enter(&Row::saved, saved, "saved", compute_type(rows.type));
  const bool differences = enter_gradients(rows, grad, grad_ascent, grad_descent);
  if (rows.empty()) return;
  const cudaStream_t stream = current_stream(rows.device);
  launch_combine(rows.dtype(), rows.table(stream), decision_of(rows.device, a, b, factor, nullptr), differences,
                 stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace crsam

namespace {

using namespace crsam;

// How the dispatcher gives a parameter of an operator, and what the operator makes of it.
template <typename Parameter>
struct Dispatched {
  using Type = Parameter;
  static Parameter convert(Parameter given) { return given; }
};
template <>
struct Dispatched<const Column&> {
  using Type = at::TensorList;
  static Column convert(Type given) { return Column(given.vec()); }
};
template <>
struct Dispatched<Optional> {
  using Type = const c10::List<std::optional<at::Tensor>>&;
  struct Owner {
    Column column;
    operator Optional() const { return {column}; }
  };
  static Owner convert(Type given) {
    std::vector<at::Tensor> tensors;
    for (const std::optional<at::Tensor>& tensor : given.vec()) tensors.push_back(tensor.value_or(at::Tensor()));
    return {Column(std::move(tensors))};
  }
};
template <>
struct Dispatched<const Groups&> {
  using Type = at::IntArrayRef;
  static Groups convert(Type given) { return Groups(given.vec()); }
};
template <>
struct Dispatched<const std::vector<double>&> {
  using Type = at::ArrayRef<double>;
  static std::vector<double> convert(Type given) { return given.vec(); }
};
template <>
struct Dispatched<const std::vector<bool>&> {
  using Type = const c10::List<bool>&;
  static std::vector<bool> convert(Type given) { return {given.begin(), given.end()}; }
};

// An operator as the dispatcher calls it.
template <auto op>
struct Operator;
template <typename Result, typename... Parameters, Result (*op)(Parameters...)>
struct Operator<op> {
  static Result call(typename Dispatched<Parameters>::Type... given) {
    return op(Dispatched<Parameters>::convert(given)...);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(crsam, CRSAM_DISPATCH_KEY, m) {
  m.impl("grad_norm", &Operator<grad_norm>::call);
  m.impl("perturbation_scale", &Operator<perturbation_scale>::call);
  m.impl("perturb_", &Operator<perturb_>::call);
  m.impl("fd_gram", &Operator<fd_gram>::call);
  m.impl("coefficients", &Operator<coefficients>::call);
  m.impl("sgd_step_", &Operator<sgd_step_>::call);
  m.impl("adamw_step_", &Operator<adamw_step_>::call);
  m.impl("combine_", &Operator<combine_>::call);
}
