// One block: the norm of all gradients, the flags, and what follows from them.
#pragma once
#include "decide.h"
#include "tables.cuh"

namespace lomo::cuda {

static_assert(kDecideLanes == kThreads, "a thread a lane");

__global__ void __launch_bounds__(kThreads) decide_kernel(const __grid_constant__ DecideArgs args) {
  __shared__ double lane[kThreads];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads) sum = sum + args.sumsq[i];
  lane[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width >= 1; width /= 2) {
    if (int(threadIdx.x) < width) sum = lane[2 * threadIdx.x] + lane[2 * threadIdx.x + 1];
    __syncthreads();
    if (int(threadIdx.x) < width) lane[threadIdx.x] = sum;
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  bool found = args.decisions[kFoundInf] != 0.0f || args.decisions[kSkip] != 0.0f;
  for (int64_t i = 0; i < args.flags; ++i) found |= args.found_inf[i] != 0.0f;
  decide(args, sum, found);
}

}  // namespace lomo::cuda
