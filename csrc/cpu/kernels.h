// Every kernel of one ISA level, under the names of the table's fields.
#pragma once

#include <type_traits>

#include "../kernels.h"

#define CNNOPS_KERNELS(_)         \
  _(conv2d_forward_workspace)     \
  _(conv2d_backward_workspace)    \
  _(conv2d_forward)               \
  _(conv2d_backward)              \
  _(conv_transpose2d_forward)     \
  _(activation_forward)           \
  _(activation_backward)          \
  _(max_pool2d_forward)           \
  _(max_pool2d_backward)          \
  _(max_pool2d_indices)           \
  _(adaptive_max_pool2d_forward)  \
  _(adaptive_max_pool2d_backward) \
  _(adaptive_max_pool2d_indices)  \
  _(max_unpool2d_misplaced)       \
  _(max_unpool2d_forward)         \
  _(max_unpool2d_backward)        \
  _(avg_pool2d_forward)           \
  _(avg_pool2d_backward)          \
  _(adaptive_avg_pool2d_forward)  \
  _(adaptive_avg_pool2d_backward) \
  _(batch_norm_act_forward)       \
  _(batch_norm_act_backward)      \
  _(fold_batch_norm)              \
  _(bn_act_max_pool2d_forward)    \
  _(bn_act_max_pool2d_backward)   \
  _(squeeze_excite_forward)       \
  _(squeeze_excite_backward)      \
  _(copy)
