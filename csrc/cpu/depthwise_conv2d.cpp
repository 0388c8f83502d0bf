// Depthwise convolution, NHWC: each channel has M = K / C filters of its own, k = c * M + m.
//
//   y[n,p,q,k]     = activation(sum over (r,s) of x[n, p*stride_h - pad_h + r*dilation_h, q*.., c] * weight[k,r,s]
//                               + bias[k] + residual[n,p,q,k])
//   dx[n,h,w,c]    = sum over (r,s,m) of dy[n,p,q,k] * weight[k,r,s], (p,q) the outputs whose tap (r,s) is (h,w),
//                    and bias[c] where it is the output of a transposed convolution
//   dweight[k,r,s] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dilation_h, q*.., c]
//
// Layout     x, dx [N,H,W,C]; weight, dweight [K,R,S]; y, dy [N,P,Q,K]. Lanes are filters k, neighbours in memory;
//            where M > 1 a vector of x is spread, each channel over its M filters, and dx sums up M neighbours.
// Engine     forward and backward_input are the convolution over taps of conv2d.h: kTile columns of one vector of
//            filters in registers, down the rows. A row of the filter lies in registers too, and each vector of x that
//            is loaded meets all its taps. backward_weight keeps the sums of some rows of the filter in registers,
//            along the rows of outputs of all its images.
// Tile       forward with AVX-512 [AVX2]: a vector of 16 [8] filters k deep; columns w ->
//                        +- x: (kTile - 1) * stride_w + S columns, in place --+
//            rows h    | |  +- y: kTile = 14 [7] columns q, a row p --------+ |  an item: rows p of an image, as many
//                      v |  | sums and S <= 7 taps of row r: registers      | |  as kStripBytes of x are; the tile goes
//                        |  +-----------------------------------------------+ |  down them, then along q, then along k
//                        +- halo: R - stride_h, S - stride_w; from cache -----+
//            backward_weight: kItemBlocks = 4 vectors of channels; the sum over rows (n,p) is split into slices.
// Ownership  forward, backward_input: an item owns some rows of one image. backward_weight: an item owns
//            kItemBlocks vectors of channels over one slice of the rows of y; slabs are added in order.
// Traffic    forward: x + y, backward_input: dy + dx, backward_weight: x + dy, each once: what overlaps meets in cache.

#include <vector>

#include "conv2d.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kTile = kVectorRegisters == 32 ? 14 : 7;  // columns; networks' maps are 7, 14, 28, 56 and 112 wide
constexpr int kHalfTile = 7;                            // where no more are left
constexpr int kMaxTaps = 7;                             // of a row of the filter that fits in registers beside them
constexpr int64_t kStripBytes = 1 << 16;                // of the input at a time: a part of L2
constexpr int kSumRows = 4;                             // whose filters are summed at a time, M > 1
constexpr int kItemBlocks = 4;                          // of channels in an item of backward_weight
constexpr int64_t kItems = 32;                          // wanted, so that the work divides evenly among threads

template <class T>
using Index = std::conditional_t<std::is_same_v<T, double>, VecOf<int64_t>, VecOf<int32_t>>::type;

// How a vector of lanes lies in memory: as it is, or fewer channels spread over it, or fewer lanes than a vector has.
enum class Access { kWhole, kSpread, kFew };

// f(constant) for the one of `values` that equals `value`.
template <auto... values, class V, class F>
void choose(V value, const F& f) {
  ((value == values ? (f(std::integral_constant<decltype(values), values>{}), true) : false) || ...);
}

// Channels in blocks of one vector, and the filters of a block in vectors of theirs: k = (first + c) * M + m. The last
// block starts early enough to be whole, and repeats some channels of the one before it.
template <class T>
struct Blocks {
  int64_t channels, multiplier;

