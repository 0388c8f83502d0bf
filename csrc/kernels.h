// What a backend implements: one table of kernel launchers over plain structs, dense device pointers and a stream.
// bind.cpp is the only caller. A null entry is a kernel that the backend does not have.
//
// Activations are NHWC, or NCHW where the problem says so, and filters KRSC in problem.dtype. Per-channel arrays of
// batch norm (weight, bias, mean, rstd, running statistics and their gradients) are in the accumulation type: double
// for kDouble, else float. A null output pointer is a result nobody asked for. N >= 1 and every extent >= 1: bind.cpp
// deals with the empty.
#pragma once

#include <cstddef>
#include <string>

#include "problem.h"

namespace cnnops {

using Stream = void*;  // cudaStream_t on CUDA; null on a CPU

// Applied to the convolution's sum before it is rounded: activation(sum * scale[k] + bias[k] + residual[n,p,q,k]).
struct Epilogue {
  const void* bias = nullptr;      // [K] or null
  const void* residual = nullptr;  // like y, in its layout, or null
  Activation activation = Activation::kNone;
  const void* scale = nullptr;  // [K] or null; bias and scale are then in the accumulation type. See fold_batch_norm.
  // [K] in the accumulation type, or null: of each filter's rounded results over N, P and Q, the mean and the sum of
  // squared deviations from it. Without an activation.
  void *mean = nullptr, *m2 = nullptr;
  // [N,K] in the accumulation type, or null: of each image and filter, the mean over P and Q of the rounded results.
  // Not together with mean and m2, and only of problems whose plan is a depthwise kernel.
  void* pooled = nullptr;
};

struct BatchNormForward {
  const void *x, *residual;          // residual may be null
  const void *weight, *bias;         // [C] or null
  void *running_mean, *running_var;  // [C] or null; updated when training, read otherwise
  void *y, *mean, *rstd;             // mean and rstd [C]: the statistics that were used
  void* workspace;
};

// The epilogue's part of batch norm with running statistics, after a convolution with conv_bias:
// scale = weight / sqrt(running_var + eps), shift = (conv_bias - running_mean) * scale + bias.
struct BatchNormFold {
  const void *conv_bias, *running_mean, *running_var, *weight, *bias;  // [C]; all but the statistics may be null
  void *scale, *shift;                                                 // [C]
};

struct BatchNormBackward {
  const void *dy, *x, *residual, *y;  // y where the activation's gradient is read off it, else null
  const void *weight, *bias, *mean, *rstd;
  void *dx, *dresidual;   // like x, or null
  void *dweight, *dbias;  // [C] or null
  void* workspace;
};

// weight1 and weight2 are [M,C] both, the second transposed; they, the biases and all below are in the accumulation
// type.
struct SqueezeExciteForward {
  const void *x, *weight1, *bias1, *weight2, *bias2;  // bias1 [M] and bias2 [C] may be null
  void *y, *pooled, *hidden, *scale;                  // pooled and scale [N,C], hidden [N,M] before its activation
  void* workspace;
};

struct SqueezeExciteBackward {
  const void *dy, *x, *weight1, *weight2, *pooled, *hidden, *scale;
  void *dx, *dweight1, *dbias1, *dweight2, *dbias2;  // like what they belong to, or null
  void* workspace;
};

struct Kernels {
  // Scratch bytes that a call wants in `workspace` (256-byte aligned). A null one of batch norm, squeeze_excite
  // or max_unpool2d: none.
  int64_t (*conv2d_forward_workspace)(const Conv2dProblem&, const Epilogue&);
  int64_t (*conv2d_backward_workspace)(const Conv2dProblem&, bool need_dx, bool need_dweight, bool need_dbias);
  void (*conv2d_forward)(const Conv2dProblem&, const Epilogue&, const void* x, const void* weight, void* y,
                         void* workspace, Stream);
  void (*conv2d_backward)(const Conv2dProblem&, const void* dy, const void* x, const void* weight, void* dx,
                          void* dweight, void* dbias, void* workspace, Stream);
  // The problem is the convolution from y to x: y is its dx for dy = x, plus bias [C] or null, in the same workspace.
  void (*conv_transpose2d_forward)(const Conv2dProblem&, const void* x, const void* weight, const void* bias, void* y,
                                   void* workspace, Stream);

  void (*activation_forward)(DType, Activation, int64_t count, const void* z, void* y, Stream);
  // saved: y for none, relu, relu6 and sigmoid; z for silu and hardswish.
  void (*activation_backward)(DType, Activation, int64_t count, const void* dy, const void* saved, void* dz, Stream);

