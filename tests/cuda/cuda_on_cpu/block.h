// One block of a launch: its threads as fibers, its barriers, and its shared memory.
#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"
#include "fiber.h"

namespace on_cpu {

struct Random {
  std::uint64_t state;
  std::uint64_t operator()() {  // splitmix64
    std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  bool one_in(unsigned n) { return (*this)() % n == 0; }
};

void sleep_microseconds(std::uint64_t n);

// Memory between two pages that nobody may touch.
class Fenced {
 public:
  explicit Fenced(std::size_t size);
  ~Fenced();
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  char* begin() const { return begin_; }
  char* end() const { return begin_ + size_; }

 private:
  char* begin_;
  std::size_t size_;
};

class Block;

// What the blocks of one launch share.
struct State {
  const Launch& launch;
  std::uint64_t seed;
  bool stalls;  // blocks run at random speeds
  std::vector<int> order;
  std::atomic<int> begun{0};
  std::atomic<std::uint64_t> advances{0};
  std::size_t workers = 0, ended = 0;
  std::mutex mutex = {};
  std::condition_variable changed = {};
  std::vector<const Block*> running = {};
};

// What a block needs to run; kept for the blocks of later launches.
class Block {
 public:
  Block();
  ~Block();

  // All threads of one block, to the end.
  void run(State& state, int index);

  int thread() const { return current_; }
  int index() const { return index_; }
  int blocks() const { return state_->launch.blocks; }
  char* shared() const { return shared_.end() - (state_->launch.shared + 15) / 16 * 16; }
  char* lanes() { return warps_[current_ / kLanes].values; }

  void barrier(Line line);
  bool is_last_of_warp(Line line);
  void release_warp();
  void stall();
  void advanced() { state_->advances.fetch_add(1, std::memory_order_relaxed); }
  void poll(Line line);

  // Where every thread is, as far as it is known.
  void describe() const;

 private:
  using Threads = std::bitset<kMostThreads>;
  struct Warp {
    int arrived;
    Line line;
    alignas(8) char values[8 * kLanes];
  };

  static void begin_thread();
  int threads() const { return state_->launch.threads; }
  void make_all_ready() { ready_ = ~Threads() >> (kMostThreads - threads()); }
  int next_ready(int step) const;
  void go_to(int thread);
  void wait();
  void end_thread();

  State* state_ = nullptr;
  int index_ = 0;
  Random random_ = {0};
  unsigned slowness_ = 0;
  int current_ = 0, step_ = 1;
  int waiting_ = 0, ended_ = 0;
  Threads ready_;
  std::array<Warp, kMostThreads / kLanes> warps_;
  std::array<Line, kMostThreads> lines_;
  Fiber main_;
  std::array<Fiber, kMostThreads> fibers_;
  std::vector<std::unique_ptr<Fenced>> stacks_;
  Fenced shared_;
};

}  // namespace on_cpu
