// Drives blobloss_find_components and blobloss_write_components (csrc/blobloss.h) over all types and options, odd sizes,
// every instruction set of this machine and any number of threads: for the sanitizers (sanitize.sh) and for emulated
// machines (cross_aarch64.sh). Every volume is compared with a flood fill, and bit for bit over numbers of threads.
//
//     native_labels_stress [ROUNDS]
//
// Prints what is wrong and one line at the end; the status is 0 if nothing is wrong.

#include <stdio.h>
#include <stdlib.h>

#include <atomic>

#include "native_cases.h"
#include "native_pools.h"

namespace {

std::atomic<int> failures{0};

struct Labels {
  int32_t status;
  std::vector<int32_t> ids;
  std::vector<int64_t> counts;

  bool operator==(const Labels& other) const {
    return status == other.status && (status || (ids == other.ids && counts == other.counts));
  }
};

struct LabelCase {
  bl_labelling problem{};
  Volume target;
  int32_t expected = 0;

  int64_t voxels() const { return problem.depth * problem.height * problem.width; }
  int64_t returned() const { return problem.is_softmax && problem.channels == 2 ? 1 : problem.channels; }
};

Labels compute(const LabelCase& c, const bl_threads& threads, int fill) {
  const size_t pairs = static_cast<size_t>(c.problem.batch * c.returned());
  const size_t voxels = static_cast<size_t>(c.voxels());
  Labels found{0, std::vector<int32_t>(pairs * voxels, fill), std::vector<int64_t>(pairs, fill)};
  bl_labelling p = c.problem;
  p.threads = threads;
  p.counts = found.counts.data();
  void* labelling = nullptr;
  found.status = blobloss_find_components(&p, &labelling);
  if (found.status) {
    if (labelling) ++failures;
  } else if (fill % 2) {
    blobloss_write_components(labelling, found.ids.data(), BL_I32);
  } else {
    std::vector<int16_t> narrow(found.ids.size(), static_cast<int16_t>(fill));
    bool fits = true;
    for (const int64_t count : found.counts) fits = fits && count <= INT16_MAX;
    if (fits) {
      blobloss_write_components(labelling, narrow.data(), BL_I16);
      found.ids.assign(narrow.begin(), narrow.end());
    } else {
      blobloss_write_components(labelling, found.ids.data(), BL_I32);
    }
  }
  return found;
}

// What was found is freed without any ids.
void find_alone(const LabelCase& c) {
  std::vector<int64_t> counts(static_cast<size_t>(c.problem.batch * c.returned()));
  bl_labelling p = c.problem;
  p.threads = {2, nullptr};
  p.counts = counts.data();
  void* labelling = nullptr;
  if (!blobloss_find_components(&p, &labelling)) blobloss_write_components(labelling, nullptr, BL_I32);
}

// Fills one component after another, from its first voxel in raster order.
void flood(const LabelCase& c, const std::vector<char>& mask, int32_t* ids, int64_t* count) {
  const bl_labelling& p = c.problem;
  std::vector<int64_t> left;
  *count = 0;
  for (int64_t first = 0; first < c.voxels(); ++first) {
    if (!mask[first] || ids[first]) continue;
    ids[first] = static_cast<int32_t>(++*count);
    left.push_back(first);
    while (!left.empty()) {
      const int64_t at = left.back(), z = at / (p.height * p.width), y = at / p.width % p.height, x = at % p.width;
      left.pop_back();
      for (int64_t place = 0; place < 27; ++place) {
        const int64_t dz = place / 9 - 1, dy = place / 3 % 3 - 1, dx = place % 3 - 1;
        if (dz * dz + dy * dy + dx * dx > p.differing_axes) continue;
        if (z + dz < 0 || z + dz >= p.depth || y + dy < 0 || y + dy >= p.height || x + dx < 0 || x + dx >= p.width)
          continue;
        const int64_t next = at + (dz * p.height + dy) * p.width + dx;
        if (!mask[next] || ids[next]) continue;
        ids[next] = static_cast<int32_t>(*count);
        left.push_back(next);
      }
    }
  }
}

Labels truth_of(const LabelCase& c) {
  const bl_labelling& p = c.problem;
  const int64_t voxels = c.voxels(), returned = c.returned();
  Labels truth{0, std::vector<int32_t>(static_cast<size_t>(p.batch * returned * voxels)),
               std::vector<int64_t>(static_cast<size_t>(p.batch * returned))};
  std::vector<char> mask(static_cast<size_t>(voxels));
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t channel = p.channels - returned; channel < p.channels; ++channel) {
      const bool has_instances = channel || !p.is_softmax;
      const int64_t pair = b * returned + channel - (p.channels - returned);
      int32_t* const ids = truth.ids.data() + pair * voxels;
      const auto value = [&](int64_t v) { return c.target.get(b, p.is_class_map ? 0 : channel, v); };
      const auto is_ignored = [&](int64_t v) { return p.has_ignore && value(v) == static_cast<double>(p.ignore); };
      const double wanted = p.is_class_map ? static_cast<double>(channel) : 1;
      for (int64_t v = 0; v < voxels; ++v) mask[v] = has_instances && value(v) == wanted && !is_ignored(v);
      flood(c, mask, ids, &truth.counts[static_cast<size_t>(pair)]);
      for (int64_t v = 0; v < voxels; ++v) ids[v] = is_ignored(v) ? -1 : ids[v];
    }
  return truth;
}

