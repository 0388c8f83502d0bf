// The one place where the CPU kernels meet torch: its thread pool.
#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace cnnops::cpu {

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

}  // namespace cnnops::cpu
