// Exponential, hyperbolic tangent and the activations, on vectors.
//
// With errors near 2e-7 for float32 models and for what is given out, and with the errors stated for what is rounded
// next. NaN comes out as NaN: of two operands `min` and `max` give the second when one is NaN.
#pragma once

#include "../model.h"
#include "simd.h"

namespace bertrt::BERTRT_ISA {
namespace {

// 2^x = 2^n 2^f with whole n and |f| <= 1/2; 2^f by a polynomial. Zero below -127.
template <bool kExact>
inline F exp2(F x) {
  const F bounded = max(set(-150.0f), x);
  const F n = round_to_whole(bounded);
  const F f = sub(bounded, n);
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

inline F exp(F x) { return exp2<true>(mul(min(set(88.0f), x), set(kLog2E))); }

// 1 - 2 / (e^2x + 1)
inline F tanh(F x) {
  const F e = exp(mul(min(set(15.0f), max(set(-15.0f), x)), set(2.0f)));
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
  const F bounded = max(set(-kLimit), x);
  const F c = min(set(kLimit), bounded);
  const F t = mul(c, c);
  F p = fma(set(kNew ? 3.2462367e-08f : 2.62713549e-08f), t, set(kNew ? -2.07349556e-06f : -1.77048987e-06f));
  p = fma(p, t, set(kNew ? 5.70171302e-05f : 5.12371967e-05f));
  p = fma(p, t, set(kNew ? -0.00089806693f : -0.000844511588f));
  p = fma(p, t, set(kNew ? 0.00915381071f : 0.00891378797f));
  p = fma(p, t, set(kNew ? -0.0652892685f : -0.0648694932f));
  p = fma(p, t, set(kNew ? 0.398183822f : 0.398085655f));
  return mul(bounded, fma(p, c, set(0.5f)));
}

// x P(X <= x) = max(x, 0) - |x| P(X <= -|x|) for a standard normal X, and P(X <= -b) = 2^q(b) with a polynomial q of least
// maximal error up to b = 5.5. Without a division; largest error 9.1e-7, and of the result's last bit of bfloat16 in
// 0.02 % of normal x.
inline F gelu_by_power(F x) {
  const F b = min(set(5.5f), abs(x));
  F q = fma(set(-1.79344443e-06f), b, set(6.09039487e-05f));
  q = fma(q, b, set(-0.000926027171f));
  q = fma(q, b, set(0.00849374959f));
  q = fma(q, b, set(-0.053937829f));
  q = fma(q, b, set(-0.458480527f));
  q = fma(q, b, set(-1.15124683f));
  q = fma(q, b, set(-0.999995466f));
  const F n = round_to_whole(q);
  const F f = sub(q, n);
  F p = fma(set(0.00957010574f), f, set(0.0559178717f));  // 2^f, degree 4: 2.6e-6
  p = fma(p, f, set(0.240247448f));
  p = fma(p, f, set(0.693121813f));
  p = fma(p, f, set(0.999999261f));
  return sub(max(zero(), x), mul(b, scale_by_power(p, n)));
}

// What a value is rounded to next.
enum class Next { kFloat32, kBfloat16, kInt8 };

template <Activation kActivation, Next kNext>
inline F activate(F x) {
  if constexpr (kActivation == Activation::kRelu) {
    return max(zero(), x);
  } else if constexpr (kNext == Next::kInt8) {
    return gelu_polynomial<kActivation>(x);
  } else if constexpr (kNext == Next::kBfloat16 && kActivation == Activation::kGelu) {
    return gelu_by_power(x);
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
