// The norm of gradients alone, over one chunk.
#include "rules/gradient_norm.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace fastlars::cpu {
namespace {

template <class G>
struct Measure {
  const G* grad;
  int size;
  float scale;
  Sums<1>* sums;

  FASTLARS_HD void operator()() const {
    const auto each = [this](int i, float (&x)[1])
                          __attribute__((always_inline)) { x[0] = scale * to_float(grad[i]); };
    *sums = sum_squares<1, float>(size, each, grad);
    if (needs_double(*sums)) *sums = sum_squares<1, double>(size, each, grad);
  }
};

}  // namespace

template <>
struct ChunkOps<GradientNorm> {
  static Sums<1> measure(const TensorList& list, const Chunk& chunk, float scale) {
    Sums<1> sums;
    visit(list.grad_dtype, [&](auto g) {
      using G = decltype(g);
      run(Measure<G>{at<G>(list.grad, chunk), chunk.size, scale, &sums});
    });
    return sums;
  }
};

template void measure(const GradientNorm&, const StepScalars&, TensorList&, Sums<1>*);

}  // namespace fastlars::cpu
