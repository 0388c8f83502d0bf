// Activations and their derivatives, on one number or on a vector of them: V is float, double or a Vec of them.
//
//   y  = activate<A>(z)                      or activate(activation, z)
//   dz = activation_gradient<A>(dy, saved)   saved: z where gradient_reads_input(A), else y
//
// NaN and infinities go where torch's vectorised CPU kernels put them. A masked gradient is 0 whatever dy is.
#pragma once

#include <cmath>
#include <type_traits>

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr bool gradient_reads_input(Activation a) { return a == Activation::kSilu || a == Activation::kHardswish; }

// f(std::integral_constant<Activation, A>{}) for the A that equals `activation`.
template <class F>
void for_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu6:
      return f(std::integral_constant<Activation, Activation::kRelu6>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kHardswish:
      return f(std::integral_constant<Activation, Activation::kHardswish>{});
    case Activation::kSigmoid:
      return f(std::integral_constant<Activation, Activation::kSigmoid>{});
  }
}

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }

inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2: Cephes' polynomial, within 2 ulp.
inline Vec<float> exponential(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  using V = Vec<float>;
  const V highest = splat(89.f), lowest = splat(-104.f);  // the results are infinity and 0 beyond
  x = x > highest ? highest : x;
  x = x < lowest ? lowest : x;

  const V magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the integer in the low mantissa bits
  const V shifted = x * 1.44269504f + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1;

  // 2^n in two factors: n may lie beyond what one exponent holds.
  const Ints exponent = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic);
  const Ints half = exponent >> 1;
  return poly * reinterpret_cast<V>((half + 127) << 23) * reinterpret_cast<V>((exponent - half + 127) << 23);
}

template <class V>
inline V logistic(V z) {
  return 1 / (1 + exponential(-z));
}

template <Activation A, class V>
inline V activate(V z) {
  const V zero{}, three = zero + 3, six = zero + 6;
  if constexpr (A == Activation::kRelu) return z < zero ? zero : z;
  if constexpr (A == Activation::kRelu6) {
    const V y = z < zero ? zero : z;
    return y > six ? six : y;
  }
  if constexpr (A == Activation::kSilu) return z / (1 + exponential(-z));
  if constexpr (A == Activation::kHardswish) {
    const V below = z * activate<Activation::kRelu>(z + three) / six;
    return z >= three ? z : below;
  }
  if constexpr (A == Activation::kSigmoid) return logistic(z);
  return z;
}

template <class V>
inline V activate(Activation activation, V z) {
  V y{};
  for_activation(activation, [&](auto a) { y = activate<a.value>(z); });
  return y;
}

template <Activation A, class V>
inline V activation_gradient(V dy, V saved) {
  const V zero{}, three = zero + 3, six = zero + 6;
  if constexpr (A == Activation::kRelu) return saved <= zero ? zero : dy;
  if constexpr (A == Activation::kRelu6) {
    const V above = saved > zero ? dy : zero;
    return saved < six ? above : zero;
  }
  if constexpr (A == Activation::kSilu) {
    const V s = logistic(saved);
    return dy * s * (1 + saved * (1 - s));
  }
  if constexpr (A == Activation::kHardswish) {
    const V below = saved >= three ? dy : dy * (saved / three + 0.5f);
    return saved <= -three ? zero : below;
  }
  if constexpr (A == Activation::kSigmoid) return dy * (1 - saved) * saved;
  return dy;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
