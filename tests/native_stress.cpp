// Drives the C interface (csrc/blobloss.h) over all types and options, odd sizes and any number of threads: for the
// sanitizers (sanitize.sh) and for emulated machines (cross_aarch64.sh). Every case is compared with plain loops in
// double, and bit for bit over numbers of threads.
//
//     native_stress [ROUNDS]
//
// Prints what is wrong and one line at the end; the status is 0 if nothing is wrong.

#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <thread>

#include "native_cases.h"
#include "native_pools.h"

namespace {

std::atomic<int> failures{0};

// ---------------------------------------------------------------- the library

struct Result {
  int32_t status;
  Bytes counts, sums, grad, value, table_grad;

  bool operator==(const Result& other) const {
    return status == other.status &&
           (status || (counts == other.counts && sums == other.sums && grad == other.grad && value == other.value &&
                       table_grad == other.table_grad));
  }
};

Result compute(const Case& c, const bl_threads& threads, unsigned char fill) {
  bl_problem p = c.problem;
  p.threads = threads;
  const size_t entries = static_cast<size_t>(c.pairs() * p.num_cells), sums = entries * p.num_features * c.real();
  Result r;
  r.counts.assign(entries * sizeof(int64_t), fill);
  r.sums.assign(sums, fill);
  r.grad.assign(static_cast<size_t>(c.pairs() * p.voxels * kBytes[p.logits.type]), fill);
  const int64_t blocks = (p.voxels + BLOBLOSS_BLOCK - 1) / BLOBLOSS_BLOCK;
  std::vector<int16_t> block_cells(static_cast<size_t>((c.pairs() * blocks + 3) / 4 * 4), 2);  // "cell 0": to be cleared
  p.block_cells = fill % 2 ? block_cells.data() : nullptr;  // with notes and without is the same
  int64_t* counts = reinterpret_cast<int64_t*>(r.counts.data());
  r.status = blobloss_segment_stats_forward(&p, counts, r.sums.data());
  r.status |= blobloss_segment_stats_backward(&p, c.grad_sums.data(), nullptr, 0, r.grad.data());
  if (c.expected) return r;

  bl_finish f = c.finish;
  f.threads = threads;
  f.counts = counts;
  f.sums = r.sums.data();
  if (c.wants_value) r.value.assign(c.upstream.size(), fill);
  if (c.wants_gradient) r.table_grad.assign(sums, fill);
  f.value = c.wants_value ? r.value.data() : nullptr;
  f.grad_sums = c.wants_gradient ? r.table_grad.data() : nullptr;
  r.status |= blobloss_finish(&f);
  return r;
}

// ---------------------------------------------------------------- the truth

struct Point {
  double value, slope;
};

// A feature and its derivative with respect to the logit z of its own (the probability for activation "none").
Point feature_at(int feature, bool is_probability, double z, double gamma) {
  const double p = is_probability ? z : 1 / (1 + exp(-z)), q = is_probability ? 1 - z : 1 / (1 + exp(z));
  const double pos = is_probability ? -log(p) : log1p(exp(-z)), neg = is_probability ? -log1p(-p) : log1p(exp(z));
  const double dp = is_probability ? 1 : p * q;
  switch (feature) {
    case BL_PROB: return {p, dp};
    case BL_PROB_SQ: return {p * p, 2 * p * dp};
    case BL_NLL_POS: return {pos, -dp / p};
    case BL_NLL_NEG: return {neg, dp / q};
    case BL_FOCAL_POS: return {pow(q, gamma) * pos, (-gamma * pow(q, gamma - 1) * pos - pow(q, gamma) / p) * dp};
    default: return {pow(p, gamma) * neg, (gamma * pow(p, gamma - 1) * neg + pow(p, gamma) / q) * dp};
  }
}

int64_t cell_of(const Case& c, int64_t b, int64_t ch, int64_t v) {
  if (c.problem.channel0 == BL_UNUSED && ch == 0) return -1;
  int64_t id = static_cast<int64_t>(c.cells.get(b, ch, v));
  if (c.problem.channel0 == BL_BACKGROUND && ch == 0) id = std::min<int64_t>(id, 0);
  if (id < 0 || !c.has_target) return id;
  const double target = c.target.get(b, ch, v);
  return 2 * id + (c.is_class_map ? target == static_cast<double>(ch) : target != 0);
}

struct Sum {
  double value = 0, size = 0;  // size: of the absolute terms, what an error is relative to
  void add(double x) { value += x, size += fabs(x); }
};

struct Truth {
  std::vector<int64_t> counts;
  std::vector<Sum> sums, grad;
};

Truth truth_of(const Case& c) {
  const bl_problem& p = c.problem;
  const int64_t features = p.num_features, channels = p.channels, entries = c.pairs() * p.num_cells;
  Truth truth;
  truth.counts.resize(static_cast<size_t>(entries));
  truth.sums.resize(static_cast<size_t>(entries * features));
  truth.grad.resize(static_cast<size_t>(c.pairs() * p.voxels));
  std::vector<double> z(channels), others(channels), e(channels);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t v = 0; v < p.voxels; ++v) {
      std::vector<Sum> own(channels);  // the gradient with respect to z
      for (int64_t ch = 0; ch < channels; ++ch) e[ch] = exp(z[ch] = c.logits.get(b, ch, v));
      for (int64_t ch = 0; ch < channels; ++ch) {
        others[ch] = 0;
        for (int64_t j = 0; j < channels && p.activation == BL_SOFTMAX; ++j) others[ch] += j == ch ? 0 : e[j];
        if (p.activation == BL_SOFTMAX) z[ch] -= log(others[ch]);
        const int64_t cell = cell_of(c, b, ch, v), entry = (b * channels + ch) * p.num_cells + cell;
        if (cell < 0) continue;
        ++truth.counts[entry];
        for (int64_t f = 0; f < features; ++f) {
          const Point at = feature_at(p.features[f], p.activation == BL_NONE, z[ch], p.gamma);
          truth.sums[entry * features + f].add(at.value);
          own[ch].add(c.coefficients[entry * features + f] * at.slope);
        }
      }
      for (int64_t ch = 0; ch < channels; ++ch) {
        Sum& grad = truth.grad[(b * channels + ch) * p.voxels + v] = own[ch];
        for (int64_t j = 0; j < channels && p.activation == BL_SOFTMAX; ++j) {
          if (j == ch) continue;
          grad.value -= own[j].value * e[ch] / others[j];
          grad.size += own[j].size * e[ch] / others[j];
        }
      }
    }
  return truth;
}

