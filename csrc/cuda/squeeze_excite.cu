// Squeeze and excitation: each channel of an image is scaled by what a small network makes of all channels' means.
//
//   pooled[n,c] = mean over L of x;  hidden[n,m] = bias1[m] + sum over c of weight1[m,c] * pooled[n,c]
//   scale[n,c]  = gate(bias2[c] + sum over m of weight2[c,m] * activation(hidden[n,m]));  y = x * scale
//
//   dscale[n,c] = sum over L of dy * x
//   dgated      = dscale * gate';  dweight2 = dgated^T activation(hidden),  dbias2 = sum over n of dgated
//   dhidden     = dgated weight2 * activation';  dweight1 = dhidden^T pooled,  dbias1 = sum over n of dhidden
//   dx          = dy * scale + dhidden weight1 / L
//
// Layout     x, y and their gradients [N,L,C] or [N,C,L]; weight1 and the transposed weight2 [M,C]; the rest [N,C] and
//            [N,M], in float.
// Tile       an image of [N,L,C], sums and y; of [N,C,L] up to 32 lanes have a slice of a plane for sums.
//                          channels c ->
//                        +- width columns: up to 256 channels ----------+
//            positions | | slice: 256 / width positions at once;        |  the layers, a block: 8 images, 16 hidden
//            l         v | sums: registers, then shared memory          |  values; then 8 images, 128 channels
//                        +- split: the next slice, another block's -----+
// Ownership  Sums over L: of [N,L,C] a block owns some channels of a slice of an image's positions, all of them where
//            16 bytes hold several positions'; of [N,C,L] a few lanes own a slice of a plane. Where there are several
//            slices, one thread adds up theirs in order. The layers: a warp owns 4 x 4 hidden values, a block 8 rows of
//            128 channels, whose terms its warps share and then add in order. Every schedule gives the same bits.
// Traffic    forward: x for the means, then x + y; backward: dy + x for dscale, then dy + dx. The matrices
//            once for each 8 images, mostly from L2.

#include <algorithm>

#include "activation.cuh"
#include "dtype.h"
#include "launchers.h"
#include "vector.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSteps = 8;       // positions that a thread visits in a slice of a sum at least, and in a slice of y
constexpr int kBlocksEach = 8;  // of sums, that a multiprocessor should have where slices can give them

// One position or one channel is dense in both layouts: the faster one is taken.
bool by_position(const SqueezeExciteProblem& p) { return p.L == 1 || (p.channels_last && p.C > 1); }

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// An axis in `count` parts of `size`, the last of which may be shorter.
struct Slices {
  int64_t count, size;
};

// As many as `wanted`, none but the last with fewer than `smallest`.
Slices sliced(int64_t extent, int64_t wanted, int64_t smallest) {
  const int64_t size = std::max(std::min(extent, smallest), ceil_div(extent, std::max<int64_t>(1, wanted)));
  return {ceil_div(extent, size), size};
}

__device__ __forceinline__ float gated(Gate gate, float z) {
  if (gate == Gate::kSigmoid) return 1 / (1 + expf(-z));
  const float shifted = z + 3;
  return (shifted < 0 ? 0 : shifted > 6 ? 6 : shifted) / 6;
}

__device__ __forceinline__ float gate_gradient(Gate gate, float dscale, float scale) {
  if (gate == Gate::kSigmoid) return dscale * (1 - scale) * scale;
  return scale > 0 && scale < 1 ? dscale / 6 : 0;
}

// Where the sums over L go: pooled or, given the scale, dgated [N,C]. Those of several slices come to partial
// [slices,N,C] first.
struct Sums {
  int64_t planes, slices, L;  // planes: N * C
  float *partial, *out;
  const float* scale;
  Gate gate;

  __device__ void finish(int64_t plane, float sum) const {
    out[plane] = scale ? gate_gradient(gate, sum, scale[plane]) : sum / static_cast<float>(L);
  }
  __device__ void put(int64_t slice, int64_t plane, float sum) const {
    if (slices > 1)
      partial[slice * planes + plane] = sum;
    else
      finish(plane, sum);
  }
};

