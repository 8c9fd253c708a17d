// Blocks whose voxels lie in several cells. The background is summed and written as vectors, and so is an instance that
// owns much of the block; the voxels of the rest are listed, and looked at one by one.
#pragma once

#include "loads.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

constexpr int kLanes = 32;   // of a sum: the 16 voxels of a lane are added up in the type of the logits
constexpr int kGroup = 32;   // voxels that a 32-bit mask speaks of
constexpr int kMany = 32;    // voxels from which it may pay to sum an instance as a vector
constexpr int kRun = 16;     // voxels of other instances that are looked at together

BL_INLINE uint32_t equal_to(const int32_t* cells, int32_t cell) {
#if defined(__AVX512F__)
  const __m512i all = _mm512_set1_epi32(cell);
  const uint32_t low = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(cells), all);
  const uint32_t high = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(cells + 16), all);
  return low | high << 16;
#elif defined(__AVX2__)
  uint32_t mask = 0;
  for (int i = 0; i < kGroup; i += 8) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells + i));
    const __m256i equal = _mm256_cmpeq_epi32(eight, _mm256_set1_epi32(cell));
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal))) << i;
  }
  return mask;
#else
  uint32_t mask = 0;
  for (int i = 0; i < kGroup; ++i) mask |= static_cast<uint32_t>(cells[i] == cell) << i;
  return mask;
#endif
}

// ---------------------------------------------------------------- what is in a block

constexpr int kWord = 64;  // voxels that a word of masks speaks of
constexpr int kWords = kBlock / kWord;

struct Mixture {
  int32_t instance;  // the first in the block if it owns much of it, otherwise 0
  int32_t num_background;
  int32_t num_instance;
  int32_t num_rest;
  uint64_t background[kWords];  // which voxels are background, as bits
  uint64_t own[kWords];         // and which are of the instance
  int32_t rest[kBlock + 8];     // where all others are; room for more, since eight are written at a time
};

BL_INLINE uint64_t word_of(const int32_t* cells, int32_t cell) {
  return equal_to(cells, cell) | static_cast<uint64_t>(equal_to(cells + kGroup, cell)) << kGroup;
}

static void look_at(const int32_t* __restrict cells, Mixture& __restrict mixture) {
  int32_t instance = 0, num_background = 0, num_instance = 0, num_rest = 0;
  for (int w = 0; w < kWords; ++w) {
    const uint64_t background = word_of(cells + w * kWord, 0);
    mixture.background[w] = background;
    num_background += __builtin_popcountll(background);
    for (uint64_t left = instance ? 0 : ~background; left && !instance; left &= left - 1) {
      const int32_t cell = cells[w * kWord + __builtin_ctzll(left)];
      instance = cell > 0 ? cell : 0;
    }
  }
  for (int w = 0; w < kWords; ++w) {
    mixture.own[w] = instance ? word_of(cells + w * kWord, instance) : 0;
    num_instance += __builtin_popcountll(mixture.own[w]);
  }
  const bool is_large = num_instance >= kMany;
  mixture.instance = is_large ? instance : 0;
  mixture.num_background = num_background;
  mixture.num_instance = is_large ? num_instance : 0;
  if (num_background + mixture.num_instance < kBlock) {
    for (int w = 0; w < kWords; ++w) {
      uint64_t left = ~(mixture.background[w] | (is_large ? mixture.own[w] : 0));
      const int count = __builtin_popcountll(left);
      for (int done = 0; done < count; done += 8) {  // eight at a time: how often is easier to foresee
        for (int j = 0; j < 8; ++j) {
          mixture.rest[num_rest + done + j] = w * kWord + (left ? __builtin_ctzll(left) : 0);
          left &= left - 1;
        }
      }
      num_rest += count;
    }
  }
  mixture.num_rest = num_rest;
}

// ---------------------------------------------------------------- sums

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

// The sum over one cell, whose voxels are also given as bits. A mask and not a product: other voxels may be NaN.
template <typename T>
BL_INLINE double sum_cell(const T* __restrict values, const int32_t* __restrict cells, int32_t cell, const uint64_t*) {
  using Bits = typename BitsOf<T>::type;
  alignas(64) T lanes[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const Bits mask = cells[i + j] == cell ? ~Bits{0} : Bits{0};
      lanes[j] += number_of(static_cast<Bits>(bits_of(values[i + j]) & mask));
    }
  return add_lanes(lanes);
}

#if defined(__AVX512F__)
BL_INLINE double sum_cell(const float* values, const int32_t*, int32_t, const uint64_t* words) {
  __m512 first = _mm512_setzero_ps(), second = first, third = first, fourth = first;
  for (int w = 0; w < kWords; ++w) {
    const float* own = values + w * kWord;
    const uint64_t word = words[w];
    first = _mm512_mask_add_ps(first, static_cast<__mmask16>(word), first, _mm512_loadu_ps(own));
    second = _mm512_mask_add_ps(second, static_cast<__mmask16>(word >> 16), second, _mm512_loadu_ps(own + 16));
    third = _mm512_mask_add_ps(third, static_cast<__mmask16>(word >> 32), third, _mm512_loadu_ps(own + 32));
    fourth = _mm512_mask_add_ps(fourth, static_cast<__mmask16>(word >> 48), fourth, _mm512_loadu_ps(own + 48));
  }
  alignas(64) float lanes[kLanes];
  _mm512_store_ps(lanes, _mm512_add_ps(first, second));
  _mm512_store_ps(lanes + 16, _mm512_add_ps(third, fourth));
  return add_lanes(lanes);
}
#endif

