// The passes of nearest_instance.cpp. This file is compiled once for every instruction set, each time in the namespace
// BLOBLOSS_ISA.
//
// Along x a row is filled from the instance voxels in it. Along y and z the smallest key of a line is searched for every
// voxel: of two sources a < b, the step from b to a grows along the line, so that where b is as near as a, it is nearer
// from there on. The sources of voxels in order are in order, then, and those of a voxel lie between those of two that
// are known on either side of it: every second voxel, then every second of the rest, and so on. This takes about
// log2(n) comparisons for a voxel, and the ranges of sixteen lines side by side hardly differ.

#include "lanes.h"

#include <stdlib.h>

namespace blobloss {
namespace BLOBLOSS_ISA {

// Memory that begins where a cache line does. Not the standard library's: of its templates the linker would keep one copy
// for all instruction sets.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(malloc(static_cast<size_t>(count) * sizeof(T) + kLine)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(memory_); }
  bool has_memory() const { return memory_; }
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + kLine - 1) / kLine * kLine); }

 private:
  static constexpr size_t kLine = 64;
  void* const memory_;
};

// ---------------------------------------------------------------- rows of ids

template <typename I>
static const I* row_of(const bl_zones& problem, int64_t group, int64_t z, int64_t y) {
  const int64_t b = group / problem.channels, c = group % problem.channels;
  const int64_t row = (z * problem.size[1] + y) * problem.size[2];
  return static_cast<const I*>(problem.instances.data) + b * problem.instances.batch_stride +
         c * problem.instances.channel_stride + row;
}

template <typename I>
struct Unsigned;
template <>
struct Unsigned<uint8_t> {
  typedef uint8_t type;
};
template <>
struct Unsigned<int8_t> {
  typedef uint8_t type;
};
template <>
struct Unsigned<int16_t> {
  typedef uint16_t type;
};
template <>
struct Unsigned<int32_t> {
  typedef uint32_t type;
};
template <>
struct Unsigned<int64_t> {
  typedef uint64_t type;
};

template <typename I>
static void survey_plane(const bl_zones& problem, int64_t group, int64_t z, PlaneSurvey* found, uint8_t* rows) {
  typedef typename Unsigned<I>::type U;
  I most = 0;
  U least = static_cast<U>(-1);  // of ids - 1, which puts those that are no instance behind all others
  for (int64_t y = 0; y < problem.size[1]; ++y) {
    const I* __restrict ids = row_of<I>(problem, group, z, y);
    I high = 0, low = 0;
    U lowest = static_cast<U>(-1);
    for (int64_t x = 0; x < problem.size[2]; ++x) {
      const U before = static_cast<U>(static_cast<U>(ids[x]) - 1);
      high = ids[x] > high ? ids[x] : high;
      low = ids[x] < low ? ids[x] : low;
      lowest = before < lowest ? before : lowest;
    }
    rows[y] = static_cast<uint8_t>((high > 0 ? kHasInstance : 0) | (low < 0 ? kHasIgnored : 0));
    most = high > most ? high : most;
    least = lowest < least ? lowest : least;
  }
  *found = {static_cast<int64_t>(most), static_cast<int64_t>(least) + 1};
}

static int32_t survey(const bl_zones& problem, int64_t begin, int64_t end, PlaneSurvey* found, uint8_t* rows) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / problem.size[0], z = task % problem.size[0];
    uint8_t* const flags = rows + task * problem.size[1];
    switch (problem.instances.type) {
      case BL_U8: survey_plane<uint8_t>(problem, group, z, found + task, flags); break;
      case BL_I8: survey_plane<int8_t>(problem, group, z, found + task, flags); break;
      case BL_I16: survey_plane<int16_t>(problem, group, z, found + task, flags); break;
      case BL_I32: survey_plane<int32_t>(problem, group, z, found + task, flags); break;
      default: survey_plane<int64_t>(problem, group, z, found + task, flags);
    }
  }
  return 0;
}

