// The nearest instance of every voxel, exact: squared distances are integers, and of instances that are as near the one
// with the smallest id is taken. A look at the ids, which says where instances are and how large keys get; then the axes
// one after the other (nearest_lines.cpp): along x and y plane by plane, along z row by row.
//
// The memory of 32-bit keys is the result; larger ones have 8 or 16 bytes for every voxel of a sample and channel. Beside
// that, a byte for every row and, in every thread, 128 lines.

#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "blobloss.h"
#include "nearest_lines.h"
#include "segment_stats.h"
#include "threads.h"

namespace blobloss {
namespace {

constexpr int64_t kParallelVoxels = 8192;     // about 30 us of work
constexpr int64_t kVoxelsTogether = 1 << 20;  // whose large keys are in memory at the same time, or those of one group

int32_t bits_of(int64_t value) {
  int32_t bits = 0;
  for (; value > 0; value >>= 1) ++bits;
  return bits;
}

int64_t largest_distance(const bl_zones& problem) {
  int64_t sum = 0;
  for (int i = 0; i < 3; ++i) sum += problem.weights[i] * (problem.size[i] - 1) * (problem.size[i] - 1);
  return sum;
}

// What k voxels along an axis add to a key, for -size < k < size; returns where k = 0 is.
template <typename Step>
const Step* make_steps(std::vector<Step>& steps, int64_t size, int64_t weight, int32_t shift) {
  steps.resize(static_cast<size_t>(2 * size - 1));
  for (int64_t k = 0; k < size; ++k) {
    const Step step = static_cast<Step>((weight * k * k) << shift);
    steps[static_cast<size_t>(size - 1 + k)] = steps[static_cast<size_t>(size - 1 - k)] = step;
  }
  return steps.data() + size - 1;
}

class Solver {
 public:
  explicit Solver(const bl_zones& problem)
      : problem_(problem),
        groups_(problem.batch * problem.channels),
        voxels_(problem.size[0] * problem.size[1] * problem.size[2]),
        found_(static_cast<size_t>(groups_ * problem.size[0])),
        rows_(static_cast<size_t>(groups_ * problem.size[0] * problem.size[1])),
        planes_(found_.size()),
        num_planes_(static_cast<size_t>(groups_)),
        only_id_(static_cast<size_t>(groups_)) {}

  int32_t solve() {
    parallel(groups_ * problem_.size[0], [&](int64_t begin, int64_t end) {
      return kernels().zones->survey(problem_, begin, end, found_.data(), rows_.data());
    });
    int64_t most = 1;
    for (int64_t group = 0; group < groups_; ++group) most = std::max(most, sum_up(group));
    if (most > INT32_MAX) return BL_TOO_LARGE;
    const int32_t id_bits = bits_of(most), bits = id_bits + bits_of(largest_distance(problem_));
    const KeyKind kind = bits < 32 ? kKey32 : bits < 64 ? kKey64 : kKeyWide;
    ZonesPlan plan{};
    plan.problem = &problem_;
    plan.id_bits = id_bits;
    plan.rows = rows_.data();
    plan.planes = planes_.data();
    plan.num_planes = num_planes_.data();
    plan.only_id = only_id_.data();
    plan.keys = problem_.zones;
    for (int i = 0; i < 3; ++i) {
      const int64_t size = problem_.size[i], weight = problem_.weights[i];
      const int32_t shift = kind == kKeyWide ? 0 : id_bits;
      plan.axes[i].size = size;
      if (kind == kKey32)
        plan.axes[i].steps = make_steps(short_steps_[i], size, weight, shift);
      else
        plan.axes[i].steps = make_steps(long_steps_[i], size, weight, shift);
    }
    if (kind == kKey32) return go(plan, kind, groups_);
    const int64_t together = std::min(groups_, std::max<int64_t>(1, kVoxelsTogether / voxels_));
    const size_t size = kind == kKey64 ? sizeof(int64_t) : sizeof(WideKey);
    const std::unique_ptr<void, decltype(&free)> keys(malloc(static_cast<size_t>(together * voxels_) * size), free);
    if (!keys) return BL_NO_MEMORY;
    plan.keys = keys.get();
    int32_t status = 0;
    for (; plan.first_group < groups_ && !status; plan.first_group += together)
      status = go(plan, kind, std::min(together, groups_ - plan.first_group));
    return status;
  }

 private:
  template <typename Body>
  int32_t parallel(int64_t tasks, const Body& body) {
    std::atomic<int32_t> status{0};
    const bl_threads threads = threads_for(problem_.threads, groups_ * voxels_, kParallelVoxels);
    run_parallel(threads, tasks, [&](int64_t begin, int64_t end) {
      const int32_t found = body(begin, end);
      if (found) status.fetch_or(found);
    });
    return status.load();
  }

  // Lists the planes of a group that hold an instance, and returns its largest id.
  int64_t sum_up(int64_t group) {
    const int64_t depth = problem_.size[0];
    int64_t most = 0, least = INT64_MAX;
    int32_t count = 0;
    for (int64_t z = 0; z < depth; ++z) {
      const PlaneSurvey& plane = found_[static_cast<size_t>(group * depth + z)];
      if (plane.most <= 0) continue;
      planes_[static_cast<size_t>(group * depth + count++)] = static_cast<int32_t>(z);
      most = std::max(most, plane.most);
      least = std::min(least, plane.least);
    }
    num_planes_[static_cast<size_t>(group)] = count;
    only_id_[static_cast<size_t>(group)] = !count ? 1 : most == least ? static_cast<int32_t>(most) : 0;
    return most;
  }

  int32_t go(const ZonesPlan& plan, KeyKind kind, int64_t groups) {
    const int32_t status = parallel(groups * problem_.size[0], [&](int64_t begin, int64_t end) {
      return kernels().zones->planes[kind](plan, begin, end);
    });
    if (status) return status;
    const int64_t tiles = (problem_.size[2] + kTile - 1) / kTile;
    return parallel(groups * problem_.size[1] * tiles,
                    [&](int64_t begin, int64_t end) { return kernels().zones->depths[kind](plan, begin, end); });
  }

  const bl_zones problem_;
  const int64_t groups_, voxels_;
  std::vector<PlaneSurvey> found_;
  std::vector<uint8_t> rows_;
  std::vector<int32_t> planes_, num_planes_, only_id_;
  std::vector<int32_t> short_steps_[3];
  std::vector<int64_t> long_steps_[3];
};

}  // namespace
}  // namespace blobloss

extern "C" int32_t blobloss_nearest_instance(const bl_zones* arguments) {
  try {
    return blobloss::Solver(*arguments).solve();
  } catch (const std::bad_alloc&) {
    return BL_NO_MEMORY;
  }
}
