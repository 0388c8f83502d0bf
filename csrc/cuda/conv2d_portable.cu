// 2-d convolution by implicit GEMM: no matrix is materialised, its elements are fetched from where they lie.
//
//   y[n,p,q,k]      = sum over (r,s,c) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s,c]
//   dx[n,h,w,c]     = sum over (r,s,k) of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s,c],
//                     where stride divides
//   dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//   dbias[k]        = sum over (n,p,q) of dy[n,p,q,k]
//
// Layout     x, dx [N,H,W,C]; y, dy [N,P,Q,K]; weight, dweight [K,R,S,C/groups]. Below, C and K of a group are
//            `channels` and `filters`.
// Ownership  One block owns a 64 x 64 tile of one group's result: pixels x filters, pixels x channels, and filters x
//            (r,s,c). dx is gathered, so nothing is atomic. dweight's and dbias's long sums over pixels are cut into
//            slabs of float, which a second kernel adds in order: every schedule gives the same bits.
// Traffic    A tile reads 64 rows of each operand once for each tap; neighbouring taps and tiles meet in L2.

#include "activation.cuh"
#include "conv2d_kernels.h"
#include "dtype.h"
#include "tile.cuh"

namespace cnnops::cuda {
namespace {

// Which elements of a tensor the taps of a position read, along one spatial axis: tap t of position i reads element
// origin + i * move + t * step; beyond the extent there are zeros.
struct Axis {
  int positions, origin, move, taps, step, extent;
};

// Where the forward pass reads x.
__device__ Axis taps_of_outputs(int P, int R, int H, int stride, int pad, int dilation) {
  return {P, -pad, stride, R, dilation, H};
}

// The inputs h = first, first + stride, .. are reached by the same taps r = tap, tap + tap_step, ..: those with
// h + pad - r * dilation a multiple of stride. Where the dilation shares a factor with the stride there may be none.
struct Parity {
  int first, tap, tap_step, taps;
};

__device__ Parity parity(int first, int R, int stride, int pad, int dilation) {
  Parity found{first, 0, 0, 0};
  for (int r = 0; r < R; ++r) {
    if ((first + pad - r * dilation) % stride) continue;
    if (found.taps == 0) found.tap = r;
    if (found.taps == 1) found.tap_step = r - found.tap;
    ++found.taps;
  }
  return found;
}

// Where the inputs of one parity read dy: output (h + pad - r * dilation) / stride. All divisions are exact.
__device__ Axis taps_of_inputs(const Parity& at, int H, int P, int stride, int pad, int dilation) {
  return {static_cast<int>(ceil_div(H - at.first, stride)),
          (at.first + pad - at.tap * dilation) / stride,
          1,
          at.taps,
          -(at.tap_step * dilation / stride),
          P};
}

// One group's channels of an NHWC tensor, read by taps: element (pixel, (r*S + s)*channels + c), pixel = (n, row,
// column) of the positions.
template <class T>
struct Tapped {
  // A pixel's image, null beyond the last pixel, and the element that its taps count from.
  struct Outer {
    const T* image;
    int h, w;
  };
  struct Inner {
    int r, s, c;
  };

  const T* readable;  // the tensor's first element of this group
  Axis h, w;
  int channels;
  int64_t pitch, pixels;  // from pixel to pixel; where the tile or the sum ends
  bool vectorised;

  __device__ Tapped(const T* tensor, int group, int channels, int pitch, const Axis& h, const Axis& w, int64_t pixels)
      : readable(tensor + int64_t{group} * channels),
        h(h),
        w(w),
        channels(channels),
        pitch(pitch),
        pixels(pixels),
        vectorised(channels % kVector<T> == 0 && aligned_to_16(tensor)) {}

  __device__ Outer outer(int64_t pixel) const {
    if (pixel >= pixels) return {nullptr, 0, 0};
    const Split column = split(pixel, w.positions), row = split(column.quotient, h.positions);
    return {readable + row.quotient * h.extent * w.extent * pitch, h.origin + static_cast<int>(row.remainder) * h.move,
            w.origin + static_cast<int>(column.remainder) * w.move};
  }
  __device__ Inner inner(int64_t i) const {
    const int tap = static_cast<int>(i) / channels, r = tap / w.taps;
    return {r, tap - r * w.taps, static_cast<int>(i) - tap * channels};
  }
  __device__ Inner next(Inner tap) const {
    if (++tap.c < channels) return tap;
    if (++tap.s < w.taps) return {tap.r, tap.s, 0};
    return {tap.r + 1, 0, 0};
  }
  __device__ const T* at(const Outer& pixel, const Inner& tap) const {
    if (!pixel.image || tap.r >= h.taps) return nullptr;
    const int row = pixel.h + tap.r * h.step, column = pixel.w + tap.s * w.step;
    const bool inside = row >= 0 && row < h.extent && column >= 0 && column < w.extent;
    return inside ? pixel.image + (int64_t{row} * w.extent + column) * pitch + tap.c : nullptr;
  }
};

template <class T>
__device__ Tapped<T> tapped_input(const Conv2dProblem& p, const T* x, int group, int64_t pixels) {
  return {x,
          group,
          p.C / p.groups,
          p.C,
          taps_of_outputs(p.P, p.R, p.H, p.stride_h, p.pad_h, p.dilation_h),
          taps_of_outputs(p.Q, p.S, p.W, p.stride_w, p.pad_w, p.dilation_w),
          pixels};
}

// A dense matrix of `rows` x `columns`, rows `pitch` elements apart.
template <class T>
struct Matrix {
  using Outer = const T*;
  using Inner = int64_t;

