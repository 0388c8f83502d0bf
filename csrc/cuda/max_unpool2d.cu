// Unpooling: values go back to where their maxima were.
//
//   y[n,c,i]    = x[n,c,h,w] where i = indices[n,c,h,w], a flat position of the P x Q plane; elsewhere 0. Of several
//                 values for one position the last in row-major order stays.
//   dx[n,c,h,w] = dy[n,c,indices[n,c,h,w]]
//
// Layout     x, dx, y, dy dense, all [N,C,..] or all [N,..,C]; indices by their strides, so that they are never copied.
// Tile       forward: a block has kChannels = 16 channels c of an image, [N,..,C], or one, [N,C,..].
//                          columns w ->                               columns q ->
//                        +--------------------------------+         +------------------------------------+
//            rows h    | | x, indices: a rectangle, all   |  index  | y: a rectangle, kElements = 4096,  | | rows p
//                      v | that `Bounds` lets point there | ------->| 8 bytes each in shared memory      | v
//                        +--------------------------------+         +------------------------------------+
//            halo: how far `Bounds` lets inputs point; other blocks read them, too. backward: a thread for each dx.
// Ownership  forward: a block owns a rectangle of y in some channels. It looks at the inputs that may point there,
//            keeps in shared memory for each of its elements the last of them with its value, an integer maximum that
//            is the same in every order, and writes each element once. Which inputs may point there it knows from
//            `Bounds`: how far from its own place, scaled to y's plane, any input points at all. Where they came of a
//            pool, that is a window's size, and blocks share few inputs. backward: one thread owns one element of dx.
// Traffic    The check: indices once. forward: indices and x once + y; backward: indices once, what they point to of dy
//            + dx.

#include <algorithm>

#include "dtype.h"
#include "launchers.h"
#include "ptx.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256;

// What a scan finds: the first position in row-major order of [N,C,H,W] with an index out of range, -1 if there is
// none, and that index; of all others, how far the row and the column that they name are from their own ones, scaled.
struct Bounds {
  int64_t misplaced = -1, index = 0;
  int64_t least_row = INT64_MAX, most_row = INT64_MIN, least_column = INT64_MAX, most_column = INT64_MIN;

  __device__ void see(int64_t row, int64_t column) {
    least_row = row < least_row ? row : least_row;
    most_row = row > most_row ? row : most_row;
    least_column = column < least_column ? column : least_column;
    most_column = column > most_column ? column : most_column;
  }
  __device__ void refuse(int64_t position, int64_t found) {
    if (misplaced >= 0 && misplaced < position) return;
    misplaced = position;
    index = found;
  }
  __device__ void merge(const Bounds& other) {
    if (other.misplaced >= 0) refuse(other.misplaced, other.index);
    if (other.least_row > other.most_row) return;  // it has seen none
    see(other.least_row, other.least_column);
    see(other.most_row, other.most_column);
  }
};

// An element of a tensor [N,C,..] or [N,..,C] whose planes are `height` x `width`, by its place in memory.
struct Element {
  int64_t n, c, row, column;
};
__device__ __forceinline__ Element element(bool channels_last, int64_t C, int64_t height, int64_t width, int64_t i) {
  if (channels_last) {
    const Split channel = split(i, C), column = split(channel.quotient, width), row = split(column.quotient, height);
    return {row.quotient, channel.remainder, row.remainder, column.remainder};
  }
  const Split column = split(i, width), row = split(column.quotient, height), channel = split(row.quotient, C);
  return {channel.quotient, channel.remainder, row.remainder, column.remainder};
}
__device__ __forceinline__ int64_t place(const Unpool2dProblem& p, int64_t n, int64_t c, int64_t position,
                                         int64_t plane) {
  return p.channels_last ? (n * plane + position) * p.C + c : (n * p.C + c) * plane + position;
}
__device__ __forceinline__ int64_t index_of(const Unpool2dProblem& p, const Element& e, const int64_t* indices) {
  return indices[e.n * p.index_stride[0] + e.c * p.index_stride[1] + e.row * p.index_stride[2] +
                 e.column * p.index_stride[3]];
}
// Unsigned, a negative index is a large one.
__device__ __forceinline__ bool is_inside(const Unpool2dProblem& p, int64_t index) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(p.P * p.Q);
}

using BlockBounds = Bounds[kThreads];

// The whole block's, for thread 0.
__device__ __forceinline__ Bounds merged(BlockBounds& all, const Bounds& mine) {
  all[threadIdx.x] = mine;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) all[threadIdx.x].merge(all[threadIdx.x + half]);
  }
  return all[threadIdx.x];
}

