// Features of a block of voxels and their slopes: the C++ twin of the section of that name in kernels/reference.py.
#pragma once

#include "blobloss.h"
#include "vector_math.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

// Voxels in a block. A sum over a block is exact to 1e-7 or so in fp32, since every lane adds up few terms; blocks are
// added up in double.
constexpr int kBlock = 512;

// z is the logit whose sigmoid is the probability (the probability itself for activation "none").
template <typename T>
struct Block {
  alignas(64) T z[kBlock];
  alignas(64) T t[kBlock];          // e^-|z|
  alignas(64) T l[kBlock];          // log(1 + t)
  alignas(64) T out[BLOBLOSS_MAX_FEATURES][kBlock];  // values, or slopes
};

// 1 / (1 + t) or t / (1 + t); the latter as a small correction of t, so that rounding 1 + t does not matter.
template <typename T>
BL_INLINE T probability(T z, T t) {
  const T r = T(1) / (T(1) + t);
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

enum class Also { kNothing, kProb, kProbSlope };

// e^-|z| of a block into t, and into `out` the feature that nearly every criterion has, or its slope: in one loop, since
// the division hides behind the exponential.
template <typename T, Also also>
BL_INLINE void exponentials(const T* __restrict z, T* __restrict t, T* __restrict out) {
  for (int i = 0; i < kBlock; ++i) {
    const T e = exp_nonpositive(-absolute(z[i]));
    t[i] = e;
    if (also == Also::kProb) out[i] = probability(z[i], e);
    if (also == Also::kProbSlope) {
      const T r = T(1) / (T(1) + e);
      out[i] = e * r * r;
    }
  }
}

#if defined(__AVX512F__)
// The same with what this instruction set has to itself: a table of 2^(j / 16) in registers (each power is the sum of two
// numbers), so that a polynomial of degree three will do, and scaling that rounds correctly below the normal range.
template <Also also>
BL_INLINE void exponentials_of_floats(const float* __restrict z, float* __restrict t, float* __restrict out) {
  const __m512 powers = _mm512_setr_ps(1.00000000f, 1.04427373f, 1.09050775f, 1.13878858f,
                                       1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                       1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                       1.68179286f, 1.75625217f, 1.83400810f, 1.91520655f);
  const __m512 rests = _mm512_setr_ps(0.000000e+00f, 4.833470e-08f, -1.307754e-08f, 5.386222e-08f,
                                      3.797635e-08f, 4.496838e-08f, -4.019000e-08f, -1.012335e-08f,
                                      2.420323e-08f, -4.500899e-08f, 8.070905e-09f, 9.836217e-09f,
                                      -2.475533e-08f, -9.235770e-09f, -1.123928e-08f, 9.845328e-09f);
  const __m512 one = _mm512_set1_ps(1.0f), magic = _mm512_set1_ps(12582912.0f);
  const __mmask16 all = 0xffff;  // the forms without a mask make GCC 12 warn of its own header
  for (int i = 0; i < kBlock; i += 16) {
    const __m512 own = _mm512_loadu_ps(z + i);
    const __m512 x = _mm512_maskz_max_ps(all, _mm512_set1_ps(-105.0f), _mm512_or_ps(own, _mm512_set1_ps(-0.0f)));
    const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(16 * 1.44269504f), magic);
    const __m512 n = _mm512_sub_ps(shifted, magic);  // in sixteenths
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f / 16), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f / 16), r);
    const __m512 q = _mm512_fmadd_ps(r, _mm512_set1_ps(1.6666667163e-1f), _mm512_set1_ps(0.5f));
    const __m512i index = _mm512_castps_si512(shifted);  // of which the tables take the low four bits
    const __m512 power = _mm512_maskz_permutexvar_ps(all, index, powers);
    const __m512 rest = _mm512_maskz_permutexvar_ps(all, index, rests);
    const __m512 y = _mm512_add_ps(power, _mm512_fmadd_ps(power, _mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r), rest));
    const __m512 e = _mm512_maskz_scalef_ps(all, y, _mm512_mul_ps(n, _mm512_set1_ps(1.0f / 16)));
    _mm512_storeu_ps(t + i, e);
    if (also == Also::kNothing) continue;
    const __m512 reciprocal = _mm512_div_ps(one, _mm512_add_ps(one, e));
    const __m512 product = _mm512_mul_ps(e, reciprocal);
    if (also == Also::kProbSlope) {
      _mm512_storeu_ps(out + i, _mm512_mul_ps(product, reciprocal));
    } else {
      const __mmask16 below = _mm512_cmp_ps_mask(own, _mm512_setzero_ps(), _CMP_LT_OQ);
      _mm512_storeu_ps(out + i, _mm512_mask_blend_ps(below, reciprocal, _mm512_fnmadd_ps(e, product, e)));
    }
  }
}
#endif

