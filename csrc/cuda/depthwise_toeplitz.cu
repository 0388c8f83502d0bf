// Depthwise convolution with large filters, on the tensor cores: stride 1, 16-bit numbers, a filter for each channel.
//
//   y[n,p,q,c]     = sum over (r,s) of x[n, p - pad + r, q - pad + s, c] * weight[c,r,s]
//   dx[n,h,w,c]    = the same of dy, with filters turned around and R - 1 - pad and S - 1 - pad for the padding
//   dweight[c,r,s] = sum over (n,h,w) of dy[n, h + pad - r, w + pad - s, c] * x[n,h,w,c]
//
// For one channel and one row of taps that is a product with a banded Toeplitz matrix,
//
//   y[p, q + i] += sum over j of x[p - pad + r, q - pad + j] * band[j, i],  band[j, i] = weight[r, j - i] or 0,
//
// of 16 rows p and 8 columns i: of all widths of mma.sync's, 8 outputs leave the least of the band zero, S of each 16
// columns j for S <= 9, 13 of 32 and 31 of 48. The same band serves all columns of a tile, whose windows overlap.
// dweight is such a product too, of the same windows of dy: a tile's rows of x stand for the rows of taps, and the
// turned taps (r,s) for the outputs (p,q).
//
// Layout     x, dy [N,H,W,C]; weight [C,R,S]. In shared memory each channel's part of x is a plane [row][column], so
//            that ldmatrix finds columns side by side: numbers are transposed on their way through registers.
// Ownership  One block owns a kSide x kSide tile of outputs of 16 channels; each of its 8 warps two channels. Of both
//            gradients it owns several tiles of dx, one after another, and over all of them one slab of sums of
//            dweight, in registers; a second kernel adds the slabs in order.
// Traffic    x once for each tile whose taps read it, (kSide + R - 1) * (kSide + S - 1) pixels less those beside x;
//            weight once for each tile; y once. Both gradients: dy like x, x and dx once, weight and a slab once for
//            each block.
//            Where C is an odd multiple of 8, every second pixel begins in the midst of a sector, and a tile's 32 bytes
//            are parts of two. Any tile but one of all channels has such parts at its ends, and a channel's pixels are
//            of one plane, so that L2 moves up to 5 sectors for 3 (C = 24). DRAM does not: the tiles of a pixel's
//            channels are neighbours in the grid.
//
// A zero of the band times an infinity that no tap of the output reads would be NaN where torch has none. So what is
// not finite is summed again, over its own taps.

#include <cmath>
#include <type_traits>

#include "conv2d_kernels.h"
#include "depthwise_toeplitz.h"
#include "dtype.h"
#include "epilogue.cuh"
#include "padded_slabs.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kWarps = kToeplitzWarps, kThreads = 32 * kWarps, kChannels = kToeplitzChannels;
constexpr int kRows = 16;      // of a fragment, and of sums that are staged together
constexpr int kMostSteps = 3;  // of 16 columns, for 8 outputs' kMostToeplitzTaps
constexpr int kResident = 2;   // blocks on a multiprocessor, as the compiler is told

// x [N,H,W,C] gives y [N,P,Q,C].
struct Correlation {
  int64_t N;
  int C, H, W, P, Q, R, S, pad_h, pad_w;
  bool turned;  // filters, by 180 degrees

  static Correlation forward(const Conv2dProblem& p) {
    return {p.N, p.C, p.H, p.W, p.P, p.Q, p.R, p.S, p.pad_h, p.pad_w, false};
  }
  static Correlation backward_input(const Conv2dProblem& p) {
    return {p.N, p.C, p.P, p.Q, p.H, p.W, p.R, p.S, p.R - 1 - p.pad_h, p.S - 1 - p.pad_w, true};
  }
};

__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

// A tile's place: its image, its first output and channel, and its number among the tiles of a channel.
struct Place {
  int64_t n, tile;
  int p, q, c;

  template <int kSide>
  static __device__ Place of(const Correlation& conv, int64_t tile, int64_t channels) {
    const Split column = split(tile, ceil_div(conv.Q, kSide)), row = split(column.quotient, ceil_div(conv.P, kSide));
    return {row.quotient, tile, static_cast<int>(row.remainder) * kSide, static_cast<int>(column.remainder) * kSide,
            static_cast<int>(channels) * kChannels};
  }
};

