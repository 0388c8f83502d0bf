// Tensor maps that a problem needs again and again: encoded once for each description, and given each call's address.
#pragma once

#include "tensor_map.h"

namespace cnnops::cuda {

// As tensor_map(). From any thread.
TensorMap cached_tensor_map(const TiledTensor& tensor, const void* base);
TensorMap cached_tensor_map(const Im2colTensor& tensor, const void* base);

}  // namespace cnnops::cuda