bool is_near(double found, const Sum& sum, double relative, double least) {
  return fabs(found - sum.value) <= relative * sum.size + least;
}

const char* compare(const Case& c, const Truth& truth, const Result& r) {
  const int type = c.problem.logits.type;
  const double stored[] = {5e-4, 4e-3, 0, 0}, of_sums = c.is_double() ? 1e-12 : 4e-6;
  const double of_grad = of_sums + stored[type], least = type == BL_F16 ? 6e-8 : 1e-30;
  if (memcmp(truth.counts.data(), r.counts.data(), r.counts.size())) return "counts";
  for (size_t i = 0; i < truth.sums.size(); ++i)
    if (!is_near(load(c.real_type(), &r.sums[i * c.real()]), truth.sums[i], of_sums, 0)) return "sums";
  for (size_t i = 0; i < truth.grad.size(); ++i)
    if (!is_near(load(type, &r.grad[i * kBytes[type]]), truth.grad[i], of_grad, least)) return "gradient";
  return nullptr;
}

void report(const Case& c, const char* wrong) {
  const bl_problem& p = c.problem;
  ++failures;
  printf(
      "WRONG %s (%s): logits %d cells %d target %d%s, activation %d channel0 %d, [%d, %d, %d], %d cells, %d features\n",
      wrong, blobloss_isa(), p.logits.type, p.cells.type, c.has_target ? p.target.type : -1,
      c.is_class_map ? " classes" : "", p.activation, p.channel0, static_cast<int>(p.batch),
      static_cast<int>(p.channels), static_cast<int>(p.voxels), static_cast<int>(p.num_cells), p.num_features);
}

const bl_threads kConfigurations[] = {{2, nullptr},   {3, nullptr},    {16, nullptr},
                                      {3, fake_pool}, {16, fake_pool}, {2, refusing_pool}};

void check(const char* isa, const Case& c, const Truth* truth) {
  if (!blobloss_use_isa(isa)) return;
  const Result first = compute(c, {1, nullptr}, 0xcb);
  if (first.status != c.expected) return report(c, "status");
  const char* wrong = truth ? compare(c, *truth, first) : nullptr;
  if (wrong) report(c, wrong);
  for (const bl_threads& threads : kConfigurations)
    if (!(compute(c, threads, static_cast<unsigned char>(threads.count)) == first)) report(c, "with threads");
  std::thread caller([&] {
    if (!(compute(c, {2, nullptr}, 1) == first)) report(c, "beside another caller");
  });
  if (!(compute(c, {2, fake_pool}, 2) == first)) report(c, "beside another caller");
  caller.join();
}

void check_largest_id(const Case& c) {
  const bl_volume& ids = c.cells.view;
  const int64_t grid[] = {c.problem.batch, ids.channels, c.cells.voxels, ids.batch_stride, ids.channel_stride, 1};
  const double largest = *std::max_element(c.cells.values.begin(), c.cells.values.end());
  if (static_cast<double>(blobloss_largest_id(ids.data, ids.type, 3, grid)) != largest) report(c, "largest id");
}

void check(unsigned seed, int logits_type, int cells_type, int target_kind, int64_t channels = 0) {
  Random random(seed);
  Case c;
  make_case(random, c, logits_type, cells_type, target_kind, channels);
  check_largest_id(c);
  const bool has_truth = !c.expected && !c.is_wild;
  const Truth truth = has_truth ? truth_of(c) : Truth();
  for (const char* isa : kSets) check(isa, c, has_truth ? &truth : nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 1;
  unsigned seed = 0;
  for (int round = 0; round < rounds; ++round)
    for (int logits = BL_F16; logits <= BL_F64; ++logits)
      for (int cells = BL_U8; cells <= BL_I64; ++cells)
        for (int target = -1; target < 2 * kTypes; ++target) check(seed++, logits, cells, target);
  for (const int64_t channels : {128, 256, 300})  // more classes than some types can count
    for (const int type : {BL_U8, BL_I8, BL_F32}) check(seed++, BL_F32, BL_I32, kTypes + type, channels);
  printf("%u cases on", seed);
  for (const char* isa : kSets)
    if (blobloss_use_isa(isa)) printf(" %s", isa);
  printf(": %d wrong\n", failures.load());
  return failures.load() != 0;
}
