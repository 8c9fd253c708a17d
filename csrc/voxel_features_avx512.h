// The common features of a block of floats on AVX-512: in one loop, so that adding, comparing and dividing hide behind the
// multiplications. What this instruction set has to itself: tables in registers, and scaling by powers of two that
// rounds correctly below the normal range. Included by voxel_features.h; empty for other instruction sets.
#pragma once

#if defined(__AVX512F__)

namespace blobloss {
namespace BLOBLOSS_ISA {

constexpr __mmask16 kAll = 0xffff;  // the forms without a mask make GCC 12 warn of its own header

BL_INLINE __m512 all(float x) { return _mm512_set1_ps(x); }

// e^-|z|; NaN stays NaN. Below -105 it is less than half of the least number.
BL_INLINE __m512 exp_minus_abs(__m512 z) {
  // Powers of two in sixteenths, each as the sum of two numbers, so that a polynomial of degree three will do.
  const __m512 powers = _mm512_setr_ps(1.00000000f, 1.04427373f, 1.09050775f, 1.13878858f,
                                       1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                       1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                       1.68179286f, 1.75625217f, 1.83400810f, 1.91520655f);
  const __m512 rests = _mm512_setr_ps(0.000000e+00f, 4.833470e-08f, -1.307754e-08f, 5.386222e-08f,
                                      3.797635e-08f, 4.496838e-08f, -4.019000e-08f, -1.012335e-08f,
                                      2.420323e-08f, -4.500899e-08f, 8.070905e-09f, 9.836217e-09f,
                                      -2.475533e-08f, -9.235770e-09f, -1.123928e-08f, 9.845328e-09f);
  const __m512 x = _mm512_maskz_max_ps(kAll, all(-105.0f), _mm512_or_ps(z, all(-0.0f)));
  const __m512 magic = all(786432.0f);  // 1.5 * 2^19: adding it rounds to sixteenths, their number in the low bits
  const __m512 shifted = _mm512_fmadd_ps(x, all(1.44269504f), magic);
  const __m512 n = _mm512_sub_ps(shifted, magic);
  __m512 f = _mm512_fnmadd_ps(n, all(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), f);
  const __m512 q = _mm512_fmadd_ps(f, all(1.6666667163e-1f), all(0.5f));
  const __m512i index = _mm512_castps_si512(shifted);  // of which the tables take the low four bits
  const __m512 power = _mm512_maskz_permutexvar_ps(kAll, index, powers);
  const __m512 rest = _mm512_maskz_permutexvar_ps(kAll, index, rests);
  const __m512 y = _mm512_add_ps(power, _mm512_fmadd_ps(power, _mm512_fmadd_ps(_mm512_mul_ps(f, f), q, f), rest));
  return _mm512_maskz_scalef_ps(kAll, y, n);  // times 2 to the floor of n
}

// log(1 + t) for 0 <= t <= 1: the nearest of nine c, log c + log(1 + f) with (1 + t) / c = 1 + f.
BL_INLINE __m512 log1p_unit(__m512 t) {
  // 1 / c, of so few bits that f is rounded but once, and such that log c happens to be a float to 2 % of its last bit.
  const __m512 inverses = _mm512_setr_ps(1.0f, 0.88720703125f, 0.790771484375f, 0.7109375f,
                                         0.660400390625f, 0.597412109375f, 0.5703125f, 0.510498046875f,
                                         0.4765625f, 0, 0, 0, 0, 0, 0, 0);
  const __m512 logs = _mm512_setr_ps(0.0f, 0.119676918f, 0.234746248f, 0.341170758f,
                                     0.414908975f, 0.515148103f, 0.561570823f, 0.672368467f,
                                     0.741156399f, 0, 0, 0, 0, 0, 0, 0);
  const __m512i index = _mm512_castps_si512(_mm512_fmadd_ps(t, all(7.5f), all(12582912.0f)));
  const __m512 inverse = _mm512_maskz_permutexvar_ps(kAll, index, inverses);
  const __m512 log_c = _mm512_maskz_permutexvar_ps(kAll, index, logs);
  const __m512 f = _mm512_fmadd_ps(t, inverse, _mm512_sub_ps(inverse, all(1.0f)));
  __m512 q = all(-0.16764434f);  // (log(1 + f) - f) / f^2 on |f| <= 1/15
  q = _mm512_fmadd_ps(q, f, all(0.200893253f));
  q = _mm512_fmadd_ps(q, f, all(-0.249997824f));
  q = _mm512_fmadd_ps(q, f, all(0.333332092f));
  q = _mm512_fmadd_ps(q, f, all(-0.5f));
  return _mm512_add_ps(log_c, _mm512_fmadd_ps(_mm512_mul_ps(f, f), q, f));
}

BL_INLINE double add_lanes(__m512 lanes, __m512 others) {
  const auto half = [](__m512 x, auto which) {
    return _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, x, decltype(which)::value));
  };
  using Low = std::integral_constant<int, 0>;
  using High = std::integral_constant<int, 1>;
  alignas(64) double eight[8];
  _mm512_store_pd(eight, (half(lanes, Low()) + half(others, Low())) + (half(lanes, High()) + half(others, High())));
  return add_up<8>(eight);
}

