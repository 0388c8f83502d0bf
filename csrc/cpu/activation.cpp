// Elementwise activations.
//
//   y[i]  = activation(z[i])
//   dz[i] = dy[i] * activation'(z[i]), read off y[i] where y tells it (see activation.h)
//
// Layout     any: z, y and their gradients share one dense layout of `count` numbers.
// Tile       numbers i ->
//            +- an item: kChunk = 32768 numbers ------------------------+-----
//            | [vector] [vector] ..    one at a time: registers         | next
//            +----------------------------------------------------------+-----
// Ownership  One index of parallel_for owns kChunk consecutive outputs.
// Traffic    forward: z + y; backward: dy, saved + dz, once each.
#include "activation.h"

#include <algorithm>

#include "../kernels.h"
#include "parallel.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kChunk = 32768;

// body(begin, end) over chunks of [0, count).
template <class Body>
void for_chunks(int64_t count, const Body& body) {
  parallel_for((count + kChunk - 1) / kChunk, 3 * std::min(count, kChunk),
               [&](int64_t i) { body(i * kChunk, std::min(count, (i + 1) * kChunk)); });
}

}  // namespace

void activation_forward(DType dtype, Activation activation, int64_t count, const void* z, void* y, Stream) {
  for_dtype(dtype, [&]<class T>(T) {
    for_activation(activation, [&](auto a) {
      for_chunks(count, [&](int64_t i, int64_t end) {
        const T* from = static_cast<const T*>(z);
        T* to = static_cast<T*>(y);
        for (; i + kLanes<T> <= end; i += kLanes<T>) store(to + i, activate<a.value>(load(from + i)));
        const int rest = static_cast<int>(end - i);
        if (rest) store(to + i, activate<a.value>(load(from + i, rest)), rest);
      });
    });
  });
}

void activation_backward(DType dtype, Activation activation, int64_t count, const void* dy, const void* saved, void* dz,
                         Stream) {
  for_dtype(dtype, [&]<class T>(T) {
    for_activation(activation, [&](auto a) {
      for_chunks(count, [&](int64_t i, int64_t end) {
        const T *gradient = static_cast<const T*>(dy), *kept = static_cast<const T*>(saved);
        T* to = static_cast<T*>(dz);
        for (; i + kLanes<T> <= end; i += kLanes<T>)
          store(to + i, activation_gradient<a.value>(load(gradient + i), load(kept + i)));
        const int rest = static_cast<int>(end - i);
        if (rest) store(to + i, activation_gradient<a.value>(load(gradient + i, rest), load(kept + i, rest)), rest);
      });
    });
  });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
