// From the table of sums to the loss and to the gradient of the table: kernels/finish.py in one call, in double.
//
// The instances of a (sample, class) pair are taken in blocks, which every pass reads out of the table and evaluates
// side by side. First come the totals of every pair and its main term, then the blobs; where masking leaves the others
// in, their slopes add up only after that, and one more pass evaluates the blobs again. All sums are sums of blocks in
// the order of the blocks, so that they do not depend on threads. Where the ids are those of zones, a domain is the two
// bits of a zone, and there is no background.
//
// Beyond the table this takes 208 bytes for every 2,048 instances of a pair, and where the others stay in, a quarter of
// a byte per instance and feature.

#include <math.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "blobloss.h"
#include "finish_rows.h"
#include "finish_table.h"
#include "threads.h"

namespace blobloss {
namespace {

using rows::Block;
using rows::BlockSums;
using rows::kBlock;
using rows::kOthers;
using rows::kPositive;
using rows::kStats;
using rows::Run;

constexpr int64_t kSpan = 2048;  // instances of a task
constexpr int64_t kParallelInstances = 8192;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The stats of the instances alone, by bit; without a target they are all of bit 1.
struct SpanSums {
  int64_t instances = 0;  // that exist
  double weight = 0;      // of these
  int64_t voxels[2] = {};
  double sums[2][kStats] = {};  // of the features that the main term reads
  double value = 0;
  double slopes[kStats] = {};  // of the background
};

struct Pair {
  int64_t instances = 0;
  double weight = 0;
  int64_t voxels = 0;  // of instances
  double background[kStats] = {};
  double main_stats[2][kStats] = {};  // by bit
  double main = 0, main_slopes[2][kStats] = {};  // by bit
  double blob_grad = 0;                          // of the value of an instance with weight 1
  bool is_empty = false;                         // has no instance, but rows for that
  double empty = 0, empty_slopes[2][kStats] = {};
};

template <typename T>
class Finish {
 public:
  explicit Finish(const bl_finish& a)
      : a_(a),
        sums_(static_cast<const T*>(a.sums)),
        weights_(static_cast<const T*>(a.weights)),
        grad_(static_cast<const T*>(a.grad)),
        value_(static_cast<T*>(a.value)),
        grad_sums_(static_cast<T*>(a.grad_sums)),
        zones_(a.masking == BL_ZONES),
        table_(a.counts, sums_, a.num_cells, a.num_features, a.has_target != 0),
        num_stats_(1 + a.num_features),
        num_pairs_(a.batch * a.channels),
        num_instances_(table_.num_instances()),
        num_blocks_(divide_up(num_instances_, kBlock)),
        num_spans_(divide_up(num_instances_, kSpan)),
        pairs_(static_cast<size_t>(num_pairs_)),
        spans_(static_cast<size_t>(num_pairs_ * num_spans_)) {
    int stat_of[kStats];
    std::fill_n(stat_of + 1, kStats - 1, -1);
    stat_of[0] = 0;
    for (int j = 0; j < a.num_features; ++j) stat_of[1 + a.features[j]] = 1 + j;
    const rows::Masking masking = rows::masking_of(a);
    main_rows_ = rows::read_rows(a.main_rows, a.num_main_rows, nullptr, 0, stat_of, {{}, false});
    blob_rows_ = rows::read_rows(a.blob_rows, a.num_blob_rows, a.empty_rows, zones_ ? a.num_empty_rows : 0, stat_of,
                                 masking);
    if (!zones_) empty_rows_ = rows::read_rows(a.empty_rows, a.num_empty_rows, nullptr, 0, stat_of, {{}, false});
    main_reads_ = rows::stats_read(main_rows_, kPositive) | rows::stats_read(main_rows_, kOthers);
    blob_reads_ = rows::stats_read(blob_rows_, kPositive);
    negative_reads_ = rows::stats_read(blob_rows_, kOthers);
    counts_others_ = masking.per_voxel[0] != 0;
    others_read_ = masking.stays_in && !zones_ ? negative_reads_ : 0;
    if (others_read_) others_.resize(num_pairs_, a.num_features, num_blocks_);
    if (others_read_ && grad_sums_) others_slopes_.resize(num_pairs_, a.num_features, num_blocks_);
  }

  void run() {
    for_each_span([this](int64_t task) { add_up_instances(task); });
    others_.add_up();
    add_up_pairs();
    for_each_span([this](int64_t task) { evaluate_blobs(task); });
    if (others_read_ && grad_sums_) {
      others_slopes_.add_up();
      for_each_span([this](int64_t task) { store_slopes_with_others(task); });
    }
    if (value_ && a_.reduction != BL_INSTANCES) store_value();
    if (grad_sums_) store_background();
  }

