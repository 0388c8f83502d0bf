// How batch norm's kernels go over [N,C,L] where planes are no whole sectors: still by 16 bytes from addresses that are
// multiples of it.
//
// Sums   A thread keeps to a channel. What a plane's first and last piece hold of the neighbours is left out.
// Maps   x is one stretch of elements, of which each warp owns a part. A piece may reach over several planes, whose
//        parameters it loads one after the other, so that only whole pieces are written, but for the tensor's last.
#pragma once

#include "batch_norm.cuh"

namespace cnnops::cuda {

// Of a piece at `offset`: the elements of the thread's plane, none or from `begin` to `end` - 1; and how many to load.
struct PlanePiece {
  int64_t offset;
  int begin, end, loaded;

  __device__ int elements() const { return end - begin; }
  __device__ unsigned there() const { return (1u << end) - (1u << begin); }
};

template <int kWidth>
__device__ __forceinline__ PlanePiece next_piece(const Sweep& s, SweepPart& part) {
  const int64_t in_run = part.in_run * kWidth, at = part.next(s);
  const int skew = static_cast<int>(at % kWidth);  // by which the plane begins late within its first piece
  const int64_t left = s.unit_stride - in_run + skew;
  PlanePiece piece{at - skew, in_run == 0 ? skew : 0,
                   left > kWidth ? kWidth
                   : left > 0    ? static_cast<int>(left)
                                 : 0,
                   0};
  // Beyond the tensor's last plane there is nothing.
  piece.loaded = piece.end > 0 && piece.offset + kWidth <= s.total ? kWidth : piece.end;
  return piece;
}

// f(pieces) for all pieces of the part, kAhead at a time, so that as many loads are under way.
template <int kWidth, int kAhead, class F>
__device__ __forceinline__ void for_plane_pieces(const Sweep& s, SweepPart part, F&& f) {
  while (part.left >= kAhead) {
    PlanePiece pieces[kAhead];
    CNNOPS_UNROLL
    for (PlanePiece& each : pieces) each = next_piece<kWidth>(s, part);
    f(pieces);
  }
  while (part.left > 0) {
    const PlanePiece pieces[1] = {next_piece<kWidth>(s, part)};
    f(pieces);
  }
}

// `count` elements at `offset`, the first `left` of which are of `channel`, the others of those that follow.
struct StretchPiece {
  int64_t offset, channel;
  int left, count;
};

// The part of the stretch that the calling thread owns in block `number` of a sweep.
template <int kWidth>
struct StretchPart {
  static constexpr int kWarp = 32, kWarps = kSweepThreads / kWarp;
  int64_t offset, channel, in_plane, left;  // of its first piece; pieces left

  __device__ StretchPart(const Sweep& s, int64_t number) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t begin = (number * kWarps + warp) * s.stretch;
    const int64_t end = begin + s.stretch < s.total ? begin + s.stretch : s.total;
    offset = begin + lane * kWidth;
    const Split plane = split(offset, s.unit_stride);
    in_plane = plane.remainder;
    channel = split(plane.quotient, s.units).remainder;
    left = offset < end ? (end - offset - 1) / (kWarp * kWidth) + 1 : 0;
  }

  __device__ StretchPiece next(const Sweep& s) {
    const int64_t in_channel = s.unit_stride - in_plane, there = s.total - offset;
    const StretchPiece here{offset, channel, in_channel < kWidth ? static_cast<int>(in_channel) : kWidth,
                            there < kWidth ? static_cast<int>(there) : kWidth};
    offset += kWarp * kWidth;
    in_plane += s.stretch_skip;
    channel += s.stretch_channels;
    if (in_plane >= s.unit_stride) {
      in_plane -= s.unit_stride;
      ++channel;
    }
    if (channel >= s.units) channel -= s.units;
    --left;
    return here;
  }
};

// As for_plane_pieces, for all pieces of block `number`.
template <int kWidth, int kAhead, class F>
__device__ __forceinline__ void for_stretch(const Sweep& s, int64_t number, F&& f) {
  StretchPart<kWidth> part(s, number);
  while (part.left >= kAhead) {
    StretchPiece pieces[kAhead];
    CNNOPS_UNROLL
    for (StretchPiece& each : pieces) each = part.next(s);
    f(pieces);
  }
  while (part.left > 0) {
    const StretchPiece pieces[1] = {part.next(s)};
    f(pieces);
  }
}

// set(i, parameters(channel)) for a piece's elements, and what is beyond the tensor's end. The lanes whose pieces reach
// into a second plane ask for its parameters together, and for those of planes shorter than a piece one by one.
template <int kWidth, class Load, class Set>
__device__ __forceinline__ void for_channels(const Sweep& s, const StretchPiece& piece, Load&& parameters, Set&& set) {
  const auto following = [&](int64_t channel) { return channel + 1 < s.units ? channel + 1 : 0; };
  const bool several = s.unit_stride < kWidth;
  int64_t channel = piece.channel;
  int left = piece.left;
  auto here = parameters(channel), next = here;
  if (left < kWidth) next = parameters(channel = following(channel));
  CNNOPS_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (left == 0) {
      here = next;
      left = several ? static_cast<int>(s.unit_stride) : kWidth;
      if (several) next = parameters(channel = following(channel));
    }
    --left;
    set(i, here);
  }
}

}  // namespace cnnops::cuda
