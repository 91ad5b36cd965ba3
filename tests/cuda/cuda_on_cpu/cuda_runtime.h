// Stands in for the CUDA toolkit's header where g++ compiles the kernels for a CPU: the qualifiers,
// types and calls that csrc/cuda uses, and no more. device.h says how a kernel then runs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "device.h"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __constant__
// Headers of the standard library that have an attribute of this name are included above.
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// A block's threads share one thread of the operating system.
#define __shared__ static thread_local

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Which the compiler for GPUs knows everywhere.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion;
  int maxDynamicSharedSizeBytes;
};

using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// A made-up device: large enough for blocks to be in each other's way, small enough for a laptop.
namespace on_cpu {

constexpr int kMultiprocessors = 4;
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kSharedOfMultiprocessor = 228 * 1024;
constexpr int kSharedOfBlock = 227 * 1024;
constexpr int kSharedReserved = 1024;
constexpr int kSharedWithoutAsking = 48 * 1024;

struct Runtime {
  std::mutex mutex;
  std::map<const void*, int> allowed;  // dynamic shared memory that a kernel has asked for
  cudaError_t last = cudaSuccess;
};

inline Runtime& runtime() {
  static Runtime one;
  return one;
}

inline cudaError_t fail(cudaError_t error) {
  const std::lock_guard lock(runtime().mutex);
  return runtime().last = error;
}

template <class Kernel>
int allowed(Kernel* kernel) {
  const std::lock_guard lock(runtime().mutex);
  const auto found = runtime().allowed.find(reinterpret_cast<const void*>(kernel));
  return found == runtime().allowed.end() ? kSharedWithoutAsking : found->second;
}

inline int resident(std::size_t shared) {
  const auto each = static_cast<int>(shared) + kSharedReserved;
  return std::min(kBlocksPerMultiprocessor, kSharedOfMultiprocessor / each);
}

}  // namespace on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  // What a test wants to see answered, by its number.
  if (const char* error = std::getenv("FASTLARS_EMULATED_ERROR"); error != nullptr && *error != 0) {
    return on_cpu::fail(static_cast<cudaError_t>(std::atoi(error)));
  }
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x < 1 || grid.y != 1 || grid.z != 1 || block.x < 1 || block.x % on_cpu::kLanes != 0 ||
      block.x > on_cpu::kMostThreads || block.y != 1 || block.z != 1) {
    return on_cpu::fail(cudaErrorInvalidConfiguration);
  }
  const std::size_t shared = config->dynamicSmemBytes;
  if (shared > static_cast<std::size_t>(on_cpu::allowed(kernel))) {
    return on_cpu::fail(cudaErrorInvalidValue);
  }
  on_cpu::launch({static_cast<int>(grid.x), static_cast<int>(block.x),
                  on_cpu::kMultiprocessors * on_cpu::resident(shared), shared,
                  [&] { kernel(arguments...); }});
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const std::lock_guard lock(on_cpu::runtime().mutex);
  return std::exchange(on_cpu::runtime().last, cudaSuccess);
}

inline const char* cudaGetErrorName(cudaError_t error) {
  static const std::map<cudaError_t, const char*> names = {
      {cudaSuccess, "cudaSuccess"},
      {cudaErrorInvalidValue, "cudaErrorInvalidValue"},
      {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation"},
      {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration"},
      {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver"},
      {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction"},
      {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice"},
      {cudaErrorIllegalAddress, "cudaErrorIllegalAddress"},
  };
  const auto found = names.find(error);
  return found == names.end() ? "an error without a name" : found->second;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error that a test has asked for";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = on_cpu::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = on_cpu::kSharedOfMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = on_cpu::kSharedOfBlock;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = on_cpu::kSharedReserved;
      return cudaSuccess;
  }
  return on_cpu::fail(cudaErrorInvalidValue);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  if (value > on_cpu::kSharedOfBlock) return on_cpu::fail(cudaErrorInvalidValue);
  const std::lock_guard lock(on_cpu::runtime().mutex);
  on_cpu::runtime().allowed[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  *attributes = {0, 0, 0, 1024, 64, 90, 90, on_cpu::allowed(kernel)};
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int,
                                                          std::size_t shared) {
  *blocks = on_cpu::resident(shared);
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
