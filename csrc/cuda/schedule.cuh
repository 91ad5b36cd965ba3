// Decides what a block of `step` does next. One warp schedules while the other eight work, so that
// those never wait for a table, a flag or an atomic. All warps of the block meet between two turns.
//
// Blocks claim chunks by ticket and measure them. The block that measured a chunk also applies it,
// once the ratio coefficient of its tensor is published. It applies chunks in the order in which it
// measured them. The queue of chunks that are measured and not yet applied must be unbounded: a
// block that refused another chunk could deadlock with a block that waits for it.
//
// A block waits only for tensors whose chunks are all claimed, by blocks that are running, and only
// after it has reported what it measured itself. So a launch ends for any number of blocks, whether
// or not they run at the same time.
#pragma once

#include <cstring>

#include "cuda/block.cuh"

namespace fastlars::cuda {

// measure_again: repeats the measurement of the turn before the last, because its sums left the
// range of float32.
enum class Action : int { measure, measure_again, apply, wait, leave };

template <class Rule>
struct Turn {
  typename Rule::Coefficients c;
  Chunk chunk;
  Action action;
  int slot;        // of shared memory
  bool in_shared;  // whether the slot still holds what measure stored there
};

// Shared memory of a block.
template <class Rule>
struct StepState {
  Turn<Rule> turn[2];             // threads work on one while the scheduler fills the other
  Scratch<Rule::sums> sums[2];    // of a turn that measures
  int finished;                   // the last turn in which the first warp has done its part
  typename Rule::Coefficients c;  // for the counter of the last tensor looked up
  std::uint64_t answer;           // from the scheduler's first lane to its others
  int first_chunk[kTensorsPerLaunch + 1];  // by tensor; both counted from the launch's first
  float counter[kTensorsPerLaunch];        // by tensor of the launch, for this step
  float gradient_scale[Rule::normalizes ? kTensorsPerLaunch : 1];  // by tensor of the launch
};

// Reports a tensor's ratio and norms, and advances its counter. Blocks that begin late may still
// read that counter, but for no chunk of this tensor, because none is left.
template <class Rule>
__device__ __forceinline__ void finish_tensor(const KernelArgs<Rule>& args,
                                              const StepScalars& scalars, bool step_taken,
                                              int number, const RatioOf<Rule>& ratio,
                                              const Sums<Rule::sums>& sums) {
  write_report<Rule>(ratio, &sums, args.report, number);
  const TensorEntry& tensor = args.tables.tensors[number];
  if (tensor.counter == 0 || !step_taken) return;
  auto* const counter = reinterpret_cast<std::uint32_t*>(tensor.counter);
  const float before = float_of(load_relaxed(counter));
  store_relaxed(counter, bits_of(next_counter(args.rule, scalars, before)));
}

// Copies what tickets are looked up in to shared memory. Called by all threads of a block.
template <class Rule>
__device__ __forceinline__ void start(StepState<Rule>& state, const KernelArgs<Rule>& args) {
  for (int i = thread(); i < args.tensors; i += kThreads + kLanes) {
    const int number = args.first_tensor + i;
    const TensorEntry& tensor = args.tables.tensors[number];
    state.counter[i] = read_counter<true>(args.rule, tensor, true);
    state.first_chunk[i] = tensor.first_chunk - args.first_chunk;
    if constexpr (Rule::normalizes) {
      const StepScalars scalars = args.scalars.step_scalars();
      state.gradient_scale[i] =
          args.gradient_sums == nullptr
              ? static_cast<float>(scalars.gradient_scale)
              : normalizing_scale(args.rule, scalars, args.gradient_sums[number]);
    }
    // No block would report a tensor without chunks.
    if (tensor.chunks == 0 && block() == 0) {
      const StepScalars scalars = args.scalars.step_scalars();
      const Sums<Rule::sums> none = {};
      finish_tensor(args, scalars, args.scalars.step_taken(), number,
                    trust_ratio(args.rule, scalars, none), none);
    }
  }
  if (thread() == 0) {
    state.first_chunk[args.tensors] = args.chunks;
    state.finished = -1;
  }
}

// The scheduling warp. All its lanes hold the same values and do the same, except where one lane
// acts alone or each lane handles a word of its own.
template <class Rule, class Types>
class Scheduler {
 public:
  __device__ Scheduler(StepState<Rule>& state, const KernelArgs<Rule>& args)
      : state_(state),
        args_(args),
        types_(args),
        scalars_(args.scalars.step_scalars()),
        step_taken_(args.scalars.step_taken()),
        epoch_(args.tables.control->epoch + 1) {}

