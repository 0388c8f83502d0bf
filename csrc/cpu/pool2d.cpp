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
// Tile       forward: 4 vectors of channels c deep, or one; columns w ->
//                        +- x: the R rows of W pixels that row p reads -------+
//            rows h    | | [window (p,q): R x S]      maximum and tap, or     |  an item: row (n,p) of y, its windows
//                      v |            [window (p,q+1)] ..  sum: registers     |  one by one, all C channels; x in place
//                        +- halo: columns of both, rows of p + 1: cache ------+
//            backward: row (n,h) of dx, whose pixels ask the windows over them; of few channels, a band of rows.
// Ownership  One index of parallel_for owns one row of outputs, (n,p) forward and (n,h) backward, or a band of such
//            rows. Nothing is written outside of it, so every schedule gives the same bits.
// Traffic    forward: x once (overlapping windows meet in cache) + y (+ offsets); backward: dy (+ offsets) once + dx;
//            indices: offsets once + indices.
#include "pool2d.h"

#include <algorithm>

#include "../kernels.h"
#include "parallel.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

// Channels up to which windows that add to their maxima are faster than inputs that ask their windows: 0.3 to 0.9 of
// the time on maps of 64 x 64 with AVX-512, windows 2x2 s2 and 3x3 s2; at 64 channels 1.1 and 1.9 of it.
constexpr int kFew = 32;

template <class T, class O, bool kKeepOffsets, class Axis>
void max_forward(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, const T* x, T* y, O* offsets) {
  const int64_t row = int64_t{problem.W} * problem.C, image = problem.H * row, out = int64_t{problem.Q} * problem.C;
  const T* end = x + problem.N * image;
  parallel_for(int64_t{problem.N} * problem.P, work_of(problem, problem.P), [&](int64_t np) {
    const T* plane = x + np / problem.P * image;
    const auto row_of = [&](int64_t h) { return plane + h * row; };
    max_row<T, O, kKeepOffsets>(problem, rows, cols, np % problem.P, row_of, end, y + np * out,
                                kKeepOffsets ? offsets + np * out : nullptr);
  });
}

template <class T, class O, class Axis>
void max_backward(const Pool2dProblem& problem, const Axis& rows, const Axis& cols, const T* dy, const O* offsets,
                  T* dx) {
  const int64_t H = problem.H, W = problem.W, C = problem.C;
  parallel_for(problem.N * H, work_of(problem, H), [&](int64_t nh) {
    max_backward_row(problem, rows, cols, dy, offsets, dx + nh * W * C, nh / H, nh % H, Span{0, W}, 0, C);
  });
}

// The same sums in the same order for few channels, where windows are fewer than inputs and a vector holds little:
// each band of rows is cleared, and the windows over it add to it in turn.
template <class T>
void max_backward_banded(const Pool2dProblem& problem, const T* dy, const uint8_t* offsets, T* dx) {
  constexpr int64_t kBand = 16384;  // elements, to stay in the second-level cache
  const Sliding rows = rows_of(problem, problem.dilation_h), cols = cols_of(problem, problem.dilation_w);
  const int64_t C = problem.C, H = problem.H, Q = problem.Q, row = problem.W * C;
  const int64_t band = std::max<int64_t>(1, kBand / row), bands = (H + band - 1) / band;
  const bool any = rows.taps_of(0).size() > 0 && cols.taps_of(0).size() > 0;  // else there is no other window
  int64_t where[256] = {};                                                    // each tap, from its window's first
  for (int64_t tap = 0; tap < rows.kernel * cols.kernel; ++tap)
    where[tap] = tap / cols.kernel * rows.dilation * row + tap % cols.kernel * cols.dilation * C;
  parallel_for(problem.N * bands, work_of(problem, bands), [&](int64_t i) {
    const int64_t n = i / bands, begin = i % bands * band, end = std::min(H, begin + band);
    const uint64_t size = static_cast<uint64_t>((end - begin) * row);
    T* to = dx + (n * H + begin) * row;
    std::fill(to, to + size, T{});
    const int64_t p_end = any ? rows.windows_over(end - 1).end : 0;
    for (int64_t p = rows.windows_over(begin).begin; p < p_end; ++p)
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t first = (rows.first(p) - begin) * row + cols.first(q) * C;
        const int64_t out = ((n * problem.P + p) * Q + q) * C;
        for (int64_t c = 0; c < C; ++c) {
          const int64_t at = first + where[offsets[out + c]] + c;  // beyond the band where another one has the row
          if (static_cast<uint64_t>(at) < size) to[at] += dy[out + c];
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
        if (problem.C <= kFew) return max_backward_banded(problem, from, kept, to);
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
