// The maths of one element (README, "The maths"), for host and device alike.
#pragma once
#include "float16.h"
#include "kernels.h"

namespace lomo {

// min and max of which a NaN comes out when x is one; std::min and fmin would lose it.
LOMO_HD float smaller(float x, float limit) {
#ifdef __CUDA_ARCH__
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
  return y;
#else
  return x > limit ? limit : x;
#endif
}

LOMO_HD float greater(float x, float limit) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
  return y;
#else
  return x < limit ? limit : x;
#endif
}

// Of a gradient as it is stored to the one that is used. Every operation, here and below, rounds
// once: the build forbids contraction into fused multiply-adds, so that all backends agree in every
// bit.
struct Clipping {
  float inv_scale, clip_value, clip_coef;

  LOMO_HD float operator()(float g) const {
    g = greater(smaller(g * inv_scale, clip_value), -clip_value);
    return g * clip_coef;
  }
};

LOMO_HD Clipping clipping_of(const float* inv_scale, float clip_value, const float* clip_coef) {
  return {inv_scale ? *inv_scale : 1.0f, clip_value, clip_coef ? *clip_coef : 1.0f};
}

// p <- p * decay - lr * (clamp(g * inv_scale) * clip_coef)
struct UpdateRule {
  float lr, decay;
  Clipping clip;

  LOMO_HD float operator()(float p, float g) const { return p * decay - lr * clip(g); }
};

LOMO_HD UpdateRule rule_of(const UpdateArgs& args) {
  return {args.lr, args.decay, clipping_of(args.inv_scale, args.clip_value, args.clip_coef)};
}

// A stored parameter as a float, and a float as the next bits of a stored parameter. `random` is
// read by Rounding::stochastic alone, `low` read and written by Rounding::split alone.
template <typename P, Rounding R>
LOMO_HD float master_of(uint32_t p, int16_t low) {
  return R == Rounding::split ? merge(p, low) : P::load(p);
}

template <typename P, Rounding R>
LOMO_HD typename P::Bits stored(float master, int16_t& low, uint32_t random) {
  if constexpr (R == Rounding::split) {
    low = split_low(master);
    return split_high(master);
  } else {
    return R == Rounding::stochastic ? P::stochastic(master, random) : P::nearest(master);
  }
}

// The next bits of one stored element whose gradient is finite.
template <typename P, typename G, Rounding R>
LOMO_HD typename P::Bits update_finite(uint32_t p, uint32_t g, int16_t& low, uint32_t random,
                                       const UpdateRule& rule) {
  return stored<P, R>(rule(master_of<P, R>(p, low), G::load(g)), low, random);
}

// Updates one stored element and says whether its gradient was finite; if not, the element keeps
// its bits.
template <typename P, typename G, Rounding R>
LOMO_HD bool update_element(typename P::Bits& p, typename G::Bits g, int16_t& low, uint32_t random,
                            const UpdateRule& rule) {
  int16_t next_low = low;
  const typename P::Bits next = update_finite<P, G, R>(p, g, next_low, random, rule);
  const bool finite = is_finite(G::load(g));
  p = finite ? next : p;
  if constexpr (R == Rounding::split) low = finite ? next_low : low;
  return finite;
}

}  // namespace lomo