__global__ void __launch_bounds__(kThreads)
    max_unpool2d_scan_kernel(Unpool2dProblem p, const int64_t* indices, Bounds* parts) {
  CNNOPS_SHARED(BlockBounds, shared);
  Bounds bounds;
  const int64_t count = p.N * p.C * p.H * p.W;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const Element e = element(p.channels_last, p.C, p.H, p.W, i);
    const int64_t index = index_of(p, e, indices);
    if (is_inside(p, index)) {
      const Split at = split(index, p.Q);
      bounds.see(at.quotient - split(e.row * p.P, p.H).quotient, at.remainder - split(e.column * p.Q, p.W).quotient);
    } else {
      bounds.refuse(((e.n * p.C + e.c) * p.H + e.row) * p.W + e.column, index);
    }
  }
  bounds = merged(shared, bounds);
  if (threadIdx.x == 0) parts[blockIdx.x] = bounds;
}

__global__ void __launch_bounds__(kThreads) max_unpool2d_bounds_kernel(int count, const Bounds* parts, Bounds* out) {
  CNNOPS_SHARED(BlockBounds, shared);
  Bounds bounds;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) bounds.merge(parts[i]);
  bounds = merged(shared, bounds);
  if (threadIdx.x == 0) *out = bounds;
}

// A block's rectangle of y: so many rows and columns in so many channels, which lie together in NHWC alone.
struct Rectangle {
  int64_t rows, columns, channels;
};
constexpr int64_t kElements = 4096, kChannels = 16;

// Inputs along one axis, `in` of them for `out` outputs, that may point to outputs [begin, end).
struct Range {
  int64_t begin, end;
};
__device__ __forceinline__ Range pointing(int64_t begin, int64_t end, int64_t least, int64_t most, int64_t in,
                                          int64_t out) {
  if (least > most) return {0, 0};
  const int64_t from = begin - most, to = end - least;
  return {from <= 0 ? 0 : split(from * in + out - 1, out).quotient, to <= 0 ? 0
                                                                    : to >= out
                                                                        ? in
                                                                        : split(to * in + out - 1, out).quotient};
}

// An input's number, from 1 on in row-major order, above the bits of its value: the greatest is the last.
using Candidate = unsigned long long;
using Candidates = Candidate[kElements];

