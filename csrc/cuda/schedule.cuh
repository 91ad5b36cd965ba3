// What a block of `step` does next, decided by a warp of its own while the others work: they never
// wait for a table, a flag or an atomic. All warps of the block meet between two turns.
//
// Chunks are claimed by ticket and measured; the block that measured a chunk also applies it, once
// the rate of its tensor is published. It applies chunks in the order in which it measured them.
// What it has measured and not yet applied has no bound: a block that could not take on more would
// have to wait for others, which may be waiting for it.
//
// A block waits only for tensors whose chunks are all claimed, by blocks that run, and never before
// it has reported what it measured itself. So a launch ends for any number of blocks, whether or
// not they run at once.
#pragma once

#include "cuda/frame.cuh"

namespace fastlars::cuda {

// measure_again: what the turn before the last measured, because its sums left the range of
// float32.
enum class Do : int { measure, measure_again, apply, wait, leave };

template <class Rule>
struct Turn {
  typename Body<Rule>::Coefficients c;
  Chunk chunk;
  Do what;
  int slot;   // of the ring
  bool held;  // whether the slot still has what measure put there
};

// What the warps of a block share.
template <class Rule>
struct Shared {
  Turn<Rule> turn[2];                   // one is worked on while the other is made up
  Scratch sums[2];                      // of a turn that measures
  int worked;                           // the last turn that the first warp has done its part of
  typename Body<Rule>::Coefficients c;  // for the counter that was asked for last
  std::uint64_t answer;                 // of the scheduler's first lane to the others
  int first[kTensors + 1];              // chunk of the launch, by tensor of the launch
  float counter[kTensors];              // likewise, as this step has it
};

// The rate of a tensor, and the launch that it is of: who reads one has both.
__device__ __forceinline__ std::uint64_t flag_of(std::uint32_t epoch, float rate) {
  return static_cast<std::uint64_t>(epoch) << 32 | bits_of(rate);
}

// Reports a tensor's ratio and advances its counter. Blocks that begin late may still read that
// counter; but not for a chunk of this tensor, because none is left.
template <class Rule>
__device__ __forceinline__ void finish(const Call<Rule>& call, const Scalars& now, bool live,
                                       int tensor, double trust) {
  call.ratios[tensor] = static_cast<float>(trust);
  const Row& row = call.tables.rows[tensor];
  if (row.counter == 0 || !live) return;
  auto* const place = reinterpret_cast<std::uint32_t*>(row.counter);
  const float before = float_of(load_relaxed(place));
  store_relaxed(place, bits_of(advanced(call.rule, now, before)));
}

// Copies what tickets are looked up in. For all threads of a block.
template <class Rule>
__device__ __forceinline__ void open(Shared<Rule>& shared, const Call<Rule>& call) {
  for (int i = thread(); i < call.tensors; i += kThreads + kLanes) {
    const int tensor = call.tensor + i;
    const Row& row = call.tables.rows[tensor];
    shared.counter[i] = counter<true>(call.rule, row, true);
    shared.first[i] = row.first - call.chunk;
    // Nobody would report a tensor that has no chunk.
    if (row.chunks == 0 && block() == 0) {
      const Scalars now = today(call);
      finish(call, now, is_live(call), tensor, trust_ratio(call.rule, now, {0.0, 0.0}));
    }
  }
  if (thread() == 0) {
    shared.first[call.tensors] = call.chunks;
    shared.worked = -1;
  }
}

// The warp that schedules. Its lanes hold the same and do the same, but for what one of them must
// do alone, or each with a word of its own.
template <class Rule, class Types>
class Scheduler {
 public:
  __device__ Scheduler(Shared<Rule>& shared, const Call<Rule>& call)
      : shared_(shared),
        call_(call),
        types_(call),
        now_(today(call)),
        live_(is_live(call)),
        epoch_(call.tables.control->epoch + 1) {}

  __device__ void run() {
    Work ended = {Do::wait, {}}, running = ended;
    for (int k = 0;; ++k) {
      Turn<Rule>& turn = shared_.turn[k % 2];
      Work next = ended;
      if (ended.measures() && !report(ended, shared_.sums[k % 2])) {
        next.what = Do::measure_again;  // all else of that turn still stands there
      } else {
        next = choose(turn, running, k - 1);
      }
      sync_warp();
      if (lane() == 0) turn.what = next.what;
      meet();
      if (next.what == Do::leave) break;
      ended = running;
      running = next;
    }
    // The last block to leave puts back what the next launch counts with.
    Control& control = *call_.tables.control;
    if (lane() == 0 && add_acq_rel(&control.exited, 1) + 1 == unsigned(blocks())) {
      control = {0, 0, epoch_, 0};
    }
  }

 private:
  // A chunk and its tensor, both counted from the first of the launch.
  struct Place {
    int chunk, tensor;
  };
  struct Work {
    Do what;
    Place place;
    __device__ bool measures() const { return what == Do::measure || what == Do::measure_again; }
  };

