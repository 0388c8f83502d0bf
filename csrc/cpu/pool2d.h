// What pooling alone and pooling of a normalised input share: vectors of channels, sliding windows, the maximum over a
// window and its gradient.
#pragma once

#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

// Lane by lane, in steps of twice or half the width: each is one instruction, where one leap is a shuffle of pieces.
template <class To, class From>
inline To convert_lanes(From v) {
  constexpr int kCount = sizeof(From) / sizeof(v[0]), kFrom = sizeof(v[0]), kTo = sizeof(To{}[0]);
  if constexpr (kTo > 2 * kFrom || kFrom > 2 * kTo) {
    using Step = std::conditional_t<(kTo > kFrom ? 2 * kFrom : kFrom / 2) == 2, uint16_t, uint32_t>;
    typedef Step Steps __attribute__((vector_size(kCount * (kTo > kFrom ? 2 * kFrom : kFrom / 2))));
    return convert_lanes<To>(__builtin_convertvector(v, Steps));
  } else {
    return __builtin_convertvector(v, To);
  }
}

// The channels that a kernel works on at once: kUnroll vectors of them, or one number in a vector's first lane (vectors
// select without branching, which the data would mispredict).
template <class T, bool kVector, int kUnroll_>
struct Pack {
  using V = Vec<Acc<T>>;
  using Lane = std::conditional_t<sizeof(Acc<T>) == 8, int64_t, int32_t>;
  using Offset = Vec<Lane>;
  static constexpr int kWidth = kVector ? kLanes<T> : 1, kUnroll = kUnroll_;

  template <class X>
  static V read(const X* p) {
    if constexpr (kVector)
      return load(p);
    else
      return splat(to_acc(*p));
  }
  static void write(T* p, V v) {
    if constexpr (kVector)
      store(p, v);
    else
      from_acc(v[0], *p);
  }
  template <class O>
  static Offset read_offset(const O* p) {
    if constexpr (kVector) {
      typedef O Narrow __attribute__((vector_size(kLanes<T> * sizeof(O))));
      Narrow narrow;
      std::memcpy(&narrow, p, sizeof narrow);
      return convert_lanes<Offset>(narrow);
    } else {
      return Offset{} + static_cast<Lane>(*p);
    }
  }
  template <class O>
  static void write_offset(O* p, Offset v) {
    if constexpr (kVector) {
      typedef O Narrow __attribute__((vector_size(kLanes<T> * sizeof(O))));
      const Narrow narrow = convert_lanes<Narrow>(v);
      std::memcpy(p, &narrow, sizeof narrow);
    } else {
      *p = static_cast<O>(v[0]);
    }
  }
};

// f(Pack, c) until all channels of a position are done. The last vector may overlap the one before: both write the same
// numbers. Where C fills no vector but `room` elements follow wherever f reads or writes, one vector goes beyond the
// channels into the next positions of the row: what it writes there is wrong until those are computed in their turn.
template <class T, class F>
void for_channels(int64_t C, int64_t room, const F& f) {
  constexpr int kUnroll = 4, kWidth = kLanes<T>;
  if (C < kWidth) {
    if (room >= kWidth) return f(Pack<T, true, 1>{}, 0);
    for (int64_t c = 0; c < C; ++c) f(Pack<T, false, 1>{}, c);
    return;
  }
  int64_t c = 0;
  for (; c + kUnroll * kWidth <= C; c += kUnroll * kWidth) f(Pack<T, true, kUnroll>{}, c);
  for (; c + kWidth <= C; c += kWidth) f(Pack<T, true, 1>{}, c);
  if (c < C) f(Pack<T, true, 1>{}, C - kWidth);
}

// A half-open range along one axis; empty where end <= begin.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// One axis of a sliding window.
struct Sliding {
  int64_t in, out, kernel, stride, pad, dilation;

  int64_t first(int64_t p) const { return p * stride - pad; }
  int64_t taps(int64_t) const { return kernel; }

  // The taps of output `p` that lie inside the input.
  Span taps_of(int64_t p) const {
    const int64_t h = first(p), room = in - 1 - h;
    const int64_t begin = h >= 0 ? 0 : (-h + dilation - 1) / dilation;
    if (room < 0) return {begin, begin};
    return {begin, room >= (kernel - 1) * dilation ? kernel : room / dilation + 1};
  }

