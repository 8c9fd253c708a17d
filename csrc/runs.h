// The runs of a row of bits (stretches of foreground voxels along the last axis), and the union of runs that meet.
#pragma once

#include "mask_bits.h"

namespace blobloss {
namespace BLOBLOSS_ISA {
namespace runs {

constexpr int kShort = 16;  // voxels

inline int popcount(uint64_t x) {
#if defined(__POPCNT__)
  return __builtin_popcountll(x);
#else  // where the built-in one is a call
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  return static_cast<int>(((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
#endif
}

// Unites two runs, after M. Rem: of two parents the larger is lowered step by step, so that a parent is never larger
// than its child and the root is the smallest of all.
inline void unite(int32_t* parents, int64_t a, int64_t b) {
  while (parents[a] != parents[b]) {
    const int64_t low = parents[a] < parents[b] ? a : b, high = a + b - low;
    const int32_t parent = parents[high];
    parents[high] = parents[low];
    if (parent == high) return;
    a = parent;
    b = low;
  }
}

// A word of a row, and the same with the voxel before (left) and after (right) at the place of each.
struct Word {
  uint64_t here, left, right;

  uint64_t wide() const { return here | left | right; }
  uint64_t starts() const { return here & ~left; }
};

inline Word word_at(const uint64_t* row, int64_t word, int64_t words) {
  const uint64_t here = row[word], before = word ? row[word - 1] : 0, after = word + 1 < words ? row[word + 1] : 0;
  return {here, here << 1 | before >> 63, here >> 1 | after << 63};
}

// The foreground of one sample and channel.
struct Bits {
  const uint64_t* voxels;  // of all rows
  const uint32_t* runs;    // before each word that has one, counted from the first of the volume
  const uint64_t* none;    // a row without any
  int32_t* parents;
  int64_t words;  // of a row
};

// Where the runs of two rows meet, one bit for each place, that of the voxel in the first row.
struct Contacts {
  uint64_t straight;  // with the voxel that faces it, or the one before that
  uint64_t after;     // with the one after
};

// Two runs meet in stretches of voxels that face each other, of which the first will do; or aslant, where the one ends
// and the other begins. `but` and the others: the places that need not be looked at.
inline Contacts contacts(const Word& a, const Word& b, bool aslant, uint64_t but, uint64_t but_before,
                         uint64_t but_after) {
  const uint64_t facing = a.here & b.here & ~but;
  Contacts found{facing & ~(facing << 1), 0};
  if (aslant) {
    found.straight |= a.starts() & b.left & ~b.here & ~but_before;
    found.after = a.here & ~a.right & b.right & ~b.here & ~but_after;
  }
  return found;
}

inline void unite(const Bits& bits, const Word& a, int64_t word_a, const Word& b, int64_t word_b, Contacts found) {
  if (!(found.straight | found.after)) return;
  // The run at a voxel is the last one that began, there or before.
  const uint64_t starts_a = a.starts(), starts_b = b.starts();
  const int64_t first_a = int64_t{bits.runs[word_a]} - 1, first_b = int64_t{bits.runs[word_b]} - 1;
  for (uint64_t left = found.straight; left; left &= left - 1) {
    const uint64_t until = left ^ (left - 1);
    unite(bits.parents, first_a + popcount(starts_a & until), first_b + popcount(starts_b & until));
  }
  for (uint64_t left = found.after; left; left &= left - 1) {
    const uint64_t until = left ^ (left - 1);
    unite(bits.parents, first_a + popcount(starts_a & until), first_b + popcount(starts_b & until) + 1);
  }
}

// The next word of [at, end) that has a bit, or end.
inline int64_t next_word(const uint64_t* bits, int64_t at, int64_t end) {
  while (at + 4 <= end && !(bits[at] | bits[at + 1] | bits[at + 2] | bits[at + 3])) at += 4;
  while (at < end && !bits[at]) ++at;
  return at;
}

// Calls body(row) for every row of [begin, end) that has a bit.
template <typename Body>
void for_rows(const uint64_t* bits, int64_t words, int64_t begin, int64_t end, const Body& body) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t word = next_word(bits, row * words, end * words);
    if (word >= (row + 1) * words) row = word / words;  // a division only where rows are empty
    if (row < end) body(row);
  }
}

// Calls body(begin, end) for every run of a row.
template <typename Body>
void for_runs(const uint64_t* row, int64_t words, const Body& body) {
  for (int64_t word = 0; word < words; ++word) {
    uint64_t left = row[word];
    while (left) {
      const int64_t begin = word * kWord + __builtin_ctzll(left);
      uint64_t gaps = ~(left | (left - 1));
      while (!gaps && ++word < words) left = row[word], gaps = ~left;
      if (!gaps) return body(begin, words * kWord);
      const int gap = __builtin_ctzll(gaps);
      body(begin, word * kWord + gap);
      left &= ~uint64_t{0} << gap;
    }
  }
}

// Writes a run among zeros, of which those up to `room` may be written again. Of a short run as many voxels as of any
// other: a loop over the few that it has would be guessed wrong time and again.
template <typename I>
inline void fill(I* from, I* until, const I* room, I id) {
  if (until - from > kShort || room - until < kShort) {
    for (; from < until; ++from) *from = id;
    return;
  }
  for (int i = 0; i < kShort; ++i) from[i] = id;
  for (int i = 0; i < kShort; ++i) until[i] = 0;
}

}  // namespace runs
}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