__global__ void __launch_bounds__(kThreads) squeeze_excite_finish_sums_kernel(Sums sums) {
  const int64_t plane = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (plane >= sums.planes) return;
  float sum = 0;
  for (int64_t slice = 0; slice < sums.slices; ++slice) sum += sums.partial[slice * sums.planes + plane];
  sums.finish(plane, sum);
}

// How [N,L,C] is cut. A block owns `width` columns of kWidth channels, no more channels than it has threads, and these
// share its positions: `rows` at once.
struct Positions {
  int64_t L, C, tiles;
  Slices slices;
  int width, rows;

  Positions(const SqueezeExciteProblem& p, int channels_each) : L(p.L), C(p.C) {
    const int64_t columns = ceil_div(p.C, channels_each), most = kThreads / channels_each;
    const int64_t even = ceil_div(columns, 2 * ceil_div(columns, most)) * 2;
    width = static_cast<int>(std::min(columns, even));  // an even number of 16 bytes is one of sectors
    rows = kThreads / width;
    tiles = ceil_div(columns, width);
    slices = {1, p.L};
  }
};

// A thread's share of its block: channels from c on at the positions first, first + rows, ... below end.
template <int kWidth>
struct Share {
  int64_t n, slice, tile_c, c, first, end;  // tile_c: the block's first channel

  __device__ explicit Share(const Positions& cut) {
    const Split by_tile = split(blockIdx.x, cut.tiles), by_slice = split(by_tile.quotient, cut.slices.count);
    const int row = static_cast<int>(threadIdx.x) / cut.width, column = static_cast<int>(threadIdx.x) % cut.width;
    n = by_slice.quotient;
    slice = by_slice.remainder;
    tile_c = by_tile.remainder * cut.width * kWidth;
    c = tile_c + column * kWidth;
    const int64_t begin = slice * cut.slices.size;
    first = begin + row;
    end = row < cut.rows && c < cut.C ? least(cut.L, begin + cut.slices.size) : 0;
  }
};

// Leaves in `all` the sums of each column's rows, in pairs.
template <int kWidth>
__device__ __forceinline__ void add_rows(const float (&mine)[kWidth], int rows, int columns,
                                         float (&all)[kWidth][kThreads]) {
  const int thread = static_cast<int>(threadIdx.x);
  CNNOPS_UNROLL
  for (int k = 0; k < kWidth; ++k) all[k][thread] = mine[k];
  for (int left = rows; left > 1;) {  // rows below `left` have what is to be added
    const int half = (left + 1) / 2;
    __syncthreads();
    if (thread < (left - half) * columns) {
      CNNOPS_UNROLL
      for (int k = 0; k < kWidth; ++k) all[k][thread] += all[k][thread + half * columns];
    }
    left = half;
  }
  __syncthreads();
}

template <class T, int kWidth, bool kProduct>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_sum_positions_kernel(Positions cut, const T* dy, const T* x, Sums sums) {
  using Partial = float[kWidth][kThreads];
  CNNOPS_SHARED(Partial, partial);
  const Share<kWidth> share(cut);
  const int thread = static_cast<int>(threadIdx.x);
  float sum[kWidth] = {};
  for (int64_t l = share.first; l < share.end; l += cut.rows) {
    const int64_t i = (share.n * cut.L + l) * cut.C + share.c;
    const Vector<T> values = load(x + i, kWidth);
    Vector<T> gradients = {};
    if constexpr (kProduct) gradients = load(dy + i, kWidth);
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k)
      sum[k] += kProduct ? to_float(gradients.at[k]) * to_float(values.at[k]) : to_float(values.at[k]);
  }
  add_rows(sum, cut.rows, cut.width, partial);
  const int64_t c = share.tile_c + thread;
  if (thread < cut.width * kWidth && c < cut.C)
    sums.put(share.slice, share.n * cut.C + c, partial[thread % kWidth][thread / kWidth]);
}

