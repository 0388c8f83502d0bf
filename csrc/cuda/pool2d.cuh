// What the pools share: windows, vectors of channels, and the kernels that walk over them. A pool's kind says what it
// keeps of a window (Kind::Kept: start, add, merge, finish, write_taps) and what a window hands back to one of its
// inputs (Kind::Share: add); the kernels say who reads what:
//
//   pool2d_forward_nhwc     One thread owns kWidth channels of kRows outputs, one below the other; lanes run along the
//                           channels. With kTaps the windows are kTaps x kTaps, kStride rows apart, and a row that two
//                           of the thread's windows share is read once. x otherwise once for each window that has it,
//                           of which DRAM sees the first.
//   pool2d_forward_nchw     A block owns 64 outputs of a row in 32 channels. Rows of x pass through shared memory, read
//                           along W; offsets, which are NHWC, leave by way of it, 32 channels of a position together.
//   pool2d_forward_split    For few outputs of many inputs each: threads share a window's positions, each takes every
//                           so-many-th, and what they kept is merged in pairs.
//   pool2d_backward_nhwc    One thread owns kWidth channels of one input, and asks every window over it.
//   pool2d_backward_nchw    A block owns 64 inputs of a row in 32 channels, and has the windows over them, their
//                           gradients and offsets, in shared memory.
//
// Every sum and every choice has a fixed order, and each output is written once: every schedule gives the same bits.
#pragma once

#include <algorithm>

#include "dtype.h"
#include "launchers.h"
#include "pool2d_window.cuh"

