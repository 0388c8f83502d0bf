// Convolution, dense and grouped, NHWC.
//
//   y[n,p,q,k]       = activation(sum over (r,s,c) of x[n, p*stride_h - pad_h + r*dilation_h, q*.., c]
//                                 * weight[k,r,s,c] + bias[k] + residual[n,p,q,k])
//   dx[n,h,w,c]      = sum over (r,s,k) of dy[n,p,q,k] * weight[k,r,s,c], (p,q) the outputs whose tap (r,s) is (h,w)
//   dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dilation_h, q*.., c]
//   dbias[k]         = sum over (n,p,q) of dy[n,p,q,k]
//
// Layout     x, dx [N,H,W,C]; weight, dweight [K,R,S,C/groups]; y, dy [N,P,Q,K].
// Engine     forward and backward_input are one convolution over taps (conv2d.h): a tile of pixels times a block of
//            filters in registers, input broadcast, filters packed so that a block's lanes lie together:
//            [group][block][r][s][c][lanes]. backward_input is one such convolution for each of the stride_h * stride_w
//            classes of inputs, with the roles of C and K exchanged; it is the transposed convolution's forward too.
//            Each pixel brings its own pointer for each tap, which outside goes to a row of zeros or to the pixel that
//            the padding mode repeats there, so that there is no border case, no im2col and no padded copy. Only
//            backward_input with a padding mode makes the gradient of a padded input and folds it.
// Tile       forward with AVX-512 [AVX2], whole blocks of filters; 16 such tiles make an item: kChunkPixels = 96.
//                          sum over (r,s,c) ->        filters k ->               filters k ->
//                        +------------------------+ +------------------------+ +------------------------+
//            pixels    | | x: 6 pixels of a tap,  |*| weight, packed: 4 [2]  |=| y: 6 x 4 [2] vectors   |
//            (n,p,q)   v | in place, broadcast    | | vectors of 16 [8]: L2  | | of sums: registers     |
//                        +------------------------+ +------------------------+ +------------------------+
//            backward_weight: filters k down, (r,s,c) across, 12 [6] x 2 vectors; the sum over pixels is split.
// Ownership  forward, backward_input: an item owns kChunkPixels pixels of one filter block. backward_weight: an item
//            owns some columns (r,s,c) of some filters over one slice of the pixels; slices depend on the shape alone,
//            and their slabs are added in order, so that any number of threads gives the same bits.
// Traffic    forward, backward_input: the input once for each filter block, packed filters from L2, the output once.
//            backward_weight: for each item its pixels' dy and channels of x, from L1 but for the first touch.

#include "conv2d.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

// Accumulators fill three quarters of the registers; the rest hold filters and a broadcast input.
constexpr int kAccumulators = kVectorRegisters * 3 / 4;
constexpr int kBlockVectors = kVectorRegisters / 8;  // of filters
constexpr int kMaxPixels = 12;
constexpr int kChunkPixels = 96;  // a multiple of every tile's pixels

constexpr int tile_pixels(int vectors) { return std::min(kMaxPixels, kAccumulators / vectors); }

// Filters of one group, cut into vectors and blocks of vectors; the last ones may be padded.
template <class T>
struct Blocks {
  int channels;
  int64_t vectors() const { return ceil_div(channels, kLanes<T>); }
  int64_t count() const { return ceil_div(vectors(), kBlockVectors); }
  int64_t first(int64_t block) const { return block * kBlockVectors * kLanes<T>; }
  int width(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kBlockVectors, vectors() - block * kBlockVectors)) * kLanes<T>;
  }
  int64_t padded() const { return vectors() * kLanes<T>; }
};

// packed[group][block of K][(r,s,c)][lanes] = weight[k][(r,s,c)]: a transpose, in pieces that stay in L1.
template <class T>
void pack_filters_forward(const Conv2dProblem& p, const T* weight, T* packed) {
  constexpr int64_t kColumns = 16, kPiece = 16 * kColumns;
  const Blocks<T> blocks{p.K / p.groups};
  const int64_t columns = int64_t{p.R} * p.S * (p.C / p.groups), pieces = ceil_div(columns, kPiece);
  parallel_for(p.groups * blocks.count() * pieces, 2 * std::min(columns, kPiece) * blocks.width(0), [=](int64_t item) {
    const int64_t piece = item % pieces, block = item / pieces % blocks.count(), group = item / pieces / blocks.count();
    const int64_t first = blocks.first(block), width = blocks.width(block);
    const int64_t filters = std::min<int64_t>(width, blocks.channels - first);
    const T* from = weight + (group * blocks.channels + first) * columns;
    T* to = packed + (group * blocks.padded() + first) * columns;
    const int64_t end = std::min((piece + 1) * kPiece, columns);
    for (int64_t begin = piece * kPiece; begin < end; begin += kColumns) {
      const int64_t stop = std::min(begin + kColumns, end);
      for (int64_t k = 0; k < filters; ++k)
        for (int64_t j = begin; j < stop; ++j) to[j * width + k] = from[k * columns + j];
      for (int64_t j = begin; j < stop; ++j) std::fill(to + j * width + filters, to + (j + 1) * width, T{});
    }
  });
}

