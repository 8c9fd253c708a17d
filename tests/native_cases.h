// The cases of native_stress.cpp: volumes of every type in memory that is exactly as large as it may be, problems with
// random options, and single voxels that are wrong.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "blobloss.h"

namespace {

const char* const kSets[] = {"baseline", "avx2", "avx512"};  // of instructions

using Bytes = std::vector<unsigned char>;
using Random = std::mt19937;

constexpr int kTypes = 10, kStats = 1 + BLOBLOSS_MAX_FEATURES, kRowHead = 6, kRowSize = kRowHead + 4 * kStats;
const int64_t kSizes[] = {1, 7, 511, 512, 513, 8191, 8193, 20000, 20000};
const int64_t kBytes[kTypes] = {2, 2, 4, 8, 1, 1, 1, 2, 4, 8};
const double kLargest[kTypes] = {2048, 256, 16777216, 9e15, 1, 255, 127, 32767, 2147483647, 9e15};  // whole numbers

int64_t pick(Random& random, int64_t below) { return random() % below; }

// ---------------------------------------------------------------- volumes

template <typename T>
void put(unsigned char* to, T x) {
  memcpy(to, &x, sizeof x);
}

uint32_t float_bits(double x) {
  const float single = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &single, sizeof bits);
  return bits;
}

// Exact for what half precision holds as a normal number; otherwise whatever is near.
uint16_t half_of(double x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  return static_cast<uint16_t>(sign | (magnitude < 0x38800000 ? 0 : (magnitude - 0x38000000) >> 13));
}

void store(int type, unsigned char* to, double x) {
  switch (type) {
    case BL_F16: return put(to, half_of(x));
    case BL_BF16: return put(to, static_cast<uint16_t>(float_bits(x) >> 16 | (isnan(x) ? 0x40 : 0)));
    case BL_F32: return put(to, static_cast<float>(x));
    case BL_F64: return put(to, x);
    case BL_BOOL:
    case BL_U8: return put(to, static_cast<uint8_t>(x));
    case BL_I8: return put(to, static_cast<int8_t>(x));
    case BL_I16: return put(to, static_cast<int16_t>(x));
    case BL_I32: return put(to, static_cast<int32_t>(x));
    default: return put(to, static_cast<int64_t>(x));
  }
}

double load(int type, const unsigned char* from) {  // a gradient
  uint16_t half = 0;
  float single;
  double x;
  if (type == BL_F64) return memcpy(&x, from, sizeof x), x;
  if (type == BL_F32) return memcpy(&single, from, sizeof single), single;
  memcpy(&half, from, sizeof half);
  if (type == BL_F16) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    x = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return half & 0x8000 ? -x : x;
  }
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  return memcpy(&single, &bits, sizeof single), single;
}

// Values, and the same in the memory of a volume with gaps: nothing before its first value, nothing after its last.
struct Volume {
  Bytes bytes;
  bl_volume view = {};
  std::vector<double> values;  // [batch, channels, voxels]
  int64_t voxels = 0;

  void resize(Random& random, int type, int64_t batch, int64_t channels, int64_t size) {
    voxels = size;
    view.type = type;
    view.channels = static_cast<int32_t>(channels);
    view.channel_stride = channels == 1 ? 0 : voxels + pick(random, 3);
    view.batch_stride = batch == 1 ? 0 : (channels - 1) * view.channel_stride + voxels + pick(random, 3);
    const int64_t last = (batch - 1) * view.batch_stride + (channels - 1) * view.channel_stride + voxels;
    bytes.assign(static_cast<size_t>(last * kBytes[type]), 0x7f);
    values.assign(static_cast<size_t>(batch * channels * voxels), 0);
    view.data = bytes.data();
  }
  void set(int64_t b, int64_t c, int64_t v, double x) {
    c = std::min<int64_t>(c, view.channels - 1);
    values[(b * view.channels + c) * voxels + v] = x;
    const int64_t at = b * view.batch_stride + c * view.channel_stride + v;
    store(view.type, &bytes[at * kBytes[view.type]], x);
  }
  double get(int64_t b, int64_t c, int64_t v) const {
    return values[(b * view.channels + std::min<int64_t>(c, view.channels - 1)) * voxels + v];
  }
};

// ---------------------------------------------------------------- cases

struct Case {
  bl_problem problem = {};
  bl_finish finish = {};
  Volume logits, cells, target;
  std::vector<double> main_rows, blob_rows, empty_rows, coefficients;
  Bytes grad_sums, upstream, weights;
  bool has_target = false, is_class_map = false, is_wild = false, wants_value = true, wants_gradient = true;
  int32_t expected = 0;  // status

