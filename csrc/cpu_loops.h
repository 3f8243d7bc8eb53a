// The vectorised loops of the CPU backend, one set of them per instruction set.
#pragma once
#include "adalomo.h"
#include "kernels.h"
#include "lomo_update.h"
#include "philox.h"

namespace lomo::cpu {

struct Loops {
  // Updates elements [begin, end) of a tensor; false when one of their gradients is not finite.
  bool (*update)(DType param, DType grad, Rounding, const TensorRef&, int64_t begin, int64_t end,
                 const UpdateRule&, uint32_t step, const PhiloxKey&);
  // Sum of squares of one chunk of numel <= kNormChunk elements, in the declared order.
  float (*sumsq_chunk)(DType grad, const void* chunk, int64_t numel, float inv_scale, bool* finite);
  // Sum of a tensor's chunk sums, in the declared order.
  float (*sum_partials)(const float* partials, int64_t numel);
  // AdaLomo, a tile or a group of rows or columns at a time (adalomo.h, Note [Tiles]).
  void (*ada_stats)(DType grad, const AdaItem&, int64_t tile, const AdaRule&);
  void (*ada_moments)(const AdaItem&, int64_t group, const AdaRule&);
  float (*ada_row_sum)(const AdaItem&, int64_t batch);  // of the moments of a matrix's rows
  void (*ada_norm)(DType grad, const AdaItem&, int64_t tile, const AdaRule&);
  void (*ada_sums)(DType param, const AdaItem&, int64_t tile);
  void (*ada_update)(DType param, DType grad, Rounding, const AdaItem&, int64_t tile,
                     const AdaRule&, const AdaStep&, const PhiloxKey&);
};

extern const Loops loops_baseline;
#ifdef LOMO_X86_DISPATCH
extern const Loops loops_avx2;
extern const Loops loops_avx512;
#endif

}  // namespace lomo::cpu
