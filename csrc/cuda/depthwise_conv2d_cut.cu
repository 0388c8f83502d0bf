// How the depthwise kernels cut a pass.

#include <algorithm>

#include "depthwise_conv2d.h"
#include "launch.h"

namespace cnnops::cuda {
namespace {

bool is_sized(const Conv2dProblem& p) {
  return p.K == p.C && p.R == p.S && (p.R == 3 || p.R == 5 || p.R == 7) && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.stride_h == p.stride_w && p.stride_h <= 2;
}

// Positions along one axis that a pass of dx goes through, `stride` pixels to each, from the one that has the first.
int64_t positions_of_input(int64_t extent, int stride, int pad) {
  return ceil_div(extent + pad, stride) - pad / stride;
}

// The part of a cut that `across` decides, with the shared memory it takes.
void lay_out(DepthwiseCut& cut, const Conv2dProblem& p, DepthwisePass pass, int groups, int across) {
  const int element = p.dtype == DType::kFloat ? 4 : 2, s = p.stride_h, multiplier = p.K / p.C;
  const bool forward = pass == DepthwisePass::kForward, any_weight = pass == DepthwisePass::kWeight && !cut.sized;
  cut.across = across;
  cut.down = groups / across;
  cut.columns = across * (cut.sized ? kSizedColumns : kAnyColumns);
  cut.step = cut.down * (cut.sized ? kSizedRows : 1);
  const int rows = cut.tap_tiles > 1 ? kTapRows : p.R;
  const int reach_h = (rows - 1) * p.dilation_h, reach_w = (p.S - 1) * p.dilation_w;
  if (forward) {
    cut.window = (cut.step - 1) * s + reach_h + 1;
    cut.advance = cut.step * s;
    cut.ring_columns = (cut.columns - 1) * p.stride_w + reach_w + 1;
  } else {
    const int each = cut.sized ? s : 1;  // positions of a sized pass are pixels, of the other one `stride` pixels
    cut.advance = cut.step / each;
    cut.window = cut.advance + static_cast<int>(cut.tap_tiles > 1 ? ceil_div(reach_h, s) : reach_h / s);
    cut.ring_columns = cut.columns / each + reach_w / p.stride_w;
  }
  const int vector = 16 / element;
  cut.pixel = cut.channels + (cut.sized ? kSkew / element : 0);
  const int filters = forward ? cut.channels : cut.channels * multiplier;
  if (multiplier > 1)
    cut.pixel =
        forward ? static_cast<int>(ceil_div((cut.channels - 1) / multiplier + vector + 1, vector)) * vector : filters;
  const size_t tile = static_cast<size_t>(cut.step) * cut.columns;
  cut.other = static_cast<size_t>(cut.window + cut.advance) * cut.ring_columns * cut.pixel * element;
  cut.weights = cut.other;
  if (!forward && cut.sized) cut.weights += 2 * tile * cut.pixel * element;
  if (any_weight) cut.weights += 2 * tile * p.stride_h * p.stride_w * cut.channels * element;
  cut.sums = cut.dweight = cut.weights;
  if (cut.tap_tiles == 1) {  // else the pass writes slabs alone
    cut.sums += ceil_div(size_t{1} * p.R * p.S * filters * element, 16) * 16;
    cut.dweight = cut.sums + tile * (cut.channels + kSumsSkew) * sizeof(float);
  }
  cut.end = cut.dweight;
  if (any_weight) {
    const int64_t items = rows * ceil_div(p.S, kTapColumns) * multiplier;
    cut.end += std::max<int64_t>(items, groups) * kTapColumns * cut.channels * sizeof(float);
  }
  if (!forward && cut.sized)  // where the warps' sums of dweight meet at last
    cut.end = std::max(cut.end, size_t{kDepthwiseWarps} * p.R * p.S * cut.channels * sizeof(float));
}

}  // namespace

DepthwiseCut depthwise_cut(const Conv2dProblem& p, DepthwisePass pass, const Device& device) {
  const int element = p.dtype == DType::kFloat ? 4 : 2;
  DepthwiseCut cut{};
  cut.sized = is_sized(p);
  cut.tap_tiles = 1;
  cut.threads = kDepthwiseThreads;

  int64_t rows = p.P, columns = p.Q;
  if (pass != DepthwisePass::kForward) {
    const int each = cut.sized ? p.stride_h : 1;
    rows = positions_of_input(p.H, p.stride_h, p.pad_h) * each;
    columns = positions_of_input(p.W, p.stride_w, p.pad_w) * each;
  }
  cut.rows = static_cast<int>(rows);
  cut.row_length = static_cast<int>(columns);
  // A tile of x has a sector of channels, and one of y the filters of a sector of x, where they are few and there is
  // room. Of the widths whose shared memory the device has, the one whose strips read the fewest columns.
  int bytes = cut.sized ? kSizedBytes : kAnyBytes;
  if (pass == DepthwisePass::kForward)
    while (bytes < kMostAnyBytes && bytes < kAnyBytes * (p.K / p.C)) bytes *= 2;
  const auto lay_out_widest = [&] {
    const int groups = cut.threads / (cut.channels / 2);
    int64_t least = INT64_MAX;
    int chosen = 2;
    for (int across = 2; across <= std::min(groups, 8); across *= 2) {
      lay_out(cut, p, pass, groups, across);
      const int64_t read = ceil_div(columns, cut.columns) * cut.ring_columns;
      if (read < least && cut.end <= static_cast<size_t>(device.shared_bytes)) least = read, chosen = across;
    }
    lay_out(cut, p, pass, groups, chosen);
    return least < INT64_MAX;
  };
  for (;; bytes /= 2) {
    cut.channels = bytes / element;
    if (lay_out_widest() || cut.sized || bytes == kAnyBytes) break;
  }
  if (pass == DepthwisePass::kWeight && !cut.sized && p.R > kTapRows) {
    // The sums of all taps beside the ring of their rows: both gradients come from one read. Those of 31 x 31 floats
    // leave a multiprocessor one block, whose warps are then twice as many. Its products are what it waits for: 1922 to
    // an element of dy, x and dx, 160 to a byte, where the devices have time for ten.
    const auto bytes_left = static_cast<size_t>(device.shared_bytes);
    if (cut.end > bytes_left) {
      cut.tap_tiles = static_cast<int>(ceil_div(p.R, kTapRows));
      lay_out_widest();
    } else if (2 * cut.end > bytes_left) {
      const DepthwiseCut fewer = cut;
      cut.threads = kLoneThreads;
      if (!lay_out_widest()) cut = fewer;
    }
  }
  cut.channel_tiles = static_cast<int>(ceil_div(pass == DepthwisePass::kForward ? p.K : p.C, cut.channels));

  const int64_t tiles = int64_t{cut.channel_tiles} * cut.tap_tiles;
  cut.strips_w = ceil_div(columns, cut.columns);
  int64_t wanted = ceil_div(int64_t{8} * device.multiprocessors, tiles);
  if (pass == DepthwisePass::kWeight) {
    constexpr int64_t kLeastPixels = 16;  // for each tap, so that slabs are a small part of what moves
    wanted = std::min(ceil_div(int64_t{4} * device.multiprocessors, tiles),
                      std::max<int64_t>(1, p.N * rows * columns / (kLeastPixels * p.R * p.S)));
  }
  const int64_t steps = ceil_div(rows, cut.step);
  const int64_t wanted_chunks = std::clamp<int64_t>(ceil_div(wanted, p.N * cut.strips_w), 1, steps);
  cut.chunk_rows = ceil_div(steps, wanted_chunks) * cut.step;
  cut.chunks = ceil_div(rows, cut.chunk_rows);
  cut.strips = p.N * cut.chunks * cut.strips_w;
  cut.each = ceil_div(cut.strips, std::min(wanted, cut.strips));
  cut.parts = ceil_div(cut.strips, cut.each);
  return cut;
}

bool depthwise_takes(const Conv2dProblem& p, DepthwisePass pass, const Device& device) {
  // Within these, a strip's rows and columns are counted in 32 bits, and its shared memory too.
  constexpr int kFarthest = 1 << 12, kMostMultiplied = 16, kLargest = 1 << 30;
  if (p.groups != p.C || p.C == 1 || p.K / p.C > kMostMultiplied) return false;
  if (std::max(p.R, p.S) > kLongestFilter || std::max({p.H, p.W, p.P, p.Q}) > kLargest) return false;
  if (std::max({p.pad_h, p.pad_w, p.stride_h, p.stride_w}) > kFarthest) return false;
  if ((p.R > 1 && p.dilation_h > kFarthest / p.R) || (p.S > 1 && p.dilation_w > kFarthest / p.S)) return false;
  const DepthwiseCut cut = depthwise_cut(p, pass, device);
  return cut.end <= static_cast<size_t>(device.shared_bytes);
}

}  // namespace cnnops::cuda