 private:
  static bool reads(uint32_t stats, int stat) { return stats >> stat & 1; }

  template <typename Body>
  void for_each_span(const Body& body) {
    const auto tasks = [&body](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task);
    };
    const bl_threads threads = threads_for(a_.threads, num_pairs_ * num_instances_, kParallelInstances);
    run_parallel(threads, num_pairs_ * num_spans_, tasks);
  }

  // Calls body for every block of a span.
  template <typename Body>
  void for_each_block(int64_t task, const Body& body) {
    const int64_t begin = task % num_spans_ * kSpan, end = std::min(begin + kSpan, num_instances_);
    for (int64_t first = begin; first < end; first += kBlock)
      body(Run{task / num_spans_, first, static_cast<int>(std::min<int64_t>(kBlock, end - first))});
  }

  void add_up_instances(int64_t task) {
    SpanSums& span = spans_[task];
    for_each_block(task, [&](const Run& run) {
      const int64_t instances = table_.count(run, span.voxels);
      span.instances += instances;
      double column[kBlock];
      span.weight += weights_ ? add_up_weights(run, column) : static_cast<double>(instances);
      for (int stat = 1; stat < num_stats_; ++stat) {
        for (int bit = 2 - table_.bits(); bit < 2 && reads(main_reads_, stat); ++bit) {
          table_.load_bit(run, stat, bit, column);
          span.sums[bit][stat] += rows::total(column, run.padded());
        }
        if (!reads(others_read_, stat)) continue;
        table_.load(run, stat, column);
        others_.set(run.pair, stat, run.first / kBlock, rows::total(column, run.padded()));
      }
    });
  }

  double add_up_weights(const Run& run, double* weights) const {
    table_.load_counts(run, weights);
    const T* from = weights_of(run);
    for (int i = 0; i < run.size; ++i) weights[i] = weights[i] > 0 ? static_cast<double>(from[i]) : 0;
    return rows::total(weights, run.padded());
  }

  const T* weights_of(const Run& run) const { return weights_ + run.pair * num_instances_ + run.first; }

  // The totals and the main term of every pair, and what its blobs weigh.
  void add_up_pairs() {
    const bool averaged = a_.reduction != BL_NO_REDUCTION && a_.reduction != BL_SUM;
    const int64_t main_terms = a_.batch * (a_.channels - (a_.channel0 == BL_UNUSED));
    main_scale_ = averaged ? a_.main_weight / static_cast<double>(main_terms) : a_.main_weight;
    int64_t with_blobs = 0;
    for (int64_t i = 0; i < num_pairs_; ++i) {
      add_up_pair(i);
      evaluate_main(i);
      with_blobs += pairs_[i].weight > 0 || pairs_[i].is_empty;
    }
    blob_scale_ = averaged ? a_.blob_weight / static_cast<double>(std::max<int64_t>(with_blobs, 1)) : a_.blob_weight;
    for (int64_t i = 0; i < num_pairs_; ++i) {
      pairs_[i].blob_grad = a_.reduction == BL_INSTANCES ? 1 : blob_scale_ * upstream(i, 1) / weight_of(pairs_[i]);
      if (pairs_[i].is_empty && a_.reduction != BL_INSTANCES) evaluate_empty(i);
    }
  }

  void add_up_pair(int64_t i) {
    Pair& pair = pairs_[i];
    int64_t voxels[2] = {};
    for (int bit = 0; bit < table_.bits(); ++bit) {
      voxels[bit] = table_.count_of_background(i, bit);
      for (int stat = 1; stat < num_stats_; ++stat) {
        pair.main_stats[bit][stat] = sums_[table_.index_of_background(i, bit, stat)];
        pair.background[stat] += pair.main_stats[bit][stat];
      }
    }
    pair.background[0] = static_cast<double>(voxels[0] + voxels[1]);
    for (int64_t task = i * num_spans_; task < (i + 1) * num_spans_; ++task) {
      const SpanSums& span = spans_[task];
      pair.instances += span.instances;
      pair.weight += span.weight;
      pair.voxels += span.voxels[0] + span.voxels[1];
      for (int bit = 0; bit < 2; ++bit) {
        voxels[bit] += span.voxels[bit];
        for (int stat = 1; stat < num_stats_; ++stat) pair.main_stats[bit][stat] += span.sums[bit][stat];
      }
    }
    for (int bit = 0; bit < 2; ++bit) pair.main_stats[bit][0] = static_cast<double>(voxels[bit]);
    const bool may_have = a_.channel0 == BL_CLASS || i % a_.channels != 0;
    pair.is_empty = !empty_rows_.empty() && may_have && pair.instances == 0 && pair.background[0] > 0;
  }

