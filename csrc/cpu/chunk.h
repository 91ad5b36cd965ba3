// One chunk of one tensor, measured or applied. Implemented per rule in lars.cpp, lamb.cpp and
// rmsprop_warmup.cpp.
#pragma once

#include "core/api.h"
#include "core/chunks.h"

namespace fastlars::cpu {

Sums measure_chunk(const TensorList& list, const Chunk& chunk, float gradient_scale);
Sums measure_chunk(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c);
Sums measure_chunk(const TensorList& list, const Chunk& chunk, const LambCoefficients& c);

void apply_chunk(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c,
                 bool measured);
// `measured`: the moments have advanced already; otherwise they advance here, in the same pass.
void apply_chunk(const TensorList& list, const Chunk& chunk, const LambCoefficients& c,
                 bool measured);
void apply_chunk(const TensorList& list, const Chunk& chunk, const RmspropWarmupCoefficients& c,
                 bool measured);

}  // namespace fastlars::cpu