// Whether all voxels of a run lie in the cell of the first. Where cells are tiny, its ends say no at once.
BL_INLINE bool all_alike(const int32_t* cells, const int32_t* where) {
  const int32_t first = cells[where[0]];
  if (cells[where[kRun - 1]] != first) return false;
  int32_t different = 0;
  for (int j = 0; j < kRun; ++j) different |= cells[where[j]] ^ first;
  return different == 0;
}

// Adds the listed voxels to their rows, and takes them out of the values.
template <typename T, int F>
static void move_rest(T (*values)[kBlock], const int32_t* cells, const Mixture& mixture, double* table) {
  constexpr int kRow = 1 + F;
  for (int start = 0; start < mixture.num_rest; start += kRun) {
    const int32_t* where = mixture.rest + start;
    const int n = mixture.num_rest - start < kRun ? mixture.num_rest - start : kRun;
    if (n == kRun && all_alike(cells, where)) {  // adding to one row again and again would wait for each addition
      double sums[F + 1] = {kRun};
      for (int f = 0; f < F; ++f) {
        alignas(64) double run[kRun];
        for (int j = 0; j < kRun; ++j) {
          run[j] = static_cast<double>(values[f][where[j]]);
          values[f][where[j]] = 0;
        }
        sums[1 + f] = add_up<kRun>(run);
      }
      const int64_t cell = cells[where[0]];
      for (int k = 0; k < kRow && cell >= 0; ++k) table[cell * kRow + k] += sums[k];
      continue;
    }
    for (int j = 0; j < n; ++j) {
      const int64_t cell = cells[where[j]];
      if (cell >= 0) {
        table[cell * kRow] += 1;
        for (int f = 0; f < F; ++f) table[cell * kRow + 1 + f] += static_cast<double>(values[f][where[j]]);
      }
      for (int f = 0; f < F; ++f) values[f][where[j]] = 0;
    }
  }
}

// Adds a block to a table of rows (count, sums); the values are used up.
template <typename T, int F>
static void add_mixed(T (*values)[kBlock], const int32_t* cells, double* table) {
  Mixture mixture;
  look_at(cells, mixture);
  table[0] += mixture.num_background;
  move_rest<T, F>(values, cells, mixture, table);
  if (!mixture.instance) {
    for (int f = 0; f < F; ++f) table[1 + f] += sum_block(values[f]);
    return;
  }
  double* row = table + static_cast<int64_t>(mixture.instance) * (1 + F);
  row[0] += mixture.num_instance;
  for (int f = 0; f < F; ++f) {
    table[1 + f] += sum_cell(values[f], cells, 0, mixture.background);
    row[1 + f] += sum_cell(values[f], cells, mixture.instance, mixture.own);
  }
}

template <typename T>
static void add_mixed_block(T (*values)[kBlock], const int32_t* cells, int32_t num_features, double* table) {
  switch (num_features) {
    case 0: return add_mixed<T, 0>(values, cells, table);
    case 1: return add_mixed<T, 1>(values, cells, table);
    case 2: return add_mixed<T, 2>(values, cells, table);
    case 3: return add_mixed<T, 3>(values, cells, table);
    case 4: return add_mixed<T, 4>(values, cells, table);
    case 5: return add_mixed<T, 5>(values, cells, table);
    case 6: return add_mixed<T, 6>(values, cells, table);
  }
}

// ---------------------------------------------------------------- gradients

// The gradient of a block: coefficient times slope, over the features, with the coefficients [K, F] of a voxel's cell.
template <typename T>
static void mixed_gradient(const T (*slopes)[kBlock], const int32_t* __restrict cells, const T* coefficients,
                           int32_t num_features, T* __restrict grad) {
  Mixture mixture;
  look_at(cells, mixture);
  const int32_t instance = mixture.instance;
  const T* of_instance = coefficients + static_cast<int64_t>(instance) * num_features;
  for (int32_t f = 0; f < num_features; ++f) {
    const T* __restrict slope = slopes[f];
    const T outside = coefficients[f], inside = of_instance[f];
    if (f == 0)
      for (int i = 0; i < kBlock; ++i) grad[i] = (cells[i] == instance ? inside : outside) * slope[i];
    else
      for (int i = 0; i < kBlock; ++i) grad[i] += (cells[i] == instance ? inside : outside) * slope[i];
  }
  for (int j = 0; j < mixture.num_rest; ++j) {
    const int i = mixture.rest[j];
    const int64_t cell = cells[i];
    T sum = 0;  // where a voxel is ignored, even if its logit is NaN
    for (int32_t f = 0; f < num_features && cell >= 0; ++f) sum += coefficients[cell * num_features + f] * slopes[f][i];
    grad[i] = sum;
  }
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
