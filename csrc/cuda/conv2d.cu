// 2-d convolution by implicit GEMM: no matrix is materialised, its elements are fetched from where they lie.
//
//   y[n,p,q,k]      = sum over (r,s,c) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s,c]
//   dx[n,h,w,c]     = sum over (r,s,k) of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s,c]
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
#include "launchers.h"
#include "tile.cuh"

namespace cnnops::cuda {
namespace {

// Element (pixel, (r*S + s)*channels + c) is x at tap (r,s) of output pixel (n,p,q), one group's channels.
struct Tap {
  int r, s, c;
};

__device__ __forceinline__ Tap tap_of(int64_t i, int channels, int S) {
  const Split at = split(i, channels), rs = split(at.quotient, S);
  return {static_cast<int>(rs.quotient), static_cast<int>(rs.remainder), static_cast<int>(at.remainder)};
}

__device__ __forceinline__ Tap tap_after(Tap tap, int channels, int S) {
  if (++tap.c == channels) {
    tap.c = 0;
    if (++tap.s == S) {
      tap.s = 0;
      ++tap.r;
    }
  }
  return tap;
}

// A pixel's image, null beyond the last pixel, and the place that its taps count from.
template <class T>
struct Origin {
  const T* image;
  int h, w;
};

template <class T>
struct TappedInput {
  using Outer = Origin<T>;
  using Inner = Tap;

  const Conv2dProblem& p;
  const T* readable;  // x of the group's first channel
  int channels;
  int64_t pixels;  // where the sum or the tile ends
  bool vectorised;

  __device__ TappedInput(const Conv2dProblem& p, const T* x, int group, int64_t pixels)
      : p(p),
        readable(x + int64_t{group} * (p.C / p.groups)),
        channels(p.C / p.groups),
        pixels(pixels),
        vectorised(channels % kVector<T> == 0 && aligned_to_16(x)) {}

  __device__ Outer outer(int64_t pixel) const {
    if (pixel >= pixels) return {nullptr, 0, 0};
    const Split nq = split(pixel, p.Q), np = split(nq.quotient, p.P);
    return {readable + np.quotient * p.H * p.W * p.C, static_cast<int>(np.remainder) * p.stride_h - p.pad_h,
            static_cast<int>(nq.remainder) * p.stride_w - p.pad_w};
  }
  __device__ Inner inner(int64_t i) const { return tap_of(i, channels, p.S); }
  __device__ Inner next(Inner tap) const { return tap_after(tap, channels, p.S); }
  __device__ const T* at(const Outer& o, const Inner& tap) const {
    const int h = o.h + tap.r * p.dilation_h, w = o.w + tap.s * p.dilation_w;
    const bool inside = o.image && tap.r < p.R && h >= 0 && h < p.H && w >= 0 && w < p.W;
    return inside ? o.image + (int64_t{h} * p.W + w) * p.C + tap.c : nullptr;
  }
};

// Element (pixel, (r*S + s)*filters + k) is dy where the output's tap (r,s) reads input pixel (n,h,w): a zero where no
// output does.
template <class T>
struct TappedGradient {
  using Outer = Origin<T>;
  using Inner = Tap;

  const Conv2dProblem& p;
  const T* readable;  // dy of the group's first filter
  int filters;
  bool vectorised;

  __device__ TappedGradient(const Conv2dProblem& p, const T* dy, int group)
      : p(p),
        readable(dy + int64_t{group} * (p.K / p.groups)),
        filters(p.K / p.groups),
        vectorised(filters % kVector<T> == 0 && aligned_to_16(dy)) {}

  __device__ Outer outer(int64_t pixel) const {
    const Split nw = split(pixel, p.W), nh = split(nw.quotient, p.H);
    if (nh.quotient >= p.N) return {nullptr, 0, 0};
    return {readable + nh.quotient * p.P * p.Q * p.K, static_cast<int>(nh.remainder) + p.pad_h,
            static_cast<int>(nw.remainder) + p.pad_w};
  }
  __device__ Inner inner(int64_t i) const { return tap_of(i, filters, p.S); }
  __device__ Inner next(Inner tap) const { return tap_after(tap, filters, p.S); }
  __device__ const T* at(const Outer& o, const Inner& tap) const {
    const int h = o.h - tap.r * p.dilation_h, w = o.w - tap.s * p.dilation_w;
    if (!o.image || tap.r >= p.R || h < 0 || w < 0) return nullptr;
    const int row = h / p.stride_h, column = w / p.stride_w;
    const bool read = row * p.stride_h == h && column * p.stride_w == w && row < p.P && column < p.Q;
    return read ? o.image + (int64_t{row} * p.Q + column) * p.K + tap.c : nullptr;
  }
};

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

// Element ((r*S + s)*filters + k, c) is weight[k,r,s,c]: the filters as backward_input sums over them.
template <class T>
struct FilterRows {
  using Outer = const T*;
  using Inner = int64_t;

  const Conv2dProblem& p;
  const T* readable;  // the group's first filter
  int channels, filters;
  bool vectorised;

