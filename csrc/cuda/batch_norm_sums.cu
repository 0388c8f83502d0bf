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
#include <numeric>

#include "batch_norm.h"
#include "batch_norm_parts.cuh"

namespace cnnops::cuda {
namespace {

template <class T, int kWidth, bool kPlanes>
__global__ void __launch_bounds__(kSweepThreads, kMomentsBlocks)
    batch_moments_kernel(Sweep s, int64_t channels, const T* x, float* partial) {
  sum_moments<T, kWidth, kPlanes>(s, blockIdx.x, channels, x, partial);
}

__global__ void __launch_bounds__(kMergeThreads)
    finish_statistics_kernel(Sweep s, NormProblem p, const float* partial, Statistics to) {
  finish_statistics(s, p, int64_t{blockIdx.x} * kMergeChannels, partial, to);
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
    finish_gradients_kernel(NormProblem p, int64_t slabs, const float* sums, const float* rstd, GradientResults to) {
  finish_gradients(p, int64_t{blockIdx.x} * kMergeChannels, slabs, sums, rstd, to);
}

}  // namespace

Sweep make_sweep(const NormProblem& p, int64_t blocks, int vector) {
  constexpr int kWarp = 32, kSector = 2;  // threads; pieces
  // One position or one channel is dense in both layouts.
  const bool lines = p.L == 1 || (p.channels_last && p.C > 1);
  Sweep s{};
  s.lanes = 1;
  if (lines) {
    s.width = p.C % vector == 0 ? vector : 1;
    s.units = p.C / s.width;
    s.unit_stride = s.unit_channels = s.width;
    s.count = s.length = p.N * p.L;
    s.stride = p.C;
    s.run_stride = s.length * s.stride;
    // Tiles are about equal, so that the last one's lanes are busy, too, and of whole sectors.
    const int64_t tiles = ceil_div(s.units, kWarp);
    s.columns = static_cast<int>(tiles == 1 ? s.units : ceil_div(s.units, kSector * tiles) * kSector);
  } else {
    const int64_t plane = p.C == 1 ? p.N * p.L : p.L;
    s.planes = plane % (kSector * vector) != 0;
    s.width = vector;
    s.units = p.C;
    s.unit_stride = plane;
    s.unit_channels = s.columns = 1;
    // As planes lie, the first element may be any piece's last that a common divisor lets it be.
    s.length = ceil_div(plane + vector - std::gcd(plane, int64_t{vector}), vector);
    s.count = p.N * p.L / plane * s.length;
    s.stride = s.width;
    s.run_stride = p.C * plane;
    if (s.planes && s.length <= kWarp) {
      // Neighbouring planes by neighbouring threads, which then ask for whole sectors together.
      const int64_t most = std::min(kSweepThreads / 2, kSweepThreads / static_cast<int>(s.length));
      const int64_t tiles = ceil_div(p.C, most / kMergeChannels * kMergeChannels);
      s.columns = static_cast<int>(std::min(p.C, ceil_div(p.C, kMergeChannels * tiles) * kMergeChannels));
      s.lanes = static_cast<int>(s.length);
    }
  }
  s.rows = kSweepThreads / (s.columns * s.lanes) * s.lanes;
  s.skip_in_run = s.rows % s.length;
  s.skip = s.rows / s.length * s.run_stride + s.skip_in_run * s.stride;
  s.tiles = ceil_div(s.units, s.columns);
  // Parts are little beside what they are of.
  const int64_t least = std::max(128, s.rows * kMomentsAhead), wanted = std::max<int64_t>(1, blocks / s.tiles);
  s.slice_length = ceil_div(std::max(ceil_div(s.count, wanted), std::min(least, s.count)), s.rows) * s.rows;
  s.slices = ceil_div(s.count, s.slice_length);
  s.total = p.N * p.C * p.L;
  if (s.planes) {
    const int64_t together = int64_t{kWarp} * s.width, warps = s.blocks() * (kSweepThreads / kWarp);
    s.stretch = ceil_div(ceil_div(s.total, together), warps) * together;
    s.stretch_channels = together / s.unit_stride % s.units;
    s.stretch_skip = together % s.unit_stride;
  }
  return s;
}

int64_t batch_norm_statistics_workspace(const NormProblem& p) {
  return p.training ? moments_sweep(p).slices * 2 * p.C * int64_t{sizeof(float)} : 0;
}

void batch_norm_statistics(const NormProblem& p, const BatchNormForward& b, Stream stream) {
  const Statistics to = statistics_of(b);
  if (!p.training) {
    CNNOPS_LAUNCH(running_statistics_kernel, blocks(ceil_div(p.C, kMergeThreads)), kMergeThreads, 0, stream, p.C, p.eps,
                  to.running_mean, to.running_var, to.mean, to.rstd);
    return;
  }
  const Sweep s = moments_sweep(p);
  auto* const partial = static_cast<float*>(b.workspace);
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto* const x = static_cast<const T*>(b.x);
    for_form<T>(s, [&]<int kWidth, bool kPlanes>(Form<kWidth, kPlanes>) {
      constexpr auto kernel = batch_moments_kernel<T, kWidth, kPlanes>;
      CNNOPS_LAUNCH(kernel, blocks(s.blocks()), kSweepThreads, 0, stream, s, p.C, x, partial);
    });
  });
  CNNOPS_LAUNCH(finish_statistics_kernel, blocks(ceil_div(p.C, kMergeChannels)), kMergeThreads, 0, stream, s, p,
                partial, to);
}

void finish_batch_norm_gradients(const NormProblem& p, const BatchNormBackward& b, int64_t slabs, const float* sums,
                                 float* shares, Stream stream) {
  CNNOPS_LAUNCH(finish_gradients_kernel, blocks(ceil_div(p.C, kMergeChannels)), kMergeThreads, 0, stream, p, slabs,
                sums, static_cast<const float*>(b.rstd), results_of(b, shares));
}

}  // namespace cnnops::cuda
