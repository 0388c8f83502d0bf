// Batch norm, an activation and a maximum over windows, NHWC: the stem of an ImageNet network.
//
//   y[n,p,q,c]  = max over (r,s) of a[n, p*stride_h - pad_h + r*dilation_h, q*.. + s*dilation_w, c]
//   a           = activation((x - mean) * rstd * weight + bias), rounded to x's type as batch_norm_act rounds it
//   da[n,h,w,c] = sum over the windows (p,q) whose kept tap is (h,w) of dy[n,p,q,c], rounded for dx alone
//   dx, dweight and dbias are batch norm's, of da.
//
// Layout     x, dx [N,H,W,C]; y, dy and the offsets r * S + s of the kept taps [N,P,Q,C]; everything else [C].
// Tile       forward: all C channels deep; columns w ->
//                        +- a: a ring of rows, as many as a window spans -----+
//            rows h    | | [window (p,q): R x S]      maximum and tap:        |  an item: a band of rows p of an image,
//                      v |            [window (p,q+1)] ..  registers          |  kBands = 64 in all, or one an image
//                        +- next: rows of a that p + 1 reads, from x ---------+
//            The ring has a power of 2 of rows. halo: rows of a that two bands reach are computed for each.
//            backward: kGathered = 4096 elements at a time, of x at kept taps for the sums, and of da for dx.
// Ownership  forward: one index of parallel_for owns a band of output rows (n,p), and computes the rows of a that its
//            windows reach, each once, in a ring that holds as many as one window spans. Backward: batch norm's sweeps;
//            the sums run over the windows, at the x that each has kept, and dx over the positions; both gather what
//            they want for a few positions at a time, just before they read it.
// Traffic    forward: x for the statistics, then x + y (+ offsets); backward: x, dy and offsets for the sums, then the
//            same + dx. Neither a nor da is ever written to memory as a whole.
#include <algorithm>
#include <bit>
#include <memory>

#include "batch_norm.h"
#include "pool2d.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kBands = 64;       // bands that all images are cut into, where they are few: what threads share
constexpr int64_t kBandRows = 4;     // output rows in a band at least: neighbours compute their common rows of a twice
constexpr int64_t kGathered = 4096;  // elements that are gathered at once, to stay in the first-level cache

// a of `count` positions from `begin` on: rounded to T, yet held in what it is read as.
template <class T>
void activate_positions(const Lines& lines, const Affine<Acc<T>>& affine, Activation activation, const T* x,
                        int64_t begin, int64_t count, Acc<T>* a) {
  const int64_t base = begin * lines.C;
  for_activation(activation, [&](auto act) {
    for_part<T>(lines, Part{begin, begin + count, 0, lines.C, 0, 1},
                [&]<class W>(W, int64_t i, const auto& param, int64_t) {
                  T rounded[kLanes<T>];
                  const Vec<Acc<T>> z = affine.template z_at<W>(x, static_cast<const T*>(nullptr), i, param);
                  write<W>(rounded, activate<act.value>(z));
                  write<W>(a + (i - base), read<W>(rounded));
                });
  });
}

template <class T>
void forward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormForward& args, void* offsets) {
  using A = Acc<T>;
  const int64_t H = pool.H, W = pool.W, C = pool.C, P = pool.P, out = int64_t{pool.Q} * C;
  const T* x = static_cast<const T*>(args.x);
  const std::unique_ptr<A[]> used(new A[static_cast<size_t>(2 * C)]);
  A *mean = used.get(), *rstd = mean + C;
  used_statistics<T>(norm, Lines(norm), args, mean, rstd);
  const Affine<A> affine(C, mean, rstd, static_cast<const A*>(args.weight), static_cast<const A*>(args.bias));

  const Lines lines(norm.N, C, norm.L, true);
  const Sliding rows = rows_of(pool, pool.dilation_h);
  const int64_t bands = std::clamp<int64_t>(kBands / pool.N, 1, std::max<int64_t>(1, P / kBandRows));
  const int64_t band = (P + bands - 1) / bands;
  const int64_t reach = std::min<int64_t>(H, (rows.kernel - 1) * rows.dilation + 1);
  const int64_t ring_rows = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(reach)));
  const int64_t ring_size = ring_rows * W * C + kLanes<T>;  // max_row may read one vector beyond the last row
  parallel_for(pool.N * bands, 3 * band * pool.stride_h * W * C, [&](int64_t i) {
    const int64_t n = i / bands, p_begin = i % bands * band, p_end = std::min(P, p_begin + band);
    const std::unique_ptr<A[]> ring(new A[static_cast<size_t>(ring_size)]);
    std::fill_n(ring.get() + ring_size - kLanes<T>, kLanes<T>, A{});
    const auto row_of = [&](int64_t h) { return ring.get() + (h & (ring_rows - 1)) * W * C; };
    int64_t next = 0;
    for (int64_t p = p_begin; p < p_end; ++p) {
      const Span taps = rows.taps_of(p);
      next = std::max(next, rows.first(p));  // no later window reaches above
      for (; next <= rows.first(p) + (taps.end - 1) * rows.dilation; ++next)
        activate_positions(lines, affine, norm.activation, x, (n * H + next) * W, W, row_of(next));
      const int64_t at = (n * P + p) * out;
      T* y = static_cast<T*>(args.y) + at;
      const A* end = ring.get() + ring_size;
      if (!offsets)
        max_row<T, uint8_t, false>(pool, p, row_of, end, y, nullptr);
      else
        for_offset(pool,
                   [&]<class O>(O) { max_row<T, O, true>(pool, p, row_of, end, y, static_cast<O*>(offsets) + at); });
    }
  });
}

