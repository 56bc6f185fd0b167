// From tensors to pointers: checks, device, stream, table, launch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
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

// The rows of one call, as they are collected from its lists of tensors.
class Rows {
 public:
  // `like` gives the rows their number, lengths, dtype and device.
  Rows(at::TensorList like, const char* name, at::IntArrayRef groups, int64_t num_groups)
      : device(like[0].device()), type(like[0].scalar_type()), num_groups_(num_groups), rows_(like.size()) {
    check_count(groups.size(), "groups", rows_.size());
    check_groups(groups, num_groups);
    for (size_t i = 0; i < rows_.size(); ++i) {
      check_tensor(like[i], name, device, type, like[i].numel());
      rows_[i].numel = like[i].numel();
      rows_[i].group = static_cast<int32_t>(groups[i]);
    }
  }

  // Enters a list of tensors; those without elements stand for none.
  void enter(void* Row::*column, at::TensorList tensors, const char* name, at::ScalarType of_type) {
    check_count(tensors.size(), name, rows_.size());
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (tensors[i].numel() > 0) enter(column, i, tensors[i], name, of_type);
    }
  }

  // The tensors that rows are weighted with, where there are any.
  void enter_weights(void* Row::*column, const OptionalTensors& weights, at::ScalarType of_type) {
    check_count(weights.size(), "weights", rows_.size());
    for (size_t i = 0; i < rows_.size(); ++i) {
      const std::optional<at::Tensor> w = weights.get(i);
      if (!w) continue;
      enter(column, i, *w, "weights", of_type);
      rows_[i].adaptive = 1;
    }
  }

  void enter_adaptive(const c10::List<bool>& adaptive) {
    check_count(adaptive.size(), "adaptive", num_groups_);
    for (Row& row : rows_) row.adaptive = adaptive.get(row.group);
  }

  void enter_steps(at::TensorList steps) {
    check_count(steps.size(), "steps", rows_.size());
    for (size_t i = 0; i < rows_.size(); ++i) {
      check_tensor(steps[i], "steps", device, at::kFloat, 1);
      rows_[i].step = steps[i].const_data_ptr<float>();
    }
  }

  Table table(cudaStream_t stream) {
    arrange(rows_);
    std::vector<int64_t> lengths = {num_groups_};
    Table table = {};
    for (const Row& row : rows_) {
      lengths.push_back(row.numel);
      lengths.push_back(row.group);
      table.num_chunks += chunks_of(row);
    }
    TORCH_CHECK(table.num_chunks <= INT32_MAX, "too many elements for one launch");
    const std::string key = bytes_of(rows_);
    table.rows = static_cast<const Row*>(cache().get("rows" + key, device, stream, [&] { return key; }));
    // Lengths and groups stay from step to step, so this part, which is long, is neither built nor compared again.
    char* layout = static_cast<char*>(cache().get("layout" + bytes_of(lengths), device, stream, [&] {
      const Layout layout(rows_, num_groups_);
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
  bool empty() const {
    return std::all_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.numel == 0; });
  }

  const at::Device device;
  const at::ScalarType type;

 private:
  void enter(void* Row::*column, size_t i, const at::Tensor& tensor, const char* name, at::ScalarType of_type) {
    check_tensor(tensor, name, device, of_type, rows_[i].numel);
    rows_[i].*column = const_cast<void*>(tensor.const_data_ptr());
  }

  const int64_t num_groups_;
  std::vector<Row> rows_;
};

const double* numbers(const at::Tensor& tensor, const char* name, at::Device device, int64_t count) {
  check_tensor(tensor, name, device, at::kDouble, count);
  return tensor.const_data_ptr<double>();
}

at::Tensor new_numbers(at::IntArrayRef sizes, at::Device device) {
  return at::empty(sizes, at::TensorOptions(at::kDouble).device(device));
}

}  // namespace

