// The depthwise family of convolution kernels: groups of one channel each, with one or several filters.

#include "depthwise_conv2d.cuh"
#include "dtype.h"
#include "launch.h"
#include "padded_slabs.cuh"

namespace cnnops::cuda {
namespace {

int64_t moment_tiles(const DepthwiseCut& cut) { return cut.parts * kDepthwiseWarps; }

// Floats that the forward pass wants for its statistics.
int64_t partial_size(const DepthwiseCut& cut, int64_t K, const Epilogue& epilogue) {
  if (epilogue.pooled) return cut.strips * kDepthwiseWarps * K;
  return epilogue.mean ? moment_tiles(cut) * 3 * K : 0;
}

// One of dweight's sums over a block's strips of x, of the pixels that dy has a gradient for.
template <class T>
__device__ float sum_again(const Conv2dProblem& p, const DepthwiseCut& cut, int64_t part, const T* dy, const T* x,
                           int64_t k, int r, int s) {
  const int64_t begin = part * cut.each, end = begin + cut.each < cut.strips ? begin + cut.each : cut.strips;
  const int64_t c = k / (p.K / p.C);
  const int each_h = cut.sized ? 1 : p.stride_h, each_w = cut.sized ? 1 : p.stride_w;  // pixels of a position
  float sum = 0;
  for (int64_t index = begin; index < end; ++index) {
    const Strip strip = strip_of(cut, index);
    for (int i = strip.row * each_h; i < strip.end * each_h; ++i) {
      const int h = i - p.pad_h % p.stride_h, u = h + p.pad_h - r * p.dilation_h;
      if (h >= p.H) break;
      if (h < 0 || u < 0 || u % p.stride_h || u / p.stride_h >= p.P) continue;
      for (int j = strip.column * each_w; j < (strip.column + cut.columns) * each_w; ++j) {
        const int w = j - p.pad_w % p.stride_w, v = w + p.pad_w - s * p.dilation_w;
        if (w >= p.W) break;
        if (w < 0 || v < 0 || v % p.stride_w || v / p.stride_w >= p.Q) continue;
        sum += to_float(dy[((strip.n * p.P + u / p.stride_h) * p.Q + v / p.stride_w) * p.K + k]) *
               to_float(x[((strip.n * p.H + h) * p.W + w) * p.C + c]);
      }
    }
  }
  return sum;
}

constexpr int kAddThreads = 256;

// dweight[k][tap] = the sum over slabs of slabs[slab][tile of taps][k][tap].
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    depthwise_add_slabs_kernel(Conv2dProblem p, DepthwiseCut cut, const float* slabs, const T* dy, const T* x,
                               T* dweight) {
  const int taps = p.R * p.S, most = cut.tap_tiles > 1 ? kTapRows * p.S : taps;  // of a filter, and of a tile
  const int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x, size = int64_t{p.K} * taps;
  if (i >= size) return;
  const Split tile = split(i, int64_t{p.K} * most);
  const int first = static_cast<int>(tile.quotient) * most;
  const Split at = split(tile.remainder, taps - first < most ? taps - first : most);
  const int tap = first + static_cast<int>(at.remainder);
  const float sum = add_padded_slabs(slabs, cut.parts, size, i, [&](int64_t slab) {
    return sum_again(p, cut, slab, dy, x, at.quotient, tap / p.S, tap % p.S);
  });
  from_float(sum, dweight[at.quotient * taps + tap]);
}

void backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
              void* workspace, Stream stream) {
  auto* const slabs = static_cast<float*>(workspace);
  const DepthwiseCut cut = depthwise_cut(p, DepthwisePass::kWeight, device());
  const auto pass = cut.sized ? depthwise_sized_backward : depthwise_any_backward;
  if (dx && cut.tap_tiles > 1) {
    pass(p, depthwise_cut(p, DepthwisePass::kInput, device()), {}, dy, nullptr, weight, dx, nullptr, stream);
    dx = nullptr;
  }
  pass(p, cut, {}, dy, x, weight, dx, slabs, stream);
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(depthwise_add_slabs_kernel<T>, blocks(ceil_div(slab_size(p), kAddThreads)), kAddThreads, 0, stream, p,
                  cut, slabs, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dweight));
  });
}

}  // namespace

const Conv2dFamily kDepthwiseConv2d = {
    .forward_workspace = [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue) -> int64_t {
      const DepthwiseCut cut = depthwise_cut(p, DepthwisePass::kForward, device());
      return partial_size(cut, p.K, epilogue) * int64_t{sizeof(float)};
    },
    .forward =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* x, const void* weight,
           void* y, void* workspace, Stream stream) {
          const DepthwiseCut cut = depthwise_cut(p, DepthwisePass::kForward, device());
          auto* const partial = epilogue.mean || epilogue.pooled ? static_cast<float*>(workspace) : nullptr;
          (cut.sized ? depthwise_sized_forward : depthwise_any_forward)(p, cut, epilogue, x, weight, y, partial,
                                                                        stream);
          if (epilogue.mean) finish_moments(moment_tiles(cut), p.K, partial, epilogue, stream);
          if (epilogue.pooled) finish_pooled(p, cut.strips / p.N * kDepthwiseWarps, partial, epilogue, stream);
        },
    .backward_input_workspace = [](const Conv2dProblem&, const Conv2dPlan&) -> int64_t { return 0; },
    .backward_input =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* dy, const void* weight,
           void* dx, void*, Stream stream) {
          const DepthwiseCut cut = depthwise_cut(p, DepthwisePass::kInput, device());
          (cut.sized ? depthwise_sized_backward : depthwise_any_backward)(p, cut, epilogue, dy, nullptr, weight, dx,
                                                                          nullptr, stream);
        },
    .backward_weight_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan) -> int64_t {
      return plan.splits * slab_size(p) * int64_t{sizeof(float)};
    },
    .backward_weight = [](const Conv2dProblem& p, const Conv2dPlan&, const void* dy, const void* x, void* dweight,
                          void* workspace,
                          Stream stream) { backward(p, dy, x, nullptr, nullptr, dweight, workspace, stream); },
    .backward = [](const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                   void* workspace, Stream stream) { backward(p, dy, x, weight, dx, dweight, workspace, stream); },
    .pools = true,
};

}  // namespace cnnops::cuda
