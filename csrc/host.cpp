// What a step does for every tensor on the host, in one call for all of them. torch.ops.crsam converts each list of
// tensors anew in every call, to C++ and there twice more; these functions take lists that were converted once.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <string>
#include <vector>

#include "host.h"
#include "ops.h"

namespace crsam {
namespace {

// A list of tensors, undefined where Python has None.
struct Tensors {
  std::vector<at::Tensor> items;
};

Tensors tensors_of(const py::list& list) {
  Tensors tensors;
  tensors.items.reserve(list.size());
  for (const py::handle item : list) {
    TORCH_CHECK_TYPE(item.is_none() || THPVariable_Check(item.ptr()), "a list of tensors holds something else");
    tensors.items.push_back(item.is_none() ? at::Tensor() : THPVariable_Unpack(item.ptr()));
  }
  return tensors;
}

struct Integers {
  std::vector<int64_t> items;
};

// What Python gives for a parameter of an operator, and how it is passed on.
template <typename Parameter>
struct Given {
  using Type = Parameter;
  static Parameter pass(Parameter given) { return given; }
};
template <>
struct Given<at::TensorList> {
  using Type = const Tensors&;
  static at::TensorList pass(const Tensors& given) { return given.items; }
};
template <>
struct Given<const OptionalTensors&> {
  using Type = const Tensors&;
  static OptionalTensors pass(const Tensors& given) {
    OptionalTensors list;
    list.reserve(given.items.size());
    for (const at::Tensor& item : given.items) {
      list.push_back(item.defined() ? std::optional<at::Tensor>(item) : std::nullopt);
    }
    return list;
  }
};
template <>
struct Given<at::IntArrayRef> {
  using Type = const Integers&;
  static at::IntArrayRef pass(const Integers& given) { return given.items; }
};
template <>
struct Given<at::ArrayRef<double>> {
  using Type = const std::vector<double>&;
  static at::ArrayRef<double> pass(const std::vector<double>& given) { return given; }
};
template <>
struct Given<const c10::List<bool>&> {
  using Type = const std::vector<bool>&;
  static c10::List<bool> pass(const std::vector<bool>& given) {
    c10::List<bool> list;
    for (const bool item : given) list.push_back(item);
    return list;
  }
};

void bump(const at::Tensor& tensor) { torch::autograd::impl::bump_version(tensor); }
void bump(const Tensors& tensors) {
  for (const at::Tensor& tensor : tensors.items) bump(tensor);
}
template <typename Other>
void bump(const Other&) {}

template <typename Signature>
struct Operator;

template <typename Result, typename... Parameters>
struct Operator<Result(Parameters...)> {
  // Defines the Python function, which bumps the versions of what the schema marks as written.
  static void define(py::module_& m, const std::string& name) {
    const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("crsam::" + name).c_str(), "");
    const auto op = handle.typed<Result(Parameters...)>();
    std::array<bool, sizeof...(Parameters)> written;
    for (size_t i = 0; i < written.size(); ++i) {
      const c10::AliasInfo* alias = handle.schema().arguments()[i].alias_info();
      written[i] = alias != nullptr && alias->isWrite();
    }
    const auto function = [op, written](typename Given<Parameters>::Type... given) -> Result {
      const auto call = [&] {
        const at::AutoDispatchBelowADInplaceOrView guard;
        return op.call(Given<Parameters>::pass(given)...);
      };
      const auto bump_written = [&] {
        size_t i = 0;
        ((written[i++] ? bump(given) : void()), ...);
      };
      if constexpr (std::is_void_v<Result>) {
        call();
        bump_written();
      } else {
        Result result = call();
        bump_written();
        return result;
      }
    };
    m.def(name.c_str(), torch::wrap_pybind_function_no_gil(function));
  }
};

// Whether a gradient is ours to hold as it is: laid out as its parameter, and of a storage of its own.
bool is_ours(const at::Tensor& grad, const at::Tensor& param) {
  if (!grad.defined() || grad.layout() != at::kStrided || !grad.has_storage() || grad.requires_grad() ||
      grad.scalar_type() != param.scalar_type() || grad.sizes() != param.sizes() ||
      grad.storage().nbytes() != param.nbytes()) {
    return false;
  }
  for (int64_t i = 0; i < grad.dim(); ++i) {
    if (grad.size(i) > 1 && grad.stride(i) != param.stride(i)) return false;
  }
  return true;
}

py::object take_gradients(const py::list& params) {
  for (const py::handle param : params) {
    const at::Tensor& p = THPVariable_Unpack(param.ptr());
    if (!is_ours(p.grad(), p)) return py::none();
  }
  Tensors taken;
  taken.items.reserve(params.size());
  py::list list(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    at::Tensor& grad = THPVariable_Unpack(PyList_GET_ITEM(params.ptr(), i)).mutable_grad();
    PyList_SET_ITEM(list.ptr(), i, THPVariable_Wrap(grad));
    taken.items.push_back(std::move(grad));
  }
  return py::make_tuple(std::move(list), std::move(taken));
}

void set_gradients(const py::list& params, const py::object& grads) {
  for (size_t i = 0; i < params.size(); ++i) {
    at::Tensor& grad = THPVariable_Unpack(PyList_GET_ITEM(params.ptr(), i)).mutable_grad();
    PyObject* given = grads.is_none() ? Py_None : PyList_GET_ITEM(grads.ptr(), i);
    grad = given == Py_None ? at::Tensor() : THPVariable_Unpack(given);
  }
}

// Addresses and sizes of all tensors, as bytes that are equal if these are.
py::bytes layout(const py::list& tensors) {
  std::vector<int64_t> numbers;
  numbers.reserve(6 * tensors.size());
  for (const py::handle tensor : tensors) {
    const at::Tensor& t = THPVariable_Unpack(tensor.ptr());
    numbers.push_back(reinterpret_cast<int64_t>(t.data_ptr()));
    numbers.push_back(t.dim());
    numbers.insert(numbers.end(), t.sizes().begin(), t.sizes().end());
  }
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

}  // namespace

void define_host_functions(py::module_& m) {
  py::class_<Tensors>(m, "Tensors", "A list of tensors, or None, for the operators of this module.")
      .def(py::init(&tensors_of));
  py::class_<Integers>(m, "Integers", "A list of integers for the operators of this module.")
      .def(py::init([](std::vector<int64_t> items) { return Integers{std::move(items)}; }));
  m.def("take_gradients", torch::wrap_pybind_function(&take_gradients),
        "If every parameter's gradient is ours to hold, takes them out of p.grad: their list, and as Tensors; or None.");
  m.def("set_gradients", torch::wrap_pybind_function(&set_gradients), "Makes a list of gradients, or None, p.grad.");
  m.def("layout", torch::wrap_pybind_function(&layout), "Addresses and sizes of all tensors.");
  m.def("mark_written", torch::wrap_pybind_function([](const Tensors& tensors) { bump(tensors); }),
        "Bumps the versions of all tensors.");
  Operator<decltype(grad_norm)>::define(m, "grad_norm");
  Operator<decltype(perturbation_scale)>::define(m, "perturbation_scale");
  Operator<decltype(perturb_)>::define(m, "perturb_");
  Operator<decltype(fd_gram)>::define(m, "fd_gram");
  Operator<decltype(coefficients)>::define(m, "coefficients");
  Operator<decltype(sgd_step_)>::define(m, "sgd_step_");
  Operator<decltype(adamw_step_)>::define(m, "adamw_step_");
  Operator<decltype(combine_)>::define(m, "combine_");
}

}  // namespace crsam
