// What library.cpp knows of the kernels, which are compiled once for every instruction set.
#pragma once

#include <stdint.h>

#include "blobloss.h"

namespace blobloss {

// How a problem is cut: by its shape alone, never by the number of threads, so that results do not depend on that.
struct Plan {
  int64_t groups;    // (sample, channel) pairs, or samples where a softmax needs all channels of a voxel together
  int64_t channels;  // of a group
  int64_t slabs;     // parts of a group's volume that are summed apart, each into a table of its own
  int64_t regions;   // of the volume, one after the other, so that threads may keep to theirs
  int64_t chunks;    // runs of kChunk voxels; those of a region belong to its slabs in turn, which evens out dense places
  int64_t row;       // doubles per cell of a table: the count, then the sums
};

constexpr int64_t kChunk = 8192;

struct Passes;     // nearest_lines.h
struct RowPasses;  // label_rows.h

// All that was compiled for one instruction set. The kernels return what bl_status says.
struct Kernels {
  const char* name;
  // Task g * slabs + s is slab s of group g. Adds its chunks [begin, end), those that exist, to its table
  // [channels, num_cells, row], which is zero before the first.
  int32_t (*forward)(const bl_problem& problem, const Plan& plan, int64_t task, int64_t begin, int64_t end,
                     double* table);
  // Tasks [begin, end): task g * chunks + j writes the gradient in chunk j of group g.
  int32_t (*backward)(const bl_problem& problem, const Plan& plan, int64_t begin, int64_t end, const void* grad_sums,
                      void* grad);
  void (*evaluate)(int32_t feature, int32_t activation, double gamma, int32_t is_double, const void* x, int64_t n,
                   void* value, void* slope);
  const Passes* zones;
  const RowPasses* rows;
};

// Those in use.
const Kernels& kernels();

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace blobloss
