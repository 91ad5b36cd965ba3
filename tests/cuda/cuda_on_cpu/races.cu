// Steps a small list by both paths, for ThreadSanitizer to watch.
#include <cstdio>

#include "problem.h"

using namespace fastlars;

namespace {

template <class Rule>
void step(Problem& problem, const Rule& rule, int blocks) {
  const StepScalars host = {0.1, 1.0};
  const double device[] = {host.lr, host.gradient_scale, 0.0};
  const auto target = problem.on(blocks, blocks % 2 + 1, blocks % 2 == 0 ? device : nullptr);
  std::vector<Sums<Rule::sums>> sums(problem.table.tensors());
  cuda::measure(rule, host, target, sums.data());
  cuda::apply(rule, host, target, sums.data(), problem.report.data());
  cuda::step(rule, host, target, problem.report.data());
}

}  // namespace

// With an argument, loses a ticket: blocks then wait for a chunk that no block has claimed.
int main(int count, char**) {
  LarsRule lars = {};
  lars.momentum = 0.9;
  lars.weight_decay = lars.trust_coefficient = 0.1;
  lars.ratio_ceiling = 10.0;
  lars.adapt = true;
  LambRule lamb = {};
  lamb.beta1 = 0.9;
  lamb.beta2 = 0.99;
  lamb.eps = lamb.weight_decay = 0.1;
  lamb.upper = lamb.ratio_ceiling = 10.0;
  lamb.adapt = true;
  LambRule nesterov = lamb;
  nesterov.nesterov = Nesterov::both;
  Problem problem;
  if (count > 1) reinterpret_cast<cuda::Control*>(problem.workspace.data())->ticket = 1;
  for (int blocks = 1; blocks <= 4; ++blocks) {
    step(problem, lars, blocks);
    step(problem, lamb, blocks);
    step(problem, nesterov, blocks);
  }
  std::printf("stepped\n");
  return 0;
}
