// Blocks whose voxels lie in several cells, in groups of 16 voxels. The background is summed and written as vectors, and
// so is the instance that was met last, which usually goes on in the next group that is not all background. Where cells
// change often, a processor cannot foresee where that leads: in such a crowded block the voxels of instances are listed,
// without a branch, and looked at one by one.
#pragma once

#include "loads.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

constexpr uint32_t kWholeGroup = 0xffff;
constexpr int32_t kNone = INT32_MAX;  // no cell has this number
constexpr int kGroup = 16;            // voxels that are looked at together: their cells are a vector of AVX-512
constexpr int kFewChanges = 5;        // of the cell, in every third group; a block with more of them is crowded

// ---------------------------------------------------------------- groups: one bit or one lane per voxel

#if defined(__AVX512F__)
typedef __mmask16 Mask;  // stays in a register for masks as long as nobody needs the number

// Not by a cast: GCC 12 may store the 16 bits of a mask on the stack and read 32 from there.
BL_INLINE uint32_t number_of_mask(Mask mask) {
  uint32_t bits;
  __asm__("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
#else
typedef uint32_t Mask;
BL_INLINE uint32_t number_of_mask(Mask mask) { return mask; }
#endif

BL_INLINE Mask equal_to(const int32_t* cells, int32_t cell) {
#if defined(__AVX512F__)
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(cells), _mm512_set1_epi32(cell));
#elif defined(__AVX2__)
  uint32_t bits = 0;
  for (int i = 0; i < kGroup; i += 8) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells + i));
    const __m256i equal = _mm256_cmpeq_epi32(eight, _mm256_set1_epi32(cell));
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal))) << i;
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint32_t>(cells[i] == cell) << i;
  return bits;
#endif
}

BL_INLINE Mask positive(const int32_t* cells) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(cells), _mm512_setzero_si512());
#elif defined(__AVX2__)
  uint32_t bits = 0;
  for (int i = 0; i < kGroup; i += 8) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells + i));
    const __m256i above = _mm256_cmpgt_epi32(eight, _mm256_setzero_si256());
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above))) << i;
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint32_t>(cells[i] > 0) << i;
  return bits;
#endif
}

// Sums of some of the voxels of many groups. A mask and not a product: other voxels may be NaN.
template <typename T>
struct Lanes {
  alignas(64) T lane[kGroup] = {};

  BL_INLINE_MEMBER void add(const T* values, const int32_t* cells, int32_t cell, Mask) {
    using Bits = typename BitsOf<T>::type;
    for (int i = 0; i < kGroup; ++i) {
      const Bits mask = cells[i] == cell ? ~Bits{0} : Bits{0};
      lane[i] += number_of(static_cast<Bits>(bits_of(values[i]) & mask));
    }
  }
  BL_INLINE_MEMBER double total() const {
    alignas(64) double exact[kGroup];
    for (int i = 0; i < kGroup; ++i) exact[i] = static_cast<double>(lane[i]);
    return add_up<kGroup>(exact);
  }
};

// The gradient of a group: the coefficients of `own` where the cells are `cell`, those of `background` where they are 0,
// times the slopes; 0 elsewhere, even where a slope is NaN.
template <typename T, int F>
BL_INLINE void weigh(const T (*slopes)[kBlock], int start, const int32_t* cells, int32_t cell, Mask, Mask, const T* own,
                     const T* background, T* grad) {
  using Bits = typename BitsOf<T>::type;
  T sum[kGroup] = {};
  for (int f = 0; f < F; ++f) {
    const Bits mine = bits_of(own[f]), theirs = bits_of(background[f]);
    for (int i = 0; i < kGroup; ++i) {
      const Bits inside = cells[i] == cell ? ~Bits{0} : Bits{0};
      sum[i] += number_of(static_cast<Bits>((mine & inside) | (theirs & ~inside))) * slopes[f][start + i];
    }
  }
  for (int i = 0; i < kGroup; ++i) {
    const Bits known = ((cells[i] == cell) | (cells[i] == 0)) ? ~Bits{0} : Bits{0};
    grad[i] = number_of(static_cast<Bits>(bits_of(sum[i]) & known));
  }
}

#if defined(__AVX512F__)
template <>
struct Lanes<float> {
  __m512 lanes = _mm512_setzero_ps();

  BL_INLINE_MEMBER void add(const float* values, const int32_t*, int32_t, Mask mask) {
    lanes = _mm512_mask_add_ps(lanes, mask, lanes, _mm512_loadu_ps(values));
  }
  BL_INLINE_MEMBER double total() const { return add_lanes(lanes, _mm512_setzero_ps()); }
};

