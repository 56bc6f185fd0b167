// The operators as Python functions of lists that were looked at once: torch.ops.crsam converts every list of tensors anew
// in every call, to C++ and there twice more.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <string>

#include "host.h"
#include "ops.h"

namespace crsam {
namespace {

// What Python gives for a parameter of an operator, and how it is passed on.
template <typename Parameter>
struct Python {
  using Type = Parameter;
  static Parameter pass(Parameter given) { return given; }
};
template <>
struct Python<const Column&> {
  using Type = const Given<Column>&;
  static const Column& pass(Type given) { return given.get(); }
};
template <>
struct Python<Optional> {
  using Type = const Given<Column>&;
  static Optional pass(Type given) { return {given.get()}; }
};
template <>
struct Python<const Groups&> {
  using Type = const Given<Groups>&;
  static const Groups& pass(Type given) { return given.get(); }
};

void bump_written(const at::Tensor& tensor) { torch::autograd::impl::bump_version(tensor); }
void bump_written(const Given<Column>& column) { bump(column.get()); }
template <typename Other>
void bump_written(const Other&) {}

template <typename Result, typename... Parameters>
void define(py::module_& m, const char* name, Result (*op)(Parameters...)) {
  const std::string full_name = std::string("crsam::") + name;
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(full_name.c_str(), "");
  std::array<bool, sizeof...(Parameters)> written;
  for (size_t i = 0; i < written.size(); ++i) {
    const c10::AliasInfo* alias = handle.schema().arguments()[i].alias_info();
    written[i] = alias != nullptr && alias->isWrite();
  }
  const auto function = [op, written, full_name](typename Python<Parameters>::Type... given) -> Result {
    const auto bump_all = [&] {
      size_t i = 0;
      ((written[i++] ? bump_written(given) : void()), ...);
    };
    RECORD_FUNCTION(full_name, c10::ArrayRef<const c10::IValue>());  // for a profiler, as the dispatcher does
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if constexpr (std::is_void_v<Result>) {
      op(Python<Parameters>::pass(given)...);
      bump_all();
    } else {
      Result result = op(Python<Parameters>::pass(given)...);
      bump_all();
      return result;
    }
  };
  m.def(name, torch::wrap_pybind_function_no_gil(function));
}

}  // namespace

void define_operators(py::module_& m) {
  define(m, "grad_norm", &grad_norm);
  define(m, "perturbation_scale", &perturbation_scale);
  define(m, "perturb_", &perturb_);
  define(m, "fd_gram", &fd_gram);
  define(m, "coefficients", &coefficients);
  define(m, "sgd_step_", &sgd_step_);
  define(m, "adamw_step_", &adamw_step_);
  define(m, "combine_", &combine_);
}

}  // namespace crsam
