// dst[i] = src[i] for a 4-d tensor of any strides, converting the dtype.
//
// Layout     Axes are ordered by dst's strides, and neighbours that both tensors run through as one are one axis.
// Ownership  One thread owns one element, and those of a warp lie together in dst. Where src lies along another axis
//            and the dtype stays (double apart), one block owns a tile of both axes: it reads along src's, writes along
//            dst's, and turns the tile over in shared memory.
// Traffic    src once + dst once; where elements are copied one by one across axes, src's sectors are re-read from L2.

#include <algorithm>
#include <type_traits>
#include <utility>

#include "launchers.h"
#include "ptx.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAxes = 4;

// A side of a tile to turn over is 128 bytes. Its rows lie so that those of a column are in different banks.
template <class T>
constexpr int kSide = 128 / sizeof(T);
template <class T>
struct Tile {
  T at[kSide<T>][kSide<T> + 4 / sizeof(T)];
};
// Of fewer elements along an axis, a block of the plain copy has whole sectors, or nearly.
constexpr int64_t kFewest = 16;

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

// The last axes are those along which src and dst lie.
template <class T>
__global__ void __launch_bounds__(kThreads) transposed_copy_kernel(CopyProblem p, const T* src, T* dst) {
  CNNOPS_SHARED(Tile<T>, tile);
  const Split column = split(blockIdx.x, ceil_div(p.size[3], kSide<T>));
  const Split row = split(column.quotient, ceil_div(p.size[2], kSide<T>)), at = split(row.quotient, p.size[1]);
  const int64_t i = row.remainder * kSide<T>, j = column.remainder * kSide<T>;  // the tile's first in src's and dst's
  src += at.quotient * p.src_stride[0] + at.remainder * p.src_stride[1] + i + j * p.src_stride[3];
  dst += at.quotient * p.dst_stride[0] + at.remainder * p.dst_stride[1] + i * p.dst_stride[2] + j;
  const int lane = static_cast<int>(threadIdx.x) % kSide<T>, first = static_cast<int>(threadIdx.x) / kSide<T>;
  constexpr int kRowsAtOnce = kThreads / kSide<T>;
  CNNOPS_UNROLL
  for (int step = 0; step < kSide<T> / kRowsAtOnce; ++step) {
    const int k = first + step * kRowsAtOnce;
    if (i + lane < p.size[2] && j + k < p.size[3]) tile.at[k][lane] = src[k * p.src_stride[3] + lane];
  }
  __syncthreads();
  CNNOPS_UNROLL
  for (int step = 0; step < kSide<T> / kRowsAtOnce; ++step) {
    const int k = first + step * kRowsAtOnce;
    if (j + lane < p.size[3] && i + k < p.size[2]) dst[k * p.dst_stride[2] + lane] = tile.at[lane][k];
  }
}

void swap_axes(CopyProblem& p, int a, int b) {
  std::swap(p.size[a], p.size[b]);
  std::swap(p.src_stride[a], p.src_stride[b]);
  std::swap(p.dst_stride[a], p.dst_stride[b]);
}

// Ordered by dst's strides, the least last, without axes of one element or what is one axis in both tensors; in front
// of what is left, axes of one element.
CopyProblem simplified(CopyProblem p) {
  for (int end = kAxes; end > 1; --end)
    for (int i = 1; i < end; ++i)
      if (p.dst_stride[i - 1] < p.dst_stride[i]) swap_axes(p, i - 1, i);
  int last = kAxes;  // the first of those kept
  for (int i = kAxes - 1; i >= 0; --i) {
    if (p.size[i] == 1) continue;
    if (last < kAxes && p.src_stride[i] == p.size[last] * p.src_stride[last] &&
        p.dst_stride[i] == p.size[last] * p.dst_stride[last])
      p.size[last] *= p.size[i];
    else
      swap_axes(p, i, --last);
  }
  std::fill(p.size, p.size + last, 1);
  return p;
}

// Puts the axis along which src lies before the last, along which dst does, and says whether both are long enough that
// tiles of them are worth turning over.
bool lies_across(CopyProblem& p) {
  if (p.dst_stride[3] != 1 || p.size[3] < kFewest) return false;
  for (int i = 0; i < 3; ++i)
    if (p.src_stride[i] == 1 && p.size[i] >= kFewest) {
      swap_axes(p, i, 2);
      return true;
    }
  return false;
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
void launch_copy(CopyProblem p, const From* src, To* dst, Stream stream) {
  if constexpr (std::is_same_v<From, To> && sizeof(To) <= 4)
    if (lies_across(p)) {
      const int64_t tiles = ceil_div(p.size[2], kSide<To>) * ceil_div(p.size[3], kSide<To>);
      CNNOPS_LAUNCH(transposed_copy_kernel<To>, blocks(p.size[0] * p.size[1] * tiles), kThreads, 0, stream, p, src,
                    dst);
      return;
    }
  const int64_t count = p.size[0] * p.size[1] * p.size[2] * p.size[3];
  constexpr auto kernel = copy_kernel<From, To>;
  CNNOPS_LAUNCH(kernel, blocks(ceil_div(count, kThreads)), kThreads, 0, stream, p, count, src, dst);
}

}  // namespace

void copy(const CopyProblem& p, const void* src, void* dst, Stream stream) {
  for_dtype(p.src_dtype, [&]<class From>(From) {
    for_dtype(p.dst_dtype, [&]<class To>(To) {
      launch_copy(simplified(p), static_cast<const From*>(src), static_cast<To*>(dst), stream);
    });
  });
}

}  // namespace cnnops::cuda
