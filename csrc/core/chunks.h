// Cuts a TensorList into chunks, and groups chunks into blocks. A sum of squares is taken in
// float32 within a chunk and in double across chunks, in chunk order: the cut decides the bits, so
// it depends on the sizes of the tensors and on nothing else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastlars {

struct Chunk {
  int tensor;
  std::int64_t begin;
  int size;
};

struct Chunks {
  std::vector<Chunk> chunk;
  std::vector<int> first;  // chunks of tensor t: [first[t], first[t + 1])
};

// Chunks of `length` elements; the last one of each tensor may be smaller.
inline Chunks cut(const std::vector<std::int64_t>& numel, std::int64_t length) {
  Chunks chunks;
  chunks.first.reserve(numel.size() + 1);
  for (std::size_t tensor = 0; tensor < numel.size(); ++tensor) {
    chunks.first.push_back(static_cast<int>(chunks.chunk.size()));
    for (std::int64_t begin = 0; begin < numel[tensor]; begin += length) {
      const auto size = static_cast<int>(std::min(length, numel[tensor] - begin));
      chunks.chunk.push_back({static_cast<int>(tensor), begin, size});
    }
  }
  chunks.first.push_back(static_cast<int>(chunks.chunk.size()));
  return chunks;
}

// Cuts the list into blocks of whole tensors, of at least `target` elements each but for the last.
// Returns the chunk after the last one of each block. A block is measured, then applied while it is
// still in cache; small tensors share a block because every block costs a barrier.
inline std::vector<int> block_ends(const Chunks& chunks, const std::vector<std::int64_t>& numel,
                                   std::int64_t target) {
  std::vector<int> ends;
  std::int64_t elements = 0;
  for (std::size_t tensor = 0; tensor < numel.size(); ++tensor) {
    elements += numel[tensor];
    const bool last = tensor + 1 == numel.size();
    if (elements >= target || last) {
      ends.push_back(chunks.first[tensor + 1]);
      elements = 0;
    }
  }
  return ends;
}

}  // namespace fastlars
