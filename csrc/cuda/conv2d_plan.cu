// The choice of a kernel: the first row of a pass's list that the problem and the device allow.

#include <algorithm>
#include <optional>
#include <string>

#include "conv2d.cuh"
#include "conv2d_sm90.h"
#include "depthwise_conv2d.h"
#include "depthwise_nchw.h"
#include "depthwise_toeplitz.h"

namespace cnnops::cuda {
namespace {

struct Row {
  bool allowed;
  Conv2dKernel kernel;
  int block_m, block_n, stages;
  const char* reason;
};

template <class... Rows>
Conv2dPlan first_of(const Rows&... rows) {
  for (const Row& row : {rows...})
    if (row.allowed) return {row.kernel, row.block_m, row.block_n, row.stages, 1, 1, row.reason};
  throw std::runtime_error("conv2d: no kernel takes the problem");
}

template <class Tile>
Row portable(bool allowed, const char* reason) {
  return {allowed, Conv2dKernel::kPortable, Tile::kM, Tile::kN, Tile::kStages, reason};
}

// A pass as a product: rows and columns of a group's result, the terms of each sum, and what the tiles ask of them.
struct Gemm {
  int64_t m, n, k;
  int groups;
  bool aligned;  // whether 16 bytes never hold what belongs to different taps or groups