  // The main term is a single domain: the voxels with bit 1 against those with bit 0.
  void evaluate_main(int64_t i) {
    Pair& pair = pairs_[i];
    const double* const sides[2] = {pair.main_stats[0], pair.main_stats[1]};
    pair.main = rows::evaluate_one(main_rows_, num_stats_, sides, main_scale_ * upstream(i, 0), pair.main_slopes);
  }

  // So is what stands for the instances of a pair without any: the background.
  void evaluate_empty(int64_t i) {
    const double nothing[kStats] = {};
    Pair& pair = pairs_[i];
    const double* const sides[2] = {pair.background, nothing};
    pair.empty = rows::evaluate_one(empty_rows_, num_stats_, sides, pair.blob_grad, pair.empty_slopes);
  }

  // The incoming gradient of the main (0) or the blob term (1) of a pair, before it is scaled.
  double upstream(int64_t pair, int term) const {
    if (a_.reduction == BL_INSTANCES) return 0;
    if (!grad_) return 1;
    return grad_[a_.reduction == BL_TERMS ? term : a_.reduction == BL_NO_REDUCTION ? pair : 0];
  }

  static double weight_of(const Pair& pair) { return pair.weight > 0 ? pair.weight : 1; }

  void evaluate_blobs(int64_t task) {
    SpanSums& span = spans_[task];
    Block block;
    prepare(task, block);
    for_each_block(task, [&](const Run& run) {
      evaluate(run, block);
      if (value_ && a_.reduction == BL_INSTANCES) {
        T* to = value_ + run.pair * num_instances_ + run.first;
        for (int i = 0; i < run.size; ++i) to[i] = static_cast<T>(block.values[i]);
      }
      for (int i = 0; i < run.size && weights_; ++i) block.values[i] *= static_cast<double>(weights_of(run)[i]);
      span.value += rows::total(block.values, block.size);
      if (!grad_sums_) return;
      for (int stat = 1; stat < num_stats_ && !zones_; ++stat) {
        if (!reads(negative_reads_, stat)) continue;
        const double sum = rows::total(block.slopes[kOthers + stat], block.size);
        span.slopes[stat] += sum;
        if (others_read_) others_slopes_.set(run.pair, stat, run.first / kBlock, sum);
      }
      if (!others_read_) store_slopes(run, block);
    });
  }

  void store_slopes_with_others(int64_t task) {
    Block block;
    prepare(task, block);
    for_each_block(task, [&](const Run& run) {
      evaluate(run, block);
      for (int stat = 1; stat < num_stats_; ++stat) {
        double* slopes = block.slopes[kPositive + stat];
        if (!reads(blob_reads_, stat)) rows::set(slopes, 0, block.size);
        if (reads(others_read_, stat)) others_slopes_.add_others(run, stat, block.slopes[kOthers + stat], slopes);
      }
      store_slopes(run, block);
    });
  }

  // Fills what no block changes.
  void prepare(int64_t task, Block& block) const {
    rows::set(block.grad, pairs_[task / num_spans_].blob_grad, kBlock);
    for (int stat = 1; stat < num_stats_ && grad_sums_; ++stat) {
      rows::set(block.slopes[kPositive + stat], 0, kBlock);
      rows::set(block.slopes[kOthers + stat], 0, kBlock);
    }
  }

  void evaluate(const Run& run, Block& block) const {
    block.size = run.padded();
    if (zones_)
      load_zones(run, block);
    else
      load_blobs(run, block);
    const double grad = pairs_[run.pair].blob_grad;
    for (int i = 0; i < run.size && weights_; ++i) block.grad[i] = grad * static_cast<double>(weights_of(run)[i]);
    if (a_.reduction == BL_INSTANCES) {
      const T* from = grad_ ? grad_ + run.pair * num_instances_ + run.first : nullptr;
      for (int i = 0; i < run.size; ++i) block.grad[i] = from ? static_cast<double>(from[i]) : 1;
    }
    const double nothing[kStats] = {};
    rows::evaluate(blob_rows_, zones_ ? nothing : pairs_[run.pair].background, grad_sums_ != nullptr, block);
  }

  void load_blobs(const Run& run, Block& block) const {
    double* count = block.columns[kPositive];
    table_.load_counts(run, count);
    std::copy_n(count, block.size, block.inhabited[0]);
    const double all = static_cast<double>(pairs_[run.pair].voxels);
    for (int i = 0; i < block.size && counts_others_; ++i) block.columns[kOthers][i] = all - count[i];  // exact
    for (int stat = 1; stat < num_stats_; ++stat) {
      double *own = block.columns[kPositive + stat], *others = block.columns[kOthers + stat];
      if (reads(blob_reads_ | others_read_, stat)) table_.load(run, stat, own);
      if (!reads(others_read_, stat)) continue;
      rows::set(others, 0, block.size);
      others_.add_others(run, stat, own, others);
    }
  }

