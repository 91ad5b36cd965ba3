// The part of the DLPack standard (version 1.3) through which tensors are looked at: the C function
// table that a tensor type publishes as __dlpack_c_exchange_api__. Layouts are fixed by the
// standard.
#pragma once

#include <cstdint>

namespace fastlars::dlpack {

struct Device {
  std::int32_t type;  // 1 is the CPU, 2 CUDA
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;  // 2 is IEEE floating point, 4 bfloat16
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view_object)(void* object, Tensor* out);  // borrows; -1 with a Python error set
  void* current_stream;
};

constexpr std::uint32_t kMajor = 1;

}  // namespace fastlars::dlpack
