// One chunk of one tensor, measured or applied. Implemented per rule in lars.cpp and lamb.cpp.
#pragma once

#include "core/api.h"
#include "core/chunks.h"

namespace fastlars::cpu {

Sums measure_chunk(const TensorList& list, const Chunk& chunk, float gradient_scale);

// `updates`, where not null: LAMB writes the chunk's u there.
Sums measure_chunk(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c,
                   float* updates);
Sums measure_chunk(const TensorList& list, const Chunk& chunk, const LambCoefficients& c,
                   float* updates);

// `measured`: the moments have advanced already; otherwise they advance here, in the same pass.
// `updates`: what measure_chunk wrote; where null, u is computed again.
void apply_chunk(const TensorList& list, const Chunk& chunk, const LarsCoefficients& c,
                 bool measured, const float* updates);
void apply_chunk(const TensorList& list, const Chunk& chunk, const LambCoefficients& c,
                 bool measured, const float* updates);

}  // namespace fastlars::cpu