namespace cnnops::cuda {

constexpr int kPoolThreads = 256, kSplitThreads = 512;

// Where the i-th `width` channels of an NHWC tensor lie, by image, row, column and first channel.
struct PoolSite {
  int64_t n, c;
  int row, col;
};
__device__ __forceinline__ PoolSite pool_site(int64_t i, int width, int64_t C, int rows, int cols) {
  const Split channel = divided(i, C / width), column = divided(channel.quotient, cols),
              row = divided(column.quotient, rows);
  return {row.quotient, channel.remainder * width, static_cast<int>(row.remainder), static_cast<int>(column.remainder)};
}

template <class Kind, class T, int kWidth, int kTaps, int kStride>
__global__ void __launch_bounds__(kPoolThreads, 2)
    pool2d_forward_nhwc_kernel(Pool pool, const T* x, T* y, typename Kind::Offset* offsets) {
  constexpr int kRows = kTaps > kStride ? 2 : 1;
  const int64_t i = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  const int P = pool.rows.out, Q = pool.cols.out, H = pool.rows.in, W = pool.cols.in;
  const PoolSite at = pool_site(i, kWidth, pool.C, static_cast<int>(ceil_div(P, kRows)), Q);
  if (at.n >= pool.N) return;
  const int p = at.row * kRows, q = at.col;
  x += at.n * H * W * pool.C + at.c;
  typename Kind::template Kept<kWidth> kept[kRows];
  const Window cols = pool.cols.window(q);
  if constexpr (kTaps == 0) {
    const Window rows = pool.rows.window(p);
    const int64_t step = pool.cols.dilation * pool.C;
    kept[0].start(first_tap(rows, cols));
    for (int r = rows.inside.begin; r < rows.inside.end; ++r) {
      const int64_t h = rows.first + int64_t{r} * pool.rows.dilation;
      const T* from = x + (h * W + cols.first + int64_t{cols.inside.begin} * pool.cols.dilation) * pool.C;
      for (int s = cols.inside.begin; s < cols.inside.end; ++s, from += step)
        kept[0].template add<T>(fetch<kWidth>(from), r * cols.taps + s);
    }
  } else {
    CNNOPS_UNROLL
    for (int o = 0; o < kRows; ++o) kept[o].start(first_tap(pool.rows.window(p + o < P ? p + o : p), cols));
    const int first_h = p * kStride - pool.rows.pad, rows = p + kRows <= P ? (kRows - 1) * kStride + kTaps : kTaps;
    CNNOPS_UNROLL
    for (int j = 0; j < (kRows - 1) * kStride + kTaps; ++j) {
      const int h = first_h + j;
      if (h < 0 || h >= H || j >= rows) continue;
      Raw<T, kWidth> row[kTaps];  // fetched together, so that they are under way together
      CNNOPS_UNROLL
      for (int s = 0; s < kTaps; ++s) {
        row[s] = {};
        if (s >= cols.inside.begin && s < cols.inside.end)
          row[s] = fetch<kWidth>(x + (int64_t{h} * W + cols.first + s) * pool.C);
      }
      CNNOPS_UNROLL
      for (int o = 0; o < kRows; ++o) {
        const int r = j - o * kStride;
        if (r < 0 || r >= kTaps) continue;
        CNNOPS_UNROLL
        for (int s = 0; s < kTaps; ++s)
          if (s >= cols.inside.begin && s < cols.inside.end) kept[o].template add<T>(row[s], r * kTaps + s);
      }
    }
  }
  CNNOPS_UNROLL
  for (int o = 0; o < kRows; ++o) {
    if (p + o >= P) continue;
    const int64_t out = ((at.n * P + p + o) * Q + q) * pool.C + at.c;
    kept[o].finish(pool, p + o, q);
    write_numbers(kept[o].value, y + out);
    if (offsets) kept[o].write_taps(offsets + out);
  }
}

template <class Kind, class T, int kWidth>
__global__ void __launch_bounds__(kPoolThreads)
    pool2d_backward_nhwc_kernel(Pool pool, const T* dy, const typename Kind::Offset* offsets, T* dx) {
  const int64_t i = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  const int P = pool.rows.out, Q = pool.cols.out;
  const PoolSite at = pool_site(i, kWidth, pool.C, pool.rows.in, pool.cols.in);
  if (at.n >= pool.N) return;
  float sum[kWidth] = {};
  const Span over_h = pool.rows.windows_over(at.row), over_w = pool.cols.windows_over(at.col);
  for (int p = over_h.begin; p < over_h.end; ++p) {
    const int r = pool.rows.tap_of(p, at.row);
    if (r < 0) continue;
    for (int q = over_w.begin; q < over_w.end; ++q) {
      const int s = pool.cols.tap_of(q, at.col);
      if (s < 0) continue;
      const int64_t out = ((at.n * P + p) * Q + q) * pool.C + at.c;
      const typename Kind::Share share(pool, p, q, r, s);
      const auto* const kept = Kind::kKeepsTaps ? offsets + out : nullptr;
      share.template add<T>(fetch<kWidth>(dy + out), kept, sum);
    }
  }
  write_numbers(sum, dx + i * kWidth);
}

// The tiles of the NCHW kernels.
constexpr int kTileChannels = 32, kTileColumns = 64, kTileItems = kTileChannels * kTileColumns / kPoolThreads;
// Of a row of inputs, and of a row of windows, what is in shared memory at once: a tile's where windows are of 3 x 3.
constexpr int kStagedInputs = 136, kStagedWindows = 72;

// Offsets of positions, kTileChannels each. The pitch spreads a channel's over the banks.
template <class O>
constexpr int kOffsetPitch = kTileChannels + 4 / static_cast<int>(sizeof(O));

template <class T, class O>
struct ForwardTile {
  alignas(16) T x[kTileChannels][kStagedInputs];
  O offsets[kTileColumns][kOffsetPitch<O>];
};

template <class T, class O>
struct BackwardTile {
  T dy[kTileChannels][kStagedWindows];
  O offsets[kStagedWindows][kOffsetPitch<O>];
};

// The tile of a block: image n, `channels` channels from c on, `columns` columns of a row from `first` on.
struct PoolTile {
  int64_t n, c;
  int row, first, channels, columns;

