// Blocks whose voxels lie in several cells, in groups of 16 voxels. The background is summed and written as vectors, and
// so is the instance that was met last, which usually goes on in the next group that is not all background. A block of
// tiny instances keeps a processor from foreseeing where that leads: once too many were met, the voxels of the
// instances in the remaining groups are listed, and looked at one by one.
#pragma once

#include "loads.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

constexpr int kGroup = 16;
constexpr uint32_t kWholeGroup = 0xffff;
constexpr int32_t kNone = INT32_MAX;  // no cell has this number
constexpr int kFewVisits = 8;  // to rows of instances, from which a block is crowded

// ---------------------------------------------------------------- groups: one bit or one lane per voxel

#if defined(__AVX512F__)
// A mask as a number. Not by a cast: GCC 12 may store the 16 bits of a mask on the stack and read 32 from there.
BL_INLINE uint32_t number_of_mask(__mmask16 mask) {
  uint32_t bits;
  __asm__("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
#endif

BL_INLINE uint32_t equal_to(const int32_t* cells, int32_t cell) {
#if defined(__AVX512F__)
  return number_of_mask(_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(cells), _mm512_set1_epi32(cell)));
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

BL_INLINE uint32_t negative(const int32_t* cells) {
#if defined(__AVX512F__)
  return number_of_mask(_mm512_movepi32_mask(_mm512_loadu_si512(cells)));
#elif defined(__AVX2__)
  const float* bits = reinterpret_cast<const float*>(cells);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_loadu_ps(bits))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_loadu_ps(bits + 8))) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint32_t>(cells[i] < 0) << i;
  return bits;
#endif
}

// Sums of some of the voxels of many groups. A mask and not a product: other voxels may be NaN.
template <typename T>
struct Lanes {
  alignas(64) T lane[kGroup] = {};