  __device__ void run() {
    Job ended = {Action::wait, {}}, running = ended;
    for (int k = 0;; ++k) {
      Turn<Rule>& turn = state_.turn[k % 2];
      Job next = ended;
      if (ended.measures() && !report(ended, state_.sums[k % 2])) {
        next.action = Action::measure_again;  // the turn still holds the same chunk
      } else {
        next = choose(turn, running, k - 1);
      }
      sync_warp();
      if (lane() == 0) turn.action = next.action;
      meet();
      if (next.action == Action::leave) break;
      ended = running;
      running = next;
    }
    // The last block to finish resets the counters for the next launch.
    Control& control = *args_.tables.control;
    if (lane() == 0 && add_acq_rel(&control.exited, 1) + 1 == unsigned(blocks())) {
      control = {0, 0, epoch_, 0};
    }
  }

 private:
  static constexpr int kSums = Rule::sums;
  using RatioCoefficient = decltype(ratio_coefficient(
      std::declval<const Rule&>(), std::declval<StepScalars>(),
      std::declval<const typename Rule::Coefficients&>(), std::declval<RatioOf<Rule>>()));
  static constexpr int kRatioWords = sizeof(RatioCoefficient) / sizeof(std::uint32_t);
  static_assert(kRatioWords <= kMostRatioWords, "the table of flags has no more");

  // A chunk and its tensor, both counted from the first of the launch.
  struct Claim {
    int chunk, tensor;
  };
  struct Job {
    Action action;
    Claim claim;
    __device__ bool measures() const {
      return action == Action::measure || action == Action::measure_again;
    }
  };

  static __device__ int lane() { return thread() % kLanes; }

  // Gives all lanes the first lane's value.
  __device__ std::uint64_t broadcast(std::uint64_t value) {
    sync_warp();
    if (lane() == 0) state_.answer = value;
    sync_warp();
    return state_.answer;
  }

  // Decides on a turn while the other warps work on turn `running_turn`.
  __device__ Job choose(Turn<Rule>& turn, const Job& running, int running_turn) {
    for (Backoff backoff;; backoff.pause()) {
      RatioCoefficient published;
      if (head_is_ready(published)) return apply(turn, published);
      // When all slots are taken, measuring another chunk evicts one, whose bytes must then be read
      // again. So check the flag for as long as the others work, and longer if all chunks of the
      // tensor are claimed. A tensor of which some are not is larger than all slots together.
      if (pushed_ - popped_ >= args_.shared_slots && !exhausted_) {
        if (finished_turn() < running_turn) continue;
        if (head_.tensor < tensor_) {
          if (running.measures()) return {Action::wait, {}};
          continue;
        }
      }
      Claim claimed;
      if (claim(claimed)) return measure(turn, claimed);
      if (popped_ == pushed_) return {Action::leave, {}};
      // All blocks may be waiting for what is being measured, and it is reported only in the next
      // turn.
      if (running.measures()) return {Action::wait, {}};
    }
  }

  // Whether the ratio coefficients of the tensor at the queue's head are known, and which.
  __device__ bool head_is_ready(RatioCoefficient& published) {
    std::uint32_t words[kRatioWords];
#pragma unroll
    for (int i = 0; i < kRatioWords; ++i) {
      std::uint64_t flag = 0;
      if (lane() == 0 && popped_ != pushed_) {
        flag = load_relaxed(&flags_of(args_.first_tensor + head_.tensor)[i]);
      }
      flag = broadcast(flag);
      if (static_cast<std::uint32_t>(flag >> 32) != epoch_) return false;
      words[i] = static_cast<std::uint32_t>(flag);
    }
    std::memcpy(&published, words, sizeof words);
    return true;
  }

  __device__ std::uint64_t* flags_of(int tensor) {
    return args_.tables.flags + tensor * kRatioWords;
  }

  __device__ int finished_turn() {
    return static_cast<int>(broadcast(load_shared(&state_.finished)));
  }

