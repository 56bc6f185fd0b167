// Argument types of the operators: immutable lists with cached metadata, because a step passes the same lists to
// several operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace crsam {

// An immutable list of tensors with cached metadata; a tensor is undefined where Python has None.
class Column {
 public:
  explicit Column(std::vector<at::Tensor> tensors) : items_(std::move(tensors)) {
    addresses_.reserve(size());
    numels_.reserve(size());
    for (const at::Tensor& tensor : items_) {
      const int64_t numel = tensor.defined() ? tensor.numel() : 0;
      addresses_.push_back(address(numel > 0 ? tensor.const_data_ptr() : nullptr));
      numels_.push_back(numel);
      alike_ = alike_ && tensor.defined() && tensor.is_contiguous() && tensor.device() == items_[0].device() &&
               tensor.scalar_type() == items_[0].scalar_type();
    }
  }

  // `tensors` must have the memory order of `like`, which has no gaps, and its dtype and device.
  Column(std::vector<at::Tensor> tensors, const Column& like)
      : items_(std::move(tensors)), numels_(like.numels_), alike_(true) {
    addresses_.reserve(size());
    for (const at::Tensor& tensor : items_) addresses_.push_back(address(tensor.const_data_ptr()));
  }

  size_t size() const { return items_.size(); }
  bool empty() const { return items_.empty(); }
  const at::Tensor& operator[](size_t i) const { return items_[i]; }
  auto begin() const { return items_.begin(); }
  auto end() const { return items_.end(); }

  // 0 for an undefined tensor, and for a tensor without elements.
  const std::vector<int64_t>& addresses() const { return addresses_; }
  const std::vector<int64_t>& numels() const { return numels_; }

  // The sorted addresses of the tensors that have elements.
  const std::vector<int64_t>& sorted_addresses() const {
    if (sorted_.empty()) {
      sorted_ = addresses_;
      std::sort(sorted_.begin(), sorted_.end());
      sorted_.erase(sorted_.begin(), std::upper_bound(sorted_.begin(), sorted_.end(), 0));
    }
    return sorted_;
  }

  // Whether all tensors are defined, have no gaps in memory, and have the same dtype and device.
  bool alike() const { return alike_ && !items_.empty(); }
  bool consists_of(at::Device device, at::ScalarType type) const {
    return alike() && items_[0].device() == device && items_[0].scalar_type() == type;
  }

  // At least one tensor for each version counter: views share the counter of their base.
  const std::vector<at::Tensor>& versioned() const {
    if (versioned_.empty()) {
      const void* last = nullptr;
      for (const at::Tensor& tensor : items_) {
        if (!tensor.defined()) continue;
        const void* base = tensor.is_view() ? tensor._base().unsafeGetTensorImpl() : tensor.unsafeGetTensorImpl();
        if (base != last) versioned_.push_back(tensor);  // rows of one buffer are consecutive
        last = base;
      }
    }
    return versioned_;
  }

 private:
  static int64_t address(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }

  std::vector<at::Tensor> items_;
  std::vector<int64_t> addresses_;
  std::vector<int64_t> numels_;
  bool alike_ = true;
  mutable std::vector<int64_t> sorted_;
  mutable std::vector<at::Tensor> versioned_;
};

// Several lists of equal length: one for each pass, or one for each state buffer of an update rule.
class Columns {
 public:
  explicit Columns(std::vector<std::shared_ptr<const Column>> columns) : columns_(std::move(columns)) {}

  // The concatenated lists, as schemas have them.
  explicit Columns(std::vector<at::Tensor> flat) : flat_(std::move(flat)) {}

  // The lists; concatenated lists are split into lists of `size` tensors.
  std::vector<std::shared_ptr<const Column>> of(size_t size) const {
    if (flat_.empty()) return columns_;
    TORCH_CHECK(size > 0 && flat_.size() % size == 0, flat_.size(), " tensors cannot be split into lists of ", size);
    std::vector<std::shared_ptr<const Column>> columns;
    for (auto begin = flat_.begin(); begin != flat_.end(); begin += size) {
      columns.push_back(std::make_shared<Column>(std::vector<at::Tensor>(begin, begin + size)));
    }
    return columns;
  }

  // The constructor's argument: one of the two is empty.
  const std::vector<std::shared_ptr<const Column>>& columns() const { return columns_; }
  const std::vector<at::Tensor>& flat() const { return flat_; }

 private:
  std::vector<std::shared_ptr<const Column>> columns_;
  std::vector<at::Tensor> flat_;
};

// A list whose tensors are optional in the schema.
struct Optional {
  const Column& column;
};

// The group of each row.
class Groups {
 public:
  explicit Groups(std::vector<int64_t> numbers) : numbers_(std::move(numbers)) {
    const auto [least, most] = std::minmax_element(numbers_.begin(), numbers_.end());
    if (!numbers_.empty()) least_ = *least, most_ = *most;
  }

  const std::vector<int64_t>& numbers() const { return numbers_; }
  int64_t least() const { return least_; }
  int64_t most() const { return most_; }

 private:
  std::vector<int64_t> numbers_;
  int64_t least_ = 0, most_ = 0;
};

}  // namespace crsam
