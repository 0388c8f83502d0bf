// Depthwise convolution by filters of any size up to 31 x 31, any stride, dilation, and number of filters a channel.
//
//   y[n,p,q,k]     = sum over (r,s) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s], c = k / (K / C)
//   dx[n,h,w,c]    = sum over (r,s) and c's filters k of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s],
//                    where stride divides
//   dweight[k,r,s] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//
// Layout     x [N,H,W,C], y [N,P,Q,K], weight [K,R,S].
// Ownership  As in depthwise_conv2d_forward.cu, but a thread's four pixels lie in a row, as far apart as there are
//            groups side by side; a tile of y has the filters of a sector of x where each channel has two or four.
//            Both gradients: a strip's position is `stride` x `stride` pixels of x, and a tile a sector of its channels
//            with all their filters. dx is computed one class of pixels after another, of the same taps each. For
//            dweight a group has four neighbouring taps of a filter, whose sums stay in shared memory.
// Traffic    Forward: x with the halo once for each strip, with the columns on either side; y once. Backward: dy with
//            the halo once for each strip, and x and dx once. weight and a slab of dweight once for each block.
//            Where the sums of all taps do not fit in shared memory, dx and dweight are computed apart: dweight by
//            blocks of eight rows of taps, each of which reads dy and x once more.

#include "depthwise_conv2d.cuh"
#include "dtype.h"

namespace cnnops::cuda {
namespace {

// The input channels of a tile of filters, in shared memory.
template <class T, int kChannels>
struct Inputs {
  int multiplier, first, width;

  __device__ Inputs(const Conv2dProblem& p, int64_t k)
      : multiplier(p.K / p.C), first(static_cast<int>(k) / multiplier / kVector<T> * kVector<T>) {
    const int last = (static_cast<int>(k) + kChannels - 1) / multiplier;
    width = (last - first) / kVector<T> * kVector<T> + kVector<T>;
  }
  __device__ int place(int64_t k) const { return static_cast<int>(k) / multiplier - first; }
};

// Two numbers that lie beside each other where kPaired.
template <bool kPaired, class T>
__device__ __forceinline__ float2 load_both(const T* first, const T* second) {
  if constexpr (kPaired)
    return load_pair(first);
  else
    return {to_float(*first), to_float(*second)};
}

template <class T, int kBytes>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    depthwise_any_forward_kernel(Conv2dProblem p, DepthwiseCut cut, Epilogue epilogue, const T* x, const T* weight,
                                 T* y, float* partial) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kChannels = kBytes / static_cast<int>(sizeof(T));
  const DepthwiseThread<kChannels> thread(cut);
  const Split block = split(blockIdx.x, cut.channel_tiles);
  const int64_t k = block.remainder * kChannels;
  const Inputs<T, kChannels> inputs(p, k);
  const Ring<T> ring{reinterpret_cast<T*>(shared), cut.window + cut.advance, cut.ring_columns, cut.pixel};
  auto* const weights = reinterpret_cast<T*>(shared + cut.weights);
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);
  bring_weights(weight, k, kChannels, p.K, p.R * p.S, weights);