// packed[group][block of C][r,s][k][lanes] = weight[k][r,s][c]
template <class T>
void pack_filters_backward(const Conv2dProblem& p, const T* weight, T* packed) {
  const Blocks<T> blocks{p.C / p.groups};
  const int64_t taps = int64_t{p.R} * p.S, filters = p.K / p.groups;
  parallel_for(p.groups * blocks.count() * taps, 2 * filters * blocks.width(0), [=](int64_t item) {
    const int64_t tap = item % taps, block = item / taps % blocks.count(), group = item / taps / blocks.count();
    const int64_t first = blocks.first(block), width = blocks.width(block);
    const int64_t channels = std::min<int64_t>(width, blocks.channels - first);
    T* to = packed + (group * blocks.padded() + first) * taps * filters + tap * filters * width;
    for (int64_t k = 0; k < filters; ++k, to += width) {
      const T* from = weight + ((group * filters + k) * taps + tap) * blocks.channels + first;
      std::copy(from, from + channels, to);
      std::fill(to + channels, to + width, T{});
    }
  });
}

template <class T, int kPixels, int kVectors>
using Tile = Vec<T>[kPixels][kVectors];

// sum[i][.] += x[i][c] * filters[c][.] over `channels` c.
template <class T, int kPixels, int kVectors>
[[gnu::always_inline]] inline void accumulate(Tile<T, kPixels, kVectors>& sum, const T* const (&x)[kPixels],
                                              const T* filters, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c, filters += kVectors * kLanes<T>) {
    Vec<T> filter[kVectors];
    unroll<kVectors>([&](auto v) { filter[v] = load(filters + v * kLanes<T>); });
    unroll<kPixels>([&](auto i) {
      const Vec<T> input = splat(x[i][c]);
      unroll<kVectors>([&](auto v) { sum[i][v] += input * filter[v]; });
    });
  }
}

// With few channels the sum for each tap is short. But where neighbouring taps are neighbours in memory, a row of taps
// is one run of S * C inputs, which the packed filters lie along too.
constexpr int kRunChannels = 8, kRunLength = 128;

template <class T>
bool has_runs(const TapConv<T>& conv) {
  const TapAxis& w = conv.w;
  return conv.in_channels <= kRunChannels && w.taps * conv.in_channels <= kRunLength && conv.groups == 1 &&
         w.offset_step == 1 && w.tap_step == 1 && w.taps == conv.filter_width;
}

// Where a pixel finds the row of its taps dh below it, with the padding mode's pixels beside the input; one that is cut
// by the input's edge is copied. Out of line, so that the code for zeros stays small.
template <class T>
[[gnu::noinline]] const T* repeated_run(const TapConv<T>& conv, const Pixel& pixel, int64_t dh, T* cut) {
  const int64_t pitch = conv.in_pitch(), taps = conv.w.taps;
  if (pixel.w >= 0 && pixel.w + taps <= conv.w.extent) return repeated(conv, pixel, dh, 0);
  for (int64_t s = 0; s < taps; ++s) std::copy_n(repeated(conv, pixel, dh, s), pitch, cut + s * pitch);
  return cut;
}

// Where each pixel finds row r of its taps; one that is cut by the input's edge is copied. False if all are zeros.
template <class T, int kPixels>
inline bool locate_run(const TapConv<T>& conv, const Pixel (&pixels)[kPixels], int r, T (&cut)[kPixels][kRunLength],
                       const T* (&x)[kPixels]) {
  const int64_t dh = conv.h.offset_step * r, pitch = conv.in_pitch(), taps = conv.w.taps;
  const bool zeros = conv.pad_mode == PadMode::kZeros;
  bool any = !zeros;
  for (int i = 0; i < kPixels; ++i) {
    const Pixel& pixel = pixels[i];
    const bool inside = !outside(pixel.h + dh, conv.h.extent);
    const T* run = conv.in + (pixel.in + dh * conv.w.extent * pitch);
    x[i] = conv.zeros;
    any |= inside;
    if (inside && pixel.w >= 0 && pixel.w + taps <= conv.w.extent) {
      x[i] = run;
      continue;
    }
    if (!zeros && pixel.out >= 0) x[i] = repeated_run(conv, pixel, dh, cut[i]);
    if (!zeros || !inside) continue;
    const int64_t begin = std::clamp<int64_t>(-pixel.w, 0, taps),
                  end = std::clamp(conv.w.extent - pixel.w, begin, taps);
    std::fill(cut[i], cut[i] + taps * pitch, T{});
    std::copy(run + begin * pitch, run + end * pitch, cut[i] + begin * pitch);
    x[i] = cut[i];
  }
  return any;
}

