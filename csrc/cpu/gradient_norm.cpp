// The norm of gradients alone.
#include "cpu/gradient_norm.h"

#include "cpu/parallel.h"

namespace fastlars::cpu {

template void measure(const GradientNorm&, const StepScalars&, TensorList&, Sums<1>*);

}  // namespace fastlars::cpu
