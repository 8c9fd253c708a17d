// The table of sums and its gradient on the CPU: one read of the logits and the cells forward, one read of the logits and
// one write backward (8 bytes per voxel each at fp32 logits and int32 cells), no temporary larger than a block.
//
// A block of 512 voxels that lie in one cell, as nearly all do, is summed without looking at its cells again; where the
// forward pass has taken note of that, the backward pass reads no cells at all. mixed_block.h has the other blocks. This
// file is compiled once for every instruction set, each time in the namespace BLOBLOSS_ISA.

#include "segment_stats.h"

#include "mixed_block.h"
#include "softmax.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

// One channel of one block.
template <typename T>
static void add_block(const bl_problem& problem, Block<T>& block, const T* z, const Cells& cells, double* table,
                      int32_t* status) {
  if (cells.uniform && cells[0] < 0) return;
  if (problem.activation == BL_NONE) {
    int32_t outside = 0;
    for (int i = 0; i < kBlock; ++i) outside |= ((z[i] < 0) | (z[i] > 1)) & (cells[i] >= 0);
    if (outside) *status |= BL_NOT_A_PROBABILITY;
  }
  const int32_t num_features = problem.num_features;
  evaluate_block(block, z, problem.features, num_features, problem.activation, static_cast<T>(problem.gamma),
                 !cells.uniform);
  if (!cells.uniform) return add_mixed_block(block.out, cells.ids, num_features, table);
  double* row = table + static_cast<int64_t>(cells[0]) * (1 + num_features);
  row[0] += kBlock;
  for (int32_t f = 0; f < num_features; ++f) row[1 + f] += block.sums[f];
}

// The gradient of one channel of one block with respect to z; coefficients [K, F].
template <typename T>
static void block_gradient(const bl_problem& problem, Block<T>& block, const T* z, const Cells& cells,
                           const T* coefficients, T* __restrict grad) {
  const int32_t num_features = problem.num_features;
  if (num_features == 0 || (cells.uniform && cells[0] < 0)) {
    for (int i = 0; i < kBlock; ++i) grad[i] = 0;
    return;
  }
  const T* row = cells.uniform ? coefficients + static_cast<int64_t>(cells[0]) * num_features : nullptr;
  evaluate_slopes(block, z, problem.features, num_features, problem.activation, static_cast<T>(problem.gamma), row,
                  grad);
  if (!cells.uniform) mixed_gradient(block.out, cells.ids, coefficients, num_features, grad);
}

// ---------------------------------------------------------------- tasks

// The first chunk of a region.
BL_INLINE int64_t first_chunk(const Plan& plan, int64_t region) {
  return plan.chunks / plan.regions * region + plan.chunks % plan.regions * region / plan.regions;
}

template <typename T>
struct Scratch {
  Block<T> block;
  alignas(64) T logits[kBlock];
  alignas(64) T grad[kBlock];
  alignas(64) int32_t cells[2 * kBlock];
};

BL_INLINE int block_size(const bl_problem& problem, int64_t start) {
  const int64_t left = problem.voxels - start;
  return left < kBlock ? static_cast<int>(left) : kBlock;
}

BL_INLINE int16_t& note_on(const bl_problem& problem, int64_t b, int64_t c, int64_t start) {
  const int64_t blocks = (problem.voxels - 1) / kBlock + 1;
  return problem.block_cells[(b * problem.channels + c) * blocks + start / kBlock];
}

// The cell in which the forward pass found a block; kNone if it did not, or took no notes.
BL_INLINE int32_t noted_cell(const bl_problem& problem, int64_t b, int64_t c, int64_t start) {
  if (!problem.block_cells) return kNone;
  const int32_t cell = note_on(problem, b, c, start) - 2;
  return cell >= -1 && cell < problem.num_cells ? cell : kNone;
}

// The cells of a block, of which the forward pass takes note.
static Cells load_and_note(const bl_problem& problem, int64_t b, int64_t c, int64_t start, int n, int32_t* buffer,
                           int32_t* status) {
  const Cells cells = load_cells(problem, b, c, start, n, buffer, status);
  const int32_t note = cells[0] < 0 ? 1 : cells[0] + 2;
  if (problem.block_cells && cells.uniform && note <= INT16_MAX)
    note_on(problem, b, c, start) = static_cast<int16_t>(note);
  return cells;
}

// The same in the backward pass, by that note if there is one.
static Cells recall_or_load(const bl_problem& problem, int64_t b, int64_t c, int64_t start, int n, int32_t* buffer) {
  const int32_t cell = noted_cell(problem, b, c, start);
  int32_t ignored_status = 0;  // the forward pass has raised
  if (cell == kNone) return load_cells(problem, b, c, start, n, buffer, &ignored_status);
  buffer[0] = cell;
  return {buffer, true};
}