template <int F>
BL_INLINE void weigh(const float (*slopes)[kBlock], int start, const int32_t*, int32_t, Mask inside, Mask outside,
                     const float* own, const float* background, float* grad) {
  __m512 sum = _mm512_setzero_ps();
  for (int f = 0; f < F; ++f) {
    const __m512 weight = _mm512_mask_blend_ps(inside, all(background[f]), all(own[f]));
    sum = _mm512_fmadd_ps(weight, _mm512_load_ps(slopes[f] + start), sum);
  }
  const Mask known = static_cast<Mask>(_mm512_kor(inside, outside));
  _mm512_storeu_ps(grad, _mm512_maskz_mov_ps(known, sum));
}
#endif

// ---------------------------------------------------------------- crowded blocks

// How many voxels of a group, which is not the first, lie in another cell than the one before.
BL_INLINE int32_t count_changes(const int32_t* __restrict cells) {
#if defined(__AVX512F__)
  const __m512i before = _mm512_loadu_si512(cells - 1), own = _mm512_loadu_si512(cells);
  return __builtin_popcount(number_of_mask(_mm512_cmpneq_epi32_mask(before, own)));
#else
  int32_t changes = 0;
  for (int i = 0; i < kGroup; ++i) changes += cells[i - 1] != cells[i];
  return changes;
#endif
}

// Judged by every third group, which is nearly as good as by all.
BL_INLINE bool is_crowded(const int32_t* cells) {
  int32_t changes = 0;
  for (int start = kGroup; start < kBlock; start += 3 * kGroup) changes += count_changes(cells + start);
  return changes > kFewChanges;
}

// Lists the voxels of instances, after calling `before` for every group; returns how many.
template <typename Before>
BL_INLINE int32_t list_instances(const int32_t* cells, uint32_t (&where)[kBlock + kGroup], Before before) {
  int32_t size = 0;
#if defined(__AVX512F__)
  __m512i voxels = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int start = 0; start < kBlock; start += kGroup) {
    before(start);
    const Mask mask = positive(cells + start);
    _mm512_storeu_si512(where + size, _mm512_maskz_compress_epi32(mask, voxels));
    size += __builtin_popcount(number_of_mask(mask));
    voxels = _mm512_add_epi32(voxels, _mm512_set1_epi32(kGroup));
  }
#else
  uint64_t bits = 0;
  for (int start = 0; start < kBlock; start += kGroup) {
    before(start);
    bits |= static_cast<uint64_t>(positive(cells + start)) << start % 64;
    if ((start + kGroup) % 64) continue;
    const int count = __builtin_popcountll(bits);
    for (int done = 0; done < count; done += 8)  // eight at a time: how often is easier to foresee
      for (int j = 0; j < 8; ++j) {
        where[size + done + j] = static_cast<uint32_t>(start + kGroup - 64 + (bits ? __builtin_ctzll(bits) : 0));
        bits &= bits - 1;
      }
    size += count;
  }
#endif
  return size;
}

// ---------------------------------------------------------------- sums

template <typename T, int F>
BL_INLINE void add_voxel(const T (*values)[kBlock], const int32_t* cells, uint32_t i, double* table) {
  double* row = table + static_cast<int64_t>(cells[i]) * (1 + F);
  row[0] += 1;
  for (int f = 0; f < F; ++f) row[1 + f] += static_cast<double>(values[f][i]);
}