  static int64_t count(int64_t N, int64_t C, int rows, int cols) {
    return N * ceil_div(C, kTileChannels) * rows * ceil_div(cols, kTileColumns);
  }
  __device__ static PoolTile of(unsigned block, int64_t C, int rows, int cols) {
    const auto wide = static_cast<unsigned>(ceil_div(cols, kTileColumns)), high = static_cast<unsigned>(rows);
    const auto deep = static_cast<unsigned>(ceil_div(C, kTileChannels));
    const unsigned row = block / wide, channel = row / high;
    const int64_t c = int64_t{channel % deep} * kTileChannels;
    const int first = static_cast<int>(block % wide) * kTileColumns;
    return {channel / deep,
            c,
            static_cast<int>(row % high),
            first,
            lesser(C - c, kTileChannels),
            lesser(int64_t{cols} - first, kTileColumns)};
  }
  // This thread's column, which may lie beyond the tile, and its channels: from `channel` on, `step` apart. Lanes run
  // along the columns; where these are few, more channels go at once.
  struct Part {
    int column, channel, step;
  };
  __device__ Part part() const {
    int width = kTileColumns;
    while (width / 2 >= columns) width /= 2;
    const auto thread = static_cast<int>(threadIdx.x);
    return {thread % width, thread / width, kPoolThreads / width};
  }
};

template <class Kind, class T, int kWidth>
__global__ void __launch_bounds__(kPoolThreads, 2)
    pool2d_forward_nchw_kernel(Pool pool, const T* x, T* y, typename Kind::Offset* offsets) {
  using O = typename Kind::Offset;
  using Tile = ForwardTile<T, O>;
  CNNOPS_SHARED(Tile, shared);
  const int P = pool.rows.out, Q = pool.cols.out, H = pool.rows.in, W = pool.cols.in;
  const PoolTile tile = PoolTile::of(blockIdx.x, pool.C, P, Q);
  const PoolTile::Part part = tile.part();
  const int p = tile.row, q = tile.first + part.column;
  const bool mine = part.column < tile.columns;
  const Window rows = pool.rows.window(p), cols = pool.cols.window(mine ? q : tile.first);
  typename Kind::template Kept<1> kept[kTileItems];
  CNNOPS_UNROLL
  for (int item = 0; item < kTileItems; ++item) kept[item].start(first_tap(rows, cols));
  // The columns that any of the tile's windows has; windows begin and end in the order of their outputs.
  const Window left = pool.cols.window(tile.first), right = pool.cols.window(tile.first + tile.columns - 1);
  const int begin = greater(left.first, 0) / kWidth * kWidth;
  const int end = lesser(right.first + (int64_t{right.taps} - 1) * pool.cols.dilation + 1, W);
  for (int r = rows.inside.begin; r < rows.inside.end; ++r) {
    const int64_t h = rows.first + int64_t{r} * pool.rows.dilation;
    for (int64_t chunk = begin; chunk < end; chunk += kStagedInputs) {
      const int from = static_cast<int>(chunk), to = lesser(chunk + kStagedInputs, end);
      const int pieces = (to - from + kWidth - 1) / kWidth;
      __syncthreads();  // nobody reads what was here before
      for (int i = static_cast<int>(threadIdx.x); i < tile.channels * pieces; i += kPoolThreads) {
        const int channel = i / pieces, column = i % pieces * kWidth;
        const T* const source = x + (((tile.n * pool.C + tile.c + channel) * H + h) * W + from + column);
        *reinterpret_cast<Raw<T, kWidth>*>(&shared.x[channel][column]) = fetch<kWidth>(source);
      }
      __syncthreads();
      if (!mine) continue;
      const int stop = lesser(pool.cols.tap_from(cols, to), cols.inside.end);
      for (int s = greater(pool.cols.tap_from(cols, from), cols.inside.begin); s < stop; ++s) {
        const int column = static_cast<int>(cols.first + int64_t{s} * pool.cols.dilation - from);
        CNNOPS_UNROLL
        for (int item = 0; item < kTileItems; ++item) {
          const int channel = part.channel + item * part.step;
          if (channel < tile.channels) kept[item].template add<T>(shared.x[channel][column], r * cols.taps + s);
        }
      }
    }
  }
  CNNOPS_UNROLL
  for (int item = 0; item < kTileItems; ++item) {
    const int channel = part.channel + item * part.step;
    if (!mine || channel >= tile.channels) continue;
    kept[item].finish(pool, p, q);
    write_numbers(kept[item].value, y + ((tile.n * pool.C + tile.c + channel) * P + p) * Q + q);
    if (offsets) kept[item].write_taps(&shared.offsets[part.column][channel]);
  }
  if (!offsets) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < tile.channels * tile.columns; i += kPoolThreads) {
    const int column = i / tile.channels, channel = i % tile.channels;
    offsets[((tile.n * P + p) * Q + tile.first + column) * pool.C + tile.c + channel] = shared.offsets[column][channel];
  }
}