// What the block at `start` reads and, with a gradient, writes; nothing if it is beyond the volume.
BL_INLINE Ahead ahead_of(const bl_problem& problem, int64_t b, int64_t c, int64_t start, const void* grad) {
  Ahead ahead;
  if (start >= problem.voxels) return ahead;
  ahead.add(problem.logits, b, c, start);
  if (!grad || noted_cell(problem, b, c, start) == kNone) {
    ahead.add(problem.cells, b, c, start);
    ahead.add(problem.target, b, c, start);
  }
  if (grad) ahead.add(grad, problem.logits.type, (b * problem.channels + c) * problem.voxels + start);
  return ahead;
}

template <typename T>
static void add_channel_block(const bl_problem& problem, Scratch<T>& scratch, int64_t group, int64_t start,
                              int64_t next, double* table, int32_t* status) {
  const int64_t b = group / problem.channels, c = group % problem.channels;
  if (problem.channel0 == BL_UNUSED && c == 0) return;
  const int n = block_size(problem, start);
  const int64_t offset = b * problem.logits.batch_stride + c * problem.logits.channel_stride + start;
  const Cells cells = load_and_note(problem, b, c, start, n, scratch.cells, status);
  const T* z = load_logits(problem.logits, offset, n, scratch.logits);
  scratch.block.ahead = ahead_of(problem, b, c, next, nullptr);
  add_block(problem, scratch.block, z, cells, table, status);
}

template <typename T>
static void write_channel_block(const bl_problem& problem, Scratch<T>& scratch, int64_t group, int64_t start,
                                const T* grad_sums, void* grad) {
  const int64_t b = group / problem.channels, c = group % problem.channels;
  const int n = block_size(problem, start);
  const int64_t to = group * problem.voxels + start;
  const bool in_place = n == kBlock && problem.logits.type == (sizeof(T) == 8 ? BL_F64 : BL_F32);
  T* out = in_place ? static_cast<T*>(grad) + to : scratch.grad;
  if (problem.channel0 == BL_UNUSED && c == 0) {
    for (int i = 0; i < kBlock; ++i) out[i] = 0;
  } else {
    const Cells cells = recall_or_load(problem, b, c, start, n, scratch.cells);
    const int64_t offset = b * problem.logits.batch_stride + c * problem.logits.channel_stride + start;
    const T* z = load_logits(problem.logits, offset, n, scratch.logits);
    const T* coefficients = grad_sums + group * problem.num_cells * problem.num_features;
    scratch.block.ahead = ahead_of(problem, b, c, start + kBlock, grad);
    block_gradient(problem, scratch.block, z, cells, coefficients, out);
  }
  if (!in_place) store_gradient(problem.logits.type, grad, to, n, out);
}

template <typename T>
static void add_softmax_block(const bl_problem& problem, Scratch<T>& scratch, Softmax<T>& softmax, int64_t b,
                              int64_t start, int64_t next, const Plan& plan, double* table, int32_t* status) {
  const int n = block_size(problem, start);
  softmax.load(problem, b, start, n);
  for (int64_t c = softmax.first(problem); c < problem.channels; ++c) {
    const Cells cells = load_and_note(problem, b, c, start, n, scratch.cells, status);
    softmax.pre_activation(c, scratch.logits);
    scratch.block.ahead = ahead_of(problem, b, c, next, nullptr);
    add_block(problem, scratch.block, scratch.logits, cells, table + c * problem.num_cells * plan.row, status);
  }
}

template <typename T>
static void write_softmax_block(const bl_problem& problem, Scratch<T>& scratch, Softmax<T>& softmax, int64_t b,
                                int64_t start, const T* grad_sums, void* grad) {
  const int n = block_size(problem, start);
  softmax.load(problem, b, start, n);
  softmax.clear_gradient();
  for (int64_t c = softmax.first(problem); c < problem.channels; ++c) {
    const Cells cells = recall_or_load(problem, b, c, start, n, scratch.cells);
    softmax.pre_activation(c, scratch.logits);
    const T* coefficients = grad_sums + (b * problem.channels + c) * problem.num_cells * problem.num_features;
    scratch.block.ahead = ahead_of(problem, b, c, start + kBlock, grad);
    block_gradient(problem, scratch.block, scratch.logits, cells, coefficients, scratch.grad);
    softmax.add_gradient(c, scratch.grad, cells);
  }
  for (int64_t c = 0; c < problem.channels; ++c) {
    softmax.gradient(c, c >= softmax.first(problem), scratch.grad);
    store_gradient(problem.logits.type, grad, (b * problem.channels + c) * problem.voxels + start, n, scratch.grad);
  }
}