template <class T, int kPixels, int kVectors>
void convolve_tile(const TapConv<T>& conv, const Pixel (&pixels)[kPixels], int64_t channel, const T* filters,
                   Tile<T, kPixels, kVectors>& result) {
  Tile<T, kPixels, kVectors> sum = {};
  T cut[kPixels][kRunLength];
  const bool runs = has_runs(conv);
  const int steps = runs ? 1 : conv.w.taps, length = runs ? conv.w.taps * conv.in_channels : conv.in_channels;
  for (int r = 0; r < conv.h.taps; ++r)
    for (int s = 0; s < steps; ++s) {
      const T* x[kPixels];
      const bool any = runs ? locate_run(conv, pixels, r, cut, x) : locate_tap(conv, pixels, r, s, channel, x);
      if (!any) continue;
      const int64_t tap =
          int64_t{conv.h.tap + conv.h.tap_step * r} * conv.filter_width + conv.w.tap + conv.w.tap_step * s;
      accumulate<T, kPixels, kVectors>(sum, x, filters + tap * conv.in_channels * kVectors * kLanes<T>, length);
    }
  unroll<kPixels>([&](auto i) { unroll<kVectors>([&](auto v) { result[i][v] = sum[i][v]; }); });
}

// The pixels [begin, end) of one block of kVectors vectors of filters.
template <class T, int kVectors>
void convolve_chunk(const TapConv<T>& conv, const Epilogue& epilogue, const T* filters, int64_t group, int64_t first,
                    int64_t begin, int64_t end) {
  constexpr int kPixels = tile_pixels(kVectors);
  const int64_t channel = group * conv.out_channels + first;
  PixelWalk<T> walk(conv, begin);
  for (int64_t at = begin; at < end; at += kPixels) {
    Pixel pixels[kPixels];
    for (int i = 0; i < kPixels; ++i) pixels[i] = at + i < end ? walk.next() : kNoPixel;

    Tile<T, kPixels, kVectors> sum;
    convolve_tile<T, kPixels, kVectors>(conv, pixels, group * conv.in_channels, filters, sum);
    for (int i = 0; i < kPixels && at + i < end; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t k = channel + v * kLanes<T>;
        const int count = static_cast<int>(std::min<int64_t>(kLanes<T>, conv.out_channels - first - v * kLanes<T>));
        finish<T>(epilogue, sum[i][v], conv.out, pixels[i].out + k, k, 1, count);
      }
  }
}

template <class T, int kVectors = kBlockVectors>
void convolve_chunk(int vectors, const TapConv<T>& conv, const Epilogue& epilogue, const T* filters, int64_t group,
                    int64_t first, int64_t begin, int64_t end) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors)
      return convolve_chunk<T, kVectors - 1>(vectors, conv, epilogue, filters, group, first, begin, end);
  convolve_chunk<T, kVectors>(conv, epilogue, filters, group, first, begin, end);
}

// Filters that stay in L2 all see a chunk of pixels before the next one, so that its outputs are written together;
// otherwise a thread stays with one block of filters.
constexpr int64_t kHotBytes = 1 << 20;

template <class T>
void convolve(const TapConv<T>& conv, const Epilogue& epilogue, const T* packed, int64_t columns) {
  const Blocks<T> blocks{conv.out_channels};
  const int64_t chunks = ceil_div(conv.pixels(), kChunkPixels), panels = conv.groups * blocks.count();
  const bool hot = conv.groups * blocks.padded() * columns * static_cast<int64_t>(sizeof(T)) <= kHotBytes;
  const int64_t products = int64_t{conv.h.taps} * conv.w.taps * conv.in_channels * blocks.width(0);
  parallel_for(panels * chunks, std::min<int64_t>(conv.pixels(), kChunkPixels) * products,
               [&, blocks, chunks, panels, hot](int64_t item) {
                 const int64_t chunk = hot ? item / panels : item % chunks, panel = hot ? item % panels : item / chunks;
                 const int64_t block = panel % blocks.count(), group = panel / blocks.count(),
                               first = blocks.first(block);
                 const int64_t begin = chunk * kChunkPixels, end = std::min(begin + kChunkPixels, conv.pixels());
                 const T* filters = packed + (group * blocks.padded() + first) * columns;
                 convolve_chunk<T>(blocks.width(block) / kLanes<T>, conv, epilogue, filters, group, first, begin, end);
               });
}