// y = x * scale, or dx = dy * scale + shift, the shift being dpooled.
template <class T, int kWidth, bool kShift>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_scale_positions_kernel(Positions cut, const T* x, const float* scale, const float* shift, T* y) {
  using Channels = float[kThreads];
  CNNOPS_SHARED(Channels, scales);
  CNNOPS_SHARED(Channels, shifts);
  const Share<kWidth> share(cut);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < cut.width * kWidth && share.tile_c + thread < cut.C) {
    const int64_t plane = share.n * cut.C + share.tile_c + thread;
    scales[thread] = scale[plane];
    if constexpr (kShift) shifts[thread] = shift[plane];
  }
  __syncthreads();
  if (share.first >= share.end) return;
  float by[kWidth], plus[kWidth] = {};
  CNNOPS_UNROLL
  for (int k = 0; k < kWidth; ++k) {
    by[k] = scales[share.c - share.tile_c + k];
    if constexpr (kShift) plus[k] = shifts[share.c - share.tile_c + k];
  }
  for (int64_t l = share.first; l < share.end; l += cut.rows) {
    const int64_t i = (share.n * cut.L + l) * cut.C + share.c;
    Vector<T> values = load(x + i, kWidth);
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      const float product = to_float(values.at[k]) * by[k];
      from_float(kShift ? product + plus[k] : product, values.at[k]);
    }
    store(values, y + i, kWidth);
  }
}

// How [N,L,C] is cut where 16 bytes hold the channels of several positions: an image is C columns of such pieces, a row
// of which is kVector<T> positions, so that a column keeps to its channels. The first piece begins at a multiple of 16
// bytes; what it and the last hold of the neighbours is left out. A block owns `rows` rows at once.
struct Folds {
  int64_t L, C, total;
  Slices slices;  // of an image's rows
  int rows;

  template <class T>
  Folds(const SqueezeExciteProblem& p, T, int64_t blocks)
      : L(p.L), C(p.C), total(p.N * p.L * p.C), rows(static_cast<int>(kThreads / p.C)) {
    const int64_t pieces = ceil_div(L * C + kVector<T> - 1, kVector<T>);
    slices = sliced(ceil_div(pieces, C), ceil_div(blocks, p.N), int64_t{kSteps} * rows);
  }
};

// Whether they are for this problem: one block has all channels, and images are long beside their ends.
template <class T>
bool folded(const SqueezeExciteProblem& p, T) {
  return by_position(p) && p.C % kVector<T> != 0 && p.C <= kThreads && p.L >= kVector<T>;
}

// A thread's share of its block: the pieces at `first`, first + step, ... below `last`, of an image whose elements are
// those from `begin` to `end` - 1. `channel` is that of the image's first piece's first element.
template <int kWidth>
struct FoldShare {
  int64_t n, slice, begin, end, first, step, last;
  int channel, column;

  __device__ explicit FoldShare(const Folds& cut) {
    const Split by_slice = split(blockIdx.x, cut.slices.count);
    const int thread = static_cast<int>(threadIdx.x), C = static_cast<int>(cut.C), row = thread / C;
    n = by_slice.quotient;
    slice = by_slice.remainder;
    begin = n * cut.L * cut.C;
    end = begin + cut.L * cut.C;
    const int64_t start = begin / kWidth * kWidth, length = cut.C * kWidth, here = slice * cut.slices.size;
    channel = static_cast<int>(split(start, cut.C).remainder);
    column = thread % C;
    first = start + (here + row) * length + column * kWidth;
    step = cut.rows * length;
    last = row < cut.rows ? least(end, start + (here + cut.slices.size) * length) : 0;
  }
};

template <class T, bool kProduct>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_sum_folds_kernel(Folds cut, const T* dy, const T* x, Sums sums) {
  constexpr int kWidth = kVector<T>;
  using Partial = float[kWidth][kThreads];
  CNNOPS_SHARED(Partial, partial);
  const FoldShare<kWidth> share(cut);
  const int thread = static_cast<int>(threadIdx.x), C = static_cast<int>(cut.C);
  float sum[kWidth] = {};
  for (int64_t i = share.first; i < share.last; i += share.step) {
    const int here = cut.total - i < kWidth ? static_cast<int>(cut.total - i) : kWidth;
    const Vector<T> values = load(x + i, here);
    Vector<T> gradients = {};
    if constexpr (kProduct) gradients = load(dy + i, here);
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      const float value = to_float(values.at[k]);
      if (i + k >= share.begin && i + k < share.end) sum[k] += kProduct ? to_float(gradients.at[k]) * value : value;
    }
  }
  add_rows(sum, cut.rows, C, partial);
  if (thread >= C) return;
  float all = 0;  // of a channel's kWidth places in a row
  for (int place = (thread - share.channel + C) % C; place < kWidth * C; place += C)
    all += partial[place % kWidth][place / kWidth];
  sums.put(share.slice, share.n * C + thread, all);
}

