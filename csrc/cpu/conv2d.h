// What the dense and the depthwise convolution share: the geometry of a convolution over taps, the pixels of a tile,
// the epilogue, and sums over slabs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>

#include "../kernels.h"
#include "activation.h"
#include "parallel.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

// f(0), f(1), ... as constants: an array that is only ever indexed by them lives in registers. (Left to its own
// unroller, g++ 12 keeps some of the arrays of sums in memory.)
template <int kCount, class F>
[[gnu::always_inline]] inline void unroll(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One axis of a convolution over taps. Output i lies at first + step * i; its tap t is filter tap tap + tap_step * t
// and reads input in_step * i + offset + offset_step * t, which is zero outside [0, extent).
struct TapAxis {
  int64_t count, first, step;
  int64_t extent, in_step, offset, offset_step;
  int taps, tap, tap_step;
};

// The pixel of an axis that stands at position i, which may lie beside the input; -1 where that is a zero. Reflection
// does not repeat the edge, replication repeats it alone; geometry.py has seen to it that one step back is enough.
inline int64_t source(PadMode mode, int64_t i, int64_t extent) {
  if (i >= 0 && i < extent) return i;
  switch (mode) {
    case PadMode::kReflect:
      return i < 0 ? -i : 2 * (extent - 1) - i;
    case PadMode::kReplicate:
      return i < 0 ? 0 : extent - 1;
    case PadMode::kCircular:
      return i < 0 ? i + extent : i - extent;
    default:
      return -1;
  }
}

inline TapAxis forward_axis(int in, int out, int kernel, int stride, int pad, int dilation) {
  return {.count = out,
          .first = 0,
          .step = 1,
          .extent = in,
          .in_step = stride,
          .offset = -int64_t{pad},
          .offset_step = dilation,
          .taps = kernel,
          .tap = 0,
          .tap_step = 1};
}

// The inputs h = first (mod stride) as outputs of a stride-1 convolution over dy: tap r reaches output
// p = (h + pad - r * dilation) / stride where that divides, which is the same set of taps for all of them.
inline TapAxis backward_axis(int in, int out, int kernel, int stride, int pad, int dilation, int first) {
  const auto reach = [&](int r) { return int64_t{first} + pad - int64_t{r} * dilation; };
  const int tap_step = stride / std::gcd(stride, dilation);
  int tap = 0;
  while (tap < kernel && reach(tap) % stride != 0) ++tap;
  const int taps = static_cast<int>(ceil_div(kernel - tap, tap_step));
  return {.count = ceil_div(in - first, stride),
          .first = first,
          .step = stride,
          .extent = out,
          .in_step = 1,
          .offset = reach(tap) / stride,
          .offset_step = -int64_t{dilation} * tap_step / stride,
          .taps = taps,
          .tap = tap,
          .tap_step = tap_step};
}

// out[n, h, w, k] = sum over (taps of h, taps of w, c) of in[n, ., ., c] * filter[tap, c, k] for one class of outputs.
template <class T>
struct TapConv {
  int64_t images;
  TapAxis h, w;
  int64_t out_height, out_width;
  int filter_width;
  int groups, in_channels, out_channels;  // channels of one group
  const T* in;
  const T* zeros;  // in_channels of them: what a tap outside the input reads, unless pad_mode says otherwise
  T* out;
  PadMode pad_mode = PadMode::kZeros;

  int64_t in_pitch() const { return int64_t{groups} * in_channels; }
  int64_t out_pitch() const { return int64_t{groups} * out_channels; }
  int64_t pixels() const { return images * h.count * w.count; }
  bool has_taps() const { return h.taps > 0 && w.taps > 0; }

  // On a small map a tile takes the same position of several images, so that the taps outside are the same for all its
  // pixels and can be skipped; on a large one it takes neighbours, whose taps overlap in cache.
  bool images_inner() const { return h.count * w.count <= 100; }
};

template <class T>
TapConv<T> forward_conv(const Conv2dProblem& p, const T* x, const T* zeros, T* y) {
  return {.images = p.N,
          .h = forward_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h),
          .w = forward_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w),
          .out_height = p.P,
          .out_width = p.Q,
          .filter_width = p.S,
          .groups = p.groups,
          .in_channels = p.C / p.groups,
          .out_channels = p.K / p.groups,
          .in = x,
          .zeros = zeros,
          .out = y,
          .pad_mode = p.pad_mode};
}