  const auto rows_of = [&](const Strip& strip, int row, int first, int slot, int) {
    Window<T> window(x, strip.n, p.H, p.W, p.C, inputs.first);
    const int columns = p.Q - strip.column < cut.columns ? p.Q - strip.column : cut.columns;
    const int column = strip.column * p.stride_w - p.pad_w, h = row * p.stride_h - p.pad_h + first;
    window.clip((strip.end - 1) * p.stride_h - p.pad_h + (p.R - 1) * p.dilation_h + 1,
                column + (columns - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1);
    if (p.C % kVector<T> == 0)
      bring<true>(window, h, cut.window - first, column, inputs.width, ring, slot + first);
    else
      bring<false>(window, h, cut.window - first, column, inputs.width, ring, slot + first);
  };

  Moments moments[kVector<T>];
  const int place = inputs.place(k + thread.channel), second = inputs.place(k + thread.channel + 1);
  const auto step = [&](const Strip& strip, int row, int slot, int) {
    float2 acc[kAnyColumns] = {};
    const auto sum = [&]<bool kPaired>() {
      for (int r = 0; r < p.R; ++r) {
        const T* const from = ring.row(slot + thread.down * p.stride_h + r * p.dilation_h);
        for (int s = 0; s < p.S; ++s) {
          const float2 factor = load_pair(weights + (r * p.S + s) * kChannels + thread.channel);
          CNNOPS_UNROLL
          for (int i = 0; i < kAnyColumns; ++i) {
            const int column = (thread.across + i * cut.across) * p.stride_w + s * p.dilation_w;
            const T* const at = from + column * cut.pixel;
            add_product(acc[i], load_both<kPaired>(at + place, at + second), factor);
          }
        }
      }
    };
    if (inputs.multiplier == 1)
      sum.template operator()<true>();
    else
      sum.template operator()<false>();
    const auto at = [&](int group, int i) -> int64_t {
      const int down = group / cut.across;
      const int64_t h = row + down, w = strip.column + group - down * cut.across + i * cut.across;
      return h < strip.end && w < p.Q ? ((strip.n * p.P + h) * p.Q + w) * p.K : -1;
    };
    const bool aligned = p.K % kVector<T> == 0;
    if (partial)
      write_sums<T, kChannels, true>(epilogue, acc, sums, at, k, p.K, aligned, y, moments);
    else
      write_sums<T, kChannels, false>(epilogue, acc, sums, at, k, p.K, aligned, y, moments);
    if (epilogue.pooled && row + cut.step >= strip.end)
      write_pooled<T, kChannels>(moments, strip.index, k, p.K, partial);
  };
  march(cut, block.quotient, rows_of, step);
  if (partial && !epilogue.pooled) write_moments<T, kChannels>(moments, block.quotient, k, p.K, partial);
}

// kPaired: whether each channel has one filter, so that a pair of filters lies beside each other.
template <class T, bool kPaired>
__global__ void __launch_bounds__(kLoneThreads, 2)
    depthwise_any_backward_kernel(Conv2dProblem p, DepthwiseCut cut, Epilogue epilogue, const T* dy, const T* x,
                                  const T* weight, T* dx, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kChannels = kAnyBytes / static_cast<int>(sizeof(T)), kLanes = kChannels / 2;
  const DepthwiseThread<kChannels> thread(cut);
  const int groups = cut.across * cut.down;
  const Split block = split(blockIdx.x, cut.channel_tiles), part = split(block.quotient, cut.tap_tiles);
  const int64_t c = block.remainder * kChannels;
  const int multiplier = kPaired ? 1 : p.K / p.C, filters = kChannels * multiplier, place = thread.channel * multiplier;
  const int first_r = static_cast<int>(part.remainder) * kTapRows;
  const int rows = cut.tap_tiles > 1 && p.R - first_r > kTapRows ? kTapRows : p.R - first_r;

  // Position i of a strip has the pixels h + pad = (i + first_p) * stride + one of [0, stride), which read dy at most
  // before_h and at least after_h rows before i + first_p.
  const int first_p = p.pad_h / p.stride_h, first_q = p.pad_w / p.stride_w;
  const int before_h = (first_r + rows - 1) * p.dilation_h / p.stride_h, after_h = first_r * p.dilation_h / p.stride_h;
  const int before_w = (p.S - 1) * p.dilation_w / p.stride_w;
  cut.window = cut.advance + before_h - after_h;
  const Ring<T> ring{reinterpret_cast<T*>(shared), cut.window + cut.advance, cut.ring_columns, cut.pixel};
  const auto tile_of_x = [&](int other) {
    const int size = cut.step * p.stride_h, columns = cut.columns * p.stride_w;
    return Ring<T>{reinterpret_cast<T*>(shared + cut.other) + other * size * columns * kChannels, size, columns,
                   kChannels};
  };
  auto* const weights = reinterpret_cast<T*>(shared + cut.weights);
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);
  auto* const dweight = reinterpret_cast<float*>(shared + cut.dweight);  // [share][chunk][filter][tap][channel]
  if (dx) bring_weights(weight, c * multiplier, filters, p.K, p.R * p.S, weights);

