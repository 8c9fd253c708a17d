// Blocks of logits, cells and targets in whatever type they have, and gradients back into it.
#pragma once

#include <limits.h>

#include "voxel_features.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

// ---------------------------------------------------------------- half precision, by integer arithmetic

BL_INLINE float from_half(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float scaled = number_of(magnitude) * 5.192296858534828e33f;  // 2^112: the exponents' biases differ by that
  const bool special = magnitude >= 0x0f800000u;                      // infinity or NaN
  return number_of((special ? magnitude | 0x7f800000u : bits_of(scaled)) | sign);
}

BL_INLINE uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 2^(e + 13), of the exponent e or of the least normal one, rounds to the bits that half precision has.
  const uint32_t exponent = magnitude & 0x7f800000u;
  const uint32_t base = exponent < 0x38800000u ? 0x38800000u : exponent;
  const float rounder = number_of(base + 0x06800000u);
  const float rounded = (number_of(magnitude) + rounder) - rounder;
  const uint32_t scaled = bits_of(rounded * 1.925929944387236e-34f) >> 13;  // 2^-112
  const uint32_t finite_or_inf = magnitude >= 0x477ff000u ? 0x7c00u : scaled;
  return static_cast<uint16_t>((magnitude > 0x7f800000u ? 0x7e00u : finite_or_inf) | sign);
}

BL_INLINE float from_bfloat(uint16_t x) { return number_of(static_cast<uint32_t>(x) << 16); }

BL_INLINE uint16_t to_bfloat(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

template <typename T>
BL_INLINE void from_halves(const uint16_t* __restrict from, int n, T* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<T>(from_half(from[i]));
}
template <typename T>
BL_INLINE void to_halves(const T* __restrict from, int n, uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = to_half(static_cast<float>(from[i]));
}
template <typename T>
BL_INLINE void from_bfloats(const uint16_t* __restrict from, int n, T* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<T>(from_bfloat(from[i]));
}
template <typename T>
BL_INLINE void to_bfloats(const T* __restrict from, int n, uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = to_bfloat(static_cast<float>(from[i]));
}

#if defined(__AVX512F__)
// The same by what this instruction set has for it, where nothing is left over.

BL_INLINE __m256i load_halves(const uint16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
BL_INLINE void store_halves(uint16_t* to, __m256i halves) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}

BL_INLINE void from_halves(const uint16_t* from, int n, float* to) {
  if (n % 16) return from_halves<float>(from, n, to);
  for (int i = 0; i < n; i += 16) _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(kAll, load_halves(from + i)));
}

BL_INLINE void to_halves(const float* from, int n, uint16_t* to) {
  if (n % 16) return to_halves<float>(from, n, to);
  for (int i = 0; i < n; i += 16)
    store_halves(to + i, _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
}

BL_INLINE void from_bfloats(const uint16_t* from, int n, float* to) {
  if (n % 16) return from_bfloats<float>(from, n, to);
  for (int i = 0; i < n; i += 16) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAll, load_halves(from + i));
    _mm512_storeu_si512(to + i, _mm512_maskz_slli_epi32(kAll, wide, 16));
  }
}

// The upper halves are the numbers, once half of what the lower can hold was added.
BL_INLINE __m512i round_to_bfloat(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
  __m512i rounded = _mm512_add_epi32(bits, half);
  rounded = _mm512_mask_add_epi32(rounded, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), rounded, one);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

BL_INLINE void to_bfloats(const float* from, int n, uint16_t* to) {
  if (n % 32) return to_bfloats<float>(from, n, to);
  alignas(64) uint16_t odd[32];  // where the upper halves are, in two vectors
  for (int i = 0; i < 32; ++i) odd[i] = static_cast<uint16_t>(2 * i + 1);
  const __m512i order = _mm512_load_si512(odd);
  for (int i = 0; i < n; i += 32) {
    const __m512i first = round_to_bfloat(_mm512_loadu_ps(from + i));
    const __m512i second = round_to_bfloat(_mm512_loadu_ps(from + i + 16));
    _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(first, order, second));
  }
}
#endif

// ---------------------------------------------------------------- logits

// The n logits at an offset: read where they lie if that is a whole block of the type computed in, otherwise converted
// into `buffer` and filled up with zeros.
template <typename T>
static const T* load_logits(const bl_volume& volume, int64_t offset, int n, T* __restrict buffer) {
  switch (volume.type) {
    case BL_F64:
    case BL_F32: {
      const T* from = static_cast<const T*>(volume.data) + offset;  // T is their type
      if (n == kBlock) return from;
      for (int i = 0; i < n; ++i) buffer[i] = from[i];
      break;
    }
    case BL_F16: {
      const uint16_t* __restrict from = static_cast<const uint16_t*>(volume.data) + offset;
      from_halves(from, n, buffer);
      break;
    }
    case BL_BF16: {
      const uint16_t* __restrict from = static_cast<const uint16_t*>(volume.data) + offset;
      from_bfloats(from, n, buffer);
      break;
    }
  }
  for (int i = n; i < kBlock; ++i) buffer[i] = 0;
  return buffer;
}

