// Depthwise convolution by filters of 3 x 3, 5 x 5 and 7 x 7, forward.
//
//   y[n,p,q,c] = sum over (r,s) of x[n, p*stride - pad + r, q*stride - pad + s, c] * weight[c,r,s]
//
// Layout     x [N,H,W,C]; weight [C,R,S]; y [N,P,Q,C].
// Tile       a block: 64 bytes of channels c deep, 32 in 16 bits, 16 in fp32; columns w ->
//                        +- x: (columns - 1) * stride + S columns, in a ring --+
//            rows h    | |  +- y: columns = 8, 16 or 32, step rows p --------+ |  x: shared memory; the next step's are
//                      v |  | 2 channels of 2 x 4 a thread: registers        | |  on their way; columns * step = 64,
//                        |  +------------------------------------------------+ |  in fp32 128; steps go down the strip
//                        +- halo: R - stride rows, S - stride columns ---------+
//            weight: registers; of 7 x 7, shared memory. Split: strips along q and, where those are few, along p.
// Ownership  A block marches down strips of y, whose windows of x go round a ring in shared memory. A thread owns two
//            channels of 2 x 4 outputs of a step.
// Traffic    x once for each strip, its columns on either side with it, in 16-byte copies that go while the step before
//            is computed; y once. weight once for each block.

#include "depthwise_conv2d.cuh"
#include "dtype.h"

namespace cnnops::cuda {
namespace {

template <class T, int kSize, int kStride, bool kMoments>
__global__ void __launch_bounds__(kDepthwiseThreads, kSize == 3 ? 4 : 3)
    depthwise_forward_kernel(Conv2dProblem p, DepthwiseCut cut, Epilogue epilogue, const T* x, const T* weight, T* y,
                             float* partial) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kChannels = kSizedBytes / static_cast<int>(sizeof(T));
  constexpr bool kWeightsStay = kSize < 7;  // in registers
  constexpr int kKept = kWeightsStay ? kSize * kSize : 1;
  const DepthwiseThread<kChannels> thread(cut);
  const Split block = split(blockIdx.x, cut.channel_tiles);
  const int64_t k = block.remainder * kChannels;
  const bool aligned = p.C % kVector<T> == 0;
  constexpr int kPixel = kChannels + kSkew / static_cast<int>(sizeof(T));
  const Ring<T> ring{reinterpret_cast<T*>(shared), cut.window + cut.advance, cut.ring_columns, kPixel};
  auto* const weights = reinterpret_cast<T*>(shared + cut.weights);
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);
  bring_weights(weight, k, kChannels, p.K, kSize * kSize, weights);
  __syncthreads();
  const T* const my_weights = weights + thread.channel;
  float2 kept[kKept];
  if constexpr (kWeightsStay) {
    CNNOPS_UNROLL
    for (int tap = 0; tap < kSize * kSize; ++tap) kept[tap] = load_pair(my_weights + tap * kChannels);
  }
  const auto weight_of = [&](int tap) {
    if constexpr (kWeightsStay)
      return kept[tap];
    else
      return load_pair(my_weights + tap * kChannels);
  };

  const auto rows_of = [&](const Strip& strip, int row, int first, int slot, int) {
    Window<T> window(x, strip.n, p.H, p.W, p.C, static_cast<int>(k));
    const int columns = p.Q - strip.column < cut.columns ? p.Q - strip.column : cut.columns;
    const int column = strip.column * kStride - p.pad_w;
    window.clip((strip.end - 1) * kStride - p.pad_h + kSize, column + (columns - 1) * kStride + kSize);
    const int h = row * kStride - p.pad_h + first;
    if (aligned)
      bring<true>(window, h, cut.window - first, column, kChannels, ring, slot + first);
    else
      bring<false>(window, h, cut.window - first, column, kChannels, ring, slot + first);
  };

  Moments moments[kVector<T>];
  const auto step = [&](const Strip& strip, int row, int slot, int) {
    float2 acc[kSizedRows * kSizedColumns] = {};
    CNNOPS_UNROLL
    for (int i = 0; i < (kSizedRows - 1) * kStride + kSize; ++i) {
      const T* const from = ring.row(slot + thread.down * kSizedRows * kStride + i) +
                            thread.across * kSizedColumns * kStride * kPixel + thread.channel;
      CNNOPS_UNROLL
      for (int j = 0; j < (kSizedColumns - 1) * kStride + kSize; ++j) {
        const float2 in = load_pair(from + j * kPixel);
        CNNOPS_UNROLL
        for (int t = 0; t < kSizedRows; ++t) {
          CNNOPS_UNROLL
          for (int u = 0; u < kSizedColumns; ++u) {
            const int r = i - t * kStride, s = j - u * kStride;
            if (r < 0 || r >= kSize || s < 0 || s >= kSize) continue;
            add_product(acc[t * kSizedColumns + u], in, weight_of(r * kSize + s));
          }
        }
      }
    }
    const auto at = [&](int group, int i) -> int64_t {
      const int down = group / cut.across;
      const int64_t h = row + down * kSizedRows + i / kSizedColumns;
      const int64_t w = strip.column + (group - down * cut.across) * kSizedColumns + i % kSizedColumns;
      return h < strip.end && w < p.Q ? ((strip.n * p.P + h) * p.Q + w) * p.K : -1;
    };
    write_sums<T, kChannels, kMoments>(epilogue, acc, sums, at, k, p.K, aligned, y, moments);
    if constexpr (kMoments)
      if (epilogue.pooled && row + cut.step >= strip.end)
        write_pooled<T, kChannels>(moments, strip.index, k, p.K, partial);
  };
  march(cut, block.quotient, rows_of, step);

  if (kMoments && !epilogue.pooled) write_moments<T, kChannels>(moments, block.quotient, k, p.K, partial);
}

}  // namespace

void depthwise_sized_forward(const Conv2dProblem& p, const DepthwiseCut& cut, const Epilogue& epilogue, const void* x,
                             const void* weight, void* y, float* partial, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    with_size(p, [&]<int kSize, int kStride>() {
      const auto launch = [&]<bool kMoments>() {
        CNNOPS_LAUNCH((depthwise_forward_kernel<T, kSize, kStride, kMoments>), blocks(cut.parts * cut.channel_tiles),
                      kDepthwiseThreads, cut.end, stream, p, cut, epilogue, static_cast<const T*>(x),
                      static_cast<const T*>(weight), static_cast<T*>(y), partial);
      };
      if (partial)
        launch.template operator()<true>();
      else
        launch.template operator()<false>();
    });
  });
}

}  // namespace cnnops::cuda