  bool is_double() const { return problem.logits.type == BL_F64; }
  int real_type() const { return is_double() ? BL_F64 : BL_F32; }  // of the sums
  int64_t real() const { return kBytes[real_type()]; }
  int64_t pairs() const { return problem.batch * problem.channels; }
};

// Numbers that every type holds exactly.
double random_logit(Random& random, const Case& c) {
  const bool is_probability = c.problem.activation == BL_NONE;
  if (c.is_wild && pick(random, 10) == 0) {
    const double wild[] = {NAN, 0, 1, INFINITY, -INFINITY, 1e4, -1e4, 90, -104};
    return wild[pick(random, is_probability ? 3 : 9)];
  }
  return is_probability ? static_cast<double>(1 + pick(random, 255)) / 256
                        : static_cast<double>(pick(random, 255) - 127) / 16;
}

// A third of the runs is ignored, a third is background.
double random_id(Random& random, int64_t capacity, double ignored) {
  const int64_t kind = pick(random, 3), id = pick(random, capacity);
  return kind == 0 ? ignored : kind == 1 ? 0 : static_cast<double>(id);
}

void fill_volumes(Random& random, Case& c, int64_t capacity, int logits_type, int cells_type, int target_type) {
  bl_problem& p = c.problem;
  const int64_t cell_channels = pick(random, 2) ? 1 : p.channels;
  const int64_t run = std::vector<int64_t>{1, 20, 3000}[pick(random, 3)];
  const double ignored = cells_type == BL_U8 ? 0 : cells_type == BL_I64 ? -1e12 : -1;
  const bool all_ignored = pick(random, 16) == 0;
  c.logits.resize(random, logits_type, p.batch, p.channels, p.voxels);
  c.cells.resize(random, cells_type, p.batch, cell_channels, p.voxels);
  const int64_t values = std::min(c.is_class_map ? p.channels : 2, static_cast<int64_t>(kLargest[target_type]) + 1);
  if (c.has_target) c.target.resize(random, target_type, p.batch, c.is_class_map ? 1 : p.channels, p.voxels);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t ch = 0; ch < p.channels; ++ch) {
      double id = 0;
      for (int64_t v = 0; v < p.voxels; ++v) {
        c.logits.set(b, ch, v, random_logit(random, c));
        if (v == 0 || pick(random, run) == 0) id = random_id(random, capacity, ignored);
        if (ch < cell_channels) c.cells.set(b, ch, v, all_ignored ? ignored : id);
        const bool is_read = c.cells.get(b, ch, v) >= 0 || cell_channels > 1 || target_type == BL_BOOL;
        if (c.has_target) c.target.set(b, ch, v, is_read ? static_cast<double>(pick(random, values)) : 77);
      }
    }
}

// Makes one voxel wrong.
void spoil(Random& random, Case& c, int64_t capacity) {
  const bl_problem& p = c.problem;
  const int64_t b = pick(random, p.batch), last = p.channels - 1, v = pick(random, p.voxels);
  const int kind = static_cast<int>(pick(random, 3)), type = c.target.view.type;
  if (kind == 1 && (!c.has_target || type == BL_BOOL || p.channels > 100)) return;
  if (kind == 2 && p.activation != BL_NONE) return;
  const bool is_broken = type < BL_BOOL && pick(random, 2);
  const bool is_huge = c.cells.view.type >= BL_I32 && pick(random, 2);
  c.cells.set(b, last, v, kind != 0 ? 0 : is_huge ? kLargest[c.cells.view.type] : static_cast<double>(capacity));
  for (int64_t ch = 0; ch <= last && c.has_target; ++ch) c.target.set(b, ch, v, 0);  // there may have been anything
  if (kind == 1) c.target.set(b, last, v, is_broken ? 0.5 : static_cast<double>(std::max<int64_t>(2, p.channels)));
  if (kind == 2) c.logits.set(b, last, v, pick(random, 2) ? 1.5 : -0.5);
  const int32_t statuses[] = {BL_TOO_LARGE, c.is_class_map ? BL_NOT_A_CLASS : BL_NOT_BINARY, BL_NOT_A_PROBABILITY};
  c.expected = statuses[kind];
}

std::vector<double> random_rows(Random& random, const bl_problem& p) {
  std::vector<double> rows;
  for (int64_t i = pick(random, 3); i >= 0; --i) {
    double row[kRowSize] = {1, 1, 0, 1, pick(random, 4) ? 1.0 : 0.5, pick(random, 4) ? 1.0 : 0.0};
    for (int j = 0; j < 4; ++j) {
      const int64_t f = pick(random, p.num_features + 1);
      const int64_t stat = f == p.num_features ? 0 : 1 + p.features[f];
      row[kRowHead + (j / 2 * 2 + pick(random, 2)) * kStats + stat] = j < 2 ? -2 : 0.5;
    }
    rows.insert(rows.end(), row, row + kRowSize);
  }
  return rows;
}

