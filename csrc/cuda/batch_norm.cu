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
// Layout     x, y, residual and their gradients [N,L,C] or [N,C,L], in the pieces of batch_norm.cuh; the rest [C].
// Ownership  One block owns a slice of the positions of some channels. Its threads keep to their channels, so that
//            parameters are loaded once. The sums of a slice go to the workspace, where batch_norm_sums.cu adds them.
//            One thread owns one channel of the epilogue's.
// Traffic    forward: x for the statistics, then x (+ residual) + y; backward: dy, x (+ y or residual) for the sums,
//            then the same + dx (+ dresidual). A sweep that nothing asks for is left out, and so is an operand that the
//            activation does not need. Parameters: those of a block's channels, once a thread. The epilogue: the seven
//            arrays of C numbers, once; doubles cost nothing beside that, and the CPU's kernel has them too.

#include <cmath>

#include "activation.cuh"
#include "batch_norm.cuh"
#include "batch_norm.h"
#include "dtype.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kApplyAhead = 4, kGradientAhead = 2;

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

// The channel arrays that both directions read; weight and bias may be null.
struct Parameters {
  const float *mean, *rstd, *weight, *bias;
};

// The maps of a thread's elements.
template <int kWidth>
__device__ __forceinline__ void load_maps(const Sweep& s, const SweepPart& part, const Parameters& p,
                                          BatchNormMap (&maps)[kWidth]) {
  float mean[kWidth], rstd[kWidth], weight[kWidth], bias[kWidth];
  load_channels(s, part, p.mean, 0, mean);
  load_channels(s, part, p.rstd, 0, rstd);
  load_channels(s, part, p.weight, 1, weight);
  load_channels(s, part, p.bias, 0, bias);
  CNNOPS_UNROLL
  for (int i = 0; i < kWidth; ++i) maps[i] = {mean[i], rstd[i] * weight[i], bias[i]};
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_forward_kernel(Sweep s, Activation activation, Parameters parameters, const T* x, const T* residual,
                              T* y) {
  const SweepPart part(s);
  if (part.left == 0) return;
  BatchNormMap maps[kWidth];
  load_maps(s, part, parameters, maps);
  for_pieces<kApplyAhead>(s, part, [&]<int kCount>(const int64_t (&offsets)[kCount]) {
    Vector<T> values[kCount], added[kCount] = {};
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = load(x + offsets[k], kWidth);
    if (residual) {
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) added[k] = load(residual + offsets[k], kWidth);
    }
    with_activation(activation, [&](auto activate) {
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) {
        CNNOPS_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          float z = maps[i](to_float(values[k].at[i]));
          if (residual) z += to_float(added[k].at[i]);
          from_float(activate(z), values[k].at[i]);
        }
      }
    });
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) store(values[k], y + offsets[k], kWidth);
  });
}

// What dz is made of. y: the activation's output if its gradient is read off that; else z is computed again.
template <class T>
struct Gradient {
  Activation activation;
  const T *dy, *x, *residual, *y;
};

// f(piece, dz, x) for the pieces at `offsets`, x being zero unless it is needed.
template <int kWidth, class T, int kCount, class F>
__device__ __forceinline__ void for_gradients(const Gradient<T>& from, bool need_x, const BatchNormMap (&maps)[kWidth],
                                              const int64_t (&offsets)[kCount], F&& f) {
  const bool recompute = from.activation != Activation::kNone && !from.y;
  const T* const other = from.activation == Activation::kNone ? nullptr : from.y ? from.y : from.residual;
  Vector<T> dy[kCount], x[kCount] = {}, others[kCount] = {};
  CNNOPS_UNROLL
  for (int k = 0; k < kCount; ++k) {
    dy[k] = load(from.dy + offsets[k], kWidth);
    if (need_x || recompute) x[k] = load(from.x + offsets[k], kWidth);
    if (other) others[k] = load(other + offsets[k], kWidth);
  }
  with_gradient(from.activation, [&](auto gradient) {
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) {
      float dz[kWidth], value[kWidth];
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        value[i] = to_float(x[k].at[i]);
        float saved = to_float(others[k].at[i]);
        if (recompute)
          saved = saved_for_gradient(from.activation, other ? maps[i](value[i]) + saved : maps[i](value[i]));
        dz[i] = gradient(to_float(dy[k].at[i]), saved);
      }
      f(offsets[k], dz, value);
    }
  });
}

// partial[slice][dz, dz * (x - mean)][C]
template <class T, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_sums_kernel(Sweep s, int64_t channels, Parameters parameters, Gradient<T> from, float* partial) {
  const SweepPart part(s);
  GradientSums mine[kWidth];
  if (part.left > 0) {
    BatchNormMap maps[kWidth];
    load_maps(s, part, parameters, maps);
    for_pieces<kGradientAhead>(s, part, [&](const auto& offsets) {
      for_gradients(from, true, maps, offsets, [&](int64_t, const float (&dz)[kWidth], const float (&x)[kWidth]) {
        CNNOPS_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          mine[i].dz += dz[i];
          mine[i].product += dz[i] * (x[i] - maps[i].mean);
        }
      });
    });
  }
  merge_block(s, part, mine, [&](int64_t c, const GradientSums& all) {
    float* const to = partial + part.slice * 2 * channels + c;
    to[0] = all.dz;
    to[channels] = all.product;
  });
}

