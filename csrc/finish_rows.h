// Rows of coefficients on a block of domains side by side: the values of a criterion and their slopes, in double.
#pragma once

#include <math.h>
#include <stdint.h>

#include <vector>

#include "blobloss.h"

namespace blobloss {
namespace rows {

constexpr int kStats = 1 + BLOBLOSS_MAX_FEATURES;  // the count, then the features in the order of the table
constexpr int kRowHead = 6;                        // of a row as kernels/layout.py stores it
constexpr int kRowSize = kRowHead + 4 * kStats;
constexpr int kBlock = 128;                        // domains that are evaluated together
constexpr int kStep = 8;                           // divides the size of a block
constexpr int kPositive = 0, kOthers = kStats;     // where the columns of a block begin

// One column for each stat of the positive side, and one for each stat of "the others": what the domain at hand has on
// its negative side beyond what all domains have there (of a zone, all of it). The slopes of the negative side stand
// where the others do.
struct alignas(64) Block {
  int size;             // a multiple of kStep; beyond the last domain everything is 0
  double grad[kBlock];  // of the values
  double inhabited[2][kBlock];  // above 0 where rows apply: [1] to those of domains without a positive voxel
  double columns[2 * kStats][kBlock];
  double values[kBlock];
  double slopes[2 * kStats][kBlock];
};

struct Term {
  int column;
  double coefficient;
};

struct Terms {
  int size = 0;
  Term terms[2 * kStats + 1];
  // A coefficient of 0 is never applied: what it would read may be infinite.
  void add(int column, double coefficient) {
    if (coefficient != 0) terms[size++] = {column, coefficient};
  }
};

struct Slope {
  int column;
  bool is_first;        // row that adds to this column
  double above, below;  // coefficients, as the gradient sees them
};

// A row, sorted by where its terms read: in the columns of a block, or in the stats that all domains have on their
// negative side; in the numerator ("above") or the denominator.
struct Row {
  int inhabited;  // which domains it applies to
  double weight, offset, constant_above, constant_below;
  Terms above, below, negative_above, negative_below;
  int num_slopes = 0;
  Slope slopes[2 * kStats];
};

// What masking does to the others. A voxel of theirs adds per_voxel of a stat (the count's comes first), or, where they
// stay in, its own.
struct Masking {
  double per_voxel[kStats];
  bool stays_in;
};

inline Masking masking_of(const bl_finish& a) {
  Masking masking = {{}, a.masking == BL_MASK_NONE || a.masking == BL_ZONES};
  if (a.masking != BL_EXCLUDE) masking.per_voxel[0] = 1;
  if (a.masking == BL_ZERO_LOGIT && a.activation != BL_NONE) {
    const double prob = a.activation == BL_SIGMOID ? 0.5 : 1 / static_cast<double>(a.channels);
    const double nll = -log1p(-prob);
    masking.per_voxel[1 + BL_PROB] = prob;
    masking.per_voxel[1 + BL_PROB_SQ] = prob * prob;
    masking.per_voxel[1 + BL_NLL_NEG] = nll;
    masking.per_voxel[1 + BL_FOCAL_NEG] = pow(prob, a.gamma) * nll;
  }
  return masking;
}

// The rows of one evaluation, in two lists. stat_of: where in the table a stat of the layout is, -1 if it is not.
inline std::vector<Row> read_rows(const double* flat, int64_t count, const double* flat_empty, int64_t count_empty,
                                  const int* stat_of, const Masking& masking) {
  std::vector<Row> rows(static_cast<size_t>(count + count_empty));
  uint32_t seen = 0;  // columns of slopes
  for (Row& row : rows) {
    row.inhabited = &row - rows.data() >= count;
    if (&row - rows.data() == count) flat = flat_empty;
    row.weight = flat[0], row.offset = flat[1], row.constant_above = flat[2], row.constant_below = flat[3];
    double others_above = 0, others_below = 0;
    for (int i = 0; i < 2 * kStats; ++i) {
      const double above = flat[kRowHead + i], below = flat[kRowHead + 2 * kStats + i];
      if (above == 0 && below == 0) continue;
      const bool negative = i >= kStats;
      const int stat = stat_of[i % kStats], column = (negative ? kOthers : kPositive) + stat;
      if (stat < 0) {
        row.constant_above = NAN;  // a stat that the table lacks
        continue;
      }
      if (negative) {
        row.negative_above.add(stat, above);
        row.negative_below.add(stat, below);
      }
      if (!negative || (masking.stays_in && stat > 0)) {
        row.above.add(column, above);
        row.below.add(column, below);
      } else {
        others_above += above * masking.per_voxel[i - kStats];
        others_below += below * masking.per_voxel[i - kStats];
      }
      if (stat == 0) continue;
      row.slopes[row.num_slopes++] = {column, !(seen >> column & 1), above * flat[4], below * flat[5]};
      seen |= 1u << column;
    }
    row.above.add(kOthers, others_above);
    row.below.add(kOthers, others_below);
    flat += kRowSize;
  }
  return rows;
}

// Returns the bits of the features that rows read on a side (kPositive or kOthers), as stats.
inline uint32_t stats_read(const std::vector<Row>& rows, int side) {
  uint32_t read = 0;
  for (const Row& row : rows)
    for (int i = 0; i < row.num_slopes; ++i) read |= 1u << row.slopes[i].column;
  return read >> side & ((1u << kStats) - 1);
}

// The order of this sum depends on the size alone.
inline double total(const double* x, int size) {
  double lanes[kStep] = {};
  for (int i = 0; i < size; i += kStep)
    for (int j = 0; j < kStep; ++j) lanes[j] += x[i + j];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

inline void set(double* __restrict to, double value, int size) {
  for (int i = 0; i < size; ++i) to[i] = value;
}

inline void add_scaled(double* __restrict to, const double* __restrict x, double a, int size) {
  for (int i = 0; i < size; ++i) to[i] += a * x[i];
}

inline double constant_of(double constant, const Terms& terms, const double* stats) {
  for (int t = 0; t < terms.size; ++t) constant += terms.terms[t].coefficient * stats[terms.terms[t].column];
  return constant;
}

// to = constant + terms; most rows have one or two of these, which one loop does.
inline void combine(double constant, const Terms& terms, const Block& block, double* __restrict to) {
  if (terms.size == 0) return set(to, constant, block.size);
  const Term *first = &terms.terms[0], *second = &terms.terms[1];
  const double* __restrict x = block.columns[first->column];
  const double a = first->coefficient;
  if (terms.size == 1) {
    for (int i = 0; i < block.size; ++i) to[i] = constant + a * x[i];
    return;
  }
  const double* __restrict y = block.columns[second->column];
  const double b = second->coefficient;
  for (int i = 0; i < block.size; ++i) to[i] = constant + a * x[i] + b * y[i];
  for (int t = 2; t < terms.size; ++t)
    add_scaled(to, block.columns[terms.terms[t].column], terms.terms[t].coefficient, block.size);
}

inline void add_slopes(const Slope& slope, const double* __restrict ratio, const double* __restrict scale, int size,
                       double* __restrict to) {
  const double above = slope.above, below = slope.below;
  const bool first = slope.is_first;
  if (below == 0) {  // the ratio may be infinite
    for (int i = 0; i < size; ++i) to[i] = (first ? 0 : to[i]) + above * scale[i];
  } else {
    for (int i = 0; i < size; ++i) to[i] = (first ? 0 : to[i]) + (above - below * ratio[i]) * scale[i];
  }
}

// Fills the values, 0 where nothing is inhabited, and if wanted the slopes that rows have: grad times the derivative of
// the value. One division serves both; a denominator is far from where its reciprocal overflows.
inline void evaluate(const std::vector<Row>& rows, const double* negative, bool slopes, Block& block) {
  const int size = block.size;
  alignas(64) double above[kBlock], below[kBlock];
  if (rows.empty()) set(block.values, 0, size);
  for (const Row& row : rows) {
    combine(constant_of(row.constant_above, row.negative_above, negative), row.above, block, above);
    combine(constant_of(row.constant_below, row.negative_below, negative), row.below, block, below);
    const bool first = &row == &rows[0];
    const double* __restrict inhabited = block.inhabited[row.inhabited];
    for (int i = 0; i < size; ++i) {
      const bool valid = inhabited[i] > 0;
      const double weight = valid ? row.weight : 0, inverse = 1 / below[i];
      const double ratio = above[i] * inverse, scale = row.weight * block.grad[i] * inverse;
      above[i] = valid ? ratio : 0;
      below[i] = valid ? scale : 0;
      block.values[i] = (first ? 0 : block.values[i]) + weight * (row.offset + above[i]);
    }
    for (int s = 0; s < row.num_slopes && slopes; ++s)
      add_slopes(row.slopes[s], above, below, size, block.slopes[row.slopes[s].column]);
  }
}

// Returns the value on a single domain, whose negative and positive side are given, and fills their slopes.
inline double evaluate_one(const std::vector<Row>& rows, int num_stats, const double* const* sides, double grad,
                           double (*slopes)[kStats]) {
  Block block;
  block.size = kStep;
  for (int stat = 0; stat < num_stats; ++stat) {
    set(block.columns[kPositive + stat], 0, kStep);
    block.columns[kPositive + stat][0] = sides[1][stat];
  }
  set(block.columns[kOthers], 0, kStep);
  set(block.inhabited[0], 0, kStep);
  set(block.grad, 0, kStep);
  block.inhabited[0][0] = sides[0][0] + sides[1][0];
  block.grad[0] = grad;
  for (auto& column : block.slopes) column[0] = 0;  // where no row has one
  evaluate(rows, sides[0], true, block);
  for (int stat = 1; stat < num_stats; ++stat) {
    slopes[0][stat] = block.slopes[kOthers + stat][0];
    slopes[1][stat] = block.slopes[kPositive + stat][0];
  }
  return block.values[0];
}

// Adds to every element the sum of all the others, of which `before` and `after` are the parts outside of the block:
// never by a difference, which a giant would spoil.
inline void add_others(const double* __restrict x, double before, double after, int size, double* __restrict to) {
  double lanes[kStep] = {}, outside[kStep], earlier[kBlock];
  for (int i = 0; i < size; i += kStep)
    for (int j = 0; j < kStep; ++j) {
      earlier[i + j] = lanes[j];
      lanes[j] += x[i + j];
    }
  for (int j = 0; j < kStep; ++j) {
    outside[j] = before;
    before += lanes[j];
  }
  for (int j = kStep - 1; j >= 0; --j) {
    outside[j] += after;
    after += lanes[j];
  }
  for (int i = size - kStep; i >= 0; i -= kStep)
    for (int j = 0; j < kStep; ++j) {
      to[i + j] += earlier[i + j] + outside[j];
      outside[j] += x[i + j];
    }
}

}  // namespace rows
}  // namespace blobloss
