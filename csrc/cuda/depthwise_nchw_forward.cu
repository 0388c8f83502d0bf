// Depthwise convolution of NCHW, forward, by filters of 3 x 3, 5 x 5 and 7 x 7 and of any size.
//
//   y[n,k,p,q] = sum over (r,s) of x[n, k / (K / C), p*stride - pad + r*dilation, ..] * weight[k,r,s]
//
// Layout     x [N,C,H,W], y [N,K,P,Q], weight [K,R,S].
// Ownership  A block takes the strips of a tile of channels (depthwise_nchw.h). A thread belongs to one filter's plane,
//            and has eight results below each other at a time, lanes side by side; the sums go to shared memory, whence
//            they are written as they lie in memory, in whole pieces of 16 bytes but for the ends of a range.
// Traffic    x once, and the rows that strips of large planes share once more; y and the residual once; weight once for
//            each block.

#include "depthwise_nchw.cuh"
#include "dtype.h"

namespace cnnops::cuda {
namespace {

// The moments of the threads of each plane merged in order, for the first thread of the plane. All threads call this.
__device__ Moments merge_plane(Moments moments, int lanes, Moments* shared) {
  const int group = lanes < 32 ? lanes : 32, groups = lanes / group;  // of a plane, in warps where it has several
  for (int distance = 1; distance < group; distance *= 2)
    moments.merge({__shfl_down_sync(~0u, moments.count, distance), __shfl_down_sync(~0u, moments.mean, distance),
                   __shfl_down_sync(~0u, moments.m2, distance)});
  const int mine = static_cast<int>(threadIdx.x) / group;
  __syncthreads();  // nobody reads what was here before
  if (static_cast<int>(threadIdx.x) % group == 0) shared[mine] = moments;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) % lanes == 0)
    for (int i = 1; i < groups; ++i) moments.merge(shared[mine + i]);
  return moments;
}

