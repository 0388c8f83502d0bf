// Pooling over windows of R x S taps, NHWC.
//
//   max       y[n,p,q,c]  = max over (r,s) of x[n, p*stride_h - pad_h + r*dilation_h, q*.. + s*dilation_w, c]
//             dx[n,h,w,c] = sum over the windows (p,q) whose kept tap is (h,w) of dy[n,p,q,c]
//   average   y[n,p,q,c]  = 1/divisor(p,q) * sum over (r,s) of x[n, p*stride_h - pad_h + r, q*stride_w - pad_w + s, c]
//             dx[n,h,w,c] = sum over the windows (p,q) that cover (h,w) of dy[n,p,q,c] / divisor(p,q)
//   adaptive  either over rows floor(p*H/P) .. ceil((p+1)*H/P) - 1, and columns likewise
//
// Layout     x, dx [N,H,W,C]; y, dy and the offsets r * S + s of the kept taps [N,P,Q,C]; S is the window's own width
//            where windows differ.
// Ownership  One index of parallel_for owns one row of outputs, (n,p) forward and (n,h) backward, or a band of such
//            rows. Nothing is written outside of it, so every schedule gives the same bits.
// Traffic    forward: x once (overlapping windows meet in cache) + y (+ offsets); backward: dy (+ offsets) once + dx.
#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

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

  static V read(const T* p) {
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

Sliding rows_of(const Pool2dProblem& p, int dilation) { return {p.H, p.P, p.R, p.stride_h, p.pad_h, dilation}; }
Sliding cols_of(const Pool2dProblem& p, int dilation) { return {p.W, p.Q, p.S, p.stride_w, p.pad_w, dilation}; }

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
int64_t work_of(const Pool2dProblem& p, int64_t parts) {
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

// A window without a tap inside the input gives -inf and the offset 0. A NaN always replaces what is kept, and nothing
// replaces a NaN but another; a tie replaces nothing.
template <class T, class O, bool kKeepOffsets, class Axis>
void max_forward(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, const T* x, T* y, O* offsets) {
  const int64_t C = problem.C, W = problem.W, P = problem.P, Q = problem.Q;
  const int64_t dilation_h = rows.dilation, dilation_w = cols.dilation, inputs = int64_t{problem.N} * problem.H * W * C;
  parallel_for(problem.N * P, work_of(problem, P), [&](int64_t np) {
    const int64_t n = np / P, p = np % P;
    const Span taps_h = rows.taps_of(p);
    for (int64_t q = 0; q < Q; ++q) {
      const Span taps_w = cols.taps_of(q);
      const int64_t S = cols.taps(q);
      const bool any = taps_h.size() > 0 && taps_w.size() > 0;
      const int64_t first_tap = any ? taps_h.begin * S + taps_w.begin : 0;
      const int64_t h = rows.first(p) + taps_h.begin * dilation_h, w = cols.first(q) + taps_w.begin * dilation_w;
      const int64_t window = ((n * problem.H + h) * W + w) * C, out = (np * Q + q) * C;
      const int64_t last = window + ((taps_h.size() - 1) * dilation_h * W + (taps_w.size() - 1) * dilation_w) * C;
      const int64_t room = any ? std::min((Q - q) * C, inputs - last) : 0;
      for_channels<T>(C, room, [&]<class K>(K, int64_t c) {
        typename K::V best[K::kUnroll];
        typename K::Offset kept[K::kUnroll];
        for (int u = 0; u < K::kUnroll; ++u) {
          best[u] = typename K::V{} - std::numeric_limits<Acc<T>>::infinity();
          kept[u] = typename K::Offset{} + static_cast<typename K::Lane>(first_tap);
        }
        for (int64_t r = taps_h.begin; r < taps_h.end; ++r)
          for (int64_t s = taps_w.begin; s < taps_w.end; ++s) {
            const T* from =
                x + window + ((r - taps_h.begin) * dilation_h * W + (s - taps_w.begin) * dilation_w) * C + c;
            const auto tap = typename K::Offset{} + static_cast<typename K::Lane>(r * S + s);
            for (int u = 0; u < K::kUnroll; ++u) {
              const auto v = K::read(from + u * K::kWidth);
              const auto wins = (v > best[u]) | (v != v);
              best[u] = wins ? v : best[u];
              kept[u] = wins ? tap : kept[u];
            }
          }
        for (int u = 0; u < K::kUnroll; ++u) {
          K::write(y + out + c + u * K::kWidth, best[u]);
          if constexpr (kKeepOffsets) K::write_offset(offsets + out + c + u * K::kWidth, kept[u]);
        }
      });
    }
  });
}

// One row (n,h) of dx. By value, so that the compiler knows that no store to dx changes the problem.
template <class T, class O, class Axis>
void max_backward_row(const Pool2dProblem problem, const Axis rows, const Axis cols, const T* dy, const O* offsets,
                      T* dx, int64_t nh) {
  const int64_t C = problem.C, W = problem.W, Q = problem.Q, n = nh / problem.H, h = nh % problem.H;
  const int64_t after = (problem.N - n) * problem.P * Q * C;  // elements of dy from image n on
  const Span over_h = rows.windows_over(h);
  dy += n * problem.P * Q * C;
  offsets += n * problem.P * Q * C;
  Span over_w = cols.windows_over(0);
  for (int64_t w = 0; w < W; ++w) {
    cols.advance(over_w, w);
    const int64_t room = std::min((W - w) * C, after - ((over_h.end - 1) * Q + over_w.end - 1) * C);
    for_channels<T>(C, room, [&]<class K>(K, int64_t c) {
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
      for (int u = 0; u < K::kUnroll; ++u) K::write(dx + (nh * W + w) * C + c + u * K::kWidth, sum[u]);
    });
  }
}

template <class T, class O, class Axis>
void max_backward(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, const T* dy, const O* offsets,
                  T* dx) {
  parallel_for(int64_t{problem.N} * problem.H, work_of(problem, problem.H),
               [&](int64_t nh) { max_backward_row(problem, rows, cols, dy, offsets, dx, nh); });
}

// The same sums in the same order for few channels, where windows are fewer than inputs and a vector would hold little:
// each band of rows is cleared, and the windows over it add to it in turn.
template <class T>
void max_backward_banded(const Pool2dProblem& problem, const T* dy, const uint8_t* offsets, T* dx) {
  constexpr int64_t kBand = 4096;  // elements, to stay in the first-level cache
  const int64_t C = problem.C, H = problem.H, W = problem.W, Q = problem.Q;
  const Sliding rows = rows_of(problem, problem.dilation_h), cols = cols_of(problem, problem.dilation_w);
  const int64_t band = std::max<int64_t>(1, kBand / (W * C)), bands = (H + band - 1) / band;
  int64_t below[256] = {}, right[256] = {};  // where each tap lies in its window
  for (int64_t tap = 0; tap < rows.kernel * cols.kernel; ++tap) {
    below[tap] = tap / cols.kernel * rows.dilation;
    right[tap] = tap % cols.kernel * cols.dilation;
  }
  parallel_for(problem.N * bands, work_of(problem, bands), [&](int64_t i) {
    const int64_t n = i / bands, begin = i % bands * band, end = std::min(H, begin + band);
    T* plane = dx + n * H * W * C;
    std::fill(plane + begin * W * C, plane + end * W * C, T{});
    const int64_t p_end = rows.windows_over(end - 1).end;
    for (int64_t p = rows.windows_over(begin).begin; p < p_end; ++p)
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t out = ((n * problem.P + p) * Q + q) * C;
        for (int64_t c = 0; c < C; ++c) {
          const uint8_t tap = offsets[out + c];
          const int64_t h = rows.first(p) + below[tap], w = cols.first(q) + right[tap];
          if (h >= begin && h < end && w >= 0 && w < W) plane[(h * W + w) * C + c] += dy[out + c];
        }
      }
  });
}

// The offset of a window without a tap inside the input points outside; the nearest position stands for it.
template <class O, class Axis>
void max_indices(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, const O* offsets, int64_t* indices) {
  const int64_t C = problem.C, H = problem.H, W = problem.W, P = problem.P, Q = problem.Q;
  parallel_for(problem.N * P, work_of(problem, P), [&](int64_t np) {
    const int64_t first_h = rows.first(np % P);
    for (int64_t q = 0; q < Q; ++q) {
      const int64_t first_w = cols.first(q), S = cols.taps(q), out = (np * Q + q) * C;
      for (int64_t c = 0; c < C; ++c) {
        const int64_t tap = offsets[out + c];
        const int64_t h = std::clamp<int64_t>(first_h + tap / S * rows.dilation, 0, H - 1);
        const int64_t w = std::clamp<int64_t>(first_w + tap % S * cols.dilation, 0, W - 1);
        indices[out + c] = h * W + w;
      }
    }
  });
}

// divisor(p, q) is what a window's sum is divided by.
template <class T, class Axis, class Divisor>
void average_forward(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, const Divisor& divisor,
                     const T* x, T* y) {
  const int64_t C = problem.C, H = problem.H, W = problem.W, P = problem.P, Q = problem.Q;
  parallel_for(problem.N * P, work_of(problem, P), [&](int64_t np) {
    const int64_t n = np / P, p = np % P;
    const Span window_h = rows.window_of(p);
    for (int64_t q = 0; q < Q; ++q) {
      const Span window_w = cols.window_of(q);
      const Acc<T> count = static_cast<Acc<T>>(divisor(p, q));
      const int64_t last = ((n * H + window_h.end - 1) * W + window_w.end - 1) * C;
      const int64_t room = std::min((Q - q) * C, problem.N * H * W * C - last);
      for_channels<T>(C, room, [&]<class K>(K, int64_t c) {
        typename K::V sum[K::kUnroll] = {};
        for (int64_t h = window_h.begin; h < window_h.end; ++h)
          for (int64_t w = window_w.begin; w < window_w.end; ++w)
            for (int u = 0; u < K::kUnroll; ++u) sum[u] += K::read(x + ((n * H + h) * W + w) * C + c + u * K::kWidth);
        for (int u = 0; u < K::kUnroll; ++u) K::write(y + (np * Q + q) * C + c + u * K::kWidth, sum[u] / count);
      });
    }
  });
}

template <class T, class Axis, class Divisor>
void average_backward(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, const Divisor& divisor,
                      const T* dy, T* dx) {
  const int64_t C = problem.C, H = problem.H, W = problem.W, P = problem.P, Q = problem.Q;
  const int64_t outputs = problem.N * P * Q * C;
  parallel_for(problem.N * H, work_of(problem, H), [&](int64_t nh) {
    const int64_t n = nh / H, h = nh % H;
    const Span over_h = rows.windows_over(h);
    Span over_w = cols.windows_over(0);
    for (int64_t w = 0; w < W; ++w) {
      cols.advance(over_w, w);
      const int64_t last = ((n * problem.P + over_h.end - 1) * Q + over_w.end - 1) * C;
      const int64_t room = std::min((W - w) * C, outputs - last);
      for_channels<T>(C, room, [&]<class K>(K, int64_t c) {
        typename K::V sum[K::kUnroll] = {};
        for (int64_t p = over_h.begin; p < over_h.end; ++p)
          for (int64_t q = over_w.begin; q < over_w.end; ++q) {
            const int64_t count = divisor(p, q), out = ((n * P + p) * Q + q) * C + c;
            const Acc<T> divide_by = static_cast<Acc<T>>(count), multiply_by = 1 / divide_by;
            const bool exact = count > 0 && (count & (count - 1)) == 0;  // a power of 2: the product is the quotient
            for (int u = 0; u < K::kUnroll; ++u) {
              const auto v = K::read(dy + out + u * K::kWidth);
              sum[u] += exact ? v * multiply_by : v / divide_by;
            }
          }
        for (int u = 0; u < K::kUnroll; ++u) K::write(dx + (nh * W + w) * C + c + u * K::kWidth, sum[u]);
      });
    }
  });
}

// f(rows, cols, divisor) of a sliding average.
template <class F>
void with_sliding(const Pool2dProblem& problem, const F& f) {
  const Sliding rows = rows_of(problem, 1), cols = cols_of(problem, 1);
  f(rows, cols, [&](int64_t p, int64_t q) {
    if (problem.divisor_override) return problem.divisor_override;
    if (problem.count_include_pad) return rows.padded_size(p) * cols.padded_size(q);
    return rows.window_of(p).size() * cols.window_of(q).size();
  });
}

template <class F>
void with_adaptive(const Pool2dProblem& problem, const F& f) {
  const Adaptive rows{problem.H, problem.P}, cols{problem.W, problem.Q};
  f(rows, cols, [&](int64_t p, int64_t q) { return rows.window_of(p).size() * cols.window_of(q).size(); });
}

}  // namespace

