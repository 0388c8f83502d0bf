// Depthwise convolution of NCHW: both gradients from one read of dy and x, or one of them.
//
//   dx[n,c,h,w]    = sum over (r,s) and c's filters k of dy[n, k, (h + pad - r*dilation) / stride, ..] * weight[k,r,s],
//                    where stride divides
//   dweight[k,r,s] = sum over (n,p,q) of dy[n,k,p,q] * x[n, k / (K / C), p*stride - pad + r*dilation, ..]
//
// Layout     As in depthwise_nchw_forward.cu.
// Ownership  A block takes the strips of a tile of channels. First a thread belongs to one filter's plane: over all
//            strips it has its part of the sums of dweight, down columns of gradients, or where the
//            filter may be of any size, the sums of some taps; a block's sums are one slab of floats, and another
//            kernel adds the slabs in order. Then it belongs to one channel's plane and computes eight pixels of
//            dx: below each other, or in a stride of two, four pairs.
// Traffic    dy and x once, and the rows that strips of large planes share once more; dx once; weight and a slab once
//            for each block.

#include "depthwise_nchw.cuh"
#include "dtype.h"

namespace cnnops::cuda {
namespace {

// f(gradient, pixel, tap) for the gradients of column q that the pixels of a cell have, zeros beside dy. The cell is
// kDown * kStride rows of kStride columns, of which the first has h + pad = a * kStride and w + pad = (q + j) *
// kStride.
template <int kSize, int kStride, int kDown, class T, class F>
__device__ __forceinline__ void for_each_gradient(const T* plane, Rows rows, int Q, int a, int q, int j, const F& f) {
  constexpr int kBefore = (kSize - 1) / kStride;
  const bool inside = static_cast<unsigned>(q) < static_cast<unsigned>(Q);
  const T* row = plane + (a - kBefore - rows.begin) * Q + q;
  CNNOPS_UNROLL
  for (int i = 0; i < kDown + kBefore; ++i, row += Q) {
    const int at = a + i - kBefore - rows.begin;
    const bool there = inside & (static_cast<unsigned>(at) < static_cast<unsigned>(rows.count()));
    const float value = there ? to_float(*row) : 0;
    CNNOPS_UNROLL
    for (int t = 0; t < kDown * kStride; ++t) {
      const int r = t - (i - kBefore) * kStride;
      if (r < 0 || r >= kSize) continue;
      CNNOPS_UNROLL
      for (int u = 0; u < kStride; ++u)
        if (u + j * kStride < kSize) f(value, t * kStride + u, r * kSize + u + j * kStride);
    }
  }
}

// The taps along one axis that a pixel of x has: every step-th from the first on, whose gradients are `drop` apart.
struct TapsOfPixel {
  int first, gradient;  // the first tap, and its gradient, maybe beside dy

  __device__ TapsOfPixel(int pixel, int stride, int dilation, int step) : first(0), gradient(0) {
    while (first < step && (pixel - first * dilation) % stride != 0) ++first;
    gradient = (pixel - first * dilation) / stride;
    if (first == step) first = INT32_MAX;  // there is none
  }
};

template <class T, int kSize, int kStride>
__global__ void __launch_bounds__(kNchwThreads, 4)
    depthwise_nchw_backward_kernel(Conv2dProblem p, NchwCut cut, const T* bias, const T* dy, const T* x,
                                   const T* weight, T* dx, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kTaps = kSize ? kSize * kSize : 1;
  const NchwTile tile(p, cut);
  const NchwThread of_x(cut.lanes_x), of_y(cut.lanes_y);
  const int filters = tile.channels * tile.multiplier, taps = p.R * p.S;
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);
  auto* const weights = reinterpret_cast<float*>(shared + cut.weights);
  auto* const shares = reinterpret_cast<float*>(shared + cut.shares);
  if (dx) bring_weights(p, tile, weight, weights);

  const auto buffer_of_x = [&](int other) { return reinterpret_cast<T*>(shared + other * cut.x_bytes); };
  const auto buffer_of_y = [&](int other) { return reinterpret_cast<T*>(shared + cut.y + other * cut.y_bytes); };
  const auto planes_of_x = [&](const NchwStrip& strip) {
    return Planes<T>(cut, strip.n * p.C + tile.c, tile.channels, p.H, p.W, strip.x, cut.pitch_x);
  };
  const auto planes_of_y = [&](const NchwStrip& strip) {
    return Planes<T>(cut, (strip.n * p.C + tile.c) * tile.multiplier, filters, p.P, p.Q, strip.dy, cut.pitch_y);
  };
  const auto fetch = [&](const NchwStrip& strip, int other) {
    bring_planes(planes_of_y(strip), dy, int64_t{p.N} * p.K * p.P * p.Q, buffer_of_y(other));
    if (slabs) bring_planes(planes_of_x(strip), x, int64_t{p.N} * p.C * p.H * p.W, buffer_of_x(other));
  };

