// From a dtype known at run time to a format known at compile time.
#pragma once
#include <type_traits>

#include "float16.h"
#include "kernels.h"

namespace lomo {

template <typename F>
auto dispatch(DType dtype, const F& f) {
  if (dtype == DType::float32) return f(Float32{});
  if (dtype == DType::bfloat16) return f(BFloat16{});
  return f(Float16{});
}

// Pairs of two different 16-bit formats do not occur: a gradient has its parameter's dtype, or one
// of the two is fp32.
template <typename F>
auto dispatch_pair(DType param, DType grad, const F& f) {
  if (param == DType::float32) return dispatch(grad, [&](auto g) { return f(Float32{}, g); });
  if (param == DType::bfloat16)
    return grad == DType::float32 ? f(BFloat16{}, Float32{}) : f(BFloat16{}, BFloat16{});
  return grad == DType::float32 ? f(Float16{}, Float32{}) : f(Float16{}, Float16{});
}

// Likewise with the roundings that a parameter of that format knows.
template <Rounding R>
using Rounded = std::integral_constant<Rounding, R>;

template <typename F>
auto dispatch_rounded(DType param, DType grad, Rounding rounding, const F& f) {
  return dispatch_pair(param, grad, [&](auto p, auto g) {
    using P = decltype(p);
    if constexpr (sizeof(typename P::Bits) == 2) {
      if (rounding == Rounding::stochastic) return f(p, g, Rounded<Rounding::stochastic>());
    }
    if constexpr (std::is_same_v<P, BFloat16>) {
      if (rounding == Rounding::split) return f(p, g, Rounded<Rounding::split>());
    }
    return f(p, g, Rounded<Rounding::nearest>());
  });
}

}  // namespace lomo
