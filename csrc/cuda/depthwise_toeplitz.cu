// Depthwise convolution with large filters, on the tensor cores: stride 1, 16-bit numbers, a filter for each channel.
//
//   y[n,p,q,c]  = sum over (r,s) of x[n, p - pad + r, q - pad + s, c] * weight[c,r,s]
//   dx[n,h,w,c] = the same of dy, with filters turned around and R - 1 - pad and S - 1 - pad for the padding
//
// For one channel and one row of taps that is a product with a banded Toeplitz matrix,
//
//   y[p, q + i] += sum over j of x[p - pad + r, q - pad + j] * band[j, i],  band[j, i] = weight[r, j - i] or 0,
//
// of 16 rows p and 8 columns i: of all widths of mma.sync's, 8 outputs leave the least of the band zero, S of each 16
// columns j for S <= 9, 13 of 32 and 31 of 48. The same band serves all columns of a tile, whose windows overlap.
//
// Layout     x, dy [N,H,W,C]; weight [C,R,S]. In shared memory each channel's part of x is a plane [row][column], so
//            that ldmatrix finds columns side by side: numbers are transposed on their way through registers.
// Ownership  One block owns a kSide x kSide tile of outputs of 16 channels; each of its 8 warps two channels.
// Traffic    x once for each tile whose taps read it, (kSide + R - 1) * (kSide + S - 1) pixels less those beside x;
//            weight once for each tile; y once.
//
// A zero of the band times an infinity that no tap of the output reads would be NaN where torch has none. So what is
// not finite is summed again, over its own taps.

#include <cmath>

#include "conv2d_kernels.h"
#include "depthwise_toeplitz.h"
#include "dtype.h"
#include "epilogue.cuh"

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

// A block's place: its image, its first output and channel, and its number among the tiles of a channel.
struct Place {
  int64_t n, tile;
  int p, q, c;

  template <int kSide>
  static __device__ Place of(const Correlation& conv) {
    const Split channels = split(blockIdx.x, ceil_div(conv.C, kChannels));
    const Split column = split(channels.quotient, ceil_div(conv.Q, kSide));
    const Split row = split(column.quotient, ceil_div(conv.P, kSide));
    return {row.quotient, channels.quotient, static_cast<int>(row.remainder) * kSide,
            static_cast<int>(column.remainder) * kSide, static_cast<int>(channels.remainder) * kChannels};
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

// Filters, turned or not, each row of taps twice: from an even and from an odd word on, with zeros around, so that any
// two neighbouring taps are one word. `filters` is zero before. As in memory, threads have taps side by side.
template <class T, int kSide>
__device__ void load_filters(const Correlation& conv, const Place& at, const ToeplitzLayout<kSide>& layout,
                             const T* weight, T* filters) {
  const int thread = static_cast<int>(threadIdx.x), taps = conv.R * conv.S;
  const int next = kThreads / taps, down = kThreads % taps / conv.S, across = kThreads % taps % conv.S;
  int c = thread / taps, r = thread % taps / conv.S, s = thread % taps % conv.S;
  for (int64_t tap = int64_t{at.c} * taps + thread; c < kChannels && at.c + c < conv.C; tap += kThreads) {
    T* const row = filters + layout.filter(c, conv.turned ? conv.R - 1 - r : r);
    T* const to = row + (conv.turned ? conv.S - 1 - s : s);
    to[0] = to[2 * layout.words + 1] = weight[tap];
    c += next, r += down, s += across;
    if (s >= conv.S) s -= conv.S, ++r;
    if (r >= conv.R) r -= conv.R, ++c;
  }
}

// This thread's taps of 16 rows j of a band, a fragment of B: each word has those of two rows j for one output i, which
// are neighbours in the row of taps. `first` is the place of the first word in the row.
__device__ __forceinline__ void load_band(uint32_t (&band)[2], const uint32_t* row, int first, int words) {
  CNNOPS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int word = first + half * 4;
    band[half] = static_cast<unsigned>(word) < static_cast<unsigned>(words) ? row[word] : 0;
  }
}

// One output, by its own taps alone.
template <class T, int kSide>
__device__ float sum_of(const Correlation& conv, const Place& at, const ToeplitzLayout<kSide>& layout, const T* x,
                        const T* filters, int p, int q, int c) {
  float sum = 0;
  for (int r = 0; r < conv.R; ++r)
    for (int s = 0; s < conv.S; ++s) {
      const T* const from = pixel_at(conv, at, x, p + r, q + s);
      sum += (from ? to_float(from[c]) : 0.f) * to_float(filters[layout.filter(c, r) + s]);
    }
  return sum;
}

// This warp's sums of its two channels: kGroups fragments of 16 rows, kAcross of 8 columns. A large tile's channels
// come one after another; a small tile's together, so that either way ldmatrix has 32 rows.
template <class T, int kSide>
class Sums {
 public:
  using Layout = ToeplitzLayout<kSide>;
  static constexpr int kGroups = kSide / kRows;

