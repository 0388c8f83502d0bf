// Which backward_weights Hopper's kernels take, and how they are cut. Compiled for every architecture: a pure function
// of the problem and the device.

#include "conv2d_sm90.h"
#include "conv2d_weight_sm90.h"

namespace cnnops::cuda {
namespace {

// How many slabs `steps` stages are cut into: of the counts that fill one wave of blocks, or two, .., that which ends
// first. A block costs `overhead` steps beside its own: filling the ring, and a tile of floats written and read.
int64_t slabs(int64_t steps, int64_t tiles, int64_t overhead, const Device& device) {
  constexpr int kMostWaves = 4;
  int64_t best = 1, least = INT64_MAX;
  for (int wave = 1; wave <= kMostWaves; ++wave) {
    const int64_t count = std::clamp<int64_t>(wave * device.multiprocessors / tiles, 1, steps);
    const int64_t each = ceil_div(steps, count);
    const int64_t cost = ceil_div(tiles * count, device.multiprocessors) * (each + overhead);
    if (cost < least) best = ceil_div(steps, each), least = cost;
  }
  return best;
}

// What the floats of a block cost, by arithmetic: its share of 4 TB/s, against the products of a stage.
constexpr int64_t kTapsOverhead = 8, kColumnsOverhead = 12;

// All taps in one block, or none where that does not apply.
std::optional<Conv2dPlan> plan_taps(const Conv2dProblem& p, const Device& device) {
  if (p.R != kTaps || p.S != kTaps) return {};
  if (int64_t{p.Q - 1} * p.stride_w < p.pad_w) return {};  // a tap reads nothing but padding: no tensor to describe
  const std::optional<TapsBox> box = taps_box(p, device);
  if (!box || !fits(taps_dy(p, *box))) return {};
  for (int s = 0; s < kTaps; ++s)
    if (!fits(taps_x(p, *box, s))) return {};
  const TapsBoxes boxes(p, *box);
  // Columns beyond Q, and an image beyond N, are multiplied too: at 7/4 of the products, `columns` moves as little.
  const int64_t images = box->pairs_rows ? p.N : chunks(p.N, 2) * int64_t{2};
  if (4 * images * boxes.columns * kGroupPixels > 7 * int64_t{p.N} * p.Q) return {};
  const bool pairs = chunks(p.K / p.groups) % 2 == 0;
  return Conv2dPlan{Conv2dKernel::kWgmma,
                    kChunk,
                    kTaps * kTapColumns,
                    stages_of(box->bytes(), device),
                    pairs ? 2 : 1,
                    slabs(boxes.count(), taps_tiles(p), kTapsOverhead, device),
                    pairs ? "all taps from one read of dy and three of x, which two tiles of filters share"
                          : "all taps from one read of dy and three of x"};
}

Conv2dPlan plan_columns(const Conv2dProblem& p, const Device& device) {
  const bool few_filters = p.K / p.groups <= kChunk, few_columns = !few_filters && column_chunks(p) <= 2;
  const int block_m = few_filters ? kChunk : 2 * kChunk, block_n = few_columns ? 2 * kChunk : 4 * kChunk;
  return {Conv2dKernel::kWgmma,
          block_m,
          block_n,
          stages_of((block_m + block_n) / kChunk * kColumnChunkBytes, device),
          1,
          slabs(columns_steps(p), columns_tiles(p, block_m, block_n), kColumnsOverhead, device),
          few_filters   ? "tap by tap; few filters, which all columns share"
          : few_columns ? "tap by tap; few columns"
                        : "tap by tap, in the tile of the most products for each byte"};
}

// Why Hopper's kernels do not take a problem, or null.
const char* refusal_of(const Conv2dProblem& p, const Device& device) {
#if !defined(CNNOPS_SM90)
  return "the library has no kernels for sm_90a";
#endif
  constexpr int kPieceElements = 8, kMostPadding = 128, kLeastShare = 8;
  const int64_t channels = p.C / p.groups, filters = p.K / p.groups, pixels = int64_t{p.N} * p.P * p.Q;
  if (device.architecture != 90) return "TMA and wgmma are Hopper's";
  if (p.dtype != DType::kHalf && p.dtype != DType::kBFloat16) return "wgmma takes 16-bit numbers here";
  if (p.pad_mode != PadMode::kZeros) return "TMA pads with zeros alone";
  if (p.C % kPieceElements || p.K % kPieceElements) return "TMA takes channels in multiples of 16 bytes";
  if (p.groups > 1 && (channels % kChunk || filters % kChunk)) return "groups are not multiples of 64 channels";
  if (pixels == 0 || pixels > INT32_MAX) return "no pixels, or more than Hopper's kernels count";
  if (p.pad_h > kMostPadding || p.pad_w > kMostPadding) return "padding beyond TMA's im2col mode";
  if (kLeastShare * channels * filters < kChunk * kChunk) return "less than an eighth of a tile of 64 x 64";
  return nullptr;
}

}  // namespace

std::optional<Conv2dPlan> plan_backward_weight_sm90(const Conv2dProblem& p, const Device& device,
                                                    const char*& refusal) {
  refusal = refusal_of(p, device);
  if (refusal) return {};
  if (const auto taps = plan_taps(p, device)) return taps;
  const bool reached =
      int64_t{p.R - 1} * p.dilation_h <= kMostIm2colOffset && int64_t{p.S - 1} * p.dilation_w <= kMostIm2colOffset;
  if (reached && fits(columns_dy(p)) && fits(columns_x(p))) return plan_columns(p, device);
  refusal = "padding, dilation or stride beyond TMA's im2col mode";
  return {};
}

}  // namespace cnnops::cuda