  const auto rows_of = [&](const Strip& strip, int row, int first, int slot, int other) {
    Window<T> window(dy, strip.n, p.P, p.Q, p.K, static_cast<int>(c) * multiplier);
    const int columns = cut.row_length - strip.column < cut.columns ? cut.row_length - strip.column : cut.columns;
    window.clip(strip.end + first_p - after_h, strip.column + columns + first_q);
    const int p_row = row + first_p - before_h + first, q = strip.column + first_q - before_w;
    if (p.K % kVector<T> == 0)
      bring<true>(window, p_row, cut.window - first, q, filters, ring, slot + first);
    else
      bring<false>(window, p_row, cut.window - first, q, filters, ring, slot + first);
    if (!slabs) return;
    Window<T> pixels(x, strip.n, p.H, p.W, p.C, static_cast<int>(c));
    pixels.clip((strip.end + first_p) * p.stride_h - p.pad_h,
                (strip.column + columns + first_q) * p.stride_w - p.pad_w);
    const int h = (row + first_p) * p.stride_h - p.pad_h, w = (strip.column + first_q) * p.stride_w - p.pad_w;
    if (p.C % kVector<T> == 0)
      bring<true>(pixels, h, cut.step * p.stride_h, w, kChannels, tile_of_x(other), 0);
    else
      bring<false>(pixels, h, cut.step * p.stride_h, w, kChannels, tile_of_x(other), 0);
  };

  // A chunk is kTapColumns taps of a row. Where there are fewer filters' chunks than groups, several groups share the
  // positions.
  const int chunks_of_a_row = static_cast<int>(ceil_div(p.S, kTapColumns)), chunks = rows * chunks_of_a_row;
  const int shares = chunks * multiplier < groups ? groups / (chunks * multiplier) : 1;
  const int items = shares * chunks * multiplier, group = static_cast<int>(threadIdx.x) / kLanes;
  const auto sum_of = [&](int item, int t) {
    return reinterpret_cast<float2*>(dweight + (item * kTapColumns + t) * kChannels + thread.channel);
  };
  if (slabs)
    for (int item = group; item < items; item += groups)
      for (int t = 0; t < kTapColumns; ++t) *sum_of(item, t) = {0, 0};

  const auto add_to_dweight = [&](const Strip& strip, int row, int slot, int other) {
    const Ring<T> pixels = tile_of_x(other);
    const int end_row = strip.end - row < cut.step ? strip.end - row : cut.step;
    const int end_column = cut.row_length - strip.column < cut.columns ? cut.row_length - strip.column : cut.columns;
    for (int item = group; item < items; item += groups) {
      const int share = item / (chunks * multiplier), chunk = item / multiplier - share * chunks;
      const int r = chunk / chunks_of_a_row, s = (chunk - r * chunks_of_a_row) * kTapColumns;
      const int reach_h = (first_r + r) * p.dilation_h;
      int to_gradient[kTapColumns], to_pixel[kTapColumns];
      float2 acc[kTapColumns];
      CNNOPS_UNROLL
      for (int t = 0; t < kTapColumns; ++t) {  // one beyond the filter does as the last one, and nobody reads its sum
        const int reach_w = (s + t < p.S ? s + t : p.S - 1) * p.dilation_w;
        to_gradient[t] = (before_w - reach_w / p.stride_w) * cut.pixel + place + item % multiplier;
        to_pixel[t] = reach_w % p.stride_w * kChannels + thread.channel;
        acc[t] = *sum_of(item, t);
      }
      for (int i = 0; i < end_row; ++i) {
        const T* const gradients = ring.row(slot + before_h - reach_h / p.stride_h + i);
        const T* const pixel_row = pixels.row(i * p.stride_h + reach_h % p.stride_h);
        for (int q = share; q < end_column; q += shares) {
          float2 pixel;
          CNNOPS_UNROLL
          for (int t = 0; t < kTapColumns; ++t) {
            if (t == 0 || p.stride_w > 1) pixel = load_pair(pixel_row + q * p.stride_w * kChannels + to_pixel[t]);
            const T* const gradient = gradients + q * cut.pixel + to_gradient[t];
            add_product(acc[t], pixel, load_both<kPaired>(gradient, gradient + multiplier));
          }
        }
      }
      CNNOPS_UNROLL
      for (int t = 0; t < kTapColumns; ++t) *sum_of(item, t) = acc[t];
    }
  };

