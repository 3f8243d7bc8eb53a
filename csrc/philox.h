// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): four random words from (counter, key), no state.
#pragma once
#include "float16.h"

namespace lomo {

LOMO_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // nvcc makes more than one instruction of the plain expression
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

struct Philox {
  uint32_t word[4];
};

// The key of every round, made once: on the device they are constants beside the instructions.
struct PhiloxKey {
  uint32_t round[10][2];

  PhiloxKey() = default;
  explicit PhiloxKey(uint64_t seed) {
    for (uint32_t i = 0; i < 10; ++i) {
      round[i][0] = uint32_t(seed) + i * 0x9E3779B9u;
      round[i][1] = uint32_t(seed >> 32) + i * 0xBB67AE85u;
    }
  }
};

LOMO_HD Philox philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                             const PhiloxKey& key) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int i = 0; i < 10; ++i) {
    const uint64_t a = wide_product(0xD2511F53u, c0), b = wide_product(0xCD9E8D57u, c2);
    c0 = uint32_t(b >> 32) ^ c1 ^ key.round[i][0];
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ key.round[i][1];
    c3 = uint32_t(a);
  }
  return {{c0, c1, c2, c3}};
}

// Which random bits an element draws depends on its global index, the step and the parameter alone,
// never on threads, blocks or shards: eight consecutive elements share one call.
LOMO_HD Philox random_group(const PhiloxKey& key, uint32_t step, uint32_t param_id,
                            uint64_t group) {
  return philox4x32_10(uint32_t(group), uint32_t(group >> 32), step, param_id, key);
}

// Sixteen bits for one element: word (element & 7) >> 1, low half first; what is above is not used.
LOMO_HD uint32_t random_element(const PhiloxKey& key, uint32_t step, uint32_t param_id,
                                uint64_t element) {
  const Philox r = random_group(key, step, param_id, element >> 3);
  const uint32_t low = element & 2 ? r.word[1] : r.word[0];
  const uint32_t high = element & 2 ? r.word[3] : r.word[2];
  return (element & 4 ? high : low) >> (16 * uint32_t(element & 1));
}

}  // namespace lomo
