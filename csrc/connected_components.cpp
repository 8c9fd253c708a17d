// Connected components by runs: the stretches of foreground voxels along the last axis, found in rows of bits.
//
// The rows are cut into slabs, which threads take: (1) read the target into bits and count the runs before each word;
// (2) unite the runs of neighbouring rows; (3) unite over the seams; (4) point every run to its root and count roots;
// (5) number the roots; (6) write ids. Runs are counted in raster order and the smallest of a component is its root, so
// that the roots come in the order of their ids, wherever the seams are.

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "blobloss.h"
#include "mask_bits.h"
#include "runs.h"
#include "threads.h"

namespace blobloss {
namespace {

constexpr int64_t kSlabsPerThread = 4;
constexpr int64_t kLeastSlab = 32768;  // voxels: below that, a seam costs more than a thread saves
constexpr int64_t kParallelRuns = 16384;
constexpr int64_t kChunkBytes = 32768;  // of ids that are set to zero at once, which the nearest cache holds
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
  int32_t run();

 private:
  struct Volume {
    const char* target;
    Wanted wanted;
    bool is_read;
    int32_t* ids;  // null: the values are checked, and that is all
    int64_t* count;
  };

  Volume volume_at(int64_t sample, int64_t channel) const;
  int64_t begin_of(int64_t slab) const { return std::min(slab * slab_rows_, rows_); }
  uint64_t* voxels_of(int64_t volume) const { return voxels_.get() + volume * rows_ * words_; }
  uint64_t* ignored_of(int64_t volume) const { return ignored_ ? ignored_.get() + volume * rows_ * words_ : nullptr; }
  uint32_t* runs_of(int64_t volume) const { return runs_.get() + volume * rows_ * words_; }
  int32_t* parents_of(int64_t volume) const { return parents_.get() + first_run_[volume * (slabs_ + 1)]; }
  bl_threads threads_for(int64_t work, int64_t least) const;
  template <typename Body>
  void for_slabs(const bl_threads& threads, const Body& body) const;

  void read(int64_t volume, int64_t slab);
  void unite_slab(int64_t volume, int64_t slab) const;
  void unite_seams(const bl_threads& threads) const;
  void unite_rows(int64_t volume, int64_t begin, int64_t end, int64_t from, int64_t until) const;
  template <int kAxes>
  void unite_row(const Bits& bits, int64_t row, int64_t from, int64_t until) const;
  void flatten(int64_t volume, int64_t slab);
  void number(int64_t volume, int64_t slab) const;
  void write(int64_t volume, int64_t slab) const;

  const bl_labelling& arguments_;
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
  const int64_t place = sample * (a.channels - dropped) + channel - dropped;
  const bool has_instances = channel || !(a.is_softmax || a.is_class_map), is_returned = channel >= dropped;
  const bool is_checked = !a.is_class_map || channel == a.channels - 1;  // a class map once
  Volume volume{};
  volume.target = static_cast<const char*>(a.target.data) +
                  (sample * a.target.batch_stride + (a.is_class_map ? 0 : channel) * a.target.channel_stride) *
                      kBytes[a.target.type];
  volume.wanted = {a.is_class_map ? channel : 1, a.ignore, a.is_class_map ? a.channels : 2, has_instances,
                   a.has_ignore != 0};
  volume.is_read = has_instances || is_checked || (a.has_ignore && is_returned);
  volume.ids = is_returned ? a.ids + place * rows_ * a.width : nullptr;
  volume.count = is_returned ? a.counts + place : nullptr;
  return volume;
}

bl_threads Labelling::threads_for(int64_t work, int64_t least) const {
  return {work < least ? 1 : arguments_.threads.count, arguments_.threads.parallel_for};
}

template <typename Body>
void Labelling::for_slabs(const bl_threads& threads, const Body& body) const {
  run_parallel(threads, static_cast<int64_t>(volumes_.size()) * slabs_, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task / slabs_, task % slabs_);
  });
}

