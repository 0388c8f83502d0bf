// Which kernel computes a pass of a convolution, and how it is cut: pure functions of the problem and the device, so
// that a test can ask them about any problem and any device.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"
#include "device.h"

namespace cnnops::cuda {

enum class Conv2dKernel : int {
  kPortable,   // conv2d_portable.cu: any problem, mma.sync or CUDA cores
  kPacked,     // conv2d_packed.cu: groups of few channels, block-diagonally
  kDepthwise,  // depthwise_conv2d.cu: groups of one channel
  kNchw,       // depthwise_nchw.cu: groups of one channel, in planes
  kToeplitz,   // depthwise_toeplitz.cu: large depthwise filters as banded matrices
  kStem,       // conv2d_stem.cu: few input channels, im2col in shared memory
  kWgmma,      // conv2d_sm90.cu: TMA and wgmma
  kHalo,       // conv2d_halo_sm90.cu: TMA and wgmma, every tap from one tile of x
};

struct Conv2dPlan {
  Conv2dKernel kernel;
  int block_m, block_n, stages;
  int cluster;                    // blocks that share their filters' tiles by multicast
  int64_t splits;                 // slabs that a sum is cut into; 1: none
  const char* reason;             // of the choice, for people
  const char* refusal = nullptr;  // why Hopper's kernels do not take the problem, where they do not
};

// pooled: by a kernel that gives Epilogue::pooled, if any does.
Conv2dPlan plan_forward(const Conv2dProblem&, const Device&, bool pooled = false);
Conv2dPlan plan_backward_input(const Conv2dProblem&, const Device&);
Conv2dPlan plan_backward_weight(const Conv2dProblem&, const Device&);

// "kernel tile stages cluster splits: reason", for cnnops.explain.
std::string describe(const Conv2dPlan&);

}  // namespace cnnops::cuda
