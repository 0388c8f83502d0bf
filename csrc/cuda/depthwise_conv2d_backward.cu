// Depthwise convolution by filters of 3 x 3, 5 x 5 and 7 x 7: both gradients from one read of dy, or one of them.
//
//   dx[n,h,w,c]    = sum over (r,s) of dy[n, (h + pad - r) / stride, (w + pad - s) / stride, c] * weight[c,r,s],
//                    where stride divides
//   dweight[c,r,s] = sum over (n,h,w) of dy[n, (h + pad - r) / stride, (w + pad - s) / stride, c] * x[n,h,w,c]
//
// Layout     As in depthwise_conv2d_forward.cu.
// Ownership  A block marches down strips of x and dx, whose windows of dy go round a ring in shared memory. A thread
//            owns two channels of 2 x 4 pixels of a step, and over all steps its part of the sums of dweight, which
//            meet in one slab of floats for each block; a second kernel adds the slabs in order.
// Traffic    dy once for each strip, its columns on either side with it; x and dx once; weight and a slab once for each
//            block.

#include "depthwise_conv2d.cuh"
#include "dtype.h"

namespace cnnops::cuda {
namespace {

// dx or slabs may be null.
template <class T, int kSize, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, kSize == 7 && sizeof(T) == 4 ? 2 : 3)
    depthwise_backward_kernel(Conv2dProblem p, DepthwiseCut cut, Epilogue epilogue, const T* dy, const T* x,
                              const T* weight, T* dx, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr int kChannels = kSizedBytes / static_cast<int>(sizeof(T)), kTaps = kSize * kSize;
  constexpr int kPixel = kChannels + kSkew / static_cast<int>(sizeof(T)), kPixels = kSizedRows * kSizedColumns;
  using Thread = DepthwiseThread<kChannels>;
  const Thread thread(cut);
  const Split block = split(blockIdx.x, cut.channel_tiles);
  const int64_t c = block.remainder * kChannels;
  const bool aligned = p.C % kVector<T> == 0;
  const Ring<T> ring{reinterpret_cast<T*>(shared), cut.window + cut.advance, cut.ring_columns, kPixel};
  const auto tile_of_x = [&](int other) {
    return Ring<T>{reinterpret_cast<T*>(shared + cut.other) + other * cut.step * cut.columns * kPixel, cut.step,
                   cut.columns, kPixel};
  };
  auto* const weights = reinterpret_cast<T*>(shared + cut.weights);
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);
  if (dx) bring_weights(weight, c, kChannels, p.C, kTaps, weights);

  // A strip's pixel (i, j) is x's (i - beside_h, j - beside_w). Of dy the taps reach kBefore rows before those of the
  // pixels (0, 0).
  constexpr int kBefore = (kSize - 1) / kStride;
  const int beside_h = p.pad_h % kStride, beside_w = p.pad_w % kStride;
  const int first_p = p.pad_h / kStride, first_q = p.pad_w / kStride;
  const auto rows_of = [&](const Strip& strip, int row, int first, int slot, int other) {
    const auto copy = [&]<bool kAligned>() {
      Window<T> window(dy, strip.n, p.P, p.Q, p.C, static_cast<int>(c));
      const int end_h = strip.end < p.H + beside_h ? strip.end : p.H + beside_h;
      const int end_w = strip.column + cut.columns < p.W + beside_w ? strip.column + cut.columns : p.W + beside_w;
      window.clip((end_h - 1) / kStride + first_p + 1, (end_w - 1) / kStride + first_q + 1);
      bring<kAligned>(window, row / kStride + first_p - kBefore + first, cut.window - first,
                      strip.column / kStride + first_q - kBefore, kChannels, ring, slot + first);
      if (!slabs) return;
      Window<T> pixels(x, strip.n, p.H, p.W, p.C, static_cast<int>(c));
      pixels.clip(end_h - beside_h, end_w - beside_w);
      bring<kAligned>(pixels, row - beside_h, cut.step, strip.column - beside_w, kChannels, tile_of_x(other), 0);
    };
    if (aligned)
      copy.template operator()<true>();
    else
      copy.template operator()<false>();
  };

