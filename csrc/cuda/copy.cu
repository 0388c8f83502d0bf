// dst[i] = src[i] for a 4-d tensor of any strides, converting the dtype.
//
// Ownership  One thread owns one element. Axes are ordered by dst's strides, so that the writes of a warp lie together.
// Traffic    src once + dst once; where src runs along another axis than dst, its sectors are re-read from L2.

#include <algorithm>
#include <type_traits>

#include "launchers.h"
#include "ptx.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAxes = 4;

// As torch converts: double goes to the 16-bit formats by way of float.
template <class To, class From>
__device__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (std::is_same_v<To, double>) {
    return to_float(v);
  } else {
    To out;
    if constexpr (std::is_same_v<From, double>)
      from_float(static_cast<float>(v), out);
    else
      from_float(to_float(v), out);
    return out;
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) copy_kernel(CopyProblem p, int64_t count, const From* src, To* dst) {
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  int64_t from = 0, to = 0;
  CNNOPS_UNROLL
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    const Split at = split(i, p.size[axis]);
    from += at.remainder * p.src_stride[axis];
    to += at.remainder * p.dst_stride[axis];
    i = at.quotient;
  }
  dst[to] = convert<To>(src[from]);
}

CopyProblem ordered_by_dst(const CopyProblem& p) {
  int axes[kAxes] = {0, 1, 2, 3};
  std::stable_sort(axes, axes + kAxes, [&](int a, int b) { return p.dst_stride[a] > p.dst_stride[b]; });
  CopyProblem sorted = p;
  for (int i = 0; i < kAxes; ++i) {
    sorted.size[i] = p.size[axes[i]];
    sorted.src_stride[i] = p.src_stride[axes[i]];
    sorted.dst_stride[i] = p.dst_stride[axes[i]];
  }
  return sorted;
}

template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kDouble:
      return f(double{});
    case DType::kHalf:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

template <class From, class To>
void launch_copy(const CopyProblem& p, const From* src, To* dst, Stream stream) {
  const int64_t count = p.size[0] * p.size[1] * p.size[2] * p.size[3];
  constexpr auto kernel = copy_kernel<From, To>;
  CNNOPS_LAUNCH(kernel, blocks(ceil_div(count, kThreads)), kThreads, 0, stream, p, count, src, dst);
}

}  // namespace

void copy(const CopyProblem& p, const void* src, void* dst, Stream stream) {
  for_dtype(p.src_dtype, [&]<class From>(From) {
    for_dtype(p.dst_dtype, [&]<class To>(To) {
      launch_copy(ordered_by_dst(p), static_cast<const From*>(src), static_cast<To*>(dst), stream);
    });
  });
}

}  // namespace cnnops::cuda
