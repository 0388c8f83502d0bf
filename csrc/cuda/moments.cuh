// Mean and variance of values that come one by one or in parts.
#pragma once

#include <cmath>

#include "launch.h"

namespace cnnops::cuda {

// Of some values: how many, their mean, and the sum of their squared deviations from it. Infinite values of one sign
// make the mean infinite, as torch's is, and the squares NaN.
struct Moments {
  float count = 0, mean = 0, m2 = 0;

  // Welford's update, exact where a raw sum of squares would cancel. inverse is 1 / (count + 1), equal for all columns.
  __device__ void add(float value, float inverse) {
    const float deviation = value - pivot();
    count += 1;
    mean += deviation * inverse;
    m2 += deviation * (value - mean);
  }
  // Those of `more` values whose bits are set in `there`, which are at least one, together; inverse is 1 / (count +
  // more).
  template <int kMost>
  __device__ void add(const float (&values)[kMost], unsigned there, float more, float inverse) {
    const float about = pivot();
    float sum = 0;
    CNNOPS_UNROLL
    for (int i = 0; i < kMost; ++i)
      if (there >> i & 1) sum += values[i] - about;
    const float deviation = sum / more;
    CNNOPS_UNROLL
    for (int i = 0; i < kMost; ++i) {
      const float rest = values[i] - about - deviation;
      if (there >> i & 1) m2 += rest * rest;
    }
    m2 += deviation * (deviation * (count * (more * inverse)));
    mean += sum * inverse;
    count += more;
  }
  // Chan's formula. Products begin with the count: nothing is added to none, however large the deviation.
  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const float total = count + other.count, deviation = other.mean - pivot(), share = other.count / total;
    mean += deviation * share;
    m2 += other.m2 + deviation * (deviation * (count * share));
    count = total;
  }

 private:
  // What deviations are taken from: an infinity less an infinity would forget the mean.
  __device__ float pivot() const { return fabsf(mean) < INFINITY ? mean : 0; }
};

}  // namespace cnnops::cuda
