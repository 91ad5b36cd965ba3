// Device memory that stays between steps: how a list is cut into chunks, the addresses of its
// tensors, and the memory through which blocks exchange results. Plain structs, and the host code
// that fills them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/chunks.h"
#include "core/tensors.h"
#include "rules/all.h"

namespace fastlars::cuda {

// Elements of a chunk. Each of 256 threads has four vectors of four elements, so that all of a
// chunk's loads are in flight at once. This number fixes the order of sums, and so their bits.
constexpr int kChunkElements = 4096;

// One chunk. The index of its entry, counted over the whole list, is the chunk's number.
struct ChunkEntry {
  std::int32_t tensor;
  std::int32_t size;
  std::int64_t begin;
};

// One tensor: addresses (0 where there is none), elements, and chunks. Gradients are not here:
// they move from step to step, so their addresses are kernel arguments.
struct TensorEntry {
  std::uintptr_t weight, copy, state[Rules::most_states], counter;
  std::int64_t size;
  std::int32_t first_chunk, chunks;
};

// A chunk in a block's queue of chunks that are measured and not yet applied.
struct QueueLink {
  std::int32_t chunk, tensor;
};

// Sums of one chunk for other blocks of the same launch: each half of a double below the launch's
// epoch. A reader sees from the word itself whether it is of this launch, so no fence is needed.
template <int N>
struct TaggedSums {
  std::uint64_t word[2 * N];
};

// Shared by all blocks of a launch. The last block to finish resets it for the next launch, so that
// replays of a CUDA graph all start alike.
struct Control {
  std::uint32_t ticket;  // the first chunk that no block has claimed
  std::uint32_t exited;  // blocks that have finished
  std::uint32_t epoch;   // launches so far
  std::uint32_t unused;
};

// float32 ratio coefficients of a tensor: as many as any rule has.
constexpr int kMostRatioWords = 2;

// Device memory for launches on one list. `sums` and `tagged` have room for any rule; a launch uses
// them as arrays of Sums<Rule::sums> and TaggedSums<Rule::sums>.
struct Tables {
  const ChunkEntry* chunks;
  const TensorEntry* tensors;
  double* sums;            // by chunk: sums of squares, from measure
  std::uint64_t* tagged;   // by chunk: sums of squares, from step
  std::uint32_t* arrived;  // by tensor: chunks measured so far; 0 between launches
  std::uint64_t* flags;    // by tensor: its ratio coefficients, each below the epoch, once known
  QueueLink* links;        // by chunk: the next chunk in the same block's queue
  Control* control;
};

// A list's cut into chunks, and the addresses of its tables. Made once for a layout.
class ChunkTable {
 public:
  explicit ChunkTable(const std::vector<std::int64_t>& numel) : cut_(cut(numel, kChunkElements)) {}

  int tensors() const { return static_cast<int>(cut_.first.size()) - 1; }
  int chunks() const { return cut_.first.back(); }
  int first_chunk(int tensor) const { return cut_.first[tensor]; }
  const Tables& tables() const { return tables_; }

  void write_chunk_entries(ChunkEntry* entries) const {
    for (const auto& chunk : cut_.chunk) *entries++ = {chunk.tensor, chunk.size, chunk.begin};
  }

  // Returns whether any entry has changed.
  bool write_tensor_entries(const TensorList& list, TensorEntry* entries) const {
    bool changed = false;
    for (int t = 0; t < tensors(); ++t) {
      const auto address = [t](const Addresses& base) { return base.empty() ? 0 : base[t]; };
      const int first = first_chunk(t);
      TensorEntry entry = {address(list.weight),      address(list.copy), {},
                           address(list.counter),     list.numel[t],      first,
                           first_chunk(t + 1) - first};
      for (int i = 0; i < Rules::most_states; ++i) entry.state[i] = list.state_of(i, t);
      changed = changed || std::memcmp(&entries[t], &entry, sizeof entry) != 0;
      entries[t] = entry;
    }
    return changed;
  }

  // Bytes of device memory that must be zero before the first launch.
  std::size_t workspace_bytes() const { return lay_out(0).end; }

  // Takes device addresses on 16-byte boundaries.
  void place(std::uintptr_t chunk_entries, std::uintptr_t tensor_entries,
             std::uintptr_t workspace) {
    tables_ = lay_out(workspace).tables;
    tables_.chunks = reinterpret_cast<const ChunkEntry*>(chunk_entries);
    tables_.tensors = reinterpret_cast<const TensorEntry*>(tensor_entries);
  }

 private:
  struct Workspace {
    Tables tables;
    std::size_t end;
  };

  Workspace lay_out(std::uintptr_t base) const {
    Workspace work = {};
    const auto take = [&](auto*& table, std::size_t count) {
      table = reinterpret_cast<std::remove_reference_t<decltype(table)>>(base + work.end);
      work.end += count * sizeof *table;
    };
    // In order of decreasing alignment.
    take(work.tables.control, 1);
    take(work.tables.sums, chunks() * std::size_t{Rules::most_sums});
    take(work.tables.tagged, chunks() * std::size_t{2 * Rules::most_sums});
    take(work.tables.flags, tensors() * std::size_t{kMostRatioWords});
    take(work.tables.links, chunks());
    take(work.tables.arrived, tensors());
    return work;
  }

  Chunks cut_;
  Tables tables_ = {};
};

}  // namespace fastlars::cuda