// shares: null where statistics are fixed. dx and dresidual: one of them may be null.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_backward_kernel(Sweep s, int64_t channels, Parameters parameters, Gradient<T> from, const float* shares,
                               T* dx, T* dresidual) {
  const SweepPart part(s);
  if (part.left == 0) return;
  BatchNormMap maps[kWidth];
  load_maps(s, part, parameters, maps);
  float dz_share[kWidth], x_share[kWidth];
  load_channels(s, part, shares, 0, dz_share);
  load_channels(s, part, shares ? shares + channels : nullptr, 0, x_share);
  for_pieces<kGradientAhead>(s, part, [&](const auto& offsets) {
    for_gradients(
        from, shares && dx, maps, offsets, [&](int64_t offset, const float (&dz)[kWidth], const float (&x)[kWidth]) {
          Vector<T> out;
          if (dresidual) {
            CNNOPS_UNROLL
            for (int i = 0; i < kWidth; ++i) from_float(dz[i], out.at[i]);
            store(out, dresidual + offset, kWidth);
          }
          if (!dx) return;
          CNNOPS_UNROLL
          for (int i = 0; i < kWidth; ++i)
            from_float(
                shares ? BatchNormShares{dz_share[i], x_share[i]}.dx(maps[i], dz[i], x[i]) : dz[i] * maps[i].scale,
                out.at[i]);
          store(out, dx + offset, kWidth);
        });
  });
}

Sweep summing_sweep(const NormProblem& p) { return make_sweep(p, int64_t{kSummingBlocks} * device().multiprocessors); }

// Blocks wait for memory alone: two rounds of them even out what the multiprocessors get done.
Sweep mapping_sweep(const NormProblem& p) { return make_sweep(p, int64_t{8} * device().multiprocessors); }

// shares[2][C], and sums[slice][2][C] from a place aligned to 256 bytes on.
int64_t shares_bytes(const NormProblem& p) { return ceil_div(2 * p.C * int64_t{sizeof(float)}, 256) * 256; }

template <class B>
Parameters parameters_of(const B& b) {
  return {static_cast<const float*>(b.mean), static_cast<const float*>(b.rstd), static_cast<const float*>(b.weight),
          static_cast<const float*>(b.bias)};
}

template <class T>
void backward(const NormProblem& p, const BatchNormBackward& b, Stream stream) {
  const Gradient<T> from{p.activation, static_cast<const T*>(b.dy), static_cast<const T*>(b.x),
                         static_cast<const T*>(b.residual), static_cast<const T*>(b.y)};
  const Parameters parameters = parameters_of(b);
  auto* const shares = static_cast<float*>(b.workspace);
  if (b.dweight || b.dbias || (p.training && b.dx)) {
    auto* const sums = shares + shares_bytes(p) / static_cast<int64_t>(sizeof(float));
    const Sweep s = summing_sweep(p);
    constexpr auto whole = batch_norm_sums_kernel<T, kVector<T>>, single = batch_norm_sums_kernel<T, 1>;
    if (s.width > 1)
      CNNOPS_LAUNCH(whole, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, parameters, from, sums);
    else
      CNNOPS_LAUNCH(single, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, parameters, from, sums);
    finish_batch_norm_gradients(p, b, s.slices, sums, shares, stream);
  }
  if (!b.dx && !b.dresidual) return;
  const Sweep s = mapping_sweep(p);
  const float* const taken = p.training ? shares : nullptr;
  auto *const dx = static_cast<T*>(b.dx), *const dresidual = static_cast<T*>(b.dresidual);
  constexpr auto whole = batch_norm_backward_kernel<T, kVector<T>>, single = batch_norm_backward_kernel<T, 1>;
  if (s.width > 1)
    CNNOPS_LAUNCH(whole, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, parameters, from, taken, dx, dresidual);
  else
    CNNOPS_LAUNCH(single, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, parameters, from, taken, dx, dresidual);
}

}  // namespace

void fold_batch_norm(DType, int64_t channels, double eps, const BatchNormFold& fold, Stream stream) {
  CNNOPS_LAUNCH(fold_batch_norm_kernel, blocks(ceil_div(channels, kThreads)), kThreads, 0, stream, channels, eps, fold);
}

int64_t batch_norm_act_forward_workspace(const NormProblem& p) { return batch_norm_statistics_workspace(p); }

int64_t batch_norm_act_backward_workspace(const NormProblem& p) {
  return shares_bytes(p) + summing_sweep(p).slices * 2 * p.C * int64_t{sizeof(float)};
}

void batch_norm_act_forward(const NormProblem& p, const BatchNormForward& b, Stream stream) {
  batch_norm_statistics(p, b, stream);
  const Sweep s = mapping_sweep(p);
  const Parameters parameters = parameters_of(b);
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto *const x = static_cast<const T*>(b.x), *const residual = static_cast<const T*>(b.residual);
    auto* const y = static_cast<T*>(b.y);
    constexpr auto whole = batch_norm_forward_kernel<T, kVector<T>>, single = batch_norm_forward_kernel<T, 1>;
    if (s.width > 1)
      CNNOPS_LAUNCH(whole, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.activation, parameters, x, residual, y);
    else
      CNNOPS_LAUNCH(single, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.activation, parameters, x, residual, y);
  });
}

void batch_norm_act_backward(const NormProblem& p, const BatchNormBackward& b, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) { backward<T>(p, b, stream); });
}

}  // namespace cnnops::cuda
