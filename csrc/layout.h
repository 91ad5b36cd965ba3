// Layout: the shapes, strides and devices that all tensors stepped together must share, and the one
// place where addresses are taken: `addresses` in bindings.cpp compares every tensor with the
// layout, and only then takes its address. Kernels pair weights, gradients and states by their
// place in memory: a difference that went unnoticed here would write to the wrong elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "dlpack.h"

namespace fastlars {

// A tensor that cannot be paired with its weight: args are (list, index, what differs).
struct Mismatch : std::exception {
  Mismatch(std::string in, std::size_t at, std::string what)
      : list(std::move(in)), index(at), what_differs(std::move(what)) {}
  std::string list;
  std::size_t index;
  std::string what_differs;
};

inline std::optional<Dtype> dtype_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == 2 && type.bits == 32) return Dtype::float32;
  if (type.code == 2 && type.bits == 16) return Dtype::float16;
  if (type.code == 4 && type.bits == 16) return Dtype::bfloat16;
  return std::nullopt;
}

class Layout {
 public:
  void add(const dlpack::Tensor& tensor) {
    Entry entry;
    entry.device = tensor.device;
    entry.ndim = tensor.ndim;
    entry.extents = extents_.size();
    extents_.insert(extents_.end(), tensor.shape, tensor.shape + tensor.ndim);
    extents_.insert(extents_.end(), tensor.strides, tensor.strides + tensor.ndim);
    numel_.push_back(1);
    for (int d = 0; d < tensor.ndim; ++d) numel_.back() *= tensor.shape[d];
    entries_.push_back(entry);
  }

  // What differs between a tensor and entry i; null where nothing does.
  const char* difference(std::size_t i, const dlpack::Tensor& tensor, Dtype dtype) const {
    const Entry& entry = entries_[i];
    const std::int64_t* shape = extents_.data() + entry.extents;
    const std::int64_t* strides = shape + entry.ndim;
    if (dtype_of(tensor.dtype) != dtype) return "dtype";
    if (!same_device(i, tensor)) return "device";
    if (tensor.ndim != entry.ndim) return "shape";
    if (!std::equal(shape, strides, tensor.shape)) return "shape";
    // The stride of a dimension of size 1 is never used; an empty tensor has no elements to pair.
    for (int d = 0; d < tensor.ndim; ++d) {
      if (tensor.strides[d] != strides[d] && shape[d] > 1 && numel_[i] > 0) return "strides";
    }
    if (tensor.data == nullptr && numel_[i] > 0) return "memory";
    return nullptr;
  }

  // Whether both describe the same shapes, strides and devices.
  bool operator==(const Layout& other) const {
    const auto alike = [](const Entry& a, const Entry& b) {
      return a.device.type == b.device.type && a.device.id == b.device.id && a.ndim == b.ndim;
    };
    return std::equal(entries_.begin(), entries_.end(), other.entries_.begin(),
                      other.entries_.end(), alike) &&
           extents_ == other.extents_;
  }

  // Likewise for a counter, which is a single float, whatever the shape of its weight.
  const char* difference_of_counter(std::size_t i, const dlpack::Tensor& tensor) const {
    if (dtype_of(tensor.dtype) != Dtype::float32) return "dtype";
    if (tensor.ndim != 0) return "shape";
    return same_device(i, tensor) ? nullptr : "device";
  }

  bool same_device(std::size_t i, const dlpack::Tensor& tensor) const {
    const dlpack::Device& device = entries_[i].device;
    return tensor.device.type == device.type && tensor.device.id == device.id;
  }

  const std::vector<std::int64_t>& numel() const { return numel_; }
  std::size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    dlpack::Device device;
    std::int32_t ndim;
    std::size_t extents;  // where its shape begins; its strides follow
  };
  std::vector<Entry> entries_;
  std::vector<std::int64_t> extents_;
  std::vector<std::int64_t> numel_;
};

}  // namespace fastlars
