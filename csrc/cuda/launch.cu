#include <map>
#include <mutex>
#include <tuple>

#include "cuda/launch.cuh"

namespace fastlars::cuda {
namespace {

__global__ void probe() {}

std::string dotted(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int attribute(cudaDeviceAttr which, const char* kernel) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&value, which, device), kernel);
  return value;
}

// What a user can do about an error; empty where CUDA's own message must do.
std::string advice_on(cudaError_t code) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  switch (code) {
    case cudaErrorInsufficientDriver:
      return driver == 0 ? "no NVIDIA driver was found"
                         : "the driver serves CUDA " + dotted(driver) +
                               ", and fastlars was built with CUDA " + dotted(runtime) +
                               ": update the driver, or build fastlars with an older nvcc";
    case cudaErrorNoDevice:
      return "no NVIDIA GPU is visible";
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
      return "fastlars was not built for this GPU's architecture: build it with "
             "FASTLARS_CUDA_ARCHS=native, or unset FASTLARS_BACKEND and let Triton serve it";
    case cudaErrorMemoryAllocation:
      return "the GPU has no memory left to load the kernel";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
      return "an earlier operation on this GPU failed: CUDA_LAUNCH_BLOCKING=1 shows which";
    default:
      return "";
  }
}

}  // namespace

void check(cudaError_t code, const char* kernel) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would report again otherwise
  const std::string advice = advice_on(code);
  throw Error(std::string("fastlars kernel ") + kernel + ": " + cudaGetErrorName(code) + ", " +
              cudaGetErrorString(code) + (advice.empty() ? "" : "; " + advice));
}

int blocks_at_once(const void* kernel, int threads, int shared_bytes, const char* name) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (shared_bytes > 0) {
    // Raise the limit to all that there is: a later launch may have more slots.
    cudaFuncAttributes of_kernel;
    check(cudaFuncGetAttributes(&of_kernel, kernel), name);
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, name) -
                     static_cast<int>(of_kernel.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  }
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes), name);
  const int blocks = std::max(1, each) * attribute(cudaDevAttrMultiProcessorCount, name);
  known.emplace(key, blocks);
  return blocks;
}

int slots_that_fit(int blocks, int bytes, int most) {
  const int all = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, "step");
  const int one = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "step");
  const int room = std::min(all / blocks, one) - kReservedBytes;
  return std::clamp(room / bytes, 1, most);
}

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, probe);
  if (code == cudaSuccess) return "";
  cudaGetLastError();
  const std::string advice = advice_on(code);
  return std::string(cudaGetErrorName(code)) + (advice.empty() ? "" : ": " + advice);
}

}  // namespace fastlars::cuda