  // Of filters of any size: the items are (share of the positions, filter, tap), and `shares` has the sum of each.
  const int filter_taps = cut.planes * tile.multiplier * taps;
  const int sharing = filter_taps < kNchwThreads ? kNchwThreads / filter_taps : 1, items = sharing * filter_taps;
  if (kSize == 0 && slabs)
    for (int item = static_cast<int>(threadIdx.x); item < items; item += kNchwThreads) shares[item] = 0;

  float dweight[kTaps] = {};
  const auto add_to_dweight = [&](const NchwStrip& strip, int other) {
    const Planes<T> planes = planes_of_x(strip), gradients = planes_of_y(strip);
    const int skipped = strip.y.begin - strip.dy.begin;
    if constexpr (kSize > 0) {
      if (of_y.plane >= filters) return;
      const T* const plane = buffer_of_x(other) + planes.at(of_y.plane / tile.multiplier);
      const T* const gradient = buffer_of_y(other) + gradients.at(of_y.plane) + skipped * p.Q;
      // Down a column, past as many rows as have each lane busy: near[m] is the gradient of row - m.
      constexpr int kBefore = (kSize - 1) / kStride;
      const int rows = strip.y.count(), sharing_columns = cut.lanes_y > p.Q ? cut.lanes_y / p.Q : 1;
      const int run = static_cast<int>(ceil_div(rows, sharing_columns));
      for (int cell = of_y.lane; cell < sharing_columns * p.Q; cell += cut.lanes_y) {
        const int q = cell % p.Q, first = cell / p.Q * run, last = first + run < rows ? first + run : rows;
        const int w = q * kStride - p.pad_w;
        float near[kBefore + 1] = {};
        CNNOPS_NO_UNROLL  // so that the registers suffice
            for (int row = first; row < last + kBefore; ++row) {
          CNNOPS_UNROLL
          for (int m = kBefore; m > 0; --m) near[m] = near[m - 1];
          near[0] = row < last ? to_float(gradient[row * p.Q + q]) : 0;
          CNNOPS_UNROLL
          for (int e = 0; e < kStride; ++e) {
            const int h = (strip.y.begin + row) * kStride - p.pad_h + e - strip.x.begin;
            const bool there = static_cast<unsigned>(h) < static_cast<unsigned>(strip.x.count());
            CNNOPS_UNROLL
            for (int s = 0; s < kSize; ++s) {
              const bool inside = there & (static_cast<unsigned>(w + s) < static_cast<unsigned>(p.W));
              const float value = inside ? to_float(plane[h * p.W + w + s]) : 0;
              CNNOPS_UNROLL
              for (int m = 0; m <= kBefore; ++m)
                if (e + m * kStride < kSize) dweight[(e + m * kStride) * kSize + s] += value * near[m];
            }
          }
        }
      }
    } else {
      for (int item = static_cast<int>(threadIdx.x); item < items; item += kNchwThreads) {
        const int tap = item % taps, filter = item / taps % (cut.planes * tile.multiplier), share = item / filter_taps;
        if (filter >= filters) continue;
        // Those of the strip's positions whose pixel is not beside x.
        const auto positions = [](Rows within, int first, int stride, int size) -> Rows {
          const int begin = first < 0 ? (stride - 1 - first) / stride : 0;
          const int end = first < size ? (size - 1 - first) / stride + 1 : 0;
          return {begin > within.begin ? begin : within.begin, end < within.end ? end : within.end};
        };
        const int first_h = tap / p.S * p.dilation_h - p.pad_h, first_w = tap % p.S * p.dilation_w - p.pad_w;
        const Rows over_p = positions(strip.y, first_h, p.stride_h, p.H);
        const Rows over_q = positions({0, p.Q}, first_w, p.stride_w, p.W);
        if (over_q.count() <= 0) continue;
        const T* const plane = buffer_of_x(other) + planes.at(filter / tile.multiplier);
        const T* const gradient = buffer_of_y(other) + gradients.at(filter);
        float sum = shares[item];
        const int down = sharing / over_q.count(), across = sharing % over_q.count();
        int row = over_p.begin + share / over_q.count(), q = over_q.begin + share % over_q.count();
        while (row < over_p.end) {
          const int h = row * p.stride_h + first_h - strip.x.begin, w = q * p.stride_w + first_w;
          sum += to_float(gradient[(row - strip.dy.begin) * p.Q + q]) * to_float(plane[h * p.W + w]);
          row += down, q += across;
          if (q >= over_q.end) row += 1, q -= over_q.count();
        }
        shares[item] = sum;
      }
    }
  };

  // Where the filter may be of any size, a pixel's taps are every step-th.
  const auto step_of = [](int stride, int dilation) {
    int a = stride, b = dilation;
    while (b) {
      const int rest = a % b;
      a = b, b = rest;
    }
    return stride / a;
  };
  const int step_h = kSize ? 1 : step_of(p.stride_h, p.dilation_h);
  const int step_w = kSize ? 1 : step_of(p.stride_w, p.dilation_w);

