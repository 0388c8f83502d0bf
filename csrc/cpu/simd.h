// One vector register's worth of numbers, at the ISA level this translation unit is compiled for.
//
// Every kernel file is compiled once for each level with -DCNNOPS_ISA=baseline|avx2|avx512 and the level's flags. All
// that it instantiates lies in namespace cnnops::cpu::CNNOPS_ISA, so that the linker cannot merge code of two levels.
// Products that feed sums are contracted to FMA by the compiler (-ffp-contract=fast).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../problem.h"

namespace cnnops::cpu::CNNOPS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

// Storage formats without arithmetic of their own.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What sums over T are made in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;  // A is float or double

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc<T>));

inline Vec<float> splat(float v) { return v - Vec<float>{}; }
inline Vec<double> splat(double v) { return v - Vec<double>{}; }

inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float to_acc(Half v) {
  _Float16 h;
  std::memcpy(&h, &v.bits, sizeof h);
  return static_cast<float>(h);
}

inline void from_acc(float v, float& out) { out = v; }
inline void from_acc(double v, double& out) { out = v; }
// Round to nearest even; a NaN stays one (the rounding carry would turn some into infinity).
inline void from_acc(float v, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  out.bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_acc(float v, Half& out) {
  const _Float16 h = static_cast<_Float16>(v);
  std::memcpy(&out.bits, &h, sizeof h);
}

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

inline Vec<float> load(const BFloat16* p) {
  typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  Bits b;
  std::memcpy(&b, p, sizeof b);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(b, Wide) << 16);
}
inline void store(BFloat16* p, Vec<float> v) {
  typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  const Wide bits = reinterpret_cast<Wide>(v);
  const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits b = __builtin_convertvector(v != v ? Wide{} + 0x7fc0 : rounded, Bits);
  std::memcpy(p, &b, sizeof b);
}

inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}
inline void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) from_acc(v[i], p[i]);
#endif
}

// The first `count` lanes only; the others are zero on load and untouched in memory on store.
template <class T>
inline Vec<Acc<T>> load(const T* p, int count) {
  T lanes[kLanes<T>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec<Acc<T>> v, int count) {
  T lanes[kLanes<T>];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

// f(T{}) for the type that `dtype` names.
template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kDouble:
      return f(double{});
    case DType::kHalf:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