  const T* readable;
  int64_t rows, columns, pitch;
  bool vectorised;

  __device__ Matrix(const T* first, int64_t rows, int64_t columns, int64_t pitch)
      : readable(first),
        rows(rows),
        columns(columns),
        pitch(pitch),
        vectorised(columns % kVector<T> == 0 && pitch % kVector<T> == 0 && aligned_to_16(first)) {}

  __device__ Outer outer(int64_t row) const { return row < rows ? readable + row * pitch : nullptr; }
  __device__ Inner inner(int64_t column) const { return column; }
  __device__ Inner next(Inner column) const { return column + 1; }
  __device__ const T* at(Outer row, Inner column) const { return row && column < columns ? row + column : nullptr; }
};

// The filters as backward_input sums over them: element ((i*taps + j)*filters + k, c) is weight[k,r,s,c] at the i-th
// and j-th tap of the parities.
template <class T>
struct FilterRows {
  using Outer = const T*;
  using Inner = int64_t;

  const T* readable;  // the group's first filter
  Parity h, w;
  int R, S, channels, filters;
  bool vectorised;

  __device__ FilterRows(const Conv2dProblem& p, const T* weight, int group, const Parity& h, const Parity& w)
      : readable(weight + int64_t{group} * (p.K / p.groups) * p.R * p.S * (p.C / p.groups)),
        h(h),
        w(w),
        R(p.R),
        S(p.S),
        channels(p.C / p.groups),
        filters(p.K / p.groups),
        vectorised(channels % kVector<T> == 0 && aligned_to_16(weight)) {}

