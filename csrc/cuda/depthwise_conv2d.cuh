// What the depthwise kernels share: how a block goes down its strips, with the rows around them in a ring of shared
// memory, and how a step's sums are written.
#pragma once

#include "conv2d_kernels.h"
#include "depthwise_conv2d.h"
#include "epilogue.cuh"

namespace cnnops::cuda {

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T at[2];
};

template <class T>
__device__ __forceinline__ float2 load_pair(const T* from) {
  const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(from);
  return {to_float(pair.at[0]), to_float(pair.at[1])};
}

__device__ __forceinline__ void add_product(float2& sum, float2 a, float2 b) {
  sum.x += a.x * b.x;
  sum.y += a.y * b.y;
}

// A thread's place: its group's in the step, and its pair of channels in the tile.
template <int kChannels>
struct DepthwiseThread {
  static constexpr int kLanes = kChannels / 2, kGroupsOfAWarp = 32 / kLanes;
  int across, down, channel;

  __device__ explicit DepthwiseThread(const DepthwiseCut& cut) {
    const int group = static_cast<int>(threadIdx.x) / kLanes;
    down = group / cut.across;
    across = group - down * cut.across;
    channel = static_cast<int>(threadIdx.x) % kLanes * 2;
  }
};

struct Strip {
  int64_t index, n;
  int row, end, column;  // end: where its rows end
};

__device__ inline Strip strip_of(const DepthwiseCut& cut, int64_t index) {
  const Split w = split(index, cut.strips_w), h = split(w.quotient, cut.chunks);
  const int64_t row = h.remainder * cut.chunk_rows, end = row + cut.chunk_rows;
  return {index, h.quotient, static_cast<int>(row), static_cast<int>(end < cut.rows ? end : cut.rows),
          static_cast<int>(w.remainder * cut.columns)};
}

// A tile of channels of an NHWC image, of which [0, height) x [0, width) is read. What lies beside that is zero.
template <class T>
struct Window {
  const T* image;
  int64_t row_pitch;
  int pitch, height, width, channel, channels;  // the tile's first channel, and where the tensor's end

  __device__ Window(const T* tensor, int64_t n, int H, int W, int C, int channel)
      : image(tensor + n * H * W * C),
        row_pitch(int64_t{W} * C),
        pitch(C),
        height(H),
        width(W),
        channel(channel),
        channels(C) {}
  __device__ void clip(int rows, int columns) {
    height = rows < height ? rows : height;
    width = columns < width ? columns : width;
  }
};

// Rows in shared memory, which are taken again in turns.
template <class T>
struct Ring {
  T* first;
  int slots, columns, pixel;  // rows; pixels of a row; elements from pixel to pixel

  __device__ T* row(int slot) const { return first + (slot < slots ? slot : slot - slots) * columns * pixel; }
};

// Starts copies of `rows` x ring.columns pixels from (row, column) on, `width` channels each, to the slots from `slot`
// on: 16 bytes at a time where kAligned, else element by element.
template <bool kAligned, class T>
__device__ void bring(const Window<T>& from, int row, int rows, int column, int width, const Ring<T>& ring, int slot) {
  constexpr int kEach = kAligned ? kVector<T> : 1;
  const int units = width / kEach, units_of_a_row = ring.columns * units;
  int at_row = 0;
  for (int i = static_cast<int>(threadIdx.x);; i += static_cast<int>(blockDim.x)) {
    while (i >= units_of_a_row) i -= units_of_a_row, ++at_row;
    if (at_row >= rows) return;
    const int at_column = i / units, channel = (i - at_column * units) * kEach;
    T* const to = ring.row(slot + at_row) + at_column * ring.pixel + channel;
    const int h = row + at_row, w = column + at_column;
    const bool inside = (static_cast<unsigned>(h) < static_cast<unsigned>(from.height)) &
                        (static_cast<unsigned>(w) < static_cast<unsigned>(from.width)) & (h >= 0) & (w >= 0) &
                        (from.channel + channel < from.channels);
    const T* const at = from.image + h * from.row_pitch + int64_t{w} * from.pitch + from.channel + channel;
    if constexpr (kAligned)
      copy_async_16(to, inside ? at : from.image, inside);
    else
      *to = inside ? *at : T{};
  }
}

// Goes down the strips of a block, `part` of those that share its channels.
//   rows_of(strip, row, first, slot, other)   starts copies of the rows from `first` on of the window of the step at
//                                             `row`, to the ring's slots from `slot` on, and of what else the step
//                                             reads to the `other`-th of two buffers
//   step(strip, row, slot, other)             computes the step at `row`, whose window begins in `slot`
template <class Rows, class Step>
__device__ void march(const DepthwiseCut& cut, int64_t part, const Rows& rows_of, const Step& step) {
  const int slots = cut.window + cut.advance, kept = cut.window > cut.advance ? cut.window - cut.advance : 0;
  const int64_t begin = part * cut.each, end = begin + cut.each < cut.strips ? begin + cut.each : cut.strips;
  for (int64_t index = begin; index < end; ++index) {
    const Strip strip = strip_of(cut, index);
    int slot = 0, other = 0;
    __syncthreads();  // nobody reads the strip before any more
    rows_of(strip, strip.row, 0, slot, other);
    commit_async();
    for (int row = strip.row; row < strip.end; row += cut.step) {
      wait_async<0>();
      __syncthreads();  // the window has landed, and nobody reads the one before any more
      const int next = slot + cut.advance < slots ? slot + cut.advance : slot + cut.advance - slots;
      if (row + cut.step < strip.end) {
        rows_of(strip, row + cut.step, kept, next, other ^ 1);
        commit_async();
      }
      step(strip, row, slot, other);
      slot = next, other ^= 1;
    }
  }
}

