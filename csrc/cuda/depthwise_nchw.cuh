// What the depthwise kernels of NCHW share: how ranges of planes come to shared memory and leave it, in pieces of 16
// bytes whatever the width of a row is, and how threads share a plane.
#pragma once

#include "activation.cuh"
#include "conv2d_kernels.h"
#include "depthwise_conv2d.cuh"
#include "depthwise_nchw.h"
#include "moments.cuh"
#include "vector.cuh"

namespace cnnops::cuda {

// The channels of a block and its part of their strips.
struct NchwTile {
  int64_t part, c;
  int channels, multiplier;

  __device__ NchwTile(const Conv2dProblem& p, const NchwCut& cut) {
    const Split block = split(blockIdx.x, cut.channel_tiles);
    part = block.quotient, c = block.remainder * cut.planes;
    channels = p.C - c < cut.planes ? static_cast<int>(p.C - c) : cut.planes;
    multiplier = p.K / p.C;
  }
};

// A thread's place: its plane of a tile, and its number among the threads of that plane.
struct NchwThread {
  int plane, lane;

  __device__ explicit NchwThread(int lanes)
      : plane(static_cast<int>(threadIdx.x) / lanes), lane(static_cast<int>(threadIdx.x) % lanes) {}
};

struct Rows {
  int begin, end;

  __device__ int count() const { return end - begin; }
};

struct NchwStrip {
  int64_t index, n;
  Rows y, x;  // of y, and of x those that they read
  Rows dx;    // every row of x is in one strip's
  Rows dy;    // what dx reads of dy, those of y among them
};

__device__ inline NchwStrip nchw_strip(const Conv2dProblem& p, const NchwCut& cut, int64_t index) {
  if (cut.chunks == 1) return {index, index, {0, p.P}, {0, p.H}, {0, p.H}, {0, p.P}};
  const Split at = split(index, cut.chunks);
  const auto inside = [&](int h) { return h < 0 ? 0 : h < p.H ? h : p.H; };
  const int begin = static_cast<int>(at.remainder) * cut.rows;
  const int end = p.P - begin < cut.rows ? p.P : begin + cut.rows;
  const int reach = (p.R - 1) * p.dilation_h, first = begin * p.stride_h - p.pad_h;
  const int above = begin - reach / p.stride_h;
  return {index,
          at.quotient,
          {begin, end},
          {inside(first), inside((end - 1) * p.stride_h - p.pad_h + reach + 1)},
          {begin == 0 ? 0 : inside(first), end == p.P ? p.H : inside(end * p.stride_h - p.pad_h)},
          {above > 0 ? above : 0, end}};
}

// Some rows of neighbouring planes of a tensor, and where they lie in shared memory: at their place within 16 bytes, so
// that pieces of 16 bytes are moved. Whole planes are one range, the rows of a strip one for each plane.
template <class T>
struct Planes {
  int64_t first, plane;    // offset of the first, and from plane to plane, in elements
  int count, size, pitch;  // planes; elements of one; and from one to the next in shared memory
  bool joined;

  __device__ Planes(const NchwCut& cut, int64_t plane, int count, int height, int width, Rows rows, int pitch)
      : first((plane * height + rows.begin) * width),
        plane(int64_t{height} * width),
        count(count),
        size(rows.count() * width),
        pitch(pitch),
        joined(cut.chunks == 1) {}
  __device__ int ranges() const { return joined ? 1 : count; }
  __device__ int length() const { return joined ? count * size : size; }
  __device__ int place(int range) const { return static_cast<int>((first + range * plane) % kVector<T>); }
  __device__ int at(int i) const { return joined ? place(0) + i * size : place(i) + i * pitch; }
};

// Starts copies of planes of a tensor of `total` elements.
template <class T>
__device__ void bring_planes(const Planes<T>& planes, const T* tensor, int64_t total, T* shared) {
  for (int range = 0; range < planes.ranges(); ++range) {
    const int place = planes.place(range), end = place + planes.length();
    const int64_t base = planes.first + range * planes.plane - place;
    T* const to = shared + range * planes.pitch;
    for (int i = static_cast<int>(threadIdx.x) * kVector<T>; i < end; i += kNchwThreads * kVector<T>) {
      if (base + i + kVector<T> <= total) {
        copy_async_16(to + i, tensor + base + i, true);
      } else {
        for (int64_t j = i; base + j < total; ++j) to[j] = tensor[base + j];
      }
    }
  }
}

// Writes activation(sums + residual), rounded: whole pieces of 16 bytes, and the ends of a range, beside which other
// blocks may write, by elements. With `keep`, puts what was written in the place of its sum.
template <class T>
__device__ void write_planes(const Planes<T>& planes, Activation activation, const T* residual, bool keep, float* sums,
                             T* y) {
  const auto finish = [&]<int kCount>(float (&values)[kCount], T(&out)[kCount]) {  // out: the residual, then the result
    if (residual) {
      CNNOPS_UNROLL
      for (int j = 0; j < kCount; ++j) values[j] += to_float(out[j]);
    }
    with_activation(activation, [&](auto activate) {
      CNNOPS_UNROLL
      for (int j = 0; j < kCount; ++j) from_float(activate(values[j]), out[j]);
    });
  };
  const int thread = static_cast<int>(threadIdx.x);
  for (int range = 0; range < planes.ranges(); ++range) {
    const int place = planes.place(range), end = place + planes.length();
    const int after_place = (place + kVector<T> - 1) / kVector<T> * kVector<T>,
              before_end = end / kVector<T> * kVector<T>;
    const int64_t base = planes.first + range * planes.plane - place;
    float* const from = sums + range * planes.pitch;
    for (int i = after_place + thread * kVector<T>; i < before_end; i += kNchwThreads * kVector<T>) {
      Vector<T> out = {};
      if (residual) out = load_16(reinterpret_cast<const Vector<T>*>(residual + base + i));
      float values[kVector<T>];
      CNNOPS_UNROLL
      for (int j = 0; j < kVector<T>; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i + j);
        values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
      }
      finish(values, out.at);
      store_16(y + base + i, &out);
      if (keep) {
        CNNOPS_UNROLL
        for (int j = 0; j < kVector<T>; ++j) from[i + j] = to_float(out.at[j]);
      }
    }
    // The first threads have the one end, the next ones the other, if that is not the same.
    const bool first = thread < kVector<T>;
    const int last = before_end > after_place ? before_end : after_place;
    const int i = first ? place + thread : last + thread - kVector<T>;
    if (i < (first && after_place < end ? after_place : end) && thread < 2 * kVector<T>) {
      T out[1] = {};
      if (residual) out[0] = residual[base + i];
      float values[1] = {from[i]};
      finish(values, out);
      y[base + i] = out[0];
      if (keep) from[i] = to_float(out[0]);
    }
  }
}