// The channels of an input's pixel, counted from the tile's first tap and channel, or null beside x.
template <class T>
__device__ __forceinline__ const T* pixel_at(const Correlation& conv, const Place& at, const T* x, int row,
                                             int column) {
  const int h = at.p - conv.pad_h + row, w = at.q - conv.pad_w + column;
  if (h < 0 || h >= conv.H || w < 0 || w >= conv.W) return nullptr;
  return x + ((at.n * conv.H + h) * conv.W + w) * conv.C + at.c;
}

// Fills the planes, with zeros beside x and beyond the columns that taps read.
template <class T, int kSide>
__device__ void load_planes(const Correlation& conv, const Place& at, const ToeplitzLayout<kSide>& layout, const T* x,
                            T* planes) {
  const int thread = static_cast<int>(threadIdx.x), pitch = layout.pitch, plane = layout.rows * pitch;
  const auto find = [&](int row, int column) -> const T* {
    return column < kSide + conv.S - 1 ? pixel_at(conv, at, x, row, column) : nullptr;
  };
  if (conv.C % kVector<T> != 0) {
    for (int i = thread; i < plane * kChannels; i += kThreads) {
      const int c = i % kChannels, row = i / kChannels / pitch, column = i / kChannels - row * pitch;
      const T* const from = at.c + c < conv.C ? find(row, column) : nullptr;
      planes[layout.plane(c) + i / kChannels] = from ? from[c] : T{};
    }
    return;
  }
  // A thread has 8 channels of two neighbouring pixels, which are one word of each plane. kTogether pairs are under way
  // at a time.
  constexpr int kTogether = 4;
  const int c = thread % 2 * kVector<T>, down = kThreads / pitch, across = kThreads - down * pitch;
  const bool there = at.c + c < conv.C;
  int row = thread / 2 * 2 / pitch, column = thread / 2 * 2 - row * pitch;
  while (row < layout.rows) {
    uint4 pixels[kTogether][2];
    T* to[kTogether];
    CNNOPS_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      to[i] = row < layout.rows ? planes + layout.plane(c) + row * pitch + column : nullptr;
      CNNOPS_UNROLL
      for (int e = 0; e < 2; ++e) {
        const T* const from = there && to[i] ? find(row, column + e) : nullptr;
        pixels[i][e] = from ? *reinterpret_cast<const uint4*>(from + c) : uint4{0, 0, 0, 0};
      }
      row += down, column += across;
      if (column >= pitch) ++row, column -= pitch;
    }
    CNNOPS_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (!to[i]) continue;
      const uint32_t left[] = {pixels[i][0].x, pixels[i][0].y, pixels[i][0].z, pixels[i][0].w};
      const uint32_t right[] = {pixels[i][1].x, pixels[i][1].y, pixels[i][1].z, pixels[i][1].w};
      CNNOPS_UNROLL
      for (int j = 0; j < 4; ++j) {
        auto* const words = reinterpret_cast<uint32_t*>(to[i] + 2 * j * plane);
        words[0] = (left[j] & 0xffff) | right[j] << 16;
        words[plane / 2] = left[j] >> 16 | (right[j] & 0xffff0000);
      }
    }
  }
}

// Filters, turned or not. `filters` is zero before. As in memory, threads have taps side by side.
template <class T>
__device__ void load_filters(const Correlation& conv, int first, const ToeplitzRows& rows, const T* weight,
                             T* filters) {
  const int thread = static_cast<int>(threadIdx.x), taps = conv.R * conv.S;
  const int next = kThreads / taps, down = kThreads % taps / conv.S, across = kThreads % taps % conv.S;
  int c = thread / taps, r = thread % taps / conv.S, s = thread % taps % conv.S;
  for (int64_t tap = int64_t{first} * taps + thread; c < kChannels && first + c < conv.C; tap += kThreads) {
    T* const row = filters + rows.row(c, conv.turned ? conv.R - 1 - r : r);
    T* const to = row + (conv.turned ? conv.S - 1 - s : s);
    to[0] = to[rows.second()] = weight[tap];
    c += next, r += down, s += across;
    if (s >= conv.S) s -= conv.S, ++r;
    if (r >= conv.R) r -= conv.R, ++c;
  }
}