template <class Kind, class T>
__global__ void __launch_bounds__(kPoolThreads, 2)
    pool2d_backward_nchw_kernel(Pool pool, const T* dy, const typename Kind::Offset* offsets, T* dx) {
  using Tile = BackwardTile<T, typename Kind::Offset>;
  CNNOPS_SHARED(Tile, shared);
  const int P = pool.rows.out, Q = pool.cols.out, H = pool.rows.in, W = pool.cols.in;
  const PoolTile tile = PoolTile::of(blockIdx.x, pool.C, H, W);
  const PoolTile::Part part = tile.part();
  const int h = tile.row, w = tile.first + part.column;
  const bool mine = part.column < tile.columns;
  const Span over_h = pool.rows.windows_over(h), over_w = pool.cols.windows_over(mine ? w : tile.first);
  const int begin = pool.cols.windows_over(tile.first).begin;
  const int end = pool.cols.windows_over(tile.first + tile.columns - 1).end;
  float sum[kTileItems][1] = {};
  for (int p = over_h.begin; p < over_h.end; ++p) {
    const int r = pool.rows.tap_of(p, h);
    if (r < 0) continue;
    for (int64_t chunk = begin; chunk < end; chunk += kStagedWindows) {
      const int from = static_cast<int>(chunk), to = lesser(chunk + kStagedWindows, end);
      const int staged = tile.channels * (to - from);
      __syncthreads();  // nobody reads what was here before
      for (int i = static_cast<int>(threadIdx.x); i < staged; i += kPoolThreads) {
        const int channel = i / (to - from), column = i % (to - from);
        shared.dy[channel][column] = dy[((tile.n * pool.C + tile.c + channel) * P + p) * Q + from + column];
      }
      if constexpr (Kind::kKeepsTaps)
        for (int i = static_cast<int>(threadIdx.x); i < staged; i += kPoolThreads) {
          const int column = i / tile.channels, channel = i % tile.channels;
          shared.offsets[column][channel] = offsets[((tile.n * P + p) * Q + from + column) * pool.C + tile.c + channel];
        }
      __syncthreads();
      if (!mine) continue;
      const int stop = lesser(to, over_w.end);
      for (int q = greater(from, over_w.begin); q < stop; ++q) {
        const int s = pool.cols.tap_of(q, w);
        if (s < 0) continue;
        const typename Kind::Share share(pool, p, q, r, s);
        CNNOPS_UNROLL
        for (int item = 0; item < kTileItems; ++item) {
          const int channel = part.channel + item * part.step;
          if (channel < tile.channels)
            share.template add<T>(shared.dy[channel][q - from], &shared.offsets[q - from][channel], sum[item]);
        }
      }
    }
  }
  CNNOPS_UNROLL
  for (int item = 0; item < kTileItems; ++item) {
    const int channel = part.channel + item * part.step;
    if (mine && channel < tile.channels)
      write_numbers(sum[item], dx + ((tile.n * pool.C + tile.c + channel) * H + h) * W + w);
  }
}

// How the threads of a block of the split kernel lie: `items` of them have outputs of their own (NHWC: neighbouring
// channels of one position; NCHW: neighbours in memory), each in `shares`.
struct Shares {
  int items, shares;
};

