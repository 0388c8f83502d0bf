// Sums and moments whose parts were computed apart, put together in a fixed order.
//
//   add_slabs        out[i] = sum over slabs of slabs[slab][i]
//   finish_pooled    pooled[n][k] = sum over parts of partial[n][part][k] / pixels
//   finish_moments   Chan's formula over the tiles' moments of each filter
//
// Ownership  One thread owns one of add_slabs's or finish_pooled's outputs, and one block eight of finish_moments',
//            whose parts its threads share and then merge in pairs: every schedule gives the same bits.
// Traffic    The parts once, and the outputs.

#include "conv2d_kernels.h"
#include "dtype.h"
#include "epilogue.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kAddThreads = 256;

// out[i] = the sum over slabs of slabs[..][i], in order.
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    add_slabs_kernel(const float* slabs, int64_t count, int64_t size, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t slab = 0; slab < count; ++slab) sum += slabs[slab * size + i];
  from_float(sum, out[i]);
}

__global__ void __launch_bounds__(kAddThreads)
    finish_pooled_kernel(int64_t size, int64_t parts, int64_t K, float count, const float* partial, float* pooled) {
  const int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  if (i >= size) return;
  const Split at = split(i, K);
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partial[(at.quotient * parts + part) * K + at.remainder];
  pooled[i] = sum / count;
}

// A block of finish_moments: as many filters as a sector holds, and as many threads for each as share its tiles.
constexpr int kMomentFilters = 8, kMomentShares = 64;
using MomentParts = Moments[kMomentShares][kMomentFilters];

__global__ void __launch_bounds__(kMomentFilters* kMomentShares)
    finish_moments_kernel(int64_t tiles, int64_t K, const float* partial, float* mean, float* m2) {
  CNNOPS_SHARED(MomentParts, parts);
  const int filter = static_cast<int>(threadIdx.x) % kMomentFilters;
  const int share = static_cast<int>(threadIdx.x) / kMomentFilters;
  const int64_t k = int64_t{blockIdx.x} * kMomentFilters + filter;
  Moments all;
  if (k < K) {
    for (int64_t tile = share; tile < tiles; tile += kMomentShares) {
      const float* const part = partial + tile * 3 * K + k;
      all.merge({part[0], part[K], part[2 * K]});
    }
  }
  parts[share][filter] = all;
  for (int half = kMomentShares / 2; half > 0; half /= 2) {
    __syncthreads();
    if (share < half) parts[share][filter].merge(parts[share + half][filter]);
  }
  if (share > 0 || k >= K) return;
  mean[k] = parts[0][filter].mean;
  m2[k] = parts[0][filter].m2;
}

}  // namespace

void add_slabs(DType dtype, int64_t count, int64_t size, const float* slabs, void* out, Stream stream) {
  for_dtype(dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(add_slabs_kernel<T>, blocks(ceil_div(size, kAddThreads)), kAddThreads, 0, stream, slabs, count, size,
                  static_cast<T*>(out));
  });
}

void finish_pooled(const Conv2dProblem& p, int64_t parts, const float* partial, const Epilogue& epilogue,
                   Stream stream) {
  const int64_t size = int64_t{p.N} * p.K;
  CNNOPS_LAUNCH(finish_pooled_kernel, blocks(ceil_div(size, kAddThreads)), kAddThreads, 0, stream, size, parts,
                int64_t{p.K}, static_cast<float>(int64_t{p.P} * p.Q), partial, static_cast<float*>(epilogue.pooled));
}

void finish_moments(int64_t tiles, int64_t K, const float* partial, const Epilogue& epilogue, Stream stream) {
  auto* const mean = static_cast<float*>(epilogue.mean);
  auto* const m2 = static_cast<float*>(epilogue.m2);
  CNNOPS_LAUNCH(finish_moments_kernel, blocks(ceil_div(K, kMomentFilters)), kMomentFilters * kMomentShares, 0, stream,
                tiles, K, partial, mean, m2);
}

}  // namespace cnnops::cuda
