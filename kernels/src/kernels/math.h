// Exponential, hyperbolic tangent and the activations, on vectors.
//
// Exact<true> is for float32 models and for what is given out (errors near 2e-7); Exact<false> is for values that
// are rounded to bfloat16 or int8 next (errors as stated).
#pragma once

#include "../model.h"
#include "simd.h"

namespace bertrt::BERTRT_ISA {
namespace {

// 2^x = 2^n 2^f with whole n and |f| <= 1/2; 2^f by a polynomial. Zero below -127.
template <bool kExact>
inline F exp2(F x) {
  const F n = round_to_whole(max(x, set(-150.0f)));
  const F f = sub(max(x, set(-150.0f)), n);
  F p;
  if constexpr (kExact) {  // Taylor's, degree 6: the first term left out is below 1.3e-7
    p = fma(set(1.5403530e-4f), f, set(1.3333558e-3f));
    p = fma(p, f, set(9.6181291e-3f));
    p = fma(p, f, set(5.5504109e-2f));
    p = fma(p, f, set(2.4022651e-1f));
    p = fma(p, f, set(6.9314718e-1f));
    p = fma(p, f, set(1.0f));
  } else {  // least maximum, degree 3: 7.6e-5
    p = fma(set(0.0551716672f), f, set(0.242611122f));
    p = fma(p, f, set(0.693260986f));
    p = fma(p, f, set(0.999928074f));
  }
  return scale_by_power(p, n);
}

inline constexpr float kLog2E = 1.44269504f;

inline F exp(F x) { return exp2<true>(mul(min(x, set(88.0f)), set(kLog2E))); }

// 1 - 2 / (e^2x + 1)
inline F tanh(F x) {
  const F e = exp(mul(min(max(x, set(-15.0f)), set(15.0f)), set(2.0f)));
  return sub(set(1.0f), div(set(2.0f), add(e, set(1.0f))));
}

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: largest error 1.5e-7.
inline F erf(F x) {
  const F a = abs(x);
  const F t = div(set(1.0f), fma(set(0.3275911f), a, set(1.0f)));
  F p = fma(set(1.061405429f), t, set(-1.453152027f));
  p = fma(p, t, set(1.421413741f));
  p = fma(p, t, set(-0.284496736f));
  p = fma(p, t, set(0.254829592f));
  const F y = sub(set(1.0f), mul(mul(p, t), exp(sub(zero(), mul(a, a)))));
  return copy_sign(x, y);
}

// x (1/2 + c P(c^2)) with x clamped to c: polynomials of least maximal error of the whole, 1.5e-4 for gelu and
// 1.3e-4 for gelu_new up to x = 10, and x times 1.5e-5 beyond.
template <Activation kActivation>
inline F gelu_polynomial(F x) {
  constexpr bool kNew = kActivation == Activation::kGeluNew;
  constexpr float kLimit = kNew ? 3.8f : 3.9f;
  const F bounded = max(x, set(-kLimit));
  const F c = min(bounded, set(kLimit));
  const F t = mul(c, c);
  F p = fma(set(kNew ? 3.2462367e-08f : 2.62713549e-08f), t, set(kNew ? -2.07349556e-06f : -1.77048987e-06f));
  p = fma(p, t, set(kNew ? 5.70171302e-05f : 5.12371967e-05f));
  p = fma(p, t, set(kNew ? -0.00089806693f : -0.000844511588f));
  p = fma(p, t, set(kNew ? 0.00915381071f : 0.00891378797f));
  p = fma(p, t, set(kNew ? -0.0652892685f : -0.0648694932f));
  p = fma(p, t, set(kNew ? 0.398183822f : 0.398085655f));
  return mul(bounded, fma(p, c, set(0.5f)));
}

template <Activation kActivation, bool kExact>
inline F activate(F x) {
  if constexpr (kActivation == Activation::kRelu) {
    return max(x, zero());
  } else if constexpr (!kExact) {
    return gelu_polynomial<kActivation>(x);
  } else if constexpr (kActivation == Activation::kGelu) {
    return mul(mul(x, set(0.5f)), add(set(1.0f), erf(mul(x, set(0.70710678f)))));
  } else {
    // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    const F inner = mul(mul(x, set(0.79788456f)), fma(set(0.044715f), mul(x, x), set(1.0f)));
    return mul(mul(x, set(0.5f)), add(set(1.0f), tanh(inner)));
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
