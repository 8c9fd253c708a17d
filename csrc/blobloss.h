// The C interface of the native library: what kernels/native.py calls through ctypes. Plain C types only, so that the
// library works with any version of Python and PyTorch. Change BLOBLOSS_ABI with every change of this file.
#pragma once

#include <stdint.h>

#define BLOBLOSS_ABI 6
#define BLOBLOSS_BLOCK 512  // voxels that are looked at together
#define BLOBLOSS_MAX_FEATURES 6

#if defined(_WIN32)
#define BLOBLOSS_EXPORT __declspec(dllexport)
#else
#define BLOBLOSS_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The order of these enumerators is that of the tuples in kernels/layout.py and kernels/native.py.
enum bl_type { BL_F16, BL_BF16, BL_F32, BL_F64, BL_BOOL, BL_U8, BL_I8, BL_I16, BL_I32, BL_I64 };
enum bl_feature { BL_PROB, BL_PROB_SQ, BL_NLL_POS, BL_NLL_NEG, BL_FOCAL_POS, BL_FOCAL_NEG };
enum bl_activation { BL_SIGMOID, BL_SOFTMAX, BL_NONE };
enum bl_masking { BL_EXCLUDE, BL_ZERO_PROB, BL_ZERO_LOGIT, BL_MASK_NONE, BL_ZONES };
enum bl_channel0 { BL_CLASS, BL_BACKGROUND, BL_UNUSED };
enum bl_reduction { BL_MEAN, BL_NO_REDUCTION, BL_SUM, BL_TERMS, BL_INSTANCES };

// What a call returns: 0, or any of these together; whatever is not 0 leaves the results undefined.
enum bl_status {
  BL_TOO_LARGE = 1,
  BL_NOT_BINARY = 2,
  BL_NOT_A_CLASS = 4,
  BL_NOT_A_PROBABILITY = 8,
  BL_NO_MEMORY = 16,
  BL_TOO_MANY_RUNS = 32,
};

// libtorch's torch_parallel_for: calls body for parts of [begin, end), returns 0 if it could.
typedef int32_t (*bl_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                   void* context);

// How many threads, and whose. Without parallel_for the library starts its own.
struct bl_threads {
  int64_t count;
  bl_parallel_for parallel_for;  // may be null
};

// A volume [B, C, V] whose V voxels lie side by side; strides in elements. One channel may serve all (stride 0).
struct bl_volume {
  const void* data;  // null: there is none
  int64_t batch_stride;
  int64_t channel_stride;
  int32_t type;      // bl_type
  int32_t channels;  // of the tensor itself: 1 where one serves all
};

struct bl_problem {
  struct bl_volume logits;
  struct bl_volume cells;   // integers; below 0 is ignored
  struct bl_volume target;  // optional: the cell is then 2 * cells + bit; one channel for many is a class map
  int64_t batch;
  int64_t channels;
  int64_t voxels;
  int64_t num_cells;
  double gamma;
  int32_t activation;  // bl_activation
  int32_t channel0;    // bl_channel0
  int32_t num_features;
  int32_t features[BLOBLOSS_MAX_FEATURES];  // bl_feature
  struct bl_threads threads;
  // What the forward pass tells the backward pass, which then need not read the labels of most voxels: for every block
  // of a sample and channel, the cell in which it lies plus 2 (1 where it is ignored), or 0 if it does not know of one.
  // [B, C, ceil(V / BLOBLOSS_BLOCK)], and room up to a multiple of four entries, all of which it writes; may be null.
  int16_t* block_cells;
};

// From the table to the loss and to the gradient of the table; kernels/finish.py says what each option means.
struct bl_finish {
  const int64_t* counts;     // [B, C, K]
  const void* sums;          // [B, C, K, F], double or float
  const double* main_rows;   // num_main_rows rows as in kernels/layout.py
  const double* blob_rows;
  const double* empty_rows;  // of domains without a positive voxel
  const void* weights;       // of the instances, [B, C, N], in the type of the sums; null stands for ones
  const void* grad;          // gradient of the value, in the type of the sums; null stands for ones
  void* value;               // may be null
  void* grad_sums;           // [B, C, K, F]; may be null
  int64_t num_main_rows;
  int64_t num_blob_rows;
  int64_t num_empty_rows;
  int64_t batch;
  int64_t channels;
  int64_t num_cells;
  double gamma;
  double main_weight;
  double blob_weight;
  int32_t is_double;
  int32_t has_target;
  int32_t activation;
  int32_t masking;
  int32_t channel0;
  int32_t reduction;  // bl_reduction
  int32_t num_features;
  int32_t features[BLOBLOSS_MAX_FEATURES];
  struct bl_threads threads;
};

