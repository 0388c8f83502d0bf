// Depthwise convolution, NHWC: each channel has M = K / C filters of its own, k = c * M + m.
//
//   y[n,p,q,k]     = activation(sum over (r,s) of x[n, p*stride_h - pad_h + r*dilation_h, q*.., c] * weight[k,r,s]
//                               + bias[k] + residual[n,p,q,k])
//   dx[n,h,w,c]    = sum over (r,s,m) of dy[n,p,q,k] * weight[k,r,s], (p,q) the outputs whose tap (r,s) is (h,w)
//   dweight[k,r,s] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dilation_h, q*.., c]
//
// Layout     x, dx [N,H,W,C], weight, dweight [K,R,S], y, dy [N,P,Q,K]. Lanes are channels c; weights are repacked to
//            [r][s][m][c] for that. With M > 1 lanes of y and dy lie M apart.
// Engine     forward and backward_input are the convolution over taps of conv2d.h: kTilePixels pixels times a block of
//            channels in registers, a row of zeros where a tap is outside.
// Ownership  forward, backward_input: an item owns all channels of kChunkPixels pixels. backward_weight: an item owns a
//            block of channels over one slice of the rows of y; slabs are added in order.
// Traffic    forward: x + y, backward_input: dy + dx, backward_weight: x + dy, each once: overlapping taps meet in
//            cache.

#include "conv2d.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kTilePixels = 4;
constexpr int kBlockVectors = kVectorRegisters / 8;  // of channels; their sums take half of the registers
constexpr int kChunkPixels = 64;
constexpr int64_t kItems = 32;  // wanted, so that the work divides evenly among threads

template <class T>
constexpr int kBlock = kBlockVectors * kLanes<T>;

// packed[(r,s)][m][c] = weight[k][(r,s)]
template <class T>
void pack_weight(const Conv2dProblem& p, const T* weight, T* packed) {
  const int64_t taps = int64_t{p.R} * p.S, multiplier = p.K / p.C, channels = p.C;
  parallel_for(taps * multiplier, 2 * channels, [=](int64_t row) {
    const int64_t tap = row / multiplier, m = row % multiplier;
    for (int64_t c = 0; c < channels; ++c) packed[row * channels + c] = weight[(c * multiplier + m) * taps + tap];
  });
}

// Pixels of one tile, channels [c, c + kVectors * lanes), or `count` lanes of them where kVectors is 1.
template <class T, int kVectors, bool kDense>
void convolve_tile(const TapConv<T>& conv, const Epilogue& epilogue, const T* weight,
                   const Pixel (&pixels)[kTilePixels], int64_t c, int count) {
  const int64_t in_stride = kDense ? 1 : conv.in_channels, out_stride = kDense ? 1 : conv.out_channels;
  for (int m_out = 0; m_out < out_stride; ++m_out) {
    Vec<T> sum[kTilePixels][kVectors] = {};
    for (int r = 0; r < conv.h.taps; ++r)
      for (int s = 0; s < conv.w.taps; ++s) {
        const T* x[kTilePixels];
        if (!locate_tap(conv, pixels, r, s, c * in_stride, x)) continue;
        const int64_t tap =
            int64_t{conv.h.tap + conv.h.tap_step * r} * conv.filter_width + conv.w.tap + conv.w.tap_step * s;
        for (int m_in = 0; m_in < in_stride; ++m_in) {
          const T* filter = weight + (tap * in_stride * out_stride + m_in + m_out) * conv.groups + c;
          unroll<kVectors>([&](auto v) {
            const Vec<T> w = kDense ? load(filter + v * kLanes<T>) : load(filter, count);
            unroll<kTilePixels>([&](auto i) {
              sum[i][v] += w * (kDense ? load(x[i] + v * kLanes<T>) : read_lanes(x[i] + m_in, in_stride, count));
            });
          });
        }
      }
    Vec<T> result[kTilePixels][kVectors];
    unroll<kTilePixels>([&](auto i) { unroll<kVectors>([&](auto v) { result[i][v] = sum[i][v]; }); });
    for (int i = 0; i < kTilePixels && pixels[i].out >= 0; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t channel = (c + v * kLanes<T>)*out_stride + m_out;
        finish<T>(epilogue, result[i][v], conv.out, pixels[i].out + channel, channel, out_stride,
                  kDense ? kLanes<T> : count);
      }
  }
}