void prepare_finish(Random& random, Case& c) {
  const bl_problem& p = c.problem;
  bl_finish& f = c.finish;
  c.main_rows = random_rows(random, p);
  c.blob_rows = random_rows(random, p);
  f.main_rows = c.main_rows.data();
  f.blob_rows = c.blob_rows.data();
  f.num_main_rows = static_cast<int64_t>(c.main_rows.size()) / kRowSize;
  f.num_blob_rows = static_cast<int64_t>(c.blob_rows.size()) / kRowSize;
  if (pick(random, 2)) c.empty_rows = random_rows(random, p);
  f.empty_rows = c.empty_rows.data();
  f.num_empty_rows = static_cast<int64_t>(c.empty_rows.size()) / kRowSize;
  f.batch = p.batch, f.channels = p.channels, f.num_cells = p.num_cells;
  f.gamma = p.gamma, f.main_weight = 0.5, f.blob_weight = 2;
  f.is_double = c.is_double(), f.has_target = c.has_target;
  f.activation = p.activation, f.channel0 = p.channel0;
  f.masking = static_cast<int32_t>(pick(random, c.has_target ? 5 : 4));  // zones need a target
  f.reduction = static_cast<int32_t>(pick(random, 5));
  f.num_features = p.num_features;
  memcpy(f.features, p.features, sizeof f.features);
  const int64_t instances = p.num_cells / (1 + c.has_target) - 1;
  const int64_t sizes[] = {1, c.pairs(), 1, 2, c.pairs() * instances};  // by reduction
  c.upstream.resize(static_cast<size_t>(sizes[f.reduction] * c.real()));
  for (size_t i = 0; i < c.upstream.size(); i += c.real()) store(c.real_type(), &c.upstream[i], 0.75);
  f.grad = pick(random, 2) ? c.upstream.data() : nullptr;
  c.weights.resize(static_cast<size_t>(c.pairs() * instances * c.real()));
  for (size_t i = 0; i < c.weights.size(); i += c.real())
    store(c.real_type(), &c.weights[i], static_cast<double>(pick(random, 5)) / 4);
  f.weights = pick(random, 2) ? c.weights.data() : nullptr;
  c.wants_value = pick(random, 4) != 0;
  c.wants_gradient = !c.wants_value || pick(random, 4) != 0;
}

// target_kind: -1 none, then the types as binary targets, then as class maps.
void make_case(Random& random, Case& c, int logits_type, int cells_type, int target_kind, int64_t channels = 0) {
  bl_problem& p = c.problem;
  c.has_target = target_kind >= 0;
  c.is_class_map = target_kind >= kTypes;
  p.activation = static_cast<int32_t>(pick(random, 3));
  p.batch = 1 + pick(random, 2);
  p.channels = channels ? channels : (p.activation == BL_SOFTMAX || c.is_class_map ? 2 : 1) + pick(random, 3);
  p.voxels = channels ? 600 : kSizes[pick(random, 9)];
  p.channel0 = p.channels > 1 ? static_cast<int32_t>(pick(random, 3)) : BL_CLASS;
  p.gamma = std::vector<double>{0, 1, 2, 2.5}[pick(random, 4)];
  p.num_features = static_cast<int32_t>(pick(random, 7));
  for (int i = 0; i < BLOBLOSS_MAX_FEATURES; ++i) p.features[i] = i;
  std::shuffle(p.features, p.features + BLOBLOSS_MAX_FEATURES, random);
  c.is_wild = pick(random, 6) == 0;
  int64_t capacity = std::vector<int64_t>{1, 2, 7, 40, 900}[pick(random, 5)];
  if (p.voxels == 20000 && pick(random, 8) == 0) capacity = 20001;
  capacity = std::min(capacity, static_cast<int64_t>(kLargest[cells_type]));
  p.num_cells = capacity * (1 + c.has_target);
  fill_volumes(random, c, capacity, logits_type, cells_type, std::max(target_kind, 0) % kTypes);
  p.logits = c.logits.view;
  if (pick(random, 3) == 0) spoil(random, c, capacity);
  p.cells = c.cells.view;
  p.target = c.target.view;
  c.coefficients.resize(static_cast<size_t>(c.pairs() * p.num_cells * p.num_features));
  c.grad_sums.resize(c.coefficients.size() * c.real());
  for (size_t i = 0; i < c.coefficients.size(); ++i) {
    c.coefficients[i] = static_cast<double>(pick(random, 255) - 127) / 128;
    store(c.real_type(), &c.grad_sums[i * c.real()], c.coefficients[i]);
  }
  prepare_finish(random, c);
}

}  // namespace
