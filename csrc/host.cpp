// Per-tensor host work of a step, batched into one call per list of tensors. crsam_ext/host.py has the same functions
// in Python, with documentation.
#include "host.h"

#include <torch/csrc/Exceptions.h>

#include <algorithm>

namespace crsam {

std::vector<at::Tensor> tensors_of(py::handle list) {
  std::vector<at::Tensor> tensors;
  const py::sequence items = py::reinterpret_borrow<py::sequence>(list);
  tensors.reserve(items.size());
  for (const py::handle item : items) {
    if (!item.is_none() && !THPVariable_Check(item.ptr())) {
      throw py::type_error("a list of tensors contains an object that is neither a tensor nor None");
    }
    tensors.push_back(item.is_none() ? at::Tensor() : THPVariable_Unpack(item.ptr()));
  }
  return tensors;
}

namespace {

// p.grad, undefined if there is none. Skips the check whether p is a leaf.
at::Tensor& grad_of(const at::Tensor& param) { return param.unsafeGetTensorImpl()->mutable_grad(); }

// Whether a gradient can be taken without a copy: it has the strides of its parameter and does not share its memory.
// Unless `views` are allowed, it must also have its own storage.
bool is_ours(const at::Tensor& grad, const at::Tensor& param, bool views) {
  if (!grad.defined() || !grad.has_storage() || grad.dtype() != param.dtype() || grad.sizes() != param.sizes() ||
      grad.requires_grad() || (grad.numel() > 0 && grad.const_data_ptr() == param.const_data_ptr())) {
    return false;
  }
  if (!views && (grad.storage().nbytes() != grad.numel() * grad.itemsize() || grad.is_view())) return false;
  const at::IntArrayRef sizes = grad.sizes(), strides = grad.strides(), expected = param.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1 && strides[i] != expected[i]) return false;
  }
  return true;
}

std::optional<Column> take_gradients(const Column& params, bool views) {
  std::vector<at::Tensor*> grads;
  grads.reserve(params.size());
  for (const at::Tensor& param : params) {
    grads.push_back(&grad_of(param));
    if (!is_ours(*grads.back(), param, views)) return std::nullopt;
  }
  std::vector<at::Tensor> taken;
  taken.reserve(params.size());
  for (at::Tensor* grad : grads) taken.push_back(std::move(*grad));
  return Column(std::move(taken), params);
}

void set_gradients(const Column& params, const Given<Column>& grads) {
  for (size_t i = 0; i < params.size(); ++i) grad_of(params[i]) = grads.get()[i];
}

void clear_gradients(const py::list& params) {
  for (const py::handle param : params) grad_of(THPVariable_Unpack(param.ptr())).reset();
}

bool holds_lists(py::handle item) {
  return PyList_Check(item.ptr()) && PyList_GET_SIZE(item.ptr()) > 0 &&
         (PyList_Check(PyList_GET_ITEM(item.ptr(), 0)) || py::isinstance<Column>(PyList_GET_ITEM(item.ptr(), 0)));
}

void mark_written(const py::args& written) {
  for (const py::handle item : written) {
    if (THPVariable_Check(item.ptr())) {
      torch::autograd::impl::bump_version(THPVariable_Unpack(item.ptr()));
    } else if (holds_lists(item)) {
      mark_written(py::args(py::reinterpret_borrow<py::list>(item)));
    } else {
      Given<Column> tensors;
      tensors.load(item);
      bump(tensors.get());
    }
  }
}

bool share_memory(const Given<Column>& tensors, const Given<Column>& others) {
  const std::vector<int64_t>&x = tensors.get().sorted_addresses(), &y = others.get().sorted_addresses();
  for (auto i = x.begin(), j = y.begin(); i != x.end() && j != y.end();) {
    if (*i == *j) return true;
    *i < *j ? ++i : ++j;
  }
  return false;
}

bool repeats_memory(const Given<Column>& tensors) {
  const std::vector<int64_t>& x = tensors.get().sorted_addresses();
  return std::adjacent_find(x.begin(), x.end()) != x.end();
}

// Appends the address, dtype, shape and strides of a tensor.
void append_place(std::vector<int64_t>& numbers, const at::Tensor& tensor) {
  numbers.push_back(reinterpret_cast<int64_t>(tensor.const_data_ptr()));
  numbers.push_back(static_cast<int64_t>(tensor.scalar_type()));
  numbers.push_back(tensor.dim());
  numbers.insert(numbers.end(), tensor.sizes().begin(), tensor.sizes().end());
  numbers.insert(numbers.end(), tensor.strides().begin(), tensor.strides().end());
}

