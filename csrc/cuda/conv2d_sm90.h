// Hopper's convolution kernels, as the families of conv2d_kernels.h and the plan see them.
#pragma once

#include <optional>

#include "conv2d_kernels.h"

namespace cnnops::cuda {

// The plan of a pass by TMA and wgmma, or none where they do not take the problem, and why.
std::optional<Conv2dPlan> plan_forward_sm90(const Conv2dProblem& p, const Device& device, const char*& refusal);
std::optional<Conv2dPlan> plan_backward_input_sm90(const Conv2dProblem& p, const Device& device, const char*& refusal);

// The plan of a backward_weight by TMA and wgmma, or none where they do not take the problem, and why. block_m x
// block_n is the tile of filters x (taps, channels): 64 x 576 keeps all taps of 64 channels in one block.
std::optional<Conv2dPlan> plan_backward_weight_sm90(const Conv2dProblem& p, const Device& device, const char*& refusal);

int64_t conv2d_backward_weight_workspace_sm90(const Conv2dProblem& p, const Conv2dPlan& plan);
void conv2d_backward_weight_sm90(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x,
                                 void* dweight, void* workspace, Stream stream);

}  // namespace cnnops::cuda
