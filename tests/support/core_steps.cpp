// Steps of the CPU back end without Python, for compilers and processors that have no torch here:
// core_steps JOBS DATA. A line of JOBS is one step of one list; DATA holds the bytes of its
// tensors, which are written back after all steps. The first line of JOBS has where each gap
// between two tensors begins and ends in DATA; -DGUARD_GAPS lets AddressSanitizer stop whoever
// reads or writes there. test_compilers.py makes both files.
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/api.h"
#include "rules/all.h"
#ifdef GUARD_GAPS
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(size)
#endif

using namespace fastlars;

namespace {

// The rules that were compiled: -DONLY=LarsRule compiles one, in a third of the time.
#ifdef ONLY
using Compiled = RuleList<ONLY>;
#else
using Compiled = Rules;
#endif

class Job {
 public:
  Job(const std::string& line, std::vector<char>& data) : words_(line), data_(data) {}

  std::string word() {
    std::string next;
    if (!(words_ >> next)) throw std::runtime_error("a job ends too early");
    return next;
  }

  double number() { return std::stod(word()); }
  Dtype dtype() { return static_cast<Dtype>(static_cast<int>(number())); }

  // How many there are, then a number for each.
  std::vector<std::int64_t> integers() {
    std::vector<std::int64_t> out(static_cast<std::size_t>(number()));
    for (auto& integer : out) integer = static_cast<std::int64_t>(number());
    return out;
  }

  Addresses addresses() {
    Addresses out;
    for (const auto offset : integers()) {
      out.push_back(reinterpret_cast<std::uintptr_t>(data_.data()) + offset);
    }
    return out;
  }

 private:
  std::istringstream words_;
  std::vector<char>& data_;
};

template <class Rule>
void step(Job& job) {
  std::map<std::string, double> given;
  for (int left = static_cast<int>(job.number()); left > 0; --left) {
    const std::string name = job.word();
    given[name] = job.number();
  }
  Rule rule = {};
  Rule::fields([&](const char* name, auto member) {
    rule.*member = static_cast<std::decay_t<decltype(rule.*member)>>(given.at(name));
  });
  StepScalars scalars;
  scalars.lr = job.number();
  scalars.gradient_scale = job.number();
  TensorList list;
  list.seed = static_cast<std::uint64_t>(job.number());
  list.stochastic_rounding = list.seed != 0;
  list.weight_dtype = job.dtype();
  list.grad_dtype = job.dtype();
  list.state_dtype = job.dtype();
  list.copy_dtype = job.dtype();
  list.numel = job.integers();
  for (auto* column : {&list.weight, &list.grad, &list.copy, &list.counter}) {
    *column = job.addresses();
  }
  list.state.resize(static_cast<std::size_t>(job.number()));
  for (auto& state : list.state) state = job.addresses();
  std::vector<float> report(list.numel.size() * (1 + Rule::sums));
  cpu::step(rule, scalars, list, report.data());
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  std::ifstream in(arguments[2], std::ios::binary);
  std::vector<char> data{std::istreambuf_iterator<char>(in), {}};
  std::ifstream jobs(arguments[1]);
  std::string line;
  std::getline(jobs, line);
  const auto gaps = Job(line, data).integers();
  for (std::size_t i = 0; i + 1 < gaps.size(); i += 2) {
    ASAN_POISON_MEMORY_REGION(data.data() + gaps[i], gaps[i + 1] - gaps[i]);
  }
  while (std::getline(jobs, line)) {
    Job job(line, data);
    const std::string name = job.word();
    Compiled::for_each([&](auto rule) {
      using Rule = decltype(rule);
      if constexpr (Rule::steps) {
        if (name == Rule::name) step<Rule>(job);
      }
    });
  }
  ASAN_UNPOISON_MEMORY_REGION(data.data(), data.size());
  std::ofstream(arguments[2], std::ios::binary).write(data.data(), data.size());
  std::cout << cpu::instruction_set() << "\n";
}
