// Batch norm with running statistics, as an epilogue after a convolution with conv_bias has it:
//
//   scale[c] = weight[c] / sqrt(running_var[c] + eps)
//   shift[c] = (conv_bias[c] - running_mean[c]) * scale[c] + bias[c]
//
// Ownership  One thread owns one channel.
// Traffic    The seven arrays of C numbers, once. Doubles cost nothing beside that, and the CPU's kernel has them too.

#include <cmath>

#include "launch.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 128;

__device__ double at(const void* array, int64_t c, double otherwise) {
  return array ? static_cast<const float*>(array)[c] : otherwise;
}

__global__ void __launch_bounds__(kThreads) fold_batch_norm_kernel(int64_t channels, double eps, BatchNormFold fold) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= channels) return;
  const auto scale = static_cast<float>(at(fold.weight, c, 1) / sqrt(at(fold.running_var, c, 1) + eps));
  const double centred = at(fold.conv_bias, c, 0) - at(fold.running_mean, c, 0);
  static_cast<float*>(fold.scale)[c] = scale;
  static_cast<float*>(fold.shift)[c] = static_cast<float>(centred * scale + at(fold.bias, c, 0));
}

}  // namespace

void fold_batch_norm(DType, int64_t channels, double eps, const BatchNormFold& fold, Stream stream) {
  CNNOPS_LAUNCH(fold_batch_norm_kernel, blocks(ceil_div(channels, kThreads)), kThreads, 0, stream, channels, eps, fold);
}

}  // namespace cnnops::cuda