at::Tensor grad_norm(at::TensorList grads, at::IntArrayRef groups, int64_t num_groups, const OptionalTensors& weights) {
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

void perturb_(at::TensorList live, at::TensorList saved, at::TensorList grads, at::IntArrayRef groups,
              const at::Tensor& scale, const c10::List<bool>& adaptive, int64_t sign, bool stochastic) {
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

at::Tensor fd_gram(at::TensorList grad, at::TensorList grad_ascent, at::TensorList grad_descent, at::IntArrayRef groups,
                   int64_t num_groups, const OptionalTensors& weights) {
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

std::tuple<at::Tensor, at::Tensor> coefficients(const std::optional<at::Tensor>& gram, at::TensorList squared_norms,
                                                const at::Tensor& scale, const at::Tensor& alpha,
                                                const at::Tensor& beta, at::Tensor counters, at::TensorList taken,
                                                at::TensorList part, int64_t passes, bool log, at::TensorList losses,
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
bool enter_gradients(Rows& rows, at::TensorList grad, at::TensorList grad_ascent, at::TensorList grad_descent) {
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
const Scalar* scalars(at::ArrayRef<double> options, const OptionalTensors& tensors, at::Device device,
                      cudaStream_t stream) {
  check_count(tensors.size(), "option_tensors", options.size());
  std::vector<Scalar> scalars(options.size());
  for (size_t i = 0; i < options.size(); ++i) {
    scalars[i] = {nullptr, nullptr, options[i], 1 - options[i]};
    const std::optional<at::Tensor> tensor = tensors.get(i);
    if (!tensor) continue;
    scalars[i].value = scalars[i].complement = 0;
    if (tensor->scalar_type() == at::kDouble) {
      scalars[i].wide = numbers(*tensor, "option_tensors", device, 1);
    } else {
      check_tensor(*tensor, "option_tensors", device, at::kFloat, 1);
      scalars[i].single = tensor->const_data_ptr<float>();
    }
  }
  const std::string bytes = bytes_of(scalars);
  return static_cast<const Scalar*>(cache().get("options" + bytes, device, stream, [&] { return bytes; }));
}

// A list of tensors for a column of the rows.
struct Buffer {
  void* Row::*column;
  at::TensorList tensors;
  const char* name;
};

// The step of a base optimizer, whose kernel `launch` launches, with so many options a group.
void step(decltype(launch_sgd_step)* launch, int64_t num_options, std::initializer_list<Buffer> buffers,
          at::TensorList live, at::TensorList saved, at::TensorList grad, at::TensorList grad_ascent,
          at::TensorList grad_descent, at::IntArrayRef groups, at::TensorList steps, at::ArrayRef<double> options,
          const OptionalTensors& option_tensors, const at::Tensor& a, const at::Tensor& b,
          const std::optional<at::Tensor>& factor, const at::Tensor& ok) {
  if (live.empty()) return;
  Rows rows(live, "live", groups, a.numel());
  const c10::DeviceGuard guard(rows.device);
  rows.enter(&Row::live, live, "live", rows.type);
  rows.enter(&Row::saved, saved, "saved", compute_type(rows.type));
  for (const Buffer& x : buffers) rows.enter(x.column, x.tensors, x.name, compute_type(rows.type));
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

void sgd_step_(at::TensorList live, at::TensorList saved, at::TensorList momentum_buffer, at::TensorList grad,
               at::TensorList grad_ascent, at::TensorList grad_descent, at::IntArrayRef groups, at::TensorList steps,
               at::ArrayRef<double> options, const OptionalTensors& option_tensors, const at::Tensor& a,
               const at::Tensor& b, const std::optional<at::Tensor>& factor, const at::Tensor& ok) {
  step(launch_sgd_step, kSgdOptions, {{&Row::first, momentum_buffer, "momentum_buffer"}}, live, saved, grad,
       grad_ascent, grad_descent, groups, steps, options, option_tensors, a, b, factor, ok);
}

void adamw_step_(at::TensorList live, at::TensorList saved, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                 at::TensorList grad, at::TensorList grad_ascent, at::TensorList grad_descent, at::IntArrayRef groups,
                 at::TensorList steps, at::ArrayRef<double> options, const OptionalTensors& option_tensors,
                 const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& factor,
                 const at::Tensor& ok) {
  step(launch_adamw_step, kAdamOptions,
       {{&Row::first, exp_avg, "exp_avg"}, {&Row::second, exp_avg_sq, "exp_avg_sq"}}, live, saved, grad, grad_ascent,
       grad_descent, groups, steps, options, option_tensors, a, b, factor, ok);
}

void combine_(at::TensorList live, at::TensorList saved, at::TensorList grad, at::TensorList grad_ascent,
              at::TensorList grad_descent, at::IntArrayRef groups, const at::Tensor& a, const at::Tensor& b,
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

TORCH_LIBRARY_IMPL(crsam, CRSAM_DISPATCH_KEY, m) {
  m.impl("grad_norm", &crsam::grad_norm);
  m.impl("perturbation_scale", &crsam::perturbation_scale);
  m.impl("perturb_", &crsam::perturb_);
  m.impl("fd_gram", &crsam::fd_gram);
  m.impl("coefficients", &crsam::coefficients);
  m.impl("sgd_step_", &crsam::sgd_step_);
  m.impl("adamw_step_", &crsam::adamw_step_);
  m.impl("combine_", &crsam::combine_);
}