void make_label_case(Random& random, LabelCase& c, int type) {
  static const int64_t kSides[] = {1, 2, 3, 5, 9, 16, 31, 33, 64}, kIgnored[] = {0, 1, 2, 100, -1, 1000};
  static const int64_t kWidths[] = {1, 2, 31, 33, 63, 64, 65, 127, 128, 129, 200};
  bl_labelling& p = c.problem;
  p.depth = kSides[pick(random, 9)];
  p.height = kSides[pick(random, 9)];
  p.width = kWidths[pick(random, 11)];
  while (c.voxels() > 100000) (p.depth > p.height ? p.depth : p.height) /= 2;
  p.batch = 1 + pick(random, 2);
  p.is_softmax = static_cast<int32_t>(pick(random, 2));
  p.channels = 1 + p.is_softmax + pick(random, 2);
  p.is_class_map = p.is_softmax && pick(random, 2);
  p.differing_axes = static_cast<int32_t>(1 + pick(random, 3));
  p.has_ignore = static_cast<int32_t>(pick(random, 2));
  p.ignore = kIgnored[pick(random, 6)];

  const double densities[] = {0.02, 0.1, 0.3, 0.6, 0.9}, density = densities[pick(random, 5)];
  const int64_t channels = p.is_class_map ? 1 : p.channels;
  const int64_t steps = 1 + pick(random, 6);  // voxels that are alike
  const bool holds_ignored = type == BL_BOOL   ? p.ignore == 0 || p.ignore == 1
                             : p.ignore == -1 ? type != BL_U8
                                              : static_cast<double>(p.ignore) <= kLargest[type];
  c.target.resize(random, type, p.batch, channels, c.voxels());
  double last = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t v = 0; v < c.voxels(); ++v) {
        if (!pick(random, steps))
          last = static_cast<double>(random() % 1000) < 1000 * density
                     ? static_cast<double>(p.is_class_map && type != BL_BOOL ? 1 + pick(random, p.channels - 1) : 1)
                     : 0;
        const bool is_ignored = p.has_ignore && holds_ignored && !pick(random, 20);
        c.target.set(b, channel, v, is_ignored ? static_cast<double>(p.ignore) : last);
      }
  if (type != BL_BOOL && !pick(random, 6)) {  // one voxel is wrong
    c.target.set(pick(random, p.batch), pick(random, channels), pick(random, c.voxels()), 77);
    c.expected = p.is_class_map ? BL_NOT_A_CLASS : BL_NOT_BINARY;
  }
  p.target = c.target.view;
}

const bl_threads kConfigurations[] = {{2, nullptr}, {3, nullptr}, {16, nullptr}, {3, fake_pool}, {16, fake_pool}};

void check(unsigned seed, int type) {
  Random random(seed);
  LabelCase c;
  make_label_case(random, c, type);
  const auto report = [&](const char* wrong) {
    const bl_labelling& p = c.problem;
    ++failures;
    printf("WRONG %s: seed %u, type %d, [%d, %d, %d, %d, %d], axes %d\n", wrong, seed, type, static_cast<int>(p.batch),
           static_cast<int>(p.channels), static_cast<int>(p.depth), static_cast<int>(p.height),
           static_cast<int>(p.width), p.differing_axes);
  };
  for (const char* isa : kSets) {
    if (!blobloss_use_isa(isa)) continue;
    const Labels first = compute(c, {1, nullptr}, 0x5b);
    if (first.status != c.expected) return report("status");
    if (!c.expected && !(first == truth_of(c))) report("labels");
    for (const bl_threads& threads : kConfigurations)
      if (!(compute(c, threads, static_cast<int>(threads.count)) == first)) report("with threads");
  }
  find_alone(c);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 40;
  unsigned seed = 0;
  for (int round = 0; round < rounds; ++round)
    for (int type = BL_F32; type <= BL_I64; ++type) check(seed++, type);
  printf("%u cases of labels on", seed);
  for (const char* isa : kSets)
    if (blobloss_use_isa(isa)) printf(" %s", isa);
  printf(": %d wrong\n", failures.load());
  return failures.load() != 0;
}