  // The inputs of output `p`, dilation being 1.
  Span window_of(int64_t p) const { return {std::max<int64_t>(first(p), 0), std::min(first(p) + kernel, in)}; }

  // Of those and the padding: a ceil_mode window may reach beyond the padded edge, and torch counts no such tap.
  int64_t padded_size(int64_t p) const { return std::min(kernel, in + pad - first(p)); }

  // The outputs whose window spans input `h`; dilation may make a window skip it.
  Span windows_over(int64_t h) const {
    const int64_t reach = h + pad, extent = (kernel - 1) * dilation + 1;
    return {reach < extent ? 0 : (reach - extent) / stride + 1, std::min(reach / stride + 1, out)};
  }

  // Makes windows_over(h) of windows_over(h - 1), without a division.
  void advance(Span& over, int64_t h) const {
    while (over.begin * stride - pad + (kernel - 1) * dilation < h) ++over.begin;
    while (over.end < out && over.end * stride - pad <= h) ++over.end;
  }

  // The tap by which output `p`, one of windows_over(h), sees input `h`; -1 where it skips it.
  int64_t tap_of(int64_t p, int64_t h) const {
    const int64_t distance = h - first(p);
    if (dilation == 1) return distance;
    return distance % dilation ? -1 : distance / dilation;
  }
};

inline Sliding rows_of(const Pool2dProblem& p, int dilation) { return {p.H, p.P, p.R, p.stride_h, p.pad_h, dilation}; }
inline Sliding cols_of(const Pool2dProblem& p, int dilation) { return {p.W, p.Q, p.S, p.stride_w, p.pad_w, dilation}; }

// One axis of an adaptive window.
struct Adaptive {
  int64_t in, out;
  static constexpr int64_t dilation = 1;

  Span window_of(int64_t p) const { return {p * in / out, ((p + 1) * in + out - 1) / out}; }

  int64_t first(int64_t p) const { return p * in / out; }
  int64_t taps(int64_t p) const { return window_of(p).size(); }
  Span taps_of(int64_t p) const { return {0, taps(p)}; }
  int64_t tap_of(int64_t p, int64_t h) const { return h - first(p); }

  // floor(p*in/out) <= h < ceil((p+1)*in/out), solved for p: the same rule with in and out exchanged.
  Span windows_over(int64_t h) const { return Adaptive{out, in}.window_of(h); }
  void advance(Span& over, int64_t h) const { over = windows_over(h); }
};

// What parallel_for is told of one of the `parts` that an image is cut into: its share of the windows' taps.
inline int64_t work_of(const Pool2dProblem& p, int64_t parts) {
  const int64_t taps = std::max(int64_t{p.P} * p.Q * p.R * p.S, int64_t{p.H} * p.W);
  return 2 * taps * p.C / parts;
}

// f(O{}) for the type of the window offsets.
template <class F>
void for_offset(const Pool2dProblem& problem, F&& f) {
  if (static_cast<int64_t>(problem.R) * problem.S <= 256)
    f(uint8_t{});
  else
    f(int32_t{});
}

// Row p of the outputs of one image: y [Q,C] and, where they are kept, offsets. row_of(h) is the image's row h; between
// any row that is asked for and `end` lies memory that may be read. A window without a tap inside the input gives -inf
// and the offset 0. A NaN always replaces what is kept, and nothing replaces a NaN but another; a tie replaces nothing.
template <class T, class O, bool kKeepOffsets, class X, class Axis, class Rows>
void max_row(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, int64_t p, const Rows& row_of,
             const X* end, T* y, O* offsets) {
  const int64_t C = problem.C, Q = problem.Q, dilation_h = rows.dilation, dilation_w = cols.dilation;
  const Span taps_h = rows.taps_of(p);
  const int64_t first_h = rows.first(p), last_h = first_h + (taps_h.end - 1) * dilation_h;
  for (int64_t q = 0; q < Q; ++q) {
    const Span taps_w = cols.taps_of(q);
    const int64_t S = cols.taps(q);
    const bool any = taps_h.size() > 0 && taps_w.size() > 0;
    const int64_t first_tap = any ? taps_h.begin * S + taps_w.begin : 0, first_w = cols.first(q);
    const int64_t last_w = first_w + (taps_w.end - 1) * dilation_w;
    const int64_t room = any ? std::min<int64_t>((Q - q) * C, end - (row_of(last_h) + last_w * C)) : 0;
    for_channels<T>(C, room, [&]<class K>(K, int64_t c) {
      typename K::V best[K::kUnroll];
      typename K::Offset kept[K::kUnroll];
      for (int u = 0; u < K::kUnroll; ++u) {
        best[u] = typename K::V{} - std::numeric_limits<Acc<T>>::infinity();
        kept[u] = typename K::Offset{} + static_cast<typename K::Lane>(first_tap);
      }
      for (int64_t r = taps_h.begin; r < taps_h.end; ++r) {
        const X* row = row_of(first_h + r * dilation_h);
        for (int64_t s = taps_w.begin; s < taps_w.end; ++s) {
          const X* from = row + (first_w + s * dilation_w) * C + c;
          const auto tap = typename K::Offset{} + static_cast<typename K::Lane>(r * S + s);
          for (int u = 0; u < K::kUnroll; ++u) {
            const auto v = K::read(from + u * K::kWidth);
            const auto wins = (v > best[u]) | (v != v);
            best[u] = wins ? v : best[u];
            kept[u] = wins ? tap : kept[u];
          }
        }
      }
      for (int u = 0; u < K::kUnroll; ++u) {
        K::write(y + q * C + c + u * K::kWidth, best[u]);
        if constexpr (kKeepOffsets) K::write_offset(offsets + q * C + c + u * K::kWidth, kept[u]);
      }
    });
  }
}