// A tile of the pixels x [N,P,Q,C], with zeros beside them; `rows` is zero beside them before.
template <class T>
__device__ void load_pixels(const Correlation& conv, const Place& at, const ToeplitzRows& layout, const T* x, T* rows) {
  constexpr int kSide = kSmallToeplitzSide;
  static_assert(kThreads == kSide * kSide / 2 * (kChannels / kVector<T>));
  const auto find = [&](int row, int column) -> const T* {
    const int h = at.p + row, w = at.q + column;
    return h < conv.P && w < conv.Q ? x + ((at.n * conv.P + h) * conv.Q + w) * conv.C + at.c : nullptr;
  };
  const int thread = static_cast<int>(threadIdx.x);
  if (conv.C % kVector<T> != 0) {
    for (int i = thread; i < kSide * kSide * kChannels; i += kThreads) {
      const int c = i % kChannels, row = i / kChannels / kSide, column = i / kChannels % kSide;
      const T* const from = at.c + c < conv.C ? find(row, column) : nullptr;
      T* const to = rows + layout.row(c, row) + column;
      to[0] = to[layout.second()] = from ? from[c] : T{};
    }
    return;
  }
  // A thread has 8 channels of two neighbouring pixels, which are one word of the first copy.
  const int c = thread % 2 * kVector<T>, row = thread / kSide, column = thread % kSide / 2 * 2;
  uint4 pixels[2];
  CNNOPS_UNROLL
  for (int e = 0; e < 2; ++e) {
    const T* const from = at.c + c < conv.C ? find(row, column + e) : nullptr;
    pixels[e] = from ? *reinterpret_cast<const uint4*>(from + c) : uint4{0, 0, 0, 0};
  }
  const uint32_t left[] = {pixels[0].x, pixels[0].y, pixels[0].z, pixels[0].w};
  const uint32_t right[] = {pixels[1].x, pixels[1].y, pixels[1].z, pixels[1].w};
  CNNOPS_UNROLL
  for (int j = 0; j < kVector<T>; ++j) {
    const int shift = j % 2 * 16;
    const uint32_t one = left[j / 2] >> shift & 0xffff, other = right[j / 2] >> shift & 0xffff;
    T* const to = rows + layout.row(c + j, row) + column;
    *reinterpret_cast<uint32_t*>(to) = one | other << 16;
    to[layout.second()] = T{static_cast<uint16_t>(one)};
    to[layout.second() + 1] = T{static_cast<uint16_t>(other)};
  }
}

__device__ __forceinline__ uint32_t load_word(const uint32_t* row, int word, int words) {
  return static_cast<unsigned>(word) < static_cast<unsigned>(words) ? row[word] : 0;
}

// This thread's numbers of 16 rows j of a band, a fragment of B: each word has those of two rows j for one output i,
// which are neighbours in the band's row. `first` is the place of the first word in the row.
__device__ __forceinline__ void load_band(uint32_t (&band)[2], const uint32_t* row, int first, int words) {
  band[0] = load_word(row, first, words), band[1] = load_word(row, first + 4, words);
}

// One output, by its own taps alone.
template <class T, int kSide>
__device__ float sum_of(const Correlation& conv, const Place& at, const ToeplitzLayout<kSide>& layout, const T* x,
                        const T* filters, int p, int q, int c) {
  float sum = 0;
  for (int r = 0; r < conv.R && !std::isnan(sum); ++r)
    for (int s = 0; s < conv.S; ++s) {
      const T* const from = pixel_at(conv, at, x, p + r, q + s);
      sum += (from ? to_float(from[c]) : 0.f) * to_float(filters[layout.taps.row(c, r) + s]);
    }
  return sum;
}

