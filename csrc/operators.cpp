// Binds the functions of ops.h to Python and to torch's dispatcher. `Parameter` defines how each of the two passes an
// argument.
//
// The Python functions accept a `Column`, which callers cache between calls. In contrast, torch.ops.crsam converts
// every list of tensors in every call: once to C++ and twice more within C++.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/library.h>

#include <array>
#include <string>

#include "host.h"
#include "ops.h"

#ifndef CRSAM_DISPATCH_KEY  // tests/cuda_on_cpu runs the operators on a CPU
#define CRSAM_DISPATCH_KEY CUDA
#endif

namespace crsam {
namespace {

// The types of an argument from Python and from the dispatcher, and their conversions to the type of the operator.
template <typename P>
struct Parameter {
  using FromPython = P;
  using FromDispatcher = P;
  static P convert(P given) { return given; }
};
template <>
struct Parameter<const Column&> {
  using FromPython = const Given<Column>&;
  using FromDispatcher = at::TensorList;
  static const Column& convert(FromPython given) { return given.get(); }
  static Column convert(FromDispatcher given) { return Column(given.vec()); }
};
template <>
struct Parameter<const Columns&> {
  using FromPython = const Given<Columns>&;
  using FromDispatcher = at::TensorList;
  static const Columns& convert(FromPython given) { return given.get(); }
  static Columns convert(FromDispatcher given) { return Columns(given.vec()); }
};
template <>
struct Parameter<Optional> {
  using FromPython = const Given<Column>&;
  using FromDispatcher = const c10::List<std::optional<at::Tensor>>&;
  struct Owner {
    Column column;
    operator Optional() const { return {column}; }
  };
  static Optional convert(FromPython given) { return {given.get()}; }
  static Owner convert(FromDispatcher given) {
    std::vector<at::Tensor> tensors;
    for (const std::optional<at::Tensor>& tensor : given.vec()) tensors.push_back(tensor.value_or(at::Tensor()));
    return {Column(std::move(tensors))};
  }
};
template <>
struct Parameter<const Groups&> {
  using FromPython = const Given<Groups>&;
  using FromDispatcher = at::IntArrayRef;
  static const Groups& convert(FromPython given) { return given.get(); }
  static Groups convert(FromDispatcher given) { return Groups(given.vec()); }
};
template <>
struct Parameter<const std::vector<double>&> {
  using FromPython = const std::vector<double>&;
  using FromDispatcher = at::ArrayRef<double>;
  static FromPython convert(FromPython given) { return given; }
  static std::vector<double> convert(FromDispatcher given) { return given.vec(); }
};
template <>
struct Parameter<const std::vector<bool>&> {
  using FromPython = const std::vector<bool>&;
  using FromDispatcher = const c10::List<bool>&;
  static FromPython convert(FromPython given) { return given; }
  static std::vector<bool> convert(FromDispatcher given) { return {given.begin(), given.end()}; }
};
template <>
struct Parameter<const std::string&> {
  using FromPython = const std::string&;
  using FromDispatcher = c10::string_view;
  static FromPython convert(FromPython given) { return given; }
  static std::string convert(FromDispatcher given) { return std::string(given); }
};

// For the dispatcher --------------------------------------------------------------------------------------------------

template <auto op>
struct Dispatched;
template <typename Result, typename... Parameters, Result (*op)(Parameters...)>
struct Dispatched<op> {
  static Result call(typename Parameter<Parameters>::FromDispatcher... given) {
    return op(Parameter<Parameters>::convert(given)...);
  }
};

// Runs an operator, then bumps the version of every tensor that its schema marks as written.
void bump_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto given = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].alias_info() || !arguments[i].alias_info()->isWrite()) continue;
    if (given[i].isTensor()) {
      written.push_back(given[i].toTensor());
    } else {
      for (const at::Tensor& tensor : given[i].toTensorVector()) written.push_back(tensor);
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : written) torch::autograd::impl::bump_version(tensor);
}

// For Python ----------------------------------------------------------------------------------------------------------

void bump_written(const at::Tensor& tensor) { torch::autograd::impl::bump_version(tensor); }
void bump_written(const Given<Column>& column) { bump(column.get()); }
void bump_written(const Given<Columns>& columns) {
  for (const auto& column : columns.get().columns()) bump(*column);
  for (const at::Tensor& tensor : columns.get().flat()) torch::autograd::impl::bump_version(tensor);
}
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
  const auto function = [op, written, full_name](typename Parameter<Parameters>::FromPython... given) -> Result {
    const auto bump_all = [&] {
      size_t i = 0;
      ((written[i++] ? bump_written(given) : void()), ...);
    };
    RECORD_FUNCTION(full_name, c10::ArrayRef<const c10::IValue>());  // for profilers, as in the dispatcher
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if constexpr (std::is_void_v<Result>) {
      op(Parameter<Parameters>::convert(given)...);
      bump_all();
    } else {
      Result result = op(Parameter<Parameters>::convert(given)...);
      bump_all();
      return result;
    }
  };
  m.def(name, torch::wrap_pybind_function_no_gil(function));
}

}  // namespace

void define_operators(py::module_& m) {
  // Python defines the schemas and the fake implementations.
  py::module_::import("crsam_ext.backends.fused").attr("register")("crsam");
#define CRSAM_DEFINE(name) define(m, #name, &name);
  CRSAM_FOR_EACH_OPERATOR(CRSAM_DEFINE)
}

}  // namespace crsam

TORCH_LIBRARY_IMPL(crsam, CRSAM_DISPATCH_KEY, m) {
#define CRSAM_IMPLEMENT(name) m.impl(#name, &crsam::Dispatched<crsam::name>::call);
  CRSAM_FOR_EACH_OPERATOR(CRSAM_IMPLEMENT)
}

#ifndef CRSAM_NO_VERSIONS  // defined for a second extension in one process (in tests): the first one registers this
TORCH_LIBRARY_IMPL(crsam, ADInplaceOrView, m) {
#define CRSAM_BUMP(name) m.impl(#name, torch::CppFunction::makeFromBoxedFunction<&crsam::bump_versions>());
  CRSAM_FOR_EACH_OPERATOR(CRSAM_BUMP)
}
#endif
