// How the depthwise kernels cut a pass: pure functions of the problem and the device, for the plan and the launchers.
//
// A strip is some columns of what a pass writes, over some rows and a tile of channels; a block marches down one strip
// after another. Its threads lie as groups, `across` side by side and `down` below each other. A group has a tile's
// channels, two to a thread, at the same few pixels; together the groups have the rows of one step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv2d_plan.h"

namespace cnnops::cuda {

enum class DepthwisePass : int { kForward, kInput, kWeight };

constexpr int kDepthwiseThreads = 128, kDepthwiseWarps = kDepthwiseThreads / 32;
constexpr int kLoneThreads = 2 * kDepthwiseThreads;  // where a multiprocessor has no room for a second block
constexpr int kLongestFilter = 31;  // side of a filter, which has an instance of its own or is of any size up to this
// A thread's pixels where the filter's size is known, and otherwise, in one row.
constexpr int kSizedRows = 2, kSizedColumns = 4, kAnyColumns = 4;
// Bytes of a pixel's channels in a tile. Beside the sized ones lie kSkew bytes, so that neighbouring groups' pixels are
// in different banks of shared memory.
constexpr int kSizedBytes = 64, kAnyBytes = 32, kMostAnyBytes = 128, kSkew = 16;
constexpr int kSumsSkew = 4;  // floats beside a row of sums
// What a block sums of dweight where not all rows of taps fit in shared memory, and the neighbouring taps of a thread.
constexpr int kTapRows = 8, kTapColumns = 4;

struct DepthwiseCut {
  bool sized;                                 // whether the filter's size is one that has an instance
  int channels, channel_tiles;                // of a tile; tiles
  int tap_tiles;                              // 1, or of kTapRows rows of the taps whose sums are dweight
  int threads;                                // of a block
  int across, down, columns, step;            // groups; pixels of a strip's row, rows of a step
  int rows, row_length;                       // of what a pass goes through in an image
  int64_t strips_w, chunks, chunk_rows;       // strips side by side and below each other in an image; rows of one
  int64_t strips, each, parts;                // strips of all images, those of a block, blocks for one tile
  int window, advance, ring_columns, pixel;   // rows that a step reads around its own, how far they move; row, pixel
  size_t other, weights, sums, dweight, end;  // where the parts of shared memory begin behind the ring, in bytes
};

DepthwiseCut depthwise_cut(const Conv2dProblem&, DepthwisePass, const Device&);

// Whether these kernels take the problem.
bool depthwise_takes(const Conv2dProblem&, DepthwisePass, const Device&);

}  // namespace cnnops::cuda