void max_pool2d_forward(const Pool2dProblem& problem, const void* x, void* y, void* offsets, Stream) {
  const Sliding rows = rows_of(problem, problem.dilation_h), cols = cols_of(problem, problem.dilation_w);
  for_dtype(problem.dtype, [&]<class T>(T) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    if (!offsets) return max_forward<T, uint8_t, false>(problem, rows, cols, from, to, nullptr);
    for_offset(problem,
               [&]<class O>(O) { max_forward<T, O, true>(problem, rows, cols, from, to, static_cast<O*>(offsets)); });
  });
}

void max_pool2d_backward(const Pool2dProblem& problem, const void* dy, const void* offsets, void* dx, Stream) {
  const Sliding rows = rows_of(problem, problem.dilation_h), cols = cols_of(problem, problem.dilation_w);
  for_dtype(problem.dtype, [&]<class T>(T) {
    const T* from = static_cast<const T*>(dy);
    T* to = static_cast<T*>(dx);
    for_offset(problem, [&]<class O>(O) {
      const O* kept = static_cast<const O*>(offsets);
      if constexpr (std::is_same_v<T, Acc<T>> && std::is_same_v<O, uint8_t>)
        if (problem.C < kLanes<T>) return max_backward_banded(problem, from, kept, to);
      max_backward(problem, rows, cols, from, kept, to);
    });
  });
}

