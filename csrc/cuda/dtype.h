// From a DType to the type that kernels are instantiated for.
#pragma once

#include <stdexcept>

#include "number.cuh"

namespace cnnops::cuda {

// f(T{}) for the type that `dtype` names. There is no double here: dispatch refuses it.
template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kHalf:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kDouble:
      throw std::runtime_error("the CUDA kernels do not take double");
  }
}

}  // namespace cnnops::cuda