template <class T, bool kShift>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_scale_folds_kernel(Folds cut, const T* x, const float* scale, const float* shift, T* y) {
  constexpr int kWidth = kVector<T>;
  using Channels = float[kThreads];
  CNNOPS_SHARED(Channels, scales);
  CNNOPS_SHARED(Channels, shifts);
  const FoldShare<kWidth> share(cut);
  const int thread = static_cast<int>(threadIdx.x), C = static_cast<int>(cut.C);
  if (thread < C) {
    scales[thread] = scale[share.n * C + thread];
    if constexpr (kShift) shifts[thread] = shift[share.n * C + thread];
  }
  __syncthreads();
  float by[kWidth], plus[kWidth] = {};
  CNNOPS_UNROLL
  for (int k = 0; k < kWidth; ++k) {
    const int c = (share.channel + share.column * kWidth + k) % C;
    by[k] = scales[c];
    if constexpr (kShift) plus[k] = shifts[c];
  }
  for (int64_t i = share.first; i < share.last; i += share.step) {
    const bool whole = i >= share.begin && i + kWidth <= share.end;
    Vector<T> values = load(x + i, cut.total - i < kWidth ? static_cast<int>(cut.total - i) : kWidth);
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      const float product = to_float(values.at[k]) * by[k];
      from_float(kShift ? product + plus[k] : product, values.at[k]);
      if (!whole && i + k >= share.begin && i + k < share.end) y[i + k] = values.at[k];
    }
    if (whole) store(values, y + i, kWidth);
  }
}

// How the N * C planes of [N,C,L] are cut: `lanes` threads, a power of two, own a slice of one.
struct Planes {
  int64_t planes, L;
  Slices slices;
  int lanes;

  template <class T>
  Planes(const SqueezeExciteProblem& p, T) : planes(p.N * p.C), L(p.L), lanes(32) {
    while (lanes > 1 && lanes / 2 * kVector<T> >= p.L) lanes /= 2;
    const int64_t wanted = int64_t{device().multiprocessors} * kBlocksEach * kThreads / (planes * lanes);
    slices = sliced(L, wanted, int64_t{kSteps} * lanes * kVector<T>);
  }
};

// 16 bytes at a time from addresses that are multiples of it, whatever L is: what the ends hold of the neighbours is
// left out.
template <class T, bool kProduct>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_sum_planes_kernel(Planes cut, const T* dy, const T* x, Sums sums) {
  using Found = float[kThreads];
  CNNOPS_SHARED(Found, found);
  const int thread = static_cast<int>(threadIdx.x), groups = kThreads / cut.lanes;
  const int64_t first_group = int64_t{blockIdx.x} * groups, total = cut.planes * cut.L;
  const Split mine = split(first_group + thread / cut.lanes, cut.planes);
  const int64_t slice = mine.quotient, from = slice * cut.slices.size;
  const int64_t begin = mine.remainder * cut.L + from;
  const int64_t end = slice < cut.slices.count ? begin + least(cut.slices.size, cut.L - from) : 0;
  float sum = 0;
  for (int64_t i = begin / kVector<T> * kVector<T> + thread % cut.lanes * kVector<T>; i < end;
       i += cut.lanes * kVector<T>) {
    const int here = total - i < kVector<T> ? static_cast<int>(total - i) : kVector<T>;
    const Vector<T> values = load(x + i, here);
    Vector<T> gradients = {};
    if constexpr (kProduct) gradients = load(dy + i, here);
    CNNOPS_UNROLL
    for (int k = 0; k < kVector<T>; ++k) {
      const float value = to_float(values.at[k]);
      if (i + k >= begin && i + k < end) sum += kProduct ? to_float(gradients.at[k]) * value : value;
    }
  }
  for (int distance = cut.lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (thread % cut.lanes == 0) found[thread / cut.lanes] = sum;
  __syncthreads();
  const Split out = split(first_group + thread, cut.planes);
  if (thread < groups && out.quotient < cut.slices.count) sums.put(out.quotient, out.remainder, found[thread]);
}

// A thread owns 16 bytes of y, which may reach over several planes.
template <class T, bool kShift>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_scale_planes_kernel(int64_t count, int64_t L, const T* x, const float* scale, const float* shift,
                                       T* y) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector<T>;
  if (first >= count) return;
  const int here = count - first < kVector<T> ? static_cast<int>(count - first) : kVector<T>;
  Vector<T> values = load(x + first, here);
  const Split at = split(first, L);
  int64_t plane = at.quotient, left = L - at.remainder;  // left: elements of the plane
  float by = scale[plane], plus = kShift ? shift[plane] : 0;
  CNNOPS_UNROLL
  for (int k = 0; k < kVector<T>; ++k) {
    if (left == 0 && k < here) {
      by = scale[++plane];
      if constexpr (kShift) plus = shift[plane];
      left = L;
    }
    --left;
    const float product = to_float(values.at[k]) * by;
    from_float(kShift ? product + plus : product, values.at[k]);
  }
  store(values, y + first, here);
}

