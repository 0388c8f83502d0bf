// The activations and their gradients, on float. NaN passes through all of them, and relu keeps -0.0, as in torch.
#pragma once

#include <cmath>

#include "launch.h"

namespace cnnops::cuda {

// f(activate), which is instantiated for each activation, so that the choice is made once and not for each element.
template <class F>
__device__ void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f([](float v) { return v; });
    case Activation::kRelu:
      return f([](float v) { return v < 0 ? 0 : v; });
    case Activation::kRelu6:
      return f([](float v) { return v < 0 ? 0 : v > 6 ? 6 : v; });
    case Activation::kSilu:
      return f([](float v) { return v / (1 + expf(-v)); });
    case Activation::kHardswish:
      return f([](float v) { return v >= 3 ? v : v * (v < -3 ? 0 : v + 3) / 6; });
    case Activation::kSigmoid:
      return f([](float v) { return 1 / (1 + expf(-v)); });
  }
}

// f(gradient), gradient(dy, saved) being the activation's. A masked gradient is 0 whatever dy is, as in torch.
template <class F>
__device__ void with_gradient(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f([](float dy, float) { return dy; });
    case Activation::kRelu:
      return f([](float dy, float y) { return y <= 0 ? 0 : dy; });
    case Activation::kRelu6:
      return f([](float dy, float y) { return y > 0 && y < 6 ? dy : 0; });
    case Activation::kSilu:
      return f([](float dy, float z) {
        const float s = 1 / (1 + expf(-z));
        return dy * s * (1 + z * (1 - s));
      });
    case Activation::kHardswish:
      return f([](float dy, float z) { return z <= -3 ? 0 : z >= 3 ? dy : dy * (z / 3 + 0.5f); });
    case Activation::kSigmoid:
      return f([](float dy, float y) { return dy * (1 - y) * y; });
  }
}

}  // namespace cnnops::cuda
