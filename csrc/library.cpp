// The C interface: picks the kernels for this machine, cuts a problem into tasks, adds up their tables.

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "blobloss.h"
#include "segment_stats.h"
#include "threads.h"

namespace blobloss {
namespace {

constexpr int64_t kRegions = 4;          // of a volume, where it has as many slabs
constexpr int64_t kMostTables = 16;      // of all groups together, where there are enough voxels
constexpr int64_t kVoxelsPerCell = 32;   // of a slab: below that its table would cost more than its voxels
constexpr int64_t kParallelEntries = 4096;
constexpr int64_t kParallelVoxels = 32768;  // about 15 us of work

// The kernels of an instruction set, null where it was not compiled or this machine has not got it.
const Kernels* kernels_of(const char* isa) {
#if defined(BLOBLOSS_HAS_AVX512)
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   kernels_of("avx2")
               ? &avx512::kernels
               : nullptr;
#endif
#if defined(BLOBLOSS_HAS_AVX2)
  if (!strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                   __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")
               ? &avx2::kernels
               : nullptr;
#endif
  return strcmp(isa, "baseline") ? nullptr : &baseline::kernels;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{kernels_of("avx512") ? kernels_of("avx512")
                                             : kernels_of("avx2") ? kernels_of("avx2")
                                                                  : kernels_of("baseline")};
  return kernels;
}

bl_threads threads_of(const bl_problem& problem) {
  return threads_for(problem.threads, problem.batch * problem.channels * problem.voxels, kParallelVoxels);
}

Plan plan_for(const bl_problem& problem) {
  Plan plan;
  const bool together = problem.activation == BL_SOFTMAX;
  plan.groups = together ? problem.batch : problem.batch * problem.channels;
  plan.channels = together ? problem.channels : 1;
  plan.row = 1 + problem.num_features;
  plan.chunks = (problem.voxels + kChunk - 1) / kChunk;
  int64_t most = problem.voxels / (kVoxelsPerCell * problem.num_cells);
  if (plan.chunks < most) most = plan.chunks;
  plan.slabs = 1;
  while (2 * plan.slabs <= most && 2 * plan.slabs * plan.groups <= kMostTables) plan.slabs *= 2;
  plan.regions = plan.slabs < kRegions ? plan.slabs : kRegions;
  return plan;
}

void clear_notes(const bl_problem& problem) {
  const int64_t blocks = (problem.voxels + BLOBLOSS_BLOCK - 1) / BLOBLOSS_BLOCK;
  const int64_t eights = (problem.batch * problem.channels * blocks + 3) / 4;  // of bytes
  memset(problem.block_cells, 0, static_cast<size_t>(8 * eights));
}

// Adds up the tables of a group's slabs, in their order, in the first of them, and copies out what is there then.
template <typename T>
void combine(const bl_threads& threads, const bl_problem& problem, const Plan& plan, double* tables, int64_t* counts,
             T* sums) {
  const int64_t cells = plan.channels * problem.num_cells, slab = cells * plan.row;
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin / cells; group * cells < end; ++group) {
      const int64_t first = begin > group * cells ? begin : group * cells;
      const int64_t last = end < (group + 1) * cells ? end : (group + 1) * cells;
      double* __restrict row = tables + group * plan.slabs * slab + (first - group * cells) * plan.row;
      for (int64_t s = 1; s < plan.slabs; ++s) {
        const double* __restrict other = row + s * slab;
        for (int64_t j = 0; j < (last - first) * plan.row; ++j) row[j] += other[j];
      }
      for (int64_t entry = first; entry < last; ++entry, row += plan.row) {
        counts[entry] = static_cast<int64_t>(row[0]);
        for (int64_t j = 1; j < plan.row; ++j) sums[entry * (plan.row - 1) + j - 1] = static_cast<T>(row[j]);
      }
    }
  };
  const int64_t entries = plan.groups * cells;
  run_parallel(threads_for(threads, entries, kParallelEntries), entries, add);
}

// A copy of grad_sums times the scales, null without memory.
template <typename T>
void* multiply(const bl_problem& problem, const void* grad_sums, const void* scales, int64_t num_scales) {
  const int64_t pairs = problem.batch * problem.channels, size = problem.num_cells * problem.num_features;
  T* scaled = static_cast<T*>(malloc(static_cast<size_t>(pairs * size + 1) * sizeof(T)));
  for (int64_t pair = 0; pair < pairs && scaled; ++pair) {
    const T scale = static_cast<const T*>(scales)[num_scales > 1 ? pair : 0];
    const T* from = static_cast<const T*>(grad_sums) + pair * size;
    for (int64_t i = 0; i < size; ++i) scaled[pair * size + i] = from[i] * scale;
  }
  return scaled;
}

// No read depends on another, so that many are under way at a time: where they are far apart, each waits for memory.
template <typename I>
int64_t largest_id(const I* ids, int32_t axes, const int64_t* sizes, const int64_t* strides) {
  if (axes == 0) return static_cast<int64_t>(*ids);
  int64_t most = INT64_MIN;
  for (int64_t i = 0; i < sizes[0]; ++i) {
    const int64_t other = largest_id(ids + i * strides[0], axes - 1, sizes + 1, strides + 1);
    most = other > most ? other : most;
  }
  return most;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace blobloss

using namespace blobloss;

extern "C" {

int32_t blobloss_abi(void) { return BLOBLOSS_ABI; }

const char* blobloss_isa(void) { return kernels().name; }

int32_t blobloss_use_isa(const char* isa) {
  const Kernels* const wanted = kernels_of(isa);
  if (wanted) chosen().store(wanted, std::memory_order_relaxed);
  return wanted != nullptr;
}

int32_t blobloss_segment_stats_forward(const bl_problem* problem, int64_t* counts, void* sums) {
  const Plan plan = plan_for(*problem);
  const int64_t tasks = plan.groups * plan.slabs;
  const size_t table = static_cast<size_t>(plan.channels * problem->num_cells * plan.row);
  const size_t size = static_cast<size_t>(tasks) * table + 1;
  // Tables with many voxels for a row are cleared by the threads that fill them, into their caches. Of others, pages that
  // no voxel needs are better never written.
  const bool is_dense = problem->voxels >= kVoxelsPerCell * problem->num_cells;
  double* tables = static_cast<double*>(is_dense ? malloc(size * sizeof(double)) : calloc(size, sizeof(double)));
  if (!tables) return BL_NO_MEMORY;
  if (problem->block_cells) clear_notes(*problem);
  std::atomic<int32_t> status{0};
  const bl_threads threads = threads_of(*problem);
  const int64_t length = (plan.chunks - 1) / plan.slabs + 1;
  const int64_t part = part_of(threads, tasks * length);
  run_strands(threads, tasks, length, part, [&](int64_t task, int64_t begin, int64_t end) {
    if (status.load(std::memory_order_relaxed) & BL_TOO_LARGE) return;  // the caller may try again, and soon
    if (is_dense && begin == 0) memset(tables + task * table, 0, table * sizeof(double));
    const int32_t found = kernels().forward(*problem, plan, task, begin, end, tables + task * table);
    if (found) status.fetch_or(found);
  });
  if (!status.load()) {  // otherwise there may be tables that nobody has cleared
    if (problem->logits.type == BL_F64)
      combine(problem->threads, *problem, plan, tables, counts, static_cast<double*>(sums));
    else
      combine(problem->threads, *problem, plan, tables, counts, static_cast<float*>(sums));
  }
  free(tables);
  return status.load();
}

int32_t blobloss_segment_stats_backward(const bl_problem* problem, const void* grad_sums, const void* scales,
                                        int64_t num_scales, void* grad) {
  const Plan plan = plan_for(*problem);
  void* scaled = nullptr;
  if (num_scales) {
    scaled = problem->logits.type == BL_F64 ? multiply<double>(*problem, grad_sums, scales, num_scales)
                                            : multiply<float>(*problem, grad_sums, scales, num_scales);
    if (!scaled) return BL_NO_MEMORY;
    grad_sums = scaled;
  }
  std::atomic<int32_t> status{0};
  run_parallel(threads_of(*problem), plan.groups * plan.chunks, [&](int64_t begin, int64_t end) {
    const int32_t found = kernels().backward(*problem, plan, begin, end, grad_sums, grad);
    if (found) status.fetch_or(found);
  });
  free(scaled);
  return status.load();
}

int32_t blobloss_loss(const bl_problem* problem, int64_t* counts, void* sums, const bl_finish* arguments) {
  const int32_t status = blobloss_segment_stats_forward(problem, counts, sums);
  if (status || arguments->grad_sums != sums) return status ? status : blobloss_finish(arguments);
  const int64_t entries = problem->batch * problem->channels * problem->num_cells * problem->num_features;
  const size_t size = static_cast<size_t>(entries) * (arguments->is_double ? sizeof(double) : sizeof(float));
  void* copy = malloc(size + 1);
  if (!copy) return BL_NO_MEMORY;
  memcpy(copy, sums, size);
  bl_finish apart = *arguments;
  apart.sums = copy;
  const int32_t finished = blobloss_finish(&apart);
  free(copy);
  return finished;
}

int64_t blobloss_largest_id(const void* ids, int32_t type, int32_t axes, const int64_t* grid) {
  const int64_t* const strides = grid + axes;
  switch (type) {
    case BL_U8: return largest_id(static_cast<const uint8_t*>(ids), axes, grid, strides);
    case BL_I8: return largest_id(static_cast<const int8_t*>(ids), axes, grid, strides);
    case BL_I16: return largest_id(static_cast<const int16_t*>(ids), axes, grid, strides);
    case BL_I32: return largest_id(static_cast<const int32_t*>(ids), axes, grid, strides);
    default: return largest_id(static_cast<const int64_t*>(ids), axes, grid, strides);
  }
}

void blobloss_evaluate(int32_t feature, int32_t activation, double gamma, int32_t is_double, const void* x, int64_t n,
                       void* value, void* slope) {
  kernels().evaluate(feature, activation, gamma, is_double, x, n, value, slope);
}

}  // extern "C"