  explicit Blocks(const Conv2dProblem& p) : channels(p.C), multiplier(p.K / p.C) {}
  int64_t count() const { return ceil_div(channels, kLanes<T>); }
  int64_t width() const { return std::min<int64_t>(channels, kLanes<T>); }
  int64_t first(int64_t block) const { return std::min(block * kLanes<T>, channels - width()); }
  int64_t vectors() const { return ceil_div(width() * multiplier, kLanes<T>); }
  int64_t first_filter(int64_t block, int64_t v) const { return first(block) * multiplier + v * kLanes<T>; }
  int filters(int64_t v) const {
    return static_cast<int>(std::min<int64_t>(kLanes<T>, width() * multiplier - v * kLanes<T>));
  }
};

// Reads one vector of lanes: `channels` of them, of which lane i takes number index[i].
template <class T>
struct Reader {
  Access access;
  int channels;
  Index<T> index;

  // Filters as they lie in memory.
  explicit Reader(int count) : access(count == kLanes<T> ? Access::kWhole : Access::kFew), channels(count) {
    for (int i = 0; i < kLanes<T>; ++i) index[i] = i;
  }
  // The channels of vector v of a block's filters.
  Reader(const Blocks<T>& blocks, int64_t v) : Reader(static_cast<int>(blocks.width())) {
    if (blocks.multiplier == 1) return;
    if (access == Access::kWhole) access = Access::kSpread;
    for (int i = 0; i < kLanes<T>; ++i)
      index[i] = std::min((v * kLanes<T> + i) / blocks.multiplier, int64_t{kLanes<T>} - 1);
  }

  template <Access kAccess>
  Vec<T> read(const T* p) const {
    if constexpr (kAccess == Access::kWhole) return load(p);
    return __builtin_shuffle(kAccess == Access::kFew ? load(p, channels) : load(p), index);
  }
};

// The same taps in the order in which they ascend through the input.
inline TapAxis ascending(TapAxis axis) {
  if (axis.offset_step >= 0) return axis;
  axis.offset += axis.offset_step * (axis.taps - 1);
  axis.tap += axis.tap_step * (axis.taps - 1);
  axis.offset_step = -axis.offset_step;
  axis.tap_step = -axis.tap_step;
  return axis;
}

// A convolution over taps and its weights, packed: [block][vector][taps of h][taps of w][lanes].
template <class T>
struct Taps {
  TapAxis h, w;
  T* weight;

  int64_t count() const { return int64_t{h.taps} * w.taps; }
};

template <class T>
void pack_weight(const Conv2dProblem& p, const Blocks<T>& blocks, const Taps<T>& taps, const T* weight) {
  const int64_t vectors = blocks.vectors();
  parallel_for(blocks.count() * vectors, 2 * taps.count() * kLanes<T>, [&](int64_t item) {
    const int64_t first = blocks.first_filter(item / vectors, item % vectors);
    const int filters = blocks.filters(item % vectors);
    T* to = taps.weight + item * taps.count() * kLanes<T>;
    for (int r = 0; r < taps.h.taps; ++r)
      for (int s = 0; s < taps.w.taps; ++s, to += kLanes<T>) {
        const int64_t tap = int64_t{taps.h.tap + taps.h.tap_step * r} * p.S + taps.w.tap + taps.w.tap_step * s;
        const T* from = weight + first * p.R * p.S + tap;
        for (int i = 0; i < kLanes<T>; ++i) to[i] = i < filters ? from[int64_t{i} * p.R * p.S] : T{};
      }
  });
}

// Rows [begin, end) times columns [first, first + count) of outputs, one vector of them. `in` is the image's first
// pixel; output (i, j) is at + i * row_pitch + j * pitch.
template <class T>
struct Tile {
  const Taps<T>& taps;
  PadMode pad_mode;
  Reader<T> reader;
  const T* in;
  int64_t in_pitch;
  const T* weight;
  int64_t begin, end, first = 0;
  int count = 0;
  const Epilogue& epilogue;
  T* out;
  int64_t at = 0, row_pitch, pitch, channel;
  int lanes;
};

// Where tap t of output i finds its pixel, -1 where that is a zero.
inline int64_t tap_source(const TapAxis& axis, PadMode mode, int64_t i, int64_t t) {
  return source(mode, axis.in_step * i + axis.offset + axis.offset_step * t, axis.extent);
}