  __device__ Outer outer(int64_t i) const {
    const int tap = static_cast<int>(i) / filters, k = static_cast<int>(i) - tap * filters;
    const int r = tap / w.taps, s = tap - r * w.taps;
    if (r >= h.taps) return nullptr;
    const int row = h.tap + r * h.tap_step, column = w.tap + s * w.tap_step;
    return readable + ((int64_t{k} * R + row) * S + column) * channels;
  }
  __device__ Inner inner(int64_t c) const { return c; }
  __device__ Inner next(Inner c) const { return c + 1; }
  __device__ const T* at(Outer row, Inner c) const { return row && c < channels ? row + c : nullptr; }
};

// The tile that a block owns: n goes fastest, so that blocks in flight together share the rows of A in L2.
struct Place {
  int64_t m, n;
  int group;
  int64_t part;  // of the sum, or of the pixels
};

__device__ Place place_of(int64_t block, int64_t gemm_m, int64_t gemm_n, int groups) {
  const Split n = split(block, ceil_div(gemm_n, kBlock)), group = split(n.quotient, groups),
              m = split(group.quotient, ceil_div(gemm_m, kBlock));
  return {m.remainder * kBlock, n.remainder * kBlock, static_cast<int>(group.remainder), m.quotient};
}

int64_t tiles(int64_t gemm_m, int64_t gemm_n, int groups) {
  return ceil_div(gemm_m, kBlock) * ceil_div(gemm_n, kBlock) * groups;
}

// backward_input's classes of pixels: residues modulo the stride along each axis, and the most pixels that one has.
__host__ __device__ inline int64_t classes(int H, int stride) { return H < stride ? H : stride; }
__host__ __device__ inline int64_t largest_class(const Conv2dProblem& p) {
  return p.N * ceil_div(p.H, p.stride_h) * ceil_div(p.W, p.stride_w);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv2d_forward_kernel(Conv2dProblem p, Epilogue epilogue, const T* x, const T* weight, T* y) {
  CNNOPS_DYNAMIC_SHARED(T, ring);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q, gemm_k = int64_t{p.R} * p.S * channels;
  const Place at = place_of(blockIdx.x, pixels, filters, p.groups);

  const Tapped<T> a = tapped_input(p, x, at.group, pixels);
  const Matrix<T> b(weight + int64_t{at.group} * filters * gemm_k, filters, gemm_k, gemm_k);
  const auto product = multiply<T, true, true>(a, b, at.m, at.n, 0, gemm_k, ring);

  const auto* const bias = static_cast<const T*>(epilogue.bias);
  const auto* const scale = static_cast<const float*>(epilogue.scale);
  const auto* const shift = static_cast<const float*>(epilogue.bias);
  const auto* const residual = static_cast<const T*>(epilogue.residual);
  const auto row_of = [&](int m) { return at.m + m < pixels ? (at.m + m) * p.K : -1; };
  with_activation(epilogue.activation, [&](auto activate) {
    product.for_each(row_of, [&](int64_t row, int n, float sum) {
      if (row < 0 || at.n + n >= filters) return;
      const int64_t k = int64_t{at.group} * filters + at.n + n;
      if (scale)
        sum = sum * scale[k] + shift[k];
      else if (bias)
        sum += to_float(bias[k]);
      if (residual) sum += to_float(residual[row + k]);
      from_float(activate(sum), y[row + k]);
    });
  });
}

// Said to the compiler, which otherwise saves registers for a fourth block and spills.
constexpr int kResidentBlocks = 3;

// A block's pixels are of one parity class along each axis, so that all of them have the same taps.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    conv2d_backward_input_kernel(Conv2dProblem p, const T* bias, const T* dy, const T* weight, T* dx) {
  CNNOPS_DYNAMIC_SHARED(T, ring);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const Place at = place_of(blockIdx.x, largest_class(p), channels, p.groups);
  const Split residue = split(at.part, classes(p.W, p.stride_w));
  const Parity parity_h = parity(static_cast<int>(residue.quotient), p.R, p.stride_h, p.pad_h, p.dilation_h);
  const Parity parity_w = parity(static_cast<int>(residue.remainder), p.S, p.stride_w, p.pad_w, p.dilation_w);
  const Axis h = taps_of_inputs(parity_h, p.H, p.P, p.stride_h, p.pad_h, p.dilation_h);
  const Axis w = taps_of_inputs(parity_w, p.W, p.Q, p.stride_w, p.pad_w, p.dilation_w);
  const int64_t pixels = int64_t{p.N} * h.positions * w.positions, gemm_k = int64_t{h.taps} * w.taps * filters;

  const Tapped<T> a(dy, at.group, filters, p.K, h, w, pixels);
  const FilterRows<T> b(p, weight, at.group, parity_h, parity_w);
  const auto product = multiply<T, true, false>(a, b, at.m, at.n, 0, gemm_k, ring);

  const auto row_of = [&](int m) -> int64_t {
    if (at.m + m >= pixels) return -1;
    const Split column = split(at.m + m, w.positions), row = split(column.quotient, h.positions);
    const int64_t in_image =
        (parity_h.first + row.remainder * p.stride_h) * p.W + parity_w.first + column.remainder * p.stride_w;
    return (row.quotient * p.H * p.W + in_image) * p.C + int64_t{at.group} * channels;
  };
  product.for_each(row_of, [&](int64_t row, int n, float sum) {
    if (row < 0 || at.n + n >= channels) return;
    if (bias) sum += to_float(bias[int64_t{at.group} * channels + at.n + n]);
    from_float(sum, dx[row + at.n + n]);
  });
}

// slabs[slab][k][r,s,c] = the sum over pixels [slab * pixels_per_slab, ..).
template <class T>
__global__ void __launch_bounds__(kThreads)
    conv2d_backward_weight_kernel(Conv2dProblem p, int64_t pixels_per_slab, const T* dy, const T* x, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(T, ring);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q, taps = int64_t{p.R} * p.S * channels;
  const Place at = place_of(blockIdx.x, filters, taps, p.groups);
  const int64_t begin = at.part * pixels_per_slab;
  const int64_t end = begin + pixels_per_slab < pixels ? begin + pixels_per_slab : pixels;

  const Matrix<T> a(dy + int64_t{at.group} * filters, end, filters, p.K);
  const Tapped<T> b = tapped_input(p, x, at.group, end);
  const auto product = multiply<T, false, false>(a, b, at.m, at.n, begin, end, ring);

  const int64_t first_row = at.part * p.K + int64_t{at.group} * filters;
  const auto row_of = [&](int m) { return at.m + m < filters ? (first_row + at.m + m) * taps : -1; };
  product.for_each(row_of, [&](int64_t row, int n, float sum) {
    if (row >= 0 && at.n + n < taps) slabs[row + at.n + n] = sum;
  });
}

// How the sums over pixels are cut: enough blocks for the device, few enough that a slab is worth its traffic.
struct Slabs {
  int64_t count, pixels, size;  // slabs; pixels summed in each; floats in each