int32_t Labelling::run() {
  const int64_t volumes = static_cast<int64_t>(volumes_.size()), words = volumes * rows_ * words_;
  voxels_ = allocate<uint64_t>(words);
  runs_ = allocate<uint32_t>(words);
  if (arguments_.has_ignore) ignored_ = allocate<uint64_t>(words);
  none_.assign(static_cast<size_t>(words_), 0);
  first_run_.assign(static_cast<size_t>(volumes * (slabs_ + 1)), 0);
  first_root_.assign(static_cast<size_t>(volumes * slabs_), 0);

  const bl_threads by_voxels = threads_for(volumes * rows_ * arguments_.width, kLeastSlab);
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
  const bl_threads by_runs = threads_for(runs, kParallelRuns);
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
    if (volumes_[static_cast<size_t>(volume)].count) *volumes_[static_cast<size_t>(volume)].count = roots;
  }
  for_slabs(by_runs, [&](int64_t volume, int64_t slab) { number(volume, slab); });
  for_slabs(by_voxels, [&](int64_t volume, int64_t slab) { write(volume, slab); });
  return 0;
}

void Labelling::read(int64_t volume, int64_t slab) {
  const Volume& of = volumes_[static_cast<size_t>(volume)];
  const int64_t begin = begin_of(slab), rows = begin_of(slab + 1) - begin, width = arguments_.width;
  uint64_t* const voxels = voxels_of(volume) + begin * words_;
  if (!of.is_read || !rows) return;
  uint64_t* const ignored = ignored_ ? ignored_of(volume) + begin * words_ : nullptr;
  const char* const from = of.target + begin * width * kBytes[arguments_.target.type];
  if (!reader_of(arguments_.target.type)(from, rows, width, of.wanted, voxels, ignored))
    status_ |= arguments_.is_class_map ? BL_NOT_A_CLASS : BL_NOT_BINARY;
  if (!of.wanted.has_value) return;
  uint32_t* const runs = runs_of(volume) + begin * words_;
  int64_t count = 0;
  for_rows(voxels, words_, 0, rows, [&](int64_t row) {
    uint64_t before = 0;
    for (int64_t word = row * words_; word < (row + 1) * words_; ++word) {
      const uint64_t here = voxels[word];
      runs[word] = static_cast<uint32_t>(count);
      count += popcount(here & ~(here << 1 | before >> 63));
      before = here;
    }
  });
  first_run_[static_cast<size_t>(volume * (slabs_ + 1) + slab)] = count;
}

void Labelling::unite_slab(int64_t volume, int64_t slab) const {
  if (!volumes_[static_cast<size_t>(volume)].wanted.has_value) return;
  const int64_t* const firsts = first_run_.data() + volume * (slabs_ + 1);
  const int64_t first = firsts[slab] - firsts[0], last = firsts[slab + 1] - firsts[0];
  const int64_t begin = begin_of(slab), end = begin_of(slab + 1);
  uint32_t* const runs = runs_of(volume);
  if (first)
    for_rows(voxels_of(volume), words_, begin, end, [&](int64_t row) {
      for (int64_t word = row * words_; word < (row + 1) * words_; ++word) runs[word] += static_cast<uint32_t>(first);
    });
  int32_t* const parents = parents_of(volume);
  for (int64_t run = first; run < last; ++run) parents[run] = static_cast<int32_t>(run);
  if (first < last) unite_rows(volume, begin, end, begin, end);
}

// A tree of seams: the two groups of slabs that a seam parts have no run in common with those of another.
void Labelling::unite_seams(const bl_threads& threads) const {
  const int64_t volumes = static_cast<int64_t>(volumes_.size());
  for (int64_t step = 1; step < slabs_; step *= 2) {
    const int64_t seams = (slabs_ - step - 1) / (2 * step) + 1;
    run_parallel(threads, volumes * seams, [&](int64_t task, int64_t last_task) {
      for (; task < last_task; ++task) {
        const int64_t volume = task / seams, left = task % seams * 2 * step;
        if (!volumes_[static_cast<size_t>(volume)].wanted.has_value) continue;
        const int64_t seam = begin_of(left + step);
        const int64_t end = std::min(seam + arguments_.height + 1, begin_of(left + 2 * step));
        unite_rows(volume, seam, end, begin_of(left), seam);
      }
    });
  }
}