// This warp's sums of its two channels: kGroups fragments of 16 rows, kAcross of 8 columns. Two groups' channels come
// one after another; one group's together, so that either way ldmatrix has 32 rows. A band has at most kHalves times 8
// rows.
template <class T, int kGroups, int kAcross, int kHalves>
class Sums {
 public:
  // sum[m, 8 b + i] += sum over r and j of plane[m + r, 8 b + j] * row_r[j - i], of all rows that a channel has. Planes
  // have the rows up to m = last, beyond which nobody wants the sums.
  __device__ void multiply(const T* planes, int plane, int pitch, int last, const T* bands, const ToeplitzRows& rows,
                           int steps) {
    constexpr int kTogether = 2 / kGroups, kMostRead = kAcross + kHalves - 1;
    CNNOPS_UNROLL
    for (int pass = 0; pass < kGroups; ++pass) {
      const int m = kTogether == 1 ? lane() : lane() % kRows;
      const T* from = planes + (kTogether == 1 ? pass : lane() / kRows) * plane + (m < last ? m : last) * pitch;
      // In a band, each output's numbers begin one row after those of the output before: every second output's in the
      // upper half of a word, but for the second copy.
      const T* row = bands + rows.row(warp_of() * 2 + pass, 0) + lane() / 4 % 2 * rows.copy();
      const int first = lane() % 4 - lane() / 8;
      CNNOPS_NO_UNROLL
      for (int r = 0; r < rows.rows; ++r, from += pitch, row += rows.row(0, 1)) {
        uint32_t x[kMostRead][4];  // of 8 columns: both halves of 16 rows, twice
        CNNOPS_UNROLL
        for (int step = 0; step < (kHalves + 1) / 2; ++step) {
          if (step >= steps) continue;
          uint32_t band[kTogether][2];
          CNNOPS_UNROLL
          for (int i = 0; i < kTogether; ++i)
            load_band(band[i], reinterpret_cast<const uint32_t*>(row + i * rows.row(1, 0)), step * 8 + first,
                      rows.words);
          CNNOPS_UNROLL
          for (int eight = step ? kAcross + 2 * step - 1 : 0; eight <= kAcross + 2 * step; ++eight)
            if (eight < kMostRead) ldmatrix_x4<false>(x[eight], from + eight * 8);
          CNNOPS_UNROLL
          for (int b = 0; b < kAcross; ++b) {
            const bool whole = 2 * step + 1 < kHalves;  // else the band's lower half is zero
            const uint32_t (&left)[4] = x[b + 2 * step], (&right)[4] = x[b + 2 * step + whole];
            CNNOPS_UNROLL
            for (int i = 0; i < 2; ++i) {
              const uint32_t a[4] = {left[2 * i], left[2 * i + 1], whole ? right[2 * i] : 0,
                                     whole ? right[2 * i + 1] : 0};
              if constexpr (kTogether == 1)
                mma_m16n8k16<T>(sum_[pass][i][b], a, band[0][0], band[0][1]);
              else
                mma_m16n8k16<T>(sum_[i][0][b], a, band[i][0], band[i][1]);
            }
          }
        }
      }
    }
  }

  // f(m, column, channel of the warp's two, sum) for all of this thread's.
  template <class F>
  __device__ void for_each(const F& f) const {
    CNNOPS_UNROLL
    for (int channel = 0; channel < 2; ++channel) {
      CNNOPS_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        CNNOPS_UNROLL
        for (int i = 0; i < kEach; ++i)
          f(group * kRows + row(i), column(i), channel, sum_[channel][group][i / 4][i % 4]);
      }
    }
  }

  // Brings the sums of 16 rows to `stage`; exact(row, column, channel) is asked for those that are not finite.
  template <class Exact>
  __device__ void store(float* stage, int group, const Exact& exact) const {
    bool finite = true;
    CNNOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const float one = sum_[0][group][i / 4][i % 4], other = sum_[1][group][i / 4][i % 4];
      *reinterpret_cast<float2*>(at(stage, i)) = make_float2(one, other);
      finite = finite && std::isfinite(one) && std::isfinite(other);
    }
    if (finite) return;
    CNNOPS_NO_UNROLL
    for (int i = 0; i < 2 * kEach; ++i) {
      float& sum = at(stage, i / 2)[i % 2];
      if (!std::isfinite(sum)) sum = exact(row(i / 2), column(i / 2), warp_of() * 2 + i % 2);
    }
  }

 private:
  static constexpr int kEach = kAcross * 4;

  // Where the i-th of this thread's sums of 16 rows is.
  static __device__ int row(int i) { return lane() / 4 + i % 4 / 2 * 8; }
  static __device__ int column(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }
  static __device__ float* at(float* stage, int i) {
    return stage + ToeplitzLayout<kAcross * 8>::sum(row(i), column(i)) + warp_of() * 2;
  }

  float sum_[2][kGroups][kAcross][4] = {};
};