// weights[plane][tap] of a tile's filters, which lie together.
template <class T>
__device__ void bring_weights(const Conv2dProblem& p, const NchwTile& tile, const T* weight, float* weights) {
  const int64_t taps = int64_t{p.R} * p.S, first = tile.c * tile.multiplier * taps;
  const auto count = static_cast<int>(tile.channels * tile.multiplier * taps);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kNchwThreads) weights[i] = to_float(weight[first + i]);
}

// Takes a block's strips, bringing the next one while one is computed.
//   bring(strip, other)   starts copies of what a strip reads to the `other`-th of two buffers
//   step(strip, other)    computes it
template <class Bring, class Step>
__device__ void for_each_strip(const Conv2dProblem& p, const NchwCut& cut, int64_t part, const Bring& bring,
                               const Step& step) {
  const int64_t begin = part * cut.each, end = begin + cut.each < cut.strips ? begin + cut.each : cut.strips;
  int other = 0;
  bring(nchw_strip(p, cut, begin), other);
  commit_async();
  for (int64_t index = begin; index < end; ++index) {
    wait_async<0>();
    __syncthreads();  // the strip has landed, and nobody reads the one before any more
    if (index + 1 < end) {
      bring(nchw_strip(p, cut, index + 1), other ^ 1);
      commit_async();
    }
    step(nchw_strip(p, cut, index), other);
    other ^= 1;
  }
}

// f(value, t, tap) for each pixel of a window, a zero beside the plane, and the results of a run that it is a part of
// by a tap. The run's first window begins at (h, w) of a plane of which `rows` are there.
template <int kSize, int kStride, class T, class F>
__device__ __forceinline__ void for_each_tap(const T* plane, int rows, int W, int h, int w, const F& f) {
  const T* row = plane + h * W + w;
  CNNOPS_UNROLL
  for (int i = 0; i < (kNchwRun - 1) * kStride + kSize; ++i, row += W) {
    const bool there = static_cast<unsigned>(h + i) < static_cast<unsigned>(rows);
    CNNOPS_UNROLL
    for (int s = 0; s < kSize; ++s) {
      const bool inside = there & (static_cast<unsigned>(w + s) < static_cast<unsigned>(W));
      const float value = inside ? to_float(row[s]) : 0;
      CNNOPS_UNROLL
      for (int t = 0; t < kNchwRun; ++t) {
        const int r = i - t * kStride;
        if (r >= 0 && r < kSize) f(value, t, r * kSize + s);
      }
    }
  }
}

// The same of one column of taps, w being the pixels': f(value, t, r).
template <int kSize, int kStride, class T, class F>
__device__ __forceinline__ void for_each_tap_of_column(const T* plane, int rows, int W, int h, int w, const F& f) {
  const bool inside = static_cast<unsigned>(w) < static_cast<unsigned>(W);
  const T* row = plane + h * W + w;
  CNNOPS_UNROLL
  for (int i = 0; i < (kNchwRun - 1) * kStride + kSize; ++i, row += W) {
    const bool there = inside & (static_cast<unsigned>(h + i) < static_cast<unsigned>(rows));
    const float value = there ? to_float(*row) : 0;
    CNNOPS_UNROLL
    for (int t = 0; t < kNchwRun; ++t) {
      const int r = i - t * kStride;
      if (r >= 0 && r < kSize) f(value, t, r);
    }
  }
}

// f.operator()<size of the filter, stride>() of the instance that takes the problem, zeros for one of any size.
template <class F>
void with_instance(const Conv2dProblem& p, const NchwCut& cut, F&& f) {
  if (cut.sized)
    with_size(p, f);
  else
    f.template operator()<0, 0>();
}

// The passes. One of dx and dweight's slabs [part][K][taps] may be null; bias, of conv_transpose2d, too.
void depthwise_nchw_forward(const Conv2dProblem&, const NchwCut&, const Epilogue&, const void* x, const void* weight,
                            void* y, float* partial, Stream);
void depthwise_nchw_backward(const Conv2dProblem&, const NchwCut&, const void* bias, const void* dy, const void* x,
                             const void* weight, void* dx, float* slabs, Stream);

}  // namespace cnnops::cuda
