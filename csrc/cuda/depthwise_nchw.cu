// The depthwise family of NCHW: how a pass is cut, and what follows it.
//
//   dbias[k] = sum over (n,p,q) of dy[n,k,p,q]
//
// Layout     x [N,C,H,W], y [N,K,P,Q].
// Ownership  One thread owns a number of what finishes a pass; of dbias, a warp owns a filter in some images.
// Traffic    The slabs or parts once; of dbias, dy once.

#include <algorithm>

#include "depthwise_nchw.cuh"
#include "dtype.h"
#include "launchers.h"
#include "padded_slabs.cuh"

namespace cnnops::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;

int element_bytes(const Conv2dProblem& p) { return p.dtype == DType::kFloat ? 4 : 2; }

// Elements of shared memory for `count` numbers that begin anywhere in a piece of 16 bytes.
int64_t room(const Conv2dProblem& p, int64_t count) {
  const int64_t vector = kVectorBytes / element_bytes(p);
  return (ceil_div(count, vector) + 1) * vector;
}

// What the tile and the strip's rows decide: the shared memory.
NchwCut lay_out(const Conv2dProblem& p, DepthwisePass pass, int planes, int64_t rows) {
  const int64_t element = element_bytes(p), multiplier = p.K / p.C, reach = int64_t{p.R - 1} * p.dilation_h;
  const bool forward = pass == DepthwisePass::kForward, whole = rows >= p.P;
  NchwCut cut{};
  cut.sized = p.R == p.S && (p.R == 3 || p.R == 5 || p.R == 7) && p.dilation_h == 1 && p.dilation_w == 1 &&
              p.stride_h == p.stride_w && p.stride_h <= 2;
  cut.planes = planes;
  cut.rows = static_cast<int>(std::min<int64_t>(rows, p.P));
  cut.lanes_x = kNchwThreads / planes;
  cut.lanes_y = 1;
  while (2 * cut.lanes_y * planes * multiplier <= kNchwThreads) cut.lanes_y *= 2;

  // Whole planes are one range, and a strip's rows one for each plane.
  const int64_t rows_x = std::min<int64_t>(p.H, rows * p.stride_h + reach);
  const int64_t rows_y = forward ? rows : std::min<int64_t>(p.P, rows + reach / p.stride_h);
  const int64_t x = whole ? room(p, planes * int64_t{p.H} * p.W) : room(p, rows_x * p.W);
  const int64_t of_y = whole ? room(p, planes * multiplier * p.P * p.Q) : room(p, rows_y * p.Q);
  const int64_t y = whole ? of_y : of_y * multiplier, sums = forward ? y : x;
  cut.pitch_x = static_cast<int>(x);
  cut.pitch_y = static_cast<int>(of_y);
  cut.pitch_sums = forward ? cut.pitch_y : cut.pitch_x;
  cut.x_bytes = pass == DepthwisePass::kInput ? 0 : x * element;
  cut.y_bytes = forward ? 0 : y * element;
  cut.y = 2 * cut.x_bytes;
  cut.sums = cut.y + 2 * cut.y_bytes;
  cut.weights = cut.sums + sums * sizeof(float);
  const int64_t taps = planes * multiplier * p.R * p.S;
  cut.shares = cut.weights + ceil_div(taps * int64_t{sizeof(float)}, kVectorBytes) * kVectorBytes;
  cut.end = cut.shares;
  if (forward) cut.end += kNchwThreads / std::min(cut.lanes_y, 32) * sizeof(Moments);
  if (pass == DepthwisePass::kWeight) {
    const int64_t groups = kNchwThreads / std::min(cut.lanes_y, 32);
    cut.end += sizeof(float) * (cut.sized ? groups * p.R * p.S : std::max<int64_t>(taps, kNchwThreads));
  }
  return cut;
}

// Results of the largest filter whose convolution memory bounds; beyond it the copies to NHWC and back cost less than
// its kernels, also on tensor cores, gain.
constexpr int kMostTaps = 7 * 7;

}  // namespace

