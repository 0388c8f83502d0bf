// Batch norm, a residual's addition and an activation; and batch norm with running statistics as an epilogue.
//
//   y       = activation((x - mean[c]) * rstd[c] * weight[c] + bias[c] + residual)
//   dz      = dy * activation'(z), which is dresidual too
//   dx      = rstd[c] * weight[c] * dz; when training, less what batch_norm_sums.cu's sums over the positions take away
//
// After a convolution with conv_bias, the epilogue has
//
//   scale[c] = weight[c] / sqrt(running_var[c] + eps)
//   shift[c] = (conv_bias[c] - running_mean[c]) * scale[c] + bias[c]
//
// Layout     x, y, residual and their gradients [N,L,C] or [N,C,L], in the pieces of batch_norm.cuh; everything
//            else [C].
// Tile       sums and sweeps, [N,L,C]; of [N,C,L] a block has one channel, or several where planes are short.
//                          channels c ->
//                        +- columns: up to 32, of 16 bytes or 1 number -+
//            positions | | rows = 256 / columns positions at once;      |  a block: a slice of slice_length pieces,
//            (n,l)     v | sums: registers, then shared memory          |  a column a thread; merged in order
//                        +- split: the next slice, another block's -----+
// Ownership  One block owns a slice of the positions of some channels. Its threads keep to their channels, so that
//            parameters are loaded once. The sums of a slice go to the workspace, where batch_norm_sums.cu adds them.
//            Of planes that are no whole sectors, one warp owns a stretch, whatever its channels, of what is written.
//            One thread owns one channel of the epilogue's.
//            Tensors that L2 holds are done in one launch by batch_norm_resident.cu instead.
// Traffic    forward: x for the statistics, then x (+ residual) + y; backward: dy, x (+ y or residual) for the sums,
//            then the same + dx (+ dresidual). A sweep that nothing asks for is left out, and so is an operand that the
//            activation does not need. Parameters: those of a block's channels, once a thread, or of a stretch those of
//            each piece's, from cache. The epilogue: the seven arrays of C numbers, once; doubles cost nothing beside
//            that, and the CPU's kernel has them too.

#include <cmath>

#include "batch_norm.h"
#include "batch_norm_parts.cuh"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kApplyAhead = 4;

__device__ double at(const void* array, int64_t c, double otherwise) {
  return array ? static_cast<const float*>(array)[c] : otherwise;
}

__global__ void __launch_bounds__(kThreads) fold_batch_norm_kernel(int64_t channels, double eps, BatchNormFold fold) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= channels) return;
  const auto scale = static_cast<float>(at(fold.weight, c, 1) / sqrt(at(fold.running_var, c, 1) + eps));
  const double centred = at(fold.conv_bias, c, 0) - at(fold.running_mean, c, 0);
  static_cast<float*>(fold.scale)[c] = scale;
  static_cast<float*>(fold.shift)[c] = static_cast<float>(centred * scale + at(fold.bias, c, 0));
}

template <class T, int kWidth, bool kPlanes>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_forward_kernel(Sweep s, Activation activation, Parameters parameters, const T* x, const T* residual,
                              T* y) {
  normalise<T, kWidth, kPlanes, kApplyAhead>(s, blockIdx.x, activation, parameters, x, residual, y);
}

template <class T, int kWidth, bool kPlanes>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_sums_kernel(Sweep s, int64_t channels, Parameters parameters, Gradient<T> from, float* partial) {
  sum_gradients<T, kWidth, kPlanes>(s, blockIdx.x, channels, parameters, from, partial);
}

template <class T, int kWidth, bool kPlanes>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_backward_kernel(Sweep s, int64_t channels, Parameters parameters, Gradient<T> from, const float* shares,
                               T* dx, T* dresidual) {
  differentiate<T, kWidth, kPlanes, kGradientAhead>(s, blockIdx.x, channels, parameters, from, {shares, dx, dresidual});
}

// Blocks wait for memory alone: two rounds of them even out what the multiprocessors get done.
Sweep mapping_sweep(const NormProblem& p) { return make_sweep(p, int64_t{8} * device().multiprocessors); }