BL_INLINE double sum_block(const float* values) {
  __m512 lanes = _mm512_setzero_ps(), others = lanes;
  for (int i = 0; i < kBlock; i += 32) {
    lanes = _mm512_add_ps(lanes, _mm512_loadu_ps(values + i));
    others = _mm512_add_ps(others, _mm512_loadu_ps(values + i + 16));
  }
  return add_lanes(lanes, others);
}

// e^-|z|, 1 / (1 + e^-|z|), and which probabilities are below 1/2: they are `small`, the others `large`.
struct Sigmoid {
  __m512 t, large, small;
  __mmask16 below;
};

BL_INLINE Sigmoid sigmoid(__m512 z) {
  Sigmoid s;
  s.t = exp_minus_abs(z);
  s.large = _mm512_div_ps(all(1.0f), _mm512_add_ps(all(1.0f), s.t));
  s.small = _mm512_fnmadd_ps(s.t, _mm512_mul_ps(s.t, s.large), s.t);  // t r, see probability()
  s.below = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
  return s;
}

// For the features that are not common.
BL_INLINE void keep(Block<float>& block, int i, const Sigmoid& s) {
  _mm512_store_ps(block.t + i, s.t);
  _mm512_store_ps(block.r + i, s.large);
}

BL_INLINE float* place_of(Block<float>& block, const Places& places, int32_t feature) {
  return places.has(feature) ? block.out[places.of[feature]] : block.unread;
}

template <bool kLog, bool kStore, bool kKeep>
static void evaluate_floats(Block<float>& block, const float* z, const Places& places) {
  float* const prob = place_of(block, places, BL_PROB);
  float* const pos = place_of(block, places, BL_NLL_POS);
  float* const neg = place_of(block, places, BL_NLL_NEG);
  struct Sums {
    __m512 prob = _mm512_setzero_ps(), pos = prob, neg = prob;
  } even, odd;
  const Ahead ahead = block.ahead;  // its own, so that it stays in registers
  const auto sixteen = [&](int i, Sums& sums) __attribute__((always_inline)) {
    ahead.fetch(i);
    const __m512 own = _mm512_loadu_ps(z + i);
    const Sigmoid s = sigmoid(own);
    if (kKeep) keep(block, i, s);
    const __m512 p = _mm512_mask_blend_ps(s.below, s.large, s.small);
    if (kStore) _mm512_store_ps(prob + i, p);
    sums.prob = _mm512_add_ps(sums.prob, p);
    if (!kLog) return;
    const __m512 l = log1p_unit(s.t), zero = _mm512_setzero_ps();
    if (kKeep) _mm512_store_ps(block.l + i, l);
    const __m512 nll_neg = _mm512_add_ps(_mm512_maskz_max_ps(kAll, zero, own), l);
    const __m512 nll_pos = _mm512_sub_ps(l, _mm512_maskz_min_ps(kAll, zero, own));
    if (kStore) _mm512_store_ps(neg + i, nll_neg);
    if (kStore) _mm512_store_ps(pos + i, nll_pos);
    sums.neg = _mm512_add_ps(sums.neg, nll_neg);
    sums.pos = _mm512_add_ps(sums.pos, nll_pos);
  };
  for (int i = 0; i < kBlock; i += 32) {
    sixteen(i, even);
    sixteen(i + 16, odd);
  }
  const auto put = [&](int32_t feature, __m512 a, __m512 b) {
    if (places.has(feature)) block.sums[places.of[feature]] = add_lanes(a, b);
  };
  put(BL_PROB, even.prob, odd.prob);
  if (kLog) put(BL_NLL_POS, even.pos, odd.pos);
  if (kLog) put(BL_NLL_NEG, even.neg, odd.neg);
}

