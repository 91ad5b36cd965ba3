#include "device.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "block.h"

namespace on_cpu {
namespace {

std::chrono::seconds patience() {
  const char* text = std::getenv("FASTLARS_EMULATED_PATIENCE");
  return std::chrono::seconds(text != nullptr ? std::atoi(text) : 60);
}

// Blocks with their stacks, to be had again.
class Spares {
 public:
  std::unique_ptr<Block> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!spares_.empty()) {
        auto spare = std::move(spares_.back());
        spares_.pop_back();
        return spare;
      }
    }
    return std::make_unique<Block>();
  }
  void put(std::unique_ptr<Block> spare) {
    const std::lock_guard lock(mutex_);
    spares_.push_back(std::move(spare));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> spares_;
};

// Never destroyed: threads of a process that exits may still hold some.
Spares& spares() {
  static auto* one = new Spares;
  return *one;
}

// Blocks one after another, as a multiprocessor runs them.
void work(State& state) {
  auto block = spares().take();
  {
    // All begin at once: in the order of what comes first, ThreadSanitizer would see an order
    // between blocks that a GPU does not promise.
    std::unique_lock lock(state.mutex);
    state.running.push_back(block.get());
    state.changed.notify_all();
    state.changed.wait(lock, [&] { return state.running.size() == state.workers; });
  }
  for (;;) {
    const int i = state.begun.fetch_add(1, std::memory_order_relaxed);
    if (i >= state.launch.blocks) break;
    block->run(state, state.order[i]);
    block->advanced();
  }
  spares().put(std::move(block));
  const std::lock_guard lock(state.mutex);
  ++state.ended;
  state.changed.notify_all();
}

// Returns when all have ended, and gives up when none has advanced for long.
void watch(State& state) {
  std::unique_lock lock(state.mutex);
  std::uint64_t before = 0;
  while (!state.changed.wait_for(lock, patience(), [&] { return state.ended == state.workers; })) {
    const std::uint64_t now = state.advances.load(std::memory_order_relaxed);
    if (now == before) {
      for (const Block* block : state.running) block->describe();
      give_up("blocks wait for each other, and none has advanced for long", {"launch", 0});
    }
    before = now;
  }
}

}  // namespace

void launch(const Launch& launch) {
  static std::atomic<std::uint64_t> number{0};
  const char* text = std::getenv("FASTLARS_EMULATED_SEED");
  const bool stalls = text != nullptr && *text != 0;
  Random random = {stalls ? std::strtoull(text, nullptr, 10) : 0};
  random.state += 0xd1342543de82ef95ull * number.fetch_add(1);
  State state{launch, random(), stalls, std::vector<int>(launch.blocks)};
  std::iota(state.order.begin(), state.order.end(), 0);
  for (int i = launch.blocks; i > 1; --i) std::swap(state.order[i - 1], state.order[random() % i]);
  // Where others use the device too, not even all resident blocks run at once.
  state.workers = std::min(launch.blocks, launch.resident);
  if (stalls && random.one_in(2)) state.workers = 1 + random() % state.workers;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < state.workers; ++i) threads.emplace_back(work, std::ref(state));
  watch(state);
  for (auto& thread : threads) thread.join();
}

}  // namespace on_cpu
