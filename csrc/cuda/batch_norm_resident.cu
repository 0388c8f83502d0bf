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

// Of what L2 has, fewer loads need to be under way, and registers are few.
template <bool kPlanes>
constexpr int kResidentAhead = kPlanes ? 1 : 2;

__global__ void clear_count_kernel(unsigned* arrived) { *arrived = 0; }

// f(i) for the calling block's share of 0 to count - 1. A barrier lies between any two.
template <class F>
__device__ __forceinline__ void for_shares(int64_t count, F&& f) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    if (i >= gridDim.x) __syncthreads();
    f(i);
  }
}

template <class T, int kWidth, bool kPlanes>
__global__ void __launch_bounds__(kSweepThreads, kMomentsBlocks)
    batch_norm_forward_resident_kernel(Sweep s, NormProblem p, Statistics statistics, Parameters parameters, const T* x,
                                       const T* residual, T* y, float* partial, unsigned* arrived) {
  for_shares(s.blocks(), [&](int64_t i) { sum_moments<T, kWidth, kPlanes>(s, i, p.C, x, partial); });
  grid_barrier(arrived, gridDim.x);
  for_shares(ceil_div(p.C, kMergeChannels),
             [&](int64_t i) { finish_statistics(s, p, i * kMergeChannels, partial, statistics); });
  grid_barrier(arrived, 2 * gridDim.x);
  for_shares(s.blocks(), [&](int64_t i) {
    normalise<T, kWidth, kPlanes, kResidentAhead<kPlanes>>(s, i, p.activation, parameters, x, residual, y);
  });
}

template <class T, int kWidth, bool kPlanes>
__global__ void __launch_bounds__(kSweepThreads, 2)
    batch_norm_backward_resident_kernel(Sweep s, NormProblem p, Parameters parameters, Gradient<T> from,
                                        GradientResults results, float* sums, T* dx, T* dresidual, unsigned* arrived) {
  for_shares(s.blocks(), [&](int64_t i) { sum_gradients<T, kWidth, kPlanes>(s, i, p.C, parameters, from, sums); });
  grid_barrier(arrived, gridDim.x);
  for_shares(ceil_div(p.C, kMergeChannels),
             [&](int64_t i) { finish_gradients(p, i * kMergeChannels, s.slices, sums, parameters.rstd, results); });
  grid_barrier(arrived, 2 * gridDim.x);
  const float* const shares = p.training ? results.shares : nullptr;
  for_shares(s.blocks(), [&](int64_t i) {
    differentiate<T, kWidth, kPlanes, kResidentAhead<kPlanes>>(s, i, p.C, parameters, from, {shares, dx, dresidual});
  });
}

template <auto kernel, class... Arguments>
void launch_resident(const Sweep& s, unsigned* arrived, Stream stream, Arguments... arguments) {
  CNNOPS_LAUNCH(clear_count_kernel, 1, 1, 0, stream, arrived);
  const int64_t most = resident_blocks(Launched<kernel>::entry, kSweepThreads);
  CNNOPS_LAUNCH_COOPERATIVE(kernel, blocks(std::min(most, s.blocks())), kSweepThreads, 0, stream, s, arguments...,
                            arrived);
}

}  // namespace

bool stays_in_l2(const NormProblem& p, int tensors, int64_t l2_bytes) {
  const int64_t element = p.dtype == DType::kFloat ? sizeof(float) : sizeof(Half);
  return p.N * p.C * p.L * element * tensors <= l2_bytes / 2;
}

void batch_norm_forward_resident(const NormProblem& p, const BatchNormForward& b, float* partial, unsigned* arrived,
                                 Stream stream) {
  const Sweep s = moments_sweep(p);
  for_dtype(p.dtype, [&]<class T>(T) {
    for_form<T>(s, [&]<int kWidth, bool kPlanes>(Form<kWidth, kPlanes>) {
      launch_resident<batch_norm_forward_resident_kernel<T, kWidth, kPlanes>>(
          s, arrived, stream, p, statistics_of(b), parameters_of(b), static_cast<const T*>(b.x),
          static_cast<const T*>(b.residual), static_cast<T*>(b.y), partial);
    });
  });
}

void batch_norm_backward_resident(const NormProblem& p, const BatchNormBackward& b, float* shares, float* sums,
                                  unsigned* arrived, Stream stream) {
  const Sweep s = summing_sweep(p);
  for_dtype(p.dtype, [&]<class T>(T) {
    for_form<T>(s, [&]<int kWidth, bool kPlanes>(Form<kWidth, kPlanes>) {
      launch_resident<batch_norm_backward_resident_kernel<T, kWidth, kPlanes>>(
          s, arrived, stream, p, parameters_of(b), gradient_of<T>(p, b), results_of(b, shares), sums,
          static_cast<T*>(b.dx), static_cast<T*>(b.dresidual));
    });
  });
}

}  // namespace cnnops::cuda