// Adds a block to a table of rows (count, sums).
template <typename T, int F>
static void add_mixed(const T (*values)[kBlock], const int32_t* cells, bool crowded, double* table) {
  Lanes<T> background[F + 1], own[F + 1];
  int32_t instance = kNone, num_background = 0, num_own = 0;
  const auto take_background = [&](int at) {
    const Mask outside = equal_to(cells + at, 0);
    const uint32_t bits = number_of_mask(outside);
    num_background += __builtin_popcount(bits);
    for (int f = 0; f < F; ++f) background[f].add(values[f] + at, cells + at, 0, outside);
    return bits;
  };
  const auto take_own = [&](int at) {
    const Mask inside = equal_to(cells + at, instance);
    const uint32_t bits = number_of_mask(inside);
    num_own += __builtin_popcount(bits);
    for (int f = 0; f < F; ++f) own[f].add(values[f] + at, cells + at, instance, inside);
    return bits;
  };
  const auto flush = [&] {
    if (!num_own) return;
    double* row = table + static_cast<int64_t>(instance) * (1 + F);
    row[0] += num_own;
    for (int f = 0; f < F; ++f) row[1 + f] += own[f].total();
  };
  if (crowded) {
    uint32_t where[kBlock + kGroup];
    const int32_t size = list_instances(cells, where, take_background);
    for (int32_t j = 0; j < size; ++j) add_voxel<T, F>(values, cells, where[j], table);
  } else {
    for (int start = 0; start < kBlock; start += kGroup) {
      const uint32_t outside = take_background(start);
      if (outside == kWholeGroup) continue;
      const uint32_t inside = take_own(start);
      uint32_t left = number_of_mask(positive(cells + start)) & ~inside;
      if (left && !inside) {
        flush();
        instance = cells[start + __builtin_ctz(left)];
        num_own = 0;
        for (auto& lanes : own) lanes = {};
        left &= ~take_own(start);
      }
      for (; left; left &= left - 1) add_voxel<T, F>(values, cells, start + __builtin_ctz(left), table);
    }
    flush();
  }
  table[0] += num_background;
  for (int f = 0; f < F; ++f) table[1 + f] += background[f].total();
}

template <typename T>
static void add_mixed_block(const T (*values)[kBlock], const int32_t* cells, int32_t num_features, double* table) {
  const bool crowded = is_crowded(cells);
  switch (num_features) {
    case 0: return add_mixed<T, 0>(values, cells, crowded, table);
    case 1: return add_mixed<T, 1>(values, cells, crowded, table);
    case 2: return add_mixed<T, 2>(values, cells, crowded, table);
    case 3: return add_mixed<T, 3>(values, cells, crowded, table);
    case 4: return add_mixed<T, 4>(values, cells, crowded, table);
    case 5: return add_mixed<T, 5>(values, cells, crowded, table);
    case 6: return add_mixed<T, 6>(values, cells, crowded, table);
  }
}

// ---------------------------------------------------------------- gradients

// The gradient of a block: coefficient times slope, over the features, with the coefficients [K, F] of a voxel's cell.
template <typename T, int F>
static void weigh_mixed(const T (*slopes)[kBlock], const int32_t* cells, bool crowded, const T* coefficients,
                        T* grad) {
  const auto write_group = [&](int at, int32_t cell) {
    const Mask inside = equal_to(cells + at, cell), outside = equal_to(cells + at, 0);
    const T* own = coefficients + static_cast<int64_t>(cell) * F;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(float))
      weigh<F>(slopes, at, cells + at, cell, inside, outside, own, coefficients, grad + at);
    else
#endif
      weigh<T, F>(slopes, at, cells + at, cell, inside, outside, own, coefficients, grad + at);
    return inside;  // the voxels of the cell
  };
  const auto write_voxel = [&](uint32_t i) {
    const T* own = coefficients + static_cast<int64_t>(cells[i]) * F;
    T sum = 0;
    for (int f = 0; f < F; ++f) sum += own[f] * slopes[f][i];
    grad[i] = sum;
  };
  if (crowded) {
    uint32_t where[kBlock + kGroup];
    const int32_t size = list_instances(cells, where, [&](int start) { write_group(start, 0); });
    for (int32_t j = 0; j < size; ++j) write_voxel(where[j]);
    return;
  }
  int32_t instance = 0;
  for (int start = 0; start < kBlock; start += kGroup) {
    const uint32_t foreground = number_of_mask(positive(cells + start));
    uint32_t left = foreground & ~number_of_mask(write_group(start, instance));
    if (left && left == foreground) {
      instance = cells[start + __builtin_ctz(left)];
      left &= ~number_of_mask(write_group(start, instance));
    }
    for (; left; left &= left - 1) write_voxel(start + __builtin_ctz(left));
  }
}

template <typename T>
static void mixed_gradient(const T (*slopes)[kBlock], const int32_t* cells, const T* coefficients, int32_t num_features,
                           T* grad) {
  const bool crowded = is_crowded(cells);
  switch (num_features) {
    case 1: return weigh_mixed<T, 1>(slopes, cells, crowded, coefficients, grad);
    case 2: return weigh_mixed<T, 2>(slopes, cells, crowded, coefficients, grad);
    case 3: return weigh_mixed<T, 3>(slopes, cells, crowded, coefficients, grad);
    case 4: return weigh_mixed<T, 4>(slopes, cells, crowded, coefficients, grad);
    case 5: return weigh_mixed<T, 5>(slopes, cells, crowded, coefficients, grad);
    case 6: return weigh_mixed<T, 6>(slopes, cells, crowded, coefficients, grad);
  }
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
