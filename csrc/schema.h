// Every native op's signature, for every backend. Each library registers the rows its kernel table fills, in its own
// namespace cnnops_<backend>; the public cnnops::* ops are defined in cnnops/ops.
#pragma once

#define CNNOPS_CONV2D \
  "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int groups, int pad_mode"
#define CNNOPS_CONV_TRANSPOSE2D                                                                            \
  "int stride_h, int stride_w, int pad_h, int pad_w, int output_pad_h, int output_pad_w, int dilation_h, " \
  "int dilation_w, int groups"
#define CNNOPS_WINDOW "int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w"
#define CNNOPS_MAX_POOL2D CNNOPS_WINDOW ", int dilation_h, int dilation_w"
#define CNNOPS_AVG_POOL2D CNNOPS_WINDOW ", bool ceil_mode, bool count_include_pad, int divisor_override"

// _(name, arguments, results)
//
// The convolutions. Where a backend's kernels know TF32, each is there a second time, as <name>_tf32.
#define CNNOPS_CONV_SCHEMA(_)                                                                                       \
  _(conv2d_forward, "Tensor x, Tensor weight, Tensor? bias, " CNNOPS_CONV2D, "Tensor")                              \
  _(conv2d_backward,                                                                                                \
    "Tensor dy, Tensor x, Tensor weight, " CNNOPS_CONV2D ", bool need_dx, bool need_dweight, bool need_dbias",      \
    "(Tensor?, Tensor?, Tensor?)")                                                                                  \
  _(conv2d_act_forward,                                                                                             \
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, " CNNOPS_CONV2D ", str activation, bool need_z",      \
    "(Tensor, Tensor?)")                                                                                            \
  _(conv_transpose2d_forward, "Tensor x, Tensor weight, Tensor? bias, " CNNOPS_CONV_TRANSPOSE2D, "Tensor")          \
  _(conv_transpose2d_backward,                                                                                      \
    "Tensor dy, Tensor x, Tensor weight, " CNNOPS_CONV_TRANSPOSE2D                                                  \
    ", bool need_dx, bool need_dweight, bool need_dbias",                                                           \
    "(Tensor?, Tensor?, Tensor?)")                                                                                  \
  _(conv2d_bn_act_forward,                                                                                          \
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor running_var, "            \
    "Tensor? bn_weight, Tensor? bn_bias, " CNNOPS_CONV2D ", float eps, str activation",                             \
    "Tensor")                                                                                                       \
  _(conv2d_statistics_forward, "Tensor x, Tensor weight, Tensor? bias, " CNNOPS_CONV2D, "(Tensor, Tensor, Tensor)") \
  _(conv2d_bn_act_pooled_forward,                                                                                   \
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor running_var, "            \
    "Tensor? bn_weight, Tensor? bn_bias, " CNNOPS_CONV2D ", float eps, str activation",                             \
    "(Tensor, Tensor)")

#define CNNOPS_SCHEMA(_)                                                                                               \
  _(activation_backward, "Tensor dy, Tensor saved, str activation", "Tensor")                                          \
  _(max_pool2d_forward, "Tensor x, " CNNOPS_MAX_POOL2D ", bool ceil_mode, bool need_offsets", "(Tensor, Tensor?)")     \
  _(max_pool2d_backward, "Tensor dy, Tensor offsets, int H, int W, bool channels_last, " CNNOPS_MAX_POOL2D, "Tensor")  \
  _(max_pool2d_indices, "Tensor offsets, int H, int W, " CNNOPS_MAX_POOL2D, "Tensor")                                  \
  _(adaptive_max_pool2d_forward, "Tensor x, int P, int Q, bool need_offsets", "(Tensor, Tensor?)")                     \
  _(adaptive_max_pool2d_backward, "Tensor dy, Tensor offsets, int H, int W, bool channels_last", "Tensor")             \
  _(adaptive_max_pool2d_indices, "Tensor offsets, int H, int W", "Tensor")                                             \
  _(max_unpool2d_forward, "Tensor x, Tensor indices, int P, int Q", "Tensor")                                          \
  _(max_unpool2d_backward, "Tensor dy, Tensor indices, bool channels_last", "Tensor")                                  \
  _(avg_pool2d_forward, "Tensor x, " CNNOPS_AVG_POOL2D, "Tensor")                                                      \
  _(avg_pool2d_backward, "Tensor dy, int H, int W, bool channels_last, " CNNOPS_AVG_POOL2D, "Tensor")                  \
  _(adaptive_avg_pool2d_forward, "Tensor x, int P, int Q", "Tensor")                                                   \
  _(adaptive_avg_pool2d_backward, "Tensor dy, int H, int W, bool channels_last", "Tensor")                             \
  _(batch_norm_act_forward,                                                                                            \
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, "    \
    "bool training, float momentum, float eps, str activation",                                                        \
    "(Tensor, Tensor, Tensor)")                                                                                        \
  _(batch_norm_act_backward,                                                                                           \
    "Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, Tensor mean, Tensor rstd, "       \
    "bool training, float eps, str activation, bool need_dx, bool need_dweight, bool need_dbias, bool need_dresidual", \
    "(Tensor?, Tensor?, Tensor?, Tensor?)")                                                                            \
  _(bn_act_max_pool2d_forward,                                                                                         \
    "Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, "       \
    "float momentum, float eps, str activation, " CNNOPS_MAX_POOL2D ", bool ceil_mode, bool need_offsets",             \
    "(Tensor, Tensor, Tensor, Tensor)")                                                                                \
  _(bn_act_max_pool2d_backward,                                                                                        \
    "Tensor dy, Tensor offsets, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool training, "     \
    "float eps, str activation, " CNNOPS_MAX_POOL2D ", bool need_dx, bool need_dweight, bool need_dbias",              \
    "(Tensor?, Tensor?, Tensor?)")                                                                                     \
  _(squeeze_excite_forward,                                                                                            \
    "Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str activation, str gate",                \
    "(Tensor, Tensor, Tensor, Tensor)")                                                                                \
  _(squeeze_excite_backward,                                                                                           \
    "Tensor dy, Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor pooled, "               \
    "Tensor hidden, Tensor scale, str activation, str gate, bool need_dx, bool need_dweight1, bool need_dbias1, "      \
    "bool need_dweight2, bool need_dbias2",                                                                            \
    "(Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)")                                                                   \
  _(conv2d_plan,                                                                                                       \
    "str direction, int N, int C, int H, int W, int K, int R, int S, " CNNOPS_CONV2D                                   \
    ", ScalarType dtype, bool channels_last, bool tf32, int architecture, int multiprocessors, int shared_bytes",      \
    "str")                                                                                                             \
  _(use_architecture, "int architecture", "()")                                                                        \
  _(build_info, "", "str")