void max_pool2d_indices(const Pool2dProblem& problem, const void* offsets, int64_t* indices, Stream) {
  const Sliding rows = rows_of(problem, problem.dilation_h), cols = cols_of(problem, problem.dilation_w);
  for_offset(problem, [&]<class O>(O) { max_indices(problem, rows, cols, static_cast<const O*>(offsets), indices); });
}

void adaptive_max_pool2d_forward(const Pool2dProblem& problem, const void* x, void* y, int32_t* offsets, Stream) {
  const Adaptive rows{problem.H, problem.P}, cols{problem.W, problem.Q};
  for_dtype(problem.dtype, [&]<class T>(T) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    if (!offsets) return max_forward<T, int32_t, false>(problem, rows, cols, from, to, offsets);
    max_forward<T, int32_t, true>(problem, rows, cols, from, to, offsets);
  });
}

void adaptive_max_pool2d_backward(const Pool2dProblem& problem, const void* dy, const int32_t* offsets, void* dx,
                                  Stream) {
  const Adaptive rows{problem.H, problem.P}, cols{problem.W, problem.Q};
  for_dtype(problem.dtype, [&]<class T>(T) {
    max_backward(problem, rows, cols, static_cast<const T*>(dy), offsets, static_cast<T*>(dx));
  });
}

