// The convolution's entry points: each asks the plan which family of kernels computes a pass, and calls it. The
// bias's gradient, which all of them share, is here:
//
//   dbias[k] = sum over (n,p,q) of dy[n,p,q,k]
//
// Layout     dy [N,P,Q,K]; that of NCHW is in depthwise_nchw.cu.
// Ownership  One block owns 32 filters of one slab of pixels; the slabs' sums are added in order.
// Traffic    dy once, and one float for each filter of a slab.

#include <algorithm>

#include "conv2d_kernels.h"
#include "depthwise_nchw.h"
#include "dtype.h"
#include "launchers.h"
#include "ptx.cuh"

namespace cnnops::cuda {

#if !defined(CNNOPS_SM90)
const Conv2dFamily kWgmmaConv2d{}, kHaloConv2d{};
#endif

namespace {

const Conv2dFamily& family_of(const Conv2dPlan& plan) {
  switch (plan.kernel) {
    case Conv2dKernel::kPortable:
      return kPortableConv2d;
    case Conv2dKernel::kPacked:
      return kPackedConv2d;
    case Conv2dKernel::kDepthwise:
      return kDepthwiseConv2d;
    case Conv2dKernel::kNchw:
      return kDepthwiseNchwConv2d;
    case Conv2dKernel::kStem:
      return kStemConv2d;
    case Conv2dKernel::kWgmma:
      return kWgmmaConv2d;
    case Conv2dKernel::kHalo:
      return kHaloConv2d;
    case Conv2dKernel::kToeplitz:
      return kToeplitzConv2d;
  }
  throw std::runtime_error("conv2d: a plan without a kernel");
}

// Taps and channels are counted together in 32 bits, in the kernels' inner loops.
void check_limits(const Conv2dProblem& p) {
  constexpr int64_t kLargestStep = 1024;  // what a last tile reaches beyond the sum
  const int64_t channels = (p.C > p.K ? p.C : p.K) / p.groups;
  if (int64_t{p.R} * p.S * channels > INT32_MAX - kLargestStep)
    throw std::runtime_error("conv2d: the CUDA kernels do not take filters of 2^31 elements");
}

constexpr int kSumColumns = 32, kSumRows = 8;  // the block of bias_gradient: one warp reads one row's 32 filters
using PartialSums = float[kSumRows][kSumColumns];

// slabs[slab][k] = the sum of dy over pixels [slab * pixels_per_slab, ..).
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    conv2d_backward_bias_kernel(Conv2dProblem p, int64_t pixels_per_slab, const T* dy, float* slabs) {
  CNNOPS_SHARED(PartialSums, partial);
  const int column = static_cast<int>(threadIdx.x) % kSumColumns, row = static_cast<int>(threadIdx.x) / kSumColumns;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q;
  const Split at = split(blockIdx.x, ceil_div(p.K, kSumColumns));
  const int64_t k = at.remainder * kSumColumns + column, begin = at.quotient * pixels_per_slab;
  const int64_t end = begin + pixels_per_slab < pixels ? begin + pixels_per_slab : pixels;

  float sum = 0;
  if (k < p.K)
    for (int64_t pixel = begin + row; pixel < end; pixel += kSumRows) sum += to_float(dy[pixel * p.K + k]);
  partial[row][column] = sum;
  __syncthreads();
  if (row > 0 || k >= p.K) return;
  for (int i = 1; i < kSumRows; ++i) sum += partial[i][column];
  slabs[at.quotient * p.K + k] = sum;
}

struct BiasSlabs {
  int64_t count, pixels;  // slabs; pixels summed in each
};

BiasSlabs bias_slabs(const Conv2dProblem& p) {
  constexpr int64_t kLeastPixels = 16 * kSumRows, kBlocksPerMultiprocessor = 4;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * device().multiprocessors, ceil_div(p.K, kSumColumns));
  const int64_t each = ceil_div(pixels, std::min(wanted, ceil_div(pixels, kLeastPixels)));
  return {ceil_div(pixels, each), each};
}

void backward_bias(const Conv2dProblem& p, const void* dy, void* dbias, float* workspace, Stream stream) {
  if (!p.channels_last) return depthwise_nchw_bias(p, dy, dbias, workspace, stream);
  const BiasSlabs slabs = bias_slabs(p);
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(conv2d_backward_bias_kernel<T>, blocks(ceil_div(p.K, kSumColumns) * slabs.count),
                  kSumColumns * kSumRows, 0, stream, p, slabs.pixels, static_cast<const T*>(dy), workspace);
  });
  add_slabs(p.dtype, slabs.count, p.K, workspace, dbias, stream);
}

