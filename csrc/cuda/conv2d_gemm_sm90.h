// Convolutions as Hopper's kernels see them: a matrix product whose rows are pixels, gathered by TMA's im2col mode, and
// how it is cut into tiles and dealt to the multiprocessors. Pure functions on the host, which the plan asks too.
//
//   result[pixel, column] = sum over taps and channels of a[pixel's element at the tap, channel] * filters
//
// forward: a = x, columns are filters. backward_input: a = dy, columns are channels of x, and dx's pixels fall into
// classes, residues modulo the stride along each axis, whose pixels are reached by the same taps of the filter.
#pragma once

#include <algorithm>

#include "tensor_map.h"

namespace cnnops::cuda {

constexpr int kTilePixels = 128, kStepChannels = 64;
constexpr int kMostClasses = 4;  // strides up to 2 x 2

// The pixels of a class along one axis, and the elements of `a` that their taps read.
struct TapAxis {
  int positions, first, stride;  // position i is the result's element first + i * stride
  int base, move;                // its first tap reads element base + i * move; beyond the extent there are zeros
  int taps, step;                // tap t reads t * step further on,
  int filter, filter_step;       // and multiplies the filter's tap filter + t * filter_step
};

struct PixelClass {
  TapAxis h, w;
  int steps;       // of kStepChannels each; 0: no tap reaches the class
  int first_tile;  // tiles of classes and, below, their steps are counted through all classes;
  int first_step;  // a tile without steps counts as one, so that it is somebody's
};

struct ImplicitGemm {
  DType dtype;
  int N, H, W;               // of the result
  int a_channels, a_h, a_w;  // of the tensor that is gathered
  int channels, columns;     // of a group: summed over, and of the result
  int groups, filter_taps, filter_w;
  int class_count;
  PixelClass classes[kMostClasses];
};

// How the work is dealt. Workers are clusters of `cluster` blocks. A tile is `cluster` blocks' pixels with the same
// columns. Worker i has the tiles i, i + workers, .. of the first whole_tiles; the steps of the rest are divided evenly
// over the first sharers, so that the last wave is as full as the others.
struct Cut {
  int block_n, cluster;
  int column_tiles;  // of a group
  int tiles, whole_tiles, workers, sharers, shared_steps;
};

__host__ __device__ constexpr int cost(const PixelClass& at) { return at.steps > 0 ? at.steps : 1; }

inline int64_t pixels_of(const ImplicitGemm& gemm, const PixelClass& at) {
  return int64_t{gemm.N} * at.h.positions * at.w.positions;
}

// What is beyond an int is beyond TMA, too.
inline int saturated(int64_t value) { return static_cast<int>(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX)); }

inline TapAxis forward_taps(int P, int R, int stride, int pad, int dilation) {
  return {P, 0, 1, -pad, stride, R, dilation, 0, 1};
}

// h + pad - r * dilation = p * stride has a solution p for every `between`-th tap from the first that has one. Taps
// count backwards, since im2col's offsets only lead onward.
inline TapAxis backward_taps(int first, int H, int R, int stride, int pad, int dilation) {
  int tap = 0, between = 0, taps = 0;
  for (int r = 0; r < R; ++r) {
    if ((int64_t{first} + pad - int64_t{r} * dilation) % stride) continue;
    if (taps == 0) tap = r;
    if (taps == 1) between = r - tap;
    ++taps;
  }
  const int positions = static_cast<int>(ceil_div(H - first, stride));
  if (taps == 0) return {positions, first, stride, 0, 1, 0, 0, 0, 0};
  const int last = tap + (taps - 1) * between;
  const int64_t base = (int64_t{first} + pad - int64_t{last} * dilation) / stride,
                step = int64_t{between} * dilation / stride;
  return {positions, first, stride, saturated(base), 1, taps, saturated(step), last, -between};
}

inline int steps_of(const PixelClass& at, int channels) {
  return at.h.taps * at.w.taps * static_cast<int>(ceil_div(channels, kStepChannels));
}

