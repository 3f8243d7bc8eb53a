// The squared norm of gradients in one read, in the declared order (kernels.h, Note [Summation
// order]): the same bits whatever the grid. One launch: the last block of a tensor to end adds up
// the sums of its chunks.
#pragma once
#include "lomo_update.h"
#include "tables.cuh"

namespace lomo::cuda {

constexpr int kLanesPerThread = kNormLanes / kThreads;
static_assert(kLanesPerThread == 8 && kThreads == 256, "the sums are written for these");

// One block a chunk.
__host__ __device__ inline int64_t blocks_of(const GradRef& t) {
  return t.numel <= kNormChunk ? 1 : (t.numel + kNormChunk - 1) / kNormChunk;
}

// Adds neighbours in pairs: over a warp, over the threads of the block,
// over eight lanes of each of them. Adding across a warp with xor gives both partners left +
// right or right + left: the same bits.
__device__ __forceinline__ float add_warp(float sum) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    sum = sum + __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

__device__ __forceinline__ float add_eight(const float (&lane)[8]) {
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// All threads have the sum.
__device__ __forceinline__ float add_threads(float sum) {
  sum = add_warp(sum);
  __shared__ float warp[kThreads / 32];
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = sum;
  __syncthreads();
  return add_eight(warp);
}

__device__ __forceinline__ float add_lanes(const float (&lane)[kLanesPerThread]) {
  return add_threads(add_eight(lane));
}

// The sum of a tensor's chunks.
__device__ __forceinline__ float add_partials(const float* partials, int64_t chunks) {
  float lane[kLanesPerThread] = {};
  for (int64_t row = 0; row < chunks; row += kNormLanes) {
#pragma unroll
    for (int i = 0; i < kLanesPerThread; ++i) {
      const int64_t at = row + threadIdx.x * kLanesPerThread + i;
      lane[i] = lane[i] + (at < chunks ? partials[at] : 0.0f);
    }
  }
  return add_lanes(lane);
}

// Whether all of `count` blocks have written what thread 0 of each wrote before the call; all
// threads of the last one know, and may read it. The counter is 0 again afterwards.
__device__ __forceinline__ bool is_last_block(uint32_t* counter, uint32_t count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // what it wrote is seen by all before the counter
    last = atomicInc(counter, count - 1) == count - 1;
    __threadfence();  // and nothing is read before it
  }
  __syncthreads();
  return last;
}

template <typename G, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    sumsq_chunk_kernel(const __grid_constant__ Table<GradRef, kCapacity> table,
                       const float* inv_scale_pointer, float* found_inf, float* partials,
                       float* sumsq, uint32_t* counters) {
  using Bits = typename G::Bits;
  static_assert(sizeof(Table<GradRef, kCapacity>) + 64 < Launch::kArgumentBytes);
  constexpr int kRows = kNormChunk / kNormLanes;
  const int k = table.find(blockIdx.x);
  const GradRef& t = table.item[k];
  const int64_t begin = int64_t(blockIdx.x - table.first_block[k]) * kNormChunk;
  const int64_t left = t.numel - begin;
  auto* g = static_cast<const Bits*>(t.grad) + begin + threadIdx.x * kLanesPerThread;

  Vector<sizeof(Bits), kLanesPerThread> rows[kRows];
  if (left >= kNormChunk && rows[0].aligned(g)) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) rows[row].load(g + row * kNormLanes);
  } else {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kLanesPerThread; ++i) {
        const int at = row * kNormLanes + int(threadIdx.x) * kLanesPerThread + i;
        rows[row].set(i, at < left ? g[row * kNormLanes + i] : 0);
      }
    }
  }
  const float inv_scale = inv_scale_pointer ? *inv_scale_pointer : 1.0f;
  float lane[kLanesPerThread] = {};
  bool finite = true;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kLanesPerThread; ++i) {
      const float stored = G::load(rows[row][i]);
      const float x = stored * inv_scale;
      finite &= is_finite(stored);
      lane[i] = lane[i] + x * x;
    }
  }
  if (!finite && found_inf) *found_inf = 1.0f;
  const float sum = add_lanes(lane);
  if (t.numel <= kNormChunk) {
    if (threadIdx.x == 0) sumsq[k] = sum;
    return;
  }
  const int64_t chunks = blocks_of(t);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
  if (!is_last_block(&counters[k], uint32_t(chunks))) return;
  const float total = add_partials(partials + table.first_block[k], chunks);
  if (threadIdx.x == 0) sumsq[k] = total;
}

}  // namespace lomo::cuda