// ---------------------------------------------------------------- along x

// Fills a row that holds an instance: between two of its voxels with the smaller of what comes from either.
template <typename K, typename I>
static void fill_row(const I* __restrict ids, int64_t n, const typename K::Step* __restrict steps,
                     typename K::Key* __restrict keys) {
  int64_t left = 0;
  while (ids[left] <= 0) ++left;
  typename K::Key from_left = K::of(static_cast<int32_t>(ids[left]));
  for (int64_t x = 0; x <= left; ++x) keys[x] = K::plus(from_left, steps[x - left]);
  for (int64_t right = left + 1; right < n; ++right) {
    if (ids[right] <= 0) continue;
    const typename K::Key from_right = K::of(static_cast<int32_t>(ids[right]));
    for (int64_t x = left + 1; x < right; ++x) {
      const typename K::Key a = K::plus(from_left, steps[x - left]), b = K::plus(from_right, steps[x - right]);
      keys[x] = b < a ? b : a;
    }
    keys[right] = from_right;
    left = right;
    from_left = from_right;
  }
  for (int64_t x = left + 1; x < n; ++x) keys[x] = K::plus(from_left, steps[x - left]);
}

template <typename K>
static void fill_row(const bl_zones& problem, int64_t group, int64_t z, int64_t y, const typename K::Step* steps,
                     typename K::Key* keys) {
  const int64_t n = problem.size[2];
  switch (problem.instances.type) {
    case BL_U8: return fill_row<K>(row_of<uint8_t>(problem, group, z, y), n, steps, keys);
    case BL_I8: return fill_row<K>(row_of<int8_t>(problem, group, z, y), n, steps, keys);
    case BL_I16: return fill_row<K>(row_of<int16_t>(problem, group, z, y), n, steps, keys);
    case BL_I32: return fill_row<K>(row_of<int32_t>(problem, group, z, y), n, steps, keys);
    default: return fill_row<K>(row_of<int64_t>(problem, group, z, y), n, steps, keys);
  }
}

template <typename I>
static void mark_ignored(const I* __restrict ids, int64_t n, int32_t* __restrict zones) {
  for (int64_t x = 0; x < n; ++x) zones[x] = ids[x] < 0 ? -1 : zones[x];
}

static void mark_ignored(const bl_zones& problem, int64_t group, int64_t z, int64_t y, int64_t x, int64_t n,
                         int32_t* zones) {
  switch (problem.instances.type) {
    case BL_U8: return;
    case BL_I8: return mark_ignored(row_of<int8_t>(problem, group, z, y) + x, n, zones);
    case BL_I16: return mark_ignored(row_of<int16_t>(problem, group, z, y) + x, n, zones);
    case BL_I32: return mark_ignored(row_of<int32_t>(problem, group, z, y) + x, n, zones);
    default: return mark_ignored(row_of<int64_t>(problem, group, z, y) + x, n, zones);
  }
}

// ---------------------------------------------------------------- along y and z

// The memory of a task: the sources of a tile, block by block, what was found, and where.
template <typename K>
struct Scratch {
  Buffer<typename K::Key> sources, found;
  Buffer<int32_t> places, first, last;

  Scratch(int64_t n, int64_t width)
      : sources(lanes(width) * n), found(lanes(width) * n), places(n), first(n + 1), last(n + 1) {}
  static int64_t lanes(int64_t width) { return width < kTile ? (width + kLanes - 1) / kLanes * kLanes : kTile; }
  bool has_memory() const {
    return sources.has_memory() && found.has_memory() && places.has_memory() && first.has_memory() &&
           last.has_memory();
  }
};

// What follows does n voxels of a block, or all of it where there are more. Those that a block has too many are copies of
// the last, which need no search of their own.
template <typename K>
static void write_block(const typename K::Key* __restrict keys, int64_t n, typename K::Key* __restrict block) {
  if (n >= kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) K::put(keys[l], block, l);
  } else {
    for (int64_t l = 0; l < kLanes; ++l) K::put(keys[l < n ? l : n - 1], block, l);
  }
}