// weights[tap][channel] of `filters` filters from `first` on, zero beyond K.
template <class T>
__device__ void bring_weights(const T* weight, int64_t first, int filters, int64_t K, int taps, T* weights) {
  for (int i = static_cast<int>(threadIdx.x); i < filters * taps; i += static_cast<int>(blockDim.x)) {
    const int filter = i / taps, tap = i - filter * taps;
    weights[tap * filters + filter] = first + filter < K ? weight[first * taps + i] : T{};
  }
}

// Writes a step's sums, kRows x kColumns pixels of a thread, by way of the warp's part of `shared`. at(group, i) gives
// the offset of the i-th pixel of a group, or -1. All of y's offsets are aligned to 16 bytes where `aligned`.
template <class T, int kChannels, bool kMoments, int kPixels, class At>
__device__ void write_sums(const Epilogue& epilogue, const float2 (&sums)[kPixels], float* shared, const At& at,
                           int64_t k, int64_t K, bool aligned, T* y, Moments (&moments)[kVector<T>]) {
  using Thread = DepthwiseThread<kChannels>;
  constexpr int kPitch = kChannels + kSumsSkew, kWarpRows = Thread::kGroupsOfAWarp * kPixels;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* const mine = shared + warp * kWarpRows * kPitch;
  float* const to = mine + lane / Thread::kLanes * kPixels * kPitch + lane % Thread::kLanes * 2;
  CNNOPS_UNROLL
  for (int i = 0; i < kPixels; ++i) *reinterpret_cast<float2*>(to + i * kPitch) = sums[i];
  __syncwarp();
  write_rows<T, kChannels, kMoments>(
      epilogue, mine, kPitch, kWarpRows,
      [&](int row) { return at(warp * Thread::kGroupsOfAWarp + row / kPixels, row % kPixels); }, k, K, aligned, y,
      moments);
  __syncwarp();  // the sums were read
}

// A warp's moments, of those that finish_moments merges: partial[part][warp][count, mean, m2][K].
template <class T, int kChannels>
__device__ void write_moments(Moments (&moments)[kVector<T>], int64_t part, int64_t k, int64_t K, float* partial) {
  merge_lanes<T, kChannels>(moments);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (static_cast<int>(threadIdx.x) % 32 >= kChannels / kVector<T>) return;
  float* const to = partial + (part * kDepthwiseWarps + warp) * 3 * K;
  const int64_t first = k + column_of<T, kChannels>();
  CNNOPS_UNROLL
  for (int i = 0; i < kVector<T>; ++i) {
    if (first + i >= K) continue;
    to[first + i] = moments[i].count;
    to[K + first + i] = moments[i].mean;
    to[2 * K + first + i] = moments[i].m2;
  }
}

// A warp's sums over a strip, partial[strip][warp][K], of the moments of what it wrote there.
template <class T, int kChannels>
__device__ void write_pooled(Moments (&moments)[kVector<T>], int64_t strip, int64_t k, int64_t K, float* partial) {
  merge_lanes<T, kChannels>(moments);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = k + column_of<T, kChannels>();
  CNNOPS_UNROLL
  for (int i = 0; i < kVector<T>; ++i) {
    if (static_cast<int>(threadIdx.x) % 32 < kChannels / kVector<T> && first + i < K)
      partial[(strip * kDepthwiseWarps + warp) * K + first + i] = moments[i].count * moments[i].mean;
    moments[i] = {};
  }
}

// f.operator()<size of the filter, stride>() for those that have instances of their own.
template <class F>
void with_size(const Conv2dProblem& p, F&& f) {
  const auto strided = [&]<int kSize>() {
    if (p.stride_h == 1)
      f.template operator()<kSize, 1>();
    else
      f.template operator()<kSize, 2>();
  };
  if (p.R == 3)
    strided.template operator()<3>();
  else if (p.R == 5)
    strided.template operator()<5>();
  else
    strided.template operator()<7>();
}

// The passes: of filters that have instances of their own, and of any size. One of dx and dweight's slabs may be null,
// and dx is where the cut has several tap_tiles. A slab is [tap tile][K][taps].
void depthwise_sized_forward(const Conv2dProblem&, const DepthwiseCut&, const Epilogue&, const void* x,
                             const void* weight, void* y, float* partial, Stream);
void depthwise_sized_backward(const Conv2dProblem&, const DepthwiseCut&, const Epilogue&, const void* dy, const void* x,
                              const void* weight, void* dx, float* slabs, Stream);
void depthwise_any_forward(const Conv2dProblem&, const DepthwiseCut&, const Epilogue&, const void* x,
                           const void* weight, void* y, float* partial, Stream);
void depthwise_any_backward(const Conv2dProblem&, const DepthwiseCut&, const Epilogue&, const void* dy, const void* x,
                            const void* weight, void* dx, float* slabs, Stream);

}  // namespace cnnops::cuda