__device__ __forceinline__ unsigned bits_of(float v) { return __float_as_uint(v); }
template <class T>
__device__ __forceinline__ unsigned bits_of(T v) {
  return v.bits;
}
__device__ __forceinline__ void from_bits(unsigned bits, float& v) { v = __uint_as_float(bits); }
template <class T>
__device__ __forceinline__ void from_bits(unsigned bits, T& v) {
  v.bits = static_cast<uint16_t>(bits);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    max_unpool2d_forward_kernel(Unpool2dProblem p, Rectangle tile, const Bounds* known, const T* x,
                                const int64_t* indices, T* y) {
  CNNOPS_SHARED(Candidates, kept);
  const Split column = split(blockIdx.x, ceil_div(p.Q, tile.columns));
  const Split row = split(column.quotient, ceil_div(p.P, tile.rows));
  const Split channel = split(row.quotient, ceil_div(p.C, tile.channels));
  const int64_t n = channel.quotient, c = channel.remainder * tile.channels;
  const int64_t p_begin = row.remainder * tile.rows, p_end = p_begin + tile.rows < p.P ? p_begin + tile.rows : p.P;
  const int64_t q_begin = column.remainder * tile.columns;
  const int64_t q_end = q_begin + tile.columns < p.Q ? q_begin + tile.columns : p.Q;
  const int64_t channels = c + tile.channels < p.C ? tile.channels : p.C - c, width = q_end - q_begin;
  for (int64_t i = threadIdx.x; i < kElements; i += kThreads) kept[i] = 0;
  __syncthreads();

  const Bounds bounds = *known;
  const Range rows = pointing(p_begin, p_end, bounds.least_row, bounds.most_row, p.H, p.P);
  const Range columns = pointing(q_begin, q_end, bounds.least_column, bounds.most_column, p.W, p.Q);
  const int64_t wide = columns.end - columns.begin, count = wide > 0 ? (rows.end - rows.begin) * wide * channels : 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    Element e = element(true, channels, rows.end - rows.begin, wide, i);
    e = {n, c + e.c, rows.begin + e.row, columns.begin + e.column};
    const int64_t index = index_of(p, e, indices);
    if (!is_inside(p, index)) continue;
    const Split at = split(index, p.Q);
    if (at.quotient < p_begin || at.quotient >= p_end || at.remainder < q_begin || at.remainder >= q_end) continue;
    const int64_t position = e.row * p.W + e.column;
    const unsigned bits = bits_of(x[place(p, n, e.c, position, p.H * p.W)]);
    const Candidate candidate = static_cast<Candidate>(position + 1) << 32 | bits;
    atomicMax(&kept[((at.quotient - p_begin) * width + at.remainder - q_begin) * channels + e.c - c], candidate);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < (p_end - p_begin) * width * channels; i += kThreads) {
    const Element e = element(true, channels, p_end - p_begin, width, i);
    const int64_t position = (p_begin + e.row) * p.Q + q_begin + e.column;
    from_bits(static_cast<unsigned>(kept[i]), y[place(p, n, c + e.c, position, p.P * p.Q)]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    max_unpool2d_backward_kernel(Unpool2dProblem p, const T* dy, const int64_t* indices, T* dx) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.N * p.C * p.H * p.W) return;
  const Element e = element(p.channels_last, p.C, p.H, p.W, i);
  const int64_t index = index_of(p, e, indices);
  dx[i] = is_inside(p, index) ? dy[place(p, e.n, e.c, index, p.P * p.Q)] : T{};
}

// Blocks of a scan, each of which leaves a part.
int scan_blocks(const Unpool2dProblem& p) {
  constexpr int64_t kWaves = 8;
  return static_cast<int>(std::min(ceil_div(p.N * p.C * p.H * p.W, kThreads), kWaves * device().multiprocessors));
}

// The host's copy, for which it waits; none while the stream is captured into a graph, where nobody may wait.
#if defined(CNNOPS_SIMT)
bool fetched(const Bounds* from, Bounds& to, Stream) {
  to = *from;
  return true;
}
#else
bool fetched(const Bounds* from, Bounds& to, Stream stream) {
  auto* const on = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status{};
  check(cudaStreamIsCapturing(on, &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) return false;
  check(cudaMemcpyAsync(&to, from, sizeof to, cudaMemcpyDeviceToHost, on), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(on), "cudaStreamSynchronize");
  return true;
}
#endif

}  // namespace

// The bounds, and behind them the blocks' parts.
int64_t max_unpool2d_workspace(const Unpool2dProblem& p) {
  return (1 + int64_t{scan_blocks(p)}) * static_cast<int64_t>(sizeof(Bounds));
}

// Where it may not wait for the answer, a wrong index is not named: nothing is read or written through it.
bool max_unpool2d_misplaced(const Unpool2dProblem& p, const int64_t* indices, int64_t* found, void* workspace,
                            Stream stream) {
  auto* const bounds = static_cast<Bounds*>(workspace);
  const int parts = scan_blocks(p);
  CNNOPS_LAUNCH(max_unpool2d_scan_kernel, blocks(parts), kThreads, 0, stream, p, indices, bounds + 1);
  CNNOPS_LAUNCH(max_unpool2d_bounds_kernel, 1, kThreads, 0, stream, parts, bounds + 1, bounds);
  Bounds answer;
  if (!fetched(bounds, answer, stream) || answer.misplaced < 0) return false;
  *found = answer.index;
  return true;
}

void max_unpool2d_forward(const Unpool2dProblem& p, const void* x, const int64_t* indices, void* y,
                          const void* workspace, Stream stream) {
  const int64_t channels = p.channels_last ? std::min(kChannels, p.C) : 1;
  const int64_t columns = std::min(p.Q, kElements / channels);
  const Rectangle tile{std::min(p.P, kElements / (channels * columns)), columns, channels};
  const int64_t tiles = p.N * ceil_div(p.C, channels) * ceil_div(p.P, tile.rows) * ceil_div(p.Q, columns);
  const auto* const bounds = static_cast<const Bounds*>(workspace);
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(max_unpool2d_forward_kernel<T>, blocks(tiles), kThreads, 0, stream, p, tile, bounds,
                  static_cast<const T*>(x), indices, static_cast<T*>(y));
  });
}

void max_unpool2d_backward(const Unpool2dProblem& p, const void* dy, const int64_t* indices, void* dx, Stream stream) {
  const dim3 grid = blocks(ceil_div(p.N * p.C * p.H * p.W, kThreads));
  for_dtype(p.dtype, [&]<class T>(T) {
    CNNOPS_LAUNCH(max_unpool2d_backward_kernel<T>, grid, kThreads, 0, stream, p, static_cast<const T*>(dy), indices,
                  static_cast<T*>(dx));
  });
}

}  // namespace cnnops::cuda