  static __device__ int lane() { return thread() % kLanes; }

  // What the first lane has, for all lanes.
  __device__ std::uint64_t share(std::uint64_t value) {
    sync_warp();
    if (lane() == 0) shared_.answer = value;
    sync_warp();
    return shared_.answer;
  }

  // Decides on a turn, while the others work on turn `running_turn`.
  __device__ Work choose(Turn<Rule>& turn, const Work& running, int running_turn) {
    for (Patience patience;; patience.pause()) {
      const std::uint64_t flag = look();
      if (static_cast<std::uint32_t>(flag >> 32) == epoch_) {
        return apply(turn, float_of(static_cast<std::uint32_t>(flag)));
      }
      // To measure another chunk would drive one out of a full ring, which costs its bytes again:
      // worth looks at the flag for as long as the others work, and longer where all chunks of its
      // tensor are claimed. A tensor of which some are not is larger than all rings.
      if (pushed_ - popped_ >= call_.ring && !exhausted_) {
        if (worked() < running_turn) continue;
        if (head_.tensor < tensor_) {
          if (running.measures()) return {Do::wait, {}};
          continue;
        }
      }
      Place place;
      if (claim(place)) return measure(turn, place);
      if (popped_ == pushed_) return {Do::leave, {}};
      // What is measured now may be what all wait for, and is reported after the next turn begins.
      if (running.measures()) return {Do::wait, {}};
    }
  }

  // The flag of the queue's head, 0 where there is none.
  __device__ std::uint64_t look() {
    std::uint64_t flag = 0;
    if (lane() == 0 && popped_ != pushed_) {
      flag = load_relaxed(&call_.tables.flags[call_.tensor + head_.tensor]);
    }
    return share(flag);
  }

  __device__ int worked() { return static_cast<int>(share(load_shared(&shared_.worked))); }

  // Takes the queue's head.
  __device__ Work apply(Turn<Rule>& turn, float rate) {
    const Place place = head_;
    fill(turn, place);
    sync_warp();
    if (lane() == 0) {
      turn.slot = popped_ % call_.ring;
      turn.held = pushed_ - popped_ <= call_.ring;
      set_trusted(call_.rule, rate, turn.c);
    }
    ++popped_;
    if (popped_ != pushed_) {
      const Link link = call_.tables.links[call_.chunk + head_.chunk];
      head_ = {link.chunk, link.tensor};
    }
    return {Do::apply, place};
  }

  // Claims a chunk, if one is left. No earlier than it is to be measured: its tensor would wait.
  __device__ bool claim(Place& place) {
    if (exhausted_) return false;
    std::uint32_t ticket = 0;
    if (lane() == 0) ticket = add_relaxed(&call_.tables.control->ticket, 1);
    const auto chunk = static_cast<int>(share(ticket));
    exhausted_ = chunk >= call_.chunks;
    // Tickets of a block grow, and with them the tensors that they are of.
    for (int passed = kLanes; !exhausted_ && passed == kLanes;) {
      const int i = tensor_ + 1 + lane();
      passed = warp_sum(i < call_.tensors && shared_.first[i] <= chunk ? 1 : 0);
      tensor_ += passed;
    }
    place = {chunk, tensor_};
    return !exhausted_;
  }

  // Appends to the queue. Its links are global memory, which no other block touches.
  __device__ Work measure(Turn<Rule>& turn, const Place& place) {
    fill(turn, place);
    if (lane() == 0) turn.slot = pushed_ % call_.ring;
    if (popped_ == pushed_) {
      head_ = place;
    } else if (lane() == 0) {
      call_.tables.links[call_.chunk + tail_] = {place.chunk, place.tensor};
    }
    tail_ = place.chunk;
    ++pushed_;
    return {Do::measure, place};
  }

  // A turn's chunk and coefficients, a lane for each word.
  __device__ void fill(Turn<Rule>& turn, const Place& place) {
    prepare_coefficients(place.tensor);
    const Row& row = call_.tables.rows[call_.tensor + place.tensor];
    const auto begin =
        static_cast<std::int64_t>(place.chunk - shared_.first[place.tensor]) * kChunk;
    if (lane() < 4) {
      // Row and Chunk begin alike: weight, copy, two states.
      const Dtype type = lane() == 0   ? types_.weight()
                         : lane() == 1 ? types_.copy()
                                       : types_.state();
      const auto* from = reinterpret_cast<const std::uintptr_t*>(&row);
      auto* to = reinterpret_cast<std::uintptr_t*>(&turn.chunk);
      to[lane()] = advanced(from[lane()], type, begin);
    } else if (lane() == 4) {
      turn.chunk.grad = advanced(call_.grad[place.tensor], types_.grad(), begin);
    } else if (lane() == 5) {
      turn.chunk.size = live_ ? static_cast<int>(min(row.size - begin, std::int64_t{kChunk})) : 0;
      turn.chunk.tensor = call_.tensor + place.tensor;
      turn.chunk.begin = begin;
    }
    constexpr int words = sizeof shared_.c / sizeof(std::uint32_t);
    static_assert(words <= kLanes, "a lane for each");
    if (lane() < words) {
      const auto* from = reinterpret_cast<const std::uint32_t*>(&shared_.c);
      reinterpret_cast<std::uint32_t*>(&turn.c)[lane()] = from[lane()];
    }
  }