template <typename T, Also also>
static void prepare(Block<T>& block, const T* __restrict z, bool with_log, T* __restrict out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float))
    exponentials_of_floats<also>(z, block.t, out);
  else
#endif
    exponentials<T, also>(z, block.t, out);
  if (!with_log) return;
  const T* __restrict t = block.t;
  T* __restrict l = block.l;
  for (int i = 0; i < kBlock; ++i) l[i] = log1p_unit(t[i]);
}

template <typename T>
static void values_of_logits(const Block<T>& block, const T* __restrict z, int32_t feature, T gamma,
                             T* __restrict out) {
  const T* __restrict t = block.t;
  const T* __restrict l = block.l;
  switch (feature) {
    case BL_PROB_SQ:
      for (int i = 0; i < kBlock; ++i) {
        const T p = probability(z[i], t[i]);
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

template <typename T>
static void slopes_of_logits(const Block<T>& block, const T* __restrict z, int32_t feature, T gamma,
                             T* __restrict out) {
  const T* __restrict t = block.t;
  const T* __restrict l = block.l;
  switch (feature) {
    case BL_PROB_SQ:
      for (int i = 0; i < kBlock; ++i) {
        const T r = T(1) / (T(1) + t[i]);
        out[i] = 2 * ((z[i] < 0 ? t[i] : T(1)) * r) * (t[i] * r * r);
      }
      break;
    case BL_NLL_POS:
      for (int i = 0; i < kBlock; ++i) out[i] = -probability(-z[i], t[i]);
      break;
    case BL_NLL_NEG:
      for (int i = 0; i < kBlock; ++i) out[i] = probability(z[i], t[i]);
      break;
    case BL_FOCAL_POS:
      for (int i = 0; i < kBlock; ++i) {
        const T p = probability(z[i], t[i]), q = probability(-z[i], t[i]);
        out[i] = -focus(nll_neg(z[i], l[i]), gamma) * (q + gamma * (p * finite(nll_pos(z[i], l[i]))));
      }
      break;
    case BL_FOCAL_NEG:
      for (int i = 0; i < kBlock; ++i) {
        const T p = probability(z[i], t[i]), q = probability(-z[i], t[i]);
        out[i] = focus(nll_pos(z[i], l[i]), gamma) * (p + gamma * (q * finite(nll_neg(z[i], l[i]))));
      }
      break;
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
static void slopes_of_probabilities(const T* __restrict z, int32_t feature, T gamma, T* __restrict out) {
  const bool positive = feature == BL_NLL_POS || feature == BL_FOCAL_POS;
  const T sign = positive ? T(-1) : T(1);
  for (int i = 0; i < kBlock; ++i) {
    const T p = z[i];
    if (feature == BL_PROB) {
      out[i] = 1;
    } else if (feature == BL_PROB_SQ) {
      out[i] = 2 * p;
    } else {
      const T other = positive ? 1 - p : p;
      const T variance = p * (1 - p);
      const T d_nll = sign * (other / (variance < T(1e-12) ? T(1e-12) : variance));
      out[i] = d_nll;
      if (feature >= BL_FOCAL_POS) {
        const T nll = clamped_nll(p, positive);
        const T d_modulation = nll == 0 ? T(0) : sign * gamma * power(other, gamma - 1) * nll;
        out[i] = power(other, gamma) * d_nll + d_modulation;
      }
    }
  }
}

// All requested features of a block, or their slopes, in block.out.
template <typename T, bool kSlopes>
static void evaluate_block(Block<T>& block, const T* z, const int32_t* features, int32_t num_features,
                           int32_t activation, T gamma) {
  if (activation == BL_NONE) {
    for (int32_t f = 0; f < num_features; ++f) {
      if (kSlopes)
        slopes_of_probabilities(z, features[f], gamma, block.out[f]);
      else
        values_of_probabilities(z, features[f], gamma, block.out[f]);
    }
    return;
  }
  bool with_log = false;
  T* prob = nullptr;
  for (int32_t f = 0; f < num_features; ++f) {
    with_log |= features[f] >= (kSlopes ? BL_FOCAL_POS : BL_NLL_POS);
    if (features[f] == BL_PROB) prob = block.out[f];
  }
  if (prob)
    prepare<T, kSlopes ? Also::kProbSlope : Also::kProb>(block, z, with_log, prob);
  else
    prepare<T, Also::kNothing>(block, z, with_log, prob);
  for (int32_t f = 0; f < num_features; ++f) {
    if (features[f] == BL_PROB) continue;  // done
    if (kSlopes)
      slopes_of_logits(block, z, features[f], gamma, block.out[f]);
    else
      values_of_logits(block, z, features[f], gamma, block.out[f]);
  }
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