// As Sums, where 7 rows of taps and 8 columns suffice, of a band of 3 times 8 rows. Two neighbouring rows of bands are
// one operand of 16 rows, 8 of each, and 8 rows of a plane the other: sum[8 u + i][n] is of the taps n - u and i.
template <class T>
class FewSums {
 public:
  static constexpr int kMostRows = 7, kMostColumns = 8;

  __device__ void multiply(const T* planes, int plane, int pitch, const T* bands, const ToeplitzRows& rows) {
    const T* row = bands + rows.row(warp_of() * 2, 0) + lane() / 4 % 2 * rows.copy();
    const T* from = planes + lane() % 8 * pitch + (lane() < 16 ? lane() / 8 : 2) * 8;  // the third 8 columns twice
    const int first = lane() % 4 - lane() / 8;
    CNNOPS_NO_UNROLL
    for (int r = 0; r < rows.rows; r += 2, from += 2 * pitch, row += rows.row(0, 2)) {
      CNNOPS_UNROLL
      for (int channel = 0; channel < 2; ++channel) {
        uint32_t columns[4], upper[2], lower[2], last[2];
        ldmatrix_x4<false>(columns, from + channel * plane);
        const auto* const words = reinterpret_cast<const uint32_t*>(row + rows.row(channel, 0));
        const auto* const next = words + rows.row(0, 1) / 2;
        load_band(upper, words, first, rows.words);
        load_band(lower, next, first, rows.words);
        last[0] = load_word(words, first + 8, rows.words), last[1] = load_word(next, first + 8, rows.words);
        const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]}, rest[4] = {last[0], last[1], 0, 0};
        mma_m16n8k16<T>(sum_[channel], a, columns[0], columns[1]);
        mma_m16n8k16<T>(sum_[channel], rest, columns[2], 0);
      }
    }
  }

  // f(m, column, channel of the warp's two, sum) for all of this thread's.
  template <class F>
  __device__ void for_each(const F& f) const {
    CNNOPS_UNROLL
    for (int channel = 0; channel < 2; ++channel) {
      const float (&sum)[4] = sum_[channel];
      const float neighbour = __shfl_down_sync(~0u, sum[2], 1);
      const int m = lane() % 4 * 2, column = lane() / 4;
      f(m, column, channel, sum[0] + sum[3]);
      if (m + 1 < kMostRows) f(m + 1, column, channel, sum[1] + neighbour);
    }
  }

 private:
  float sum_[2][4] = {};
};

// A block's shared memory.
template <class T, int kSide>
struct Shared {
  using Layout = ToeplitzLayout<kSide>;
  const Layout layout;
  T *planes, *filters, *pixels;
  float* stage;

  __device__ Shared(char* shared, const Correlation& conv, bool dweight)
      : layout(conv.R, conv.S, dweight),
        planes(reinterpret_cast<T*>(shared)),
        filters(reinterpret_cast<T*>(shared + layout.filters)),
        pixels(reinterpret_cast<T*>(shared + layout.x)),
        stage(reinterpret_cast<float*>(shared)) {}

  // Zeros for what comes behind the planes.
  __device__ void clear() const {
    const int pieces = static_cast<int>((layout.end - layout.filters) / sizeof(uint4));
    for (int i = static_cast<int>(threadIdx.x); i < pieces; i += kThreads)
      reinterpret_cast<uint4*>(filters)[i] = uint4{0, 0, 0, 0};
  }
  // This warp's two channels' planes, and how far they are apart.
  __device__ const T* planes_of_warp() const { return planes + layout.plane(warp_of() * 2); }
  __device__ int plane() const { return layout.rows * layout.pitch; }
};

