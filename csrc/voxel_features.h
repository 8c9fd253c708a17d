// Features of a block of voxels and their slopes: the C++ twin of the section of that name in kernels/reference.py.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "ahead.h"
#include "blobloss.h"
#include "vector_math.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

// Voxels in a block. A sum over a block is exact to 1e-7 or so in fp32, since every lane adds up few terms; blocks are
// added up in double.
constexpr int kBlock = BLOBLOSS_BLOCK;

// What is computed of a block, z being the logit whose sigmoid is the probability (or the probability, for activation
// "none"). A feature computed from others needs no second exponential, division or logarithm.
template <typename T>
struct Block {
  alignas(64) T t[kBlock];  // e^-|z|
  alignas(64) T r[kBlock];  // 1 / (1 + t)
  alignas(64) T l[kBlock];  // log(1 + t)
  alignas(64) T out[BLOBLOSS_MAX_FEATURES][kBlock];  // values, or slopes
  alignas(64) T unread[kBlock];                      // takes what was not asked for
  double sums[BLOBLOSS_MAX_FEATURES];                // of the values
  Ahead ahead;                                       // fetched while t and r are computed, if they are
};

// ---------------------------------------------------------------- sums

constexpr int kLanes = 32;  // of a sum: the 16 voxels of a lane are added up in the type of the logits

// The sum of a few numbers as a tree: short chains, small errors.
template <int kCount, typename T>
BL_INLINE T add_up(T* __restrict numbers) {
  for (int width = kCount / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) numbers[i] += numbers[i + width];
  return numbers[0];
}

template <typename T>
BL_INLINE double add_lanes(const T* __restrict lanes) {
  alignas(64) double exact[kLanes];
  for (int i = 0; i < kLanes; ++i) exact[i] = static_cast<double>(lanes[i]);
  return add_up<kLanes>(exact);
}

