// Which convolutions Hopper's kernels take, and how they are cut. Compiled for every architecture: a pure function of
// the problem and the device.

#include "conv2d_gemm_sm90.h"
#include "conv2d_halo_sm90.h"
#include "conv2d_sm90.h"

namespace cnnops::cuda {
namespace {

// Why Hopper's kernels do not take a problem, or null.
const char* refusal_sm90(const Conv2dProblem& p, const Device& device, bool backward) {
#if !defined(CNNOPS_SM90)
  return "the library has no kernels for sm_90a";
#endif
  constexpr int kPieceElements = 8;  // TMA's strides are multiples of 16 bytes
  if (device.architecture != 90) return "TMA and wgmma are Hopper's";
  if (p.dtype != DType::kHalf && p.dtype != DType::kBFloat16) return "wgmma takes 16-bit numbers here";
  if (p.C / p.groups % kPieceElements || (backward ? p.K : p.C) % kPieceElements)
    return "TMA takes channels in multiples of 16 bytes";
  // Else a step would multiply a zero with another group's channel, which may be infinite.
  if (p.groups > 1 && (p.C / p.groups % kStepChannels || p.K / p.groups % kStepChannels))
    return "groups are not multiples of 64 channels";
  if (backward && int64_t{p.stride_h} * p.stride_w > kMostClasses) return "more than 4 classes of pixels";
  return nullptr;
}

// The halo form, or none where it does not apply.
std::optional<Conv2dPlan> plan_halo(const Conv2dProblem& p, const Device& device, bool backward) {
  if (p.C != kHaloChannels || p.K != kHaloChannels || p.groups != 1) return {};
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return {};
  constexpr int64_t kMostTaps = 9;
  if (p.R * int64_t{p.S} == 1 || p.R * int64_t{p.S} > kMostTaps) return {};
  const HaloConv at = halo_conv(p, backward);
  if (halo_shared_bytes(at) > device.shared_bytes || !fits(halo_tensor(p.dtype, at))) return {};
  if (at.tiles == INT32_MAX || at.tiles < ceil_div(device.multiprocessors, 2)) return {};
  return Conv2dPlan{
      Conv2dKernel::kHalo, kHaloPixels, kHaloChannels, 3, 1, 1, "64 channels to 64: every tap from one tile of x"};
}

// An implicit GEMM by TMA and wgmma, or why not.
Conv2dPlan plan_gemm(const Conv2dProblem& p, ImplicitGemm gemm, const Device& device, const char*& refusal) {
  // Steps for each multiprocessor: 16 make up for the traffic of a wide tile's divided sums; 2 give half of the
  // multiprocessors the 4 of a share.
  constexpr int64_t kWorthSharing = 16, kLeastSteps = 2;
  const int multiprocessors = device.multiprocessors;
  int64_t steps = 0;
  bool reached = true;
  for (int i = 0; i < gemm.class_count; ++i) {
    const PixelClass& at = gemm.classes[i];
    steps += ceil_div(pixels_of(gemm, at), kTilePixels) * at.steps;
    if (at.steps > 0) reached = reached && reachable(at.h) && reachable(at.w) && fits(a_tensor(gemm, at));
  }
  if (!reached) refusal = "padding, dilation or stride beyond TMA's im2col mode";
  if (!fits(filter_tensor(p, kStepChannels))) refusal = "filters beyond TMA's limits";
  if (!countable(gemm)) refusal = "more pixels than Hopper's kernels count";
  if (gemm.filter_taps * int64_t{gemm.channels} < kStepChannels) refusal = "sums of less than 64 products";
  if (refusal) return {};

  // The widest tile that leaves no multiprocessor idle: it reads the pixels the least.
  int block_n = 256;
  for (; block_n > 64; block_n /= 2) {
    const int64_t across = column_tiles(gemm, block_n);
    if (gemm.columns <= block_n / 2) continue;
    if (pixel_tiles(gemm) * across * 2 >= multiprocessors || steps * across >= kWorthSharing * multiprocessors) break;
  }
  const int64_t across = column_tiles(gemm, block_n);
  if (pixel_tiles(gemm) * across * 2 < multiprocessors && steps * across < kLeastSteps * multiprocessors) {
    refusal = "too few tiles for half the multiprocessors";
    return {};
  }
  const int cluster = pixels_of(gemm, gemm.classes[0]) > kTilePixels ? 2 : 1;
  const Cut out = cut(gemm, block_n, cluster, multiprocessors, true);
  const int rest = out.tiles - out.whole_tiles;
  return {Conv2dKernel::kWgmma,
          kTilePixels,
          block_n,
          block_n == 256 ? 4 : 6,
          cluster,
          rest > 0 ? ceil_div(out.sharers, rest) : 1,
          rest > 0 ? "the last wave's sums are divided" : "whole tiles fill the multiprocessors"};
}

std::optional<Conv2dPlan> plan(const Conv2dProblem& p, const Device& device, bool backward, const char*& refusal) {
  refusal = refusal_sm90(p, device, backward);
  if (refusal) return {};
  if (const auto halo = plan_halo(p, device, backward)) return halo;
  const Conv2dPlan gemm = plan_gemm(p, backward ? backward_input_gemm(p) : forward_gemm(p), device, refusal);
  if (refusal) return {};
  return gemm;
}

}  // namespace

std::optional<Conv2dPlan> plan_forward_sm90(const Conv2dProblem& p, const Device& device, const char*& refusal) {
  return plan(p, device, false, refusal);
}

std::optional<Conv2dPlan> plan_backward_input_sm90(const Conv2dProblem& p, const Device& device, const char*& refusal) {
  return plan(p, device, true, refusal);
}

}  // namespace cnnops::cuda