// The nearest instance of every voxel; kernels/zones.py says what that means.
struct bl_zones {
  struct bl_volume instances;  // integers; above 0 is an instance, below 0 is ignored
  int64_t batch;
  int64_t channels;
  int64_t size[3];     // z, y, x; where there are fewer axes, those that are missing have 1
  int64_t weights[3];  // the squared spacings; no squared distance in the volume reaches 2^62
  int32_t* zones;      // dense [B, C, V]
  struct bl_threads threads;
};

// The instances of a target: the connected components of every sample and channel alone.
struct bl_labelling {
  struct bl_volume target;  // BL_F32 and later types; one channel for many is a class map
  int64_t* counts;          // [B, R]; R is 1 for a softmax of two channels, C otherwise
  int64_t batch;
  int64_t channels;  // C, of the logits
  int64_t depth;     // V = depth * height * width
  int64_t height;
  int64_t width;
  int64_t ignore;  // the ignored value, where there is one; its ids are -1
  int32_t has_ignore;
  int32_t is_class_map;
  int32_t is_softmax;      // channel 0 has no instances
  int32_t differing_axes;  // 1, 2 or 3: in how many axes the places of two neighbours may differ
  struct bl_threads threads;
};

BLOBLOSS_EXPORT int32_t blobloss_abi(void);

// The instruction set that the kernels run on here: "avx512", "avx2" or "baseline".
BLOBLOSS_EXPORT const char* blobloss_isa(void);

// For tests: run on another instruction set from now on. Returns 0 where this machine or this build has not got it.
BLOBLOSS_EXPORT int32_t blobloss_use_isa(const char* isa);

// counts [B, C, K] and sums [B, C, K, F] (double for double logits, float otherwise), every entry written.
BLOBLOSS_EXPORT int32_t blobloss_segment_stats_forward(const struct bl_problem* problem, int64_t* counts, void* sums);

// The gradient of the logits, dense [B, C, V] in their type, every entry written; grad_sums as sums. It is multiplied by
// `scales`, in the type of the sums: none, one, or one for every sample and channel.
BLOBLOSS_EXPORT int32_t blobloss_segment_stats_backward(const struct bl_problem* problem, const void* grad_sums,
                                                        const void* scales, int64_t num_scales, void* grad);

BLOBLOSS_EXPORT int32_t blobloss_finish(const struct bl_finish* arguments);

// blobloss_segment_stats_forward into counts and sums, which `arguments` names as well, then blobloss_finish. Here its
// grad_sums may be the same memory as sums, which they then replace.
BLOBLOSS_EXPORT int32_t blobloss_loss(const struct bl_problem* problem, int64_t* counts, void* sums,
                                      const struct bl_finish* arguments);

// The largest id of a view: `grid` holds its `axes` sizes, then as many strides in elements. INT64_MIN if it is empty.
BLOBLOSS_EXPORT int64_t blobloss_largest_id(const void* ids, int32_t type, int32_t axes, const int64_t* grid);

// Every entry of the zones is written; BL_TOO_LARGE is for ids that they cannot hold.
BLOBLOSS_EXPORT int32_t blobloss_nearest_instance(const struct bl_zones* arguments);

// Finds the instances and counts them. BL_NOT_BINARY, BL_NOT_A_CLASS: a voxel is neither known nor ignored.
// BL_TOO_MANY_RUNS: a sample and channel has 2^31 or more stretches of foreground voxels along its last axis.
// Unless something is wrong, `found` is for blobloss_write_components, which must be called once.
BLOBLOSS_EXPORT int32_t blobloss_find_components(const struct bl_labelling* arguments, void** found);

// Writes ids [B, R, V], every entry, from 1 in the order of their first voxels, as BL_I32 or, where all counts fit into it,
// BL_I16; with null instead of ids nothing is written. Frees what was found.
BLOBLOSS_EXPORT void blobloss_write_components(void* found, void* ids, int32_t type);

// For tests: one feature and its derivative at n logits, in float or double.
BLOBLOSS_EXPORT void blobloss_evaluate(int32_t feature, int32_t activation, double gamma, int32_t is_double,
                                       const void* x, int64_t n, void* value, void* slope);

#ifdef __cplusplus
}
#endif