  // Makes the shared ones those of a tensor. Mostly they are.
  __device__ void prepare_coefficients(int tensor) {
    const float counter = shared_.counter[tensor];
    if (counter == known_) return;
    sync_warp();
    if (lane() == 0) shared_.c = coefficients(call_.rule, now_, counter);
    sync_warp();
    known_ = counter;
  }

  // Hands on what a turn measured, and publishes the tensor's rate where all else of it has come.
  // False where the sums left the range of float32.
  __device__ bool report(const Work& work, const Scratch& scratch) {
    Sums sums;
    if (work.what == Do::measure) {
      const Pair<float> sum = sum_of_warps<float>(scratch);
      if (Body<Rule>::out_of_range(sum)) return false;
      sums = {sum.weight, sum.update};
    } else {
      const Pair<double> sum = sum_of_warps<double>(scratch);
      sums = {sum.weight, sum.update};
    }
    const int first = shared_.first[work.place.tensor];
    const int chunks = shared_.first[work.place.tensor + 1] - first;
    const int tensor = call_.tensor + work.place.tensor;
    if (chunks > 1) {
      put(call_.tables.tagged[call_.chunk + work.place.chunk], sums);
      std::uint32_t before = 0;
      if (lane() == 0) before = add_relaxed(&call_.tables.arrived[tensor], 1);
      if (share(before) + 1 != unsigned(chunks)) return true;
      if (lane() == 0) store_relaxed(&call_.tables.arrived[tensor], 0u);
      sums = total(call_.tables.tagged + call_.chunk + first, chunks);
    }
    prepare_coefficients(work.place.tensor);
    if (lane() == 0) {
      const double trust = trust_ratio(call_.rule, now_, sums);
      const float rate = trusted(call_.rule, now_, shared_.c, trust);
      store_relaxed(&call_.tables.flags[tensor], flag_of(epoch_, rate));
      finish(call_, now_, live_, tensor, trust);
    }
    return true;
  }

  // Each half of a double travels with the number of the launch: a word says by itself whether it
  // has come, and nobody needs a fence, at which all loads and stores of a warp would have to end.
  __device__ void put(TaggedSums& place, const Sums& sums) {
    if (lane() >= 4) return;
    const std::uint64_t bits = bits_of(lane() < 2 ? sums.weight : sums.update);
    const std::uint64_t half = lane() % 2 == 0 ? bits & 0xffffffffu : bits >> 32;
    store_relaxed(&place.word[lane()], static_cast<std::uint64_t>(epoch_) << 32 | half);
  }

  __device__ double take(const std::uint64_t* word) {
    std::uint64_t low = load_relaxed(word), high = load_relaxed(word + 1);
    for (Patience patience; low >> 32 != epoch_ || high >> 32 != epoch_; patience.pause()) {
      low = load_relaxed(word);
      high = load_relaxed(word + 1);
    }
    return double_of(high << 32 | (low & 0xffffffffu));
  }

  // Of a tensor whose chunks have all arrived: one warp takes the place of a block's, for the same
  // bits as those of `total` of two launches.
  __device__ Sums total(const TaggedSums* tagged, int chunks) {
    Sums sum = {0.0, 0.0};
    for (int warp = 0; warp < kWarps && warp * kLanes < chunks; ++warp) {
      Pair<double> mine = {};
      for (int i = warp * kLanes + lane(); i < chunks; i += kThreads) {
        mine.weight += take(&tagged[i].word[0]);
        mine.update += take(&tagged[i].word[2]);
      }
      sum.weight += warp_sum(mine.weight);
      sum.update += warp_sum(mine.update);
    }
    return sum;
  }

  Shared<Rule>& shared_;
  const Call<Rule>& call_;
  const Types types_;
  const Scalars now_;
  const bool live_;
  const std::uint32_t epoch_;  // the number of this launch
  float known_ = NAN;          // the counter that shared_.c is for
  int pushed_ = 0;             // chunks that were taken on to be measured
  int popped_ = 0;             // those of them that were taken on to be applied
  Place head_ = {};            // the first of the others
  int tail_ = 0;               // the last of them
  int tensor_ = 0;             // of the last claim
  bool exhausted_ = false;     // whether all tickets are claimed
};

}  // namespace fastlars::cuda
