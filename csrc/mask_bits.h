// Rows of a target as bits: which voxels have a value, which are ignored, and whether all others are known.
#pragma once

#include <stdint.h>
#include <string.h>

#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "label_rows.h"

#ifndef BLOBLOSS_ISA
#define BLOBLOSS_ISA baseline
#endif

namespace blobloss {
namespace BLOBLOSS_ISA {

constexpr uintptr_t kAhead = 2048;  // bytes: fetched early, a mask that no cache holds takes a third less time

namespace mask_bits {

// 64 bytes that are 0 or 1 as bits.
static inline uint64_t pack(const uint8_t* flags) {
  uint64_t bits = 0;
#if defined(__SSE2__)
  for (int part = 0; part < 4; ++part) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + 16 * part));
    bits |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_slli_epi16(some, 7))) << (16 * part);
  }
#elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  for (int part = 0; part < 8; ++part) {
    uint64_t some;
    memcpy(&some, flags + 8 * part, sizeof some);
    bits |= (some * 0x0102040810204080u >> 56) << (8 * part);  // byte k to bit k of the highest byte; nothing carries
  }
#else
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(flags[i]) << i;
#endif
  return bits;
}

template <typename T>
struct Values {
  T value{}, ignore{}, last{};
  bool has_value, has_ignore;

  explicit Values(const Wanted& wanted)
      : has_value(wanted.has_value && holds(wanted.value)), has_ignore(wanted.has_ignore && holds(wanted.ignore)) {
    if (has_value) value = static_cast<T>(wanted.value);
    if (has_ignore) ignore = static_cast<T>(wanted.ignore);
    const int64_t most = wanted.classes - 1;
    last = holds(most) ? static_cast<T>(most) : kMost;
  }

  static bool holds(int64_t x) {
    if (std::is_floating_point<T>::value) return true;
    return x >= static_cast<int64_t>(kLeast) && x <= static_cast<int64_t>(kMost);
  }

 private:
  static constexpr T kLeast = std::numeric_limits<T>::min(), kMost = std::numeric_limits<T>::max();
};

template <typename T>
bool is_whole(T x) {  // of one that lies in [0, last]
  return static_cast<T>(static_cast<int64_t>(x)) == x;
}

struct Found {
  uint64_t voxels, ignored;
};

// Finds the bits of 64 voxels, and remembers whether all were known.
template <typename T>
class Finder {
 public:
  explicit Finder(const Wanted& wanted) : values_(wanted), is_binary_(wanted.classes == 2) {}

  Found operator()(const T* x) {
    uint8_t flags[kWord];
    Found found{0, 0};
    if (values_.has_value) {
      for (int i = 0; i < kWord; ++i) flags[i] = x[i] == values_.value;
      found.voxels = pack(flags);
    }
    if (values_.has_ignore) {
      for (int i = 0; i < kWord; ++i) flags[i] = x[i] == values_.ignore;
      found.ignored = pack(flags);
    }
    if (is_binary_)
      for (int i = 0; i < kWord; ++i) flags[i] = static_cast<uint8_t>((x[i] == T(0)) | (x[i] == T(1)));
    else if (std::is_floating_point<T>::value)
      for (int i = 0; i < kWord; ++i) flags[i] = x[i] >= T(0) && x[i] <= values_.last && is_whole(x[i]);
    else
      for (int i = 0; i < kWord; ++i) flags[i] = static_cast<uint8_t>((x[i] >= T(0)) & (x[i] <= values_.last));
    known_ &= pack(flags) | found.ignored;
    found.voxels &= ~found.ignored;  // the ignored value may be a class
    return found;
  }

  bool all_known() const { return known_ == ~uint64_t{0}; }

 private:
  const Values<T> values_;
  const bool is_binary_;
  uint64_t known_ = ~uint64_t{0};
};

// The same for bytes of a binary target without an ignored value, the most frequent by far: what is not 0 must be 1.
class BinaryBytesFinder {
 public:
  Found operator()(const void* x) {
#if defined(__SSE2__)
    const __m128i* const from = static_cast<const __m128i*>(x);
    uint64_t bits = 0;
    for (int part = 0; part < 4; ++part) {
      const __m128i some = _mm_loadu_si128(from + part);
      all_ = _mm_or_si128(all_, some);
      bits |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_slli_epi16(some, 7))) << (16 * part);
    }
    return {bits, 0};
#else
    uint64_t parts[8];
    memcpy(parts, x, sizeof parts);
    for (const uint64_t part : parts) all_ |= part;
    return {pack(static_cast<const uint8_t*>(x)), 0};
#endif
  }

  bool all_known() const {
    uint64_t all[2] = {};
    memcpy(all, &all_, sizeof all_);
    return !((all[0] | all[1]) & 0xfefefefefefefefeu);
  }

 private:
#if defined(__SSE2__)
  __m128i all_ = _mm_setzero_si128();
#else
  uint64_t all_ = 0;
#endif
};

template <typename T, typename AnyFinder>
bool read_with(AnyFinder find, const T* x, int64_t rows, int64_t width, uint64_t* voxels, uint64_t* ignored) {
  const auto put = [&](const Found& found, uint64_t there) {
    *voxels++ = found.voxels & there;
    if (ignored) *ignored++ = found.ignored & there;
  };
  const T* const last = x + rows * width;
  const int64_t tail = width % kWord;
  for (int64_t row = 0; row < rows; ++row) {
    for (const T* const end = x + (width - tail); x < end; x += kWord) {
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(x) + kAhead));
      put(find(x), ~uint64_t{0});
    }
    if (!tail) continue;
    const uint64_t there = (uint64_t{1} << tail) - 1;
    if (last - x >= kWord) {  // with what follows of the next rows, which is looked at there as well
      put(find(x), there);
    } else {
      T part[kWord] = {};  // zeros are known
      memcpy(part, x, static_cast<size_t>(tail) * sizeof(T));
      put(find(part), there);
    }
    x += tail;
  }
  return find.all_known();
}

template <typename T>
bool read(const void* first, int64_t rows, int64_t width, const Wanted& wanted, uint64_t* voxels, uint64_t* ignored) {
  const T* const x = static_cast<const T*>(first);
  if (sizeof(T) == 1 && wanted.classes == 2 && wanted.has_value && !wanted.has_ignore)
    return read_with(BinaryBytesFinder(), x, rows, width, voxels, ignored);
  return read_with(Finder<T>(wanted), x, rows, width, voxels, ignored);
}

}  // namespace mask_bits

// Reads rows that follow one another into words, each row from a word of its own; the bits beyond its end are 0.
// Returns whether each voxel is known. `ignored` may be null.
using ReadRows = bool (*)(const void* first, int64_t rows, int64_t width, const Wanted& wanted, uint64_t* voxels,
                          uint64_t* ignored);

// Null for a type that is not read.
static inline ReadRows reader_of(int32_t type) {
  switch (type) {
    case BL_BOOL:
    case BL_U8: return mask_bits::read<uint8_t>;
    case BL_I8: return mask_bits::read<int8_t>;
    case BL_I16: return mask_bits::read<int16_t>;
    case BL_I32: return mask_bits::read<int32_t>;
    case BL_I64: return mask_bits::read<int64_t>;
    case BL_F32: return mask_bits::read<float>;
    case BL_F64: return mask_bits::read<double>;
    default: return nullptr;
  }
}

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