// A row of zeros for the columns beside the input.
template <class T>
alignas(64) constexpr T kZeros[kLanes<T>] = {};

// kWidth: columns in registers. kTaps, kStep: taps of w, one pixel apart, and its in_step; kTaps = 0 where they are
// others. The input of the block after this one is fetched ahead: the lines of a block lie far apart, and the processor
// does not see them coming.
template <class T, Access kAccess, int kWidth, int kTaps, int kStep>
[[gnu::flatten]] void convolve_tile(const Tile<T>& tile) {
  const TapAxis &h = tile.taps.h, &w = tile.taps.w;
  constexpr int kColumns = (kWidth - 1) * kStep + kTaps;
  const int64_t left = w.in_step * tile.first + w.offset, pitch = tile.in_pitch;
  int64_t column[kTaps ? kColumns : 1];
  if constexpr (kTaps)
    for (int j = 0; j < kColumns; ++j) {
      const int64_t from = j < (tile.count - 1) * kStep + kTaps ? source(tile.pad_mode, left + j, w.extent) : -1;
      column[j] = from < 0 ? -1 : from * pitch;
    }
  const bool plain = tile.lanes == kLanes<T> && !tile.epilogue.scale && !tile.epilogue.bias &&
                     !tile.epilogue.residual && tile.epilogue.activation == Activation::kNone;
  for (int64_t i = tile.begin; i < tile.end; ++i) {
    Vec<T> sum[kWidth] = {};
    const T* weight = tile.weight;
    for (int r = 0; r < h.taps; ++r, weight += w.taps * kLanes<T>) {
      const int64_t from = tap_source(h, tile.pad_mode, i, r);
      if (from < 0) continue;
      const T* row = tile.in + from * w.extent * pitch;
      if constexpr (kTaps) {
        if (i == tile.begin || r + h.in_step >= h.taps)
          for (int j = 0; j < kColumns; ++j) __builtin_prefetch(row + column[j] + kLanes<T>);
        Vec<T> filter[kTaps];
        unroll<kTaps>([&](auto s) { filter[s] = load(weight + s * kLanes<T>); });
        unroll<kColumns>([&](auto j) {
          const Vec<T> x = tile.reader.template read<kAccess>(column[j] < 0 ? kZeros<T> : row + column[j]);
          unroll<kTaps>([&](auto s) {
            constexpr int reach = j.value - s.value, to = reach / kStep;
            if constexpr (reach >= 0 && reach % kStep == 0 && to < kWidth) sum[to] += x * filter[s.value];
          });
        });
      } else {
        for (int s = 0; s < w.taps; ++s) {
          const Vec<T> filter = load(weight + s * kLanes<T>);
          unroll<kWidth>([&](auto j) {
            const int64_t at = j < tile.count ? tap_source(w, tile.pad_mode, tile.first + j, s) : -1;
            sum[j] += tile.reader.template read<kAccess>(at < 0 ? kZeros<T> : row + at * pitch) * filter;
          });
        }
      }
    }
    T* out = tile.out + tile.at + i * tile.row_pitch;
    if (plain) {
      unroll<kWidth>([&](auto j) {
        if (j < tile.count) store(out + j * tile.pitch, sum[j]);
      });
      continue;
    }
    Vec<T> result[kWidth];
    unroll<kWidth>([&](auto j) { result[j] = sum[j]; });
    for (int j = 0; j < tile.count; ++j)
      finish<T>(tile.epilogue, result[j], tile.out, tile.at + i * tile.row_pitch + j * tile.pitch, tile.channel, 1,
                tile.lanes);
  }
}

template <class T, Access kAccess, int kWidth>
void convolve_tile(const Tile<T>& tile) {
  const TapAxis& w = tile.taps.w;
  const int taps = w.offset_step == 1 || w.taps == 1 ? w.taps : 0;
  bool done = false;
  const auto run = [&](auto taps, auto step) {
    convolve_tile<T, kAccess, kWidth, taps.value, step.value>(tile);
    done = true;
  };
  if (w.in_step == 1)
    choose<1, 2, 3, 4, 5, 7>(taps, [&](auto taps) { run(taps, std::integral_constant<int, 1>{}); });
  else if (w.in_step == 2)
    choose<3, 5, 7>(taps, [&](auto taps) { run(taps, std::integral_constant<int, 2>{}); });
  if (!done) convolve_tile<T, kAccess, kWidth, 0, 0>(tile);
}