// The parts of a backward's workspace, one after another; gradients that nobody wants take none.
struct BackwardWorkspace {
  int64_t input = 0, weight = 0, bias = 0;  // bytes

  BackwardWorkspace(const Conv2dProblem& p, bool need_dx, bool need_dweight, bool need_dbias) {
    constexpr int64_t kAlign = 256;
    const auto rounded = [](int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; };
    if (need_dx) {
      const Conv2dPlan plan = plan_backward_input(p, device());
      input = rounded(family_of(plan).backward_input_workspace(p, plan));
    }
    if (need_dweight) {
      const Conv2dPlan plan = plan_backward_weight(p, device());
      weight = rounded(family_of(plan).backward_weight_workspace(p, plan));
    }
    if (need_dbias)
      bias = rounded(p.channels_last ? bias_slabs(p).count * p.K * int64_t{sizeof(float)}
                                     : depthwise_nchw_bias_workspace(p));
  }
};

}  // namespace

int64_t conv2d_forward_workspace(const Conv2dProblem& p, const Epilogue& epilogue) {
  const Conv2dPlan plan = plan_forward(p, device(), epilogue.pooled);
  return family_of(plan).forward_workspace(p, plan, epilogue);
}

int64_t conv2d_backward_workspace(const Conv2dProblem& p, bool need_dx, bool need_dweight, bool need_dbias) {
  const BackwardWorkspace parts(p, need_dx, need_dweight, need_dbias);
  return parts.input + parts.weight + parts.bias;
}

void conv2d_forward(const Conv2dProblem& p, const Epilogue& epilogue, const void* x, const void* weight, void* y,
                    void* workspace, Stream stream) {
  check_limits(p);
  const Conv2dPlan plan = plan_forward(p, device(), epilogue.pooled);
  if (epilogue.pooled && !family_of(plan).pools)
    throw std::runtime_error("conv2d: only depthwise kernels pool their results, but the plan is " + describe(plan));
  family_of(plan).forward(p, plan, epilogue, x, weight, y, workspace, stream);
}

void conv2d_backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                     void* dbias, void* workspace, Stream stream) {
  check_limits(p);
  const BackwardWorkspace parts(p, dx, dweight, dbias);
  auto* const scratch = static_cast<char*>(workspace);
  const Conv2dPlan input = plan_backward_input(p, device()), sums = plan_backward_weight(p, device());
  const Conv2dFamily& family = family_of(sums);
  if (dx && dweight && input.kernel == sums.kernel && family.backward) {
    family.backward(p, dy, x, weight, dx, dweight, scratch + parts.input, stream);
  } else {
    if (dx) family_of(input).backward_input(p, input, {}, dy, weight, dx, scratch, stream);
    if (dweight) family.backward_weight(p, sums, dy, x, dweight, scratch + parts.input, stream);
  }
  if (dbias) backward_bias(p, dy, dbias, reinterpret_cast<float*>(scratch + parts.input + parts.weight), stream);
}

void conv_transpose2d_forward(const Conv2dProblem& p, const void* x, const void* weight, const void* bias, void* y,
                              void* workspace, Stream stream) {
  check_limits(p);
  const Conv2dPlan plan = plan_backward_input(p, device());
  family_of(plan).backward_input(p, plan, {.bias = bias}, x, weight, y, workspace, stream);
}

std::string conv2d_plan(const std::string& direction, const Conv2dProblem& problem, int architecture,
                        int multiprocessors, int shared_bytes) {
  const Device on = architecture ? Device{architecture, multiprocessors, shared_bytes} : device();
  Conv2dProblem p = problem;
  p.channels_last = p.channels_last || !depthwise_nchw_takes(p, on);
  if (direction == "forward") return describe(plan_forward(p, on));
  if (direction == "backward_input") return describe(plan_backward_input(p, on));
  if (direction == "backward_weight") return describe(plan_backward_weight(p, on));
  throw std::runtime_error("conv2d_plan: direction must be forward, backward_input or backward_weight, but got '" +
                           direction + "'");
}

}  // namespace cnnops::cuda