// Writes a tile's sums, 16 rows after another, in the planes' place.
template <class T, int kSide, bool kMoments, class Sums>
__device__ void write_tile(const Correlation& conv, const Place& at, const Shared<T, kSide>& shared,
                           const Epilogue& epilogue, const Sums& sums, const T* x, T* y,
                           Moments (&moments)[kVector<T>]) {
  using Layout = ToeplitzLayout<kSide>;
  const int first = warp_of() * Layout::kWarpRows;  // of the rows that this warp writes
  CNNOPS_UNROLL
  for (int group = 0; group < kSide / kRows; ++group) {
    const int p = group * kRows;
    __syncthreads();  // nobody reads the planes, or the sums before, any more
    sums.store(shared.stage, group, [&](int row, int column, int c) {
      if (at.p + p + row >= conv.P || at.q + column >= conv.Q || at.c + c >= conv.C) return 0.f;
      return sum_of(conv, at, shared.layout, x, shared.filters, p + row, column, c);
    });
    __syncthreads();
    const auto row_of = [&](int i) -> int64_t {
      const int row = at.p + p + first + i / kSide, column = at.q + i % kSide;
      return row < conv.P && column < conv.Q ? ((at.n * conv.P + row) * conv.Q + column) * conv.C : -1;
    };
    write_rows<T, kChannels, kMoments>(epilogue, shared.stage + Layout::sum(first, 0), Layout::kPixelFloats,
                                       Layout::kWarpRows * kSide, row_of, at.c, conv.C, conv.C % kVector<T> == 0, y,
                                       moments);
  }
}

template <class T, int kSide>
__global__ void __launch_bounds__(kThreads, kResident)
    conv2d_toeplitz_kernel(Correlation conv, Epilogue epilogue, const T* x, const T* weight, T* y, float* partial) {
  CNNOPS_DYNAMIC_SHARED(char, memory);
  const Shared<T, kSide> shared(memory, conv, false);
  const Split block = split(blockIdx.x, ceil_div(conv.C, kChannels));
  const Place at = Place::of<kSide>(conv, block.quotient, block.remainder);
  shared.clear();
  load_planes<T, kSide>(conv, at, shared.layout, x, shared.planes);
  __syncthreads();  // the filters are zero
  load_filters(conv, at.c, shared.layout.taps, weight, shared.filters);
  __syncthreads();
  Sums<T, kSide / kRows, kSide / 8, 2 * kMostSteps> sums;
  sums.multiply(shared.planes_of_warp(), shared.plane(), shared.layout.pitch, kSide - 1, shared.filters,
                shared.layout.taps, shared.layout.steps);
  Moments moments[kVector<T>];
  if (!partial) {
    write_tile<T, kSide, false>(conv, at, shared, epilogue, sums, x, y, moments);
    return;
  }
  write_tile<T, kSide, true>(conv, at, shared, epilogue, sums, x, y, moments);
  merge_warps<T, kChannels, kWarps>(moments, memory, at.c, conv.C, conv.C, partial + at.tile * 3 * conv.C);
}