  int64_t bytes() const { return ceil_div(count * size * int64_t{sizeof(float)}, 256) * 256; }
};

Slabs cut(const Conv2dProblem& p, int64_t size, int64_t blocks_per_slab, int64_t least_pixels) {
  const int64_t pixels = int64_t{p.N} * p.P * p.Q;
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * device().multiprocessors, blocks_per_slab);
  const int64_t most = ceil_div(pixels, least_pixels);
  const int64_t each = ceil_div(pixels, wanted < most ? wanted : most);
  return {ceil_div(pixels, each), each, size};
}

Slabs weight_slabs(const Conv2dProblem& p) {
  const int64_t taps = int64_t{p.R} * p.S * (p.C / p.groups);
  constexpr int64_t kLeastPixels = 256;  // 8 to 16 steps of the ring, so that filling it is a small part
  return cut(p, p.K * taps, tiles(p.K / p.groups, taps, p.groups), kLeastPixels);
}

template <class T>
__global__ void __launch_bounds__(32)
    conv2d_statistics_kernel(int64_t pixels, int64_t K, const T* y, Epilogue epilogue) {
  const int64_t k = int64_t{blockIdx.x} * 32 + threadIdx.x;
  if (k >= K) return;
  Moments all;
  for (int64_t i = 0; i < pixels; ++i) all.add(to_float(y[i * K + k]), 1 / (all.count + 1));
  static_cast<float*>(epilogue.mean)[k] = all.mean;
  static_cast<float*>(epilogue.m2)[k] = all.m2;
}

template <class T>
void launch_forward(const Conv2dProblem& p, const Epilogue& epilogue, const T* x, const T* weight, T* y,
                    Stream stream) {
  const int64_t count = tiles(int64_t{p.N} * p.P * p.Q, p.K / p.groups, p.groups);
  constexpr size_t kShared = kRingBytes<T, true, true>;
  CNNOPS_LAUNCH(conv2d_forward_kernel<T>, blocks(count), kThreads, kShared, stream, p, epilogue, x, weight, y);
  if (epilogue.mean)
    CNNOPS_LAUNCH(conv2d_statistics_kernel<T>, blocks(ceil_div(p.K, 32)), 32, 0, stream, int64_t{p.N} * p.P * p.Q, p.K,
                  y, epilogue);
}

template <class T>
void launch_backward_input(const Conv2dProblem& p, const T* bias, const T* dy, const T* weight, T* dx, Stream stream) {
  const int64_t count =
      tiles(largest_class(p), p.C / p.groups, p.groups) * classes(p.H, p.stride_h) * classes(p.W, p.stride_w);
  constexpr size_t kShared = kRingBytes<T, true, false>;
  CNNOPS_LAUNCH(conv2d_backward_input_kernel<T>, blocks(count), kThreads, kShared, stream, p, bias, dy, weight, dx);
}

template <class T>
void launch_backward_weight(const Conv2dProblem& p, const T* dy, const T* x, T* dweight, float* workspace,
                            Stream stream) {
  const Slabs slabs = weight_slabs(p);
  const int64_t count = tiles(p.K / p.groups, int64_t{p.R} * p.S * (p.C / p.groups), p.groups) * slabs.count;
  constexpr size_t kShared = kRingBytes<T, false, false>;
  CNNOPS_LAUNCH(conv2d_backward_weight_kernel<T>, blocks(count), kThreads, kShared, stream, p, slabs.pixels, dy, x,
                workspace);
  add_slabs(p.dtype, slabs.count, slabs.size, workspace, dweight, stream);
}

}  // namespace

const Conv2dFamily kPortableConv2d = {
    .forward_workspace = [](const Conv2dProblem&, const Conv2dPlan&, const Epilogue&) -> int64_t { return 0; },
    .forward =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* x, const void* weight,
           void* y, void*, Stream stream) {
          for_dtype(p.dtype, [&]<class T>(T) {
            launch_forward(p, epilogue, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y),
                           stream);
          });
        },
    .backward_input_workspace = [](const Conv2dProblem&, const Conv2dPlan&) -> int64_t { return 0; },
    .backward_input =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* dy, const void* weight,
           void* dx, void*, Stream stream) {
          for_dtype(p.dtype, [&]<class T>(T) {
            launch_backward_input(p, static_cast<const T*>(epilogue.bias), static_cast<const T*>(dy),
                                  static_cast<const T*>(weight), static_cast<T*>(dx), stream);
          });
        },
    .backward_weight_workspace = [](const Conv2dProblem& p, const Conv2dPlan&) { return weight_slabs(p).bytes(); },
    .backward_weight =
        [](const Conv2dProblem& p, const Conv2dPlan&, const void* dy, const void* x, void* dweight, void* workspace,
           Stream stream) {
          for_dtype(p.dtype, [&]<class T>(T) {
            launch_backward_weight(p, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dweight),
                                   static_cast<float*>(workspace), stream);
          });
        },
};

}  // namespace cnnops::cuda
