// The sums over positions that batch norm needs, and what is made of them.
//
//   mean[c], rstd[c] = 1 / sqrt(var[c] + eps)   over N and L of x, or the running statistics
//   dbias[c]   = sum of dz
//   dweight[c] = rstd[c] * sum of dz * (x - mean[c])
//
// Layout     x [N,L,C] or [N,C,L], in the pieces of batch_norm.cuh; everything else [C].
// Ownership  One block owns a slice of the positions of some channels, and leaves its parts in the workspace; one
//            thread of a second kernel owns a channel, and merges the slices' parts in a fixed order. Moments are
//            merged by Chan's formula, never made of raw sums of squares.
// Traffic    x once, 16 bytes of parts for each channel of a slice, and the results.

#include <algorithm>
#include <cmath>

#include "batch_norm.cuh"
#include "batch_norm.h"
#include "dtype.h"

namespace cnnops::cuda {
namespace {

constexpr int kAhead = 4;
constexpr int kMomentsBlocks = 3;  // that a multiprocessor holds, and all of them run at once
constexpr int kMergeThreads = kMergeChannels * kMergeShares;

// partial[slice][mean, m2][C]
template <class T, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, kMomentsBlocks)
    batch_moments_kernel(Sweep s, int64_t channels, const T* x, float* partial) {
  const SweepPart part(s);
  Moments mine[kWidth];
  for_pieces<kAhead>(s, part, [&]<int kCount>(const int64_t (&offsets)[kCount]) {
    Vector<T> values[kCount];
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = load(x + offsets[k], kWidth);
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const float inverse = 1 / (mine[0].count + 1);
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) mine[i].add(to_float(values[k].at[i]), inverse);
    }
  });
  merge_block(s, part, mine, [&](int64_t c, const Moments& all) {
    float* const to = partial + part.slice * 2 * channels + c;
    to[0] = all.mean;
    to[channels] = all.m2;
  });
}

__global__ void __launch_bounds__(kMergeThreads)
    finish_statistics_kernel(Sweep s, NormProblem p, const float* partial, float* mean, float* rstd,
                             float* running_mean, float* running_var) {
  const int64_t c = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  const Moments all = merge_slices<Moments>(s.slices, c < p.C, [&](int64_t slice) -> Moments {
    const float* const from = partial + slice * 2 * p.C + c;
    return {static_cast<float>(s.elements(slice)), from[0], from[p.C]};
  });
  if (threadIdx.x >= kMergeChannels || c >= p.C) return;
  const double count = static_cast<double>(p.N * p.L);
  mean[c] = all.mean;
  rstd[c] = static_cast<float>(1 / sqrt(all.m2 / count + p.eps));
  if (running_mean) running_mean[c] = static_cast<float>((1 - p.momentum) * running_mean[c] + p.momentum * all.mean);
  if (running_var)
    running_var[c] = static_cast<float>((1 - p.momentum) * running_var[c] + p.momentum * (all.m2 / (count - 1)));
}

__global__ void __launch_bounds__(kMergeThreads)
    running_statistics_kernel(int64_t channels, double eps, const float* running_mean, const float* running_var,
                              float* mean, float* rstd) {
  const int64_t c = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (c >= channels) return;
  mean[c] = running_mean[c];
  rstd[c] = static_cast<float>(1 / sqrt(running_var[c] + eps));
}

__global__ void __launch_bounds__(kMergeThreads)
    finish_gradients_kernel(NormProblem p, int64_t slabs, const float* sums, const float* rstd, float* dweight,
                            float* dbias, float* shares) {
  const int64_t c = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  const auto all = merge_slices<GradientSums>(slabs, c < p.C, [&](int64_t slab) -> GradientSums {
    const float* const from = sums + slab * 2 * p.C + c;
    return {from[0], from[p.C]};
  });
  if (threadIdx.x >= kMergeChannels || c >= p.C) return;
  const float spread = all.product * rstd[c];
  const auto count = static_cast<float>(p.N * p.L);
  if (dweight) dweight[c] = spread;
  if (dbias) dbias[c] = all.dz;
  shares[c] = all.dz / count;
  shares[p.C + c] = spread * rstd[c] / count;
}