// The first layer and its gradient. What a sum over c becomes: forward, hidden and its activation; backward, dhidden
// and, from hidden, the activation once more.
struct Layer {
  Activation activation;
  const float *bias, *saved;  // [M] or null; backward's hidden
  float *hidden, *activated, *dhidden;

  template <bool kBackward>
  __device__ void put(int64_t i, int64_t m, float sum) const {
    const float z = kBackward ? saved[i] : bias ? sum + bias[m] : sum;
    if constexpr (!kBackward) hidden[i] = z;
    float a = z;
    with_activation(activation, [&](auto activate) { a = activate(z); });
    activated[i] = a;
    if (!kBackward || !dhidden) return;
    const bool reads_input = activation == Activation::kSilu || activation == Activation::kHardswish;
    with_gradient(activation, [&](auto gradient) { dhidden[i] = gradient(sum, reads_input ? z : a); });
  }
};

// A warp owns kTile x kTile outputs, a block so many warps of images and of hidden channels.
constexpr int kTile = 4, kWarpsOfHidden = 4, kWarpsOfImages = kWarps / kWarpsOfHidden;

// The sum over `terms` channels of weight[m,c] * in[n,c], for all n and m; terms is C, or 0 where no sum is wanted.
template <bool kBackward>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_layer_kernel(int64_t N, int64_t M, int64_t C, int64_t terms, const float* weight, const float* in,
                                Layer layer) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Split block = split(blockIdx.x, ceil_div(M, kTile * kWarpsOfHidden));
  const int64_t m = (block.remainder * kWarpsOfHidden + warp % kWarpsOfHidden) * kTile;
  const int64_t n = (block.quotient * kWarpsOfImages + warp / kWarpsOfHidden) * kTile;
  if (n >= N || m >= M) return;

  const float *rows[kTile], *images[kTile];  // beyond the last: the last once more
  CNNOPS_UNROLL
  for (int i = 0; i < kTile; ++i) {
    rows[i] = weight + least(m + i, M - 1) * C;
    images[i] = in + least(n + i, N - 1) * C;
  }
  float sums[kTile][kTile] = {};
  for (int64_t c = lane; c < terms; c += 32) {
    float row[kTile];
    CNNOPS_UNROLL
    for (int j = 0; j < kTile; ++j) row[j] = rows[j][c];
    CNNOPS_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const float value = images[i][c];
      CNNOPS_UNROLL
      for (int j = 0; j < kTile; ++j) sums[i][j] += value * row[j];
    }
  }
  float mine = 0;  // lane i * kTile + j has sums[i][j]
  CNNOPS_UNROLL
  for (int i = 0; i < kTile; ++i) {
    CNNOPS_UNROLL
    for (int j = 0; j < kTile; ++j) {
      CNNOPS_UNROLL
      for (int distance = 16; distance > 0; distance /= 2) sums[i][j] += __shfl_xor_sync(~0u, sums[i][j], distance);
      if (lane == i * kTile + j) mine = sums[i][j];
    }
  }
  const int64_t image = n + lane / kTile, hidden = m + lane % kTile;
  if (lane < kTile * kTile && image < N && hidden < M) layer.template put<kBackward>(image * M + hidden, hidden, mine);
}