  BL_INLINE_MEMBER void add(const T* values, const int32_t* cells, int32_t cell, uint32_t) {
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

// The gradient of a group: the coefficients of `own` where the cells are `cell`, those of `others` elsewhere, times the
// slopes.
template <typename T, int F>
BL_INLINE void weigh(const T (*slopes)[kBlock], int start, const int32_t* cells, int32_t cell, uint32_t, const T* own,
                     const T* others, T* grad) {
  using Bits = typename BitsOf<T>::type;
  T sum[kGroup] = {};
  for (int f = 0; f < F; ++f) {
    const Bits mine = bits_of(own[f]), theirs = bits_of(others[f]);
    for (int i = 0; i < kGroup; ++i) {
      const Bits inside = cells[i] == cell ? ~Bits{0} : Bits{0};
      sum[i] += number_of(static_cast<Bits>((mine & inside) | (theirs & ~inside))) * slopes[f][start + i];
    }
  }
  for (int i = 0; i < kGroup; ++i) grad[i] = sum[i];
}

#if defined(__AVX512F__)
template <>
struct Lanes<float> {
  __m512 lanes = _mm512_setzero_ps();

  BL_INLINE_MEMBER void add(const float* values, const int32_t*, int32_t, uint32_t bits) {
    lanes = _mm512_mask_add_ps(lanes, static_cast<__mmask16>(bits), lanes, _mm512_loadu_ps(values));
  }
  BL_INLINE_MEMBER double total() const { return add_lanes(lanes, _mm512_setzero_ps()); }
};

template <int F>
BL_INLINE void weigh(const float (*slopes)[kBlock], int start, const int32_t*, int32_t, uint32_t bits, const float* own,
                     const float* others, float* grad) {
  __m512 sum = _mm512_setzero_ps();
  for (int f = 0; f < F; ++f) {
    const __m512 weight = _mm512_mask_blend_ps(static_cast<__mmask16>(bits), all(others[f]), all(own[f]));
    sum = _mm512_fmadd_ps(weight, _mm512_load_ps(slopes[f] + start), sum);
  }
  _mm512_storeu_ps(grad, sum);
}
#endif

// ---------------------------------------------------------------- lists

struct List {
  int32_t size = 0;
  int32_t where[kBlock + 8];  // room for more, since eight are written at a time: how often is easier to foresee

  BL_INLINE_MEMBER void append(uint64_t bits, int32_t start) {
    const int count = __builtin_popcountll(bits);
    for (int done = 0; done < count; done += 8)
      for (int j = 0; j < 8; ++j) {
        where[size + done + j] = start + (bits ? __builtin_ctzll(bits) : 0);
        bits &= bits - 1;
      }
    size += count;
  }
};

// Lists, from a group on, the voxels for which `bits_of_group(start)` has a bit.
template <typename Bits>
BL_INLINE void list_from(int start, List& list, Bits bits_of_group) {
  uint64_t word = 0;
  for (; start < kBlock; start += kGroup) {
    word |= static_cast<uint64_t>(bits_of_group(start)) << (start % 64);
    if ((start + kGroup) % 64) continue;
    list.append(word, start + kGroup - 64);
    word = 0;
  }
}

// ---------------------------------------------------------------- sums

template <typename T, int F>
BL_INLINE void add_voxel(const T (*values)[kBlock], const int32_t* cells, int32_t i, double* table) {
  double* row = table + static_cast<int64_t>(cells[i]) * (1 + F);
  row[0] += 1;
  for (int f = 0; f < F; ++f) row[1 + f] += static_cast<double>(values[f][i]);
}

// Adds a block to a table of rows (count, sums).
template <typename T, int F>
static void add_mixed(const T (*values)[kBlock], const int32_t* cells, double* table) {
  Lanes<T> background[F + 1], own[F + 1];
  int32_t instance = kNone, num_background = 0, num_own = 0;
  int visits = 0, start = 0;
  const auto take_background = [&](int at) {
    const uint32_t outside = equal_to(cells + at, 0);
    num_background += __builtin_popcount(outside);
    for (int f = 0; f < F; ++f) background[f].add(values[f] + at, cells + at, 0, outside);
    return outside;
  };
  const auto take_own = [&](int at) {
    const uint32_t inside = equal_to(cells + at, instance);
    num_own += __builtin_popcount(inside);
    for (int f = 0; f < F; ++f) own[f].add(values[f] + at, cells + at, instance, inside);
    return inside;
  };
  const auto flush = [&] {
    if (!num_own) return;
    double* row = table + static_cast<int64_t>(instance) * (1 + F);
    row[0] += num_own;
    for (int f = 0; f < F; ++f) row[1 + f] += own[f].total();
  };
  for (; start < kBlock && visits < kFewVisits; start += kGroup) {
    const uint32_t outside = take_background(start);
    if (outside == kWholeGroup) continue;
    const uint32_t inside = take_own(start);
    uint32_t left = kWholeGroup & ~(outside | inside);
    if (!left) continue;
    left &= ~negative(cells + start);
    if (left && !inside) {
      flush();
      instance = cells[start + __builtin_ctz(left)];
      num_own = 0;
      for (auto& lanes : own) lanes = {};
      left &= ~take_own(start);
      ++visits;
    }
    for (; left; left &= left - 1) {
      add_voxel<T, F>(values, cells, start + __builtin_ctz(left), table);
      ++visits;
    }
  }
  flush();
  if (start < kBlock) {
    List list;
    list_from(start, list, [&](int at) { return kWholeGroup & ~(take_background(at) | negative(cells + at)); });
    for (int j = 0; j < list.size; ++j) add_voxel<T, F>(values, cells, list.where[j], table);
  }
  table[0] += num_background;
  for (int f = 0; f < F; ++f) table[1 + f] += background[f].total();
}

template <typename T>
static void add_mixed_block(const T (*values)[kBlock], const int32_t* cells, int32_t num_features, double* table) {
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
template <typename T, int F>
static void weigh_mixed(const T (*slopes)[kBlock], const int32_t* cells, const T* coefficients, T* grad) {
  int32_t instance = 0;
  int visits = 0, start = 0;
  const auto write_group = [&](int at, int32_t cell, uint32_t inside) {
    const T* own = coefficients + static_cast<int64_t>(cell) * F;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(float))
      return weigh<F>(slopes, at, cells + at, cell, inside, own, coefficients, grad + at);
    else
#endif
      return weigh<T, F>(slopes, at, cells + at, cell, inside, own, coefficients, grad + at);
  };
  const auto write_voxel = [&](int32_t i) {
    const int64_t cell = cells[i];
    T sum = 0;  // where a voxel is ignored, even if its logit is NaN
    for (int f = 0; f < F && cell >= 0; ++f) sum += coefficients[cell * F + f] * slopes[f][i];
    grad[i] = sum;
  };
  for (; start < kBlock && visits < kFewVisits; start += kGroup) {
    uint32_t inside = equal_to(cells + start, instance);
    write_group(start, instance, inside);
    uint32_t left = kWholeGroup & ~(inside | equal_to(cells + start, 0));
    if (!left) continue;
    const uint32_t foreground = left & ~negative(cells + start);
    if (foreground && (!inside || instance == 0)) {
      instance = cells[start + __builtin_ctz(foreground)];
      inside = equal_to(cells + start, instance);
      write_group(start, instance, inside);
      left &= ~inside;
      ++visits;
    }
    for (; left; left &= left - 1) {
      write_voxel(start + __builtin_ctz(left));
      ++visits;
    }
  }
  if (start == kBlock) return;
  List list;
  list_from(start, list, [&](int at) {
    const uint32_t outside = equal_to(cells + at, 0);
    write_group(at, 0, outside);
    return kWholeGroup & ~outside;
  });
  for (int j = 0; j < list.size; ++j) write_voxel(list.where[j]);
}

template <typename T>
static void mixed_gradient(const T (*slopes)[kBlock], const int32_t* cells, const T* coefficients,
                           int32_t num_features, T* grad) {
  switch (num_features) {
    case 1: return weigh_mixed<T, 1>(slopes, cells, coefficients, grad);
    case 2: return weigh_mixed<T, 2>(slopes, cells, coefficients, grad);
    case 3: return weigh_mixed<T, 3>(slopes, cells, coefficients, grad);
    case 4: return weigh_mixed<T, 4>(slopes, cells, coefficients, grad);
    case 5: return weigh_mixed<T, 5>(slopes, cells, coefficients, grad);
    case 6: return weigh_mixed<T, 6>(slopes, cells, coefficients, grad);
  }
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
