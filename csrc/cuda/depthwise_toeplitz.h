// How the Toeplitz form of a depthwise convolution is cut, for its kernel and for the plan.
#pragma once

#include "launch.h"

namespace cnnops::cuda {

// The filters' extents that the form takes: smaller ones leave the bands mostly zero.
constexpr int kLeastToeplitzTaps = 7, kMostToeplitzTaps = 31;

// Tiles of outputs, kSide x kSide of 16 channels, whose 32 bytes of a pixel are one of L2's sectors.
constexpr int kLargeToeplitzSide = 32, kSmallToeplitzSide = 16, kToeplitzChannels = 16, kToeplitzWarps = 8;

// The parts of a block's dynamic shared memory: a plane of the halo for each channel, where the sums lie afterwards,
// and the filters. A row's pitch is an odd number of 16-byte pieces, so that ldmatrix meets no bank twice; the upper 8
// channels' planes are shifted by half of all banks, so that both halves of a pixel are written together.
template <int kSide>
struct ToeplitzLayout {
  static constexpr int kShift = 32;        // elements
  static constexpr int kPixelFloats = 20;  // 16 sums and padding
  static constexpr int kWarpRows = 2;      // rows of sums that a warp writes, of the 16 that are staged together
  static constexpr int kWarpFloats = kWarpRows * kSide * kPixelFloats + 4;  // rows that differ, in different banks

  int steps;        // of 16 columns, for the taps of 8 neighbouring outputs
  int rows, pitch;  // of a plane
  int taps, words;  // rows of a filter's taps, and words of a row, of which there are two copies
  size_t filters, end;

  __host__ __device__ ToeplitzLayout(int R, int S) {
    taps = R;
    words = S / 2 + 1;
    steps = (S + 7 + 15) / 16;
    rows = kSide + R - 1;
    pitch = kSide - 8 + 16 * steps;
    const size_t halo = (kToeplitzChannels * rows * pitch + kShift) * sizeof(uint16_t);
    constexpr size_t kSums = kToeplitzWarps * kWarpFloats * sizeof(float);
    filters = halo > kSums ? halo : kSums;
    end = filters + kToeplitzChannels * 2 * R * words * sizeof(uint32_t);
  }

  // A channel's plane, in elements from the start.
  __device__ int plane(int channel) const { return channel * rows * pitch + channel / 8 * kShift; }
  // A row of a channel's taps, in elements from the start of filters.
  __device__ int filter(int channel, int row) const { return (channel * taps + row) * 4 * words; }
  // The first sum of an output, in floats from the start.
  static __device__ int sum(int row, int column) {
    return row / kWarpRows * kWarpFloats + (row % kWarpRows * kSide + column) * kPixelFloats;
  }
};

}  // namespace cnnops::cuda