  const auto compute_dx = [&](const NchwStrip& strip, int other, float* to) {
    const Planes<T> gradients = planes_of_y(strip);
    const float shift = bias ? to_float(bias[tile.c + of_x.plane]) : 0;
    const int first = of_x.plane * tile.multiplier;
    if constexpr (kSize > 0) {
      constexpr int kDown = kNchwRun / kStride / kStride;
      const int first_a = (strip.dx.begin + p.pad_h) / kStride, first_b = p.pad_w / kStride;
      const int rows = (strip.dx.end - 1 + p.pad_h) / kStride + 1 - first_a;
      const int columns = (p.W - 1 + p.pad_w) / kStride + 1 - first_b;
      const int cells = static_cast<int>(ceil_div(rows, kDown)) * columns;
      for (int cell = of_x.lane; cell < cells; cell += cut.lanes_x) {
        const int a = first_a + cell / columns * kDown, b = first_b + cell % columns;
        float acc[kNchwRun] = {};
        for (int j = first; j < first + tile.multiplier; ++j) {
          const float* const factors = weights + j * kTaps;
          CNNOPS_NO_UNROLL  // so that the registers suffice
              for (int column = 0; column <= (kSize - 1) / kStride; ++column) for_each_gradient<kSize, kStride, kDown>(
                  buffer_of_y(other) + gradients.at(j), strip.dy, p.Q, a, b - column, column,
                  [&](float value, int pixel, int tap) { acc[pixel] += value * factors[tap]; });
        }
        CNNOPS_UNROLL
        for (int i = 0; i < kNchwRun; ++i) {
          const int h = a * kStride + i / kStride - p.pad_h, w = b * kStride + i % kStride - p.pad_w;
          if (h >= strip.dx.begin && h < strip.dx.end && w >= 0 && w < p.W)
            to[(h - strip.dx.begin) * p.W + w] = acc[i] + shift;
        }
      }
    } else {
      const int drop_h = p.dilation_h * step_h / p.stride_h, drop_w = p.dilation_w * step_w / p.stride_w;
      for (int i = of_x.lane; i < strip.dx.count() * p.W; i += cut.lanes_x) {
        const TapsOfPixel down(strip.dx.begin + i / p.W + p.pad_h, p.stride_h, p.dilation_h, step_h);
        const TapsOfPixel across(i % p.W + p.pad_w, p.stride_w, p.dilation_w, step_w);
        float acc = 0;
        for (int j = first; j < first + tile.multiplier; ++j) {
          const T* const gradient = buffer_of_y(other) + gradients.at(j);
          for (int r = down.first, row = down.gradient; r < p.R; r += step_h, row -= drop_h) {
            if (row < strip.dy.begin || row >= strip.dy.end) continue;
            for (int s = across.first, q = across.gradient; s < p.S; s += step_w, q -= drop_w)
              if (q >= 0 && q < p.Q)
                acc += to_float(gradient[(row - strip.dy.begin) * p.Q + q]) * weights[j * taps + r * p.S + s];
          }
        }
        to[i] = acc + shift;
      }
    }
  };

  const auto step = [&](const NchwStrip& strip, int other) {
    if (slabs) add_to_dweight(strip, other);
    if (!dx) return;
    const Planes<T> planes(cut, strip.n * p.C + tile.c, tile.channels, p.H, p.W, strip.dx, cut.pitch_sums);
    if (of_x.plane < tile.channels && strip.dx.count() > 0) compute_dx(strip, other, sums + planes.at(of_x.plane));
    __syncthreads();
    write_planes<T>(planes, Activation::kNone, nullptr, false, sums, dx);
  };
  for_each_strip(p, cut, tile.part, fetch, step);
  if (!slabs) return;

  // shares[group][tap] where the size is known, groups of a filter beside each other; else [share][filter][tap].
  const int group = cut.lanes_y < 32 ? cut.lanes_y : 32, thread = static_cast<int>(threadIdx.x);
  if constexpr (kSize > 0) {
    CNNOPS_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) {
      for (int distance = 1; distance < group; distance *= 2)
        dweight[tap] += __shfl_xor_sync(~0u, dweight[tap], distance);
      if (thread % group == 0) shares[thread / group * kTaps + tap] = dweight[tap];
    }
  }
  __syncthreads();
  const int parts = kSize ? cut.lanes_y / group : sharing;
  const int next_filter = kSize ? parts * taps : taps, next_part = kSize ? taps : filter_taps;
  for (int i = thread; i < filters * taps; i += kNchwThreads) {
    const float* const from = shares + i / taps * next_filter + i % taps;
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += from[part * next_part];
    slabs[tile.part * p.K * taps + tile.c * tile.multiplier * taps + i] = sum;
  }
}

}  // namespace

void depthwise_nchw_backward(const Conv2dProblem& p, const NchwCut& cut, const void* bias, const void* dy,
                             const void* x, const void* weight, void* dx, float* slabs, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    with_instance(p, cut, [&]<int kSize, int kStride>() {
      CNNOPS_LAUNCH((depthwise_nchw_backward_kernel<T, kSize, kStride>), blocks(cut.parts * cut.channel_tiles),
                    kNchwThreads, cut.end, stream, p, cut, static_cast<const T*>(bias), static_cast<const T*>(dy),
                    static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(dx), slabs);
    });
  });
}

}  // namespace cnnops::cuda
