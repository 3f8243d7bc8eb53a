// Compiled once per instruction set, with LOMO_LOOPS naming the table to define. The compiler
// vectorises the plain loops; nothing here may be instantiated outside this file (see float16.h).
#include "cpu_loops.h"

#include <type_traits>

#include "dispatch.h"

namespace lomo::cpu {
namespace {

constexpr int kBlock = 1024;  // elements; the random bits of a block stay in the first-level cache

template <typename P, typename G, Rounding R>
bool update_range(const TensorRef& tensor, int64_t begin, int64_t end, const UpdateRule& rule,
                  uint32_t step, const PhiloxKey& key) {
  auto* p = static_cast<typename P::Bits*>(tensor.param);
  auto* g = static_cast<const typename G::Bits*>(tensor.grad);
  auto* low = static_cast<int16_t*>(tensor.low);
  uint32_t words[kBlock / 2 + 4] = {};
  bool all_finite = true;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int count = int(end - block < kBlock ? end - block : kBlock);
    const uint64_t first = uint64_t(tensor.offset) + uint64_t(block);
    const int shift = int(first & 7);
    if constexpr (R == Rounding::stochastic) {
      const int groups = (shift + count + 7) / 8;
      for (int i = 0; i < groups; ++i) {
        const Philox r =
            random_group(key, step, uint32_t(tensor.param_id), (first >> 3) + uint64_t(i));
        for (int k = 0; k < 4; ++k) words[4 * i + k] = r.word[k];
      }
    }
    typename P::Bits* const pb = p + block;
    const typename G::Bits* const gb = g + block;
    int16_t* const lb = R == Rounding::split ? low + block : nullptr;
    uint32_t bad = 0;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const uint32_t at = uint32_t(i + shift);
      const uint32_t bits = R == Rounding::stochastic ? words[at >> 1] >> (16 * (at & 1)) : 0;
      int16_t unused = 0;
      bad |=
          !update_element<P, G, R>(pb[i], gb[i], R == Rounding::split ? lb[i] : unused, bits, rule);
    }
    all_finite &= bad == 0;
  }
  return all_finite;
}

template <typename P, typename G>
bool update_rounded(Rounding rounding, const TensorRef& t, int64_t begin, int64_t end,
                    const UpdateRule& rule, uint32_t step, const PhiloxKey& key) {
  if constexpr (sizeof(typename P::Bits) == 2) {
    if (rounding == Rounding::stochastic)
      return update_range<P, G, Rounding::stochastic>(t, begin, end, rule, step, key);
  }
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (rounding == Rounding::split)
      return update_range<P, G, Rounding::split>(t, begin, end, rule, step, key);
  }
  return update_range<P, G, Rounding::nearest>(t, begin, end, rule, step, key);
}

bool update(DType param, DType grad, Rounding rounding, const TensorRef& t, int64_t begin,
            int64_t end, const UpdateRule& rule, uint32_t step, const PhiloxKey& key) {
  return dispatch_pair(param, grad, [&](auto p, auto g) {
    return update_rounded<decltype(p), decltype(g)>(rounding, t, begin, end, rule, step, key);
  });
}

float add_neighbours(float (&sums)[kNormLanes]) {
  float halved[kNormLanes / 2];
  float *from = sums, *to = halved;
  for (int width = kNormLanes / 2; width >= 1; width /= 2) {
#pragma GCC ivdep
    for (int i = 0; i < width; ++i) to[i] = from[2 * i] + from[2 * i + 1];
    float* swap = from;
    from = to;
    to = swap;
  }
  return from[0];
}

template <typename G>
float sumsq_chunk_of(const void* chunk, int64_t numel, float inv_scale, bool* finite) {
  auto* g = static_cast<const typename G::Bits*>(chunk);
  float lanes[kNormLanes] = {};
  uint32_t bad = 0;
  for (int64_t row = 0; row < numel; row += kNormLanes) {
    const int count = int(numel - row < kNormLanes ? numel - row : kNormLanes);
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const float stored = G::load(g[row + i]);
      const float x = stored * inv_scale;
      bad |= !is_finite(stored);
      lanes[i] = lanes[i] + x * x;
    }
  }
  if (bad) *finite = false;
  return add_neighbours(lanes);
}

float sumsq_chunk(DType grad, const void* chunk, int64_t numel, float inv_scale, bool* finite) {
  return dispatch(
      grad, [&](auto g) { return sumsq_chunk_of<decltype(g)>(chunk, numel, inv_scale, finite); });
}

float sum_partials(const float* partials, int64_t numel) {
  float lanes[kNormLanes] = {};
  for (int64_t row = 0; row < numel; row += kNormLanes) {
    const int count = int(numel - row < kNormLanes ? numel - row : kNormLanes);
    for (int i = 0; i < count; ++i) lanes[i] = lanes[i] + partials[row + i];
  }
  return add_neighbours(lanes);
}

}  // namespace

const Loops LOMO_LOOPS = {update, sumsq_chunk, sum_partials};

}  // namespace lomo::cpu