// dx, unless it is null, and slabs[part][c][r,s] of dweight, from dy and x. `conv` gives dx of dy; filters have at most
// kTapGroups * 16 rows and kTapEights * 8 columns, or FewSums' where those are one eight.
template <class T, int kTapGroups, int kTapEights>
__global__ void __launch_bounds__(kThreads, kTapGroups == 1 ? kResident : 1)
    conv2d_toeplitz_backward_kernel(Correlation conv, ToeplitzParts parts, const T* dy, const T* x, const T* weight,
                                    T* dx, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(char, memory);
  constexpr int kSide = kSmallToeplitzSide;
  const Shared<T, kSide> shared(memory, conv, true);
  const auto& layout = shared.layout;
  const Split block = split(blockIdx.x, ceil_div(conv.C, kChannels));
  const int first = static_cast<int>(block.remainder) * kChannels;
  shared.clear();
  if (dx) {
    __syncthreads();
    load_filters(conv, first, layout.taps, weight, shared.filters);
  }

  // sum over pixels (i, j) of a tile of plane[i + r, j + s] * x[i, j] is dweight of the turned tap (r, s): as dx is,
  // with rows of x for rows of taps.
  std::conditional_t<kTapEights == 1, FewSums<T>, Sums<T, kTapGroups, kTapEights, kSide / 8 + 1>> dweight;
  Moments nothing[kVector<T>];
  const int64_t begin = block.quotient * parts.each, after = begin + parts.each;
  for (int64_t tile = begin; tile < after && tile < parts.tiles; ++tile) {
    const Place at = Place::of<kSide>(conv, tile, block.remainder);
    __syncthreads();  // nobody reads the tile before any more
    load_planes<T, kSide>(conv, at, layout, dy, shared.planes);
    load_pixels(conv, at, layout.pixels, x, shared.pixels);
    __syncthreads();
    if constexpr (kTapEights == 1)
      dweight.multiply(shared.planes_of_warp(), shared.plane(), layout.pitch, shared.pixels, layout.pixels);
    else
      dweight.multiply(shared.planes_of_warp(), shared.plane(), layout.pitch, conv.R - 1, shared.pixels, layout.pixels,
                       (kSide + 7 + 15) / 16);
    if (!dx) continue;
    Sums<T, 1, kSide / 8, (kTapEights * 8 + 7 + 15) / 16 * 2> sums;
    sums.multiply(shared.planes_of_warp(), shared.plane(), layout.pitch, kSide - 1, shared.filters, layout.taps,
                  layout.steps);
    write_tile<T, kSide, false>(conv, at, shared, {}, sums, dy, dx, nothing);
  }

  __syncthreads();  // nobody reads the planes any more: dweight takes their place
  const int taps = conv.R * conv.S;
  dweight.for_each([&](int r, int s, int channel, float sum) {
    if (r < conv.R && s < conv.S)
      shared.stage[(warp_of() * 2 + channel) * taps + (conv.R - 1 - r) * conv.S + conv.S - 1 - s] = sum;
  });
  __syncthreads();
  const int there = conv.C - first < kChannels ? conv.C - first : kChannels;
  for (int i = static_cast<int>(threadIdx.x); i < there * taps; i += kThreads)
    slabs[(block.quotient * conv.C + first) * taps + i] = shared.stage[i];
}

// One of dweight's sums over a part's tiles, of the pixels that dy has a gradient for.
template <class T>
__device__ float sum_again(const Correlation& conv, const ToeplitzParts& parts, int64_t part, const T* dy, const T* x,
                           int c, int r, int s) {
  constexpr int kSide = kSmallToeplitzSide;
  float sum = 0;
  const int64_t begin = part * parts.each, after = begin + parts.each;
  for (int64_t tile = begin; tile < after && tile < parts.tiles; ++tile) {
    const Place at = Place::of<kSide>(conv, tile, 0);
    for (int i = 0; i < kSide && at.p + i < conv.P; ++i) {
      CNNOPS_NO_UNROLL
      for (int j = 0; j < kSide && at.q + j < conv.Q; ++j) {
        const T* const gradient = pixel_at(conv, at, dy, i + conv.R - 1 - r, j + conv.S - 1 - s);
        if (!gradient) continue;
        const int64_t pixel = (at.n * conv.P + at.p + i) * conv.Q + at.q + j;
        sum += to_float(gradient[c]) * to_float(x[pixel * conv.C + c]);
      }
    }
  }
  return sum;
}

// dweight[c][r,s] = the sum over parts of slabs[part][c][r,s].
template <class T>
__global__ void __launch_bounds__(kThreads, 2)  // for more blocks, ptxas would spill
    conv2d_toeplitz_add_slabs_kernel(Correlation conv, ToeplitzParts parts, const float* slabs, const T* dy, const T* x,
                                     T* dweight) {
  const int taps = conv.R * conv.S;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = int64_t{conv.C} * taps;
  if (i >= size) return;
  const Split at = split(i, taps);
  const int tap = static_cast<int>(at.remainder);
  const float sum = add_padded_slabs(slabs, parts.parts, size, i, [&](int64_t part) {
    return sum_again(conv, parts, part, dy, x, static_cast<int>(at.quotient), tap / conv.S, tap % conv.S);
  });
  from_float(sum, dweight[i]);
}

