// Depthwise convolution by filters of any size up to 31 x 31, any stride, dilation, and number of filters a channel.
//
//   y[n,p,q,k]     = sum over (r,s) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s], c = k / (K / C)
//   dx[n,h,w,c]    = sum over (r,s) and c's filters k of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s],
//                    where stride divides
//   dweight[k,r,s] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//
// Layout     x [N,H,W,C], y [N,P,Q,K], weight [K,R,S].
// Ownership  As in depthwise_conv2d_forward.cu, but a thread's four pixels lie in a row, as far apart as there are
//            groups side by side. dx: a strip's position is `stride` x `stride` pixels, which are computed one class
//            of pixels after another, of the same taps each. dweight: a block owns eight rows of its filters, a thread
//            two channels of four neighbouring taps, whose sums stay in shared memory.
// Traffic    The tensor with the halo once for each strip, with the columns on either side, and dweight's x for each
//            eight rows of the filter; the others once; weight once for each block.

#include "depthwise_conv2d.cuh"
#include "dtype.h"

namespace cnnops::cuda {
namespace {

template <class T>
constexpr int kAnyChannels = kAnyBytes / static_cast<int>(sizeof(T));

// The input channels of a tile of filters, in shared memory.
template <class T>
struct Inputs {
  int multiplier, first, width;

  __device__ Inputs(const Conv2dProblem& p, int64_t k)
      : multiplier(p.K / p.C), first(static_cast<int>(k) / multiplier / kVector<T> * kVector<T>) {
    const int last = (static_cast<int>(k) + kAnyChannels<T> - 1) / multiplier;
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

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    depthwise_any_forward_kernel(Conv2dProblem p, DepthwiseCut cut, Epilogue epilogue, const T* x, const T* weight,
                                 T* y, float* partial) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kChannels = kAnyChannels<T>;
  const DepthwiseThread<kChannels> thread(cut);
  const Split block = split(blockIdx.x, cut.channel_tiles);
  const int64_t k = block.remainder * kChannels;
  const Inputs<T> inputs(p, k);
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
  if (partial && !epilogue.pooled)
    write_moments<T, kChannels>(moments, block.quotient * kDepthwiseWarps + static_cast<int>(threadIdx.x) / 32, k, p.K,
                                partial);
}

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    depthwise_any_backward_input_kernel(Conv2dProblem p, DepthwiseCut cut, Epilogue epilogue, const T* dy,
                                        const T* weight, T* dx) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kChannels = kAnyChannels<T>;
  const DepthwiseThread<kChannels> thread(cut);
  const Split block = split(blockIdx.x, cut.channel_tiles);
  const int64_t c = block.remainder * kChannels;
  const int multiplier = p.K / p.C, filters = kChannels * multiplier;
  const Ring<T> ring{reinterpret_cast<T*>(shared), cut.window + cut.advance, cut.ring_columns, cut.pixel};
  auto* const weights = reinterpret_cast<T*>(shared + cut.weights);
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);
  bring_weights(weight, c * multiplier, filters, p.K, p.R * p.S, weights);

  // Position i of a strip has the pixels h + pad = (i + first_p) * stride + one of [0, stride), which read dy at most
  // before_h rows before i + first_p.
  const int first_p = p.pad_h / p.stride_h, first_q = p.pad_w / p.stride_w;
  const int before_h = (p.R - 1) * p.dilation_h / p.stride_h, before_w = (p.S - 1) * p.dilation_w / p.stride_w;
  const auto rows_of = [&](const Strip& strip, int row, int first, int slot, int) {
    Window<T> window(dy, strip.n, p.P, p.Q, p.K, static_cast<int>(c) * multiplier);
    const int columns = cut.row_length - strip.column < cut.columns ? cut.row_length - strip.column : cut.columns;
    window.clip(strip.end + first_p, strip.column + columns + first_q);
    const int h = row + first_p - before_h + first, w = strip.column + first_q - before_w;
    if (p.K % kVector<T> == 0)
      bring<true>(window, h, cut.window - first, w, filters, ring, slot + first);
    else
      bring<false>(window, h, cut.window - first, w, filters, ring, slot + first);
  };