void adaptive_max_pool2d_indices(const Pool2dProblem& problem, const int32_t* offsets, int64_t* indices, Stream) {
  max_indices(problem, Adaptive{problem.H, problem.P}, Adaptive{problem.W, problem.Q}, offsets, indices);
}

void avg_pool2d_forward(const Pool2dProblem& problem, const void* x, void* y, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) {
    with_sliding(problem, [&](const auto& rows, const auto& cols, const auto& divisor) {
      average_forward(problem, rows, cols, divisor, static_cast<const T*>(x), static_cast<T*>(y));
    });
  });
}

void avg_pool2d_backward(const Pool2dProblem& problem, const void* dy, void* dx, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) {
    with_sliding(problem, [&](const auto& rows, const auto& cols, const auto& divisor) {
      average_backward(problem, rows, cols, divisor, static_cast<const T*>(dy), static_cast<T*>(dx));
    });
  });
}

void adaptive_avg_pool2d_forward(const Pool2dProblem& problem, const void* x, void* y, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) {
    with_adaptive(problem, [&](const auto& rows, const auto& cols, const auto& divisor) {
      average_forward(problem, rows, cols, divisor, static_cast<const T*>(x), static_cast<T*>(y));
    });
  });
}

void adaptive_avg_pool2d_backward(const Pool2dProblem& problem, const void* dy, void* dx, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) {
    with_adaptive(problem, [&](const auto& rows, const auto& cols, const auto& divisor) {
      average_backward(problem, rows, cols, divisor, static_cast<const T*>(dy), static_cast<T*>(dx));
    });
  });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