static void evaluate_common(Block<float>& block, const float* z, const Places& places, bool store) {
  const bool focal = places.has_focal(), log = places.has_nll() || focal;
  if (focal || places.has(BL_PROB_SQ)) {
    if (log) return evaluate_floats<true, true, true>(block, z, places);
    return evaluate_floats<false, true, true>(block, z, places);
  }
  if (log && store) return evaluate_floats<true, true, false>(block, z, places);
  if (log) return evaluate_floats<true, false, false>(block, z, places);
  if (store) return evaluate_floats<false, true, false>(block, z, places);
  evaluate_floats<false, false, false>(block, z, places);
}

template <bool kNll, bool kWeighted, bool kKeep>
static void slopes_of_floats(Block<float>& block, const float* z, const Places& places, const float* coefficients,
                             float* sum) {
  float* const prob = place_of(block, places, BL_PROB);
  float* const pos = place_of(block, places, BL_NLL_POS);
  float* const neg = place_of(block, places, BL_NLL_NEG);
  const auto weight = [&](int32_t feature) {
    return all(kWeighted && places.has(feature) ? coefficients[places.of[feature]] : 0.0f);
  };
  const __m512 of_prob = weight(BL_PROB), of_neg = weight(BL_NLL_NEG);
  const __m512 of_pos = _mm512_sub_ps(_mm512_setzero_ps(), weight(BL_NLL_POS));
  const Ahead ahead = block.ahead;
  for (int i = 0; i < kBlock; i += 16) {
    ahead.fetch(i);
    const Sigmoid s = sigmoid(_mm512_loadu_ps(z + i));
    if (kKeep) keep(block, i, s);
    if (kKeep && places.has_focal()) _mm512_store_ps(block.l + i, log1p_unit(s.t));
    const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(s.t, s.large), s.large);
    const __m512 p = _mm512_mask_blend_ps(s.below, s.large, s.small);
    const __m512 rest = _mm512_mask_blend_ps(s.below, s.small, s.large);  // 1 - p
    if (kWeighted) {
      __m512 total = _mm512_mul_ps(of_prob, slope);
      if (kNll) total = _mm512_fmadd_ps(of_neg, p, _mm512_fmadd_ps(of_pos, rest, total));
      _mm512_storeu_ps(sum + i, total);
    } else {
      _mm512_store_ps(prob + i, slope);
      if (kNll) _mm512_store_ps(neg + i, p);
      if (kNll) _mm512_store_ps(pos + i, _mm512_sub_ps(_mm512_setzero_ps(), rest));
    }
  }
}

static void slopes_of_common(Block<float>& block, const float* z, const Places& places, const float* coefficients,
                             float* sum) {
  const bool nll = places.has_nll();
  if (places.has_focal() || places.has(BL_PROB_SQ)) {
    if (coefficients) return slopes_of_floats<true, true, true>(block, z, places, coefficients, sum);
    return slopes_of_floats<true, false, true>(block, z, places, coefficients, sum);
  }
  if (nll && coefficients) return slopes_of_floats<true, true, false>(block, z, places, coefficients, sum);
  if (nll) return slopes_of_floats<true, false, false>(block, z, places, coefficients, sum);
  if (coefficients) return slopes_of_floats<false, true, false>(block, z, places, coefficients, sum);
  slopes_of_floats<false, false, false>(block, z, places, coefficients, sum);
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss

#endif