  // offsets [N,P,Q,C], whatever x's layout: r * S + s of the maximum, uint8 where R * S <= 256, else int32.
  void (*max_pool2d_forward)(const Pool2dProblem&, const void* x, void* y, void* offsets, Stream);
  void (*max_pool2d_backward)(const Pool2dProblem&, const void* dy, const void* offsets, void* dx, Stream);
  void (*max_pool2d_indices)(const Pool2dProblem&, const void* offsets, int64_t* indices, Stream);  // h * W + w
  // offsets [N,P,Q,C]: r * S + s of the maximum in its own window of S columns.
  void (*adaptive_max_pool2d_forward)(const Pool2dProblem&, const void* x, void* y, int32_t* offsets, Stream);
  void (*adaptive_max_pool2d_backward)(const Pool2dProblem&, const void* dy, const int32_t* offsets, void* dx, Stream);
  void (*adaptive_max_pool2d_indices)(const Pool2dProblem&, const int32_t* offsets, int64_t* indices, Stream);
  int64_t (*max_unpool2d_workspace)(const Unpool2dProblem&) = nullptr;
  // The first index in torch's order that is no position of a P x Q plane; false if there is none. `found` is on the
  // host, `workspace` of max_unpool2d_workspace bytes; max_unpool2d_forward is given it as this left it.
  bool (*max_unpool2d_misplaced)(const Unpool2dProblem&, const int64_t* indices, int64_t* found, void* workspace,
                                 Stream);
  void (*max_unpool2d_forward)(const Unpool2dProblem&, const void* x, const int64_t* indices, void* y,
                               const void* workspace, Stream);
  void (*max_unpool2d_backward)(const Unpool2dProblem&, const void* dy, const int64_t* indices, void* dx, Stream);
  void (*avg_pool2d_forward)(const Pool2dProblem&, const void* x, void* y, Stream);
  void (*avg_pool2d_backward)(const Pool2dProblem&, const void* dy, void* dx, Stream);
  void (*adaptive_avg_pool2d_forward)(const Pool2dProblem&, const void* x, void* y, Stream);
  void (*adaptive_avg_pool2d_backward)(const Pool2dProblem&, const void* dy, void* dx, Stream);

  int64_t (*batch_norm_act_forward_workspace)(const NormProblem&) = nullptr;
  int64_t (*batch_norm_act_backward_workspace)(const NormProblem&) = nullptr;
  void (*batch_norm_act_forward)(const NormProblem&, const BatchNormForward&, Stream);
  void (*batch_norm_act_backward)(const NormProblem&, const BatchNormBackward&, Stream);
  // A backend that has it applies Epilogue::scale in conv2d_forward.
  void (*fold_batch_norm)(DType, int64_t channels, double eps, const BatchNormFold&, Stream);

  // Batch norm, its activation and max_pool2d of the result: x NHWC, y and dy [N,P,Q,C], no residual.
  int64_t (*bn_act_max_pool2d_forward_workspace)(const NormProblem&, const Pool2dProblem&) = nullptr;
  int64_t (*bn_act_max_pool2d_backward_workspace)(const NormProblem&, const Pool2dProblem&) = nullptr;
  void (*bn_act_max_pool2d_forward)(const NormProblem&, const Pool2dProblem&, const BatchNormForward&, void* offsets,
                                    Stream);
  void (*bn_act_max_pool2d_backward)(const NormProblem&, const Pool2dProblem&, const BatchNormBackward&,
                                     const void* offsets, Stream);

  int64_t (*squeeze_excite_forward_workspace)(const SqueezeExciteProblem&) = nullptr;
  int64_t (*squeeze_excite_backward_workspace)(const SqueezeExciteProblem&) = nullptr;
  void (*squeeze_excite_forward)(const SqueezeExciteProblem&, const SqueezeExciteForward&, Stream);
  void (*squeeze_excite_backward)(const SqueezeExciteProblem&, const SqueezeExciteBackward&, Stream);

  void (*copy)(const CopyProblem&, const void* src, void* dst, Stream);

  // Which kernel computes a pass of a convolution ("forward", "backward_input", "backward_weight") on a device, and
  // why; as NHWC where the kernels do not take the problem in its layout. An architecture of 0 stands for the device
  // that a launch would go to.
  std::string (*conv2d_plan)(const std::string& direction, const Conv2dProblem&, int architecture, int multiprocessors,
                             int shared_bytes) = nullptr;
  // Plan as for a device of at most this architecture; 0: as the device is. For tests and benchmarks.
  void (*use_architecture)(int architecture) = nullptr;

  // Whether convolutions take the problem without channels_last; null: never. Otherwise the caller makes x NHWC.
  bool (*conv2d_nchw)(const Conv2dProblem&) = nullptr;

  bool pool2d_nchw = false;        // pools take channels_last = false; otherwise the caller makes x NHWC
  bool conv2d_statistics = false;  // conv2d_forward fills Epilogue::mean and m2
  bool conv2d_pooled = false;      // and Epilogue::pooled
  bool tf32 = false;               // convolutions look at Conv2dProblem::tf32
  bool conv2d_in_float = false;    // conv2d wants half and bfloat16 widened to float by the caller
};

// Each library holds one backend and so defines this once.
const Kernels& kernels();

// What was compiled, as JSON: {"backend", "compiler", "flags", "arches" or "isa_levels", "isa" in use, "kernels"}.
const char* build_info();

}  // namespace cnnops
