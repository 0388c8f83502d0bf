// CUDA's vector types. A device reads and writes each of them in one access, and so must the emulator see it.
#pragma once

namespace cnnops::simt {

// Words that no optimisation takes apart into several accesses.
template <class Words>
__attribute__((always_inline)) inline Words whole(Words words) {
  asm("" : "+x"(words));
  return words;
}

template <class E>
struct alignas(16) Vector4 {
  E x, y, z, w;

  Vector4() = default;
  constexpr Vector4(E x, E y, E z, E w) : x(x), y(y), z(z), w(w) {}
  __attribute__((always_inline)) Vector4(const Vector4& from) {
    const Words words = whole(*reinterpret_cast<const Words*>(&from));
    x = words[0], y = words[1], z = words[2], w = words[3];
  }
  __attribute__((always_inline)) Vector4& operator=(const Vector4& from) {
    *reinterpret_cast<Words*>(this) = whole(*reinterpret_cast<const Words*>(&from));
    return *this;
  }

 private:
  typedef E Words __attribute__((vector_size(16), may_alias));
};

template <class E>
struct alignas(8) Vector2 {
  E x, y;

  Vector2() = default;
  constexpr Vector2(E x, E y) : x(x), y(y) {}
  __attribute__((always_inline)) Vector2(const Vector2& from) {
    const Words words = whole(*reinterpret_cast<const Words*>(&from));
    x = words[0], y = words[1];
  }
  __attribute__((always_inline)) Vector2& operator=(const Vector2& from) {
    *reinterpret_cast<Words*>(this) = whole(*reinterpret_cast<const Words*>(&from));
    return *this;
  }

 private:
  typedef E Words __attribute__((vector_size(8), may_alias));
};

}  // namespace cnnops::simt

using float4 = cnnops::simt::Vector4<float>;
using uint4 = cnnops::simt::Vector4<unsigned>;
using int4 = cnnops::simt::Vector4<int>;
using float2 = cnnops::simt::Vector2<float>;
using uint2 = cnnops::simt::Vector2<unsigned>;
using int2 = cnnops::simt::Vector2<int>;

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
