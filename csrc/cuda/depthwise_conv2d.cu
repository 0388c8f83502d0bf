// The depthwise family of convolution kernels: groups of one channel each, with one or several filters.

#include "depthwise_conv2d.cuh"
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

void backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
              void* workspace, Stream stream) {
  auto* const slabs = static_cast<float*>(workspace);
  const DepthwiseCut cut = depthwise_cut(p, DepthwisePass::kWeight, device());
  if (cut.sized) {
    depthwise_sized_backward(p, cut, {}, dy, x, weight, dx, slabs, stream);
  } else {
    if (dx) {
      const DepthwiseCut input = depthwise_cut(p, DepthwisePass::kInput, device());
      depthwise_any_backward_input(p, input, {}, dy, weight, dx, stream);
    }
    depthwise_any_backward_weight(p, cut, dy, x, slabs, stream);
  }
  add_slabs(p.dtype, cut.parts, slab_size(p), slabs, dweight, stream);
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
          if (cut.sized)
            depthwise_sized_backward(p, cut, epilogue, dy, nullptr, weight, dx, nullptr, stream);
          else
            depthwise_any_backward_input(p, cut, epilogue, dy, weight, dx, stream);
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
