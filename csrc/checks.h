// Argument checks of the operators, with one-line errors: operator, argument, actual value, expected value.
#pragma once

#include <ATen/core/Tensor.h>

#include <ostream>

#include "column.h"

namespace crsam {

// The name of an argument in a message, for example perturb_: grads[3] or step_: grads[1][3].
struct Argument {
  const char* op;
  const char* name;
  int64_t column = -1;  // index in a list of lists
  int64_t row = -1;

  Argument at(int64_t index) const { return {op, name, column, index}; }
};

inline std::ostream& operator<<(std::ostream& out, const Argument& argument) {
  out << argument.op << ": " << argument.name;
  for (const int64_t index : {argument.column, argument.row}) {
    if (index >= 0) out << '[' << index << ']';
  }
  return out;
}

// Checks a tensor that a kernel reads or writes through a pointer.
inline void check_tensor(const at::Tensor& tensor, const Argument& argument, at::Device device, at::ScalarType dtype,
                         int64_t numel) {
  TORCH_CHECK(tensor.defined(), argument, " is None");
  TORCH_CHECK(tensor.device() == device, argument, " is on ", tensor.device(), ", not on ", device);
  TORCH_CHECK(tensor.scalar_type() == dtype, argument, " is ", tensor.scalar_type(), ", not ", dtype);
  TORCH_CHECK(tensor.numel() == numel, argument, " has ", tensor.numel(), " elements, not ", numel);
  TORCH_CHECK(tensor.is_contiguous(), argument, " is not contiguous");
}

inline void check_count(size_t found, const Argument& argument, size_t expected) {
  TORCH_CHECK(found == expected, argument, " has ", found, " entries, not ", expected);
}

inline void check_groups(const Groups& groups, const char* op, int64_t num_groups) {
  TORCH_CHECK(0 < num_groups && num_groups <= INT32_MAX, op, ": num_groups is ", num_groups, ", not from 1 to ",
              INT32_MAX);
  if (0 <= groups.least() && groups.most() < num_groups) return;
  const std::vector<int64_t>& numbers = groups.numbers();
  for (size_t i = 0; i < numbers.size(); ++i) {
    TORCH_CHECK(0 <= numbers[i] && numbers[i] < num_groups, op, ": groups[", i, "] is ", numbers[i], ", not from 0 to ",
                num_groups - 1);
  }
}

}  // namespace crsam
