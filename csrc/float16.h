// 16-bit floats as bit patterns, and the three ways to round an fp32 value into them.
//
// Every function here is exact or rounds once, so g++ and nvcc agree in every bit (the payload of a
// NaN excepted). On the device the conversions are single instructions where the hardware has them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LOMO_HD __host__ __device__ __forceinline__
#else
// always_inline: cpu_loops.cpp is compiled once per instruction set, and the linker would keep one
// arbitrary copy of an out-of-line function for all of them.
#define LOMO_HD inline __attribute__((always_inline))
#endif

namespace lomo {

LOMO_HD uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

LOMO_HD float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

LOMO_HD bool is_finite(float x) { return std::fabs(x) < INFINITY; }

LOMO_HD uint32_t at_most(uint32_t a, uint32_t limit) { return a < limit ? a : limit; }

// A format names how a stored element is read and written:
//   load(bits) -> float, exact; bits above the format's width are ignored;
//   nearest(x), ties to even;
//   stochastic(x, r): up with probability (x - below) / (above - below) when r is uniform over
//   [0, 2^16). Infinity counts as the neighbour above the largest finite value;
//   stochastic_of_number(x, r): likewise, of what is no NaN.

struct Float32 {
  using Bits = uint32_t;
  static LOMO_HD float load(uint32_t b) { return bits_float(b); }
  static LOMO_HD Bits nearest(float x) { return float_bits(x); }
  static LOMO_HD Bits stochastic(float x, uint32_t) { return float_bits(x); }
  static LOMO_HD Bits stochastic_of_number(float x, uint32_t) { return float_bits(x); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr Bits kNaN = 0x7fc0;

  static LOMO_HD float load(uint32_t b) { return bits_float(b << 16); }

  static LOMO_HD Bits nearest(float x) {
#ifdef __CUDA_ARCH__
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t u = float_bits(x);
    return x != x ? kNaN : Bits((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#endif
  }

  static LOMO_HD Bits stochastic(float x, uint32_t random) {
    return x != x ? kNaN : stochastic_of_number(x, random);
  }

  static LOMO_HD Bits stochastic_of_number(float x, uint32_t random) {
    return Bits((float_bits(x) + (random & 0xffff)) >> 16);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr Bits kNaN = 0x7e00;
  static constexpr uint32_t kSmallestNormal = 0x38800000;  // 2^-14
  static constexpr uint32_t kRebias = 0x38000000;          // (127 - 15) << 23
  static constexpr uint32_t kOverflow = 0x47800000;        // 2^16: this and above is infinity

  static LOMO_HD float load(uint32_t b) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(Bits(b)));
#else
    const uint32_t sign = (b & 0x8000) << 16, magnitude = b & 0x7fff;
    // Both cases are computed and one is chosen: a select vectorises, a branch does not.
    const uint32_t special = magnitude >= 0x7c00 ? 0x38000000 : 0;
    const uint32_t normal = (magnitude << 13) + kRebias + special;
    const uint32_t subnormal = float_bits(float(int32_t(magnitude)) * 0x1p-24f);
    return bits_float(sign | (magnitude < 0x0400 ? subnormal : normal));
#endif
  }

  static LOMO_HD Bits nearest(float x) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(x));
#else
    const uint32_t sign = (float_bits(x) >> 16) & 0x8000;
    const uint32_t a = at_most(float_bits(x) & 0x7fffffff, kOverflow);
    const uint32_t e = a - kRebias;
    const uint32_t normal = (e + 0xfff + ((e >> 13) & 1)) >> 13;
    // The spacing of fp32 in [0.5, 1) is 2^-24, the spacing of subnormal fp16: adding 0.5 rounds.
    const uint32_t subnormal = float_bits(bits_float(a) + 0.5f) - float_bits(0.5f);
    return x != x ? kNaN : Bits(sign | (a < kSmallestNormal ? subnormal : normal));
#endif
  }

  static LOMO_HD Bits stochastic(float x, uint32_t random) {
    return x != x ? kNaN : stochastic_of_number(x, random);
  }

  static LOMO_HD Bits stochastic_of_number(float x, uint32_t random) {
    const uint32_t sign = (float_bits(x) >> 16) & 0x8000;
    const uint32_t a = at_most(float_bits(x) & 0x7fffffff, kOverflow);
    return Bits(sign | ((scaled(a) + (random & 0xffff)) >> 16));
  }

 private:
  // |x| in 2^-16ths of the spacing of fp16 around it, so that adding 16 random bits and dropping 16
  // rounds. Below 2^-14 the spacing is fixed and bits under the 16th are dropped: a bias of at most
  // 2^-16 of the smallest subnormal.
  static LOMO_HD uint32_t scaled(uint32_t a) {
    const uint32_t normal = (a - kRebias) << 3;
#ifdef __CUDA_ARCH__
    // A branch that few warps take: one weight in hundreds is that small.
    if (__builtin_expect(a >= kSmallestNormal, 1)) return normal;
#endif
    const uint32_t exponent = a >> 23;
    const uint32_t mantissa = (a & 0x7fffff) | (exponent ? 0x800000u : 0u);
    const uint32_t right = 110 - at_most(exponent, 110), left = exponent > 110 ? exponent - 110 : 0;
    const uint32_t subnormal = (mantissa >> at_most(right, 31)) << at_most(left, 2);
    return a < kSmallestNormal ? subnormal : normal;
  }
};

// Note [Split master]
// A bf16 parameter and an int16 beside it hold an fp32 master exactly: the parameter is the master
// rounded to nearest with ties away from zero, `low` is what rounding took off, in units of the
// master's last place. Ties away because then low is in [-2^15, 2^15) and fits; ties to even would
// need both -2^15 and 2^15. The pair may fall apart when somebody else writes the parameter (a
// checkpoint is loaded): then the old low is at most half a spacing of noise, except beside a zero,
// where it would turn the sign and give a NaN; merge() ignores it there.

LOMO_HD float merge(uint32_t high, int16_t low) {
  const uint32_t h = high << 16;
  const uint32_t u = h + uint32_t(int32_t(low));
  return bits_float((u ^ h) >> 31 ? h : u);
}

LOMO_HD BFloat16::Bits split_high(float x) {
  return x != x ? BFloat16::kNaN : BFloat16::Bits((float_bits(x) + 0x8000) >> 16);
}

LOMO_HD int16_t split_low(float x) { return x != x ? int16_t(0) : int16_t(float_bits(x) & 0xffff); }

}  // namespace lomo
