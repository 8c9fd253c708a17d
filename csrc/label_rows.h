// What connected_components.cpp knows of the passes over rows of bits, which are compiled once for every instruction set.
#pragma once

#include <stdint.h>

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

// One sample and channel. Each row begins with a word of its own; the bits beyond its end are 0.
struct LabelRows {
  int64_t height;  // rows of a plane
  int64_t width;   // voxels of a row
  int64_t words;   // of a row
  uint64_t* voxels;   // of the foreground
  uint64_t* ignored;  // or null
  uint32_t* runs;     // before each word that has one, counted from the first of its slab, then of all
  int32_t* parents;   // of the runs
  const uint64_t* none;  // a row without any voxel
};

struct RowPasses {
  // Reads rows [begin, end) of a target that begins at `first`, and counts their runs. False: a voxel is not known.
  bool (*read)(const LabelRows& rows, const void* first, int32_t type, const Wanted& wanted, int64_t begin, int64_t end,
               int64_t* num_runs);
  // Makes the runs of the rows [begin, end) parents of themselves; they are [first, last) of all.
  void (*number_runs)(const LabelRows& rows, int64_t begin, int64_t end, int64_t first, int64_t last);
  // Unites the runs of the rows [begin, end) with those of their earlier neighbours that lie in the rows [from, until).
  void (*unite)(const LabelRows& rows, int32_t differing_axes, int64_t begin, int64_t end, int64_t from, int64_t until);
  // Writes the ids of the rows [begin, end), whose runs have the parents from `parent` on; of roots, these are ~id.
  void (*write)(const LabelRows& rows, int64_t begin, int64_t end, const int32_t* parent, int32_t type, void* ids);
};

}  // namespace blobloss
