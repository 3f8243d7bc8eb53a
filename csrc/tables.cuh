// A list of tensors as a kernel argument: one launch serves many small tensors, nothing is copied
// to the device beforehand, and a captured graph keeps its own copy. And vectors of elements.
#pragma once
#include <cstddef>

#include "kernels.h"

namespace lomo::cuda {

// The sizes of launches, and why.
struct Launch {
  // The orders of sums are written for eight warps, whose sums a thread adds (grad_sumsq.cuh); and
  // with up to 96 registers two such blocks fit on a multiprocessor.
  static constexpr int kThreads = 256;
  // Of kernel arguments, from CUDA 12.1 and sm_70 on.
  static constexpr size_t kArgumentBytes = 32764;
  // Tensors in a table: what arguments hold of updates (60 bytes each) and of norms.
  static constexpr int kMany = 512;
  // A whole table is copied for every launch: a few tensors have one of 2 KB instead of 30 KB.
  static constexpr int kFew = 32;
  // Likewise of AdaLomo's tensors, which have 236 bytes each.
  static constexpr int kAdaMany = 128, kAdaFew = 8;
  // Vectors of 16 bytes of parameter that a thread updates, so that what it does once is shared by
  // 16 elements: 16 instead of 22 instructions for each. No loop over the grid: with a block per 8
  // KiB of parameter the scheduler keeps enough loads in flight.
  static constexpr int kUpdateVectors = 2;
  // Bytes that a thread of AdaLomo's first sweep has asked for before it adds.
  static constexpr int kStatsBytes = 64;
  // Rows of a tile in AdaLomo's third sweep: one row's loads would not cover their latency.
  static constexpr int kAdaRows = 2;
  // Of a grid's first dimension.
  static constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
};
constexpr int kThreads = Launch::kThreads;

template <typename Item, int kCapacity>
struct Table {
  static constexpr int capacity = kCapacity;
  Item item[kCapacity];
  uint32_t first_block[kCapacity];  // of each item; ascending
  int count;

  __device__ int find(uint32_t block) const {
    if constexpr (kCapacity == 1) return 0;
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_block[middle] <= block)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

// A vector is kCount consecutive elements of kWidth bytes, held as 32-bit words.
template <int kWidth, int kCount>
struct Vector {
  static constexpr int kBytes = kWidth * kCount, kAccess = kBytes < 16 ? kBytes : 16;
  static_assert(kBytes == 8 || kBytes % 16 == 0);
  uint32_t word[kBytes / 4];

  static __device__ __forceinline__ bool aligned(const void* address) {
    return (reinterpret_cast<uintptr_t>(address) & (kAccess - 1)) == 0;
  }

  // Element k in the low bits; what is above is not part of it.
  __device__ __forceinline__ uint32_t operator[](int k) const {
    return kWidth == 4 ? word[k] : word[k / 2] >> (16 * (k & 1));
  }

  // For k ascending from 0: setting the first element of a word clears the second.
  __device__ __forceinline__ void set(int k, uint32_t bits) {
    if (kWidth == 4)
      word[k] = bits;
    else
      word[k / 2] = k & 1 ? word[k / 2] | bits << 16 : bits & 0xffff;
  }

  // __ldcs: bytes that are read for the last time should be the first to leave the cache.
  template <bool kLast = true>
  __device__ __forceinline__ void load(const void* from) {
    if constexpr (kBytes == 8) {
      auto* at = static_cast<const uint2*>(from);
      const uint2 v = kLast ? __ldcs(at) : *at;
      word[0] = v.x, word[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        auto* at = static_cast<const uint4*>(from) + i;
        const uint4 v = kLast ? __ldcs(at) : *at;
        word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
      }
    }
  }

  __device__ __forceinline__ void store(void* to) const {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint32_t* v = &word[4 * i];
#ifdef __CUDA_ARCH__
      // nvcc split the plain assignment of a uint4 into four stores in some of the kernels.
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(static_cast<uint4*>(to) + i), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                   : "memory");
#else
      static_cast<uint4*>(to)[i] = {v[0], v[1], v[2], v[3]};
#endif
    }
  }
};

}  // namespace lomo::cuda
