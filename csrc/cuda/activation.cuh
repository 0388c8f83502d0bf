// The activations that an epilogue applies, on float. NaN passes through all of them, and relu keeps -0.0, as in torch.
#pragma once

#include <cmath>

#include "launch.h"

namespace cnnops::cuda {

__device__ inline float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v < 0 ? 0 : v;
    case Activation::kRelu6:
      return v < 0 ? 0 : v > 6 ? 6 : v;
    case Activation::kSilu:
      return v / (1 + expf(-v));
    case Activation::kHardswish:
      return v * (v < -3 ? 0 : v > 3 ? 6 : v + 3) / 6;
    case Activation::kSigmoid:
      return 1 / (1 + expf(-v));
  }
  return v;
}

}  // namespace cnnops::cuda