Sweep moments_sweep(const NormProblem& p) { return make_sweep(p, int64_t{kMomentsBlocks} * device().multiprocessors); }

}  // namespace

Sweep make_sweep(const NormProblem& p, int64_t blocks) {
  constexpr int kWarp = 32;
  const int vector = p.dtype == DType::kFloat ? kVector<float> : kVector<Half>;
  // One position or one channel is dense in both layouts.
  const bool lines = p.L == 1 || (p.channels_last && p.C > 1);
  const int64_t contiguous = lines ? p.C : p.C == 1 ? p.N * p.L : p.L;
  Sweep s{};
  s.width = contiguous % vector == 0 ? vector : 1;
  if (lines) {
    s.units = p.C / s.width;
    s.unit_stride = s.unit_channels = s.width;
    s.count = s.length = p.N * p.L;
    s.stride = p.C;
    s.run_stride = s.length * s.stride;
    // Tiles are about equal, so that the last one's lanes are busy, too, and of whole sectors.
    const int64_t tiles = ceil_div(s.units, kWarp);
    s.columns = static_cast<int>(tiles == 1 ? s.units : ceil_div(s.units, 2 * tiles) * 2);
  } else {
    s.units = p.C;
    s.unit_stride = contiguous;
    s.unit_channels = s.columns = 1;
    s.length = contiguous / s.width;
    s.count = p.N * p.L / s.width;
    s.stride = s.width;
    s.run_stride = p.C * contiguous;
  }
  s.rows = kSweepThreads / s.columns;
  s.skip_in_run = s.rows % s.length;
  s.skip = s.rows / s.length * s.run_stride + s.skip_in_run * s.stride;
  s.tiles = ceil_div(s.units, s.columns);
  // Parts are little beside what they are of.
  const int64_t least = std::max(128, s.rows * kAhead), wanted = std::max<int64_t>(1, blocks / s.tiles);
  s.slice_length = ceil_div(std::max(ceil_div(s.count, wanted), std::min(least, s.count)), s.rows) * s.rows;
  s.slices = ceil_div(s.count, s.slice_length);
  return s;
}

int64_t batch_norm_statistics_workspace(const NormProblem& p) {
  return p.training ? moments_sweep(p).slices * 2 * p.C * int64_t{sizeof(float)} : 0;
}

void batch_norm_statistics(const NormProblem& p, const BatchNormForward& b, Stream stream) {
  auto *const running_mean = static_cast<float*>(b.running_mean), *const running_var =
                                                                      static_cast<float*>(b.running_var);
  auto *const mean = static_cast<float*>(b.mean), *const rstd = static_cast<float*>(b.rstd);
  if (!p.training) {
    CNNOPS_LAUNCH(running_statistics_kernel, blocks(ceil_div(p.C, kMergeThreads)), kMergeThreads, 0, stream, p.C, p.eps,
                  running_mean, running_var, mean, rstd);
    return;
  }
  const Sweep s = moments_sweep(p);
  auto* const partial = static_cast<float*>(b.workspace);
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto* const x = static_cast<const T*>(b.x);
    constexpr auto whole = batch_moments_kernel<T, kVector<T>>, single = batch_moments_kernel<T, 1>;
    if (s.width > 1)
      CNNOPS_LAUNCH(whole, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, x, partial);
    else
      CNNOPS_LAUNCH(single, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, x, partial);
  });
  CNNOPS_LAUNCH(finish_statistics_kernel, blocks(ceil_div(p.C, kMergeChannels)), kMergeThreads, 0, stream, s, p,
                partial, mean, rstd, running_mean, running_var);
}

void finish_batch_norm_gradients(const NormProblem& p, const BatchNormBackward& b, int64_t slabs, const float* sums,
                                 float* shares, Stream stream) {
  CNNOPS_LAUNCH(finish_gradients_kernel, blocks(ceil_div(p.C, kMergeChannels)), kMergeThreads, 0, stream, p, slabs,
                sums, static_cast<const float*>(b.rstd), static_cast<float*>(b.dweight), static_cast<float*>(b.dbias),
                shares);
}

}  // namespace cnnops::cuda
