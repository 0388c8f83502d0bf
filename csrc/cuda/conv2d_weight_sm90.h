// How Hopper's backward_weight cuts a problem: what its plan and its kernels have to agree about.
#pragma once

#include <algorithm>
#include <optional>

#include "../problem.h"
#include "conv2d_plan.h"
#include "tensor_map.h"

namespace cnnops::cuda {

constexpr int kChunk = 64;                                // filters or channels of a row in shared memory
constexpr int kGroupPixels = 8;                           // rows of the swizzle's pattern, half a product's depth
constexpr int kPatternBytes = kGroupPixels * kChunk * 2;  // 16-bit numbers
constexpr int kMostStages = 6;

// n / by rounded up, in the 32 bits that pixels, filters and columns fit: the plan sees to it.
__host__ __device__ constexpr int chunks(int n, int by = kChunk) { return (n - 1) / by + 1; }

inline int stages_of(int bytes, const Device& device) {
  constexpr int kStaticBytes = 1024;  // the barriers, their end rounded up
  return std::min((device.shared_bytes - kStaticBytes) / bytes, kMostStages);
}

// All taps in one block: 3 x 3 of them.
constexpr int kTaps = 3;                     // along each axis
constexpr int kTapColumns = kTaps * kChunk;  // of the result, for each filter row

// What a stage holds.
struct TapsBox {
  int images, rows;  // of dy, in 8 columns
  int halo_rows;     // of x, for each image
  bool pairs_rows;   // a product's two groups of pixels are two rows, else two images

  __host__ __device__ int dy_groups() const { return images * rows; }
  __host__ __device__ int x_groups() const { return images * halo_rows; }  // of one copy
  __host__ __device__ int bytes() const { return (dy_groups() + kTaps * x_groups()) * kPatternBytes; }
};

// The tallest box of which three fit, so that the least of x is loaded twice; of several images where maps are small.
inline std::optional<TapsBox> taps_box(const Conv2dProblem& p, const Device& device) {
  constexpr int kLeastStages = 3, kMostGroups = 14;  // 14: seven products to a stage, 56 and 28 rows in whole boxes
  const bool pairs_rows = p.P % 2 == 0;
  const int step = pairs_rows ? 2 : 1, least_images = pairs_rows ? 1 : 2;
  for (int most = std::min(p.P, kMostGroups); most >= step; most -= step) {
    const int rows = chunks(chunks(p.P, chunks(p.P, most)), step) * step;  // as equal as can be
    const int64_t halo_rows = int64_t{rows - 1} * p.stride_h + int64_t{kTaps - 1} * p.dilation_h + 1;
    if (halo_rows > device.shared_bytes / kPatternBytes) continue;
    const int wanted = std::max(kMostGroups / rows, least_images);
    for (int images = wanted - wanted % least_images; images > 0; images -= least_images) {
      const TapsBox box{images, rows, static_cast<int>(halo_rows), pairs_rows};
      if (stages_of(box.bytes(), device) >= kLeastStages) return box;
    }
  }
  return std::nullopt;
}

// The pixels of dy cut into boxes, columns going fastest.
struct TapsBoxes {
  int columns, rows, images;

  __host__ __device__ TapsBoxes(const Conv2dProblem& p, const TapsBox& box)
      : columns(chunks(p.Q, kGroupPixels)), rows(chunks(p.P, box.rows)), images(chunks(p.N, box.images)) {}
  __host__ __device__ int count() const { return columns * rows * images; }
};

inline int64_t taps_tiles(const Conv2dProblem& p) { return int64_t{chunks(p.K)} * chunks(p.C / p.groups); }

// A box of an NHWC tensor, 64 channels deep, of every `stride_w`-th column; the tensor ends after `columns`.
inline TiledTensor taps_tensor(const Conv2dProblem& p, int64_t channels, int64_t columns, int64_t W, int64_t H,
                               int rows, int images, int stride_w) {
  return {p.dtype,
          4,
          {channels, columns, H, p.N},
          {1, channels, channels * W, channels * W * H},
          {kChunk, kGroupPixels, rows, images},
          {1, stride_w, 1, 1}};
}

inline TiledTensor taps_dy(const Conv2dProblem& p, const TapsBox& box) {
  return taps_tensor(p, p.K, p.Q, p.Q, p.P, box.rows, box.images, 1);
}

// Ends with the column that dy's last one reads by tap s.
inline TiledTensor taps_x(const Conv2dProblem& p, const TapsBox& box, int s) {
  const int64_t last = int64_t{p.Q - 1} * p.stride_w - p.pad_w + int64_t{s} * p.dilation_w;
  return taps_tensor(p, p.C, std::min<int64_t>(last + 1, p.W), p.W, p.H, box.halo_rows, box.images, p.stride_w);
}

inline bool keeps_all_taps(const Conv2dPlan& plan) { return plan.block_n == kTaps * kTapColumns; }

// Columns, each a tap and a channel, in chunks of 64 channels: a tap's do not share one with the next tap's.
constexpr int kColumnPixels = 64;  // of a stage
constexpr int kColumnChunkBytes = kColumnPixels * kChunk * 2;
constexpr int kColumnWarpgroups = 2;
constexpr int kMostColumnChunks = 4;  // of a block

__host__ __device__ constexpr int column_chunks(const Conv2dProblem& p) { return p.R * p.S * chunks(p.C / p.groups); }

inline int columns_steps(const Conv2dProblem& p) { return chunks(p.N * p.P * p.Q, kColumnPixels); }

inline int64_t columns_tiles(const Conv2dProblem& p, int block_m, int block_n) {
  return int64_t{p.groups} * chunks(p.K / p.groups, block_m) * chunks(column_chunks(p), block_n / kChunk);
}

inline TiledTensor columns_dy(const Conv2dProblem& p) {
  return {p.dtype, 2, {p.K, int64_t{p.N} * p.P * p.Q}, {1, p.K}, {kChunk, kColumnPixels}, {1, 1}};
}

inline Im2colTensor columns_x(const Conv2dProblem& p) {
  return {.dtype = p.dtype,
          .C = p.C,
          .W = p.W,
          .H = p.H,
          .N = p.N,
          .pitch = p.C,
          .lower_w = -p.pad_w,
          .lower_h = -p.pad_h,
          .upper_w = p.pad_w - (p.S - 1) * p.dilation_w,
          .upper_h = p.pad_h - (p.R - 1) * p.dilation_h,
          .stride_w = p.stride_w,
          .stride_h = p.stride_h,
          .channels = kChunk,
          .pixels = kColumnPixels};
}

}  // namespace cnnops::cuda