// f(conv) for each class of inputs that the same filter taps reach.
template <class T, class F>
void for_backward_classes(const Conv2dProblem& p, const T* dy, const T* zeros, T* dx, const F& f) {
  for (int h = 0; h < std::min(p.stride_h, p.H); ++h)
    for (int w = 0; w < std::min(p.stride_w, p.W); ++w)
      f(TapConv<T>{.images = p.N,
                   .h = backward_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h, h),
                   .w = backward_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w, w),
                   .out_height = p.H,
                   .out_width = p.W,
                   .filter_width = p.S,
                   .groups = p.groups,
                   .in_channels = p.K / p.groups,
                   .out_channels = p.C / p.groups,
                   .in = dy,
                   .zeros = zeros,
                   .out = dx});
}

// An output, and the input that a tap of offset 0 would read. Positions so far outside that no tap comes back stand for
// "no pixel": such a one reads zeros and has no output.
struct Pixel {
  int64_t h, w, in, out;
};
constexpr Pixel kNoPixel{INT64_MIN / 2, INT64_MIN / 2, 0, -1};

// Walks the pixels of a convolution in order, without a division for each.
template <class T>
class PixelWalk {
 public:
  PixelWalk(const TapConv<T>& conv, int64_t index) : conv_(conv), images_inner_(conv.images_inner()) {
    const int64_t width = conv.w.count, height = conv.h.count;
    if (images_inner_) {
      n_ = index % conv.images;
      index /= conv.images;
    } else {
      n_ = index / (width * height);
    }
    i_ = index / width % height;
    j_ = index % width;
  }

  Pixel next() {
    const TapConv<T>& c = conv_;
    const int64_t h = c.h.in_step * i_ + c.h.offset, w = c.w.in_step * j_ + c.w.offset;
    const int64_t out = (n_ * c.out_height + c.h.first + c.h.step * i_) * c.out_width + c.w.first + c.w.step * j_;
    const Pixel pixel{h, w, ((n_ * c.h.extent + h) * c.w.extent + w) * c.in_pitch(), out * c.out_pitch()};
    if (images_inner_) {
      if (++n_ < c.images) return pixel;
      n_ = 0;
    }
    if (++j_ < c.w.count) return pixel;
    j_ = 0;
    if (++i_ < c.h.count) return pixel;
    i_ = 0;
    if (!images_inner_) ++n_;
    return pixel;
  }

 private:
  const TapConv<T>& conv_;
  bool images_inner_;
  int64_t n_, i_, j_;
};

inline bool outside(int64_t i, int64_t extent) { return static_cast<uint64_t>(i) >= static_cast<uint64_t>(extent); }

// Where the pixel lies that a padding mode other than zeros has (dh, dw) from a pixel's own place.
template <class T>
inline const T* repeated(const TapConv<T>& conv, const Pixel& pixel, int64_t dh, int64_t dw) {
  const int64_t h = source(conv.pad_mode, pixel.h + dh, conv.h.extent);
  const int64_t w = source(conv.pad_mode, pixel.w + dw, conv.w.extent);
  return conv.in + pixel.in + ((h - pixel.h) * conv.w.extent + w - pixel.w) * conv.in_pitch();
}

