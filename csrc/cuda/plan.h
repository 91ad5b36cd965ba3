// What lies on the device between steps: how a list is cut into chunks, where its tensors lie, and
// what blocks tell each other. Plain structs, and the host code that fills them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/chunks.h"
#include "core/tensors.h"
#include "core/trust.h"

namespace fastlars::cuda {

// Elements of a chunk. Every one of 256 threads has four vectors of four elements: all of a chunk's
// loads are in flight at once. It fixes the order of sums, and so their bits.
constexpr int kChunk = 4096;

// One chunk. Its place among all chunks of the list is its number.
struct Item {
  std::int32_t tensor;
  std::int32_t size;
  std::int64_t begin;
};

// One tensor: addresses, 0 where there is none, its elements, and its chunks. Gradients are not
// here: they move from step to step, and travel with the launch.
struct Row {
  std::uintptr_t weight, copy, state[2], counter;
  std::int64_t size;
  std::int32_t first, chunks;
};

// A place in a block's queue of chunks that are measured and not yet applied.
struct Link {
  std::int32_t chunk, tensor;
};

// Sums of one chunk for other blocks of the same launch: each half of a double with the number of
// the launch above it. A word so says by itself whether it has come, and no fence is needed.
struct TaggedSums {
  std::uint64_t word[4];
};

// What all blocks of a launch share. The last block to leave puts it back for the next launch, so
// that a launch recorded in a graph finds it as the first one did.
struct Control {
  std::uint32_t ticket;  // the first chunk that nobody has claimed
  std::uint32_t exited;  // blocks that are done
  std::uint32_t epoch;   // launches so far
  std::uint32_t unused;
};

// Device memory that launches on one list work in.
struct Tables {
  const Item* items;
  const Row* rows;
  Sums* slots;             // sums of squares by chunk, of measure
  TaggedSums* tagged;      // likewise, of step
  std::uint32_t* arrived;  // measured chunks by tensor; 0 between launches
  std::uint64_t* flags;    // by tensor: epoch and rate, once its sums are known
  Link* links;             // by chunk: its successor in its owner's queue
  Control* control;
};

// The cut of a list, and where its tables lie. Made once for a layout.
class Plan {
 public:
  explicit Plan(const std::vector<std::int64_t>& numel) : cut_(cut(numel, kChunk)) {}

  int tensors() const { return static_cast<int>(cut_.first.size()) - 1; }
  int chunks() const { return cut_.first.back(); }
  int first(int tensor) const { return cut_.first[tensor]; }
  const Tables& tables() const { return tables_; }

  void write_items(Item* items) const {
    for (const auto& chunk : cut_.chunk) *items++ = {chunk.tensor, chunk.size, chunk.begin};
  }

  // Returns whether that differs from what was there.
  bool write_rows(const TensorList& list, Row* rows) const {
    bool changed = false;
    for (int t = 0; t < tensors(); ++t) {
      const auto address = [t](const auto& base) { return base.empty() ? 0 : base[t]; };
      const Row row = {address(list.weight),
                       address(list.copy),
                       {address(list.state[0]), address(list.state[1])},
                       address(list.counter),
                       list.numel[t],
                       first(t),
                       first(t + 1) - first(t)};
      changed = changed || std::memcmp(&rows[t], &row, sizeof row) != 0;
      rows[t] = row;
    }
    return changed;
  }

  // Bytes of device memory that are zero before the first launch.
  std::size_t workspace_bytes() const { return lay_out(0).end; }

  // Takes device addresses on 16-byte boundaries.
  void place(std::uintptr_t items, std::uintptr_t rows, std::uintptr_t workspace) {
    tables_ = lay_out(workspace).tables;
    tables_.items = reinterpret_cast<const Item*>(items);
    tables_.rows = reinterpret_cast<const Row*>(rows);
  }

 private:
  struct Workspace {
    Tables tables;
    std::size_t end;
  };

  Workspace lay_out(std::uintptr_t base) const {
    Workspace work = {};
    const auto take = [&](auto*& place, std::size_t count) {
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(base + work.end);
      work.end += count * sizeof *place;
    };
    // Larger alignment first.
    take(work.tables.control, 1);
    take(work.tables.slots, chunks());
    take(work.tables.tagged, chunks());
    take(work.tables.flags, tensors());
    take(work.tables.links, chunks());
    take(work.tables.arrived, tensors());
    return work;
  }

  Chunks cut_;
  Tables tables_ = {};
};

}  // namespace fastlars::cuda