template <class Kind, class T, int kWidth, bool kNhwc>
__global__ void __launch_bounds__(kSplitThreads)
    pool2d_forward_split_kernel(Pool pool, Shares shape, const T* x, T* y, typename Kind::Offset* offsets) {
  using Kept = typename Kind::template Kept<kWidth>;
  using Parts = Kept[kSplitThreads];
  CNNOPS_SHARED(Parts, parts);
  const int P = pool.rows.out, Q = pool.cols.out, H = pool.rows.in, W = pool.cols.in;
  const auto thread = static_cast<int>(threadIdx.x);
  // Lanes run along what lies together: channels, or positions.
  const int item = kNhwc ? thread % shape.items : thread / shape.shares;
  const int share = kNhwc ? thread / shape.items : thread % shape.shares;
  int64_t n, c, out;
  int p, q;
  if constexpr (kNhwc) {
    const int64_t width = int64_t{kWidth} * shape.items;
    const Split tile = divided(blockIdx.x, ceil_div(pool.C, width)), column = divided(tile.quotient, Q);
    const Split row = divided(column.quotient, P);
    n = row.quotient, c = tile.remainder * width + item * kWidth;
    p = static_cast<int>(row.remainder), q = static_cast<int>(column.remainder);
    out = tile.quotient * pool.C + c;
  } else {
    out = int64_t{blockIdx.x} * shape.items + item;
    const Split column = divided(out, Q), row = divided(column.quotient, P), channel = divided(row.quotient, pool.C);
    n = channel.quotient, c = channel.remainder;
    p = static_cast<int>(row.remainder), q = static_cast<int>(column.remainder);
  }
  const bool mine = kNhwc ? c < pool.C : n < pool.N;
  Kept kept;
  if (mine) {
    const Window rows = pool.rows.window(p), cols = pool.cols.window(q);
    const int width = cols.inside.size();
    kept.start(first_tap(rows, cols));
    if (rows.inside.size() > 0 && width > 0) {
      const T* const plane = kNhwc ? x + n * H * W * pool.C + c : x + (n * pool.C + c) * H * W;
      const int64_t pixel = kNhwc ? pool.C : 1;
      const int step_r = shape.shares / width, step_s = shape.shares % width;
      int r = rows.inside.begin + share / width, s = cols.inside.begin + share % width;
      while (r < rows.inside.end) {
        const int64_t h = rows.first + int64_t{r} * pool.rows.dilation;
        const int64_t w = cols.first + int64_t{s} * pool.cols.dilation;
        kept.template add<T>(fetch<kWidth>(plane + (h * W + w) * pixel), r * cols.taps + s);
        r += step_r, s += step_s;
        if (s >= cols.inside.end) r += 1, s -= width;
      }
    }
  } else {
    kept.start(0);
  }
  const int slot = share * shape.items + item;
  parts[slot] = kept;
  for (int half = shape.shares / 2; half > 0; half /= 2) {
    __syncthreads();
    if (share < half) parts[slot].merge(parts[slot + half * shape.items]);
  }
  __syncthreads();
  // The first threads write, so that outputs that are neighbours leave together.
  if constexpr (kNhwc) {
    if (share > 0 || !mine) return;
    kept = parts[slot];
    kept.finish(pool, p, q);
    write_numbers(kept.value, y + out);
    if (offsets) kept.write_taps(offsets + out);
  } else {
    const int64_t other = int64_t{blockIdx.x} * shape.items + thread;
    if (thread >= shape.items || other >= pool.outputs()) return;
    const Split column = divided(other, Q), row = divided(column.quotient, P), channel = divided(row.quotient, pool.C);
    p = static_cast<int>(row.remainder), q = static_cast<int>(column.remainder);
    kept = parts[thread];
    kept.finish(pool, p, q);
    write_numbers(kept.value, y + other);
    if (offsets) kept.write_taps(offsets + ((channel.quotient * P + p) * Q + q) * pool.C + channel.remainder);
  }
}

// f(width) for the channels (or columns) that threads take together: as many as fill 16 bytes, or 1. Offsets of 4 bytes
// count as well: their sectors, too, are to be moved whole.
template <class Kind, class T, class F>
void with_width(int64_t extent, const F& f) {
  constexpr int kBytes = std::max<int>(sizeof(T), Kind::kKeepsTaps ? sizeof(typename Kind::Offset) : 1);
  if (extent % (16 / kBytes) == 0)
    f(std::integral_constant<int, 16 / kBytes>{});
  else
    f(std::integral_constant<int, 1>{});
}