  // Takes the queue's head.
  __device__ Job apply(Turn<Rule>& turn, const RatioCoefficient& published) {
    const Claim claimed = head_;
    fill(turn, claimed);
    sync_warp();
    if (lane() == 0) {
      turn.slot = popped_ % args_.shared_slots;
      turn.in_shared = pushed_ - popped_ <= args_.shared_slots;
      set_ratio_coefficient(args_.rule, published, turn.c);
    }
    ++popped_;
    if (popped_ != pushed_) {
      const QueueLink link = args_.tables.links[args_.first_chunk + head_.chunk];
      head_ = {link.chunk, link.tensor};
    }
    return {Action::apply, claimed};
  }

  // Claims a chunk if one is left. Only just before it is measured: other blocks wait for its
  // tensor.
  __device__ bool claim(Claim& claimed) {
    if (exhausted_) return false;
    std::uint32_t ticket = 0;
    if (lane() == 0) ticket = add_relaxed(&args_.tables.control->ticket, 1);
    const auto chunk = static_cast<int>(broadcast(ticket));
    exhausted_ = chunk >= args_.chunks;
    // A block's tickets only grow, and so do their tensors.
    for (int passed = kLanes; !exhausted_ && passed == kLanes;) {
      const int i = tensor_ + 1 + lane();
      passed = warp_sum(i < args_.tensors && state_.first_chunk[i] <= chunk ? 1 : 0);
      tensor_ += passed;
    }
    claimed = {chunk, tensor_};
    return !exhausted_;
  }

  // Appends to the queue. Its links are in global memory, and no other block touches them.
  __device__ Job measure(Turn<Rule>& turn, const Claim& claimed) {
    fill(turn, claimed);
    if (lane() == 0) turn.slot = pushed_ % args_.shared_slots;
    if (popped_ == pushed_) {
      head_ = claimed;
    } else if (lane() == 0) {
      args_.tables.links[args_.first_chunk + tail_] = {claimed.chunk, claimed.tensor};
    }
    tail_ = claimed.chunk;
    ++pushed_;
    return {Action::measure, claimed};
  }

  // Writes a turn's chunk and coefficients, a lane for each word.
  __device__ void fill(Turn<Rule>& turn, const Claim& claimed) {
    prepare_coefficients(claimed.tensor);
    const TensorEntry& tensor = args_.tables.tensors[args_.first_tensor + claimed.tensor];
    const auto begin =
        static_cast<std::int64_t>(claimed.chunk - state_.first_chunk[claimed.tensor]) *
        kChunkElements;
    // TensorEntry and Chunk both begin with weight, copy and states.
    constexpr int addresses = 2 + Rules::most_states;
    static_assert(addresses + 2 <= kLanes, "a lane for each");
    if (lane() < addresses) {
      const Dtype type = lane() == 0   ? types_.weight()
                         : lane() == 1 ? types_.copy()
                                       : types_.state();
      const auto* from = reinterpret_cast<const std::uintptr_t*>(&tensor);
      auto* to = reinterpret_cast<std::uintptr_t*>(&turn.chunk);
      to[lane()] = advanced(from[lane()], type, begin);
    } else if (lane() == addresses) {
      turn.chunk.grad = advanced(args_.grad[claimed.tensor], types_.grad(), begin);
    } else if (lane() == addresses + 1) {
      const auto left = min(tensor.size - begin, std::int64_t{kChunkElements});
      turn.chunk.size = step_taken_ ? static_cast<int>(left) : 0;
      turn.chunk.begin = begin;
    }
    constexpr int words = sizeof state_.c / sizeof(std::uint32_t);
    static_assert(words <= kLanes, "a lane for each");
    if (lane() < words) {
      const auto* from = reinterpret_cast<const std::uint32_t*>(&state_.c);
      reinterpret_cast<std::uint32_t*>(&turn.c)[lane()] = from[lane()];
    }
    if constexpr (Rule::normalizes) {
      sync_warp();
      if (lane() == 0) turn.c.gradient_scale = state_.gradient_scale[claimed.tensor];
    }
  }

  // Computes the coefficients of a tensor, unless the last tensor had the same counter: most have.
  __device__ void prepare_coefficients(int tensor) {
    const float counter = state_.counter[tensor];
    if (counter == cached_counter_) return;
    sync_warp();
    if (lane() == 0) state_.c = coefficients(args_.rule, scalars_, counter);
    sync_warp();
    cached_counter_ = counter;
  }

