// Both phases in one launch. Blocks claim chunks by ticket and measure them; the block that
// measured a chunk also applies it, once the tensor's sums are known. Meanwhile it measures on, and
// keeps what measure read (LARS: the gradient) or made (LAMB: the update) in a ring in shared
// memory; what the ring has no room for is read again.
//
// No block waits before all tickets are claimed, and then only for chunks that blocks which run
// have claimed. So a launch ends for any number of blocks, whether or not they run at once.
#include "cuda/api.h"
#include "cuda/frame.cuh"
#include "cuda/launch.cuh"

namespace fastlars::cuda {
namespace {

// Blocks that a multiprocessor is to hold: two where the registers of three would not do.
template <class Types>
constexpr int kBlocks = Types::has_copies ? 2 : 3;

constexpr int kMostHeld = 4;  // chunks in a ring
constexpr int kHeldBytes = kChunk * sizeof(float);

enum class Do : int { measure, apply, leave };

template <class Rule>
struct Task {
  typename Body<Rule>::Coefficients c;
  Do what;
  int chunk;
  int slot;   // of the ring
  bool held;  // whether the slot still has what measure put there
};

__device__ __forceinline__ std::uint64_t flag_of(std::uint32_t epoch, float rate) {
  return static_cast<std::uint64_t>(epoch) << 32 | bits_of(rate);
}

// What a block has measured and not yet applied, oldest first. It has no bound: a block that could
// not take on more would have to wait for others, which may be waiting for it. Its places are
// global memory, which no other block touches.
struct Queue {
  Link* links;
  Link head;
  std::int32_t tail;
  std::uint32_t popped;    // how many have left
  std::uint32_t pushed;    // how many have come: the next one's number, and slot of the ring
  std::uint32_t measured;  // numbers whose slots were written

  __device__ bool empty() const { return popped == pushed; }
  __device__ void push(std::int32_t chunk, std::int32_t tensor) {
    if (empty()) {
      head = {chunk, tensor};
    } else {
      links[tail] = {chunk, tensor};
    }
    tail = chunk;
    ++pushed;
  }
  __device__ void pop() {
    ++popped;
    if (!empty()) head = links[head.chunk];
  }
  // Whether the head's slot was not written again since.
  __device__ bool holds_head(int ring) const {
    return measured - popped <= static_cast<std::uint32_t>(ring);
  }
};

// Decides what a block does next. It lies in shared memory, for registers are scarce, but belongs
// to the first thread. The ticket under way from global memory is not in it: it must have come
// before it can be put into shared memory.
template <class Rule>
struct Scheduler {
  Queue queue;
  Scalars now;
  std::uint32_t epoch;
  float known;  // the counter that `c` is for
  typename Body<Rule>::Coefficients c;

  // Returns the first ticket.
  __device__ std::uint32_t open(const Call<Rule>& call) {
    queue = {call.tables.links, {}, 0, 0, 0, 0};
    now = today(call);
    epoch = call.tables.control->epoch + 1;
    known = NAN;
    return claim(call);
  }

  __device__ std::uint32_t claim(const Call<Rule>& call) const {
    return add_relaxed(&call.tables.control->ticket, 1);
  }

  // The flag of the queue's head, which is 0 where there is none.
  __device__ std::uint64_t look(const Call<Rule>& call) const {
    return queue.empty() ? 0 : load_relaxed(&call.tables.flags[queue.head.tensor]);
  }

  __device__ bool is_set(std::uint64_t flag) const {
    return !queue.empty() && static_cast<std::uint32_t>(flag >> 32) == epoch;
  }

