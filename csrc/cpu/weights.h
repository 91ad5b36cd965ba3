// How a chunk's weights are read and written: as they are, with a low-precision copy, or rounded
// stochastically.
#pragma once

#include <array>

#include "core/random.h"
#include "cpu/chunk.h"

namespace fastlars::cpu {

template <class W>
struct Plain {
  W* weight;
  FASTLARS_HD float load(int i) const { return to_float(weight[i]); }
  FASTLARS_HD void store(int i, float value) const { fastlars::store(weight[i], value); }
};

template <class C>
struct WithCopy {
  float* weight;
  C* copy;
  FASTLARS_HD float load(int i) const { return weight[i]; }
  FASTLARS_HD void store(int i, float value) const {
    weight[i] = value;
    fastlars::store(copy[i], value);
  }
};

struct Stochastic {
  bfloat16* weight;
  const std::uint16_t* random;
  FASTLARS_HD float load(int i) const { return to_float(weight[i]); }
  FASTLARS_HD void store(int i, float value) const {
    fastlars::store(weight[i], round_stochastically(value, random[i]));
  }
};

using RandomBits = std::array<std::uint16_t, kChunk>;

inline void fill_random(const TensorList& list, const Chunk& chunk, RandomBits& random) {
  static_assert(kChunk % kElementsPerRandomBlock == 0, "chunks begin at a random block");
  const int stream = list.random_streams ? list.random_streams[chunk.tensor] : chunk.tensor;
  const std::uint64_t first = chunk.begin / kElementsPerRandomBlock;
  for (int i = 0; i < chunk.size; i += kElementsPerRandomBlock) {
    const RandomBlock block = random_block(list.seed, stream, first + i / kElementsPerRandomBlock);
    for (int j = 0; j < kElementsPerRandomBlock; ++j) {
      random[i + j] = static_cast<std::uint16_t>(random_bits(block, j));
    }
  }
}

// Calls f(weights) with the storage of this chunk's weights.
template <class F>
void with_weights(const TensorList& list, const Chunk& chunk, F&& f) {
  if (!list.copy.empty()) {
    if (list.copy_dtype == Dtype::bfloat16) {
      f(WithCopy<bfloat16>{at<float>(list.weight, chunk), at<bfloat16>(list.copy, chunk)});
    } else {
      f(WithCopy<float16>{at<float>(list.weight, chunk), at<float16>(list.copy, chunk)});
    }
  } else if (list.stochastic_rounding && list.weight_dtype == Dtype::bfloat16) {
    RandomBits random;
    fill_random(list, chunk, random);
    f(Stochastic{at<bfloat16>(list.weight, chunk), random.data()});
  } else {
    visit(list.weight_dtype,
          [&](auto w) { f(Plain<decltype(w)>{at<decltype(w)>(list.weight, chunk)}); });
  }
}

}  // namespace fastlars::cpu
