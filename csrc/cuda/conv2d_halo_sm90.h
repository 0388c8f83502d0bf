// How the halo form of a convolution is cut. Pure functions on the host, which the plan asks too.
#pragma once

#include "conv2d_gemm_sm90.h"

namespace cnnops::cuda {

constexpr int kHaloChannels = 64, kHaloPixels = 256;

// A stride-1 convolution of kHaloChannels to as many: of x, or of dy with the filter turned round.
struct HaloConv {
  int N, H, W;             // of the tensor that is read
  int P, Q;                // of the result
  int R, S, pad_h, pad_w;  // tap (r, s) of pixel (p, q) reads element (p - pad_h + r, q - pad_w + s)
  int rows, columns;       // of a tile, kHaloPixels together; columns are a multiple of 8
  int tiles_h, tiles_w, tiles;
};

// Of the tile shapes that TMA and the swizzle allow, the one with the least pixels beside the image; of equals, the
// tallest, which reads x the least.
inline HaloConv halo_conv(const Conv2dProblem& p, bool backward) {
  HaloConv out{};
  out.N = p.N, out.R = p.R, out.S = p.S;
  if (backward) {
    out.H = p.P, out.W = p.Q, out.P = p.H, out.Q = p.W;
    out.pad_h = p.R - 1 - p.pad_h, out.pad_w = p.S - 1 - p.pad_w;
  } else {
    out.H = p.H, out.W = p.W, out.P = p.P, out.Q = p.Q;
    out.pad_h = p.pad_h, out.pad_w = p.pad_w;
  }
  int64_t least = INT64_MAX;
  for (const int columns : {8, 16, 32}) {
    const int rows = kHaloPixels / columns;
    const int64_t h = ceil_div(out.P, rows), w = ceil_div(out.Q, columns);
    if (h * w >= least) continue;
    least = h * w;
    out.rows = rows, out.columns = columns;
    out.tiles_h = static_cast<int>(h), out.tiles_w = static_cast<int>(w);
  }
  out.tiles = static_cast<int>(std::min<int64_t>(least * p.N, INT32_MAX));
  return out;
}

// A slot of the ring: the pixels of a tile that the taps of one column of the filter read.
inline int halo_slot_bytes(const HaloConv& at) { return (at.rows + at.R - 1) * at.columns * kHaloChannels * 2; }

// All that a block has: the filters, three slots, the floats that are about to be written, and barriers.
inline int64_t halo_shared_bytes(const HaloConv& at) {
  constexpr int kFilterBytes = kHaloChannels * kHaloChannels * 2, kSlots = 3;
  constexpr int kStageBytes = kHaloPixels / 2 * (kHaloChannels + 4) * 4, kBarrierBytes = 64;
  return int64_t{at.R} * at.S * kFilterBytes + kSlots * halo_slot_bytes(at) + kStageBytes + kBarrierBytes;
}

inline TiledTensor halo_tensor(DType dtype, const HaloConv& at) {
  const int64_t W = at.W, H = at.H;
  return {dtype,
          4,
          {kHaloChannels, W, H, at.N},
          {1, kHaloChannels, W * kHaloChannels, H * W * kHaloChannels},
          {kHaloChannels, at.columns, at.rows + at.R - 1, 1},
          {1, 1, 1, 1}};
}

}  // namespace cnnops::cuda
