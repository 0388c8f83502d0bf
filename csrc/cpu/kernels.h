// Every kernel of one ISA level, under the names of the table's fields.
#pragma once

#include <type_traits>

#include "../kernels.h"

#define CNNOPS_KERNELS(_)         \
  _(conv2d_forward_workspace)     \
  _(conv2d_backward_workspace)    \
  _(conv2d_forward)               \
  _(conv2d_backward)              \
  _(activation_forward)           \
  _(activation_backward)          \
  _(max_pool2d_forward)           \
  _(max_pool2d_backward)          \
  _(max_pool2d_indices)           \
  _(avg_pool2d_forward)           \
  _(avg_pool2d_backward)          \
  _(adaptive_avg_pool2d_forward)  \
  _(adaptive_avg_pool2d_backward) \
  _(batch_norm_act_forward)       \
  _(batch_norm_act_backward)      \
  _(bn_act_max_pool2d_forward)    \
  _(bn_act_max_pool2d_backward)   \
  _(squeeze_excite_forward)       \
  _(squeeze_excite_backward)      \
  _(copy)