  template <class Tile>
  bool fits(const Conv2dProblem& p, const Device& device) const {
    if (!aligned && Tile::kAligned) return false;
    const bool exact = p.dtype == DType::kFloat && !p.tf32;
    if (exact && Tile::kM * Tile::kN > 128 * 64) return false;
    // Rings of floats and of 16-bit numbers have about the same bytes in all three orders of the operands.
    const size_t bytes = std::max({shared_bytes<Half, Tile, true, true>(), shared_bytes<Tf32, Tile, true, false>(),
                                   shared_bytes<Tf32, Tile, false, false>()});
    return bytes <= static_cast<size_t>(device.shared_bytes);
  }
  template <class Tile>
  bool fills(const Device& device) const {
    return tiles(m, n, groups, Tile::kM, Tile::kN) >= device.multiprocessors;
  }
};

// Channels or filters of a pack.
int slots_of(const Conv2dProblem& p) { return p.dtype == DType::kFloat ? kBlockK<float> : kBlockK<Half>; }

// Groups that a pack has several of, or one that fills it.
bool packs(const Conv2dProblem& p) {
  constexpr int64_t kMostTaps = 1 << 20;  // so that a pack's filters are counted in 32 bits
  return p.groups > 1 && p.C / p.groups <= slots_of(p) && p.K / p.groups <= slots_of(p) &&
         int64_t{p.R} * p.S <= kMostTaps;
}

Row packed(const Conv2dProblem& p, int block_m, int block_n) {
  return {packs(p), Conv2dKernel::kPacked, block_m, block_n, 3, "groups of few channels"};
}

Row depthwise(const Conv2dProblem& p, DepthwisePass pass, const Device& device) {
  if (!depthwise_takes(p, pass, device)) return {};
  const DepthwiseCut cut = depthwise_cut(p, pass, device);
  return {true,
          Conv2dKernel::kDepthwise,
          cut.step * cut.columns,
          cut.channels,
          2,
          cut.sized ? "a channel to a group" : "a channel to a group, of a filter of any size"};
}

// Of problems without channels_last, which conv2d_nchw has taken. A strip's rows and a tile's channels stand for a
// tile.
Conv2dPlan nchw(const Conv2dProblem& p, DepthwisePass pass, const Device& device) {
  const NchwCut cut = nchw_cut(p, pass, device);
  return {Conv2dKernel::kNchw,
          cut.rows,
          cut.planes,
          2,
          1,
          pass == DepthwisePass::kWeight ? cut.parts : 1,
          "a channel to a group, in planes"};
}

// Whether the taps of all channels fit in the rows of an im2col matrix in shared memory.
Row stem(const Conv2dProblem& p, const Device& device, int64_t least_taps, int64_t most_taps, int block_m,
         int block_n) {
  constexpr int kMostChannels = 4, kMostColumns = 1 << 28;
  constexpr int64_t kMostReach = 256;  // of a tile's taps, so that the bytes are counted without overflow
  const int64_t taps = int64_t{p.R} * p.S * p.C;
  const bool near = int64_t{p.dilation_h} * p.R + 8 * int64_t{p.stride_h} <= kMostReach &&
                    int64_t{p.dilation_w} * p.S + 8 * int64_t{p.stride_w} <= kMostReach;
  const bool allowed = p.groups == 1 && p.C <= kMostChannels && p.W <= kMostColumns && taps >= least_taps &&
                       taps <= most_taps && near && stem_shared_bytes(p) <= static_cast<size_t>(device.shared_bytes);
  return {allowed, Conv2dKernel::kStem, block_m, block_n, 1, "few input channels"};
}

int vector_of(const Conv2dProblem& p) { return p.dtype == DType::kFloat ? 4 : 8; }

// Large filters of one channel each.
template <int kSide>
Row toeplitz(const Conv2dProblem& p, const Device& device, bool chosen, const char* reason) {
  const auto large = [](int taps) { return taps >= kLeastToeplitzTaps && taps <= kMostToeplitzTaps; };
  const bool depthwise = p.groups > 1 && p.groups == p.C && p.C == p.K && p.dtype != DType::kFloat;
  const bool dense = p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  const bool allowed = chosen && depthwise && dense && large(p.R) && large(p.S) &&
                       ToeplitzLayout<kSide>(p.R, p.S, false).end <= static_cast<size_t>(device.shared_bytes);
  return {allowed, Conv2dKernel::kToeplitz, kSide, kSide, 1, reason};
}

// P x Q is the result, y or dx. Large tiles read x less often, small ones compute less beside the result.
Row large_toeplitz(const Conv2dProblem& p, const Device& device, int P, int Q) {
  const auto tiles = [&](int side) { return ceil_div(P, side) * ceil_div(Q, side); };
  const int64_t large = tiles(kLargeToeplitzSide), small = tiles(kSmallToeplitzSide);
  const bool fills = p.N * large * ceil_div(p.C, kToeplitzChannels) >= device.multiprocessors;
  return toeplitz<kLargeToeplitzSide>(p, device, fills && 3 * large <= small,
                                      "large depthwise filters, large tiles fill the device");
}

// Of the smallest filters on small maps, most of a tile would be beside the result.
Row small_toeplitz(const Conv2dProblem& p, const Device& device, int P, int Q) {
  const bool filled = P > kSmallToeplitzSide / 2 && Q > kSmallToeplitzSide / 2;
  const bool smallest = p.R == kLeastToeplitzTaps && p.S == kLeastToeplitzTaps;
  return toeplitz<kSmallToeplitzSide>(p, device, filled || !smallest, "large depthwise filters");
}

// dweight, and dx from the same read, where bands give dx.
Row toeplitz_weight(const Conv2dProblem& p, const Device& device) {
  Row row = small_toeplitz(p, device, p.H, p.W);
  row.allowed =
      row.allowed && ToeplitzLayout<kSmallToeplitzSide>(p.R, p.S, true).end <= static_cast<size_t>(device.shared_bytes);
  return row;
}

// The passes whose rows are pixels; rows of one of them alone go before.
template <class... Rows>
Conv2dPlan plan_pixels(const Conv2dProblem& p, const Device& device, const Gemm& gemm, const Rows&... before) {
  const bool even = ceil_div(gemm.n, TallTile::kN) % 2 == 0;  // so that no half of a 128 x 128 tile is empty
  return first_of(before..., packed(p, 128, 32),
                  portable<LargeTile>(gemm.fits<LargeTile>(p, device) && even && gemm.fills<LargeTile>(device),
                                      "128 x 128 tiles fill the device"),
                  portable<TallTile>(gemm.fits<TallTile>(p, device) && gemm.fills<TallTile>(device),
                                     "128 x 64 tiles fill the device"),
                  portable<SmallTile>(gemm.aligned, "few tiles"),
                  portable<SmallTile>(true, "channels that 16 bytes do not divide"));
}

// How many parts a sum of `terms` is cut into: enough for the device, each worth its slab's traffic.
int64_t splits_of(int64_t terms, int64_t least_terms, int64_t tiles, int64_t wanted_blocks) {
  const int64_t each = ceil_div(terms, std::min(ceil_div(wanted_blocks, tiles), ceil_div(terms, least_terms)));
  return ceil_div(terms, each);
}

Conv2dPlan plan_portable_forward(const Conv2dProblem& p, const Device& device, bool pooled) {
  const int64_t channels = p.C / p.groups;
  const Gemm gemm{int64_t{p.N} * p.P * p.Q, p.K / p.groups, int64_t{p.R} * p.S * channels, p.groups,
                  channels % vector_of(p) == 0};
  const Row by_taps = depthwise(p, DepthwisePass::kForward, device), few_channels = stem(p, device, 1, 160, 64, 64);
  Conv2dPlan plan = pooled ? plan_pixels(p, device, gemm, by_taps, few_channels)
                           : plan_pixels(p, device, gemm, large_toeplitz(p, device, p.P, p.Q),
                                         small_toeplitz(p, device, p.P, p.Q), by_taps, few_channels);
  const int64_t count = tiles(gemm.m, gemm.n, p.groups, plan.block_m, plan.block_n);
  if (plan.kernel == Conv2dKernel::kPortable && 2 * count <= device.multiprocessors) {
    constexpr int64_t kLeastTerms = 256;  // 8 to 16 steps of the ring, so that filling it is a small part
    plan.splits = splits_of(gemm.k, kLeastTerms, count, device.multiprocessors);
    if (plan.splits > 1) plan.reason = "few tiles of long sums, cut into slabs";
  }
  return plan;
}

Conv2dPlan plan_portable_backward_input(const Conv2dProblem& p, const Device& device) {
  const int64_t filters = p.K / p.groups, channels = p.C / p.groups;
  const Gemm gemm{largest_class(p) * classes(p.H, p.stride_h) * classes(p.W, p.stride_w), channels,
                  int64_t{p.R} * p.S * filters, p.groups, channels % vector_of(p) == 0 && filters % vector_of(p) == 0};
  return plan_pixels(p, device, gemm, large_toeplitz(p, device, p.H, p.W), small_toeplitz(p, device, p.H, p.W),
                     depthwise(p, DepthwisePass::kInput, device));
}

Conv2dPlan plan_portable_backward_weight(const Conv2dProblem& p, const Device& device) {
  const int64_t filters = p.K / p.groups, channels = p.C / p.groups, pixels = int64_t{p.N} * p.P * p.Q;
  const Gemm gemm{filters, int64_t{p.R} * p.S * channels, pixels, p.groups,
                  channels % vector_of(p) == 0 && filters % vector_of(p) == 0};
  const bool many = gemm.n > LargeTile::kN;  // columns, of taps and channels
  Conv2dPlan plan = first_of(
      toeplitz_weight(p, device), depthwise(p, DepthwisePass::kWeight, device), packed(p, 32, 128),
      stem(p, device, 1, 32, 64, 32), stem(p, device, 33, 160, 64, 160),
      portable<LargeTile>(gemm.fits<LargeTile>(p, device) && filters > 64 && gemm.n > 64, "many filters"),
      portable<WideTile>(gemm.fits<WideTile>(p, device) && many, "few filters, many taps and channels"),
      portable<TallTile>(gemm.fits<TallTile>(p, device) && filters > 64, "many filters, few taps and channels"),
      portable<SmallTile>(gemm.aligned, "few filters, taps and channels"),
      portable<SmallTile>(true, "channels or filters that 16 bytes do not divide"));
  if (plan.kernel == Conv2dKernel::kDepthwise) {
    plan.splits = depthwise_cut(p, DepthwisePass::kWeight, device).parts;
    return plan;
  }
  if (plan.kernel == Conv2dKernel::kToeplitz) {
    plan.splits = ToeplitzParts(p, device).parts;
    return plan;
  }
  constexpr int64_t kLeastPixels = 256;
  const int64_t resident = plan.block_m * plan.block_n > 128 * 64 ? 2 : 4;  // blocks on a multiprocessor
  int64_t count = tiles(gemm.m, gemm.n, p.groups, plan.block_m, plan.block_n);
  if (plan.kernel == Conv2dKernel::kPacked)
    count = ceil_div(p.groups * std::max(channels, filters), slots_of(p)) * ceil_div(int64_t{p.R} * p.S, 4);
  if (plan.kernel == Conv2dKernel::kStem) count = ceil_div(filters, plan.block_m);
  plan.splits = splits_of(pixels, kLeastPixels, count, resident * device.multiprocessors);
  return plan;
}

// Hopper's plan where there is one, else the portable one, with why.
template <class Hopper, class Portable>
Conv2dPlan either(const Conv2dProblem& p, const Device& device, Hopper&& hopper, Portable&& portable) {
  const char* refusal = nullptr;
  if (const std::optional<Conv2dPlan> plan = hopper(p, device, refusal)) return *plan;
  Conv2dPlan plan = portable(p, device);
  plan.refusal = refusal;
  return plan;
}

}  // namespace

Conv2dPlan plan_forward(const Conv2dProblem& p, const Device& device, bool pooled) {
  if (!p.channels_last) return nchw(p, DepthwisePass::kForward, device);
  return either(p, device, plan_forward_sm90,
                [pooled](const auto& p, const Device& device) { return plan_portable_forward(p, device, pooled); });
}

Conv2dPlan plan_backward_input(const Conv2dProblem& p, const Device& device) {
  if (!p.channels_last) return nchw(p, DepthwisePass::kInput, device);
  return either(p, device, plan_backward_input_sm90, plan_portable_backward_input);
}

Conv2dPlan plan_backward_weight(const Conv2dProblem& p, const Device& device) {
  if (!p.channels_last) return nchw(p, DepthwisePass::kWeight, device);
  return either(p, device, plan_backward_weight_sm90, plan_portable_backward_weight);
}

std::string describe(const Conv2dPlan& plan) {
  const char* const names[] = {"portable", "packed", "depthwise", "nchw", "toeplitz", "stem", "wgmma", "halo"};
  return std::string(names[static_cast<int>(plan.kernel)]) + " " + std::to_string(plan.block_m) + "x" +
         std::to_string(plan.block_n) + " " + std::to_string(plan.stages) + " stages, clusters of " +
         std::to_string(plan.cluster) + ", " + std::to_string(plan.splits) + " slabs: " + plan.reason +
         (plan.refusal ? std::string(" (not wgmma: ") + plan.refusal + ")" : "");
}

}  // namespace cnnops::cuda
