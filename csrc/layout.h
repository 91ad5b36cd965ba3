// Layout: the shapes, strides and devices that all tensors stepped together must share, and the one
// place where addresses are taken: `addresses` looks at every tensor, compares, and only then gives
// its address. Kernels pair weights, gradients and states by their place in memory, so that a
// difference that goes unnoticed here writes to the wrong elements. Part of the Python binding.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "dlpack.h"

namespace fastlars {

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
    entry.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
    entry.strides.assign(tensor.strides, tensor.strides + tensor.ndim);
    numel_.push_back(1);
    for (const auto size : entry.shape) numel_.back() *= size;
    entries_.push_back(std::move(entry));
  }

  // Empty where the tensor pairs up with entry i; else what differs.
  std::string difference(std::size_t i, const dlpack::Tensor& tensor, Dtype dtype) const {
    const Entry& entry = entries_[i];
    if (dtype_of(tensor.dtype) != dtype) return "dtype";
    if (tensor.device.type != entry.device.type || tensor.device.id != entry.device.id) {
      return "device";
    }
    if (tensor.ndim != static_cast<std::int32_t>(entry.shape.size())) return "shape";
    for (int d = 0; d < tensor.ndim; ++d) {
      if (tensor.shape[d] != entry.shape[d]) return "shape";
    }
    // The stride of a dimension of size 1 is never used; an empty tensor has no elements to pair.
    for (int d = 0; d < tensor.ndim; ++d) {
      if (tensor.shape[d] > 1 && tensor.strides[d] != entry.strides[d] && numel_[i] > 0) {
        return "strides";
      }
    }
    return "";
  }

  const std::vector<std::int64_t>& numel() const { return numel_; }
  std::size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    dlpack::Device device;
    std::vector<std::int64_t> shape, strides;
  };
  std::vector<Entry> entries_;
  std::vector<std::int64_t> numel_;
};

}  // namespace fastlars