  Moments nothing[kVector<T>];
  const int place = thread.channel * multiplier;
  const auto step = [&](const Strip& strip, int row, int slot, int) {
    const auto one_class = [&]<bool kPaired>(int class_h, int class_w) {
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
    for (int class_h = 0; class_h < p.stride_h; ++class_h)
      for (int class_w = 0; class_w < p.stride_w; ++class_w) {
        if (multiplier == 1)
          one_class.template operator()<true>(class_h, class_w);
        else
          one_class.template operator()<false>(class_h, class_w);
      }
  };
  march(cut, block.quotient, rows_of, step);
}

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    depthwise_any_backward_weight_kernel(Conv2dProblem p, DepthwiseCut cut, const T* dy, const T* x, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kChannels = kAnyChannels<T>, kGroups = kDepthwiseThreads / (kChannels / 2);
  const Split block = split(blockIdx.x, cut.channel_tiles), part = split(block.quotient, cut.tap_tiles);
  const int64_t k = block.remainder * kChannels;
  const int first_r = static_cast<int>(part.remainder) * kTapRows;
  const int rows = p.R - first_r < kTapRows ? p.R - first_r : kTapRows;
  const Inputs<T> inputs(p, k);
  cut.window -= ((p.R < kTapRows ? p.R : kTapRows) - rows) * p.dilation_h;  // of the block with the last rows
  const Ring<T> ring{reinterpret_cast<T*>(shared), cut.window + cut.advance, cut.ring_columns, cut.pixel};
  const auto tile_of_dy = [&](int other) {
    return Ring<T>{reinterpret_cast<T*>(shared + cut.other) + other * cut.step * cut.columns * kChannels, cut.step,
                   cut.columns, kChannels};
  };
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);  // [share][chunk][tap][channel]