  // Reports what a turn measured, and publishes the tensor's ratio coefficient if this chunk was
  // its last. False where the sums left the range of float32.
  __device__ bool report(const Job& job, const Scratch<kSums>& scratch) {
    Sums<kSums> sums;
    if (job.action == Action::measure) {
      const auto found = sum_of_warps<float>(scratch);
      if (out_of_range(found)) return false;
      sums = found.in_double();
    } else {
      sums = sum_of_warps<double>(scratch).in_double();
    }
    const int first = state_.first_chunk[job.claim.tensor];
    const int chunks = state_.first_chunk[job.claim.tensor + 1] - first;
    const int number = args_.first_tensor + job.claim.tensor;
    if (chunks > 1) {
      auto* tagged = reinterpret_cast<TaggedSums<kSums>*>(args_.tables.tagged) + args_.first_chunk;
      write_tagged(tagged[job.claim.chunk], sums);
      std::uint32_t before = 0;
      if (lane() == 0) before = add_relaxed(&args_.tables.arrived[number], 1);
      if (broadcast(before) + 1 != unsigned(chunks)) return true;
      if (lane() == 0) store_relaxed(&args_.tables.arrived[number], 0u);
      sums = tagged_sums(tagged + first, chunks);
    }
    prepare_coefficients(job.claim.tensor);
    if (lane() == 0) {
      const auto ratio = trust_ratio(args_.rule, scalars_, sums);
      const RatioCoefficient published = ratio_coefficient(args_.rule, scalars_, state_.c, ratio);
      std::uint32_t words[kRatioWords];
      std::memcpy(words, &published, sizeof words);
      // The epoch in the upper half says that the coefficient is of this launch.
#pragma unroll
      for (int i = 0; i < kRatioWords; ++i) {
        store_relaxed(&flags_of(number)[i], tagged_with_epoch(words[i]));
      }
      finish_tensor(args_, scalars_, step_taken_, number, ratio, sums);
    }
    return true;
  }

  __device__ std::uint64_t tagged_with_epoch(std::uint64_t low) const {
    return static_cast<std::uint64_t>(epoch_) << 32 | low;
  }

  // Each half of a double travels with the epoch, so that a word itself says whether it has come. A
  // fence would have to wait for all loads and stores of the warp.
  __device__ void write_tagged(TaggedSums<kSums>& to, const Sums<kSums>& sums) {
    static_assert(2 * kSums <= kLanes, "a lane for each word");
    if (lane() >= 2 * kSums) return;
    double sum = sums.of[0];
#pragma unroll
    for (int i = 1; i < kSums; ++i) sum = lane() < 2 * i ? sum : sums.of[i];
    const std::uint64_t bits = bits_of(sum);
    const std::uint64_t half = lane() % 2 == 0 ? bits & 0xffffffffu : bits >> 32;
    store_relaxed(&to.word[lane()], tagged_with_epoch(half));
  }

  __device__ double read_tagged(const std::uint64_t* word) {
    std::uint64_t low = load_relaxed(word), high = load_relaxed(word + 1);
    for (Backoff backoff; low >> 32 != epoch_ || high >> 32 != epoch_; backoff.pause()) {
      low = load_relaxed(word);
      high = load_relaxed(word + 1);
    }
    return double_of(high << 32 | (low & 0xffffffffu));
  }

  // Sums of a tensor whose chunks have all arrived. One warp adds in the order of a block's warps,
  // for the same bits as tensor_sums() of the two-launch path.
  __device__ Sums<kSums> tagged_sums(const TaggedSums<kSums>* tagged, int chunks) {
    Sums<kSums> sums = {};
    for (int warp = 0; warp < kWarps && warp * kLanes < chunks; ++warp) {
      Sums<kSums> mine = {};
      for (int chunk = warp * kLanes + lane(); chunk < chunks; chunk += kThreads) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) mine.of[i] += read_tagged(&tagged[chunk].word[2 * i]);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums.of[i] += warp_sum(mine.of[i]);
    }
    return sums;
  }

  StepState<Rule>& state_;
  const KernelArgs<Rule>& args_;
  const Types types_;
  const StepScalars scalars_;
  const bool step_taken_;
  const std::uint32_t epoch_;   // the number of this launch
  float cached_counter_ = NAN;  // that state_.c is for
  int pushed_ = 0;              // chunks that this block began to measure
  int popped_ = 0;              // those of them that it began to apply
  Claim head_ = {};             // the first chunk in the queue
  int tail_ = 0;                // the last one
  int tensor_ = 0;              // of the last claim
  bool exhausted_ = false;      // whether all tickets are claimed
};

}  // namespace fastlars::cuda
