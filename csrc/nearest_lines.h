// What nearest_instance.cpp knows of the passes along lines, which are compiled once for every instruction set.
#pragma once

#include <stdint.h>

#include "blobloss.h"

namespace blobloss {

// A key is a squared distance and an id as one number, the distance in front: the smaller of two keys is the nearer
// instance, and of two that are as near the one with the smaller id. It has 32 or 64 bits where both fit into them.
enum KeyKind { kKey32, kKey64, kKeyWide, kKeyKinds };

struct WideKey {
  int64_t distance;
  int64_t id;
};

enum RowFlag : uint8_t { kHasInstance = 1, kHasIgnored = 2 };

constexpr int64_t kTile = 128;  // voxels along x whose lines along y or z are searched by one task
constexpr int kLanes = 16;      // and together

// Along z, y or x.
struct Axis {
  int64_t size;
  const void* steps;  // steps[k] is what k voxels add to a key, -size < k < size; int32_t for 32-bit keys, else int64_t
};

struct PlaneSurvey {
  int64_t most;   // the largest id
  int64_t least;  // the smallest above 0, anything where there is none
};

// Everything that the passes read. A group is a sample and channel, a row lies along x, a plane is a z.
struct ZonesPlan {
  const bl_zones* problem;
  Axis axes[3];
  int32_t id_bits;
  const uint8_t* rows;        // RowFlags [groups, z, y]
  const int32_t* planes;      // [groups, z]: the planes that hold an instance, in ascending order
  const int32_t* num_planes;  // [groups]
  const int32_t* only_id;     // [groups]: the only instance that there is, or 0
  int64_t first_group;        // of those that have their keys in memory
  void* keys;                 // [groups, z, y, x]; for 32-bit keys it is the result, which is written last
};

// The passes do tasks [begin, end) and return what bl_status says.
struct Passes {
  // Task g * z + j looks at plane j of group g: into found [groups, z] and rows [groups, z, y].
  int32_t (*survey)(const bl_zones& problem, int64_t begin, int64_t end, PlaneSurvey* found, uint8_t* rows);
  // By KeyKind. Task g * z + j goes along x and y in plane j of group first_group + g.
  int32_t (*planes[kKeyKinds])(const ZonesPlan& plan, int64_t begin, int64_t end);
  // Task (g * y + i) * tiles + t goes along z in tile t of the rows i, and writes the ids.
  int32_t (*depths[kKeyKinds])(const ZonesPlan& plan, int64_t begin, int64_t end);
};

}  // namespace blobloss