template <typename T>
static void store_gradient(int32_t type, void* gradient, int64_t offset, int n, const T* __restrict from) {
  switch (type) {
    case BL_F64:
    case BL_F32:
      memcpy(static_cast<T*>(gradient) + offset, from, static_cast<size_t>(n) * sizeof(T));
      break;
    case BL_F16: {
      uint16_t* __restrict to = static_cast<uint16_t*>(gradient) + offset;
      to_halves(from, n, to);
      break;
    }
    case BL_BF16: {
      uint16_t* __restrict to = static_cast<uint16_t*>(gradient) + offset;
      to_bfloats(from, n, to);
      break;
    }
  }
}

// ---------------------------------------------------------------- cells

template <typename I>
BL_INLINE int32_t narrow(I id) {
  if (sizeof(I) <= 4) return static_cast<int32_t>(id);
  return id < 0 ? -1 : id > INT32_MAX ? INT32_MAX : static_cast<int32_t>(id);
}

template <typename I>
static void load_integers(const void* data, int64_t offset, int n, int32_t* __restrict to) {
  const I* __restrict from = static_cast<const I*>(data) + offset;
  for (int i = 0; i < n; ++i) to[i] = narrow(from[i]);
}

static void load_ids(const bl_volume& volume, int64_t offset, int n, int32_t* to) {
  switch (volume.type) {
    case BL_U8: load_integers<uint8_t>(volume.data, offset, n, to); break;
    case BL_I8: load_integers<int8_t>(volume.data, offset, n, to); break;
    case BL_I16: load_integers<int16_t>(volume.data, offset, n, to); break;
    case BL_I32: load_integers<int32_t>(volume.data, offset, n, to); break;
    case BL_I64: load_integers<int64_t>(volume.data, offset, n, to); break;
  }
}

// The cells of a block: negative where ignored, otherwise below num_cells.
struct Cells {
  const int32_t* ids;  // if they are all the same, it may be that the first alone was written
  bool uniform;        // they are all the same

  BL_INLINE_MEMBER int32_t operator[](int i) const { return ids[uniform ? 0 : i]; }
};

// Whether all values of a block have the same bits.
template <typename S>
BL_INLINE bool is_constant(const S* __restrict from) {
  using Narrow = std::conditional_t<sizeof(S) == 1, uint8_t, uint16_t>;
  using Wide = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
  std::conditional_t<sizeof(S) < 4, Narrow, Wide> first, other, differences = 0;
  memcpy(&first, from, sizeof first);
  for (int i = 0; i < kBlock; ++i) {
    memcpy(&other, from + i, sizeof other);
    differences |= other ^ first;
  }
  return !differences;
}

BL_INLINE int32_t largest_in_block(const int32_t* __restrict cells) {
  int32_t most = cells[0];
  for (int i = 0; i < kBlock; ++i) most = cells[i] > most ? cells[i] : most;
  return most;
}

// ---------------------------------------------------------------- targets

// A stored value as a number that compares like it, and that may be compared with the number of any channel.
BL_INLINE int32_t value_of(uint8_t x) { return x; }
BL_INLINE int32_t value_of(int8_t x) { return x; }
BL_INLINE int32_t value_of(int16_t x) { return x; }
BL_INLINE int32_t value_of(int32_t x) { return x; }
BL_INLINE int64_t value_of(int64_t x) { return x; }
BL_INLINE float value_of(float x) { return x; }
BL_INLINE double value_of(double x) { return x; }
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
BL_INLINE float value_of(Half x) { return from_half(x.bits); }
BL_INLINE float value_of(Bfloat x) { return from_bfloat(x.bits); }

template <typename F>
BL_INLINE int32_t is_class(F value, int32_t classes) {
  const bool in_range = (value >= 0) & (value < static_cast<F>(classes));
  return in_range && static_cast<F>(static_cast<int32_t>(value)) == value;
}

struct Found {
  bool constant;    // all ids are the same, and so are the values of the target
  int32_t unknown;  // not 0 if a voxel that is not ignored has a value that a target of this kind may not hold
};

// 2 * id + bit; whatever it is for a negative id, it does not overflow.
BL_INLINE int32_t twice(int32_t id, int32_t bit) {
  return static_cast<int32_t>(2u * static_cast<uint32_t>(id) + static_cast<uint32_t>(bit));
}

