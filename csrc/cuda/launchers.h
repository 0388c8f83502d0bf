// The launchers of this backend's kernel files, for the table in kernels.cu. Contracts are in kernels.h.
#pragma once

#include "../kernels.h"

namespace cnnops::cuda {

int64_t conv2d_forward_workspace(const Conv2dProblem&, const Epilogue&);
int64_t conv2d_backward_workspace(const Conv2dProblem&, bool need_dx, bool need_dweight, bool need_dbias);
void conv2d_forward(const Conv2dProblem&, const Epilogue&, const void* x, const void* weight, void* y, void* workspace,
                    Stream);
void conv2d_backward(const Conv2dProblem&, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                     void* dbias, void* workspace, Stream);
void conv_transpose2d_forward(const Conv2dProblem&, const void* x, const void* weight, const void* bias, void* y,
                              void* workspace, Stream);
bool conv2d_nchw(const Conv2dProblem&);
std::string conv2d_plan(const std::string& direction, const Conv2dProblem&, int architecture, int multiprocessors,
                        int shared_bytes);
void activation_forward(DType, Activation, int64_t count, const void* z, void* y, Stream);
void activation_backward(DType, Activation, int64_t count, const void* dy, const void* saved, void* dz, Stream);
void fold_batch_norm(DType, int64_t channels, double eps, const BatchNormFold&, Stream);
void max_pool2d_forward(const Pool2dProblem&, const void* x, void* y, void* offsets, Stream);
void max_pool2d_backward(const Pool2dProblem&, const void* dy, const void* offsets, void* dx, Stream);
void max_pool2d_indices(const Pool2dProblem&, const void* offsets, int64_t* indices, Stream);
void adaptive_max_pool2d_forward(const Pool2dProblem&, const void* x, void* y, int32_t* offsets, Stream);
void adaptive_max_pool2d_backward(const Pool2dProblem&, const void* dy, const int32_t* offsets, void* dx, Stream);
void adaptive_max_pool2d_indices(const Pool2dProblem&, const int32_t* offsets, int64_t* indices, Stream);
int64_t max_unpool2d_workspace(const Unpool2dProblem&);
bool max_unpool2d_misplaced(const Unpool2dProblem&, const int64_t* indices, int64_t* found, void* workspace, Stream);
void max_unpool2d_forward(const Unpool2dProblem&, const void* x, const int64_t* indices, void* y, const void* workspace,
                          Stream);
void max_unpool2d_backward(const Unpool2dProblem&, const void* dy, const int64_t* indices, void* dx, Stream);
void avg_pool2d_forward(const Pool2dProblem&, const void* x, void* y, Stream);
void avg_pool2d_backward(const Pool2dProblem&, const void* dy, void* dx, Stream);
void adaptive_avg_pool2d_forward(const Pool2dProblem&, const void* x, void* y, Stream);
void adaptive_avg_pool2d_backward(const Pool2dProblem&, const void* dy, void* dx, Stream);
int64_t batch_norm_act_forward_workspace(const NormProblem&);
int64_t batch_norm_act_backward_workspace(const NormProblem&);
void batch_norm_act_forward(const NormProblem&, const BatchNormForward&, Stream);
void batch_norm_act_backward(const NormProblem&, const BatchNormBackward&, Stream);
int64_t bn_act_max_pool2d_forward_workspace(const NormProblem&, const Pool2dProblem&);
int64_t bn_act_max_pool2d_backward_workspace(const NormProblem&, const Pool2dProblem&);
void bn_act_max_pool2d_forward(const NormProblem&, const Pool2dProblem&, const BatchNormForward&, void* offsets,
                               Stream);
void bn_act_max_pool2d_backward(const NormProblem&, const Pool2dProblem&, const BatchNormBackward&, const void* offsets,
                                Stream);
int64_t squeeze_excite_forward_workspace(const SqueezeExciteProblem&);
int64_t squeeze_excite_backward_workspace(const SqueezeExciteProblem&);
void squeeze_excite_forward(const SqueezeExciteProblem&, const SqueezeExciteForward&, Stream);
void squeeze_excite_backward(const SqueezeExciteProblem&, const SqueezeExciteBackward&, Stream);
void use_architecture(int architecture);
void copy(const CopyProblem&, const void* src, void* dst, Stream);

}  // namespace cnnops::cuda