// f(vectors, c, lanes) over the channels [begin, end): blocks of kVectors whole vectors, then smaller ones; a vector
// that is not whole, or all of them where lanes are not neighbours in memory, come with vectors = 0.
template <class T, int kVectors = kBlockVectors, class F>
void for_channels(bool dense, int64_t begin, int64_t end, const F& f) {
  constexpr int kWidth = kVectors * kLanes<T>;
  if (dense)
    for (; begin + kWidth <= end; begin += kWidth) f(std::integral_constant<int, kVectors>{}, begin, kLanes<T>);
  if constexpr (kVectors > 1)
    return for_channels<T, kVectors / 2>(dense, begin, end, f);
  else
    for (; begin < end; begin += kLanes<T>)
      f(std::integral_constant<int, 0>{}, begin, static_cast<int>(std::min<int64_t>(kLanes<T>, end - begin)));
}

template <class T>
void convolve(const TapConv<T>& conv, const Epilogue& epilogue, const T* weight) {
  const bool dense = conv.in_channels == 1 && conv.out_channels == 1;
  const int64_t products = int64_t{conv.h.taps} * conv.w.taps * conv.in_pitch() * conv.out_channels;
  parallel_for(ceil_div(conv.pixels(), kChunkPixels), kChunkPixels * products, [&, dense](int64_t chunk) {
    const int64_t begin = chunk * kChunkPixels, end = std::min(begin + kChunkPixels, conv.pixels());
    PixelWalk<T> walk(conv, begin);
    for (int64_t at = begin; at < end; at += kTilePixels) {
      Pixel pixels[kTilePixels];
      for (int i = 0; i < kTilePixels; ++i) pixels[i] = at + i < end ? walk.next() : kNoPixel;
      for_channels<T>(dense, 0, conv.groups, [&](auto vectors, int64_t c, int lanes) {
        convolve_tile<T, std::max(vectors.value, 1), (vectors.value > 0)>(conv, epilogue, weight, pixels, c, lanes);
      });
    }
  });
}

template <class T>
struct Packed {
  T *weight, *zeros;
  int64_t zero_count;
  Packed(Arena& arena, const Conv2dProblem& p)
      : weight(arena.take<T>(int64_t{p.K} * p.R * p.S)),
        zeros(arena.take<T>(kBlock<T> * int64_t{p.K / p.C})),
        zero_count(kBlock<T> * int64_t{p.K / p.C}) {}
};

template <class T>
Packed<T> pack(const Conv2dProblem& p, const T* weight, void* workspace) {
  Arena arena(workspace);
  const Packed<T> packed(arena, p);
  pack_weight(p, weight, packed.weight);
  std::fill(packed.zeros, packed.zeros + packed.zero_count, T{});
  return packed;
}

// How backward_weight is cut: by shape alone.
template <class T>
struct WeightPlan {
  int64_t rows, channel_blocks, slice_rows, slices, size;

  explicit WeightPlan(const Conv2dProblem& p)
      : rows(int64_t{p.N} * p.P), channel_blocks(ceil_div(p.C, kBlock<T>)), size(int64_t{p.K} * p.R * p.S) {
    slice_rows = ceil_div(rows, std::min(rows, ceil_div(kItems, channel_blocks)));
    slices = ceil_div(rows, slice_rows);
  }
};

// sum[v] += x[q] * dy[q] along a row of `count` outputs.
template <class T, int kVectors, bool kDense>
void add_row(int64_t count, const T* x, int64_t x_step, const T* dy, int64_t dy_step, int64_t dy_stride, int lanes,
             T* sum) {
  Vec<T> total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = kDense ? load(sum + v * kLanes<T>) : load(sum, lanes);
  for (int64_t q = 0; q < count; ++q, x += x_step, dy += dy_step)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      total[v] += kDense ? load(x + v * kLanes<T>) * load(dy + v * kLanes<T>)
                         : load(x, lanes) * read_lanes(dy, dy_stride, lanes);
  for (int v = 0; v < kVectors; ++v) write_lanes(sum + v * kLanes<T>, total[v], 1, lanes);
}

// The outputs q in [begin, end) whose tap lies inside the input.
struct Span {
  int64_t begin, end;
};
inline Span outputs_inside(const TapAxis& axis, int tap) {
  const int64_t first = axis.offset + axis.offset_step * tap;
  const int64_t begin = first >= 0 ? 0 : ceil_div(-first, axis.in_step);
  const int64_t end = first >= axis.extent ? 0 : std::min(axis.count, ceil_div(axis.extent - first, axis.in_step));
  return {begin, std::max(begin, end)};
}

