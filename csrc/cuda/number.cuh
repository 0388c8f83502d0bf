// The 16-bit storage formats. Their conversions are in ptx.cuh, where they are instructions.
#pragma once

#include "launch.h"

namespace cnnops::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(BFloat16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }

__device__ __forceinline__ void from_float(float v, float& out) { out = v; }

}  // namespace cnnops::cuda