  const auto rows_of = [&](const Strip& strip, int row, int first, int slot, int other) {
    Window<T> window(x, strip.n, p.H, p.W, p.C, inputs.first);
    const int columns = p.Q - strip.column < cut.columns ? p.Q - strip.column : cut.columns;
    const int column = strip.column * p.stride_w - p.pad_w, above = first_r * p.dilation_h - p.pad_h;
    window.clip((strip.end - 1) * p.stride_h + above + (rows - 1) * p.dilation_h + 1,
                column + (columns - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1);
    const int h = row * p.stride_h + above + first;
    if (p.C % kVector<T> == 0)
      bring<true>(window, h, cut.window - first, column, inputs.width, ring, slot + first);
    else
      bring<false>(window, h, cut.window - first, column, inputs.width, ring, slot + first);
    Window<T> outputs(dy, strip.n, p.P, p.Q, p.K, static_cast<int>(k));
    outputs.clip(strip.end, strip.column + columns);
    if (p.K % kVector<T> == 0)
      bring<true>(outputs, row, cut.step, strip.column, kChannels, tile_of_dy(other), 0);
    else
      bring<false>(outputs, row, cut.step, strip.column, kChannels, tile_of_dy(other), 0);
  };

  // A chunk is kTapColumns taps of a row. Where there are fewer chunks than groups, several groups share the pixels.
  const int chunks_of_a_row = static_cast<int>(ceil_div(p.S, kTapColumns));
  const int chunks = (p.R < kTapRows ? p.R : kTapRows) * chunks_of_a_row;
  const int shares = chunks < kGroups ? kGroups / chunks : 1;
  const int group = static_cast<int>(threadIdx.x) / (kChannels / 2);
  const int channel = static_cast<int>(threadIdx.x) % (kChannels / 2) * 2;
  const int place = inputs.place(k + channel), second = inputs.place(k + channel + 1);
  const auto sum_of = [&](int item, int t) {
    return reinterpret_cast<float2*>(sums + (item * kTapColumns + t) * kChannels + channel);
  };
  for (int item = group; item < shares * chunks; item += kGroups)
    for (int t = 0; t < kTapColumns; ++t) *sum_of(item, t) = {0, 0};

  const auto step = [&](const Strip& strip, int row, int slot, int other) {
    const T* const tile = tile_of_dy(other).first + channel;
    const int end_row = strip.end - row < cut.step ? strip.end - row : cut.step;
    const int end_column = p.Q - strip.column < cut.columns ? p.Q - strip.column : cut.columns;
    for (int item = group; item < shares * chunks; item += kGroups) {
      const int share = item / chunks, chunk = item - share * chunks;
      const int r = chunk / chunks_of_a_row, s = (chunk - r * chunks_of_a_row) * kTapColumns;
      if (r >= rows) continue;
      int reach[kTapColumns];  // a tap beyond the filter does as the last one, and nobody reads its sum
      float2 acc[kTapColumns];
      CNNOPS_UNROLL
      for (int t = 0; t < kTapColumns; ++t) {
        reach[t] = (s + t < p.S ? s + t : p.S - 1) * p.dilation_w * cut.pixel;
        acc[t] = *sum_of(item, t);
      }
      for (int i = 0; i < end_row; ++i) {
        const T* const from = ring.row(slot + i * p.stride_h + r * p.dilation_h);
        for (int q = share; q < end_column; q += shares) {
          const float2 gradient = load_pair(tile + (i * cut.columns + q) * kChannels);
          CNNOPS_UNROLL
          for (int t = 0; t < kTapColumns; ++t) {
            const T* const at = from + q * p.stride_w * cut.pixel + reach[t];
            add_product(acc[t],
                        inputs.multiplier == 1 ? load_pair(at + place) : load_both<false>(at + place, at + second),
                        gradient);
          }
        }
      }
      CNNOPS_UNROLL
      for (int t = 0; t < kTapColumns; ++t) *sum_of(item, t) = acc[t];
    }
  };
  march(cut, part.quotient, rows_of, step);

  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kChannels * rows * p.S; i += kDepthwiseThreads) {
    const int filter = i / (rows * p.S), tap = i - filter * rows * p.S, r = tap / p.S, s = tap - r * p.S;
    if (k + filter >= p.K) return;
    float sum = 0;
    for (int share = 0; share < shares; ++share) {
      const int item = share * chunks + r * chunks_of_a_row + s / kTapColumns;
      sum += sums[(item * kTapColumns + s % kTapColumns) * kChannels + filter];
    }
    slabs[(part.quotient * p.K + k + filter) * p.R * p.S + first_r * p.S + tap] = sum;
  }
}

}  // namespace

void depthwise_any_forward(const Conv2dProblem& p, const DepthwiseCut& cut, const Epilogue& epilogue, const void* x,
                           const void* weight, void* y, float* partial, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(depthwise_any_forward_kernel<T>, blocks(cut.parts * cut.channel_tiles), kDepthwiseThreads, cut.end,
                  stream, p, cut, epilogue, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y),
                  partial);
  });
}

void depthwise_any_backward_input(const Conv2dProblem& p, const DepthwiseCut& cut, const Epilogue& epilogue,
                                  const void* dy, const void* weight, void* dx, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(depthwise_any_backward_input_kernel<T>, blocks(cut.parts * cut.channel_tiles), kDepthwiseThreads,
                  cut.end, stream, p, cut, epilogue, static_cast<const T*>(dy), static_cast<const T*>(weight),
                  static_cast<T*>(dx));
  });
}

void depthwise_any_backward_weight(const Conv2dProblem& p, const DepthwiseCut& cut, const void* dy, const void* x,
                                   float* slabs, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(depthwise_any_backward_weight_kernel<T>, blocks(cut.parts * cut.tap_tiles * cut.channel_tiles),
                  kDepthwiseThreads, cut.end, stream, p, cut, static_cast<const T*>(dy), static_cast<const T*>(x),
                  slabs);
  });
}

}  // namespace cnnops::cuda
