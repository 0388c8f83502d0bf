// Slabs of dweight whose products took zeros for what lies beside dy and x.
#pragma once

#include <cmath>

#include "launch.h"

namespace cnnops::cuda {

// The sum over slabs, in order, of slabs[slab][i]; a slab has `size` sums.
//
// An infinity must not meet a zero from beside the other tensor. So where the sum is not finite, each of its parts that
// is not is sum_again(slab) instead, which leaves those products out. What is NaN stays so, and is not added to.
template <class SumAgain>
__device__ __forceinline__ float add_padded_slabs(const float* slabs, int64_t count, int64_t size, int64_t i,
                                                  SumAgain&& sum_again) {
  float sum = 0;
  CNNOPS_UNROLL
  for (int64_t slab = 0; slab < count; ++slab) sum += slabs[slab * size + i];
  if (std::isfinite(sum)) return sum;
  sum = 0;
  CNNOPS_NO_UNROLL
  for (int64_t slab = 0; slab < count && !std::isnan(sum); ++slab) {
    const float part = slabs[slab * size + i];
    sum += std::isfinite(part) ? part : sum_again(slab);
  }
  return sum;
}

}  // namespace cnnops::cuda
