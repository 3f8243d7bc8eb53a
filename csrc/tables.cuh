// A list of tensors as a kernel argument: one launch serves many small tensors, nothing is copied
// to the device beforehand, and a captured graph keeps its own copy. And vectors of elements.
#pragma once
#include "kernels.h"

namespace lomo::cuda {

constexpr int kThreads = 256;

// Kernel arguments may take 32,764 bytes (CUDA 12.1 and later, sm_70 and later).
constexpr int kMany = 512;
// All of them are copied for every launch: lists of a few tensors have a table of their own.
constexpr int kFew = 32;

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
