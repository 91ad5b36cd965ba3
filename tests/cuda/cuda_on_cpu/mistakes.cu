// A kernel that adds up an array, and the mistakes that kernels are prone to: the first argument
// names the one that is made. What must be noticed is in test_cuda_on_cpu.py.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/intrinsics.cuh"

using namespace fastlars::cuda;

enum Mistake {
  none,
  an_ended_thread,
  another_barrier,
  another_warp_sum,
  no_barrier,
  no_order_between_blocks,
  no_value,
  no_end,
  off_its_boundary,
  beyond_shared_memory,
};
constexpr const char* kNames[] = {"none",
                                  "an ended thread",
                                  "another barrier",
                                  "another warp sum",
                                  "no barrier",
                                  "no order between blocks",
                                  "no value",
                                  "no end",
                                  "off its boundary",
                                  "beyond shared memory"};

struct Args {
  Mistake mistake;
  int size;
  const float* values;
  double* slots;
  std::uint32_t* arrived;
  const std::uint64_t* never;
  double* sum;
};

__global__ void __launch_bounds__(kThreads, 3) add_up(const __grid_constant__ Args args) {
  __shared__ double by_warp[kWarps];
  __shared__ bool last;
  const Mistake mistake = args.mistake;
  double mine = 0.0;
  for (int i = block() * kThreads + thread(); i < args.size; i += blocks() * kThreads) {
    mine += read<true>(args.values + i);
  }
  if (mistake == off_its_boundary) {
    mine += read<true>(reinterpret_cast<const float4*>(args.values + 1)).x;
  }
  if (mistake == beyond_shared_memory) dynamic_shared()[kThreads + thread()].x = 1.0f;
  if (mistake == another_warp_sum && thread() == 5) {
    mine = warp_sum(mine);
  } else {
    mine = warp_sum(mine);
  }
  if (thread() % 32 == 0 && mistake != no_value) by_warp[thread() / 32] = mine;
  if (mistake == an_ended_thread && thread() == 77) return;
  if (mistake == another_barrier && thread() == 77) {
    barrier();
  } else if (mistake != no_barrier) {
    barrier();
  }
  for (Backoff backoff; mistake == no_end && thread() == 0 && load_relaxed(args.never) == 0;) {
    backoff.pause();
  }
  if (thread() == 0) {
    double sum = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) sum += by_warp[warp];
    args.slots[block()] = sum;
    const std::uint32_t before = mistake == no_order_between_blocks ? add_relaxed(args.arrived, 1)
                                                                    : add_acq_rel(args.arrived, 1);
    last = before + 1 == static_cast<std::uint32_t>(blocks());
    if (last) *args.arrived = 0;
  }
  barrier();
  if (last && thread() == 0) {
    double sum = 0.0;
    for (int i = 0; i < blocks(); ++i) sum += args.slots[i];
    *args.sum = sum;
  }
}

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "none";
  int mistake = 0;
  while (kNames[mistake] != name) ++mistake;
  const std::vector<float> values(10000, 0.5f);
  std::vector<double> slots(16);
  std::uint32_t arrived = 0;
  const std::uint64_t never = 0;
  double sum = 0.0;
  const Args args = {
      static_cast<Mistake>(mistake), 10000, values.data(), slots.data(), &arrived, &never, &sum};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kThreads * sizeof(float4);
  for (int launch = 0; launch < 5; ++launch) {
    for (int blocks : {1, 4}) {
      sum = 0.0;
      config.gridDim = dim3(blocks);
      if (cudaLaunchKernelEx(&config, add_up, args) != cudaSuccess || sum != 5000.0) {
        std::printf("wrong: %g\n", sum);
        return 1;
      }
    }
  }
  std::printf("right\n");
  return 0;
}
