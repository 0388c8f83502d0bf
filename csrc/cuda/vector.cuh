// Numbers that move between memory and registers together, 16 bytes at a time.
#pragma once

#include "ptx.cuh"

namespace cnnops::cuda {

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

template <class T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

// Those of `count` numbers, at most kVector, that are there; the rest are zero bits. A whole vector's `from` is aligned
// to 16 bytes.
template <class T>
__device__ __forceinline__ Vector<T> load(const T* from, int count) {
  if (count == kVector<T>) return load_16(reinterpret_cast<const Vector<T>*>(from));
  Vector<T> values = {};
  CNNOPS_UNROLL
  for (int i = 0; i < kVector<T>; ++i)  // unrolled, so that `values` stays in registers
    if (i < count) values.at[i] = from[i];
  return values;
}

template <class T>
__device__ __forceinline__ void store(const Vector<T>& values, T* to, int count) {
  if (count == kVector<T>) {
    store_16(to, &values);
    return;
  }
  CNNOPS_UNROLL
  for (int i = 0; i < kVector<T>; ++i)
    if (i < count) to[i] = values.at[i];
}

}  // namespace cnnops::cuda