  // Takes the ticket that is claimed and not yet measured, and returns the next. The answer to a
  // claim travels while the chunk is worked on.
  __device__ std::uint32_t next(const Call<Rule>& call, std::uint32_t ticket, Task<Rule>& task) {
    const bool has_ticket = ticket < static_cast<std::uint32_t>(call.chunks);
    std::uint64_t flag = look(call);
    while (!has_ticket && !queue.empty() && !is_set(flag)) {
      pause();
      flag = look(call);
    }
    const bool applies = is_set(flag);
    if (!applies && !has_ticket) {
      task.what = Do::leave;
      return ticket;
    }
    task.what = applies ? Do::apply : Do::measure;
    task.chunk = applies ? queue.head.chunk : call.chunk + static_cast<int>(ticket);
    task.slot = (applies ? queue.popped : queue.pushed) % call.ring;
    const Row& row = call.tables.rows[call.tables.items[task.chunk].tensor];
    const float current = counter(call.rule, row, true);
    if (current != known) c = coefficients(call.rule, now, current);
    known = current;
    task.c = c;
    if (applies) {
      set_trusted(call.rule, float_of(static_cast<std::uint32_t>(flag)), task.c);
      task.held = queue.holds_head(call.ring);
      queue.pop();
      return ticket;
    }
    task.held = true;
    queue.measured = queue.pushed + 1;
    return claim(call);
  }
};

template <class Rule>
struct Shared {
  Scheduler<Rule> scheduler;
  Task<Rule> task[2];  // in turn: the first thread makes up one while others work on another
  Scratch chunk[2], tensor;
  bool live, last;
};

template <class Rule, class Types>
__global__ void __launch_bounds__(kThreads, (kBlocks<Types>))
    step(const __grid_constant__ Call<Rule> call) {
  __shared__ Shared<Rule> shared;
  float4* const ring = dynamic_shared();
  const Types types(call);
  const Tables& tables = call.tables;
  Scheduler<Rule>& scheduler = shared.scheduler;
  std::uint32_t ticket = 0;
  if (thread() == 0) {
    ticket = scheduler.open(call);
    shared.live = is_live(call);
  }
  for (int round = 0;; round = 1 - round) {
    Task<Rule>& task = shared.task[round];
    if (thread() == 0) ticket = scheduler.next(call, ticket, task);
    barrier();
    if (task.what == Do::leave) break;
    const Item item = tables.items[task.chunk];
    const Chunk chunk = locate(call, types, item, shared.live);
    float4* const held = ring + task.slot * (kChunk / kVector);
    if (task.what == Do::measure) {
      const Row& row = tables.rows[item.tensor];
      const Sums sums = measure_chunk<true, Rule>(task.c, types, chunk, shared.chunk, held);
      if (thread() == 0) {
        tables.slots[task.chunk] = sums;
        shared.last = arrive(tables, item.tensor, row, 1);
        if (!shared.last) scheduler.queue.push(task.chunk, item.tensor);
      }
      barrier();
      if (!shared.last) continue;
      const Sums all = total(tables, row, shared.tensor);
      if (thread() == 0) {
        const double trust = trust_ratio(call.rule, scheduler.now, all);
        const float rate = trusted(call.rule, scheduler.now, task.c, trust);
        store_relaxed(&tables.flags[item.tensor], flag_of(scheduler.epoch, rate));
        call.ratios[item.tensor] = static_cast<float>(trust);
        set_trusted(call.rule, rate, task.c);
      }
      barrier();
    }
    if (task.held) {
      Body<Rule>::template apply<From::held, false>(task.c, types, chunk, held, 0);
    } else {
      Body<Rule>::template apply<From::forgotten, false>(task.c, types, chunk, nullptr, 0);
    }
  }
  if (is_last_block(*tables.control, shared.last)) {
    close(call, true, [&](int tensor) {
      call.ratios[tensor] = static_cast<float>(trust_ratio(call.rule, scheduler.now, {0.0, 0.0}));
    });
    if (thread() == 0) {
      tables.control->ticket = 0;
      tables.control->epoch = scheduler.epoch;
    }
  }
}

template <class Types, class Rule>
void run(const Rule& rule, const Scalars& now, const Work& work, float* ratios) {
  for_each_launch(rule, now, work, [&](Call<Rule>& call) {
    call.ratios = ratios;
    call.ring = work.ring > 0 ? work.ring : ring_of_device(kBlocks<Types>, kHeldBytes, kMostHeld);
    launch("step", step<Rule, Types>, call, work, call.ring * kHeldBytes);
  });
}

template <class Rule>
void run_typed(const Rule& rule, const Scalars& now, const Work& work, float* ratios) {
  if (is_float32(work.list)) {
    run<Float32<Rule>>(rule, now, work, ratios);
  } else {
    run<Any<Rule>>(rule, now, work, ratios);
  }
}

}  // namespace

void step(const LarsRule& rule, const Scalars& now, const Work& work, float* ratios) {
  run_typed(rule, now, work, ratios);
}
void step(const LambRule& rule, const Scalars& now, const Work& work, float* ratios) {
  run_typed(rule, now, work, ratios);
}

}  // namespace fastlars::cuda