// The workspace of an engine run: filters packed for `out_channels` lanes, and the row of zeros.
template <class T>
struct Packed {
  T *filters, *zeros;
  Packed(Arena& arena, const Conv2dProblem& p, int in_channels, int out_channels)
      : filters(arena.take<T>(p.groups * Blocks<T>{out_channels}.padded() * p.R * p.S * in_channels)),
        zeros(arena.take<T>(zero_count(in_channels))) {}

  void clear_zeros(int in_channels) const { std::fill(zeros, zeros + zero_count(in_channels), T{}); }
  static int zero_count(int in_channels) { return std::max(in_channels, kRunLength); }
};

template <class T>
void forward(const Conv2dProblem& p, const Epilogue& epilogue, const T* x, const T* weight, T* y, void* workspace) {
  const int channels = p.C / p.groups;
  Arena arena(workspace);
  const Packed<T> packed(arena, p, channels, p.K / p.groups);
  packed.clear_zeros(channels);
  pack_filters_forward(p, weight, packed.filters);
  convolve(forward_conv<T>(p, x, packed.zeros, y), epilogue, packed.filters, int64_t{p.R} * p.S * channels);
}

// Every pixel of dx gets the bias, or zeros where there is none.
template <class T>
void fill_inputs(const Conv2dProblem& p, const T* bias, T* dx) {
  const int64_t C = p.C, pixels = int64_t{p.N} * p.H * p.W, piece = ceil_div(65536, C);
  parallel_for(ceil_div(pixels, piece), piece * C, [=](int64_t i) {
    const int64_t begin = i * piece, end = std::min(pixels, begin + piece);
    if (!bias) return std::fill(dx + begin * C, dx + end * C, T{});
    for (int64_t at = begin; at < end; ++at) std::copy_n(bias, C, dx + at * C);
  });
}

template <class T>
void backward_input(const Conv2dProblem& p, const T* dy, const T* weight, const T* bias, T* dx, void* workspace) {
  const int filters = p.K / p.groups;
  Arena arena(workspace);
  const Packed<T> packed(arena, p, filters, p.C / p.groups);
  packed.clear_zeros(filters);
  pack_filters_backward(p, weight, packed.filters);
  bool all_reached = true;
  for_backward_classes<T>(p, dy, packed.zeros, dx, [&](const TapConv<T>& conv) { all_reached &= conv.has_taps(); });
  // Inputs that no tap reaches lie strided among the others: a sweep over all is faster than picking them out.
  if (!all_reached) fill_inputs(p, bias, dx);
  for_backward_classes<T>(p, dy, packed.zeros, dx, [&](const TapConv<T>& conv) {
    if (conv.has_taps()) convolve(conv, Epilogue{.bias = bias}, packed.filters, int64_t{p.R} * p.S * filters);
  });
}

// The same convolution on an input that is padded already.
Conv2dProblem on_padded(Conv2dProblem p) {
  p.H += 2 * p.pad_h;
  p.W += 2 * p.pad_w;
  p.pad_h = p.pad_w = 0;
  p.pad_mode = PadMode::kZeros;
  return p;
}

// dx[n,h,w,c] = sum of dpadded[n,i,j,c] over the (i,j) where the padding mode repeats (h,w), in order of i, then j.
template <class T>
void fold_padding(const Conv2dProblem& p, const T* dpadded, T* dx) {
  const int64_t H = p.H, W = p.W, C = p.C, width = W + 2 * p.pad_w;
  const auto add = [](const T* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  };
  parallel_for(p.N * H, width * C, [=, &p](int64_t item) {
    const int64_t n = item / H, h = item % H;
    T* to = dx + item * W * C;
    std::fill(to, to + W * C, T{});
    const auto add_row = [&](int64_t i) {
      if (source(p.pad_mode, i, H) != h) return;
      const T* from = dpadded + ((n * (H + 2 * p.pad_h) + i + p.pad_h) * width + p.pad_w) * C;
      for (int64_t j = -p.pad_w; j < 0; ++j) add(from + j * C, C, to + source(p.pad_mode, j, W) * C);
      add(from, W * C, to);
      for (int64_t j = W; j < W + p.pad_w; ++j) add(from + j * C, C, to + source(p.pad_mode, j, W) * C);
    };
    for (int64_t i = -p.pad_h; i < 0; ++i) add_row(i);
    add_row(h);
    for (int64_t i = H; i < H + p.pad_h; ++i) add_row(i);
  });
}

