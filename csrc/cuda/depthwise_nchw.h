// How the depthwise kernels of NCHW cut a pass: pure functions of the problem and the device, for the plan and the
// launchers.
//
// Planes follow each other in memory, those of a channel's filters too. A tile is some channels' planes; a strip is all
// of an image's in a tile, or where planes are large, some rows of a single channel's. Either way a block moves whole
// ranges of memory. It takes one strip after another of its tile.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv2d_plan.h"
#include "depthwise_conv2d.h"

namespace cnnops::cuda {

constexpr int kNchwThreads = 128;
constexpr int kNchwRun = 8;  // results of a thread below each other

struct NchwCut {
  bool sized;                            // whether the filter's size is one that has an instance
  int planes, rows;                      // channels of a tile; rows of y in a strip
  int lanes_x, lanes_y;                  // threads of one plane of x and of y, powers of two
  int64_t chunks, channel_tiles;         // strips of a plane, of which one is the whole plane; tiles
  int64_t strips, each, parts;           // of a tile: strips of all images, those of a block, blocks
  int pitch_x, pitch_y, pitch_sums;      // between strips of planes in shared memory, in elements
  size_t x_bytes, y_bytes;               // of one of two buffers
  size_t y, sums, weights, shares, end;  // where the parts of shared memory begin behind x's buffers, in bytes
};

NchwCut nchw_cut(const Conv2dProblem&, DepthwisePass, const Device&);

// Whether these kernels take all passes of the problem.
bool depthwise_nchw_takes(const Conv2dProblem&, const Device&);

}  // namespace cnnops::cuda