py::bytes as_bytes(const std::vector<int64_t>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

int64_t identity(py::handle object) { return reinterpret_cast<int64_t>(object.ptr()); }

py::bytes places(const Column& tensors) {
  std::vector<int64_t> numbers;
  numbers.reserve(9 * tensors.size());
  for (const at::Tensor& tensor : tensors) append_place(numbers, tensor);
  return as_bytes(numbers);
}

py::bytes fingerprint(const std::vector<py::list>& by_group, const py::dict& state) {
  std::vector<int64_t> numbers;
  numbers.reserve(13 * state.size());
  for (const py::list& group : by_group) {
    numbers.push_back(static_cast<int64_t>(group.size()));
    for (const py::handle param : group) {
      numbers.push_back(identity(param));
      append_place(numbers, THPVariable_Unpack(param.ptr()));
    }
  }
  for (const auto& [param, kept] : state) {
    if (!PyDict_CheckExact(kept.ptr())) continue;  // some optimizers store plain numbers in the state
    numbers.push_back(identity(param));
    for (const auto& [name, value] : py::reinterpret_borrow<py::dict>(kept)) {
      numbers.push_back(static_cast<int64_t>(py::hash(name)));
      numbers.push_back(identity(value));
    }
  }
  return as_bytes(numbers);
}

py::object item(const Column& column, int64_t i) {
  const int64_t size = static_cast<int64_t>(column.size());
  if (i < 0) i += size;
  if (i < 0 || i >= size) throw py::index_error();
  return column[i].defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(column[i])) : py::none();
}

// The elements of a 1-D tensor as 0-dim tensors that share its storage but are not views for autograd.
py::tuple unbind(const at::Tensor& numbers) {
  py::tuple parts(numbers.numel());
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    at::Tensor part = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(numbers.storage()),
                                                               numbers.key_set(), numbers.dtype());
    part.unsafeGetTensorImpl()->set_storage_offset(numbers.storage_offset() + i);
    part.unsafeGetTensorImpl()->set_sizes_contiguous({});
    parts[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(part));
  }
  return parts;
}

py::object attribute_of(const Column& column, const std::string& name) {
  if (name == "numels") return as_bytes(column.numels());
  if (name == "addresses") return as_bytes(column.addresses());
  if (name != "kind") throw py::attribute_error(name);
  if (!column.alike()) return py::none();
  const py::object first = item(column, 0);
  return py::make_tuple(first.attr("dtype"), first.attr("device"));
}

py::object attribute_of(const Groups& groups, const std::string& name) {
  if (name == "numbers") return as_bytes(groups.numbers());
  if (name != "limits") throw py::attribute_error(name);
  return py::make_tuple(groups.least(), groups.most());
}

// __getattr__: Python calls it for a missing attribute. Computes the attribute and caches it on the object.
template <typename Class>
py::object work_out(const py::object& self, const std::string& name) {
  py::object value = attribute_of(self.cast<const Class&>(), name);
  py::setattr(self, name.c_str(), value);
  return value;
}

}  // namespace

void define_host_functions(py::module_& m) {
  py::class_<Column>(m, "Column", py::module_local(), py::dynamic_attr())
      .def(py::init([](const py::iterable& items) { return Column(tensors_of(py::list(items))); }))
      .def("__len__", &Column::size)
      .def("__getitem__", &item)
      .def("__getattr__", &work_out<Column>);
  py::class_<Groups>(m, "Groups", py::module_local(), py::dynamic_attr())
      .def(py::init([](const py::iterable& numbers) { return Groups(py::list(numbers).cast<std::vector<int64_t>>()); }))
      .def("__len__", [](const Groups& groups) { return groups.numbers().size(); })
      .def("__getitem__",
           [](const Groups& groups, size_t i) {
             if (i >= groups.numbers().size()) throw py::index_error();
             return groups.numbers()[i];
           })
      .def("__getattr__", &work_out<Groups>);
  m.def("take_gradients", torch::wrap_pybind_function(&take_gradients));
  m.def("set_gradients", torch::wrap_pybind_function(&set_gradients));
  m.def("clear_gradients", torch::wrap_pybind_function(&clear_gradients));
  m.def("share_memory", torch::wrap_pybind_function(&share_memory));
  m.def("repeats_memory", torch::wrap_pybind_function(&repeats_memory));
  m.def("unbind", torch::wrap_pybind_function(&unbind));
  m.def("places", torch::wrap_pybind_function(&places));
  m.def("fingerprint", torch::wrap_pybind_function(&fingerprint));
  m.def("mark_written", torch::wrap_pybind_function(&mark_written));
}

}  // namespace crsam
