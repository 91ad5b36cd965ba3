// Counter-based random bits for stochastic rounding: Philox4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). The bits of an element depend only on the seed, the
// number of its tensor and its index, so that they are the same for any number of threads and on
// any device.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastlars {

struct RandomBlock {
  std::uint32_t word[4];
};

// Eight elements share one block, 16 bits each.
constexpr int kElementsPerRandomBlock = 8;

FASTLARS_HD RandomBlock random_block(std::uint64_t seed, std::uint32_t stream,
                                     std::uint64_t block) {
  std::uint32_t c0 = static_cast<std::uint32_t>(block);
  std::uint32_t c1 = static_cast<std::uint32_t>(block >> 32);
  std::uint32_t c2 = stream;
  std::uint32_t c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ull * c0;
    const std::uint64_t p1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

FASTLARS_HD std::uint32_t random_bits(const RandomBlock& block, int element) {
  return (block.word[element >> 1] >> (16 * (element & 1))) & 0xffffu;
}

}  // namespace fastlars
