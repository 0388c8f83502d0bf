// Elementwise activations.
//
//   y[i]  = activation(z[i])
//   dz[i] = dy[i] * activation'(z[i]), read off y[i] where y tells it: saved is z for silu and hardswish, else y
//
// Layout     any: z, y and their gradients share one dense layout of `count` numbers.
// Tile       numbers i ->
//            +- a block: 256 pieces, 4 KiB -----------------------------+-----
//            | [16 bytes] [16 bytes] ..    one a thread: registers      | next
//            +----------------------------------------------------------+-----
// Ownership  One thread owns 16 bytes of the result.
// Traffic    forward: z + y; backward: dy, saved + dz, once each.

#include "activation.cuh"
#include "dtype.h"
#include "launchers.h"
#include "vector.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256;

// What a thread owns: kVector numbers from `first` on, of which `here` exist.
struct Piece {
  int64_t first;
  int here;
};

template <class T>
__device__ Piece piece(int64_t count) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector<T>, left = count - first;
  return {first, left >= kVector<T> ? kVector<T> : left > 0 ? static_cast<int>(left) : 0};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    activation_forward_kernel(Activation activation, int64_t count, const T* z, T* y) {
  const Piece at = piece<T>(count);
  if (at.here == 0) return;
  Vector<T> values = load(z + at.first, at.here);
  with_activation(activation, [&](auto activate) {
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; ++i) from_float(activate(to_float(values.at[i])), values.at[i]);
  });
  store(values, y + at.first, at.here);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    activation_backward_kernel(Activation activation, int64_t count, const T* dy, const T* saved, T* dz) {
  const Piece at = piece<T>(count);
  if (at.here == 0) return;
  Vector<T> values = load(dy + at.first, at.here);
  const Vector<T> kept = load(saved + at.first, at.here);
  with_gradient(activation, [&](auto gradient) {
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; ++i)
      from_float(gradient(to_float(values.at[i]), to_float(kept.at[i])), values.at[i]);
  });
  store(values, dz + at.first, at.here);
}

template <class T>
dim3 grid(int64_t count) {
  return blocks(ceil_div(count, kThreads * kVector<T>));
}

}  // namespace

void activation_forward(DType dtype, Activation activation, int64_t count, const void* z, void* y, Stream stream) {
  for_dtype(dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(activation_forward_kernel<T>, grid<T>(count), kThreads, 0, stream, activation, count,
                  static_cast<const T*>(z), static_cast<T*>(y));
  });
}

void activation_backward(DType dtype, Activation activation, int64_t count, const void* dy, const void* saved, void* dz,
                         Stream stream) {
  for_dtype(dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(activation_backward_kernel<T>, grid<T>(count), kThreads, 0, stream, activation, count,
                  static_cast<const T*>(dy), static_cast<const T*>(saved), static_cast<T*>(dz));
  });
}

}  // namespace cnnops::cuda