template <typename T>
static int32_t forward(const bl_problem& problem, const Plan& plan, int64_t task, int64_t begin, int64_t end,
                       double* table) {
  int32_t status = 0;
  Scratch<T> scratch;
  Softmax<T> softmax(problem);
  if (!softmax.has_memory()) return BL_NO_MEMORY;
  const int64_t group = task / plan.slabs, slabs = plan.slabs / plan.regions;
  const int64_t region = task % plan.slabs / slabs;
  const int64_t first = first_chunk(plan, region) + task % slabs, last = first_chunk(plan, region + 1);
  const int64_t last_of_part = first + end * slabs < last ? first + end * slabs : last;
  for (int64_t chunk = first + begin * slabs; chunk < last_of_part; chunk += slabs) {
    const int64_t next_chunk = chunk + slabs < last ? (chunk + slabs) * kChunk : problem.voxels;
    if (status & BL_TOO_LARGE) return status;
    const int64_t stop = (chunk + 1) * kChunk < problem.voxels ? (chunk + 1) * kChunk : problem.voxels;
    for (int64_t start = chunk * kChunk; start < stop; start += kBlock) {
      const int64_t next = start + kBlock < stop ? start + kBlock : next_chunk;
      if (problem.activation == BL_SOFTMAX)
        add_softmax_block(problem, scratch, softmax, group, start, next, plan, table, &status);
      else
        add_channel_block(problem, scratch, group, start, next, table, &status);
    }
  }
  return status;
}

template <typename T>
static int32_t backward(const bl_problem& problem, const Plan& plan, int64_t begin, int64_t end,
                        const void* grad_sums, void* grad) {
  Scratch<T> scratch;
  Softmax<T> softmax(problem);
  if (!softmax.has_memory()) return BL_NO_MEMORY;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / plan.chunks, chunk = task % plan.chunks;
    const int64_t stop = (chunk + 1) * kChunk < problem.voxels ? (chunk + 1) * kChunk : problem.voxels;
    for (int64_t start = chunk * kChunk; start < stop; start += kBlock) {
      if (problem.activation == BL_SOFTMAX)
        write_softmax_block(problem, scratch, softmax, group, start, static_cast<const T*>(grad_sums), grad);
      else
        write_channel_block(problem, scratch, group, start, static_cast<const T*>(grad_sums), grad);
    }
  }
  return 0;
}

static int32_t forward_any(const bl_problem& problem, const Plan& plan, int64_t task, int64_t begin, int64_t end,
                           double* table) {
  return problem.logits.type == BL_F64 ? forward<double>(problem, plan, task, begin, end, table)
                                       : forward<float>(problem, plan, task, begin, end, table);
}

static int32_t backward_any(const bl_problem& problem, const Plan& plan, int64_t begin, int64_t end,
                            const void* grad_sums, void* grad) {
  return problem.logits.type == BL_F64 ? backward<double>(problem, plan, begin, end, grad_sums, grad)
                                       : backward<float>(problem, plan, begin, end, grad_sums, grad);
}

// ---------------------------------------------------------------- the rest

template <typename T>
static void evaluate_as(int32_t feature, int32_t activation, T gamma, const T* x, int64_t n, T* value, T* slope) {
  Block<T> block;
  alignas(64) T z[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = n - start < kBlock ? n - start : kBlock;
    for (int64_t i = 0; i < kBlock; ++i) z[i] = i < size ? x[start + i] : T(0);
    evaluate_block(block, z, &feature, 1, activation, gamma, true);
    memcpy(value + start, block.out[0], static_cast<size_t>(size) * sizeof(T));
    evaluate_slopes<T>(block, z, &feature, 1, activation, gamma, nullptr, nullptr);
    memcpy(slope + start, block.out[0], static_cast<size_t>(size) * sizeof(T));
  }
}

static void evaluate(int32_t feature, int32_t activation, double gamma, int32_t is_double, const void* x, int64_t n,
                     void* value, void* slope) {
  if (is_double)
    evaluate_as(feature, activation, gamma, static_cast<const double*>(x), n, static_cast<double*>(value),
                static_cast<double*>(slope));
  else
    evaluate_as(feature, activation, static_cast<float>(gamma), static_cast<const float*>(x), n,
                static_cast<float*>(value), static_cast<float*>(slope));
}

#define BL_STRING_OF(name) #name
#define BL_STRING(name) BL_STRING_OF(name)

extern const Passes passes;
extern const RowPasses row_passes;
extern const Kernels kernels = {BL_STRING(BLOBLOSS_ISA), forward_any, backward_any, evaluate, &passes, &row_passes};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