NchwCut nchw_cut(const Conv2dProblem& p, DepthwisePass pass, const Device& device) {
  constexpr int kMostPlanes = 32;
  constexpr int64_t kTileBytes = 8 << 10;  // of x and y, beside which the ends of a range are a small part
  constexpr size_t kUsualBytes = 48 << 10, kMostUsualBytes = 96 << 10;  // of shared memory, for several blocks
  const auto available = static_cast<size_t>(device.shared_bytes);
  const int64_t multiplier = p.K / p.C, enough = int64_t{2} * device.multiprocessors;  // strips
  const int64_t plane_bytes = (int64_t{p.H} * p.W + multiplier * p.P * p.Q) * element_bytes(p);
  const auto tiles = [&](int64_t planes) { return p.N * ceil_div(p.C, planes); };

  int planes = 1;
  while (planes < std::min(kMostPlanes, p.C) && planes * plane_bytes < kTileBytes &&
         2 * planes * multiplier <= kNchwThreads && tiles(2 * planes) >= enough)
    planes *= 2;
  while (planes > 1 && lay_out(p, pass, planes, p.P).end > std::min(kUsualBytes, available)) planes /= 2;

  // Strips of rows where a plane is too large, or where there are too few of them: high, so that of the rows that they
  // read at most an eighth is shared.
  const int64_t shared_rows = std::max<int64_t>(0, int64_t{p.R - 1} * p.dilation_h + 1 - p.stride_h);
  const int64_t least = std::max<int64_t>(1, ceil_div(8 * shared_rows, kNchwRun * p.stride_h)) * kNchwRun;
  int64_t rows = p.P;
  if (planes == 1 && tiles(1) < enough)
    rows = std::max(least, ceil_div(ceil_div(p.P * tiles(1), enough), kNchwRun) * kNchwRun);
  for (const size_t bytes : {kUsualBytes, kMostUsualBytes, available}) {
    if (planes > 1 || lay_out(p, pass, 1, rows).end <= std::min(bytes, available)) break;
    int64_t fits = kNchwRun;
    while (fits < rows && lay_out(p, pass, 1, fits + kNchwRun).end <= std::min(bytes, available)) fits += kNchwRun;
    if (fits < least && bytes < available) continue;
    if (bytes == available) fits = std::min(fits, least);
    rows = ceil_div(ceil_div(p.P, ceil_div(p.P, fits)), kNchwRun) * kNchwRun;  // strips of about the same height
    break;
  }

  NchwCut cut = lay_out(p, pass, planes, rows);
  cut.chunks = ceil_div(p.P, cut.rows);
  cut.channel_tiles = ceil_div(p.C, planes);
  cut.strips = p.N * cut.chunks;
  int64_t wanted = ceil_div(int64_t{8} * device.multiprocessors, cut.channel_tiles);
  if (pass == DepthwisePass::kWeight) {
    constexpr int64_t kLeastGradients = 16;  // for each tap, so that slabs are a small part of what moves
    wanted = std::min(ceil_div(int64_t{4} * device.multiprocessors, cut.channel_tiles),
                      std::max<int64_t>(1, p.N * int64_t{p.P} * p.Q / (kLeastGradients * p.R * p.S)));
  }
  cut.each = ceil_div(cut.strips, std::min(wanted, cut.strips));
  cut.parts = ceil_div(cut.strips, cut.each);
  return cut;
}