template <class T>
void convolve_tile(const Tile<T>& tile) {
  if (tile.reader.access == Access::kFew) return convolve_tile<T, Access::kFew, kTile, 0, 0>(tile);
  choose<Access::kWhole, Access::kSpread>(tile.reader.access, [&](auto access) {
    if (tile.count <= kHalfTile)
      convolve_tile<T, access.value, kHalfTile>(tile);
    else
      convolve_tile<T, access.value, kTile>(tile);
  });
}

// Of x for a row of y, but for those that it shares with the row above.
inline int64_t input_rows(const Conv2dProblem& p) { return std::min(p.stride_h, p.H); }

// f(image, begin, end) for strips of at most `rows` rows, each an item; row_bytes: of input that a row needs.
template <class F>
void for_strips(int64_t images, int64_t rows, int64_t row_bytes, int64_t work, const F& f) {
  const int64_t strip = std::clamp<int64_t>(kStripBytes / row_bytes, 1, rows), strips = ceil_div(rows, strip);
  parallel_for(images * strips, work * strip, [=](int64_t item) {
    const int64_t begin = item % strips * strip;
    f(item / strips, begin, std::min(begin + strip, rows));
  });
}

template <class T>
void forward(const Conv2dProblem& p, const Epilogue& epilogue, const Taps<T>& taps, const T* x, T* y) {
  const Blocks<T> blocks(p);
  const int64_t C = p.C, K = p.K, row_bytes = input_rows(p) * p.W * C * sizeof(T);
  for_strips(p.N, p.P, row_bytes, p.Q * K * taps.count(), [&](int64_t n, int64_t begin, int64_t end) {
    for (int64_t block = 0; block < blocks.count(); ++block)
      for (int64_t v = 0; v < blocks.vectors(); ++v) {
        const int64_t k = blocks.first_filter(block, v), packed = block * blocks.vectors() + v;
        Tile<T> tile{.taps = taps,
                     .pad_mode = p.pad_mode,
                     .reader = Reader<T>(blocks, v),
                     .in = x + n * p.H * p.W * C + blocks.first(block),
                     .in_pitch = C,
                     .weight = taps.weight + packed * taps.count() * kLanes<T>,
                     .begin = begin,
                     .end = end,
                     .epilogue = epilogue,
                     .out = y,
                     .row_pitch = p.Q * K,
                     .pitch = K,
                     .channel = k,
                     .lanes = blocks.filters(v)};
        for (; tile.first < p.Q; tile.first += kTile) {
          tile.count = static_cast<int>(std::min<int64_t>(kTile, p.Q - tile.first));
          tile.at = (n * p.P * p.Q + tile.first) * K + k;
          convolve_tile(tile);
        }
      }
  });
}

// dx[c] = dx of its M filters, summed, plus the bias if there is one; `pixels` of them.
template <class T, int kMultiplier>
void sum_filters(const T* from, int64_t from_pitch, int64_t pixels, int64_t multiplier, int channels, const T* bias,
                 T* dx, int64_t pitch) {
  const int64_t count = kMultiplier ? kMultiplier : multiplier;
  for (int64_t i = 0; i < pixels; ++i)
    for (int c = 0; c < channels; ++c) {
      T sum{};
      for (int64_t m = 0; m < count; ++m) sum += from[i * from_pitch + c * count + m];
      dx[i * pitch + c] = bias ? sum + bias[c] : sum;
    }
}