inline ImplicitGemm forward_gemm(const Conv2dProblem& p) {
  ImplicitGemm gemm{p.dtype,        p.N,      p.P,       p.Q, p.C, p.H, p.W, p.C / p.groups,
                    p.K / p.groups, p.groups, p.R * p.S, p.S, 1,   {}};
  PixelClass& all = gemm.classes[0];
  all.h = forward_taps(p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  all.w = forward_taps(p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  all.steps = steps_of(all, gemm.channels);
  return gemm;
}

// The strides are at most kMostClasses together. Classes with the most taps come first, so that the least are left for
// the end.
inline ImplicitGemm backward_input_gemm(const Conv2dProblem& p) {
  ImplicitGemm gemm{p.dtype,        p.N,      p.H,       p.W, p.K, p.P, p.Q, p.K / p.groups,
                    p.C / p.groups, p.groups, p.R * p.S, p.S, 0,   {}};
  for (int h = 0; h < std::min(p.stride_h, p.H); ++h)
    for (int w = 0; w < std::min(p.stride_w, p.W); ++w) {
      PixelClass& at = gemm.classes[gemm.class_count++];
      at.h = backward_taps(h, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
      at.w = backward_taps(w, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      at.steps = steps_of(at, gemm.channels);
    }
  std::stable_sort(gemm.classes, gemm.classes + gemm.class_count,
                   [](const PixelClass& a, const PixelClass& b) { return a.steps > b.steps; });
  return gemm;
}

inline int64_t pixel_tiles(const ImplicitGemm& gemm) {
  int64_t tiles = 0;
  for (int i = 0; i < gemm.class_count; ++i) tiles += ceil_div(pixels_of(gemm, gemm.classes[i]), kTilePixels);
  return tiles;
}

// The kernels count pixels and steps in 32 bits: those that do not fit would take seconds.
inline bool countable(const ImplicitGemm& gemm) {
  int64_t pixels = 0, steps = 0;
  for (int i = 0; i < gemm.class_count; ++i) {
    const PixelClass& at = gemm.classes[i];
    pixels += pixels_of(gemm, at);
    steps += ceil_div(pixels_of(gemm, at), kTilePixels) * gemm.groups * ceil_div(gemm.columns, 64) * cost(at);
  }
  return pixels < INT32_MAX / 2 && steps < INT32_MAX / 2;
}

inline int64_t column_tiles(const ImplicitGemm& gemm, int block_n) {
  return gemm.groups * ceil_div(gemm.columns, block_n);
}

// Numbers the classes' tiles, and deals them. `share`: whether the last wave's sums may be divided.
inline Cut cut(ImplicitGemm& gemm, int block_n, int cluster, int multiprocessors, bool share) {
  constexpr int kLeastSteps = 4;  // of a sharer, so that its share is worth the traffic of its sums
  constexpr int kMostWaves = 8;   // beyond which filling the last one gains little
  Cut out{block_n, cluster, static_cast<int>(ceil_div(gemm.columns, block_n)), 0, 0, 0, 0, 0};
  int steps = 0;
  for (int i = 0; i < gemm.class_count; ++i) {
    PixelClass& at = gemm.classes[i];
    at.first_tile = out.tiles;
    at.first_step = steps;
    const int tiles =
        static_cast<int>(ceil_div(pixels_of(gemm, at), kTilePixels * cluster)) * gemm.groups * out.column_tiles;
    out.tiles += tiles;
    steps += tiles * cost(at);
  }
  const int workers = static_cast<int>(ceil_div(multiprocessors, cluster)), rest = out.tiles % workers;
  out.whole_tiles = out.tiles;
  out.workers = std::min(workers, out.tiles);
  if (!share || rest == 0 || out.tiles / workers >= kMostWaves) return out;

  const int whole = out.tiles - rest;
  int before = 0;  // the rest's first step
  for (int i = 0; i < gemm.class_count; ++i) {
    const PixelClass& at = gemm.classes[i];
    if (whole >= at.first_tile) before = at.first_step + (whole - at.first_tile) * cost(at);
  }
  const int sharers = std::min(workers, (steps - before) / kLeastSteps);
  if (sharers * 3 < rest * 4) return out;
  out.whole_tiles = whole;
  out.sharers = sharers;
  out.shared_steps = steps - before;
  out.workers = whole > 0 ? workers : sharers;
  return out;
}

inline bool reachable(const TapAxis& axis) {
  return axis.taps <= 1 || int64_t{axis.taps - 1} * axis.step <= kMostIm2colOffset;
}

inline Im2colTensor a_tensor(const ImplicitGemm& gemm, const PixelClass& at) {
  const auto upper = [](const TapAxis& axis, int extent) {
    return saturated(int64_t{axis.base} + int64_t{axis.positions - 1} * axis.move - (extent - 1));
  };
  return {gemm.dtype,
          gemm.a_channels,
          gemm.a_w,
          gemm.a_h,
          gemm.N,
          gemm.a_channels,
          at.w.base,
          at.h.base,
          upper(at.w, gemm.a_w),
          upper(at.h, gemm.a_h),
          at.w.move,
          at.h.move,
          kStepChannels,
          kTilePixels};
}

// weight [K][R*S][C / groups] in boxes of `rows` filters at one tap.
inline TiledTensor filter_tensor(const Conv2dProblem& p, int rows) {
  const int64_t channels = p.C / p.groups, taps = int64_t{p.R} * p.S;
  return {p.dtype, 3, {channels, taps, p.K}, {1, channels, taps * channels}, {kStepChannels, 1, rows}, {1, 1, 1}};
}

}  // namespace cnnops::cuda
