// Connected components by runs: the stretches of foreground voxels along the last axis, found in rows of bits.
//
// The rows are cut into slabs, which threads take: (1) read the target into bits and count the runs before each word;
// (2) unite the runs of neighbouring rows; (3) unite over the seams; (4) point every run to its root and count roots;
// (5) number the roots; (6) write ids, once it is known how many there are. Runs are counted in raster order and the
// smallest of a component is its root, so that the roots come in the order of their ids, wherever the seams are. What is
// done along rows is in label_rows.cpp.

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "blobloss.h"
#include "label_rows.h"
#include "segment_stats.h"
#include "threads.h"

namespace blobloss {
namespace {

constexpr int64_t kSlabsPerThread = 4;
constexpr int64_t kLeastSlab = 32768;  // voxels: below that, a seam costs more than a thread saves
constexpr int64_t kParallelRuns = 16384;
constexpr int64_t kBytes[] = {2, 2, 4, 8, 1, 1, 1, 2, 4, 8};  // of the types, in their order

// Memory that is not set to zero.
template <typename T>
std::unique_ptr<T[]> allocate(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

int32_t load(const int32_t* parents, int64_t run) { return __atomic_load_n(parents + run, __ATOMIC_RELAXED); }

class Labelling {
 public:
  explicit Labelling(const bl_labelling& arguments);
  int32_t find();
  void write(void* ids, int32_t type) const;

 private:
  struct Volume {
    const char* target;
    Wanted wanted;
    bool is_read;
    int64_t place;  // of its ids, in volumes; -1: the values are checked, and that is all
  };

  Volume volume_at(int64_t sample, int64_t channel) const;
  const Volume& volume_of(int64_t volume) const { return volumes_[static_cast<size_t>(volume)]; }
  LabelRows rows_of(int64_t volume) const;
  bl_threads threads_by_voxels() const {
    const int64_t volumes = static_cast<int64_t>(volumes_.size());
    return threads_for(arguments_.threads, volumes * rows_ * arguments_.width, kLeastSlab);
  }
  int64_t begin_of(int64_t slab) const { return std::min(slab * slab_rows_, rows_); }
  // Of the runs of a slab, among those of its volume; the last slab is followed by one more.
  int64_t first_run_of(int64_t volume, int64_t slab) const {
    const int64_t* const firsts = first_run_.data() + volume * (slabs_ + 1);
    return firsts[slab] - firsts[0];
  }
  template <typename Body>
  void for_slabs(const bl_threads& threads, const Body& body) const;

  void read(int64_t volume, int64_t slab);
  void unite_slab(int64_t volume, int64_t slab) const;
  void unite_seams(const bl_threads& threads) const;
  void flatten(int64_t volume, int64_t slab);
  void number(int64_t volume, int64_t slab) const;

  const bl_labelling arguments_;
  const int64_t rows_, words_;
  std::vector<Volume> volumes_;
  int64_t slabs_ = 1, slab_rows_ = 0;  // of a volume, of a slab
  std::unique_ptr<uint64_t[]> voxels_, ignored_;
  std::unique_ptr<uint32_t[]> runs_;
  std::unique_ptr<int32_t[]> parents_;
  std::vector<uint64_t> none_;
  std::vector<int64_t> first_run_;   // of each slab, of all volumes together
  std::vector<int64_t> first_root_;  // of each slab, of its volume
  std::atomic<int32_t> status_{0};
};

Labelling::Labelling(const bl_labelling& arguments)
    : arguments_(arguments),
      rows_(arguments.depth * arguments.height),
      words_((arguments.width + kWord - 1) / kWord) {
  for (int64_t sample = 0; sample < arguments.batch; ++sample)
    for (int64_t channel = 0; channel < arguments.channels; ++channel) volumes_.push_back(volume_at(sample, channel));
  const int64_t volumes = static_cast<int64_t>(volumes_.size()), threads = arguments.threads.count;
  if (threads > 1 && volumes) {
    slabs_ = std::min((kSlabsPerThread * threads - 1) / volumes + 1, rows_ * arguments.width / kLeastSlab);
    slabs_ = std::max(std::min(slabs_, rows_), int64_t{1});
  }
  slab_rows_ = (rows_ + slabs_ - 1) / slabs_;
}

Labelling::Volume Labelling::volume_at(int64_t sample, int64_t channel) const {
  const bl_labelling& a = arguments_;
  const int64_t dropped = a.is_softmax && a.channels == 2;  // its first channel is not returned
  const bool has_instances = channel || !(a.is_softmax || a.is_class_map), is_returned = channel >= dropped;
  const bool is_checked = !a.is_class_map || channel == a.channels - 1;  // a class map once
  Volume volume{};
  volume.target = static_cast<const char*>(a.target.data) +
                  (sample * a.target.batch_stride + (a.is_class_map ? 0 : channel) * a.target.channel_stride) *
                      kBytes[a.target.type];
  volume.wanted = {a.is_class_map ? channel : 1, a.ignore, a.is_class_map ? a.channels : 2, has_instances,
                   a.has_ignore != 0};
  volume.is_read = has_instances || is_checked || (a.has_ignore && is_returned);
  volume.place = is_returned ? sample * (a.channels - dropped) + channel - dropped : -1;
  return volume;
}

LabelRows Labelling::rows_of(int64_t volume) const {
  const int64_t words = volume * rows_ * words_;
  return {arguments_.height,
          arguments_.width,
          words_,
          voxels_.get() + words,
          ignored_ ? ignored_.get() + words : nullptr,
          runs_.get() + words,
          parents_ ? parents_.get() + first_run_[static_cast<size_t>(volume * (slabs_ + 1))] : nullptr,
          none_.data()};
}

template <typename Body>
void Labelling::for_slabs(const bl_threads& threads, const Body& body) const {
  run_parallel(threads, static_cast<int64_t>(volumes_.size()) * slabs_, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task / slabs_, task % slabs_);
  });
}

int32_t Labelling::find() {
  const int64_t volumes = static_cast<int64_t>(volumes_.size()), words = volumes * rows_ * words_;
  voxels_ = allocate<uint64_t>(words);
  runs_ = allocate<uint32_t>(words);
  if (arguments_.has_ignore) ignored_ = allocate<uint64_t>(words);
  none_.assign(static_cast<size_t>(words_), 0);
  first_run_.assign(static_cast<size_t>(volumes * (slabs_ + 1)), 0);
  first_root_.assign(static_cast<size_t>(volumes * slabs_), 0);

  const bl_threads by_voxels = threads_by_voxels();
  for_slabs(by_voxels, [&](int64_t volume, int64_t slab) { read(volume, slab); });
  int64_t runs = 0;
  for (int64_t volume = 0; volume < volumes; ++volume) {
    const int64_t before = runs;
    for (int64_t slab = 0; slab <= slabs_; ++slab) {
      int64_t& first = first_run_[static_cast<size_t>(volume * (slabs_ + 1) + slab)];
      const int64_t count = first;
      first = runs;
      runs += count;
    }
    if (runs - before > std::numeric_limits<int32_t>::max()) status_ |= BL_TOO_MANY_RUNS;
  }
  if (status_) return status_;

  parents_ = allocate<int32_t>(runs);
  const bl_threads by_runs = threads_for(arguments_.threads, runs, kParallelRuns);
  if (runs) {
    for_slabs(by_voxels, [&](int64_t volume, int64_t slab) { unite_slab(volume, slab); });
    unite_seams(by_runs);
    for_slabs(by_runs, [&](int64_t volume, int64_t slab) { flatten(volume, slab); });
  }
  for (int64_t volume = 0; volume < volumes; ++volume) {
    int64_t roots = 0;
    for (int64_t slab = 0; slab < slabs_; ++slab) {
      int64_t& first = first_root_[static_cast<size_t>(volume * slabs_ + slab)];
      const int64_t count = first;
      first = roots;
      roots += count;
    }
    if (volume_of(volume).place >= 0) arguments_.counts[volume_of(volume).place] = roots;
  }
  for_slabs(by_runs, [&](int64_t volume, int64_t slab) { number(volume, slab); });
  return 0;
}

void Labelling::read(int64_t volume, int64_t slab) {
  const Volume& of = volume_of(volume);
  const int64_t begin = begin_of(slab), end = begin_of(slab + 1);
  if (!of.is_read || begin == end) return;
  const char* const first = of.target + begin * arguments_.width * kBytes[arguments_.target.type];
  int64_t& num_runs = first_run_[static_cast<size_t>(volume * (slabs_ + 1) + slab)];
  if (!kernels().rows->read(rows_of(volume), first, arguments_.target.type, of.wanted, begin, end, &num_runs))
    status_ |= arguments_.is_class_map ? BL_NOT_A_CLASS : BL_NOT_BINARY;
}

void Labelling::unite_slab(int64_t volume, int64_t slab) const {
  const int64_t first = first_run_of(volume, slab), last = first_run_of(volume, slab + 1);
  const int64_t begin = begin_of(slab), end = begin_of(slab + 1);
  if (first == last) return;
  kernels().rows->number_runs(rows_of(volume), begin, end, first, last);
  kernels().rows->unite(rows_of(volume), arguments_.differing_axes, begin, end, begin, end);
}

// A tree of seams: the two groups of slabs that a seam parts have no run in common with those of another.
void Labelling::unite_seams(const bl_threads& threads) const {
  const int64_t volumes = static_cast<int64_t>(volumes_.size());
  for (int64_t step = 1; step < slabs_; step *= 2) {
    const int64_t seams = (slabs_ - step - 1) / (2 * step) + 1;
    run_parallel(threads, volumes * seams, [&](int64_t task, int64_t last_task) {
      for (; task < last_task; ++task) {
        const int64_t volume = task / seams, left = task % seams * 2 * step;
        if (!volume_of(volume).wanted.has_value) continue;
        const int64_t seam = begin_of(left + step);
        const int64_t end = std::min(seam + arguments_.height + 1, begin_of(left + 2 * step));
        kernels().rows->unite(rows_of(volume), arguments_.differing_axes, seam, end, begin_of(left), seam);
      }
    });
  }
}

// Points every run to its root. Threads read the parents of other slabs while these change, always to an ancestor: it
// does not matter which they see.
void Labelling::flatten(int64_t volume, int64_t slab) {
  int32_t* const parents = rows_of(volume).parents;
  int64_t roots = 0;
  for (int64_t run = first_run_of(volume, slab); run < first_run_of(volume, slab + 1); ++run) {
    const int32_t parent = load(parents, run);
    roots += parent == run;
    int32_t root = parent;
    for (int32_t next; (next = load(parents, root)) != root;) root = next;
    if (root != parent) __atomic_store_n(parents + run, root, __ATOMIC_RELAXED);
  }
  first_root_[static_cast<size_t>(volume * slabs_ + slab)] = roots;
}

// Turns the parent of a root into ~id, which is below 0.
void Labelling::number(int64_t volume, int64_t slab) const {
  int32_t* const parents = rows_of(volume).parents;
  int32_t id = static_cast<int32_t>(first_root_[static_cast<size_t>(volume * slabs_ + slab)]);
  for (int64_t run = first_run_of(volume, slab); run < first_run_of(volume, slab + 1); ++run)
    if (parents[run] == run) parents[run] = ~++id;
}

void Labelling::write(void* ids, int32_t type) const {
  for_slabs(threads_by_voxels(), [&](int64_t volume, int64_t slab) {
    const Volume& of = volume_of(volume);
    if (of.place < 0) return;
    const LabelRows rows = rows_of(volume);
    const bool has_runs = of.wanted.has_value && rows.parents;
    const int32_t* const parent = has_runs ? rows.parents + first_run_of(volume, slab) : nullptr;
    char* const first = static_cast<char*>(ids) + of.place * rows_ * arguments_.width * kBytes[type];
    kernels().rows->write(rows, begin_of(slab), begin_of(slab + 1), parent, type, first);
  });
}

}  // namespace
}  // namespace blobloss

extern "C" {

int32_t blobloss_find_components(const bl_labelling* arguments, void** found) {
  using namespace blobloss;
  *found = nullptr;
  try {
    auto labelling = std::make_unique<Labelling>(*arguments);
    const int32_t status = labelling->find();
    if (!status) *found = labelling.release();
    return status;
  } catch (const std::bad_alloc&) {
    return BL_NO_MEMORY;
  }
}

void blobloss_write_components(void* found, void* ids, int32_t type) {
  using namespace blobloss;
  const std::unique_ptr<const Labelling> labelling(static_cast<const Labelling*>(found));
  if (ids) labelling->write(ids, type);
}

}  // extern "C"