// da of a part's positions [., width].
template <class T>
void gather_gradient(const Pool2dProblem& pool, const T* dy, const void* offsets, const Part& part, T* da) {
  const int64_t W = pool.W;
  for_offset(pool, [&]<class O>(O) {
    for (int64_t line = part.begin; line < part.end;) {
      const int64_t row = line / W, w = line % W, end = std::min(W, w + part.end - line);
      max_backward_row(pool, dy, static_cast<const O*>(offsets), da + (line - part.begin) * part.width, row / pool.H,
                       row % pool.H, Span{w, end}, part.c, part.width);
      line += end - w;
    }
  });
}

// x where the maxima of a part's windows were [., width], up to a window without a tap inside the input: how many there
// are before it. steps[tap] is how far x of that tap lies behind that of the first.
template <class T>
int64_t gather_kept(const Pool2dProblem& pool, const T* x, const void* offsets, const int64_t* steps, const Part& part,
                    T* kept) {
  const int64_t C = pool.C, P = pool.P, Q = pool.Q;
  const Sliding rows = rows_of(pool, pool.dilation_h), cols = cols_of(pool, pool.dilation_w);
  int64_t line = part.begin;
  for (; line < part.end; ++line) {
    const int64_t np = line / Q, q = line % Q, n = np / P, p = np % P;
    if (rows.taps_of(p).size() <= 0 || cols.taps_of(q).size() <= 0) break;
    const int64_t first = ((n * pool.H + rows.first(p)) * pool.W + cols.first(q)) * C + part.c;
    for_offset(pool, [&]<class O>(O) {
      const O* taps = static_cast<const O*>(offsets) + line * C + part.c;
      for (int64_t k = 0; k < part.width; ++k) kept[k] = x[first + steps[taps[k]] + k];
    });
    kept += part.width;
  }
  return line - part.begin;
}

// sweep(lines, base) for the part's lines of which the buffer [., width] holds the numbers: from buffer[i - base] on.
template <class Sweep>
void for_lines(const Part& part, int64_t C, const Sweep& sweep) {
  if (part.width == C) return sweep(part, part.begin * C);
  Part line = part;
  for (line.begin = part.begin; line.begin < part.end; ++line.begin) {
    line.end = line.begin + 1;
    sweep(line, line.begin * C + part.c - (line.begin - part.begin) * part.width);
  }
}

// dz adds up the dy of all windows that kept a position, so its sums over positions are sums over windows as well,
// which are fewer.
template <class T, Activation kActivation>
void backward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormBackward& args, const void* offsets) {
  const int64_t C = norm.C, taps = int64_t{pool.R} * pool.S;
  const T *x = static_cast<const T*>(args.x), *dy = static_cast<const T*>(args.dy);
  const std::unique_ptr<int64_t[]> steps(new int64_t[static_cast<size_t>(taps)]);
  for (int64_t tap = 0; tap < taps; ++tap)
    steps[tap] = (tap / pool.S * pool.dilation_h * pool.W + tap % pool.S * pool.dilation_w) * C;

  const auto for_summands = [&](const Part& part, const auto& sweep) {
    const int64_t group = std::max<int64_t>(1, kGathered / part.width);
    const std::unique_ptr<T[]> kept(new T[static_cast<size_t>(group * part.width)]);
    for (Part some = part; some.begin < part.end;) {
      some.end = std::min(part.end, some.begin + group);
      const int64_t count = gather_kept(pool, x, offsets, steps.get(), some, kept.get());
      some.end = some.begin + count;
      for_lines(some, C, [&](const Part& lines, int64_t base) {
        sweep(lines, Shifted<T>{dy, 0}, Shifted<T>{kept.get(), base});
      });
      some.begin += std::max<int64_t>(count, 1);
    }
  };
  const auto for_gradients = [&](const Part& part, const auto& sweep) {
    const int64_t group = std::max<int64_t>(1, kGathered / part.width);
    const std::unique_ptr<T[]> da(new T[static_cast<size_t>(group * part.width)]);
    for (Part some = part; some.begin < part.end; some.begin += group) {
      some.end = std::min(part.end, some.begin + group);
      gather_gradient(pool, dy, offsets, some, da.get());
      for_lines(some, C, [&](const Part& lines, int64_t base) { sweep(lines, Shifted<T>{da.get(), base}); });
    }
  };
  batch_norm_backward<T, kActivation>(norm, args, Lines(norm.N, C, int64_t{pool.P} * pool.Q, true), for_summands,
                                      Lines(norm.N, C, norm.L, true), for_gradients);
}

}  // namespace

void bn_act_max_pool2d_forward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormForward& args,
                               void* offsets, Stream) {
  for_dtype(norm.dtype, [&]<class T>(T) { forward<T>(norm, pool, args, offsets); });
}

void bn_act_max_pool2d_backward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormBackward& args,
                                const void* offsets, Stream) {
  for_dtype(norm.dtype, [&]<class T>(T) {
    for_activation(norm.activation, [&](auto activation) { backward<T, activation.value>(norm, pool, args, offsets); });
  });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