template <class T>
int64_t input_gradient_workspace(const Conv2dProblem& p) {
  if (p.pad_mode != PadMode::kZeros) {
    const Conv2dProblem padded = on_padded(p);
    Arena arena;
    arena.take<T>(int64_t{padded.N} * padded.H * padded.W * padded.C);
    return arena.used() + input_gradient_workspace<T>(padded);
  }
  if (is_depthwise(p)) return depthwise_backward_workspace(p, true, false);
  Arena arena;
  Packed<T>(arena, p, p.K / p.groups, p.C / p.groups);
  return arena.used();
}

// dx, plus the bias [C] that a transposed convolution adds and a gradient has not: null there.
template <class T>
void input_gradient(const Conv2dProblem& p, const T* dy, const T* weight, const T* bias, T* dx, void* workspace) {
  if (p.pad_mode != PadMode::kZeros) {
    const Conv2dProblem padded = on_padded(p);
    Arena arena(workspace);
    T* dpadded = arena.take<T>(int64_t{padded.N} * padded.H * padded.W * padded.C);
    input_gradient<T>(padded, dy, weight, nullptr, dpadded, static_cast<char*>(workspace) + arena.used());
    return fold_padding(p, dpadded, dx);
  }
  (is_depthwise(p) ? depthwise_backward_input<T> : backward_input<T>)(p, dy, weight, bias, dx, workspace);
}

// backward_weight is a product over pixels: rows are filters, broadcast from dy; columns are (r,s,c), vectors of x.

constexpr int kRows = kAccumulators / 2, kRowStep = kRows / 3, kColumnVectors = 2;
constexpr int kBlockPixels = 128;  // of x for one panel, and a dy tile, stay in L1
constexpr int kItemPanels = 16;    // panels of columns that share a dy tile
constexpr int kItemFilters = 128;  // filters that share the panels' pixel lists
constexpr int64_t kItems = 32;     // wanted, so that the work divides evenly among threads

template <class T>
constexpr int kPanel = kColumnVectors * kLanes<T>;

// How the work is cut: by shape alone.
template <class T>
struct WeightPlan {
  const Conv2dProblem& p;
  int channels, filters, taps;
  bool gathered;   // columns are packed tightly, because channels do not fill the lanes
  int64_t panels;  // groups of columns that fit the registers
  int64_t item_panels, item_filters;
  int64_t panel_items, filter_items, blocks, slices, slice_blocks;

  explicit WeightPlan(const Conv2dProblem& p)
      : p(p), channels(p.C / p.groups), filters(p.K / p.groups), taps(p.R * p.S) {
    gathered = channels % kLanes<T> != 0;
    const int64_t channel_panels = ceil_div(channels, kPanel<T>);
    panels = gathered ? ceil_div(columns(), kPanel<T>) : channel_panels * taps;
    item_panels = gathered || taps >= kItemPanels ? kItemPanels : kItemPanels / taps * taps;
    // All taps of few channels rather than half the taps of many: they overlap in cache.
    if (!gathered && taps * 2 > kItemPanels) item_panels = std::min(taps, kItemPanels);
    panel_items = ceil_div(panels, item_panels);
    item_filters = ceil_div(ceil_div(filters, ceil_div(filters, kItemFilters)), kRowStep) * kRowStep;
    filter_items = ceil_div(filters, item_filters);
    blocks = ceil_div(int64_t{p.N} * p.P * p.Q, kBlockPixels);
    slice_blocks = ceil_div(blocks, std::min(blocks, ceil_div(kItems, p.groups * panel_items * filter_items)));
    slices = ceil_div(blocks, slice_blocks);
  }
  int64_t columns() const { return int64_t{taps} * channels; }
  // Slabs of gathered columns are padded to whole panels.
  int64_t pitch() const { return gathered ? panels * kPanel<T> : columns(); }
  int64_t slab() const { return p.K * pitch(); }
  bool in_place() const { return slices == 1 && !gathered; }
  int64_t items() const { return slices * p.groups * filter_items * panel_items; }
};

// The pixels of a block that find a tap inside, or a pixel repeated: the row of x there, and the pixel's place in the
// block.
template <class T>
struct Reads {
  int count;
  int place[kBlockPixels];
  const T* x[kBlockPixels];
};