template <typename T>
BL_INLINE double sum_block(const T* __restrict values) {
  alignas(64) T lanes[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += values[i + j];
  return add_lanes(lanes);
}

// ---------------------------------------------------------------- features of a logit

BL_INLINE bool is_common(int32_t feature) {
  return feature == BL_PROB || feature == BL_NLL_POS || feature == BL_NLL_NEG;
}

// r or t r; the latter as a small correction of t, so that rounding 1 + t does not matter.
template <typename T>
BL_INLINE T probability(T z, T t, T r) {
  return z < 0 ? t - t * (t * r) : r;
}

template <typename T>
BL_INLINE T nll_pos(T z, T l) {
  return (z < 0 ? -z : T(0)) + l;
}

template <typename T>
BL_INLINE T nll_neg(T z, T l) {
  return (z > 0 ? z : T(0)) + l;
}

template <typename T>
BL_INLINE T finite(T x) {
  return x < Limits<T>::largest ? x : Limits<T>::largest;
}

// p^gamma or (1 - p)^gamma, from the -log of the base; finite, since gamma may be 0.
template <typename T>
BL_INLINE T focus(T nll, T gamma) {
  return exp_nonpositive(-gamma * finite(nll));
}

// e^-|z| of a block into t, and 1 / (1 + e^-|z|) into r.
template <typename T>
static void exponentials(Block<T>& block, const T* __restrict z) {
  T* __restrict t = block.t;
  T* __restrict r = block.r;
  constexpr int kStep = 64;  // a few vectors: compilers do not vectorise a loop that fetches
  for (int start = 0; start < kBlock; start += kStep) {
    for (int i = start; i < start + kStep; i += 16) block.ahead.fetch(i);
    for (int i = start; i < start + kStep; ++i) {
      t[i] = exp_nonpositive(-absolute(z[i]));
      r[i] = T(1) / (T(1) + t[i]);
    }
  }
}

template <typename T>
static void logarithms(Block<T>& block) {
  const T* __restrict t = block.t;
  T* __restrict l = block.l;
  for (int i = 0; i < kBlock; ++i) l[i] = log1p_unit(t[i]);
}

template <typename T>
static void values_of_logits(const Block<T>& block, const T* __restrict z, int32_t feature, T gamma,
                             T* __restrict out) {
  const T* __restrict t = block.t;
  const T* __restrict r = block.r;
  const T* __restrict l = block.l;
  switch (feature) {
    case BL_PROB:
      for (int i = 0; i < kBlock; ++i) out[i] = probability(z[i], t[i], r[i]);
      break;
    case BL_PROB_SQ:
      for (int i = 0; i < kBlock; ++i) {
        const T p = probability(z[i], t[i], r[i]);
        out[i] = p * p;
      }
      break;
    case BL_NLL_POS:
      for (int i = 0; i < kBlock; ++i) out[i] = nll_pos(z[i], l[i]);
      break;
    case BL_NLL_NEG:
      for (int i = 0; i < kBlock; ++i) out[i] = nll_neg(z[i], l[i]);
      break;
    case BL_FOCAL_POS:
      for (int i = 0; i < kBlock; ++i) out[i] = focus(nll_neg(z[i], l[i]), gamma) * nll_pos(z[i], l[i]);
      break;
    case BL_FOCAL_NEG:
      for (int i = 0; i < kBlock; ++i) out[i] = focus(nll_pos(z[i], l[i]), gamma) * nll_neg(z[i], l[i]);
      break;
  }
}

// Writes or adds slopes times `scale`.
template <typename T, typename Slope>
BL_INLINE void put_slopes(T scale, bool add, T* __restrict out, Slope slope) {
  if (add)
    for (int i = 0; i < kBlock; ++i) out[i] += scale * slope(i);
  else
    for (int i = 0; i < kBlock; ++i) out[i] = scale * slope(i);
}

template <typename T>
static void slopes_of_logits(const Block<T>& block, const T* __restrict z, int32_t feature, T gamma, T scale, bool add,
                             T* __restrict out) {
  const T* __restrict t = block.t;
  const T* __restrict r = block.r;
  const T* __restrict l = block.l;
  switch (feature) {
    case BL_PROB:
      return put_slopes(scale, add, out, [=](int i) { return t[i] * r[i] * r[i]; });
    case BL_PROB_SQ:
      return put_slopes(scale, add, out, [=](int i) {
        return 2 * ((z[i] < 0 ? t[i] : T(1)) * r[i]) * (t[i] * r[i] * r[i]);
      });
    case BL_NLL_POS:
      return put_slopes(scale, add, out, [=](int i) { return -probability(-z[i], t[i], r[i]); });
    case BL_NLL_NEG:
      return put_slopes(scale, add, out, [=](int i) { return probability(z[i], t[i], r[i]); });
    case BL_FOCAL_POS:
      return put_slopes(scale, add, out, [=](int i) {
        const T p = probability(z[i], t[i], r[i]), q = probability(-z[i], t[i], r[i]);
        return -focus(nll_neg(z[i], l[i]), gamma) * (q + gamma * (p * finite(nll_pos(z[i], l[i]))));
      });
    case BL_FOCAL_NEG:
      return put_slopes(scale, add, out, [=](int i) {
        const T p = probability(z[i], t[i], r[i]), q = probability(-z[i], t[i], r[i]);
        return focus(nll_pos(z[i], l[i]), gamma) * (p + gamma * (q * finite(nll_neg(z[i], l[i]))));
      });
  }
}

// Activation "none": logarithms are clamped as in torch.nn.BCELoss. Rarely used, so the C library's functions will do.

template <typename T>
BL_INLINE T clamped_nll(T p, bool positive) {
  const T log = positive ? logarithm(p) : log1p_any(-p);
  return -(log < T(-100) ? T(-100) : log);
}

template <typename T>
static void values_of_probabilities(const T* __restrict z, int32_t feature, T gamma, T* __restrict out) {
  const bool positive = feature == BL_NLL_POS || feature == BL_FOCAL_POS;
  for (int i = 0; i < kBlock; ++i) {
    const T p = z[i];
    if (feature == BL_PROB) {
      out[i] = p;
    } else if (feature == BL_PROB_SQ) {
      out[i] = p * p;
    } else {
      const T modulation = feature >= BL_FOCAL_POS ? power(positive ? 1 - p : p, gamma) : T(1);
      out[i] = modulation * clamped_nll(p, positive);
    }
  }
}

template <typename T>
static void slopes_of_probabilities(const T* __restrict z, int32_t feature, T gamma, T scale, bool add,
                                    T* __restrict out) {
  const bool positive = feature == BL_NLL_POS || feature == BL_FOCAL_POS;
  const T sign = positive ? T(-1) : T(1);
  put_slopes(scale, add, out, [=](int i) {
    const T p = z[i];
    if (feature == BL_PROB) return T(1);
    if (feature == BL_PROB_SQ) return 2 * p;
    const T other = positive ? 1 - p : p;
    const T variance = p * (1 - p);
    const T d_nll = sign * (other / (variance < T(1e-12) ? T(1e-12) : variance));
    if (feature < BL_FOCAL_POS) return d_nll;
    const T nll = clamped_nll(p, positive);
    const T d_modulation = nll == 0 ? T(0) : sign * gamma * power(other, gamma - 1) * nll;
    return power(other, gamma) * d_nll + d_modulation;
  });
}

// ---------------------------------------------------------------- all features of a block

// Where each feature is among those requested, -1 if it is not.
struct Places {
  int32_t of[BLOBLOSS_MAX_FEATURES];

  Places(const int32_t* features, int32_t num_features) {
    for (int32_t& place : of) place = -1;
    for (int32_t f = 0; f < num_features; ++f) of[features[f]] = f;
  }
  bool has(int32_t feature) const { return of[feature] >= 0; }
  bool has_nll() const { return has(BL_NLL_POS) || has(BL_NLL_NEG); }
  bool has_focal() const { return has(BL_FOCAL_POS) || has(BL_FOCAL_NEG); }
};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss

#include "voxel_features_avx512.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

// The features that nearly every criterion is made of, and whatever the others are computed from. Their sums; and their
// values, if `store`.
template <typename T>
static void evaluate_common(Block<T>& block, const T* z, const Places& places, bool) {
  exponentials(block, z);
  if (places.has_nll() || places.has_focal()) logarithms(block);
  for (const int32_t feature : {BL_PROB, BL_NLL_POS, BL_NLL_NEG}) {
    if (!places.has(feature)) continue;
    T* out = block.out[places.of[feature]];
    values_of_logits(block, z, feature, T(0), out);
    block.sums[places.of[feature]] = sum_block(out);
  }
}

// Their slopes; or, with coefficients, the sum of coefficient times slope.
template <typename T>
static void slopes_of_common(Block<T>& block, const T* z, const Places& places, const T* coefficients, T* sum) {
  exponentials(block, z);
  if (places.has_focal()) logarithms(block);
  bool add = false;
  for (const int32_t feature : {BL_PROB, BL_NLL_POS, BL_NLL_NEG}) {
    if (!places.has(feature)) continue;
    const int32_t f = places.of[feature];
    const T scale = coefficients ? coefficients[f] : T(1);
    slopes_of_logits(block, z, feature, T(0), scale, add, coefficients ? sum : block.out[f]);
    add = coefficients != nullptr;
  }
}

// The sums of all requested features in block.sums, and their values in block.out, unless nobody is to `store` them.
template <typename T>
static void evaluate_block(Block<T>& block, const T* z, const int32_t* features, int32_t num_features,
                           int32_t activation, T gamma, bool store) {
  const Places places(features, num_features);
  if (activation != BL_NONE) evaluate_common(block, z, places, store);
  for (int32_t f = 0; f < num_features; ++f) {
    if (activation == BL_NONE)
      values_of_probabilities(z, features[f], gamma, block.out[f]);
    else if (is_common(features[f]))
      continue;
    else
      values_of_logits(block, z, features[f], gamma, block.out[f]);
    block.sums[f] = sum_block(block.out[f]);
  }
}

// The slopes of all requested features in block.out; or, with coefficients, the sum of coefficient times slope.
template <typename T>
static void evaluate_slopes(Block<T>& block, const T* z, const int32_t* features, int32_t num_features,
                            int32_t activation, T gamma, const T* coefficients, T* sum) {
  const Places places(features, num_features);
  if (activation != BL_NONE) slopes_of_common(block, z, places, coefficients, sum);
  bool add = coefficients && activation != BL_NONE && (places.has(BL_PROB) || places.has_nll());
  for (int32_t f = 0; f < num_features; ++f) {
    const T scale = coefficients ? coefficients[f] : T(1);
    T* out = coefficients ? sum : block.out[f];
    if (activation == BL_NONE)
      slopes_of_probabilities(z, features[f], gamma, scale, add, out);
    else if (is_common(features[f]))
      continue;
    else
      slopes_of_logits(block, z, features[f], gamma, scale, add, out);
    add = coefficients != nullptr;
  }
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