  __device__ FilterRows(const Conv2dProblem& p, const T* weight, int group)
      : p(p),
        readable(weight + int64_t{group} * (p.K / p.groups) * p.R * p.S * (p.C / p.groups)),
        channels(p.C / p.groups),
        filters(p.K / p.groups),
        vectorised(channels % kVector<T> == 0 && aligned_to_16(weight)) {}

  __device__ Outer outer(int64_t i) const {
    const Split tap = split(i, filters);
    if (tap.quotient >= int64_t{p.R} * p.S) return nullptr;
    return readable + (tap.remainder * p.R * p.S + tap.quotient) * channels;
  }
  __device__ Inner inner(int64_t c) const { return c; }
  __device__ Inner next(Inner c) const { return c + 1; }
  __device__ const T* at(Outer row, Inner c) const { return row && c < channels ? row + c : nullptr; }
};

// The tile that a block owns: n goes fastest, so that blocks in flight together share the rows of A in L2.
struct Place {
  int64_t m, n;
  int group;
  int64_t slab;
};

__device__ Place place_of(int64_t block, int64_t gemm_m, int64_t gemm_n, int groups) {
  const Split n = split(block, ceil_div(gemm_n, kBlock)), group = split(n.quotient, groups),
              m = split(group.quotient, ceil_div(gemm_m, kBlock));
  return {m.remainder * kBlock, n.remainder * kBlock, static_cast<int>(group.remainder), m.quotient};
}

int64_t tiles(int64_t gemm_m, int64_t gemm_n, int groups) {
  return ceil_div(gemm_m, kBlock) * ceil_div(gemm_n, kBlock) * groups;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv2d_forward_kernel(Conv2dProblem p, Epilogue epilogue, const T* x, const T* weight, T* y) {
  CNNOPS_DYNAMIC_SHARED(T, ring);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q, gemm_k = int64_t{p.R} * p.S * channels;
  const Place at = place_of(blockIdx.x, pixels, filters, p.groups);

  const TappedInput<T> a(p, x, at.group, pixels);
  const Matrix<T> b(weight + int64_t{at.group} * filters * gemm_k, filters, gemm_k, gemm_k);
  const auto product = multiply<T, true, true>(a, b, at.m, at.n, 0, gemm_k, ring);

  const auto* const bias = static_cast<const T*>(epilogue.bias);
  const auto* const residual = static_cast<const T*>(epilogue.residual);
  product.for_each([&](int m, int n, float sum) {
    if (at.m + m >= pixels || at.n + n >= filters) return;
    const int64_t k = int64_t{at.group} * filters + at.n + n, i = (at.m + m) * p.K + k;
    if (bias) sum += to_float(bias[k]);
    if (residual) sum += to_float(residual[i]);
    from_float(activate(epilogue.activation, sum), y[i]);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv2d_backward_input_kernel(Conv2dProblem p, const T* dy, const T* weight, T* dx) {
  CNNOPS_DYNAMIC_SHARED(T, ring);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int64_t pixels = int64_t{p.N} * p.H * p.W, gemm_k = int64_t{p.R} * p.S * filters;
  const Place at = place_of(blockIdx.x, pixels, channels, p.groups);

  const TappedGradient<T> a(p, dy, at.group);
  const FilterRows<T> b(p, weight, at.group);
  const auto product = multiply<T, true, false>(a, b, at.m, at.n, 0, gemm_k, ring);

  product.for_each([&](int m, int n, float sum) {
    if (at.m + m >= pixels || at.n + n >= channels) return;
    from_float(sum, dx[(at.m + m) * p.C + int64_t{at.group} * channels + at.n + n]);
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
  const int64_t begin = at.slab * pixels_per_slab;
  const int64_t end = begin + pixels_per_slab < pixels ? begin + pixels_per_slab : pixels;

  const Matrix<T> a(dy + int64_t{at.group} * filters, end, filters, p.K);
  const TappedInput<T> b(p, x, at.group, end);
  const auto product = multiply<T, false, false>(a, b, at.m, at.n, begin, end, ring);

  product.for_each([&](int m, int n, float sum) {
    if (at.m + m >= filters || at.n + n >= taps) return;
    slabs[(at.slab * p.K + int64_t{at.group} * filters + at.m + m) * taps + at.n + n] = sum;
  });
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

constexpr int kAddThreads = 256;

// out[i] = the sum over slabs of slabs[..][i], in order.
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    add_slabs_kernel(const float* slabs, int64_t count, int64_t size, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t slab = 0; slab < count; ++slab) sum += slabs[slab * size + i];
  from_float(sum, out[i]);
}

// How the sums over pixels are cut: enough blocks for the device, few enough that a slab is worth its traffic.
struct Slabs {
  int64_t count, pixels, size;  // slabs; pixels summed in each; floats in each

  int64_t bytes() const { return ceil_div(count * size * int64_t{sizeof(float)}, 256) * 256; }
};

Slabs cut(const Conv2dProblem& p, int64_t size, int64_t blocks_per_slab, int64_t least_pixels) {
  const int64_t pixels = int64_t{p.N} * p.P * p.Q;
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors(), blocks_per_slab);
  const int64_t most = ceil_div(pixels, least_pixels);
  const int64_t each = ceil_div(pixels, wanted < most ? wanted : most);
  return {ceil_div(pixels, each), each, size};
}

Slabs weight_slabs(const Conv2dProblem& p) {
  const int64_t taps = int64_t{p.R} * p.S * (p.C / p.groups);
  constexpr int64_t kLeastPixels = 256;  // 8 to 16 steps of the ring, so that filling it is a small part
  return cut(p, p.K * taps, tiles(p.K / p.groups, taps, p.groups), kLeastPixels);
}

Slabs bias_slabs(const Conv2dProblem& p) {
  constexpr int64_t kLeastPixels = 16 * kSumRows;
  return cut(p, p.K, ceil_div(p.K, kSumColumns), kLeastPixels);
}

template <class T>
void add_slabs(const Slabs& slabs, const float* from, void* out, Stream stream) {
  CNNOPS_LAUNCH(add_slabs_kernel<T>, blocks(ceil_div(slabs.size, kAddThreads)), kAddThreads, 0, stream, from,
                slabs.count, slabs.size, static_cast<T*>(out));
}

// f(T{}) for the type that `dtype` names. There is no double here: dispatch refuses it.
template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kHalf:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kDouble:
      throw std::runtime_error("conv2d: the CUDA kernels do not take double");
  }
}

template <class T>
void launch_forward(const Conv2dProblem& p, const Epilogue& epilogue, const T* x, const T* weight, T* y,
                    Stream stream) {
  const int64_t count = tiles(int64_t{p.N} * p.P * p.Q, p.K / p.groups, p.groups);
  constexpr size_t kShared = kRingBytes<T, true, true>;
  CNNOPS_LAUNCH(conv2d_forward_kernel<T>, blocks(count), kThreads, kShared, stream, p, epilogue, x, weight, y);
}

template <class T>
void launch_backward_input(const Conv2dProblem& p, const T* dy, const T* weight, T* dx, Stream stream) {
  const int64_t count = tiles(int64_t{p.N} * p.H * p.W, p.C / p.groups, p.groups);
  constexpr size_t kShared = kRingBytes<T, true, false>;
  CNNOPS_LAUNCH(conv2d_backward_input_kernel<T>, blocks(count), kThreads, kShared, stream, p, dy, weight, dx);
}

template <class T>
void launch_backward_weight(const Conv2dProblem& p, const T* dy, const T* x, T* dweight, float* workspace,
                            Stream stream) {
  const Slabs slabs = weight_slabs(p);
  const int64_t count = tiles(p.K / p.groups, int64_t{p.R} * p.S * (p.C / p.groups), p.groups) * slabs.count;
  constexpr size_t kShared = kRingBytes<T, false, false>;
  CNNOPS_LAUNCH(conv2d_backward_weight_kernel<T>, blocks(count), kThreads, kShared, stream, p, slabs.pixels, dy, x,
                workspace);
  add_slabs<T>(slabs, workspace, dweight, stream);
}

template <class T>
void launch_backward_bias(const Conv2dProblem& p, const T* dy, T* dbias, float* workspace, Stream stream) {
  const Slabs slabs = bias_slabs(p);
  CNNOPS_LAUNCH(conv2d_backward_bias_kernel<T>, blocks(ceil_div(p.K, kSumColumns) * slabs.count),
                kSumColumns * kSumRows, 0, stream, p, slabs.pixels, dy, workspace);
  add_slabs<T>(slabs, workspace, dbias, stream);
}

}  // namespace

int64_t conv2d_forward_workspace(const Conv2dProblem&) { return 0; }

int64_t conv2d_backward_workspace(const Conv2dProblem& p, bool, bool need_dweight, bool need_dbias) {
  return (need_dweight ? weight_slabs(p).bytes() : 0) + (need_dbias ? bias_slabs(p).bytes() : 0);
}

void conv2d_forward(const Conv2dProblem& p, const Epilogue& epilogue, const void* x, const void* weight, void* y, void*,
                    Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    launch_forward(p, epilogue, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), stream);
  });
}

void conv2d_backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                     void* dbias, void* workspace, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    const auto* const gradient = static_cast<const T*>(dy);
    auto* const scratch = static_cast<char*>(workspace);
    if (dx) launch_backward_input(p, gradient, static_cast<const T*>(weight), static_cast<T*>(dx), stream);
    if (dweight)
      launch_backward_weight(p, gradient, static_cast<const T*>(x), static_cast<T*>(dweight),
                             reinterpret_cast<float*>(scratch), stream);
    if (dbias)
      launch_backward_bias(p, gradient, static_cast<T*>(dbias),
                           reinterpret_cast<float*>(scratch + (dweight ? weight_slabs(p).bytes() : 0)), stream);
  });
}

}  // namespace cnnops::cuda
