// Shared by the kernels: load a tensor's coefficients, sum up a chunk, walk a block through its
// chunks, and leave counters as the next launch needs them.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector_io.cuh"

namespace fastlars::cuda {

// Where apply reads what measure read (LARS: gradients) or computed (LAMB: updates) of a chunk:
//   global   global memory; apply is a launch of its own
//   shared   shared memory, where the block has cached it
//   evicted  global memory again: chunks measured later have taken its slot of shared memory
//   fused    nothing to read: the chunk was not measured, because the rule does not adapt
enum class OperandSource { global, shared, evicted, fused };

// A rule's loops over one chunk, in the file of the rule:
//   measure<CacheInShared, Batch>  adds to a thread's sums; with CacheInShared, stores what
//                                  OperandSource::shared reads to `cache`
//   measure_again                  the same in double, from states that have already advanced; only
//                                  for rules whose measure writes
//   kMeasureBlocks                 minimum resident blocks of measure per multiprocessor
//   kCached                        floats of an element that `cache` holds
//   apply<OperandSource, StochasticRounding>
template <class Rule>
struct ChunkOps;

// The tensor that a block works on, and which of its chunks the block takes. Looked up once for all
// of them: a read of the tables takes microseconds while the memory is busy.
template <class Rule>
struct CurrentTensor {
  typename Rule::Coefficients c;
  float counter;  // that the coefficients are for
  TensorEntry entry;
  std::uintptr_t grad;
  int number;
  int random_stream;         // where apply rounds stochastically
  int first, end;            // chunks; both 0 when the block is done
  int full_size, last_size;  // of its chunks, and of its last chunk; 0 where the step is skipped
};

// Shared memory of a block.
template <class Rule>
struct BlockState {
  CurrentTensor<Rule> tensor;
  int run, begin, end;  // the current run, and its chunks that are left
  bool last;
};

// The counter of a tensor in this step. Steps count from 1; `advances` where no launch has counted
// this step yet. `Concurrent`: another block may advance the counter at the same time. Where none
// does, a plain load saves registers. A rule that does not step has no counter.
template <bool Concurrent = false, class Rule>
__device__ __forceinline__ float read_counter(const Rule&, const TensorEntry& tensor,
                                              bool advances) {
  if (!Rule::steps || tensor.counter == 0) return 0.0f;
  const float found =
      Concurrent ? float_of(load_relaxed(reinterpret_cast<const std::uint32_t*>(tensor.counter)))
                 : *reinterpret_cast<const float*>(tensor.counter);
  return Rule::counts_steps && advances ? found + 1.0f : found;
}

// Sums of one chunk in double.
template <class Rule, class Types>
__device__ __forceinline__ void measure_again(const typename Rule::Coefficients& c,
                                              const Types& types, const Chunk& chunk,
                                              PartialSums<double, Rule::sums>& sums) {
  if constexpr (Rule::measure_writes) {
    ChunkOps<Rule>::measure_again(c, types, chunk, sums);
  } else {
    ChunkOps<Rule>::template measure<false, 1>(c, types, chunk, sums, nullptr);
  }
}

// Sums of squares of one chunk: the same for all threads.
template <class Rule, class Types>
__device__ __forceinline__ Sums<Rule::sums> measure_chunk(const typename Rule::Coefficients& c,
                                                          const Types& types, const Chunk& chunk,
                                                          Scratch<Rule::sums> (&scratch)[2]) {
  PartialSums<float, Rule::sums> mine = {};
  ChunkOps<Rule>::template measure<false>(c, types, chunk, mine, nullptr);
  const auto sums = block_sum(mine, scratch[0]);
  if (!out_of_range(sums)) return sums.in_double();
  PartialSums<double, Rule::sums> again = {};
  measure_again<Rule>(c, types, chunk, again);
  return block_sum(again, scratch[1]).in_double();
}

// Whether this block is the launch's last one to get here: then all others have finished.
__device__ __forceinline__ bool is_last_block(Control& control, bool& last) {
  barrier();
  if (thread() == 0) {
    last = add_acq_rel(&control.exited, 1) + 1 == static_cast<std::uint32_t>(blocks());
    if (last) control.exited = 0;
  }
  barrier();
  return last;
}

// For every tensor of the launch: advances its counter where `advances`, and calls `empty(tensor)`
// where it has no chunk, so that no block has written its results. Called by the last block.
template <class Rule, class F>
__device__ __forceinline__ void finish_launch(const KernelArgs<Rule>& args, bool advances,
                                              F&& empty) {
  for (int i = thread(); i < args.tensors; i += kThreads) {
    const TensorEntry& tensor = args.tables.tensors[args.first_tensor + i];
    if (advances && args.scalars.step_taken() && tensor.counter != 0) {
      auto& counter = *reinterpret_cast<float*>(tensor.counter);
      counter = next_counter(args.rule, args.scalars.step_scalars(), counter);
    }
    if (tensor.chunks == 0) empty(args.first_tensor + i);
  }
}

// The first chunk of a run.
template <class Rule>
__device__ __forceinline__ int first_chunk(const KernelArgs<Rule>& args, int run) {
  return args.first_chunk + run * args.chunks_per_run + min(run, args.longer_runs);
}

template <class Rule>
__device__ __forceinline__ void start(BlockState<Rule>& state) {
  state.tensor.counter = NAN;
  state.run = block() - blocks();
  state.begin = state.end = 0;
}

// Moves on to the next tensor. Called by one thread: its variables are in shared memory, because
// registers are scarce. All blocks move through the list at the same pace, so that the cache then
// holds the list's end. `Backwards` starts there, to use what the cache holds.
template <bool Backwards, class Rule>
__device__ __forceinline__ void next_tensor(const KernelArgs<Rule>& args, bool advances,
                                            BlockState<Rule>& state) {
  CurrentTensor<Rule>& tensor = state.tensor;
  const Tables& tables = args.tables;
  while (state.begin == state.end) {
    state.run += blocks();
    if (state.run >= args.runs) {
      tensor.first = tensor.end = 0;
      return;
    }
    const int run = Backwards ? args.runs - 1 - state.run : state.run;
    state.begin = first_chunk(args, run);
    state.end = first_chunk(args, run + 1);
  }
  const ChunkEntry chunk = tables.chunks[Backwards ? state.end - 1 : state.begin];
  tensor.entry = tables.tensors[chunk.tensor];
  tensor.grad = args.grad[chunk.tensor - args.first_tensor];
  tensor.number = chunk.tensor;
  tensor.first = state.begin;
  tensor.end = state.end;
  if (Backwards) {
    tensor.first = state.end = max(tensor.entry.first_chunk, state.begin);
  } else {
    tensor.end = state.begin = min(tensor.entry.first_chunk + tensor.entry.chunks, state.end);
  }
  const bool step_taken = args.scalars.step_taken();
  tensor.full_size = step_taken ? kChunkElements : 0;
  tensor.last_size = step_taken ? tables.chunks[tensor.end - 1].size : 0;
  const float counter = read_counter(args.rule, tensor.entry, advances);
  if (counter != tensor.counter) {
    tensor.c = coefficients(args.rule, args.scalars.step_scalars(), counter);
  }
  tensor.counter = counter;
  normalize_gradient(args.rule, args.scalars.step_scalars(), args.gradient_sums, chunk.tensor,
                     tensor.c);
}

// A chunk of the current tensor, without a read of the tables in global memory.
template <class Types, class Rule>
__device__ __forceinline__ Chunk locate_chunk(const Types& types, const CurrentTensor<Rule>& tensor,
                                              int number) {
  const TensorEntry& entry = tensor.entry;
  const int index = number - entry.first_chunk;
  const std::int64_t begin = std::int64_t{index} * kChunkElements;
  Chunk chunk;
  chunk.weight = advanced(entry.weight, types.weight(), begin);
  chunk.copy = Types::has_copies ? advanced(entry.copy, types.copy(), begin) : 0;
#pragma unroll
  for (int i = 0; i < Rule::states; ++i) {
    chunk.state[i] = advanced(entry.state[i], types.state(), begin);
  }
  chunk.grad = advanced(tensor.grad, types.grad(), begin);
  chunk.begin = begin;
  chunk.random_stream = tensor.random_stream;
  chunk.size = index == entry.chunks - 1 ? tensor.last_size : tensor.full_size;
  return chunk;
}

}  // namespace fastlars::cuda
