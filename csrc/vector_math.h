// Elementary functions for the inner loops: branch-free for float, so that the compiler vectorises the loops they stand
// in, and from the C library for double. Errors are below 2 ulp (tests/test_native_math.py).
//
// Everything is in the namespace of an instruction set and forced inline: a function compiled for one set must never be
// the one that the linker keeps for another.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef BLOBLOSS_ISA
#define BLOBLOSS_ISA baseline
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define BL_INLINE_MEMBER __forceinline
#else
#define BL_INLINE_MEMBER inline __attribute__((always_inline))
#endif
#define BL_INLINE static BL_INLINE_MEMBER

namespace blobloss {
namespace BLOBLOSS_ISA {

template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

template <typename T>
BL_INLINE typename BitsOf<T>::type bits_of(T x) {
  typename BitsOf<T>::type bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

BL_INLINE float number_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

BL_INLINE double number_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// e^x for x <= 0, down to the last subnormal number; NaN stays NaN.
BL_INLINE float exp_nonpositive(float x) {
  x = -105.0f > x ? -105.0f : x;  // e^-105 is less than half of the least number
  // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits; adding 191 as well leaves n + 127 + 64, the
  // exponent of 2^(n + 64), which is a normal number for every n that can occur.
  const float magic = 12582912.0f + 191.0f;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  float r = x - n * 0.693359375f;  // ln 2 in two parts, the first with few bits, so that n times it is exact
  r = r - n * -2.12194440e-4f;
  float q = 1.3813144505e-3f;  // (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, minimax
  q = q * r + 8.3694188356e-3f;
  q = q * r + 4.1668456787e-2f;
  q = q * r + 1.6666514791e-1f;
  q = q * r + 4.9999993051e-1f;
  const float y = 1.0f + (r + r * r * q);
  return y * number_of(bits_of(shifted) << 23) * 5.421010862427522e-20f;  // 2^-64
}

// log(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1.
BL_INLINE float log1p_near_zero(float f) {
  float q = -7.6343875081e-2f;            // (log(1 + f) - f + f^2 / 2) / f^3, minimax
  q = q * f + 1.2765427782e-1f;
  q = q * f + -1.3162004197e-1f;
  q = q * f + 1.4201368671e-1f;
  q = q * f + -1.6623144462e-1f;
  q = q * f + 2.0001235875e-1f;
  q = q * f + -2.5000826768e-1f;
  q = q * f + 3.3333331682e-1f;
  const float f_sq = f * f;
  return f + (f * f_sq * q - 0.5f * f_sq);
}

// log(1 + t) for 0 <= t <= 1.
BL_INLINE float log1p_unit(float t) {
  const bool upper = t > 0.41421356f;
  const float near_zero = log1p_near_zero(upper ? 0.5f * (t - 1.0f) : t);
  return upper ? 0.693147181f + near_zero : near_zero;
}

// log(1 + t) for t >= 0.
BL_INLINE float log1p_positive(float t) {
  const float u = 1.0f + t;
  const uint32_t above = bits_of(u) - 0x3f3504f3u;  // sqrt(1/2): the exponent counts from there
  const float n = static_cast<float>(static_cast<int32_t>(above) >> 23);
  const float m = number_of((above & 0x007fffffu) + 0x3f3504f3u);
  const float lost = (t - (u - 1.0f)) / u;  // what rounding 1 + t took away
  const float log_u = n * 0.693359375f + (log1p_near_zero(m - 1.0f) + (n * -2.12194440e-4f + lost));
  return t <= FLT_MAX ? log_u : t;  // infinity and NaN
}

BL_INLINE double exp_nonpositive(double x) { return ::exp(x); }
BL_INLINE double log1p_unit(double t) { return ::log1p(t); }
BL_INLINE double log1p_positive(double t) { return ::log1p(t); }

BL_INLINE float absolute(float x) { return ::fabsf(x); }
BL_INLINE double absolute(double x) { return ::fabs(x); }
BL_INLINE float power(float x, float y) { return ::powf(x, y); }
BL_INLINE double power(double x, double y) { return ::pow(x, y); }
BL_INLINE float logarithm(float x) { return ::logf(x); }
BL_INLINE double logarithm(double x) { return ::log(x); }
BL_INLINE float log1p_any(float x) { return ::log1pf(x); }
BL_INLINE double log1p_any(double x) { return ::log1p(x); }

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float largest = FLT_MAX;
};
template <>
struct Limits<double> {
  static constexpr double largest = DBL_MAX;
};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
