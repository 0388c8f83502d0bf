// Unpooling: values go back to where their maxima were.
//
//   y[n,c,i]    = x[n,c,h,w] where i = indices[n,c,h,w], a flat position of the P x Q plane; elsewhere 0. Of several
//                 values for one position the last in row-major order stays.
//   dx[n,c,h,w] = dy[n,c,indices[n,c,h,w]]
//
// Layout     x, dx, y, dy dense, all [N,C,..] or all [N,..,C]; indices by their strides, so that they are never copied.
// Tile       forward: an item has kBlock = 64 channels c of an image, [N,..,C], or one, [N,C,..].
//                          columns w ->                               columns q ->
//                        +--------------------------------+         +------------------------------------+
//            rows h    | | x, indices: all of H x W, in   |  index  | y: all of P x Q, cleared first;    | | rows p
//                      v | row-major order, in place      | ------->| the last value for a place stays   | v
//                        +--------------------------------+         +------------------------------------+
//            backward: dx in the same order, gathered from dy. No halo, no split: planes are whole.
// Ownership  One index of parallel_for owns the planes of kBlock channels of an image, or of one where planes lie
//            apart: what it writes, it writes in one order, so every schedule gives the same bits.
// Traffic    The check: indices once. forward: indices and x once + y, twice where its planes do not fit the cache;
//            backward: indices once, what they point to of dy + dx.
#include <algorithm>
#include <atomic>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kBlock = 64;  // channels: neighbours in memory, enough of them to fill whole cache lines

// Where the channels c .. c + count - 1 of image n lie.
struct Block {
  int64_t n, c, count;
  int64_t step;          // from one position of a plane to the next
  int64_t small, large;  // where the planes of x and of y begin
};

// f(block) for all of them; `elements` are what an image costs.
template <class F>
void for_blocks(const Unpool2dProblem& p, const F& f) {
  const int64_t width = p.channels_last ? kBlock : 1, blocks = (p.C + width - 1) / width;
  const int64_t inputs = p.H * p.W, outputs = p.P * p.Q;
  parallel_for(p.N * blocks, (inputs + outputs) * std::min(width, p.C), [&](int64_t i) {
    const int64_t n = i / blocks, c = i % blocks * width;
    if (p.channels_last)
      f(Block{n, c, std::min(width, p.C - c), p.C, n * inputs * p.C + c, n * outputs * p.C + c});
    else
      f(Block{n, c, 1, 1, (n * p.C + c) * inputs, (n * p.C + c) * outputs});
  });
}

// f(offset in x of the block's first channel, pointer to its index) for each position, in row-major order.
template <class F>
void for_positions(const Unpool2dProblem& p, const Block& block, const int64_t* indices, const F& f) {
  const int64_t* image = indices + block.n * p.index_stride[0] + block.c * p.index_stride[1];
  for (int64_t h = 0; h < p.H; ++h)
    for (int64_t w = 0; w < p.W; ++w)
      f(block.small + (h * p.W + w) * block.step, image + h * p.index_stride[2] + w * p.index_stride[3]);
}

template <class T>
void forward(const Unpool2dProblem& p, const T* x, const int64_t* indices, T* y) {
  for_blocks(p, [&](const Block& block) {
    T* to = y + block.large;
    if (block.count == block.step)
      std::fill(to, to + p.P * p.Q * block.step, T{});
    else
      for (int64_t i = 0; i < p.P * p.Q; ++i) std::fill(to + i * block.step, to + i * block.step + block.count, T{});
    for_positions(p, block, indices, [&](int64_t from, const int64_t* index) {
      for (int64_t c = 0; c < block.count; ++c) to[index[c * p.index_stride[1]] * block.step + c] = x[from + c];
    });
  });
}

template <class T>
void backward(const Unpool2dProblem& p, const T* dy, const int64_t* indices, T* dx) {
  for_blocks(p, [&](const Block& block) {
    const T* from = dy + block.large;
    for_positions(p, block, indices, [&](int64_t to, const int64_t* index) {
      for (int64_t c = 0; c < block.count; ++c) dx[to + c] = from[index[c * p.index_stride[1]] * block.step + c];
    });
  });
}

}  // namespace

bool max_unpool2d_misplaced(const Unpool2dProblem& p, const int64_t* indices, int64_t* found, void*, Stream) {
  const uint64_t outputs = static_cast<uint64_t>(p.P * p.Q);  // unsigned, a negative index is a large one
  std::atomic_flag wrong;
  for_blocks(p, [&](const Block& block) {
    bool any = false;
    for_positions(p, block, indices, [&](int64_t, const int64_t* index) {
      for (int64_t c = 0; c < block.count; ++c) any |= static_cast<uint64_t>(index[c * p.index_stride[1]]) >= outputs;
    });
    if (any) wrong.test_and_set();
  });
  if (!wrong.test()) return false;
  const int64_t* at = indices;
  for (int64_t i = 0; static_cast<uint64_t>(*at) < outputs; ++i)
    at = indices + i / (p.C * p.H * p.W) * p.index_stride[0] + i / (p.H * p.W) % p.C * p.index_stride[1] +
         i / p.W % p.H * p.index_stride[2] + i % p.W * p.index_stride[3];
  *found = *at;
  return true;
}

void max_unpool2d_forward(const Unpool2dProblem& problem, const void* x, const int64_t* indices, void* y, const void*,
                          Stream) {
  for_dtype(problem.dtype,
            [&]<class T>(T) { forward(problem, static_cast<const T*>(x), indices, static_cast<T*>(y)); });
}

void max_unpool2d_backward(const Unpool2dProblem& problem, const void* dy, const int64_t* indices, void* dx, Stream) {
  for_dtype(problem.dtype,
            [&]<class T>(T) { backward(problem, static_cast<const T*>(dy), indices, static_cast<T*>(dx)); });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
