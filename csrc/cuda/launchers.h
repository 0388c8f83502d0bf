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
std::string conv2d_plan(const std::string& direction, const Conv2dProblem&, int architecture, int multiprocessors,
                        int shared_bytes);
void activation_forward(DType, Activation, int64_t count, const void* z, void* y, Stream);
void activation_backward(DType, Activation, int64_t count, const void* dy, const void* saved, void* dz, Stream);
void fold_batch_norm(DType, int64_t channels, double eps, const BatchNormFold&, Stream);
void use_architecture(int architecture);
void copy(const CopyProblem&, const void* src, void* dst, Stream);

}  // namespace cnnops::cuda