// slab[(r,s)][m][c ..] += the products of one row (n, p) of outputs.
template <class T, int kVectors, bool kDense>
void add_output_row(const TapConv<T>& conv, const T* dy, int64_t n, int64_t p, int64_t c, int lanes, T* slab) {
  const int64_t multiplier = conv.out_channels, C = conv.in_pitch(), K = conv.out_pitch();
  const T* dy_row = dy + (n * conv.h.count + p) * conv.w.count * K + c * multiplier;
  for (int r = 0; r < conv.h.taps; ++r) {
    const int64_t h = conv.h.in_step * p + conv.h.offset + conv.h.offset_step * r;
    if (h < 0 || h >= conv.h.extent) continue;
    const T* x_row = conv.in + (n * conv.h.extent + h) * conv.w.extent * C + c;
    for (int s = 0; s < conv.w.taps; ++s) {
      const Span q = outputs_inside(conv.w, s);
      const int64_t w = conv.w.in_step * q.begin + conv.w.offset + conv.w.offset_step * s;
      for (int64_t m = 0; m < multiplier && q.begin < q.end; ++m)
        add_row<T, kVectors, kDense>(q.end - q.begin, x_row + w * C, conv.w.in_step * C, dy_row + q.begin * K + m, K,
                                     multiplier, lanes,
                                     slab + ((int64_t{r} * conv.w.taps + s) * multiplier + m) * C + c);
    }
  }
}

}  // namespace

template <class T>
void depthwise_forward(const Conv2dProblem& p, const Epilogue& epilogue, const T* x, const T* weight, T* y,
                       void* workspace) {
  const Packed<T> packed = pack(p, weight, workspace);
  convolve(forward_conv<T>(p, x, packed.zeros, y), epilogue, packed.weight);
}

template <class T>
void depthwise_backward_input(const Conv2dProblem& p, const T* dy, const T* weight, T* dx, void* workspace) {
  const Packed<T> packed = pack(p, weight, workspace);
  for_backward_classes<T>(p, dy, packed.zeros, dx, [&](const TapConv<T>& conv) {
    convolve(conv, Epilogue{nullptr, nullptr, Activation::kNone}, packed.weight);
  });
}

template <class T>
void depthwise_backward_weight(const Conv2dProblem& p, const T* dy, const T* x, T* dweight, void* workspace) {
  const WeightPlan<T> plan(p);
  const TapConv<T> conv = forward_conv<T>(p, x, nullptr, nullptr);
  T* slabs = static_cast<T*>(workspace);
  const int64_t taps = int64_t{p.R} * p.S, multiplier = p.K / p.C, C = p.C, P = p.P;
  parallel_for(
      plan.slices * plan.channel_blocks, plan.slice_rows * p.Q * taps * multiplier * kBlock<T>, [&](int64_t item) {
        const int64_t slice = item / plan.channel_blocks, first = item % plan.channel_blocks * kBlock<T>;
        const int64_t last = std::min(first + kBlock<T>, C);
        T* slab = slabs + slice * plan.size;
        for (int64_t row = 0; row < taps * multiplier; ++row)
          std::fill(slab + row * C + first, slab + row * C + last, T{});
        for (int64_t row = slice * plan.slice_rows; row < std::min((slice + 1) * plan.slice_rows, plan.rows); ++row)
          for_channels<T>(multiplier == 1, first, last, [&](auto vectors, int64_t c, int lanes) {
            add_output_row<T, std::max(vectors.value, 1), (vectors.value > 0)>(conv, dy, row / P, row % P, c, lanes,
                                                                               slab);
          });
      });
  parallel_for(C, plan.slices * taps * multiplier, [=](int64_t c) {
    for (int64_t m = 0; m < multiplier; ++m)
      for (int64_t tap = 0; tap < taps; ++tap) {
        T sum{};
        for (int64_t slice = 0; slice < plan.slices; ++slice)
          sum += slabs[slice * plan.size + (tap * multiplier + m) * C + c];
        dweight[(c * multiplier + m) * taps + tap] = sum;
      }
  });
}

int64_t depthwise_forward_workspace(const Conv2dProblem& p) {
  return for_conv_dtype(p.dtype, [&](auto t) {
    Arena arena;
    Packed<decltype(t)>(arena, p);
    return arena.used();
  });
}

int64_t depthwise_backward_workspace(const Conv2dProblem& p, bool need_dx, bool need_dweight) {
  return for_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const WeightPlan<T> plan(p);
    const int64_t slabs = plan.slices * plan.size * static_cast<int64_t>(sizeof(T));
    return std::max(need_dx ? depthwise_forward_workspace(p) : 0, need_dweight ? slabs : 0);
  });
}

#define CNNOPS_INSTANTIATE(T)                                                                            \
  template void depthwise_forward(const Conv2dProblem&, const Epilogue&, const T*, const T*, T*, void*); \
  template void depthwise_backward_input(const Conv2dProblem&, const T*, const T*, T*, void*);           \
  template void depthwise_backward_weight(const Conv2dProblem&, const T*, const T*, T*, void*);
CNNOPS_INSTANTIATE(float)
CNNOPS_INSTANTIATE(double)
#undef CNNOPS_INSTANTIATE

}  // namespace cnnops::cpu::CNNOPS_ISA
