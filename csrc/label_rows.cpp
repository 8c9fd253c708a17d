// The passes of connected_components.cpp. This file is compiled once for every instruction set, each time in the namespace
// BLOBLOSS_ISA.

#include "label_rows.h"

#include <string.h>

#include "runs.h"

namespace blobloss {
namespace BLOBLOSS_ISA {
namespace runs {

constexpr int64_t kChunkBytes = 32768;  // of ids that are set to zero at once, which the nearest cache holds

static bool read(const LabelRows& rows, const void* first, int32_t type, const Wanted& wanted, int64_t begin,
                 int64_t end, int64_t* num_runs) {
  const int64_t words = rows.words;
  uint64_t* const voxels = rows.voxels + begin * words;
  uint64_t* const ignored = rows.ignored ? rows.ignored + begin * words : nullptr;
  const bool all_known = reader_of(type)(first, end - begin, rows.width, wanted, voxels, ignored);
  *num_runs = 0;
  if (!wanted.has_value) return all_known;
  int64_t count = 0;
  for_rows(rows.voxels, words, begin, end, [&](int64_t row) {
    uint64_t before = 0;
    for (int64_t word = row * words; word < (row + 1) * words; ++word) {
      const uint64_t here = rows.voxels[word];
      rows.runs[word] = static_cast<uint32_t>(count);
      count += popcount(here & ~(here << 1 | before >> 63));
      before = here;
    }
  });
  *num_runs = count;
  return all_known;
}

static void number_runs(const LabelRows& rows, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t words = rows.words;
  if (first)
    for_rows(rows.voxels, words, begin, end, [&](int64_t row) {
      for (int64_t word = row * words; word < (row + 1) * words; ++word) rows.runs[word] += static_cast<uint32_t>(first);
    });
  for (int64_t run = first; run < last; ++run) rows.parents[run] = static_cast<int32_t>(run);
}

// Above and behind: one place earlier along the last axis but one, and but two.
//
// Unions that others imply are left out. Above: where both voxels have one behind them, since these two are united in
// their own plane. Behind and above or below: where a voxel of the rows between is a neighbour of both. With the row
// behind every union is made, so that no two are left out because of each other.
template <int kAxes>
static void unite_row(const LabelRows& rows, int64_t row, int64_t from, int64_t until) {
  const Bits bits{rows.voxels, rows.runs, rows.none, rows.parents, rows.words};
  const int64_t height = rows.height, y = row % height, words = rows.words;
  const bool has_above = y > 0, has_below = y + 1 < height, has_behind = row >= height;
  const auto row_if = [&](bool exists, int64_t at) { return exists ? bits.voxels + at * words : bits.none; };
  const uint64_t* const here = bits.voxels + row * words;
  const uint64_t* const above = row_if(has_above, row - 1);
  const uint64_t* const below = row_if(has_below, row + 1);
  const uint64_t* const behind = row_if(has_behind, row - height);
  const uint64_t* const behind_above = row_if(has_behind && has_above, row - height - 1);
  const uint64_t* const behind_below = row_if(has_behind && has_below, row - height + 1);
  const auto joins = [&](const uint64_t* other, int64_t at) { return other != bits.none && at >= from && at < until; };
  const bool joins_above = joins(above, row - 1), joins_behind = joins(behind, row - height);
  const bool joins_behind_above = kAxes > 1 && joins(behind_above, row - height - 1);
  const bool joins_behind_below = kAxes > 1 && joins(behind_below, row - height + 1);
  constexpr bool kAslant = kAxes > 1, kFar = kAxes > 2;

  const auto others = [&](int64_t word) {
    return behind[word] | above[word] | (kAslant ? behind_above[word] | behind_below[word] : 0);
  };
  for (int64_t word = 0; word < words; ++word) {
    const uint64_t voxels = here[word];
    if (!((voxels | voxels << 1 | voxels >> 1) & others(word)) &&
        !(voxels & 1 && word && others(word - 1) >> 63) &&
        !(voxels >> 63 && word + 1 < words && others(word + 1) & 1))
      continue;  // most voxels of a sparse mask are alone
    const Word a = word_at(here, word, words), b = word_at(behind, word, words), u = word_at(above, word, words);
    const Word bu = word_at(behind_above, word, words);
    const int64_t at = row * words + word, plane = height * words;
    if (joins_behind) unite(bits, a, at, b, at - plane, contacts(a, b, kAslant, 0, 0, 0));
    if (joins_above) unite(bits, a, at, u, at - words, contacts(a, u, kAslant, b.here & bu.here, 0, 0));
    if (joins_behind_above && bu.wide()) {
      const uint64_t before = b.here | b.left | u.here | u.left, after = b.here | b.right | u.here | u.right;
      unite(bits, a, at, bu, at - plane - words, contacts(a, bu, kFar, before | after, before, after));
    }
    if (joins_behind_below) {
      const Word bd = word_at(behind_below, word, words), d = word_at(below, word, words);
      const uint64_t before = b.here | b.left | d.here | d.left, after = b.here | b.right | d.here | d.right;
      unite(bits, a, at, bd, at - plane + words, contacts(a, bd, kFar, before | after, before, after));
    }
  }
}

static void unite_rows(const LabelRows& rows, int32_t differing_axes, int64_t begin, int64_t end, int64_t from,
                       int64_t until) {
  for_rows(rows.voxels, rows.words, begin, end, [&](int64_t row) {
    if (differing_axes == 1)
      unite_row<1>(rows, row, from, until);
    else if (differing_axes == 2)
      unite_row<2>(rows, row, from, until);
    else
      unite_row<3>(rows, row, from, until);
  });
}

// ---------------------------------------------------------------- ids

template <typename I>
static void write_ids(const LabelRows& rows, int64_t begin, int64_t end, const int32_t* parent, I* ids) {
  const int64_t words = rows.words, width = rows.width, fitting = kChunkBytes / (width * int64_t{sizeof(I)});
  const int64_t chunk = fitting > 1 ? fitting : 1;
  for (; begin < end; begin += chunk) {
    const int64_t chunk_end = end - begin < chunk ? end : begin + chunk;
    const I* const room = ids + chunk_end * width;
    memset(ids + begin * width, 0, static_cast<size_t>((chunk_end - begin) * width) * sizeof(I));
    if (parent)
      for_rows(rows.voxels, words, begin, chunk_end, [&](int64_t row) {
        for_runs(rows.voxels + row * words, words, [&](int64_t from, int64_t until) {
          const int32_t own = *parent++, root = own < 0 ? own : rows.parents[own];
          fill(ids + row * width + from, ids + row * width + until, room, static_cast<I>(~root));
        });
      });
    if (rows.ignored)
      for_rows(rows.ignored, words, begin, chunk_end, [&](int64_t row) {
        for_runs(rows.ignored + row * words, words, [&](int64_t from, int64_t until) {
          for (int64_t x = from; x < until; ++x) ids[row * width + x] = -1;
        });
      });
  }
}

static void write(const LabelRows& rows, int64_t begin, int64_t end, const int32_t* parent, int32_t type, void* ids) {
  if (type == BL_I16) return write_ids(rows, begin, end, parent, static_cast<int16_t*>(ids));
  write_ids(rows, begin, end, parent, static_cast<int32_t*>(ids));
}

}  // namespace runs

extern const RowPasses row_passes = {runs::read, runs::number_runs, runs::unite_rows, runs::write};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
