// What Python gives to the functions of the extension.
#pragma once

#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>
#include <vector>

#include "column.h"

namespace crsam {

// Defined in host.cpp and, with kernels, in operators.cpp; entered into the extension by bindings.cpp.
void define_host_functions(pybind11::module_& m);
void define_operators(pybind11::module_& m);

std::vector<at::Tensor> tensors_of(pybind11::handle list);

inline void bump(const Column& column) {
  for (const at::Tensor& tensor : column.versioned()) torch::autograd::impl::bump_version(tensor);
}

// A `Column` or `Groups`, or a list that is made one for this call.
template <typename T>
class Given {
 public:
  const T& get() const { return owned_ ? *owned_ : *lent_; }

  bool load(pybind11::handle source) {
    if (pybind11::isinstance<T>(source)) {
      lent_ = source.cast<const T*>();
    } else if constexpr (std::is_same_v<T, Column>) {
      owned_.emplace(tensors_of(source));
    } else {
      owned_.emplace(source.cast<std::vector<int64_t>>());
    }
    return true;
  }

 private:
  const T* lent_ = nullptr;
  std::optional<T> owned_;
};

}  // namespace crsam

namespace pybind11::detail {

template <typename T>
struct type_caster<crsam::Given<T>> {
  PYBIND11_TYPE_CASTER(crsam::Given<T>, const_name("list"));
  bool load(handle source, bool) { return value.load(source); }
};

}  // namespace pybind11::detail