template <class T>
void backward_input(const Conv2dProblem& p, const std::vector<Taps<T>>& classes, const T* dy, const T* bias, T* dx) {
  const Blocks<T> blocks(p);
  const int64_t C = p.C, K = p.K, M = blocks.multiplier, lanes = blocks.vectors() * kLanes<T>;
  const Epilogue epilogue{.bias = M == 1 ? bias : nullptr};  // where M > 1, what the tiles give is summed first
  const int64_t products = int64_t{p.W} * K * p.R * p.S, row_bytes = int64_t{p.Q} * K * sizeof(T);
  for_strips(p.N, ceil_div(p.H, p.stride_h), row_bytes, products, [&](int64_t n, int64_t begin, int64_t stop) {
    std::vector<T> unsummed(M > 1 ? kSumRows * kTile * lanes : 0);
    for (int64_t block = 0; block < blocks.count(); ++block)
      for (const Taps<T>& taps : classes) {
        const TapAxis &h = taps.h, &w = taps.w;
        const int64_t end = std::min(stop, h.count), row_pitch = h.step * p.W * C, pitch = w.step * C;
        const int64_t at = (n * p.H + h.first) * p.W * C + w.first * C + blocks.first(block);
        const auto tile_of = [&](int64_t v) {
          const int64_t k = blocks.first_filter(block, v), packed = block * blocks.vectors() + v;
          return Tile<T>{.taps = taps,
                         .pad_mode = PadMode::kZeros,
                         .reader = Reader<T>(blocks.filters(v)),
                         .in = dy + n * p.P * p.Q * K + k,
                         .in_pitch = K,
                         .weight = taps.weight + packed * taps.count() * kLanes<T>,
                         .begin = begin,
                         .end = end,
                         .epilogue = epilogue,
                         .out = dx,
                         .at = at,
                         .row_pitch = row_pitch,
                         .pitch = pitch,
                         .channel = k,
                         .lanes = blocks.filters(v)};
        };
        for (int64_t first = 0; first < w.count; first += kTile) {
          const int count = static_cast<int>(std::min<int64_t>(kTile, w.count - first));
          if (M == 1) {
            Tile<T> tile = tile_of(0);
            tile.first = first;
            tile.count = count;
            tile.at += first * pitch;
            convolve_tile(tile);
            continue;
          }
          for (int64_t i = begin; i < end; i += kSumRows) {
            const int64_t rows = std::min<int64_t>(kSumRows, end - i);
            for (int64_t v = 0; v < blocks.vectors(); ++v) {
              Tile<T> tile = tile_of(v);
              tile.begin = i;
              tile.end = i + rows;
              tile.first = first;
              tile.count = count;
              tile.out = unsummed.data();
              tile.row_pitch = kTile * lanes;
              tile.pitch = lanes;
              tile.at = v * kLanes<T> - i * tile.row_pitch;
              convolve_tile(tile);
            }
            for (int64_t row = 0; row < rows; ++row) {
              const T* from = unsummed.data() + row * kTile * lanes;
              T* to = dx + at + (i + row) * row_pitch + first * pitch;
              const int width = static_cast<int>(blocks.width());
              const T* added = bias ? bias + blocks.first(block) : nullptr;
              choose<0, 2, 3, 4>(M <= 4 ? M : 0, [&](auto multiplier) {
                sum_filters<T, multiplier.value>(from, lanes, count, M, width, added, to, pitch);
              });
            }
          }
        }
      }
  });
}

// How backward_weight is cut: by shape alone. A slab is [block][vector][r][s][lanes].
template <class T>
struct WeightPlan {
  Blocks<T> blocks;
  int64_t rows, taps, pieces, slice_rows, slices, size;

  explicit WeightPlan(const Conv2dProblem& p)
      : blocks(p),
        rows(int64_t{p.N} * p.P),
        taps(int64_t{p.R} * p.S),
        pieces(ceil_div(blocks.count(), kItemBlocks)),
        size(blocks.count() * blocks.vectors() * taps * kLanes<T>) {
    slice_rows = ceil_div(rows, std::min(rows, ceil_div(kItems, pieces)));
    slices = ceil_div(rows, slice_rows);
  }
};

struct Span {
  int64_t begin, end;
};