// The cells of n voxels, 2 * id + bit: whether each belongs to channel `own` of a class map, or (own = -1) to a binary
// target. If the ids are all the same, as in nearly all blocks, the target usually is, too: then one voxel tells all.
template <typename S>
static Found join_as(const void* data, int64_t offset, int n, int32_t own, int32_t classes, bool same_ids,
                     const int32_t* __restrict ids, int32_t* __restrict cells) {
  const S* __restrict from = static_cast<const S*>(data) + offset;
  int32_t unknown = 0;
  bool constant = false;
  const auto join_voxels = [&](auto bit_of, auto is_unknown) {
    constant = same_ids && is_constant(from);
    if (constant) {
      cells[0] = twice(ids[0], bit_of(value_of(from[0]))) | (ids[0] >> 31);
      unknown = is_unknown(value_of(from[0])) & ~(ids[0] >> 31);
      return;
    }
    for (int i = 0; i < n; ++i) {
      cells[i] = twice(ids[i], bit_of(value_of(from[i]))) | (ids[i] >> 31);
      unknown |= is_unknown(value_of(from[i])) & ~(ids[i] >> 31);
    }
  };
  if (own < 0)
    join_voxels([](auto value) -> int32_t { return value != 0; },
                [](auto value) -> int32_t { return (value != 0) & (value != 1); });
  else
    join_voxels([=](auto value) -> int32_t { return value == static_cast<decltype(value)>(own); },
                [=](auto value) -> int32_t { return !is_class(value, classes); });
  for (int i = n; i < kBlock; ++i) cells[i] = -1;
  return {constant, unknown};
}

static Found join(const bl_volume& target, int64_t offset, int n, int32_t own, int32_t classes, bool same_ids,
                  const int32_t* ids, int32_t* cells) {
  const void* data = target.data;
  switch (target.type) {
    case BL_BOOL:
    case BL_U8: return join_as<uint8_t>(data, offset, n, own, classes, same_ids, ids, cells);
    case BL_I8: return join_as<int8_t>(data, offset, n, own, classes, same_ids, ids, cells);
    case BL_I16: return join_as<int16_t>(data, offset, n, own, classes, same_ids, ids, cells);
    case BL_I32: return join_as<int32_t>(data, offset, n, own, classes, same_ids, ids, cells);
    case BL_I64: return join_as<int64_t>(data, offset, n, own, classes, same_ids, ids, cells);
    case BL_F32: return join_as<float>(data, offset, n, own, classes, same_ids, ids, cells);
    case BL_F64: return join_as<double>(data, offset, n, own, classes, same_ids, ids, cells);
    case BL_F16: return join_as<Half>(data, offset, n, own, classes, same_ids, ids, cells);
    default: return join_as<Bfloat>(data, offset, n, own, classes, same_ids, ids, cells);
  }
}

// ---------------------------------------------------------------- cells from ids and targets

// The cells of n voxels of a sample and channel, read where they lie if they need no change, otherwise written to
// `buffer` of two blocks, which are filled up with -1. `status` collects what is wrong.
static Cells load_cells(const bl_problem& problem, int64_t b, int64_t c, int64_t start, int n,
                        int32_t* __restrict buffer, int32_t* status) {
  const bl_volume& cells = problem.cells;
  const bl_volume& target = problem.target;
  const int64_t offset = b * cells.batch_stride + c * cells.channel_stride + start;
  const bool background = problem.channel0 == BL_BACKGROUND && c == 0;
  const int32_t* ids = buffer;
  if (cells.type == BL_I32 && !background && n == kBlock) {
    ids = static_cast<const int32_t*>(cells.data) + offset;
  } else {
    load_ids(cells, offset, n, buffer);
    for (int i = n; i < kBlock; ++i) buffer[i] = -1;
    if (background)
      for (int i = 0; i < kBlock; ++i) buffer[i] = buffer[i] > 0 ? 0 : buffer[i];
  }
  const int64_t room = target.data ? problem.num_cells / 2 : problem.num_cells;
  const int32_t capacity = room > INT32_MAX / 2 ? INT32_MAX / 2 : static_cast<int32_t>(room);
  bool uniform = is_constant(ids);
  if ((uniform ? ids[0] : largest_in_block(ids)) >= capacity) {
    *status |= BL_TOO_LARGE;
    for (int i = 0; i < kBlock; ++i) buffer[i] = ids[i] >= capacity ? capacity - 1 : ids[i];
    ids = buffer;
  }
  if (target.data) {
    const int32_t own = target.channels < problem.channels ? static_cast<int32_t>(c) : -1;
    const int64_t from = b * target.batch_stride + c * target.channel_stride + start;
    int32_t* cells_of_both = buffer + kBlock;
    const int32_t classes = static_cast<int32_t>(problem.channels);
    const Found found = join(target, from, n, own, classes, uniform && n == kBlock, ids, cells_of_both);
    if (found.unknown) *status |= own < 0 ? BL_NOT_BINARY : BL_NOT_A_CLASS;
    ids = cells_of_both;
    uniform = found.constant || is_constant(ids);
  }
  return {ids, uniform};
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