  void load_zones(const Run& run, Block& block) const {
    for (const int bit : {0, 1}) {
      const int side = bit ? kPositive : kOthers;
      table_.load_count_of_bit(run, bit, block.columns[side]);
      for (int stat = 1; stat < num_stats_; ++stat)
        if (reads(bit ? blob_reads_ : negative_reads_, stat)) table_.load_bit(run, stat, bit, block.columns[side + stat]);
    }
    const double *positive = block.columns[kPositive], *negative = block.columns[kOthers];
    for (int i = 0; i < block.size; ++i) {
      const bool apart = a_.num_empty_rows && positive[i] == 0;
      block.inhabited[0][i] = apart ? 0 : positive[i] + negative[i];
      block.inhabited[1][i] = apart ? negative[i] : 0;
    }
  }

  void store_slopes(const Run& run, const Block& block) const {
    for (int stat = 1; stat < num_stats_; ++stat)
      for (int bit = 2 - table_.bits(); bit < 2; ++bit) {
        const double* slopes = block.slopes[(zones_ && !bit ? kOthers : kPositive) + stat];
        table_.store_bit(run, stat, bit, slopes, pairs_[run.pair].main_slopes[bit][stat], grad_sums_);
      }
  }

  // ---------------------------------------------------------------- the results

  void store_value() const {
    double sum_main = 0, sum_blob = 0;
    for (int64_t i = 0; i < num_pairs_; ++i) {
      double blob = 0;
      for (int64_t task = i * num_spans_; task < (i + 1) * num_spans_; ++task) blob += spans_[task].value;
      const double main = main_scale_ * pairs_[i].main;
      blob = blob_scale_ * (blob / weight_of(pairs_[i]) + pairs_[i].empty);
      if (a_.reduction == BL_NO_REDUCTION) value_[i] = static_cast<T>(main + blob);
      sum_main += main;
      sum_blob += blob;
    }
    if (a_.reduction == BL_TERMS) {
      value_[0] = static_cast<T>(sum_main);
      value_[1] = static_cast<T>(sum_blob);
    } else if (a_.reduction != BL_NO_REDUCTION) {
      value_[0] = static_cast<T>(sum_main + sum_blob);
    }
  }

  // The gradient of the cells of the background; all of it NaN where invalid labels have turned every sum NaN, since
  // a gradient scaler looks at gradients and not every slope reads a sum.
  void store_background() const {
    const int64_t size = num_pairs_ * a_.num_cells * a_.num_features;
    for (int64_t i = 0; i < num_pairs_; ++i)
      for (int stat = 1; stat < num_stats_; ++stat) {
        double slope = pairs_[i].empty_slopes[0][stat];
        for (int64_t task = i * num_spans_; task < (i + 1) * num_spans_; ++task) slope += spans_[task].slopes[stat];
        for (int bit = 0; bit < table_.bits(); ++bit) {
          const double all = slope + pairs_[i].main_slopes[bit][stat];
          grad_sums_[table_.index_of_background(i, bit, stat)] = static_cast<T>(all);
        }
      }
    if (std::all_of(sums_, sums_ + size, [](T sum) { return sum != sum; }))
      std::fill_n(grad_sums_, size, std::numeric_limits<T>::quiet_NaN());
  }

  const bl_finish& a_;
  const T* sums_;
  const T* weights_;
  const T* grad_;
  T* value_;
  T* grad_sums_;
  const bool zones_;
  const rows::Table<T> table_;
  const int num_stats_;
  const int64_t num_pairs_, num_instances_, num_blocks_, num_spans_;
  std::vector<rows::Row> main_rows_, blob_rows_, empty_rows_;
  bool counts_others_;
  uint32_t main_reads_, blob_reads_, negative_reads_, others_read_;  // bits of stats
  double main_scale_ = 0, blob_scale_ = 0;
  std::vector<Pair> pairs_;
  std::vector<SpanSums> spans_;
  BlockSums others_, others_slopes_;
};

}  // namespace
}  // namespace blobloss

int32_t blobloss_finish(const bl_finish* arguments) {
  try {
    if (arguments->is_double) {
      blobloss::Finish<double>(*arguments).run();
    } else {
      blobloss::Finish<float>(*arguments).run();
    }
  } catch (...) {  // nothing but memory can be short here
    return BL_NO_MEMORY;
  }
  return 0;
}