template <class T, int kSize, int kStride>
__global__ void __launch_bounds__(kNchwThreads, 4)
    depthwise_nchw_forward_kernel(Conv2dProblem p, NchwCut cut, Epilogue epilogue, const T* x, const T* weight, T* y,
                                  float* partial) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  constexpr bool kWeightsStay = kSize > 0 && kSize < 7;  // in registers
  constexpr int kKept = kWeightsStay ? kSize * kSize : 1;
  const NchwTile tile(p, cut);
  const NchwThread thread(cut.lanes_y);
  const int filters = tile.channels * tile.multiplier;
  const bool mine = thread.plane < filters;
  const int64_t k = tile.c * tile.multiplier + thread.plane;
  auto* const sums = reinterpret_cast<float*>(shared + cut.sums);
  auto* const weights = reinterpret_cast<float*>(shared + cut.weights);
  bring_weights(p, tile, weight, weights);
  __syncthreads();
  const float* const my_weights = weights + (mine ? thread.plane : 0) * p.R * p.S;
  float kept[kKept];
  if constexpr (kWeightsStay) {
    CNNOPS_UNROLL
    for (int tap = 0; tap < kKept; ++tap) kept[tap] = my_weights[tap];
  }
  float scale = 1, shift = 0;
  if (mine && epilogue.scale) {
    scale = static_cast<const float*>(epilogue.scale)[k];
    shift = static_cast<const float*>(epilogue.bias)[k];
  } else if (mine && epilogue.bias) {
    shift = to_float(static_cast<const T*>(epilogue.bias)[k]);
  }

  const auto buffer = [&](int other) { return reinterpret_cast<T*>(shared + other * cut.x_bytes); };
  const auto planes_of_x = [&](const NchwStrip& strip) {
    return Planes<T>(cut, strip.n * p.C + tile.c, tile.channels, p.H, p.W, strip.x, cut.pitch_x);
  };
  const auto fetch = [&](const NchwStrip& strip, int other) {
    bring_planes(planes_of_x(strip), x, int64_t{p.N} * p.C * p.H * p.W, buffer(other));
  };

  Moments moments;
  const auto step = [&](const NchwStrip& strip, int other) {
    const Planes<T> planes(cut, (strip.n * p.C + tile.c) * tile.multiplier, filters, p.P, p.Q, strip.y, cut.pitch_sums);
    float* const to = sums + planes.at(thread.plane);
    if (mine) {
      const T* const plane = buffer(other) + planes_of_x(strip).at(thread.plane / tile.multiplier);
      const int rows = strip.y.count(), cells = static_cast<int>(ceil_div(rows, kNchwRun)) * p.Q;
      for (int cell = thread.lane; cell < cells; cell += cut.lanes_y) {
        const int run = cell / p.Q * kNchwRun, q = cell % p.Q;
        const int h = (strip.y.begin + run) * p.stride_h - p.pad_h - strip.x.begin, w = q * p.stride_w - p.pad_w;
        float acc[kNchwRun] = {};
        if constexpr (kWeightsStay) {
          for_each_tap<kSize, kStride>(plane, strip.x.count(), p.W, h, w,
                                       [&](float value, int t, int tap) { acc[t] += value * kept[tap]; });
        } else if constexpr (kSize > 0) {
          CNNOPS_NO_UNROLL  // so that the registers suffice
              for (int s = 0; s < kSize; ++s) for_each_tap_of_column<kSize, kStride>(
                  plane, strip.x.count(), p.W, h, w + s,
                  [&](float value, int t, int r) { acc[t] += value * my_weights[r * kSize + s]; });
        } else {
          for (int r = 0; r < p.R; ++r)
            for (int s = 0; s < p.S; ++s) {
              const float factor = my_weights[r * p.S + s];
              const int column = w + s * p.dilation_w;
              const bool inside = static_cast<unsigned>(column) < static_cast<unsigned>(p.W);
              CNNOPS_UNROLL
              for (int t = 0; t < kNchwRun; ++t) {
                const int row = h + t * p.stride_h + r * p.dilation_h;
                const bool there = inside & (static_cast<unsigned>(row) < static_cast<unsigned>(strip.x.count()));
                acc[t] += (there ? to_float(plane[row * p.W + column]) : 0) * factor;
              }
            }
        }
        CNNOPS_UNROLL
        for (int t = 0; t < kNchwRun; ++t)
          if (run + t < rows) to[(run + t) * p.Q + q] = acc[t] * scale + shift;
      }
    }
    __syncthreads();
    write_planes(planes, epilogue.activation, static_cast<const T*>(epilogue.residual), partial != nullptr, sums, y);
    if (!partial) return;
    __syncthreads();
    if (mine)
      for (int i = thread.lane; i < planes.size; i += cut.lanes_y) moments.add(to[i], 1 / (moments.count + 1));
    if (!epilogue.pooled) return;
    const Moments all = merge_plane(moments, cut.lanes_y, reinterpret_cast<Moments*>(shared + cut.shares));
    if (mine && thread.lane == 0) partial[strip.index * p.K + k] = all.count * all.mean;
    moments = {};
  };
  for_each_strip(p, cut, tile.part, fetch, step);
  if (!partial || epilogue.pooled) return;

  const Moments all = merge_plane(moments, cut.lanes_y, reinterpret_cast<Moments*>(shared + cut.shares));
  if (!mine || thread.lane > 0) return;
  float* const to = partial + tile.part * 3 * p.K + k;
  to[0] = all.count, to[p.K] = all.mean, to[int64_t{2} * p.K] = all.m2;
}

}  // namespace

void depthwise_nchw_forward(const Conv2dProblem& p, const NchwCut& cut, const Epilogue& epilogue, const void* x,
                            const void* weight, void* y, float* partial, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    with_instance(p, cut, [&]<int kSize, int kStride>() {
      CNNOPS_LAUNCH((depthwise_nchw_forward_kernel<T, kSize, kStride>), blocks(cut.parts * cut.channel_tiles),
                    kNchwThreads, cut.end, stream, p, cut, epilogue, static_cast<const T*>(x),
                    static_cast<const T*>(weight), static_cast<T*>(y), partial);
    });
  });
}

}  // namespace cnnops::cuda
