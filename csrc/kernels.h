// Entry points. They know raw pointers, sizes and a stream; no Python, no torch, no printing.
#pragma once
#include <cstdint>

namespace lomo {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Rounding : int { nearest = 0, stochastic = 1, split = 2 };

using Status = const char*;  // nullptr: done; otherwise a static text that says what failed

struct TensorRef {
  void* param;
  const void* grad;
  void* low;  // int16, Rounding::split alone
  int64_t numel;
  int64_t offset;    // global index of the first element: sharded runs draw the same random bits
  int64_t param_id;  // < 2^32
};

// The pointers are one-element float32 in the tensors' memory space; null means 1, 1, none, no.
struct UpdateArgs {
  float lr, decay, clip_value;  // decay = 1 - lr * weight_decay; clip_value = +inf: no value clip
  uint32_t step;
  uint64_t seed;
  const float* inv_scale;
  const float* clip_coef;
  float* found_inf;   // set to 1 when a gradient is not finite, or when skip is set
  const float* skip;  // not 0: no parameter is written
};

struct GradRef {
  const void* grad;
  int64_t numel;
};

// Note [Summation order]
// The squared norm of a gradient has one declared order of additions, the same in every backend:
//   chunk   kNormChunk consecutive elements, seen as kNormChunk / kNormLanes rows of kNormLanes;
//   lane    adds the squares of its column, first row first, in fp32;
//   tree    neighbouring lanes are added in pairs, then neighbouring sums, until one is left;
//   tensor  the chunks' sums are seen as rows of kNormLanes and added the same way.
// What is missing in the last row counts as +0, which changes no bit of a sum of squares.
constexpr int kNormLanes = 2048;
constexpr int kNormChunk = 8 * kNormLanes;

// sumsq[k] = sum over gradient k of (grad * inv_scale)^2. `partials` holds one float per chunk (at
// least one chunk a gradient); it may be null when every gradient fits in one.
struct SumsqArgs {
  const float* inv_scale;
  float* found_inf;
  float* sumsq;
  float* partials;
};

// Blocks of a GPU count themselves, so that the last one adds up what all of them left. Memory of
// kTickets counters, all 0 before and after a call, that no two calls use at one time: a stream has
// its own. `fresh`: it is not set yet.
constexpr int kTickets = 512;

struct Tickets {
  uint32_t* counters;
  bool fresh;
};

// AdaLomo (adalomo.h): a tensor [batch, rows, cols], or one of less than two dimensions seen as a
// matrix of kTileCols columns.
struct AdaRef {
  void* param;
  const void* grad;
  void* low;      // int16, Rounding::split alone
  float* row;     // moments [batch, rows]; not factored: [numel]
  float* col;     // moments [batch, cols]
  int32_t* step;  // updates made
  float* sums;    // of squares of the parameter, one a tile
  int64_t batch, rows, cols, numel, param_id, factored;
};

struct AdaArgs {
  float lr, weight_decay, eps_square, eps_rms, clip_threshold, clip_value;
  uint64_t seed;
  const float* inv_scale;
  const float* clip_coef;
  float* found_inf;      // set to 1 when the update is not made
  const float* skip;     // not 0: it is not made
  const float* weights;  // of the first, second, ... update
  int64_t weights_count;
};

// Floats of scratch memory that a list needs; only shapes are looked at.
int64_t adalomo_scratch(const AdaRef*, int64_t count);

// What one rank has of a tensor: consecutive rows of a matrix, some of many matrices, a piece of a
// vector (adalomo.h, Note [Parts]). What is of the whole tensor is called so.
struct AdaPart : AdaRef {
  float *kept, *passing;  // memory for all calls; for the first alone, which all parts may share
  int64_t offset;         // global index of the first element
  int64_t whole_rows, whole_numel;
  int64_t joined;        // rows of a matrix: other ranks have more of its columns and its mean row
  int64_t slot, number;  // in the first message and in the second
};

// Floats of the two.
struct AdaSizes {
  int64_t kept, passing;
};

AdaSizes adalomo_sizes(int64_t batch, int64_t rows, int64_t cols, bool factored,
                       int64_t whole_rows);

enum class AdaCall : int { statistics = 0, squares = 1, update = 2 };

// The messages of the ranks. Each call writes this rank's sums into one of them (`statistics` the
// first, `squares` the second) and reads what was written by the calls before, by then added up
// over the ranks.
struct AdaMessages {
  float *statistics, *squares;
};

// The scalars of a step on one device: one float each, in one piece of memory.
enum Decision {
  kInvScale,
  kClipCoef,
  kFoundInf,
  kSkip,
  kTotalNorm,
  kGradScale,
  kGrowthTracker,
  kStuck,
  kDecisions
};

// lomo_kernels/ops/decide.py has the formulas.
struct DecideArgs {
  float* decisions;
  float* out;          // null: nothing about the next step is decided
  const float* sumsq;  // null: no norm
  int64_t count;
  const float* found_inf;  // flags besides the two in decisions
  int64_t flags;
  float max_norm;  // 0: clip_coef stays
  float min_scale;
  double growth_factor, backoff_factor;
  int64_t growth_interval;  // 0: the scale stays
};

namespace cpu {
Status lomo_update(const TensorRef*, int64_t count, DType param, DType grad, Rounding,
                   const UpdateArgs&, int threads);
Status grad_sumsq(const GradRef*, int64_t count, DType grad, const SumsqArgs&, int threads);
Status decide(const DecideArgs&);
Status adalomo_update(const AdaRef*, int64_t count, DType param, DType grad, Rounding,
                      const AdaArgs&, float* scratch, int threads);
Status adalomo_parts(const AdaPart*, int64_t count, DType param, DType grad, Rounding,
                     const AdaArgs&, AdaCall, const AdaMessages&, int threads);
Status adalomo_sums(const AdaRef&, DType param, int threads);

// The loops are compiled for several instruction sets; the best one this processor has is used.
const char* instruction_set();
bool use_instruction_set(const char* name);  // false: this processor or build has it not
}  // namespace cpu

namespace cuda {
Status device_count(int* count);
Status unavailable(int device);  // why the kernels cannot run there
Status lomo_update(const TensorRef*, int64_t count, DType param, DType grad, Rounding,
                   const UpdateArgs&, int device, void* stream);
Status grad_sumsq(const GradRef*, int64_t count, DType grad, const SumsqArgs&, const Tickets&,
                  int device, void* stream);
Status decide(const DecideArgs&, int device, void* stream);
Status adalomo_update(const AdaRef*, int64_t count, DType param, DType grad, Rounding,
                      const AdaArgs&, float* scratch, int device, void* stream);
Status adalomo_parts(const AdaPart*, int64_t count, DType param, DType grad, Rounding,
                     const AdaArgs&, AdaCall, const AdaMessages&, int device, void* stream);
Status adalomo_sums(const AdaRef&, DType param, int device, void* stream);
}  // namespace cuda

}  // namespace lomo