bool depthwise_nchw_takes(const Conv2dProblem& p, const Device& device) {
  // Within these, what lies in shared memory is counted in 32 bits.
  constexpr int kFarthest = 1 << 12, kMostMultiplied = 16, kLargest = 1 << 24;
  if (p.groups != p.C || p.C == 1 || p.K / p.C > kMostMultiplied || p.pad_mode != PadMode::kZeros) return false;
  if (std::max(p.R, p.S) > kLongestFilter || p.R * p.S > kMostTaps) return false;
  if (std::max({p.H, p.W, p.P, p.Q}) > kLargest) return false;
  if (std::max({p.pad_h, p.pad_w, p.stride_h, p.stride_w}) > kFarthest) return false;
  if ((p.R > 1 && p.dilation_h > kFarthest / p.R) || (p.S > 1 && p.dilation_w > kFarthest / p.S)) return false;
  const auto fits = [&](DepthwisePass pass) {
    return nchw_cut(p, pass, device).end <= static_cast<size_t>(device.shared_bytes);
  };
  return fits(DepthwisePass::kForward) && fits(DepthwisePass::kInput) && fits(DepthwisePass::kWeight);
}

bool conv2d_nchw(const Conv2dProblem& p) { return depthwise_nchw_takes(p, device()); }

namespace {

constexpr int kFinishThreads = 256;

// One of dweight's sums over a block's strips, of the gradients whose pixel is there.
template <class T>
__device__ float sum_again(const Conv2dProblem& p, const NchwCut& cut, int64_t part, const T* dy, const T* x, int64_t k,
                           int r, int s) {
  const int64_t begin = part * cut.each, end = begin + cut.each < cut.strips ? begin + cut.each : cut.strips;
  float sum = 0;
  for (int64_t index = begin; index < end; ++index) {
    const NchwStrip strip = nchw_strip(p, cut, index);
    const T* const gradients = dy + (strip.n * p.K + k) * p.P * p.Q;
    const T* const plane = x + (strip.n * p.C + k / (p.K / p.C)) * p.H * p.W;
    for (int64_t i = strip.y.begin; i < strip.y.end; ++i) {
      const int64_t h = i * p.stride_h - p.pad_h + r * p.dilation_h;
      if (h < 0 || h >= p.H) continue;
      for (int64_t j = 0; j < p.Q; ++j) {
        const int64_t w = j * p.stride_w - p.pad_w + s * p.dilation_w;
        if (w >= 0 && w < p.W) sum += to_float(gradients[i * p.Q + j]) * to_float(plane[h * p.W + w]);
      }
    }
  }
  return sum;
}

// dweight[k][tap] = the sum over slabs of slabs[slab][k][tap].
template <class T>
__global__ void __launch_bounds__(kFinishThreads, 2)  // for more blocks, ptxas would spill
    depthwise_nchw_add_slabs_kernel(Conv2dProblem p, NchwCut cut, const float* slabs, const T* dy, const T* x,
                                    T* dweight) {
  const int taps = p.R * p.S;
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x, size = int64_t{p.K} * taps;
  if (i >= size) return;
  const Split at = split(i, taps);
  const int tap = static_cast<int>(at.remainder);
  const float sum = add_padded_slabs(slabs, cut.parts, size, i, [&](int64_t slab) {
    return sum_again(p, cut, slab, dy, x, at.quotient, tap / p.S, tap % p.S);
  });
  from_float(sum, dweight[i]);
}

void backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
              void* workspace, Stream stream) {
  auto* const slabs = static_cast<float*>(workspace);
  const NchwCut cut = nchw_cut(p, DepthwisePass::kWeight, device());
  depthwise_nchw_backward(p, cut, nullptr, dy, x, weight, dx, slabs, stream);
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(depthwise_nchw_add_slabs_kernel<T>, blocks(ceil_div(slab_size(p), kFinishThreads)), kFinishThreads, 0,
                  stream, p, cut, slabs, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dweight));
  });
}

constexpr int kBiasWarps = 4;

