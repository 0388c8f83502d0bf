// The families of convolution kernels, one for each Conv2dKernel. conv2d.cu asks the plan and calls one of them.
//
// Operands are aligned to 16 bytes. A family's workspace function says what its pass wants of `workspace`, statistics
// included. `epilogue` of backward_input has at most a bias, for conv_transpose2d.
#pragma once

#include "../kernels.h"
#include "conv2d_plan.h"

namespace cnnops::cuda {

struct Conv2dFamily {
  int64_t (*forward_workspace)(const Conv2dProblem&, const Conv2dPlan&, const Epilogue&);
  void (*forward)(const Conv2dProblem&, const Conv2dPlan&, const Epilogue&, const void* x, const void* weight, void* y,
                  void* workspace, Stream);
  int64_t (*backward_input_workspace)(const Conv2dProblem&, const Conv2dPlan&);
  void (*backward_input)(const Conv2dProblem&, const Conv2dPlan&, const Epilogue&, const void* dy, const void* weight,
                         void* dx, void* workspace, Stream);
  int64_t (*backward_weight_workspace)(const Conv2dProblem&, const Conv2dPlan&);
  void (*backward_weight)(const Conv2dProblem&, const Conv2dPlan&, const void* dy, const void* x, void* dweight,
                          void* workspace, Stream);
  // Both gradients from one read of dy, in backward_weight's workspace.
  void (*backward)(const Conv2dProblem&, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                   void* workspace, Stream) = nullptr;
  bool pools = false;  // whether forward fills Epilogue::pooled
};

// A null function is a pass that the family does not have. The sm_90a ones are null throughout where the library was
// not compiled for that architecture.
extern const Conv2dFamily kPortableConv2d, kPackedConv2d, kDepthwiseConv2d, kDepthwiseNchwConv2d, kToeplitzConv2d,
    kStemConv2d, kWgmmaConv2d, kHaloConv2d;

// Moments of tiles, merged in order: partial[tile][count, mean, m2][K] gives epilogue.mean and epilogue.m2.
void finish_moments(int64_t tiles, int64_t K, const float* partial, const Epilogue& epilogue, Stream stream);

// epilogue.pooled[n][k] = the sum of partial[n][part][k] over an image's parts, in order, divided by its pixels.
void finish_pooled(const Conv2dProblem&, int64_t parts, const float* partial, const Epilogue& epilogue, Stream stream);

// The numbers in a slab of dweight's sums.
inline int64_t slab_size(const Conv2dProblem& p) { return int64_t{p.K} * p.R * p.S * (p.C / p.groups); }

// dbias of problems without channels_last, in a workspace of its own.
int64_t depthwise_nchw_bias_workspace(const Conv2dProblem& p);
void depthwise_nchw_bias(const Conv2dProblem& p, const void* dy, void* dbias, float* workspace, Stream stream);

// out[i] = the sum over slabs of slabs[slab][i], in order; out is of `dtype`.
void add_slabs(DType dtype, int64_t count, int64_t size, const float* slabs, void* out, Stream stream);

}  // namespace cnnops::cuda