// dweight[i][.] (+)= sum over reads of dy[place][i] * x[.], for `rows` i.
template <class T, int kTileRows, int kVectors>
void add_products(const Reads<T>& reads, const T* dy, bool fresh, int rows, T* dweight, int64_t pitch) {
  Tile<T, kTileRows, kVectors> sum = {};
  for (int j = 0; j < reads.count; ++j) {
    const T *x = reads.x[j], *row = dy + int64_t{reads.place[j]} * kTileRows;
    Vec<T> input[kVectors];
    unroll<kVectors>([&](auto v) { input[v] = load(x + v * kLanes<T>); });
    unroll<kTileRows>([&](auto i) {
      const Vec<T> gradient = splat(row[i]);
      unroll<kVectors>([&](auto v) { sum[i][v] += gradient * input[v]; });
    });
  }
  unroll<kTileRows>([&](auto i) {
    if (i < rows)
      unroll<kVectors>([&](auto v) {
        T* to = dweight + i * pitch + v * kLanes<T>;
        store(to, fresh ? sum[i][v] : sum[i][v] + load(to));
      });
  });
}

template <class T, int kTileRows>
void add_products(bool half, const Reads<T>& reads, const T* dy, bool fresh, int rows, T* dweight, int64_t pitch) {
  (half ? add_products<T, kTileRows, kColumnVectors / 2>
        : add_products<T, kTileRows, kColumnVectors>)(reads, dy, fresh, rows, dweight, pitch);
}

// One item: a range of panels and filters of one group over one slice of the pixels.
template <class T>
class WeightItem {
 public:
  WeightItem(const WeightPlan<T>& plan, int64_t item, const T* dy, const T* x, T* slabs)
      : plan_(plan),
        p_(plan.p),
        dy_(dy),
        conv_(forward_conv<T>(plan.p, x, nullptr, nullptr)),
        x_size_(int64_t{p_.N} * p_.H * p_.W * p_.C) {
    panel_begin_ = item % plan.panel_items * plan.item_panels;
    panel_end_ = std::min(panel_begin_ + plan.item_panels, plan.panels);
    item /= plan.panel_items;
    filter_begin_ = item % plan.filter_items * plan.item_filters;
    filter_end_ = std::min<int64_t>(filter_begin_ + plan.item_filters, plan.filters);
    item /= plan.filter_items;
    group_ = item % p_.groups;
    slice_ = item / p_.groups;
    dweight_ = slabs + slice_ * plan.slab() + group_ * plan.filters * plan.pitch();
  }

  void run() {
    const int64_t begin = slice_ * plan_.slice_blocks, end = std::min(begin + plan_.slice_blocks, plan_.blocks);
    for (int64_t block = begin; block < end; ++block) {
      find_pixels(block * kBlockPixels);
      if (plan_.gathered)
        gather_panels();
      else
        list_reads();
      for (int64_t k = filter_begin_; k < filter_end_; k += kRows) add_filters(k, block == begin);
    }
  }

 private:
  void find_pixels(int64_t first) {
    first_pixel_ = first;
    pixels_ = static_cast<int>(std::min<int64_t>(kBlockPixels, conv_.pixels() - first));
    int64_t n = first / (conv_.h.count * conv_.w.count), i = first / conv_.w.count % conv_.h.count,
            j = first % conv_.w.count;
    for (int at = 0; at < pixels_; ++at) {
      const int64_t h = conv_.h.in_step * i + conv_.h.offset, w = conv_.w.in_step * j + conv_.w.offset;
      pixel_[at] = {h, w, ((n * conv_.h.extent + h) * conv_.w.extent + w) * conv_.in_pitch(), 0};
      if (++j < conv_.w.count) continue;
      j = 0;
      if (++i < conv_.h.count) continue;
      i = 0;
      ++n;
    }
  }

  void list_reads() {
    for (int64_t panel = panel_begin_; panel < panel_end_; ++panel) {
      const int64_t tap = panel % plan_.taps, channel = panel / plan_.taps * kPanel<T>;
      const int64_t dh = conv_.h.offset_step * (tap / p_.S), dw = conv_.w.offset_step * (tap % p_.S);
      const int64_t shift = (dh * conv_.w.extent + dw) * conv_.in_pitch() + group_ * plan_.channels + channel;
      Reads<T>& reads = reads_[panel - panel_begin_];
      reads.count = 0;
      for (int at = 0; at < pixels_; ++at) {
        const Pixel& pixel = pixel_[at];
        const T* x = conv_.in + (pixel.in + shift);
        if (outside(pixel.h + dh, conv_.h.extent) || outside(pixel.w + dw, conv_.w.extent)) {
          if (conv_.pad_mode == PadMode::kZeros) continue;
          x = repeated(conv_, pixel, dh, dw) + group_ * plan_.channels + channel;
        }
        reads.place[reads.count] = at;
        reads.x[reads.count++] = x;
      }
    }
  }

