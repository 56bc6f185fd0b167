// What an operator demands of its arguments, said in one line where it is not met.
#pragma once

#include <ATen/core/Tensor.h>

#include "column.h"

namespace crsam {

// A tensor that a kernel reads or writes through a pointer.
inline void check_tensor(const at::Tensor& tensor, const char* name, at::Device device, at::ScalarType dtype,
                         int64_t numel) {
  TORCH_CHECK(tensor.defined(), name, " is None");
  TORCH_CHECK(tensor.device() == device, name, " is on ", tensor.device(), ", not on ", device);
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(), ", not ", dtype);
  TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " elements, not ", numel);
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

inline void check_count(size_t found, const char* name, size_t expected) {
  TORCH_CHECK(found == expected, name, " has ", found, " entries, not ", expected);
}

inline void check_groups(const Groups& groups, int64_t num_groups) {
  TORCH_CHECK(0 < num_groups && num_groups <= INT32_MAX, "num_groups is ", num_groups);
  for (const int64_t group : {groups.least(), groups.most()}) {
    TORCH_CHECK(0 <= group && group < num_groups, "group ", group, " is not one of ", num_groups);
  }
}

}  // namespace crsam
