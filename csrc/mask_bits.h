// Rows of a target as bits: which voxels have a value, which are ignored, and whether all others are known.
#pragma once

#include <stdint.h>
#include <string.h>

#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "blobloss.h"

namespace blobloss {

constexpr int64_t kWord = 64;  // voxels of a word, the first one in its lowest bit

// What is looked for in a target. The type of its voxels need not be able to hold the value or the ignored one.
struct Wanted {
  int64_t value;
  int64_t ignore;
  int64_t classes;  // 0 .. classes - 1 are known; 2 for a binary target
  bool has_value;
  bool has_ignore;
};

namespace mask_bits {

// 64 bytes that are 0 or 1 as bits.
inline uint64_t pack(const uint8_t* flags) {
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
    last = holds(most) ? static_cast<T>(most) : std::numeric_limits<T>::max();
  }

  static bool holds(int64_t x) {
    if (std::is_floating_point<T>::value) return true;
    return x >= static_cast<int64_t>(std::numeric_limits<T>::min()) &&
           x <= static_cast<int64_t>(std::numeric_limits<T>::max());
  }
};

template <typename T>
bool is_whole(T x) {  // of one that lies in [0, last]
  return static_cast<T>(static_cast<int64_t>(x)) == x;
}

struct Found {
  uint64_t voxels, ignored, known;
};

template <typename T>
Found find(const T* x, const Values<T>& values, bool binary) {
  uint8_t flags[kWord];
  Found found{0, 0, 0};
  if (values.has_value) {
    for (int i = 0; i < kWord; ++i) flags[i] = x[i] == values.value;
    found.voxels = pack(flags);
  }
  if (values.has_ignore) {
    for (int i = 0; i < kWord; ++i) flags[i] = x[i] == values.ignore;
    found.ignored = pack(flags);
  }
  if (binary)
    for (int i = 0; i < kWord; ++i) flags[i] = static_cast<uint8_t>((x[i] == T(0)) | (x[i] == T(1)));
  else if (std::is_floating_point<T>::value)
    for (int i = 0; i < kWord; ++i) flags[i] = x[i] >= T(0) && x[i] <= values.last && is_whole(x[i]);
  else
    for (int i = 0; i < kWord; ++i) flags[i] = static_cast<uint8_t>((x[i] >= T(0)) & (x[i] <= values.last));
  found.known = pack(flags) | found.ignored;
  found.voxels &= ~found.ignored;  // the ignored value may be a class
  return found;
}

// Bytes of a binary target without an ignored value, by far the most frequent ones: what is not 0 can only be 1.
inline Found find_in_binary_bytes(const uint8_t* x) {
  uint64_t parts[8], all = 0;
  memcpy(parts, x, sizeof parts);
  for (const uint64_t part : parts) all |= part;
  if (!all) return {0, 0, ~uint64_t{0}};
  return {pack(x), 0, all & 0xfefefefefefefefeu ? 0 : ~uint64_t{0}};
}

template <typename T, typename FindAt>
bool read_rows(const T* x, int64_t rows, int64_t width, const FindAt& find_at, uint64_t* voxels, uint64_t* ignored) {
  uint64_t known = ~uint64_t{0};
  const auto put = [&](const Found& found, uint64_t there) {
    known &= found.known;
    *voxels++ = found.voxels & there;
    if (ignored) *ignored++ = found.ignored & there;
  };
  const int64_t tail = width % kWord;
  for (int64_t row = 0; row < rows; ++row) {
    for (const T* const end = x + (width - tail); x < end; x += kWord) put(find_at(x), ~uint64_t{0});
    if (tail) {
      T part[kWord] = {};  // filled up with zeros
      memcpy(part, x, static_cast<size_t>(tail) * sizeof(T));
      Found found = find_at(part);
      const uint64_t there = (uint64_t{1} << tail) - 1;
      found.known |= ~there;
      put(found, there);
      x += tail;
    }
  }
  return known == ~uint64_t{0};
}

template <typename T>
bool read(const void* first, int64_t rows, int64_t width, const Wanted& wanted, uint64_t* voxels, uint64_t* ignored) {
  const T* const x = static_cast<const T*>(first);
  const Values<T> values(wanted);
  const bool binary = wanted.classes == 2;
  if (sizeof(T) == 1 && binary && values.has_value && values.value == T(1) && !values.has_ignore)
    return read_rows(
        x, rows, width, [](const T* at) { return find_in_binary_bytes(reinterpret_cast<const uint8_t*>(at)); }, voxels,
        ignored);
  return read_rows(
      x, rows, width, [&](const T* at) { return find(at, values, binary); }, voxels, ignored);
}

}  // namespace mask_bits

// Reads rows that follow one another into words, each row from a word of its own; the bits beyond its end are 0. Returns
// whether each voxel is known. `ignored` may be null.
using ReadRows = bool (*)(const void* first, int64_t rows, int64_t width, const Wanted& wanted, uint64_t* voxels,
                          uint64_t* ignored);

// Null for a type that is not read.
inline ReadRows reader_of(int32_t type) {
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

}  // namespace blobloss