  __device__ void multiply(const Layout& layout, int R, const T* planes, const T* filters) {
    CNNOPS_UNROLL
    for (int pass = 0; pass < kGroups; ++pass) {
      const int channel = warp() * 2 + (kTogether == 1 ? pass : lane() / kRows);
      const T* rows = planes + layout.plane(channel) + (kTogether == 1 ? lane() : lane() % kRows) * layout.pitch;
      // In a band, each output's taps begin one row after those of the output before: every second output's in the
      // upper half of a word, but for the second copy.
      const T* taps = filters + layout.filter(warp() * 2 + pass, 0) + lane() / 4 % 2 * 2 * layout.words;
      const int first = lane() % 4 - lane() / 8;
      for (int r = 0; r < R; ++r, rows += layout.pitch, taps += 4 * layout.words) {
        uint32_t x[kAcross + 2 * kMostSteps - 1][4];  // of 8 columns: both halves of 16 rows, twice
        CNNOPS_UNROLL
        for (int step = 0; step < kMostSteps; ++step) {
          if (step >= layout.steps) continue;
          uint32_t band[kTogether][2];
          CNNOPS_UNROLL
          for (int i = 0; i < kTogether; ++i)
            load_band(band[i], reinterpret_cast<const uint32_t*>(taps + i * layout.filter(1, 0)), step * 8 + first,
                      layout.words);
          CNNOPS_UNROLL
          for (int eight = step ? kAcross + 2 * step - 1 : 0; eight <= kAcross + 2 * step; ++eight)
            ldmatrix_x4<false>(x[eight], rows + eight * 8);
          CNNOPS_UNROLL
          for (int b = 0; b < kAcross; ++b) {
            const uint32_t (&left)[4] = x[b + 2 * step], (&right)[4] = x[b + 2 * step + 1];
            CNNOPS_UNROLL
            for (int i = 0; i < 2; ++i) {
              const uint32_t a[4] = {left[2 * i], left[2 * i + 1], right[2 * i], right[2 * i + 1]};
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
      if (!std::isfinite(sum)) sum = exact(row(i / 2), column(i / 2), warp() * 2 + i % 2);
    }
  }

 private:
  static constexpr int kAcross = kSide / 8, kTogether = 2 / kGroups, kEach = kAcross * 4;

  static __device__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  // Where the i-th of this thread's sums of 16 rows is.
  static __device__ int row(int i) { return lane() / 4 + i % 4 / 2 * 8; }
  static __device__ int column(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }
  static __device__ float* at(float* stage, int i) { return stage + Layout::sum(row(i), column(i)) + warp() * 2; }

  float sum_[2][kGroups][kAcross][4] = {};
};

// partial[count, mean, m2][C] of a tile, from what each warp wrote.
template <class T>
__device__ void write_moments(Moments (&moments)[kVector<T>], Moments* parts, int c, int C, float* partial) {
  const int thread = static_cast<int>(threadIdx.x);
  merge_lanes<T, kChannels>(moments);
  if (thread % 32 < kChannels / kVector<T>) {
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; ++i) parts[thread / 32 * kChannels + column_of<T, kChannels>() + i] = moments[i];
  }
  __syncthreads();
  if (thread >= kChannels || c + thread >= C) return;
  Moments all;
  for (int i = 0; i < kWarps; ++i) all.merge(parts[i * kChannels + thread]);
  partial[c + thread] = all.count;
  partial[C + c + thread] = all.mean;
  partial[2 * int64_t{C} + c + thread] = all.m2;
}

template <class T, int kSide>
__global__ void __launch_bounds__(kThreads, kResident)
    conv2d_toeplitz_kernel(Correlation conv, Epilogue epilogue, const T* x, const T* weight, T* y, float* partial) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  using Layout = ToeplitzLayout<kSide>;
  using Sums = Sums<T, kSide>;
  const Layout layout(conv.R, conv.S);
  auto* const planes = reinterpret_cast<T*>(shared);
  auto* const filters = reinterpret_cast<T*>(shared + layout.filters);
  auto* const stage = reinterpret_cast<float*>(shared);
  const Place at = Place::of<kSide>(conv);
  for (int i = static_cast<int>(threadIdx.x); i < kChannels * conv.R * layout.words / 2; i += kThreads)
    reinterpret_cast<uint4*>(filters)[i] = uint4{0, 0, 0, 0};
  load_planes<T, kSide>(conv, at, layout, x, planes);
  __syncthreads();  // the filters are zero
  load_filters(conv, at, layout, weight, filters);
  __syncthreads();
  Sums sums;
  sums.multiply(layout, conv.R, planes, filters);

  const int first = static_cast<int>(threadIdx.x) / 32 * Layout::kWarpRows;  // of the rows that this warp writes
  const bool aligned = conv.C % kVector<T> == 0;
  Moments moments[kVector<T>];
  CNNOPS_UNROLL
  for (int group = 0; group < Sums::kGroups; ++group) {
    const int p = group * kRows;
    __syncthreads();  // nobody reads the planes, or the sums before, any more
    sums.store(stage, group, [&](int row, int column, int c) {
      if (at.p + p + row >= conv.P || at.q + column >= conv.Q || at.c + c >= conv.C) return 0.f;
      return sum_of(conv, at, layout, x, filters, p + row, column, c);
    });
    __syncthreads();
    const auto row_of = [&](int i) -> int64_t {
      const int row = at.p + p + first + i / kSide, column = at.q + i % kSide;
      return row < conv.P && column < conv.Q ? ((at.n * conv.P + row) * conv.Q + column) * conv.C : -1;
    };
    const float* const from = stage + Layout::sum(first, 0);
    if (partial)
      write_rows<T, kChannels, true>(epilogue, from, Layout::kPixelFloats, Layout::kWarpRows * kSide, row_of, at.c,
                                     conv.C, aligned, y, moments);
    else
      write_rows<T, kChannels, false>(epilogue, from, Layout::kPixelFloats, Layout::kWarpRows * kSide, row_of, at.c,
                                      conv.C, aligned, y, moments);
  }
  if (!partial) return;
  __syncthreads();  // the sums were read
  write_moments<T>(moments, reinterpret_cast<Moments*>(shared), at.c, conv.C, partial + at.tile * 3 * conv.C);
}

int64_t tiles(const Correlation& conv, const Conv2dPlan& plan) {
  return conv.N * ceil_div(conv.P, plan.block_m) * ceil_div(conv.Q, plan.block_n);
}

template <class T, int kSide>
void launch_side(const Correlation& conv, const Conv2dPlan& plan, const Epilogue& epilogue, const void* x,
                 const void* weight, void* y, float* partial, Stream stream) {
  CNNOPS_LAUNCH((conv2d_toeplitz_kernel<T, kSide>), blocks(tiles(conv, plan) * ceil_div(conv.C, kChannels)), kThreads,
                ToeplitzLayout<kSide>(conv.R, conv.S).end, stream, conv, epilogue, static_cast<const T*>(x),
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
    .backward_weight_workspace = nullptr,
    .backward_weight = nullptr,
};

}  // namespace cnnops::cuda
