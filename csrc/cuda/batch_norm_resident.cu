// Batch norm's passes in one launch each, for tensors that L2 holds from one sweep to the next.
//
//   forward    the moments of x's slices | mean and rstd | y
//   backward   the sums of dz and dz * (x - mean) | dbias, dweight and shares | dx and dresidual
//
// Layout     that of batch_norm.cu.
// Ownership  The grid is at most as large as the device holds at once; at each | all its blocks wait for each other.
//            Between them a block has every gridDim.x-th slice, or group of kMergeChannels channels. What it does of
//            one is what a block of batch_norm.cu and batch_norm_sums.cu does, so that all results have the same bits,
//            and the grid's size does not matter.
// Traffic    to and from memory, x (+ residual) + y, or dy, x (+ y or residual) + dx (+ dresidual), once; of L2 as much
//            as by separate launches.

#include <algorithm>

#include "batch_norm.h"
#include "batch_norm_parts.cuh"
#include "ptx.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kApplyAhead = 2;  // of what L2 has, fewer loads need to be under way, and registers are few

__global__ void clear_count_kernel(unsigned* arrived) { *arrived = 0; }

// f(i) for the calling block's share of 0 to count - 1. A barrier lies between any two.
template <class F>
__device__ __forceinline__ void for_shares(int64_t count, F&& f) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    if (i >= gridDim.x) __syncthreads();
    f(i);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, kMomentsBlocks)
    batch_norm_forward_resident_kernel(Sweep s, NormProblem p, Statistics statistics, Parameters parameters, const T* x,
                                       const T* residual, T* y, float* partial, unsigned* arrived) {
  for_shares(s.blocks(), [&](int64_t i) { sum_moments<T, kWidth>(s, SweepPart(s, i), p.C, x, partial); });
  grid_barrier(arrived, gridDim.x);
  for_shares(ceil_div(p.C, kMergeChannels),
             [&](int64_t i) { finish_statistics(s, p, i * kMergeChannels, partial, statistics); });
  grid_barrier(arrived, 2 * gridDim.x);
  for_shares(s.blocks(), [&](int64_t i) {
    normalise<T, kWidth, kApplyAhead>(s, SweepPart(s, i), p.activation, parameters, x, residual, y);
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_backward_resident_kernel(Sweep s, NormProblem p, Parameters parameters, Gradient<T> from,
                                        GradientResults results, float* sums, T* dx, T* dresidual, unsigned* arrived) {
  for_shares(s.blocks(), [&](int64_t i) { sum_gradients<T, kWidth>(s, SweepPart(s, i), p.C, parameters, from, sums); });
  grid_barrier(arrived, gridDim.x);
  for_shares(ceil_div(p.C, kMergeChannels),
             [&](int64_t i) { finish_gradients(p, i * kMergeChannels, s.slices, sums, parameters.rstd, results); });
  grid_barrier(arrived, 2 * gridDim.x);
  const float* const shares = p.training ? results.shares : nullptr;
  for_shares(s.blocks(), [&](int64_t i) {
    differentiate<T, kWidth>(s, SweepPart(s, i), p.C, parameters, from, shares, dx, dresidual);
  });
}

template <auto kernel>
dim3 resident_grid(const Sweep& s) {
  return blocks(std::min(resident_blocks(Launched<kernel>::entry, kSweepThreads), s.blocks()));
}

}  // namespace

bool stays_in_l2(const NormProblem& p, int tensors, int64_t l2_bytes) {
  const int64_t element = p.dtype == DType::kFloat ? sizeof(float) : sizeof(Half);
  return p.N * p.C * p.L * element * tensors <= l2_bytes / 2;
}

void batch_norm_forward_resident(const NormProblem& p, const BatchNormForward& b, float* partial, unsigned* arrived,
                                 Stream stream) {
  const Sweep s = moments_sweep(p);
  const Statistics statistics = statistics_of(b);
  const Parameters parameters = parameters_of(b);
  CNNOPS_LAUNCH(clear_count_kernel, 1, 1, 0, stream, arrived);
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto *const x = static_cast<const T*>(b.x), *const residual = static_cast<const T*>(b.residual);
    auto* const y = static_cast<T*>(b.y);
    constexpr auto whole = batch_norm_forward_resident_kernel<T, kVector<T>>,
                   single = batch_norm_forward_resident_kernel<T, 1>;
    if (s.width > 1)
      CNNOPS_LAUNCH_COOPERATIVE(whole, resident_grid<whole>(s), kSweepThreads, 0, stream, s, p, statistics, parameters,
                                x, residual, y, partial, arrived);
    else
      CNNOPS_LAUNCH_COOPERATIVE(single, resident_grid<single>(s), kSweepThreads, 0, stream, s, p, statistics,
                                parameters, x, residual, y, partial, arrived);
  });
}

void batch_norm_backward_resident(const NormProblem& p, const BatchNormBackward& b, float* shares, float* sums,
                                  unsigned* arrived, Stream stream) {
  const Sweep s = summing_sweep(p);
  const Parameters parameters = parameters_of(b);
  const GradientResults results = results_of(b, shares);
  CNNOPS_LAUNCH(clear_count_kernel, 1, 1, 0, stream, arrived);
  for_dtype(p.dtype, [&]<class T>(T) {
    const Gradient<T> from = gradient_of<T>(p, b);
    auto *const dx = static_cast<T*>(b.dx), *const dresidual = static_cast<T*>(b.dresidual);
    constexpr auto whole = batch_norm_backward_resident_kernel<T, kVector<T>>,
                   single = batch_norm_backward_resident_kernel<T, 1>;
    if (s.width > 1)
      CNNOPS_LAUNCH_COOPERATIVE(whole, resident_grid<whole>(s), kSweepThreads, 0, stream, s, p, parameters, from,
                                results, sums, dx, dresidual, arrived);
    else
      CNNOPS_LAUNCH_COOPERATIVE(single, resident_grid<single>(s), kSweepThreads, 0, stream, s, p, parameters, from,
                                results, sums, dx, dresidual, arrived);
  });
}

}  // namespace cnnops::cuda