template <class T>
void launch_backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                     void* workspace, Stream stream) {
  const Correlation conv = Correlation::backward_input(p);
  const ToeplitzParts parts(p, device());
  auto* const slabs = static_cast<float*>(workspace);
  const auto launch = [&]<int kTapGroups, int kTapEights>() {
    CNNOPS_LAUNCH(
        (conv2d_toeplitz_backward_kernel<T, kTapGroups, kTapEights>), blocks(parts.parts * ceil_div(p.C, kChannels)),
        kThreads, ToeplitzLayout<kSmallToeplitzSide>(p.R, p.S, true).end, stream, conv, parts,
        static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(dx), slabs);
  };
  if (p.R <= FewSums<T>::kMostRows && p.S <= FewSums<T>::kMostColumns)
    launch.template operator()<1, 1>();
  else if (p.R <= 16 && p.S <= 16)
    launch.template operator()<1, 2>();
  else
    launch.template operator()<2, 4>();
  CNNOPS_LAUNCH(conv2d_toeplitz_add_slabs_kernel<T>, blocks(ceil_div(slab_size(p), kThreads)), kThreads, 0, stream,
                conv, parts, slabs, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dweight));
}

void backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
              void* workspace, Stream stream) {
  (p.dtype == DType::kHalf ? launch_backward<Half> : launch_backward<BFloat16>)(p, dy, x, weight, dx, dweight,
                                                                                workspace, stream);
}

int64_t tiles(const Correlation& conv, const Conv2dPlan& plan) {
  return conv.N * ceil_div(conv.P, plan.block_m) * ceil_div(conv.Q, plan.block_n);
}

template <class T, int kSide>
void launch_side(const Correlation& conv, const Conv2dPlan& plan, const Epilogue& epilogue, const void* x,
                 const void* weight, void* y, float* partial, Stream stream) {
  CNNOPS_LAUNCH((conv2d_toeplitz_kernel<T, kSide>), blocks(tiles(conv, plan) * ceil_div(conv.C, kChannels)), kThreads,
                ToeplitzLayout<kSide>(conv.R, conv.S, false).end, stream, conv, epilogue, static_cast<const T*>(x),
                static_cast<const T*>(weight), static_cast<T*>(y), partial);
}

template <class T>
void launch_in(const Correlation& conv, const Conv2dPlan& plan, const Epilogue& epilogue, const void* x,
               const void* weight, void* y, float* partial, Stream stream) {
  if (plan.block_m == kLargeToeplitzSide)
    launch_side<T, kLargeToeplitzSide>(conv, plan, epilogue, x, weight, y, partial, stream);
  else
    launch_side<T, kSmallToeplitzSide>(conv, plan, epilogue, x, weight, y, partial, stream);
}

void launch_of(DType dtype, const Correlation& conv, const Conv2dPlan& plan, const Epilogue& epilogue, const void* x,
               const void* weight, void* y, float* partial, Stream stream) {
  if (dtype == DType::kHalf)
    launch_in<Half>(conv, plan, epilogue, x, weight, y, partial, stream);
  else
    launch_in<BFloat16>(conv, plan, epilogue, x, weight, y, partial, stream);
}

}  // namespace

const Conv2dFamily kToeplitzConv2d = {
    .forward_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue) -> int64_t {
      return epilogue.mean ? tiles(Correlation::forward(p), plan) * 3 * p.K * int64_t{sizeof(float)} : 0;
    },
    .forward =
        [](const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue, const void* x, const void* weight,
           void* y, void* workspace, Stream stream) {
          const Correlation conv = Correlation::forward(p);
          auto* const partial = epilogue.mean ? static_cast<float*>(workspace) : nullptr;
          launch_of(p.dtype, conv, plan, epilogue, x, weight, y, partial, stream);
          if (partial) finish_moments(tiles(conv, plan), p.K, partial, epilogue, stream);
        },
    .backward_input_workspace = [](const Conv2dProblem&, const Conv2dPlan&) -> int64_t { return 0; },
    .backward_input =
        [](const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue, const void* dy, const void* weight,
           void* dx, void*, Stream stream) {
          launch_of(p.dtype, Correlation::backward_input(p), plan, epilogue, dy, weight, dx, nullptr, stream);
        },
    .backward_weight_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan) -> int64_t {
      return plan.splits * slab_size(p) * int64_t{sizeof(float)};
    },
    .backward_weight = [](const Conv2dProblem& p, const Conv2dPlan&, const void* dy, const void* x, void* dweight,
                          void* workspace,
                          Stream stream) { backward(p, dy, x, nullptr, nullptr, dweight, workspace, stream); },
    .backward = backward,
};

}  // namespace cnnops::cuda