// The outputs that have all of `taps` taps from `first` on inside the input.
inline Span outputs_inside(const TapAxis& axis, int64_t first, int taps) {
  const int64_t left = axis.offset + axis.offset_step * first, right = left + axis.offset_step * (taps - 1);
  const int64_t begin = left >= 0 ? 0 : std::min(axis.count, ceil_div(-left, axis.in_step));
  const int64_t end = right >= axis.extent ? 0 : std::min(axis.count, ceil_div(axis.extent - right, axis.in_step));
  return {begin, std::max(begin, end)};
}

// Rows of outputs in a row, and the rows of the filter that all of them have inside the input.
struct Run {
  Span p, r;
};
inline std::vector<Run> runs_of(const TapAxis& h, PadMode mode) {
  if (mode != PadMode::kZeros) return {{{0, h.count}, {0, h.taps}}};
  std::vector<Run> runs;
  for (int64_t p = 0; p < h.count; ++p) {
    const int64_t top = h.in_step * p + h.offset;
    const int64_t begin = top >= 0 ? 0 : std::min<int64_t>(h.taps, ceil_div(-top, h.offset_step));
    const int64_t end = top >= h.extent ? 0 : std::min<int64_t>(h.taps, ceil_div(h.extent - top, h.offset_step));
    if (runs.empty() || runs.back().r.begin != begin || runs.back().r.end != end)
      runs.push_back({{p, p}, {begin, end}});
    runs.back().p.end = p + 1;
  }
  return runs;
}

// What one vector of filters adds up: rows [begin, end) of outputs, numbered through all images, of which each image's
// rows p; the taps [s, s + kTaps) of kRows rows of the filter from r on.
template <class T>
struct Products {
  const TapAxis &h, &w;
  PadMode pad_mode;
  Reader<T> x_reader, dy_reader;
  const T *x, *dy;
  int64_t x_pitch, dy_pitch, begin, end;
  T* slab;
  Span p{};
  int64_t r = 0, s = 0;
};

template <class T, Access kAccess, int kTaps, int kRows>
[[gnu::flatten]] void add_products(const Products<T>& a) {
  constexpr Access kDyAccess = kAccess == Access::kFew ? Access::kFew : Access::kWhole;
  const TapAxis &h = a.h, &w = a.w;
  T* slab = a.slab + (a.r * w.taps + a.s) * kLanes<T>;
  const int64_t slab_pitch = w.taps * kLanes<T>, step = w.in_step * a.x_pitch, tap = w.offset_step * a.x_pitch;
  const int64_t left = w.offset + w.offset_step * a.s;
  const Span inside = outputs_inside(w, a.s, kTaps);
  Vec<T> sum[kRows][kTaps];
  unroll<kRows>(
      [&](auto r) { unroll<kTaps>([&](auto s) { sum[r][s] = load(slab + r * slab_pitch + s * kLanes<T>); }); });
  for (int64_t n = a.begin / h.count; n * h.count < a.end; ++n) {
    const int64_t last = std::min(a.p.end, a.end - n * h.count);
    for (int64_t p = std::max(a.p.begin, a.begin - n * h.count); p < last; ++p) {
      const T* rows[kRows];
      for (int r = 0; r < kRows; ++r)
        rows[r] = a.x + (n * h.extent + tap_source(h, a.pad_mode, p, a.r + r)) * w.extent * a.x_pitch;
      const T* dy = a.dy + (n * h.count + p) * w.count * a.dy_pitch;
      for (int64_t q = 0; q < w.count; ++q) {
        if (q == inside.begin) {
          const T* x[kRows];
          unroll<kRows>([&](auto r) { x[r] = rows[r] + left * a.x_pitch + q * step; });
          for (; q < inside.end; ++q) {
            const T* gradient = dy + q * a.dy_pitch;
            __builtin_prefetch(gradient + kLanes<T>);
            __builtin_prefetch(x[kRows - 1] + kLanes<T>);
            const Vec<T> d = a.dy_reader.template read<kDyAccess>(gradient);
            unroll<kRows>([&](auto r) {
              unroll<kTaps>([&](auto s) { sum[r][s] += a.x_reader.template read<kAccess>(x[r] + s * tap) * d; });
              x[r] += step;
            });
          }
          if (q == w.count) break;
        }
        const Vec<T> d = a.dy_reader.template read<kDyAccess>(dy + q * a.dy_pitch);
        unroll<kTaps>([&](auto s) {
          const int64_t from = tap_source(w, a.pad_mode, q, a.s + s);
          unroll<kRows>([&](auto r) {
            sum[r][s] += a.x_reader.template read<kAccess>(from < 0 ? kZeros<T> : rows[r] + from * a.x_pitch) * d;
          });
        });
      }
    }
  }
  unroll<kRows>(
      [&](auto r) { unroll<kTaps>([&](auto s) { store(slab + r * slab_pitch + s * kLanes<T>, sum[r][s]); }); });
}

