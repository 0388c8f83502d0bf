// The depthwise family of convolution kernels: groups of one channel each, with one or several filters.

#include "depthwise_conv2d.cuh"
#include "dtype.h"
#include "launch.h"

namespace cnnops::cuda {
namespace {

int64_t moment_tiles(const DepthwiseCut& cut) { return cut.parts * kDepthwiseWarps; }

// Floats that the forward pass wants for its statistics.
int64_t partial_size(const DepthwiseCut& cut, int64_t K, const Epilogue& epilogue) {
  if (epilogue.pooled) return cut.strips * kDepthwiseWarps * K;
  return epilogue.mean ? moment_tiles(cut) * 3 * K : 0;
}

constexpr int kPooledThreads = 128;

// pooled[n][k] = the sum of partial[n][part][k] over the parts, in order, divided by the `count` of an image's results.
__global__ void __launch_bounds__(kPooledThreads)
    depthwise_finish_pooled_kernel(int64_t size, int64_t parts, int64_t K, float count, const float* partial,
                                   float* pooled) {
  const int64_t i = int64_t{blockIdx.x} * kPooledThreads + threadIdx.x;
  if (i >= size) return;
  const Split at = split(i, K);
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partial[(at.quotient * parts + part) * K + at.remainder];
  pooled[i] = sum / count;
}

constexpr int kAddThreads = 256;

// dweight[k][tap] = the sum over slabs, in order, of slabs[slab][tile of taps][k][tap].
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    depthwise_add_slabs_kernel(int64_t count, int64_t K, int taps, int taps_of_a_tile, const float* slabs, T* dweight) {
  const int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x, size = K * taps;
  if (i >= size) return;
  const Split tile = split(i, K * taps_of_a_tile);
  const int first = static_cast<int>(tile.quotient) * taps_of_a_tile;
  const Split at = split(tile.remainder, taps - first < taps_of_a_tile ? taps - first : taps_of_a_tile);
  float sum = 0;
  for (int64_t slab = 0; slab < count; ++slab) sum += slabs[slab * size + i];
  from_float(sum, dweight[at.quotient * taps + first + at.remainder]);
}

void backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
              void* workspace, Stream stream) {
  auto* const slabs = static_cast<float*>(workspace);
  const DepthwiseCut cut = depthwise_cut(p, DepthwisePass::kWeight, device());
  const auto pass = cut.sized ? depthwise_sized_backward : depthwise_any_backward;
  if (cut.tap_tiles == 1) {
    pass(p, cut, {}, dy, x, weight, dx, slabs, stream);
    add_slabs(p.dtype, cut.parts, slab_size(p), slabs, dweight, stream);
    return;
  }
  if (dx) pass(p, depthwise_cut(p, DepthwisePass::kInput, device()), {}, dy, nullptr, weight, dx, nullptr, stream);
  pass(p, cut, {}, dy, x, weight, nullptr, slabs, stream);
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(depthwise_add_slabs_kernel<T>, blocks(ceil_div(slab_size(p), kAddThreads)), kAddThreads, 0, stream,
                  cut.parts, int64_t{p.K}, p.R * p.S, kTapRows * p.S, slabs, static_cast<T*>(dweight));
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
          if (epilogue.pooled) {
            const int64_t size = int64_t{p.N} * p.K, parts = cut.strips / p.N * kDepthwiseWarps;
            CNNOPS_LAUNCH(depthwise_finish_pooled_kernel, blocks(ceil_div(size, kPooledThreads)), kPooledThreads, 0,
                          stream, size, parts, int64_t{p.K}, static_cast<float>(int64_t{p.P} * p.Q), partial,
                          static_cast<float*>(epilogue.pooled));
          }
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
