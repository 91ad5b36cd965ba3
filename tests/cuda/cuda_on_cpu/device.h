// Runs the blocks of a launch on a CPU: a thread of the operating system for each resident block,
// and on it a fiber for each of the block's threads. Fibers take turns in an order that changes
// at every barrier; blocks begin in random order, and stall wherever they meet another block.
//
// What a GPU would let pass, or answer with a wrong number on some day, ends the process with a
// message here: a barrier that not all threads reach, threads of a warp that meet at different
// places, a stack or shared memory that is overrun, a launch in which nothing moves any more.
// Shared memory begins as NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace on_cpu {

constexpr int kMostThreads = 288;
constexpr int kLanes = 32;

struct Launch {
  int blocks;
  int threads;   // of a block: whole warps, kMostThreads at most
  int resident;  // blocks that run at a time; the others begin when those have ended
  std::size_t shared;
  std::function<void()> kernel;  // one thread
};

// Returns when all blocks have ended.
void launch(const Launch& launch);

// A line of a kernel, for messages and for comparison. As a default argument, that of the caller.
struct Line {
  const char* file;
  int number;
  static constexpr Line here(const char* file = __builtin_FILE(), int number = __builtin_LINE()) {
    return {file, number};
  }
};

// Of the thread that calls: the same whenever it asks.
[[gnu::const]] int thread();
[[gnu::const]] int block();
[[gnu::const]] int blocks();
[[gnu::const]] void* dynamic_shared();
void barrier(Line line);

// Where each lane of this warp puts a value of at most 8 bytes.
[[gnu::const]] void* lanes();
// Whether all other lanes of the warp have come to this line. `meet_others` then lets them go on;
// without that, waits until the last one has.
bool is_last_of_warp(Line line);
void release_warp();

// Before an access that another block may race with.
void stall();
// After one that others may be waiting for.
void advanced();
// Lets others run, and may take a while.
void poll(Line line);

// Ends the process.
[[noreturn]] void give_up(const char* what, Line line);

}  // namespace on_cpu
