#include "conv2d_sm90.h"

namespace cnnops::cuda {

const Conv2dFamily kWgmmaConv2d = {
    .forward_workspace = nullptr,
    .forward = nullptr,
    .backward_input_workspace = nullptr,
    .backward_input = nullptr,
    .backward_weight_workspace = conv2d_backward_weight_workspace_sm90,
    .backward_weight = conv2d_backward_weight_sm90,
};

}  // namespace cnnops::cuda