template <typename K>
static void read_block(const typename K::Key* __restrict block, int64_t n, typename K::Key* __restrict keys) {
  if (n >= kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) keys[l] = K::get(block, l);
  } else {
    for (int64_t l = 0; l < n; ++l) keys[l] = K::get(block, l);
  }
}

template <typename K>
static void read_ids(const typename K::Key* __restrict block, int64_t n, int32_t id_bits, int32_t* __restrict ids) {
  if (n >= kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) ids[l] = K::id(K::get(block, l), id_bits);
  } else {
    for (int64_t l = 0; l < n; ++l) ids[l] = K::id(K::get(block, l), id_bits);
  }
}

// The smallest key for each of n voxels of sixteen lines; source j lies at places[j].
template <typename K>
static void search_lines(const typename K::Key* sources, const int32_t* places, int32_t count, int64_t n,
                         const typename K::Step* steps, int32_t* first, int32_t* last, typename K::Key* found) {
  typename K::Block best, other;
  int64_t stride = 1;
  while (2 * stride <= n) stride *= 2;
  first[0] = 0;
  for (; stride > 0; stride /= 2) {
    for (int64_t i = stride - 1; i < n; i += 2 * stride) {
      const int32_t begin = first[i + 1 - stride], end = i + stride < n ? last[i + stride + 1] : count - 1;
      best.load(sources + begin * kLanes);
      best.add(steps[i - places[begin]]);
      if (begin == end) {
        first[i + 1] = last[i + 1] = begin;
      } else if (stride == 1) {
        for (int64_t j = begin + 1; j <= end; ++j) {
          other.load(sources + j * kLanes);
          other.add(steps[i - places[j]]);
          best.take_smaller(other);
        }
      } else {
        Lanes<typename K::Step, kLanes> place;
        place.fill(begin);
        for (int32_t j = begin + 1; j <= end; ++j) {
          other.load(sources + static_cast<int64_t>(j) * kLanes);
          other.add(steps[i - places[j]]);
          best.take_smaller(other, place, j);
        }
        typename K::Step each[kLanes];
        place.store(each);
        typename K::Step least = each[0], most = each[0];
        for (int l = 1; l < kLanes; ++l) {
          least = each[l] < least ? each[l] : least;
          most = each[l] > most ? each[l] : most;
        }
        first[i + 1] = static_cast<int32_t>(least);
        last[i + 1] = static_cast<int32_t>(most);
      }
      best.store(found + i * kLanes);
    }
  }
}

// Searches the lines of `width` voxels side by side, whose n keys each lie `stride` apart; afterwards key i of lane l of
// block t is found[(t * n + i) * kLanes + l].
template <typename K>
static void search_tile(const Scratch<K>& scratch, const typename K::Key* keys, int64_t stride, int64_t width,
                        int32_t count, const Axis& axis) {
  const int64_t n = axis.size;
  typename K::Key* const sources = scratch.sources.get();
  for (int64_t j = 0; j < count; ++j) {
    const typename K::Key* const row = keys + scratch.places.get()[j] * stride;
    for (int64_t x = 0; x < width; x += kLanes) {
      typename K::Key* const block = sources + (x / kLanes * count + j) * kLanes;
      write_block<K>(row + x, width - x, block);
    }
  }
  for (int64_t t = 0; t * kLanes < width; ++t)
    search_lines<K>(sources + t * count * kLanes, scratch.places.get(), count, n,
                    static_cast<const typename K::Step*>(axis.steps), scratch.first.get(), scratch.last.get(),
                    scratch.found.get() + t * n * kLanes);
}