// Unites the runs of the rows [begin, end) with those of their earlier neighbours that lie in the rows [from, until).
void Labelling::unite_rows(int64_t volume, int64_t begin, int64_t end, int64_t from, int64_t until) const {
  const Bits bits{voxels_of(volume), runs_of(volume), none_.data(), parents_of(volume), words_};
  for_rows(bits.voxels, words_, begin, end, [&](int64_t row) {
    if (arguments_.differing_axes == 1)
      unite_row<1>(bits, row, from, until);
    else if (arguments_.differing_axes == 2)
      unite_row<2>(bits, row, from, until);
    else
      unite_row<3>(bits, row, from, until);
  });
}

// Above and behind: one place earlier along the last axis but one, and but two.
//
// Unions that others imply are left out. Above: where both voxels have one behind them, since these two are united in
// their own plane. Behind and above or below: where a voxel of the rows between is a neighbour of both. With the row
// behind every union is made, so that no two are left out because of each other.
template <int kAxes>
void Labelling::unite_row(const Bits& bits, int64_t row, int64_t from, int64_t until) const {
  const int64_t height = arguments_.height, y = row % height, words = bits.words;
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

// Points every run to its root. Threads read the parents of other slabs while these change, always to an ancestor: it
// does not matter which they see.
void Labelling::flatten(int64_t volume, int64_t slab) {
  const int64_t* const firsts = first_run_.data() + volume * (slabs_ + 1);
  int32_t* const parents = parents_of(volume);
  int64_t roots = 0;
  for (int64_t run = firsts[slab] - firsts[0]; run < firsts[slab + 1] - firsts[0]; ++run) {
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
  const int64_t* const firsts = first_run_.data() + volume * (slabs_ + 1);
  int32_t* const parents = parents_of(volume);
  int32_t id = static_cast<int32_t>(first_root_[static_cast<size_t>(volume * slabs_ + slab)]);
  for (int64_t run = firsts[slab] - firsts[0]; run < firsts[slab + 1] - firsts[0]; ++run)
    if (parents[run] == run) parents[run] = ~++id;
}

// Writes the ids of the runs of a row, whose parents begin at `own`; returns where those of the next begin.
const int32_t* write_row(const uint64_t* row, int64_t words, const int32_t* parents, const int32_t* own, int32_t* ids,
                         const int32_t* room) {
  for_runs(row, words, [&](int64_t from, int64_t until) {
    const int32_t parent = *own++;
    fill(ids + from, ids + until, room, ~(parent < 0 ? parent : parents[parent]));
  });
  return own;
}

void Labelling::write(int64_t volume, int64_t slab) const {
  const Volume& of = volumes_[static_cast<size_t>(volume)];
  if (!of.ids) return;
  const int64_t width = arguments_.width, end = begin_of(slab + 1);
  const int64_t chunk = std::max<int64_t>(kChunkBytes / (width * int64_t{sizeof(int32_t)}), 1);
  const int64_t* const firsts = first_run_.data() + volume * (slabs_ + 1);
  const int32_t* const parents = parents_of(volume);
  const int32_t* parent = parents + (firsts[slab] - firsts[0]);
  for (int64_t begin = begin_of(slab); begin < end; begin += chunk) {
    const int64_t chunk_end = std::min(begin + chunk, end);
    memset(of.ids + begin * width, 0, static_cast<size_t>((chunk_end - begin) * width) * sizeof(int32_t));
    const int32_t* const room = of.ids + chunk_end * width;
    if (of.wanted.has_value)
      for_rows(voxels_of(volume), words_, begin, chunk_end, [&](int64_t row) {
        parent = write_row(voxels_of(volume) + row * words_, words_, parents, parent, of.ids + row * width, room);
      });
    if (ignored_)
      for_rows(ignored_of(volume), words_, begin, chunk_end, [&](int64_t row) {
        int32_t* const ids = of.ids + row * width;
        for_runs(ignored_of(volume) + row * words_, words_,
                 [&](int64_t from, int64_t until) { std::fill(ids + from, ids + until, -1); });
      });
  }
}

}  // namespace
}  // namespace blobloss

extern "C" int32_t blobloss_connected_components(const bl_labelling* arguments) {
  using namespace blobloss;
  try {
    return Labelling(*arguments).run();
  } catch (const std::bad_alloc&) {
    return BL_NO_MEMORY;
  }
}