// Where each pixel finds tap (r, s) of the channels from `channel` on. False if all find zeros.
template <class T, int kPixels>
inline bool locate_tap(const TapConv<T>& conv, const Pixel (&pixels)[kPixels], int r, int s, int64_t channel,
                       const T* (&x)[kPixels]) {
  const int64_t dh = conv.h.offset_step * r, dw = conv.w.offset_step * s;
  const int64_t shift = (dh * conv.w.extent + dw) * conv.in_pitch() + channel;
  bool any = false;
  for (int i = 0; i < kPixels; ++i) {
    const bool inside = !outside(pixels[i].h + dh, conv.h.extent) && !outside(pixels[i].w + dw, conv.w.extent);
    x[i] = inside ? conv.in + (pixels[i].in + shift) : conv.zeros;
    any |= inside;
  }
  if (conv.pad_mode == PadMode::kZeros) return any;
  for (int i = 0; i < kPixels; ++i)
    if (x[i] == conv.zeros && pixels[i].out >= 0) x[i] = repeated(conv, pixels[i], dh, dw) + channel;
  return true;
}

// `count` lanes that lie `stride` apart.
template <class T>
inline Vec<T> read_lanes(const T* p, int64_t stride, int count) {
  if (stride == 1) return count == kLanes<T> ? load(p) : load(p, count);
  Vec<T> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i * stride];
  return v;
}
template <class T>
inline void write_lanes(T* p, Vec<T> v, int64_t stride, int count) {
  if (stride != 1) {
    for (int i = 0; i < count; ++i) p[i * stride] = v[i];
  } else if (count == kLanes<T>) {
    store(p, v);
  } else {
    store(p, v, count);
  }
}

// y[at + i * stride] = activation(sum[i] * scale[k] + bias[k] + residual[at + i * stride]), k = channel + i * stride,
// for `count` lanes i.
template <class T>
inline void finish(const Epilogue& epilogue, Vec<T> sum, T* y, int64_t at, int64_t channel, int64_t stride, int count) {
  if (epilogue.scale) sum *= read_lanes(static_cast<const T*>(epilogue.scale) + channel, stride, count);
  if (epilogue.bias) sum += read_lanes(static_cast<const T*>(epilogue.bias) + channel, stride, count);
  if (epilogue.residual) sum += read_lanes(static_cast<const T*>(epilogue.residual) + at, stride, count);
  write_lanes(y + at, activate(epilogue.activation, sum), stride, count);
}

// sum[row][i] = slabs[0][row][i] + slabs[1][row][i] + ..., in that order. A slab has `size` elements, its rows lie
// `pitch` apart; the rows of sum are dense.
template <class T>
void sum_slabs(const T* slabs, int64_t count, int64_t size, int64_t rows, int64_t columns, int64_t pitch, T* sum) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = ceil_div(columns, kPiece);
  parallel_for(rows * pieces, count * std::min(columns, kPiece), [=](int64_t item) {
    const int64_t row = item / pieces, begin = item % pieces * kPiece, width = std::min(kPiece, columns - begin);
    const T* from = slabs + row * pitch + begin;
    T* to = sum + row * columns + begin;
    std::copy(from, from + width, to);
    for (int64_t slab = 1; slab < count; ++slab)
      for (int64_t i = 0; i < width; ++i) to[i] += from[slab * size + i];
  });
}

// Hands out the workspace in pieces that start on cache lines. On a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// f(T{}) for the dtypes that the CPU's convolutions see.
template <class F>
auto for_conv_dtype(DType dtype, const F& f) {
  return dtype == DType::kDouble ? f(double{}) : f(float{});
}

inline bool is_depthwise(const Conv2dProblem& p) { return p.groups == p.C && p.C > 1; }

// depthwise_conv2d.cpp
int64_t depthwise_forward_workspace(const Conv2dProblem&);
int64_t depthwise_backward_workspace(const Conv2dProblem&, bool need_dx, bool need_dweight);
template <class T>
void depthwise_forward(const Conv2dProblem&, const Epilogue&, const T* x, const T* weight, T* y, void* workspace);
template <class T>
void depthwise_backward_input(const Conv2dProblem&, const T* dy, const T* weight, const T* bias, T* dx,
                              void* workspace);
template <class T>
void depthwise_backward_weight(const Conv2dProblem&, const T* dy, const T* x, T* dweight, void* workspace);

}  // namespace cnnops::cpu::CNNOPS_ISA