template <typename K>
static void search_plane(const ZonesPlan& plan, const Scratch<K>& scratch, int64_t group, int64_t z) {
  const bl_zones& problem = *plan.problem;
  const int64_t height = problem.size[1], width = problem.size[2];
  const uint8_t* const rows = plan.rows + (group * problem.size[0] + z) * height;
  typename K::Key* const keys = static_cast<typename K::Key*>(plan.keys) +
                                ((group - plan.first_group) * problem.size[0] + z) * height * width;
  int32_t count = 0;
  for (int64_t y = 0; y < height; ++y) {
    if (!(rows[y] & kHasInstance)) continue;
    scratch.places.get()[count++] = static_cast<int32_t>(y);
    fill_row<K>(problem, group, z, y, static_cast<const typename K::Step*>(plan.axes[2].steps), keys + y * width);
  }
  if (!count || height == 1) return;
  for (int64_t x = 0; x < width; x += kTile) {
    const int64_t here = width - x < kTile ? width - x : kTile;
    search_tile<K>(scratch, keys + x, width, here, count, plan.axes[1]);
    for (int64_t y = 0; y < height; ++y)
      for (int64_t t = 0; t * kLanes < here; ++t) {
        const typename K::Key* const block = scratch.found.get() + (t * height + y) * kLanes;
        read_block<K>(block, here - t * kLanes, keys + y * width + x + t * kLanes);
      }
  }
}

template <typename K>
static int32_t search_planes(const ZonesPlan& plan, int64_t begin, int64_t end) {
  const Scratch<K> scratch(plan.axes[1].size, plan.axes[2].size);
  if (!scratch.has_memory()) return BL_NO_MEMORY;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t depth = plan.problem->size[0], group = plan.first_group + task / depth;
    if (!plan.only_id[group]) search_plane<K>(plan, scratch, group, task % depth);
  }
  return 0;
}

template <typename K>
static void search_depth(const ZonesPlan& plan, const Scratch<K>& scratch, int64_t group, int64_t y, int64_t x) {
  const bl_zones& problem = *plan.problem;
  const int64_t depth = problem.size[0], height = problem.size[1], width = problem.size[2];
  const int64_t here = width - x < kTile ? width - x : kTile, stride = height * width;
  const int32_t only = plan.only_id[group], count = plan.num_planes[group];
  if (!only) {
    memcpy(scratch.places.get(), plan.planes + group * depth, static_cast<size_t>(count) * sizeof(int32_t));
    const typename K::Key* const keys = static_cast<const typename K::Key*>(plan.keys) +
                                        (group - plan.first_group) * depth * stride + y * width + x;
    search_tile<K>(scratch, keys, stride, here, count, plan.axes[0]);
  }
  for (int64_t z = 0; z < depth; ++z) {
    int32_t* const zones = problem.zones + group * depth * stride + z * stride + y * width + x;
    if (only) {
      for (int64_t l = 0; l < here; ++l) zones[l] = only;
    } else {
      for (int64_t t = 0; t * kLanes < here; ++t) {
        const typename K::Key* const block = scratch.found.get() + (t * depth + z) * kLanes;
        read_ids<K>(block, here - t * kLanes, plan.id_bits, zones + t * kLanes);
      }
    }
    if (plan.rows[(group * depth + z) * height + y] & kHasIgnored) mark_ignored(problem, group, z, y, x, here, zones);
  }
}

template <typename K>
static int32_t search_depths(const ZonesPlan& plan, int64_t begin, int64_t end) {
  const Scratch<K> scratch(plan.axes[0].size, plan.axes[2].size);
  if (!scratch.has_memory()) return BL_NO_MEMORY;
  const int64_t height = plan.problem->size[1], tiles = (plan.problem->size[2] + kTile - 1) / kTile;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / tiles;
    search_depth<K>(plan, scratch, plan.first_group + row / height, row % height, task % tiles * kTile);
  }
  return 0;
}

extern const Passes passes = {survey,
                              {search_planes<Key32>, search_planes<Key64>, search_planes<KeyWide>},
                              {search_depths<Key32>, search_depths<Key64>, search_depths<KeyWide>}};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