  // Copies the item's columns of every pixel, so that they fill the lanes. What lies beyond the last column is
  // arbitrary, and so are the padded columns of the slab.
  void gather_panels() {
    const int64_t width = (panel_end_ - panel_begin_) * kPanel<T>, first = panel_begin_ * kPanel<T>;
    const int64_t end = std::min(first + width, plan_.columns()), run = int64_t{p_.S} * plan_.channels;
    for (int at = 0; at < pixels_; ++at)
      for (int64_t column = first, r = first / run; column < end; column = ++r * run)
        gather_run(pixel_[at], r, column - r * run, std::min((r + 1) * run, end) - r * run,
                   gathered_ + at * width + (column - first));
    for (int64_t panel = panel_begin_; panel < panel_end_; ++panel) {
      Reads<T>& reads = reads_[panel - panel_begin_];
      reads.count = pixels_;
      for (int at = 0; at < pixels_; ++at) {
        reads.place[at] = at;
        reads.x[at] = gathered_ + at * width + (panel - panel_begin_) * kPanel<T>;
      }
    }
  }

  // Columns (s,c) in [begin, end) of row r of a pixel's taps, outside what the padding mode has there. May write up to
  // a vector more.
  void gather_run(const Pixel& pixel, int64_t r, int64_t begin, int64_t end, T* to) const {
    const int64_t dh = conv_.h.offset_step * r, channels = plan_.channels, pitch = conv_.in_pitch();
    const bool inside = !outside(pixel.h + dh, conv_.h.extent);
    const int64_t at = pixel.in + dh * conv_.w.extent * pitch + group_ * channels;
    const bool dense = conv_.w.offset_step == 1 && p_.groups == 1 && at + end + kLanes<T> <= x_size_;
    if (inside && dense && pixel.w >= 0 && pixel.w + p_.S <= conv_.w.extent) {
      for (int64_t i = 0; i < end - begin; i += kLanes<T>) store(to + i, load(conv_.in + at + begin + i));
      return;
    }
    const bool zeros = conv_.pad_mode == PadMode::kZeros;
    if (zeros) std::fill(to, to + (end - begin), T{});
    if (zeros && !inside) return;
    for (int64_t s = begin / channels, c = begin % channels; s * channels + c < end; ++s, c = 0) {
      const int64_t stop = std::min(channels, end - s * channels), step = conv_.w.offset_step * s;
      if (!zeros) {
        const T* from = repeated(conv_, pixel, dh, step) + group_ * channels;
        std::copy(from + c, from + stop, to);
      } else if (!outside(pixel.w + step, conv_.w.extent)) {
        std::copy(conv_.in + at + step * pitch + c, conv_.in + at + step * pitch + stop, to);
      }
      to += stop - c;
    }
  }

  // The products of kRows filters, or of the fewer that are left, in the smallest tile that holds them.
  void add_filters(int64_t k, bool fresh) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, filter_end_ - k));
    if (rows > 2 * kRowStep) return add_filters<kRows>(k, rows, fresh);
    if (rows > kRowStep) return add_filters<2 * kRowStep>(k, rows, fresh);
    add_filters<kRowStep>(k, rows, fresh);
  }

  template <int kTileRows>
  void add_filters(int64_t k, int rows, bool fresh) {
    pack_dy<kTileRows>(k, rows);
    for (int64_t panel = panel_begin_; panel < panel_end_; ++panel) {
      const int64_t tap = panel % plan_.taps, channel = panel / plan_.taps * kPanel<T>;
      const int64_t column = plan_.gathered ? panel * kPanel<T> : tap * plan_.channels + channel;
      const bool half = !plan_.gathered && plan_.channels - channel < kPanel<T>;
      add_products<T, kTileRows>(half, reads_[panel - panel_begin_], dy_tile_, fresh, rows,
                                 dweight_ + k * plan_.pitch() + column, plan_.pitch());
    }
  }

  // dy of filters [k, k + rows), padded with zeros: [pixel][kTileRows].
  template <int kTileRows>
  void pack_dy(int64_t k, int rows) {
    const T* from = dy_ + first_pixel_ * p_.K + group_ * plan_.filters + k;
    T* to = dy_tile_;
    for (int at = 0; at < pixels_; ++at, from += p_.K, to += kTileRows)
      if (rows == kTileRows)
        std::memcpy(to, from, kTileRows * sizeof(T));
      else
        for (int i = 0; i < kTileRows; ++i) to[i] = i < rows ? from[i] : T{};
  }

  const WeightPlan<T>& plan_;
  const Conv2dProblem& p_;
  const T* dy_;
  const TapConv<T> conv_;
  const int64_t x_size_;
  T* dweight_;
  int64_t panel_begin_, panel_end_, filter_begin_, filter_end_, group_, slice_, first_pixel_;
  int pixels_;
  Pixel pixel_[kBlockPixels];
  Reads<T> reads_[kItemPanels];
  alignas(64) T dy_tile_[kBlockPixels * kRows];
  alignas(64) T gathered_[kBlockPixels * kItemPanels * kPanel<T> + kLanes<T>];
};

