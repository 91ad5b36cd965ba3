// Storage types of weights, gradients and states, and their conversion to and from the float in
// which all arithmetic happens. Used by every back end.
#pragma once

#include <cstdint>
#include <cstring>

// The only macro of csrc. Inlining is forced because the CPU kernels are compiled once per
// instruction set by function attributes: a function that is not inlined would not be vectorised.
#if defined(__CUDACC__)
#define FASTLARS_HD __host__ __device__ __forceinline__
#else
#define FASTLARS_HD inline __attribute__((always_inline))
#endif

namespace fastlars {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

FASTLARS_HD std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTLARS_HD float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTLARS_HD std::uint64_t bits_of(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTLARS_HD double double_of(std::uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTLARS_HD float to_float(float value) { return value; }

FASTLARS_HD float to_float(bfloat16 value) {
  return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}

// Branch-free, so that compilers vectorise it. Subnormal halves go through an integer conversion:
// a subnormal float on the way would be lost where the process flushes subnormals to zero.
FASTLARS_HD float to_float(float16 value) {
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t normal = (magnitude << 13) + 0x38000000u;
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
  const std::uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  const std::uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_of((magnitude >= 0x7c00u ? special : finite) | sign);
}

template <class T>
FASTLARS_HD T from_float(float value);

template <>
FASTLARS_HD float from_float<float>(float value) {
  return value;
}

// Round to nearest, ties to even.
template <>
FASTLARS_HD bfloat16 from_float<bfloat16>(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(is_nan ? quiet_nan : rounded)};
}

// Round to nearest, ties to even. Adding 0.5f moves a value below 2^-14 to where a float's last
// place is 2^-24, a half's smallest step: the addition itself does the rounding.
template <>
FASTLARS_HD float16 from_float<float16>(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<std::uint16_t>((magnitude >= 0x47800000u ? special : finite) | sign)};
}

// Stochastic rounding to bfloat16: up with the probability of the bits that are cut off. `random`
// holds 16 uniform bits. Infinities and NaN are rounded as usual; a finite value above the largest
// bfloat16 may become infinite, as it does when rounded to nearest.
FASTLARS_HD bfloat16 round_stochastically(float value, std::uint32_t random) {
  const std::uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const bfloat16 nearest = from_float<bfloat16>(value);
  const auto stochastic = static_cast<std::uint16_t>((bits + (random & 0xffffu)) >> 16);
  return {finite ? stochastic : nearest.bits};
}

// These store bits: some compilers do not vectorise the store of a struct.
FASTLARS_HD void store(float& place, float value) { place = value; }

template <class T>
FASTLARS_HD void store(T& place, T value) {
  place.bits = value.bits;
}

template <class T>
FASTLARS_HD void store(T& place, float value) {
  place.bits = from_float<T>(value).bits;
}

// What a later load of the stored value gives.
template <class T>
FASTLARS_HD float stored(float value) {
  return to_float(from_float<T>(value));
}

// Calls f with a value of the C++ type that `dtype` names: f(float{}), f(bfloat16{}), ...
template <class F>
auto visit(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::bfloat16:
      return f(bfloat16{});
    case Dtype::float16:
      return f(float16{});
    default:
      return f(float{});
  }
}

}  // namespace fastlars