template <class Kind, class T>
void pool2d_forward(const Pool2dProblem& p, const T* x, T* y, typename Kind::Offset* offsets, Stream stream) {
  const Pool pool(p);
  const int64_t P = p.P, Q = p.Q, positions = P * Q * p.N;
  // Of an adaptive window, about.
  const int64_t taps = p.R ? int64_t{p.R} * p.S : ceil_div(p.H, P) * ceil_div(p.W, Q);
  constexpr int64_t kManyInputs = 32;
  if (int64_t{p.H} * p.W >= kManyInputs * P * Q && taps >= kManyInputs) {
    if (!p.channels_last) {
      constexpr int kFewShares = 16;  // with as many outputs a block
      const int shares = taps > int64_t{kFewShares} * kFewShares ? kSplitThreads : kFewShares;
      const Shares shape{kSplitThreads / shares, shares};
      constexpr auto kernel = pool2d_forward_split_kernel<Kind, T, 1, false>;
      CNNOPS_LAUNCH(kernel, blocks(ceil_div(pool.outputs(), shape.items)), kSplitThreads, 0, stream, pool, shape, x, y,
                    offsets);
      return;
    }
    with_width<Kind, T>(p.C, [&](auto width) {
      constexpr int64_t kDeep = 16;  // positions a thread, beyond which fewer channels share a block
      int items = 1;
      while (items < 32 && items * width < p.C) items *= 2;
      while (items * width * static_cast<int>(sizeof(T)) > 32 && taps * items > kDeep * kSplitThreads) items /= 2;
      const Shares shape{items, kSplitThreads / items};
      constexpr auto kernel = pool2d_forward_split_kernel<Kind, T, width, true>;
      CNNOPS_LAUNCH(kernel, blocks(positions * ceil_div(p.C, int64_t{items} * width)), kSplitThreads, 0, stream, pool,
                    shape, x, y, offsets);
    });
    return;
  }
  if (!p.channels_last) {
    with_width<Kind, T>(p.W, [&](auto width) {
      constexpr auto kernel = pool2d_forward_nchw_kernel<Kind, T, width>;
      CNNOPS_LAUNCH(kernel, blocks(PoolTile::count(p.N, p.C, p.P, p.Q)), kPoolThreads, 0, stream, pool, x, y, offsets);
    });
    return;
  }
  with_width<Kind, T>(p.C, [&](auto width) {
    const auto launch = [&](auto taps, auto stride) {
      constexpr auto kernel = pool2d_forward_nhwc_kernel<Kind, T, width, taps, stride>;
      const int64_t strips = taps > stride ? ceil_div(P, 2) : P;
      const int64_t threads = p.N * strips * Q * (p.C / width);
      CNNOPS_LAUNCH(kernel, blocks(ceil_div(threads, kPoolThreads)), kPoolThreads, 0, stream, pool, x, y, offsets);
    };
    const auto is = [&](int taps, int stride) {
      return p.R == taps && p.S == taps && p.stride_h == stride && p.dilation_h == 1 && p.dilation_w == 1;
    };
    using std::integral_constant;
    if constexpr (width > 1 && Kind::kUnrolls) {
      if (is(2, 2)) return launch(integral_constant<int, 2>{}, integral_constant<int, 2>{});
      if (is(3, 2)) return launch(integral_constant<int, 3>{}, integral_constant<int, 2>{});
    }
    launch(integral_constant<int, 0>{}, integral_constant<int, 0>{});
  });
}

template <class Kind, class T>
void pool2d_backward(const Pool2dProblem& p, const T* dy, const typename Kind::Offset* offsets, T* dx, Stream stream) {
  const Pool pool(p);
  if (!p.channels_last) {
    constexpr auto kernel = pool2d_backward_nchw_kernel<Kind, T>;
    CNNOPS_LAUNCH(kernel, blocks(PoolTile::count(p.N, p.C, p.H, p.W)), kPoolThreads, 0, stream, pool, dy, offsets, dx);
    return;
  }
  with_width<Kind, T>(p.C, [&](auto width) {
    constexpr auto kernel = pool2d_backward_nhwc_kernel<Kind, T, width>;
    CNNOPS_LAUNCH(kernel, blocks(ceil_div(pool.inputs() / width, kPoolThreads)), kPoolThreads, 0, stream, pool, dy,
                  offsets, dx);
  });
}

}  // namespace cnnops::cuda
