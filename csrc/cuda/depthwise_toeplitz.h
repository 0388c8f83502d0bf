// How the Toeplitz form of a depthwise convolution is cut, for its kernel and for the plan.
#pragma once

#include "launch.h"

namespace cnnops::cuda {

// The filters' extents that the form takes: smaller ones leave the bands mostly zero.
constexpr int kLeastToeplitzTaps = 7, kMostToeplitzTaps = 31;

// Tiles of outputs, kSide x kSide of 16 channels, whose 32 bytes of a pixel are one of L2's sectors.
constexpr int kLargeToeplitzSide = 32, kSmallToeplitzSide = 16, kToeplitzChannels = 16, kToeplitzWarps = 8;

// Rows of numbers of 16 channels in shared memory, each twice: from an even and from an odd word on, with zeros around,
// so that any two neighbours are one word.
struct ToeplitzRows {
  int rows, words;  // of a channel; of one copy of a row

  __host__ __device__ ToeplitzRows(int rows, int columns) : rows(rows), words(columns / 2 + 1) {}
  __host__ __device__ size_t bytes() const { return kToeplitzChannels * 2 * sizeof(uint32_t) * rows * words; }
  // Elements from the start: of a row, from copy to copy, and of the second copy's first number.
  __device__ int row(int channel, int row) const { return (channel * rows + row) * 4 * words; }
  __device__ int copy() const { return 2 * words; }
  __device__ int second() const { return copy() + 1; }
};

// The parts of a block's dynamic shared memory: a plane of the halo for each channel, where the sums lie afterwards,
// the filters, and for dweight x. A row's pitch is an odd number of 16-byte pieces, so that ldmatrix meets no bank
// twice; the upper 8 channels' planes are shifted by half of all banks, so that both halves of a pixel are written
// together.
template <int kSide>
struct ToeplitzLayout {
  static constexpr int kShift = 32;        // elements
  static constexpr int kPixelFloats = 20;  // 16 sums and padding
  static constexpr int kWarpRows = 2;      // rows of sums that a warp writes, of the 16 that are staged together
  static constexpr int kWarpFloats = kWarpRows * kSide * kPixelFloats + 4;  // rows that differ, in different banks

  int steps;        // of 16 columns, for the taps of 8 neighbouring outputs
  int rows, pitch;  // of a plane
  ToeplitzRows taps, pixels;
  size_t filters, x, end;

  // dweight: whether the block sums it too. For 8 neighbouring taps that reads kSide + 8 columns of a plane.
  __host__ __device__ ToeplitzLayout(int R, int S, bool dweight) : taps(R, S), pixels(kSide, kSide) {
    steps = (S + 7 + 15) / 16;
    rows = kSide + R - 1;
    pitch = kSide - 8 + 16 * (dweight ? (S + 8 + 15) / 16 : steps);
    const size_t halo = (kToeplitzChannels * rows * pitch + kShift) * sizeof(uint16_t);
    constexpr size_t kSums = kToeplitzWarps * kWarpFloats * sizeof(float);
    filters = halo > kSums ? halo : kSums;
    x = filters + taps.bytes();
    end = x + (dweight ? pixels.bytes() : 0);
  }

  // A channel's plane, in elements from the start.
  __device__ int plane(int channel) const { return channel * rows * pitch + channel / 8 * kShift; }
  // The first sum of an output, in floats from the start.
  static __device__ int sum(int row, int column) {
    return row / kWarpRows * kWarpFloats + (row % kWarpRows * kSide + column) * kPixelFloats;
  }
};

// How the blocks that sum dweight share the tiles of a channel's dx: `each` to one of `parts`.
struct ToeplitzParts {
  int64_t tiles, each, parts;

  ToeplitzParts(const Conv2dProblem& p, const Device& device) {
    constexpr int64_t kLeastPixels = 8;  // for each tap: a slab moves 8 bytes for one of them, dy, x and dx 6 bytes
    const int64_t pixels = int64_t{p.N} * p.H * p.W, most = pixels / (kLeastPixels * p.R * p.S);
    tiles = p.N * ceil_div(p.H, kSmallToeplitzSide) * ceil_div(p.W, kSmallToeplitzSide);
    parts = ceil_div(int64_t{2} * device.multiprocessors, ceil_div(p.C, kToeplitzChannels));
    parts = parts < most ? parts : most > 1 ? most : 1;
    each = ceil_div(tiles, parts);
    parts = ceil_div(tiles, each);
  }
};

}  // namespace cnnops::cuda
