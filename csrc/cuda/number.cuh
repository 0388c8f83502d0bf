// The 16-bit storage formats, and bfloat16's conversions. Half's are in ptx.cuh: they are instructions.
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
// Round to nearest even; a NaN stays one (the rounding carry would turn some into infinity).
__device__ __forceinline__ void from_float(float v, BFloat16& out) {
  const unsigned bits = __float_as_uint(v);
  out.bits = v != v ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace cnnops::cuda