// The parts of a workspace begin at multiples of this: of the forward pass partial[slice][2][C] and a count of blocks,
// of the backward pass shares[2][C], sums[slice][2][C] and a count. The last is for batch_norm_resident.cu.
constexpr int64_t kAligned = 256;

int64_t sums_bytes(int64_t slices, int64_t channels) {
  return ceil_div(slices * 2 * channels * int64_t{sizeof(float)}, kAligned) * kAligned;
}

template <class T>
T* at_byte(void* workspace, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

template <class T>
void backward(const NormProblem& p, const BatchNormBackward& b, Stream stream) {
  const Gradient<T> from = gradient_of<T>(p, b);
  const Parameters parameters = parameters_of(b);
  auto* const shares = static_cast<float*>(b.workspace);
  if (b.dweight || b.dbias || (p.training && b.dx)) {
    const Sweep s = summing_sweep(p);
    auto* const sums = at_byte<float>(shares, sums_bytes(1, p.C));
    const int tensors = p.activation != Activation::kNone && (b.y || b.residual) ? 3 : 2;
    if ((b.dx || b.dresidual) && stays_in_l2(p, tensors, device().l2_bytes)) {
      auto* const arrived = at_byte<unsigned>(sums, sums_bytes(s.slices, p.C));
      return batch_norm_backward_resident(p, b, shares, sums, arrived, stream);
    }
    for_form<T>(s, [&]<int kWidth, bool kPlanes>(Form<kWidth, kPlanes>) {
      constexpr auto kernel = batch_norm_sums_kernel<T, kWidth, kPlanes>;
      CNNOPS_LAUNCH(kernel, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, parameters, from, sums);
    });
    finish_batch_norm_gradients(p, b, s.slices, sums, shares, stream);
  }
  if (!b.dx && !b.dresidual) return;
  const Sweep s = mapping_sweep(p);
  const float* const taken = p.training ? shares : nullptr;
  auto *const dx = static_cast<T*>(b.dx), *const dresidual = static_cast<T*>(b.dresidual);
  for_form<T>(s, [&]<int kWidth, bool kPlanes>(Form<kWidth, kPlanes>) {
    constexpr auto kernel = batch_norm_backward_kernel<T, kWidth, kPlanes>;
    CNNOPS_LAUNCH(kernel, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, parameters, from, taken, dx, dresidual);
  });
}

}  // namespace

void fold_batch_norm(DType, int64_t channels, double eps, const BatchNormFold& fold, Stream stream) {
  CNNOPS_LAUNCH(fold_batch_norm_kernel, blocks(ceil_div(channels, kThreads)), kThreads, 0, stream, channels, eps, fold);
}

int64_t batch_norm_act_forward_workspace(const NormProblem& p) {
  return p.training ? sums_bytes(moments_sweep(p).slices, p.C) + kAligned : 0;
}

int64_t batch_norm_act_backward_workspace(const NormProblem& p) {
  return sums_bytes(1, p.C) + sums_bytes(summing_sweep(p).slices, p.C) + kAligned;
}

void batch_norm_act_forward(const NormProblem& p, const BatchNormForward& b, Stream stream) {
  if (p.training && stays_in_l2(p, 1, device().l2_bytes)) {
    auto* const arrived = at_byte<unsigned>(b.workspace, sums_bytes(moments_sweep(p).slices, p.C));
    return batch_norm_forward_resident(p, b, static_cast<float*>(b.workspace), arrived, stream);
  }
  batch_norm_statistics(p, b, stream);
  const Sweep s = mapping_sweep(p);
  const Parameters parameters = parameters_of(b);
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto *const x = static_cast<const T*>(b.x), *const residual = static_cast<const T*>(b.residual);
    auto* const y = static_cast<T*>(b.y);
    for_form<T>(s, [&]<int kWidth, bool kPlanes>(Form<kWidth, kPlanes>) {
      constexpr auto kernel = batch_norm_forward_kernel<T, kWidth, kPlanes>;
      CNNOPS_LAUNCH(kernel, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.activation, parameters, x, residual, y);
    });
  });
}

void batch_norm_act_backward(const NormProblem& p, const BatchNormBackward& b, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) { backward<T>(p, b, stream); });
}

}  // namespace cnnops::cuda