// out[i,c] = sum over r of factor[i,r] * matrix[r,c]. The factor is factors[i * result_step + r * row_step], or 1.
struct Combination {
  const float* matrix;
  int64_t rows, columns;
  const float* factors;
  int64_t results, result_step, row_step;
  float* out;
};

constexpr int kResults = 8, kLines = 4;  // that a thread has in registers: results, of channels 32 apart
constexpr int kWide = 32 * kLines;

// With kGate out is gate(start[c] + sum), start being [columns] or null; else it is sum / divisor.
template <bool kGate>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_combine_kernel(Combination each, Gate gate, const float* start, float divisor) {
  using Parts = float[kWarps][kResults][kWide];
  CNNOPS_SHARED(Parts, parts);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const Split block = split(blockIdx.x, ceil_div(each.columns, kWide));
  const int64_t first = block.remainder * kWide, result = block.quotient * kResults;
  int64_t factors[kResults];  // where those of a result begin; beyond the last: the last once more
  CNNOPS_UNROLL
  for (int i = 0; i < kResults; ++i) factors[i] = least(result + i, each.results - 1) * each.result_step;

  float sums[kResults][kLines] = {};
  const int64_t share = ceil_div(each.rows, kWarps), end = least(each.rows, (warp + 1) * share);
  for (int64_t r = warp * share; r < end; ++r) {
    float value[kLines];
    CNNOPS_UNROLL
    for (int k = 0; k < kLines; ++k) {
      const int64_t c = first + k * 32 + lane;
      value[k] = c < each.columns ? each.matrix[r * each.columns + c] : 0;
    }
    CNNOPS_UNROLL
    for (int i = 0; i < kResults; ++i) {
      const float factor = each.factors ? each.factors[factors[i] + r * each.row_step] : 1;
      CNNOPS_UNROLL
      for (int k = 0; k < kLines; ++k) sums[i][k] += factor * value[k];
    }
  }
  CNNOPS_UNROLL
  for (int i = 0; i < kResults; ++i) {
    CNNOPS_UNROLL
    for (int k = 0; k < kLines; ++k) parts[warp][i][k * 32 + lane] = sums[i][k];
  }
  __syncthreads();
  const int64_t c = first + thread % kWide;
  if (c >= each.columns) return;
  for (int i = thread / kWide; i < kResults && result + i < each.results; i += kThreads / kWide) {
    float sum = 0;
    CNNOPS_UNROLL
    for (int part = 0; part < kWarps; ++part) sum += parts[part][i][thread % kWide];
    each.out[(result + i) * each.columns + c] = kGate ? gated(gate, start ? start[c] + sum : sum) : sum / divisor;
  }
}

void combine(const Combination& each, float divisor, Stream stream) {
  const int64_t tiles = ceil_div(each.columns, kWide) * ceil_div(each.results, kResults);
  CNNOPS_LAUNCH(squeeze_excite_combine_kernel<false>, blocks(tiles), kThreads, 0, stream, each, Gate{}, nullptr,
                divisor);
}

template <bool kBackward>
void run_layer(const SqueezeExciteProblem& p, int64_t terms, const void* weight, const float* in, const Layer& layer,
               Stream stream) {
  const int64_t tiles = ceil_div(p.M, kTile * kWarpsOfHidden) * ceil_div(p.N, kTile * kWarpsOfImages);
  CNNOPS_LAUNCH(squeeze_excite_layer_kernel<kBackward>, blocks(tiles), kThreads, 0, stream, p.N, p.M, p.C, terms,
                static_cast<const float*>(weight), in, layer);
}

template <class T>
int channels_each(int64_t C) {
  return C % kVector<T> == 0 ? kVector<T> : 1;
}

// f(std::integral_constant<int, channels that a thread of a sweep over positions owns>{}).
template <class T, class F>
void for_width(int64_t C, F&& f) {
  if (channels_each<T>(C) == 1) return f(std::integral_constant<int, 1>{});
  f(std::integral_constant<int, kVector<T>>{});
}

