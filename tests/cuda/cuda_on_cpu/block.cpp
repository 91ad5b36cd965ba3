#include "block.h"

#include <link.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <cstdlib>
#include <cstring>

namespace on_cpu {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStack = 1 << 16;
constexpr std::size_t kShared = 1 << 18;
constexpr int kPoison = 0xff;  // as a float, NaN; as an index, out of every range

// Has an initial value, so that it does not lie among the variables that are poisoned.
struct Running {
  Block* block;
  bool initialized;
};
thread_local Running running = {nullptr, true};

// This thread's copy of the module's variables without an initial value, such as all `__shared__`.
struct Variables {
  char* begin;
  std::size_t size;
};

int find_variables(dl_phdr_info* info, std::size_t, void* found) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
    auto* begin = static_cast<char*>(info->dlpi_tls_data);
    auto* known = reinterpret_cast<char*>(&running);
    if (known < begin || known >= begin + header.p_filesz) continue;
    *static_cast<Variables*>(found) = {begin + header.p_filesz, header.p_memsz - header.p_filesz};
    return 1;
  }
  return 0;
}

Variables shared_variables() {
  Variables found;
  if (dl_iterate_phdr(find_variables, &found) == 0) {
    give_up("shared variables were not found", {"dl_iterate_phdr", 0});
  }
  return found;
}

bool same(Line a, Line b) {
  return a.number == b.number && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

}  // namespace

void sleep_microseconds(std::uint64_t n) {
  const timespec time = {0, static_cast<long>(n * 1000)};
  nanosleep(&time, nullptr);
}

Fenced::Fenced(std::size_t size) : size_(size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* all = mmap(nullptr, size + 2 * kPage, PROT_NONE, flags, -1, 0);
  if (all == MAP_FAILED) give_up("no memory for another stack", {"mmap", 0});
  begin_ = static_cast<char*>(all) + kPage;
  mprotect(begin_, size, PROT_READ | PROT_WRITE);
}

Fenced::~Fenced() { munmap(begin_ - kPage, size_ + 2 * kPage); }

Block::Block() : shared_(kShared) {
  for (auto& fiber : fibers_) {
    stacks_.push_back(std::make_unique<Fenced>(kStack));
    create(fiber);
  }
}

Block::~Block() {
  for (auto& fiber : fibers_) destroy(fiber);
}

void Block::run(State& state, int index) {
  state_ = &state;
  index_ = index;
  random_ = {state.seed + 0x632be59bd9b4e019ull * (index + 1)};
  slowness_ = 1u << random_() % 6;
  if (state.stalls && random_.one_in(4)) sleep_microseconds(random_() % 2000);
  const Variables variables = shared_variables();
  std::memset(variables.begin, kPoison, variables.size);
  std::memset(shared(), kPoison, shared_.end() - shared());
  for (auto& warp : warps_) warp.arrived = 0;
  lines_.fill({"not begun", 0});
  waiting_ = ended_ = 0;
  make_all_ready();
  for (int i = 0; i < threads(); ++i) {
    // Stacks that end at the same place of a page would compete for one line of the cache.
    prepare(fibers_[i], stacks_[i]->begin(), kStack - 64 * (i % 32), begin_thread);
  }
  running.block = this;
  current_ = random_() % threads();
  step_ = random_() % threads() | 1;
  adopt(main_);
  release(this);
  jump(main_, fibers_[current_]);
  acquire(this);
}

void Block::begin_thread() {
  acquire(running.block);
  running.block->state_->launch.kernel();
  running.block->end_thread();
}

void Block::end_thread() {
  lines_[current_] = {"ended", 0};
  release(this);
  ready_.reset(current_);
  if (++ended_ < threads()) {
    wait();
  } else {
    jump(fibers_[current_], main_);
  }
}

// The next one in this phase's order, or -1.
int Block::next_ready(int step) const {
  const int from = (current_ + step) % threads();
  std::size_t found = from == 0 ? ready_._Find_first() : ready_._Find_next(from - 1);
  if (found == ready_.size()) found = ready_._Find_first();
  return found == ready_.size() ? -1 : static_cast<int>(found);
}

void Block::go_to(int thread) {
  const int before = current_;
  if (thread == before) return;
  current_ = thread;
  jump(fibers_[before], fibers_[thread]);
}

void Block::wait() {
  const int next = next_ready(step_);
  if (next < 0) {
    describe();
    give_up("threads wait for others of their block that never come", lines_[current_]);
  }
  go_to(next);
}

void Block::barrier(Line line) {
  lines_[current_] = line;
  release(&waiting_);
  ready_.reset(current_);
  if (++waiting_ < threads()) {
    wait();
  } else {
    for (int i = 0; i < threads(); ++i) {
      if (same(line, lines_[i])) continue;
      describe();
      give_up("threads of a block meet at different barriers", line);
    }
    waiting_ = 0;
    make_all_ready();
    step_ = random_() % threads() | 1;
  }
  acquire(&waiting_);
}

bool Block::is_last_of_warp(Line line) {
  Warp& warp = warps_[current_ / kLanes];
  if (warp.arrived > 0 && !same(line, warp.line)) {
    describe();
    give_up("threads of a warp meet at different lines", line);
  }
  warp.line = lines_[current_] = line;
  release(&warp);
  if (++warp.arrived < kLanes) {
    ready_.reset(current_);
    wait();
    acquire(&warp);
    return false;
  }
  acquire(&warp);
  return true;
}

void Block::release_warp() {
  Warp& warp = warps_[current_ / kLanes];
  warp.arrived = 0;
  release(&warp);
  const int first = current_ / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) ready_.set(first + lane);
}

void Block::stall() {
  if (!state_->stalls) return;
  const unsigned choice = random_() % 64;
  if (choice < slowness_) {
    sleep_microseconds(random_() % 200);
  } else if (choice % 2 == 0) {
    go_to(next_ready(step_));
  } else if (choice % 4 == 1) {
    sched_yield();
  }
}

void Block::poll(Line line) {
  lines_[current_] = line;
  if (random_.one_in(8)) {
    sleep_microseconds(20);
  } else {
    sched_yield();
  }
  // Whoever is next of all that are ready: in steps, two that poll could take turns for ever, and
  // leave out the one that both wait for.
  go_to(next_ready(1));
}

void Block::describe() const {
  std::fprintf(stderr, "block %d of %d:\n", index_, state_->launch.blocks);
  for (int i = 0; i < threads();) {
    int end = i + 1;
    while (end < threads() && same(lines_[end], lines_[i])) ++end;
    std::fprintf(stderr, "  threads %d to %d last waited at %s:%d\n", i, end - 1, lines_[i].file,
                 lines_[i].number);
    i = end;
  }
}

int thread() { return running.block->thread(); }
int block() { return running.block->index(); }
int blocks() { return running.block->blocks(); }
void* dynamic_shared() { return running.block->shared(); }
void* lanes() { return running.block->lanes(); }
void barrier(Line line) { running.block->barrier(line); }
bool is_last_of_warp(Line line) { return running.block->is_last_of_warp(line); }
void release_warp() { running.block->release_warp(); }
void stall() { running.block->stall(); }
void advanced() { running.block->advanced(); }
void poll(Line line) { running.block->poll(line); }

void give_up(const char* what, Line line) {
  std::fprintf(stderr, "CUDA on a CPU: %s (%s:%d)\n", what, line.file, line.number);
  std::fflush(stderr);
  std::abort();
}

}  // namespace on_cpu