  // The pixels of one class, which are of the same taps each.
  Moments nothing[kVector<T>];
  const auto write_dx = [&](const Strip& strip, int row, int slot, int class_h, int class_w) {
    float2 acc[kAnyColumns] = {};
    for (int r = 0; r < p.R; ++r) {
      const int above = r * p.dilation_h - class_h;
      if (above % p.stride_h) continue;
      const T* const from = ring.row(slot + before_h + thread.down - above / p.stride_h);
      for (int s = 0; s < p.S; ++s) {
        const int left = s * p.dilation_w - class_w;
        if (left % p.stride_w) continue;
        const T* const first = from + (before_w + thread.across - left / p.stride_w) * cut.pixel + place;
        const T* const factors = weights + (r * p.S + s) * filters + place;
        CNNOPS_NO_UNROLL  // so that the registers suffice
            for (int j = 0; j < multiplier; ++j) {
          const float2 factor = load_both<kPaired>(factors + j, factors + multiplier + j);
          CNNOPS_UNROLL
          for (int i = 0; i < kAnyColumns; ++i) {
            const T* const at = first + i * cut.across * cut.pixel + j;
            add_product(acc[i], load_both<kPaired>(at, at + multiplier), factor);
          }
        }
      }
    }
    const auto at = [&](int group, int i) -> int64_t {
      const int down = group / cut.across;
      const int h = (row + down + first_p) * p.stride_h + class_h - p.pad_h;
      const int w =
          (strip.column + group - down * cut.across + i * cut.across + first_q) * p.stride_w + class_w - p.pad_w;
      const bool inside = row + down < strip.end && h >= 0 && h < p.H && w >= 0 && w < p.W;
      return inside ? ((strip.n * p.H + h) * p.W + w) * p.C : -1;
    };
    write_sums<T, kChannels, false>(epilogue, acc, sums, at, c, p.C, p.C % kVector<T> == 0, dx, nothing);
  };

  const auto step = [&](const Strip& strip, int row, int slot, int other) {
    if (slabs) add_to_dweight(strip, row, slot, other);
    if (!dx) return;
    for (int class_h = 0; class_h < p.stride_h; ++class_h)
      for (int class_w = 0; class_w < p.stride_w; ++class_w) write_dx(strip, row, slot, class_h, class_w);
  };
  march(cut, part.quotient, rows_of, step);
  if (!slabs) return;

  __syncthreads();
  const int taps = rows * p.S;
  for (int i = static_cast<int>(threadIdx.x); i < filters * taps; i += cut.threads) {
    const int filter = i / taps, tap = i - filter * taps, r = tap / p.S, s = tap - r * p.S;
    const int64_t k = c * multiplier + filter;
    if (k >= p.K) return;
    float sum = 0;
    for (int share = 0; share < shares; ++share) {
      const int chunk = share * chunks + r * chunks_of_a_row + s / kTapColumns;
      const int item = chunk * multiplier + filter % multiplier;
      sum += dweight[(item * kTapColumns + s % kTapColumns) * kChannels + filter / multiplier];
    }
    slabs[(part.quotient * p.R + first_r) * p.S * p.K + k * taps + tap] = sum;
  }
}

}  // namespace

void depthwise_any_forward(const Conv2dProblem& p, const DepthwiseCut& cut, const Epilogue& epilogue, const void* x,
                           const void* weight, void* y, float* partial, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto launch = [&]<int kBytes>() {
      CNNOPS_LAUNCH((depthwise_any_forward_kernel<T, kBytes>), blocks(cut.parts * cut.channel_tiles), kDepthwiseThreads,
                    cut.end, stream, p, cut, epilogue, static_cast<const T*>(x), static_cast<const T*>(weight),
                    static_cast<T*>(y), partial);
    };
    const int bytes = cut.channels * static_cast<int>(sizeof(T));
    if (bytes == kAnyBytes)
      launch.template operator()<kAnyBytes>();
    else if (bytes < kMostAnyBytes)
      launch.template operator()<kMostAnyBytes / 2>();
    else
      launch.template operator()<kMostAnyBytes>();
  });
}

void depthwise_any_backward(const Conv2dProblem& p, const DepthwiseCut& cut, const Epilogue& epilogue, const void* dy,
                            const void* x, const void* weight, void* dx, float* slabs, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto launch = [&]<bool kPaired>() {
      CNNOPS_LAUNCH((depthwise_any_backward_kernel<T, kPaired>), blocks(cut.parts * cut.tap_tiles * cut.channel_tiles),
                    cut.threads, cut.end, stream, p, cut, epilogue, static_cast<const T*>(dy), static_cast<const T*>(x),
                    static_cast<const T*>(weight), static_cast<T*>(dx), slabs);
    };
    if (p.K == p.C)
      launch.template operator()<true>();
    else
      launch.template operator()<false>();
  });
}

}  // namespace cnnops::cuda