template <class T>
Positions summed_positions(const SqueezeExciteProblem& p) {
  Positions cut(p, channels_each<T>(p.C));
  const int64_t wanted = int64_t{device().multiprocessors} * kBlocksEach / (p.N * cut.tiles);
  cut.slices = sliced(p.L, wanted, int64_t{kSteps} * cut.rows);
  return cut;
}

template <class T>
Folds summed_folds(const SqueezeExciteProblem& p, T type) {
  return {p, type, int64_t{device().multiprocessors} * kBlocksEach};
}

int64_t slices_of(const SqueezeExciteProblem& p) {
  int64_t count = 1;
  for_dtype(p.dtype, [&]<class T>(T type) {
    count = folded(p, type)  ? summed_folds(p, type).slices.count
            : by_position(p) ? summed_positions<T>(p).slices.count
                             : Planes(p, type).slices.count;
  });
  return count;
}

// Floats that slices of sums need.
int64_t partial_size(const SqueezeExciteProblem& p) {
  const int64_t slices = slices_of(p);
  return slices > 1 ? slices * p.N * p.C : 0;
}

template <class T, bool kProduct>
void sum(const SqueezeExciteProblem& p, const void* dy, const void* x, const Sums& sums, Stream stream) {
  const T *gradients = static_cast<const T*>(dy), *values = static_cast<const T*>(x);
  if (folded(p, T{})) {
    const Folds cut = summed_folds(p, T{});
    constexpr auto kernel = squeeze_excite_sum_folds_kernel<T, kProduct>;
    CNNOPS_LAUNCH(kernel, blocks(p.N * cut.slices.count), kThreads, 0, stream, cut, gradients, values, sums);
  } else if (by_position(p)) {
    const Positions cut = summed_positions<T>(p);
    for_width<T>(p.C, [&](auto width) {
      constexpr auto kernel = squeeze_excite_sum_positions_kernel<T, decltype(width)::value, kProduct>;
      CNNOPS_LAUNCH(kernel, blocks(p.N * cut.slices.count * cut.tiles), kThreads, 0, stream, cut, gradients, values,
                    sums);
    });
  } else {
    const Planes cut(p, T{});
    constexpr auto kernel = squeeze_excite_sum_planes_kernel<T, kProduct>;
    CNNOPS_LAUNCH(kernel, blocks(ceil_div(cut.planes * cut.slices.count * cut.lanes, kThreads)), kThreads, 0, stream,
                  cut, gradients, values, sums);
  }
  if (sums.slices > 1)
    CNNOPS_LAUNCH(squeeze_excite_finish_sums_kernel, blocks(ceil_div(sums.planes, kThreads)), kThreads, 0, stream,
                  sums);
}

template <class T, bool kShift>
void scale(const SqueezeExciteProblem& p, const void* x, const void* by, const float* shift, void* y, Stream stream) {
  const T* const in = static_cast<const T*>(x);
  const auto* const scales = static_cast<const float*>(by);
  T* const out = static_cast<T*>(y);
  if (folded(p, T{})) {
    const Folds cut(p, T{}, p.N * p.L);
    constexpr auto kernel = squeeze_excite_scale_folds_kernel<T, kShift>;
    CNNOPS_LAUNCH(kernel, blocks(p.N * cut.slices.count), kThreads, 0, stream, cut, in, scales, shift, out);
  } else if (by_position(p)) {
    Positions cut(p, channels_each<T>(p.C));
    cut.slices = sliced(p.L, p.L, int64_t{kSteps} * cut.rows);
    for_width<T>(p.C, [&](auto width) {
      constexpr auto kernel = squeeze_excite_scale_positions_kernel<T, decltype(width)::value, kShift>;
      CNNOPS_LAUNCH(kernel, blocks(p.N * cut.slices.count * cut.tiles), kThreads, 0, stream, cut, in, scales, shift,
                    out);
    });
  } else {
    const int64_t count = p.N * p.C * p.L;
    constexpr auto kernel = squeeze_excite_scale_planes_kernel<T, kShift>;
    CNNOPS_LAUNCH(kernel, blocks(ceil_div(count, kThreads * kVector<T>)), kThreads, 0, stream, count, p.L, in, scales,
                  shift, out);
  }
}

}  // namespace

