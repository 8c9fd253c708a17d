// Drives blobloss_nearest_instance over all types of ids, odd sizes, small and huge weights, and any number of threads:
// for the sanitizers (sanitize.sh) and for emulated machines (cross_aarch64.sh). Every volume lies in memory that is
// exactly as large as it may be; it is compared with all pairs of voxels, and bit for bit over numbers of threads.
//
//     native_zones_stress [ROUNDS]
//
// Prints what is wrong and one line at the end; the status is 0 if nothing is wrong.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "blobloss.h"
#include "native_pools.h"

namespace {

using Random = std::mt19937;

const char* const kSets[] = {"baseline", "avx2", "avx512"};
const int64_t kWeights[] = {1, 1, 3, 1 << 14, int64_t(1) << 40, int64_t(1) << 44};  // keys of 32 and 64 bits, and wide
const int64_t kLargest[] = {255, 127, 32767, INT32_MAX, INT32_MAX};

int64_t pick(Random& random, int64_t below) { return random() % below; }

struct Volumes {
  bl_zones problem;
  std::vector<int64_t> ids;       // [B, C, z, y, x]
  std::unique_ptr<char[]> memory;
  std::vector<int32_t> expected;
};

template <typename I>
void store(Volumes& v, int64_t voxels, int64_t gap) {
  const int64_t groups = v.problem.batch * v.problem.channels;
  const int64_t count = groups * voxels + (groups - 1) * gap;
  v.memory.reset(new char[static_cast<size_t>(count) * sizeof(I)]);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < voxels; ++i) {
      const I id = static_cast<I>(v.ids[g * voxels + i]);
      memcpy(v.memory.get() + (g * (voxels + gap) + i) * sizeof(I), &id, sizeof id);
    }
  v.problem.instances.data = v.memory.get();
  v.problem.instances.channel_stride = voxels + gap;
  v.problem.instances.batch_stride = v.problem.channels * (voxels + gap);
}

void find_all_pairs(Volumes& v, int64_t voxels) {
  const int64_t* const size = v.problem.size;
  const auto place = [&](int64_t i, int axis) {
    return axis == 2 ? i % size[2] : axis == 1 ? i / size[2] % size[1] : i / size[2] / size[1];
  };
  v.expected.assign(v.ids.size(), 1);
  for (size_t i = 0; i < v.ids.size(); ++i) {
    const int64_t group = static_cast<int64_t>(i) / voxels;
    int64_t least = INT64_MAX;
    for (int64_t j = 0; j < voxels; ++j) {
      const int64_t id = v.ids[group * voxels + j];
      if (id <= 0) continue;
      int64_t distance = 0;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t k = place(static_cast<int64_t>(i) % voxels, axis) - place(j, axis);
        distance += v.problem.weights[axis] * k * k;
      }
      if (distance > least || (distance == least && id >= v.expected[i])) continue;
      least = distance;
      v.expected[i] = static_cast<int32_t>(id);
    }
    if (v.ids[i] < 0) v.expected[i] = -1;
  }
}

Volumes make(Random& random, int type) {
  Volumes v{};
  v.problem.batch = 1 + pick(random, 2);
  v.problem.channels = 1 + pick(random, 3);
  const int64_t most[] = {1 + pick(random, 12), 1 + pick(random, 12), 1 + pick(random, pick(random, 5) ? 40 : 300)};
  for (int axis = 0; axis < 3; ++axis) {
    v.problem.size[axis] = pick(random, 5) ? most[axis] : 1;
    v.problem.weights[axis] = kWeights[pick(random, 6)] + pick(random, 3);
  }
  const int64_t voxels = v.problem.size[0] * v.problem.size[1] * v.problem.size[2];
  const int64_t groups = v.problem.batch * v.problem.channels;
  const int64_t largest = pick(random, 2) ? kLargest[type - BL_U8] : 9;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rarity = pick(random, 4) ? 1 + pick(random, 60) : 1 << 30, ignored = pick(random, 2) ? 5 : 1 << 30;
    for (int64_t i = 0; i < voxels; ++i) {
      const int64_t id = pick(random, rarity) ? 0 : largest - pick(random, 9);
      v.ids.push_back(type != BL_U8 && !pick(random, ignored) ? -1 - pick(random, 100) : id);
    }
  }
  v.problem.instances.type = type;
  v.problem.instances.channels = static_cast<int32_t>(v.problem.channels);
  const int64_t gap = pick(random, 3);
  switch (type) {
    case BL_U8: store<uint8_t>(v, voxels, gap); break;
    case BL_I8: store<int8_t>(v, voxels, gap); break;
    case BL_I16: store<int16_t>(v, voxels, gap); break;
    case BL_I32: store<int32_t>(v, voxels, gap); break;
    default: store<int64_t>(v, voxels, gap);
  }
  find_all_pairs(v, voxels);
  return v;
}

const bl_threads kConfigurations[] = {{1, nullptr}, {2, nullptr}, {3, fake_pool}, {16, nullptr}};

int check(const Volumes& v, const char* isa, unsigned seed) {
  int wrong = 0;
  if (!blobloss_use_isa(isa)) return 0;
  for (const bl_threads& threads : kConfigurations) {
    const std::unique_ptr<int32_t[]> zones(new int32_t[v.ids.size()]);
    std::fill_n(zones.get(), v.ids.size(), 77);
    bl_zones problem = v.problem;
    problem.threads = threads;
    problem.zones = zones.get();
    const int32_t status = blobloss_nearest_instance(&problem);
    if (!status && std::equal(v.expected.begin(), v.expected.end(), zones.get())) continue;
    ++wrong;
    printf("case %u on %s with %d threads: status %d; type %d, %d x %d of %d x %d x %d\n", seed, isa,
           static_cast<int>(threads.count), status, v.problem.instances.type, static_cast<int>(problem.batch),
           static_cast<int>(problem.channels), static_cast<int>(problem.size[0]), static_cast<int>(problem.size[1]),
           static_cast<int>(problem.size[2]));
  }
  return wrong;
}

int check_too_large() {
  const int64_t ids[] = {0, INT64_C(1) << 31, 0};
  int32_t zones[3];
  const bl_zones problem{{ids, 0, 0, BL_I64, 1}, 1, 1, {1, 1, 3}, {1, 1, 1}, zones, {1, nullptr}};
  if (blobloss_nearest_instance(&problem) == BL_TOO_LARGE) return 0;
  printf("an id of 2^31 is not refused\n");
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 20;
  int wrong = check_too_large();
  unsigned seed = 0;
  for (int round = 0; round < rounds; ++round)
    for (int type = BL_U8; type <= BL_I64; ++type, ++seed) {
      Random random(seed);
      const Volumes v = make(random, type);
      for (const char* isa : kSets) wrong += check(v, isa, seed);
    }
  printf("%u volumes on", seed);
  for (const char* isa : kSets)
    if (blobloss_use_isa(isa)) printf(" %s", isa);
  printf(": %d wrong\n", wrong);
  return wrong != 0;
}