// As many rows of the filter as registers hold the sums of, and no more than a square filter has.
constexpr int rows_at_once(int taps) { return std::min(taps, std::max(1, (kVectorRegisters - 3) / taps)); }

template <class T, Access kAccess, int kTaps, int kRows = rows_at_once(kTaps)>
void add_products(const Products<T>& a, int64_t rows) {
  if (rows >= kRows) return add_products<T, kAccess, kTaps, kRows>(a);
  if constexpr (kRows > 1) add_products<T, kAccess, kTaps, kRows - 1>(a, rows);
}

// The products with every tap, some at a time.
template <class T>
void add_products(Products<T> a, const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    a.p = run.p;
    for (a.s = 0; a.s < a.w.taps; a.s += kMaxTaps) {
      const int taps = static_cast<int>(std::min<int64_t>(kMaxTaps, a.w.taps - a.s));
      for (a.r = run.r.begin; a.r < run.r.end; a.r += rows_at_once(taps))
        choose<Access::kWhole, Access::kSpread, Access::kFew>(a.x_reader.access, [&](auto access) {
          choose<1, 2, 3, 4, 5, 6, 7>(
              taps, [&](auto taps) { add_products<T, access.value, taps.value>(a, run.r.end - a.r); });
        });
    }
  }
}

// The weights of every class of a pass, packed one after another; on a null base they are only counted.
template <class T>
std::vector<Taps<T>> forward_taps(Arena& arena, const Conv2dProblem& p) {
  const Blocks<T> blocks(p);
  std::vector<Taps<T>> taps{{forward_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h),
                             forward_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w), nullptr}};
  taps[0].weight = arena.take<T>(blocks.count() * blocks.vectors() * kLanes<T> * taps[0].count());
  return taps;
}

template <class T>
std::vector<Taps<T>> backward_taps(Arena& arena, const Conv2dProblem& p) {
  const Blocks<T> blocks(p);
  std::vector<Taps<T>> classes;
  for (int h = 0; h < std::min(p.stride_h, p.H); ++h)
    for (int w = 0; w < std::min(p.stride_w, p.W); ++w) {
      Taps<T> taps{ascending(backward_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h, h)),
                   ascending(backward_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w, w)), nullptr};
      taps.weight = arena.take<T>(blocks.count() * blocks.vectors() * kLanes<T> * taps.count());
      classes.push_back(taps);
    }
  return classes;
}

}  // namespace

template <class T>
void depthwise_forward(const Conv2dProblem& p, const Epilogue& epilogue, const T* x, const T* weight, T* y,
                       void* workspace) {
  Arena arena(workspace);
  const Taps<T> taps = forward_taps<T>(arena, p)[0];
  pack_weight(p, Blocks<T>(p), taps, weight);
  forward(p, epilogue, taps, x, y);
}

template <class T>
void depthwise_backward_input(const Conv2dProblem& p, const T* dy, const T* weight, const T* bias, T* dx,
                              void* workspace) {
  Arena arena(workspace);
  const std::vector<Taps<T>> classes = backward_taps<T>(arena, p);
  for (const Taps<T>& taps : classes) pack_weight(p, Blocks<T>(p), taps, weight);
  backward_input(p, classes, dy, bias, dx);
}