template <class T, class O, bool kKeepOffsets, class X, class Rows>
void max_row(const Pool2dProblem& problem, int64_t p, const Rows& row_of, const X* end, T* y, O* offsets) {
  const Sliding rows = rows_of(problem, problem.dilation_h), cols = cols_of(problem, problem.dilation_w);
  max_row<T, O, kKeepOffsets>(problem, rows, cols, p, row_of, end, y, offsets);
}

// dx [., width] of the pixels (n, h, at.begin <= w < at.end) and `width` channels from c_begin on. The problem is a
// copy, as is what the lambda captures, so that the compiler knows that no store to dx changes them.
template <class T, class O, class Axis>
void max_backward_row(const Pool2dProblem problem, const Axis rows, const Axis cols, const T* dy, const O* offsets,
                      T* dx, int64_t n, int64_t h, Span at, int64_t c_begin, int64_t width) {
  const int64_t C = problem.C, Q = problem.Q;
  const int64_t after = (problem.N - n) * problem.P * Q * C - c_begin;  // elements of dy from image n on
  const Span over_h = rows.windows_over(h);
  dy += n * problem.P * Q * C + c_begin;
  offsets += n * problem.P * Q * C + c_begin;
  Span over_w = cols.windows_over(at.begin);
  for (int64_t w = at.begin; w < at.end; ++w) {
    cols.advance(over_w, w);
    const int64_t room = std::min((at.end - w) * width, after - ((over_h.end - 1) * Q + over_w.end - 1) * C);
    for_channels<T>(width, room, [=]<class K>(K, int64_t c) {
      typename K::V sum[K::kUnroll] = {};
      for (int64_t p = over_h.begin; p < over_h.end; ++p) {
        const int64_t r = rows.tap_of(p, h);
        if (r < 0) continue;
        for (int64_t q = over_w.begin; q < over_w.end; ++q) {
          const int64_t s = cols.tap_of(q, w);
          if (s < 0) continue;
          const int64_t out = (p * Q + q) * C + c;
          const auto tap = typename K::Offset{} + static_cast<typename K::Lane>(r * cols.taps(q) + s);
          for (int u = 0; u < K::kUnroll; ++u) {
            const auto v = K::read(dy + out + u * K::kWidth);
            const auto kept = K::read_offset(offsets + out + u * K::kWidth);
            sum[u] += kept == tap ? v : typename K::V{};
          }
        }
      }
      for (int u = 0; u < K::kUnroll; ++u) K::write(dx + (w - at.begin) * width + c + u * K::kWidth, sum[u]);
    });
  }
}

template <class T, class O>
void max_backward_row(const Pool2dProblem& problem, const T* dy, const O* offsets, T* dx, int64_t n, int64_t h, Span at,
                      int64_t c_begin, int64_t width) {
  const Sliding rows = rows_of(problem, problem.dilation_h), cols = cols_of(problem, problem.dilation_w);
  max_backward_row(problem, rows, cols, dy, offsets, dx, n, h, at, c_begin, width);
}

}  // namespace cnnops::cpu::CNNOPS_ISA