template <class T>
void backward_weight(const Conv2dProblem& p, const T* dy, const T* x, T* dweight, void* workspace) {
  const WeightPlan<T> plan(p);
  T* slabs = plan.in_place() ? dweight : static_cast<T*>(workspace);
  parallel_for(plan.items(), plan.slab() * p.N * p.P * p.Q / plan.items(),
               [&](int64_t item) { WeightItem<T>(plan, item, dy, x, slabs).run(); });
  if (!plan.in_place()) sum_slabs(slabs, plan.slices, plan.slab(), p.K, plan.columns(), plan.pitch(), dweight);
}

// Slices of pixels for dbias: enough work in each to be worth a thread.
constexpr int64_t bias_slices(int64_t pixels) { return std::min<int64_t>(64, ceil_div(pixels, 64)); }

template <class T>
void backward_bias(const Conv2dProblem& p, const T* dy, T* dbias, void* workspace) {
  const int64_t pixels = int64_t{p.N} * p.P * p.Q, slice = ceil_div(pixels, bias_slices(pixels)), K = p.K;
  T* slabs = static_cast<T*>(workspace);
  const int64_t slices = ceil_div(pixels, slice);
  parallel_for(slices, slice * K, [=](int64_t i) {
    T* sum = slabs + i * K;
    std::fill(sum, sum + K, T{});
    for (int64_t at = i * slice; at < std::min((i + 1) * slice, pixels); ++at)
      for (int64_t k = 0; k < K; ++k) sum[k] += dy[at * K + k];
  });
  sum_slabs(slabs, slices, K, 1, K, K, dbias);
}

}  // namespace

int64_t conv2d_forward_workspace(const Conv2dProblem& p, const Epilogue&) {
  if (is_depthwise(p)) return depthwise_forward_workspace(p);
  return for_conv_dtype(p.dtype, [&](auto t) {
    Arena arena;
    Packed<decltype(t)>(arena, p, p.C / p.groups, p.K / p.groups);
    return arena.used();
  });
}

// The passes run one after another and share the space.
int64_t conv2d_backward_workspace(const Conv2dProblem& p, bool need_dx, bool need_dweight, bool need_dbias) {
  return for_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    int64_t bytes = 0;
    if (need_dbias) bytes = bias_slices(int64_t{p.N} * p.P * p.Q) * p.K * static_cast<int64_t>(sizeof(T));
    if (need_dx) bytes = std::max(bytes, input_gradient_workspace<T>(p));
    if (is_depthwise(p)) return std::max(bytes, depthwise_backward_workspace(p, false, need_dweight));
    if (need_dweight) {
      const WeightPlan<T> plan(p);
      if (!plan.in_place()) bytes = std::max<int64_t>(bytes, plan.slices * plan.slab() * sizeof(T));
    }
    return bytes;
  });
}

void conv2d_forward(const Conv2dProblem& p, const Epilogue& epilogue, const void* x, const void* weight, void* y,
                    void* workspace, Stream) {
  for_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = is_depthwise(p) ? depthwise_forward<T> : forward<T>;
    run(p, epilogue, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), workspace);
  });
}

void conv2d_backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                     void* dbias, void* workspace, Stream) {
  for_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const T* gradient = static_cast<const T*>(dy);
    if (dx) input_gradient<T>(p, gradient, static_cast<const T*>(weight), nullptr, static_cast<T*>(dx), workspace);
    if (dweight)
      (is_depthwise(p) ? depthwise_backward_weight<T> : backward_weight<T>)(p, gradient, static_cast<const T*>(x),
                                                                            static_cast<T*>(dweight), workspace);
    if (dbias) backward_bias<T>(p, gradient, static_cast<T*>(dbias), workspace);
  });
}

void conv_transpose2d_forward(const Conv2dProblem& p, const void* x, const void* weight, const void* bias, void* y,
                              void* workspace, Stream) {
  for_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    input_gradient(p, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                   static_cast<T*>(y), workspace);
  });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