  float2 dweight[kTaps] = {};
  Moments nothing[kVector<T>];
  const auto step = [&](const Strip& strip, int row, int slot, int other) {
    // f(gradient, pixel, tap) for each that meet.
    const auto for_each = [&](const auto& f) {
      CNNOPS_UNROLL
      for (int a = 0; a < (kSizedRows - 1) / kStride + kBefore + 1; ++a) {
        const T* const from = ring.row(slot + thread.down * kSizedRows / kStride + a) +
                              thread.across * kSizedColumns / kStride * kPixel + thread.channel;
        CNNOPS_UNROLL
        for (int b = 0; b < (kSizedColumns - 1) / kStride + kBefore + 1; ++b) {
          const float2 gradient = load_pair(from + b * kPixel);
          CNNOPS_UNROLL
          for (int i = 0; i < kPixels; ++i) {
            const int r = i / kSizedColumns - (a - kBefore) * kStride, s = i % kSizedColumns - (b - kBefore) * kStride;
            if (r >= 0 && r < kSize && s >= 0 && s < kSize) f(gradient, i, r * kSize + s);
          }
        }
      }
    };
    // One after the other, so that there are registers for dweight's sums.
    if (slabs) {
      float2 pixel[kPixels];
      const T* const from = tile_of_x(other).first + thread.channel +
                            (thread.down * kSizedRows * cut.columns + thread.across * kSizedColumns) * kPixel;
      CNNOPS_UNROLL
      for (int i = 0; i < kPixels; ++i)
        pixel[i] = load_pair(from + (i / kSizedColumns * cut.columns + i % kSizedColumns) * kPixel);
      for_each([&](float2 gradient, int i, int tap) { add_product(dweight[tap], gradient, pixel[i]); });
    }
    if (!dx) return;
    float2 acc[kPixels] = {};
    for_each([&](float2 gradient, int i, int tap) {
      add_product(acc[i], gradient, load_pair(weights + tap * kChannels + thread.channel));
    });
    const auto at = [&](int group, int i) -> int64_t {
      const int down = group / cut.across;
      const int h = row - beside_h + down * kSizedRows + i / kSizedColumns;
      const int w = strip.column - beside_w + (group - down * cut.across) * kSizedColumns + i % kSizedColumns;
      const bool inside = h >= 0 && h + beside_h < strip.end && h < p.H && w >= 0 && w < p.W;
      return inside ? ((strip.n * p.H + h) * p.W + w) * p.C : -1;
    };
    const Epilogue bias{.bias = epilogue.bias};  // which is all that there may be
    write_sums<T, kChannels, false>(bias, acc, sums, at, c, p.C, aligned, dx, nothing);
  };
  march(cut, block.quotient, rows_of, step);
  if (!slabs) return;

  __syncthreads();  // nobody reads the strips any more: the warps' sums take their place
  auto* const parts = reinterpret_cast<float*>(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  CNNOPS_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    CNNOPS_UNROLL
    for (int distance = Thread::kLanes; distance < 32; distance *= 2) {
      dweight[tap].x += __shfl_xor_sync(~0u, dweight[tap].x, distance);
      dweight[tap].y += __shfl_xor_sync(~0u, dweight[tap].y, distance);
    }
    if (lane < Thread::kLanes)
      *reinterpret_cast<float2*>(parts + (warp * kTaps + tap) * kChannels + thread.channel) = dweight[tap];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kChannels * kTaps; i += kDepthwiseThreads) {
    const int channel = i / kTaps, tap = i - channel * kTaps;
    if (c + channel >= p.C) return;
    float sum = 0;
    for (int from = 0; from < kDepthwiseWarps; ++from) sum += parts[(from * kTaps + tap) * kChannels + channel];
    slabs[block.quotient * p.C * kTaps + c * kTaps + i] = sum;
  }
}

}  // namespace

void depthwise_sized_backward(const Conv2dProblem& p, const DepthwiseCut& cut, const Epilogue& epilogue, const void* dy,
                              const void* x, const void* weight, void* dx, float* slabs, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    with_size(p, [&]<int kSize, int kStride>() {
      CNNOPS_LAUNCH((depthwise_backward_kernel<T, kSize, kStride>), blocks(cut.parts * cut.channel_tiles),
                    kDepthwiseThreads, cut.end, stream, p, cut, epilogue, static_cast<const T*>(dy),
                    static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(dx), slabs);
    });
  });
}

}  // namespace cnnops::cuda
