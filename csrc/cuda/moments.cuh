// Mean and variance of values that come one by one or in parts.
#pragma once

#include "launch.h"

namespace cnnops::cuda {

// Of some values: how many, their mean, and the sum of their squared deviations from it.
struct Moments {
  float count = 0, mean = 0, m2 = 0;

  // Welford's update, exact where a raw sum of squares would cancel. inverse is 1 / (count + 1), equal for all columns.
  __device__ void add(float value, float inverse) {
    const float deviation = value - mean;
    count += 1;
    mean += deviation * inverse;
    m2 += deviation * (value - mean);
  }
  // Chan's formula.
  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const float total = count + other.count, deviation = other.mean - mean, share = other.count / total;
    mean += deviation * share;
    m2 += other.m2 + deviation * deviation * count * share;
    count = total;
  }
};

}  // namespace cnnops::cuda
