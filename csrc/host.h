// Conversion of the arguments that Python passes to the functions of the extension.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "column.h"

namespace crsam {

// Defined in host.cpp and, with kernels, in operators.cpp; bindings.cpp adds them to the module.
void define_host_functions(pybind11::module_& m);
void define_operators(pybind11::module_& m);

std::vector<at::Tensor> tensors_of(pybind11::handle list);

inline void bump(const Column& column) {
  for (const at::Tensor& tensor : column.versioned()) torch::autograd::impl::bump_version(tensor);
}

// A `Column` or `Groups` that Python passed, or one created from a plain list for this call. `Columns` are created from
// a list of `Column` or of plain lists.
template <typename T>
class Given {
 public:
  const T& get() const { return owned_ ? *owned_ : *lent_; }

  bool load(pybind11::handle source) {
    if constexpr (std::is_same_v<T, Columns>) {
      load_columns(pybind11::reinterpret_borrow<pybind11::sequence>(source));
    } else if (pybind11::isinstance<T>(source)) {
      lent_ = source.cast<const T*>();
    } else if constexpr (std::is_same_v<T, Column>) {
      owned_.emplace(tensors_of(source));
    } else {
      owned_.emplace(source.cast<std::vector<int64_t>>());
    }
    return true;
  }

 private:
  void load_columns(const pybind11::sequence& lists);

  const T* lent_ = nullptr;
  std::optional<T> owned_;
};

// Accepts lists of tensors, or one concatenated list, as schemas have it.
template <>
inline void Given<Columns>::load_columns(const pybind11::sequence& lists) {
  std::vector<std::shared_ptr<const Column>> columns;
  for (const pybind11::handle list : lists) {
    if (THPVariable_Check(list.ptr())) {
      owned_.emplace(tensors_of(lists));
      return;
    }
    if (pybind11::isinstance<Column>(list)) {
      columns.emplace_back(std::shared_ptr<void>(), list.cast<const Column*>());  // not owned: the caller owns it
    } else {
      columns.push_back(std::make_shared<Column>(tensors_of(list)));
    }
  }
  owned_.emplace(std::move(columns));
}

}  // namespace crsam

namespace pybind11::detail {

template <typename T>
struct type_caster<crsam::Given<T>> {
  PYBIND11_TYPE_CASTER(crsam::Given<T>, const_name("list"));
  bool load(handle source, bool) { return value.load(source); }
};

}  // namespace pybind11::detail