int64_t squeeze_excite_forward_workspace(const SqueezeExciteProblem& p) {
  return static_cast<int64_t>(sizeof(float)) * (partial_size(p) + p.N * p.M);
}

int64_t squeeze_excite_backward_workspace(const SqueezeExciteProblem& p) {
  return static_cast<int64_t>(sizeof(float)) * (partial_size(p) + 2 * p.N * (p.C + p.M));
}

void squeeze_excite_forward(const SqueezeExciteProblem& p, const SqueezeExciteForward& args, Stream stream) {
  const int64_t planes = p.N * p.C;
  auto *const pooled = static_cast<float*>(args.pooled), *const hidden = static_cast<float*>(args.hidden);
  auto *const partial = static_cast<float*>(args.workspace), *const activated = partial + partial_size(p);
  const Sums sums{planes, slices_of(p), p.L, partial, pooled, nullptr, p.gate};
  for_dtype(p.dtype, [&]<class T>(T) { sum<T, false>(p, nullptr, args.x, sums, stream); });

  const Layer layer{p.activation, static_cast<const float*>(args.bias1), nullptr, hidden, activated, nullptr};
  run_layer<false>(p, p.C, args.weight1, pooled, layer, stream);
  const Combination second{static_cast<const float*>(args.weight2), p.M, p.C, activated, p.N, p.M, 1,
                           static_cast<float*>(args.scale)};
  const int64_t tiles = ceil_div(p.C, kWide) * ceil_div(p.N, kResults);
  const auto* const bias2 = static_cast<const float*>(args.bias2);
  CNNOPS_LAUNCH(squeeze_excite_combine_kernel<true>, blocks(tiles), kThreads, 0, stream, second, p.gate, bias2, 1.f);

  for_dtype(p.dtype, [&]<class T>(T) { scale<T, false>(p, args.x, args.scale, nullptr, args.y, stream); });
}

void squeeze_excite_backward(const SqueezeExciteProblem& p, const SqueezeExciteBackward& args, Stream stream) {
  const int64_t planes = p.N * p.C;
  auto* const partial = static_cast<float*>(args.workspace);
  float *const dgated = partial + partial_size(p), *const dpooled = dgated + planes;
  float *const activated = dpooled + planes, *const dhidden = activated + p.N * p.M;
  const Sums sums{planes, slices_of(p), p.L, partial, dgated, static_cast<const float*>(args.scale), p.gate};
  for_dtype(p.dtype, [&]<class T>(T) { sum<T, true>(p, args.dy, args.x, sums, stream); });

  const bool need_dhidden = args.dx || args.dweight1 || args.dbias1;
  if (need_dhidden || args.dweight2) {
    const Layer layer{p.activation, nullptr,   static_cast<const float*>(args.hidden),
                      nullptr,      activated, need_dhidden ? dhidden : nullptr};
    run_layer<true>(p, need_dhidden ? p.C : 0, args.weight2, dgated, layer, stream);
  }
  const auto weight_gradient = [&](const float* by_m, const void* by_c, void* dweight) {
    if (!dweight) return;
    combine({static_cast<const float*>(by_c), p.N, p.C, by_m, p.M, 1, p.M, static_cast<float*>(dweight)}, 1, stream);
  };
  const auto bias_gradient = [&](const float* gradient, int64_t size, void* dbias) {
    if (dbias) combine({gradient, p.N, size, nullptr, 1, 0, 0, static_cast<float*>(dbias)}, 1, stream);
  };
  weight_gradient(dhidden, args.pooled, args.dweight1);
  weight_gradient(activated, dgated, args.dweight2);
  bias_gradient(dhidden, p.M, args.dbias1);
  bias_gradient(dgated, p.C, args.dbias2);
  if (!args.dx) return;
  combine({static_cast<const float*>(args.weight1), p.M, p.C, dhidden, p.N, p.M, 1, dpooled}, static_cast<float>(p.L),
          stream);
  for_dtype(p.dtype, [&]<class T>(T) { scale<T, true>(p, args.dy, args.scale, dpooled, args.dx, stream); });
}

}  // namespace cnnops::cuda