// slabs[slab][k] = the sum of dy over images [slab * images, ..).
template <class T>
__global__ void __launch_bounds__(kBiasWarps * 32)
    depthwise_nchw_bias_kernel(Conv2dProblem p, int64_t images, const T* dy, float* slabs) {
  const int64_t index = int64_t{blockIdx.x} * kBiasWarps + threadIdx.x / 32, size = int64_t{p.P} * p.Q;
  const Split at = split(index, p.K);
  const int64_t k = at.remainder, begin = at.quotient * images, end = begin + images < p.N ? begin + images : p.N;
  float sum = 0;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = (n * p.K + k) * size, place = first % kVector<T>;
    for (int64_t i = int64_t{threadIdx.x % 32} * kVector<T>; i < place + size; i += 32 * kVector<T>) {
      const T* const from = dy + first - place + i;
      if (i >= place && i + kVector<T> <= place + size) {
        const Vector<T> values = load_16(reinterpret_cast<const Vector<T>*>(from));
        CNNOPS_UNROLL
        for (int j = 0; j < kVector<T>; ++j) sum += to_float(values.at[j]);
      } else {
        const int64_t end = i + kVector<T> < place + size ? i + kVector<T> : place + size;
        CNNOPS_NO_UNROLL  // so that the registers suffice
            for (int64_t j = i < place ? place : i; j < end; ++j) sum += to_float(from[j - i]);
      }
    }
  }
  for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0 && begin < p.N) slabs[index] = sum;
}

// Images of a slab of dbias.
int64_t images_of_bias(const Conv2dProblem& p) {
  constexpr int64_t kWarpsPerMultiprocessor = 32;
  return ceil_div(p.N, std::min<int64_t>(p.N, ceil_div(kWarpsPerMultiprocessor * device().multiprocessors, p.K)));
}

}  // namespace

int64_t depthwise_nchw_bias_workspace(const Conv2dProblem& p) {
  return ceil_div(p.N, images_of_bias(p)) * p.K * int64_t{sizeof(float)};
}

void depthwise_nchw_bias(const Conv2dProblem& p, const void* dy, void* dbias, float* slabs, Stream stream) {
  const int64_t images = images_of_bias(p), count = ceil_div(p.N, images);
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(depthwise_nchw_bias_kernel<T>, blocks(ceil_div(count * p.K, kBiasWarps)), kBiasWarps * 32, 0, stream,
                  p, images, static_cast<const T*>(dy), slabs);
  });
  add_slabs(p.dtype, count, p.K, slabs, dbias, stream);
}

const Conv2dFamily kDepthwiseNchwConv2d = {
    .forward_workspace = [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue) -> int64_t {
      const NchwCut cut = nchw_cut(p, DepthwisePass::kForward, device());
      const int64_t rows = epilogue.pooled ? cut.strips : epilogue.mean ? 3 * cut.parts : 0;
      return rows * p.K * int64_t{sizeof(float)};
    },
    .forward =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* x, const void* weight,
           void* y, void* workspace, Stream stream) {
          const NchwCut cut = nchw_cut(p, DepthwisePass::kForward, device());
          auto* const partial = epilogue.mean || epilogue.pooled ? static_cast<float*>(workspace) : nullptr;
          depthwise_nchw_forward(p, cut, epilogue, x, weight, y, partial, stream);
          if (epilogue.mean) finish_moments(cut.parts, p.K, partial, epilogue, stream);
          if (epilogue.pooled) finish_pooled(p, cut.chunks, partial, epilogue, stream);
        },
    .backward_input_workspace = [](const Conv2dProblem&, const Conv2dPlan&) -> int64_t { return 0; },
    .backward_input =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* dy, const void* weight,
           void* dx, void*, Stream stream) {
          depthwise_nchw_backward(p, nchw_cut(p, DepthwisePass::kInput, device()), epilogue.bias, dy, nullptr, weight,
                                  dx, nullptr, stream);
        },
    .backward_weight_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan) -> int64_t {
      return plan.splits * slab_size(p) * int64_t{sizeof(float)};
    },
    .backward_weight = [](const Conv2dProblem& p, const Conv2dPlan&, const void* dy, const void* x, void* dweight,
                          void* workspace,
                          Stream stream) { backward(p, dy, x, nullptr, nullptr, dweight, workspace, stream); },
    .backward = [](const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                   void* workspace, Stream stream) { backward(p, dy, x, weight, dx, dweight, workspace, stream); },
    .pools = true,
};

}  // namespace cnnops::cuda
