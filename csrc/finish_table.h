// The table of sums as the instances of a (sample, class) pair see it: reads and writes of a few stats of many cells.
#pragma once

#include <stdint.h>
#include <string.h>

#include "finish_rows.h"

namespace blobloss {
namespace rows {

// A number of voxels, 0 to 2^52: as SSE2 can do it for two at a time.
inline int64_t is_positive(int64_t count) { return static_cast<int64_t>(static_cast<uint64_t>(-count) >> 63); }

inline double to_double(int64_t count) {
  const int64_t bits = count + 0x4330000000000000;  // 2^52 as a double: the count becomes the end of its mantissa
  double shifted;
  memcpy(&shifted, &bits, sizeof shifted);
  return shifted - 4503599627370496.0;
}

// A run of instances of one pair, at most a block; the first instance of all, which has id 1, is number 0.
struct Run {
  int64_t pair, first;
  int size;
  int padded() const { return (size + kStep - 1) / kStep * kStep; }
};

// Without a target an instance is one cell, which stands for bit 1 alone.
template <typename T>
class Table {
 public:
  Table(const int64_t* counts, const T* sums, int64_t num_cells, int64_t features, bool has_target)
      : counts_(counts), sums_(sums), num_cells_(num_cells), features_(features), bits_(has_target ? 2 : 1) {}

  int bits() const { return bits_; }
  int64_t num_instances() const { return num_cells_ / bits_ - 1; }

  int64_t count_of_background(int64_t pair, int bit) const { return counts_[pair * num_cells_ + bit]; }
  int64_t index_of_background(int64_t pair, int bit, int stat) const {
    return (pair * num_cells_ + bit) * features_ + stat - 1;
  }

  // Adds up the voxels by bit; returns how many instances have any.
  int64_t count(const Run& run, int64_t* voxels) const {
    const int64_t* __restrict counts = counts_ + cell(run);
    int64_t instances = 0, with_bit[2] = {};
    if (bits_ == 1) {
      for (int i = 0; i < run.size; ++i) {
        with_bit[1] += counts[i];
        instances += is_positive(counts[i]);
      }
    } else {
      for (int i = 0; i < run.size; ++i) {
        with_bit[0] += counts[2 * i];
        with_bit[1] += counts[2 * i + 1];
        instances += is_positive(counts[2 * i] + counts[2 * i + 1]);
      }
    }
    voxels[0] += with_bit[0];
    voxels[1] += with_bit[1];
    return instances;
  }

  void load_count_of_bit(const Run& run, int bit, double* __restrict to) const {
    const int64_t* __restrict counts = counts_ + cell(run) + bit;
    for (int i = 0; i < run.size; ++i) to[i] = to_double(counts[2 * i]);
    pad(run, to);
  }

  void load_counts(const Run& run, double* __restrict to) const {
    const int64_t* __restrict counts = counts_ + cell(run);
    if (bits_ == 1) {
      for (int i = 0; i < run.size; ++i) to[i] = to_double(counts[i]);
    } else {
      for (int i = 0; i < run.size; ++i) to[i] = to_double(counts[2 * i] + counts[2 * i + 1]);
    }
    pad(run, to);
  }

  // A feature of the voxels with one bit.
  void load_bit(const Run& run, int stat, int bit, double* __restrict to) const {
    const T* __restrict from = sums_ + index(run, stat, bit);
    const int64_t step = bits_ * features_;
    if (step == 1) {
      for (int i = 0; i < run.size; ++i) to[i] = from[i];
    } else {
      for (int i = 0; i < run.size; ++i) to[i] = from[i * step];
    }
    pad(run, to);
  }

  void load(const Run& run, int stat, double* __restrict to) const {
    if (bits_ == 1) return load_bit(run, stat, 1, to);
    const T* __restrict from = sums_ + index(run, stat, 0);
    const int64_t step = 2 * features_;
    for (int i = 0; i < run.size; ++i)
      to[i] = static_cast<double>(from[i * step]) + static_cast<double>(from[i * step + features_]);
    pad(run, to);
  }

  // Writes x + constant into a table like that of the sums.
  void store_bit(const Run& run, int stat, int bit, const double* __restrict x, double constant, T* table) const {
    const int64_t step = bits_ * features_;
    T* __restrict to = table + index(run, stat, bit);
    if (step == 1) {
      for (int i = 0; i < run.size; ++i) to[i] = static_cast<T>(x[i] + constant);
    } else {
      for (int i = 0; i < run.size; ++i) to[i * step] = static_cast<T>(x[i] + constant);
    }
  }

 private:
  int64_t cell(const Run& run) const { return run.pair * num_cells_ + (run.first + 1) * bits_; }
  int64_t index(const Run& run, int stat, int bit) const {
    return (cell(run) + (bits_ == 2 ? bit : 0)) * features_ + stat - 1;
  }
  static void pad(const Run& run, double* to) {
    for (int i = run.size; i < run.padded(); ++i) to[i] = 0;
  }

  const int64_t* counts_;
  const T* sums_;
  const int64_t num_cells_, features_;
  const int bits_;
};

// A sum over blocks, and for every block the sum of those before and of those after it; per pair and stat.
class BlockSums {
 public:
  void resize(int64_t pairs, int features, int64_t blocks) {
    features_ = features;
    blocks_ = blocks;
    before_.resize(static_cast<size_t>(pairs * features * blocks));
    after_.resize(before_.size());
  }
  void set(int64_t pair, int stat, int64_t block, double sum) { before_[at(pair, stat) + block] = sum; }
  // Adds to every element of `to` the sum over all instances of the pair but its own; x: the stat of this block.
  void add_others(const Run& run, int stat, const double* x, double* to) const {
    const size_t i = at(run.pair, stat) + run.first / kBlock;
    rows::add_others(x, before_[i], after_[i], run.padded(), to);
  }

  void add_up() {
    for (size_t first = 0; first < before_.size(); first += blocks_) {
      double* before = &before_[first];
      double after = 0, sum = 0;
      for (int64_t i = blocks_ - 1; i >= 0; --i) {
        after_[first + i] = after;
        after += before[i];
      }
      for (int64_t i = 0; i < blocks_; ++i) {
        const double of_block = before[i];
        before[i] = sum;
        sum += of_block;
      }
    }
  }

 private:
  size_t at(int64_t pair, int stat) const { return static_cast<size_t>((pair * features_ + stat - 1) * blocks_); }
  int features_ = 0;
  int64_t blocks_ = 0;
  std::vector<double> before_, after_;
};

}  // namespace rows
}  // namespace blobloss