template <class T>
void depthwise_backward_weight(const Conv2dProblem& p, const T* dy, const T* x, T* dweight, void* workspace) {
  const WeightPlan<T> plan(p);
  const Blocks<T>& blocks = plan.blocks;
  T* slabs = static_cast<T*>(workspace);
  const TapAxis h = forward_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  const TapAxis w = forward_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  const int64_t C = p.C, K = p.K, vectors = blocks.vectors(), vector_size = plan.taps * kLanes<T>;
  const int64_t work = plan.slice_rows * p.Q * plan.taps * kItemBlocks * vectors * kLanes<T>;
  const std::vector<Run> runs = runs_of(h, p.pad_mode);
  const int64_t strip = std::max<int64_t>(1, kStripBytes / (input_rows(p) * p.W * kLanes<T> * sizeof(T)));
  parallel_for(plan.slices * plan.pieces, work, [&](int64_t item) {
    const int64_t slice = item / plan.pieces, begin = item % plan.pieces * kItemBlocks;
    const int64_t end = std::min<int64_t>(begin + kItemBlocks, blocks.count());
    T* slab = slabs + slice * plan.size;
    std::fill(slab + begin * vectors * vector_size, slab + end * vectors * vector_size, T{});
    const int64_t last = std::min((slice + 1) * plan.slice_rows, plan.rows);
    for (int64_t row = slice * plan.slice_rows; row < last; row += strip)
      for (int64_t block = begin; block < end; ++block)
        for (int64_t v = 0; v < vectors; ++v)
          add_products(Products<T>{.h = h,
                                   .w = w,
                                   .pad_mode = p.pad_mode,
                                   .x_reader = Reader<T>(blocks, v),
                                   .dy_reader = Reader<T>(blocks.filters(v)),
                                   .x = x + blocks.first(block),
                                   .dy = dy + blocks.first_filter(block, v),
                                   .x_pitch = C,
                                   .dy_pitch = K,
                                   .begin = row,
                                   .end = std::min(row + strip, last),
                                   .slab = slab + (block * vectors + v) * vector_size},
                       runs);
  });
  parallel_for(C, plan.slices * plan.taps * blocks.multiplier, [&](int64_t c) {
    const int64_t block = c / kLanes<T>;
    for (int64_t m = 0; m < blocks.multiplier; ++m) {
      const int64_t lane = (c - blocks.first(block)) * blocks.multiplier + m;
      const T* from = slabs + (block * vectors + lane / kLanes<T>)*vector_size + lane % kLanes<T>;
      for (int64_t tap = 0; tap < plan.taps; ++tap) {
        T sum{};
        for (int64_t slice = 0; slice < plan.slices; ++slice) sum += from[slice * plan.size + tap * kLanes<T>];
        dweight[(c * blocks.multiplier + m) * plan.taps + tap] = sum;
      }
    }
  });
}

int64_t depthwise_forward_workspace(const Conv2dProblem& p) {
  return for_conv_dtype(p.dtype, [&](auto t) {
    Arena arena;
    forward_taps<decltype(t)>(arena, p);
    return arena.used();
  });
}

int64_t depthwise_backward_workspace(const Conv2dProblem& p, bool need_dx, bool need_dweight) {
  return for_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    Arena arena;
    if (need_dx) backward_taps<T>(arena, p);
    const int64_t slabs = need_dweight ? WeightPlan<T>(p).slices * WeightPlan<T>(p).size * sizeof(T) : 0;
    return std::max(arena.used(), slabs);
  });
}

#define CNNOPS_INSTANTIATE(T)                                                                            \
  template void depthwise_forward(const Conv2dProblem&, const Epilogue&, const T*, const T*, T*, void*); \
  template void depthwise_backward_input(const Conv2dProblem&, const T*, const T*, const T*, T*, void*); \
  template void depthwise_backward_weight(const Conv2dProblem&, const T*, const T*, T*, void*);
CNNOPS_INSTANTIATE(float)
CNNOPS_INSTANTIATE(double)
#undef CNNOPS_INSTANTIATE

}  // namespace cnnops::cpu::CNNOPS_ISA
