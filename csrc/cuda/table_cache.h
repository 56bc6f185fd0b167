// Caches bytes for kernels on the device, so that they are copied only if they change.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

namespace crsam {

// The copy is asynchronous, through pinned memory. An entry is valid only for the stream of its copy, so that later
// kernels on this stream run after the copy, and freed memory is reused in order.
//
// A graph replays captured copies. So an entry that is copied during a capture is valid only for this capture, and its
// pinned source is never freed or changed: there is no callback when a graph is destroyed.
class TableCache {
 public:
  // Returns the device address of the bytes that `build` returns. Equal keys must mean equal bytes.
  template <typename Build>
  void* get(std::string key, at::Device device, cudaStream_t stream, Build build) {
    const unsigned long long capture = capture_of(stream);
    for (const uint64_t part :
         {reinterpret_cast<uint64_t>(stream), static_cast<uint64_t>(device.index()), static_cast<uint64_t>(capture)}) {
      key.append(reinterpret_cast<const char*>(&part), sizeof part);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = entries_.find(key);
    if (found == entries_.end()) {
      forget_oldest();
      found = entries_.emplace(std::move(key), copy(build(), device, capture != 0)).first;
    }
    found->second.used = ++clock_;
    return found->second.table.mutable_data_ptr();
  }

 private:
  struct Entry {
    at::Tensor table;
    at::Tensor source;  // defined only for an entry of a graph
    uint64_t used = 0;
  };
  static constexpr size_t kEntries = 256;  // a training loop uses about 10

  static unsigned long long capture_of(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
    return status == cudaStreamCaptureStatusActive ? id : 0;
  }

  static Entry copy(const std::string& bytes, at::Device device, bool captured) {
    const int64_t size = static_cast<int64_t>(bytes.size());
    const auto options = at::TensorOptions(at::kByte);
    Entry entry;
    {
      // Pinning memory is not a stream operation, so it can be permitted during a capture.
      const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
      entry.source = at::empty({size}, options.pinned_memory(device.is_cuda()));
    }
    memcpy(entry.source.mutable_data_ptr(), bytes.data(), bytes.size());
    entry.table = at::empty({size}, options.device(device));
    entry.table.copy_(entry.source, /*non_blocking=*/true);
    if (!captured) entry.source.reset();  // the pinned allocator reuses the memory only after the copy
    return entry;
  }

  void forget_oldest() {
    if (entries_.size() < kEntries + captured_) return;
    auto oldest = entries_.end();
    captured_ = 0;
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->second.source.defined()) {
        ++captured_;
      } else if (oldest == entries_.end() || it->second.used < oldest->second.used) {
        oldest = it;
      }
    }
    if (oldest != entries_.end() && entries_.size() >= kEntries + captured_) entries_.erase(oldest);
  }

  std::mutex mutex_;
  std::unordered_map<std::string, Entry> entries_;
  uint64_t clock_ = 0;
  size_t captured_ = 0;  // number of entries of graphs at the last count
};

}  // namespace crsam
