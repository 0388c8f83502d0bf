// What batch norm, and the ops that sweep over channels as it does, are made of: parts of x in either layout, sums over
// them for each channel, statistics, the affine map, and batch norm's gradient.
//
// A block's statistics are sums of deviations from a mean of its own, corrected for that mean's rounding, and blocks
// are merged by Chan's formula in double (Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for
// computing sample variances, 1979). Sums of raw squares would lose the variance of data that lie far from 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "../kernels.h"
#include "activation.h"
#include "parallel.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kBlock = 16384;  // elements that are summed together; the statistics read them twice, from cache
constexpr int64_t kRun = 256;      // lines in a block at most: what one float sums up
constexpr int64_t kSlices = 64;    // that sums are cut into where the shape allows: what threads share
constexpr int64_t kTile = 512;     // channels whose sums one index holds
constexpr int64_t kChunk = 32768;  // elements that one index of an elementwise sweep owns
constexpr int kAccumulators = 4;   // independent vector sums along L, to hide the latency of an addition

// Numbers that are worked on at once: a vector of them, or one, in the first lane of a vector (vectors select without
// branching, which the data would mispredict).
struct Full {};
struct One {};

template <class W, class T>
Vec<Acc<T>> read(const T* p) {
  if constexpr (std::is_same_v<W, One>)
    return splat(to_acc(*p));
  else
    return load(p);
}
template <class W, class T>
void write(T* p, Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<W, One>)
    from_acc(v[0], *p);
  else
    store(p, v);
}

// What one pass of a loop covers. [N,L,C]: `width` channels from `c`, in the lines begin <= n * L + l < end.
// [N,C,L]: channel c of the lines begin <= n < end, at the positions l_begin <= l < l_end.
struct Part {
  int64_t begin, end, c, width, l_begin, l_end;
  int64_t positions() const { return (end - begin) * (l_end - l_begin); }
};

// x as lines, whichever the layout.
struct Lines {
  bool channels_last;
  int64_t C, L, count;  // count: lines

  Lines(int64_t N, int64_t channels, int64_t positions, bool last)
      : channels_last(last), C(channels), L(last ? 1 : positions), count(last ? N * positions : N) {}

  // One position or one channel is dense in both layouts: the faster one is taken.
  template <class Problem>
  explicit Lines(const Problem& p) : Lines(p.N, p.C, p.L, p.L == 1 || (p.channels_last && p.C > 1)) {}
};

// body(W{}, i, param, slot), W being Full or One, for all numbers of the part, at offset i in x: param(array) is a
// per-channel array's value there, slot the place below kTile where its sums belong (see fold).
template <class T, class Body>
void for_part(const Lines& lines, const Part& part, const Body& body) {
  using A = Acc<T>;
  constexpr int kWidth = kLanes<T>;
  for (int64_t line = part.begin; line < part.end; ++line) {
    if (lines.channels_last) {
      const int64_t at = line * lines.C + part.c;
      int64_t k = 0;
      for (; k + kWidth <= part.width; k += kWidth)
        body(Full{}, at + k, [&](const A* array) { return load(array + part.c + k); }, k);
      for (; k < part.width; ++k) body(One{}, at + k, [&](const A* array) { return splat(array[part.c + k]); }, k);
    } else {
      const int64_t at = (line * lines.C + part.c) * lines.L;
      int64_t l = part.l_begin;
      for (int64_t slot = 0; l + kWidth <= part.l_end; l += kWidth, slot = (slot + kWidth) % (kAccumulators * kWidth))
        body(Full{}, at + l, [&](const A* array) { return splat(array[part.c]); }, slot);
      for (; l < part.l_end; ++l) body(One{}, at + l, [&](const A* array) { return splat(array[part.c]); }, 0);
    }
  }
}

// kCount sums for each channel of a part, in slots.
template <class T, int kCount>
struct Sums {
  using A = Acc<T>;
  static constexpr int64_t kSpread = kAccumulators * kLanes<T>;
  A at[kCount][kTile];

  Sums(const Lines& lines, const Part& part) { clear(lines, part); }

  void clear(const Lines& lines, const Part& part) {
    for (A* sums : at) std::fill_n(sums, lines.channels_last ? part.width : kSpread, A{});
  }

  template <class W, class... Values>
  void add(int64_t slot, Values... values) {
    A(*sums)[kTile] = at;
    ((write<W>(*sums + slot, read<W>(*sums + slot) + values), ++sums), ...);
  }

  // Gathers a channel's slots into its first one.
  void fold(const Lines& lines) {
    if (lines.channels_last) return;
    for (A* sums : at)
      for (int64_t k = 1; k < kSpread; ++k) sums[0] += sums[k];
  }
};

// Two results for each channel of a tile: mean and sum of squared deviations, or two plain sums.
struct Pair {
  double first[kTile], second[kTile];
};

// block(part, pair) computes a part's results; merge(count, first, second, more, more_first, more_second, width)
// adds those of `more` positions to those of the `count` before.
template <class Block, class Merge>
void reduce(const Lines& lines, const Block& block, const Merge& merge, double* first, double* second) {
  const int64_t C = lines.C, tile = lines.channels_last ? std::min(C, kTile) : 1, tiles = (C + tile - 1) / tile;
  const int64_t line_size = lines.channels_last ? tile : lines.L;
  const int64_t block_lines = std::clamp<int64_t>(kBlock / line_size, 1, kRun);
  const int64_t blocks = (lines.count + block_lines - 1) / block_lines;
  const int64_t wanted = std::min(blocks, std::max<int64_t>(1, kSlices / tiles));
  const int64_t slice_lines = (blocks + wanted - 1) / wanted * block_lines;
  const int64_t slices = (lines.count + slice_lines - 1) / slice_lines;
  const std::unique_ptr<double[]> slab(new double[static_cast<size_t>(2 * slices * C)]);

  parallel_for(slices * tiles, 2 * slice_lines * line_size, [&](int64_t i) {
    const int64_t slice = i / tiles, c = i % tiles * tile, width = std::min(tile, C - c);
    const int64_t end = std::min(lines.count, (slice + 1) * slice_lines);
    Pair total, more;
    int64_t count = 0;
    for (int64_t line = slice * slice_lines; line < end; line += block_lines)
      for (int64_t l = 0; l < lines.L; l += kBlock) {
        const Part part{line, std::min(end, line + block_lines), c, width, l, std::min(lines.L, l + kBlock)};
        block(part, count ? more : total);
        if (count) merge(count, total.first, total.second, part.positions(), more.first, more.second, width);
        count += part.positions();
      }
    std::copy_n(total.first, width, slab.get() + 2 * slice * C + c);
    std::copy_n(total.second, width, slab.get() + (2 * slice + 1) * C + c);
  });

  std::copy_n(slab.get(), C, first);
  std::copy_n(slab.get() + C, C, second);
  for (int64_t slice = 1; slice < slices; ++slice) {
    const int64_t before = slice * slice_lines, more = std::min(lines.count - before, slice_lines);
    merge(before * lines.L, first, second, more * lines.L, slab.get() + 2 * slice * C, slab.get() + (2 * slice + 1) * C,
          C);
  }
}

// mean[c] and squares[c], the sum of (x - mean[c])^2.
template <class T>
void statistics(const Lines& lines, const T* x, double* mean, double* squares) {
  using A = Acc<T>;
  const auto block = [&](const Part& part, Pair& out) {
    const A scale = 1 / static_cast<A>(part.positions());
    Sums<T, 1> total(lines, part);
    for_part<T>(lines, part, [&]<class W>(W, int64_t i, auto, int64_t k) { total.template add<W>(k, read<W>(x + i)); });
    total.fold(lines);
    A about[kTile];
    for (int64_t k = 0; k < std::max(part.width, lines.channels_last ? 0 : Sums<T, 1>::kSpread); ++k)
      about[k] = total.at[0][lines.channels_last ? k : 0] * scale;

    Sums<T, 2> sums(lines, part);
    for_part<T>(lines, part, [&]<class W>(W, int64_t i, auto, int64_t k) {
      const Vec<A> d = read<W>(x + i) - read<W>(about + k);
      sums.template add<W>(k, d, d * d);
    });
    sums.fold(lines);
    const double count = static_cast<double>(part.positions());
    for (int64_t k = 0; k < part.width; ++k) {
      const double shift = sums.at[0][k] / count, rest = sums.at[1][k] - sums.at[0][k] * shift;
      out.first[k] = about[k] + (std::isfinite(about[k]) ? shift : 0);  // infinity is a mean, its deviations are not
      out.second[k] = rest < 0 ? 0 : rest;
    }
  };
  const auto chan = [](int64_t count, double* mean, double* squares, int64_t more, const double* more_mean,
                       const double* more_squares, int64_t width) {
    const double total = static_cast<double>(count + more), weight = static_cast<double>(count) / total;
    const double more_weight = static_cast<double>(more) / total, spread = weight * static_cast<double>(more);
    for (int64_t c = 0; c < width; ++c) {
      const double delta = more_mean[c] - mean[c];
      mean[c] = mean[c] * weight + more_mean[c] * more_weight;
      squares[c] += more_squares[c] + delta * delta * spread;
    }
  };
  reduce(lines, block, chan, mean, squares);
}

// sweep(part) for parts that together cover x once, on all threads.
template <class Sweep>
void for_chunks(const Lines& lines, const Sweep& sweep) {
  if (lines.channels_last) {
    const int64_t group = std::max<int64_t>(1, kChunk / lines.C);
    return parallel_for((lines.count + group - 1) / group, 3 * group * lines.C, [&](int64_t i) {
      sweep(Part{i * group, std::min(lines.count, (i + 1) * group), 0, lines.C, 0, 1});
    });
  }
  const int64_t planes = lines.count * lines.C, cuts = (lines.L + kChunk - 1) / kChunk;
  const int64_t group = std::max<int64_t>(1, kChunk / lines.L);
  parallel_for((planes + group - 1) / group * cuts, 3 * group * std::min(lines.L, kChunk), [&](int64_t i) {
    const int64_t first = i / cuts * group, l = i % cuts * kChunk;
    for (int64_t plane = first; plane < std::min(planes, first + group); ++plane) {
      const int64_t n = plane / lines.C;
      sweep(Part{n, n + 1, plane % lines.C, 1, l, std::min(lines.L, l + kChunk)});
    }
  });
}

// What x is mapped by: one allocation of per-channel arrays.
template <class A>
struct Affine {
  std::unique_ptr<A[]> arrays;
  A *mean, *scale, *bias;

  Affine(int64_t C, const A* mean_in, const A* rstd, const A* weight, const A* bias_in)
      : arrays(new A[static_cast<size_t>(3 * C)]), mean(arrays.get()), scale(mean + C), bias(scale + C) {
    for (int64_t c = 0; c < C; ++c) {
      mean[c] = mean_in[c];
      scale[c] = weight ? rstd[c] * weight[c] : rstd[c];
      bias[c] = bias_in ? bias_in[c] : 0;
    }
  }

  // (x - mean) * scale + bias + residual: the same bits forward and backward.
  template <class W, class X, class T, class Param>
  Vec<A> z_at(const X& x, const T* residual, int64_t i, const Param& param) const {
    const Vec<A> z = (read<W>(x + i) - param(mean)) * param(scale) + param(bias);
    return residual ? z + read<W>(residual + i) : z;
  }
};

// mean and rstd [C] that a forward call normalises with; training updates the running statistics.
template <class T>
void used_statistics(const NormProblem& problem, const Lines& lines, const BatchNormForward& args, Acc<T>* mean,
                     Acc<T>* rstd) {
  using A = Acc<T>;
  const int64_t C = problem.C;
  const double count = static_cast<double>(problem.N * problem.L);
  A *running_mean = static_cast<A*>(args.running_mean), *running_var = static_cast<A*>(args.running_var);
  if (problem.training) {
    const std::unique_ptr<double[]> batch(new double[static_cast<size_t>(2 * C)]);
    const double *batch_mean = batch.get(), *squares = batch_mean + C;
    statistics(lines, static_cast<const T*>(args.x), batch.get(), batch.get() + C);
    const double momentum = problem.momentum;
    for (int64_t c = 0; c < C; ++c) {
      mean[c] = static_cast<A>(batch_mean[c]);
      rstd[c] = static_cast<A>(1 / std::sqrt(squares[c] / count + problem.eps));
      if (running_mean) running_mean[c] = static_cast<A>((1 - momentum) * running_mean[c] + momentum * batch_mean[c]);
      if (running_var)
        running_var[c] = static_cast<A>((1 - momentum) * running_var[c] + momentum * (squares[c] / (count - 1)));
    }
  } else {
    for (int64_t c = 0; c < C; ++c) {
      mean[c] = running_mean[c];
      rstd[c] = static_cast<A>(1 / std::sqrt(running_var[c] + problem.eps));
    }
  }
  if (args.mean) std::copy_n(mean, C, static_cast<A*>(args.mean));
  if (args.rstd) std::copy_n(rstd, C, static_cast<A*>(args.rstd));
}

// An array of which only the elements from `base` on lie in memory, at `data`.
template <class T>
struct Shifted {
  const T* data;
  int64_t base;
  const T* operator+(int64_t i) const { return data + (i - base); }
};

// Sweeps twice, over the positions of sum_lines for the sums and over those of lines for dx, with the gradient by the
// activation's output at each. for_summands(part, sweep) calls sweep(part, gradient, x), and for_gradients(part, sweep)
// sweep(part, gradient), for parts that together are the one given, or what of it has a gradient that is not zero.
template <class T, Activation kActivation, class ForSummands, class ForGradients>
void batch_norm_backward(const NormProblem& problem, const BatchNormBackward& args, const Lines& sum_lines,
                         const ForSummands& for_summands, const Lines& lines, const ForGradients& for_gradients) {
  using A = Acc<T>;
  const int64_t C = problem.C;
  const double count = static_cast<double>(problem.N * problem.L);
  const T *x = static_cast<const T*>(args.x), *y = static_cast<const T*>(args.y);
  const T* residual = static_cast<const T*>(args.residual);
  T *dx = static_cast<T*>(args.dx), *dresidual = static_cast<T*>(args.dresidual);
  const A *mean = static_cast<const A*>(args.mean), *rstd = static_cast<const A*>(args.rstd);
  const Affine<A> affine(C, mean, rstd, static_cast<const A*>(args.weight), static_cast<const A*>(args.bias));

  const auto gradient_at = [&]<class W>(W, const Shifted<T>& dy, const auto& x, int64_t i, const auto& param) {
    const Vec<A> g = read<W>(dy + i);
    if constexpr (kActivation == Activation::kNone) return g;
    if constexpr (!gradient_reads_input(kActivation))
      if (y) return activation_gradient<kActivation>(g, read<W>(y + i));
    const Vec<A> z = affine.template z_at<W>(x, residual, i, param);
    if constexpr (gradient_reads_input(kActivation))
      return activation_gradient<kActivation>(g, z);
    else
      return activation_gradient<kActivation>(g, activate<kActivation>(z));
  };

  // Of dz and of (x - mean) over the positions, what training subtracts from dz.
  const std::unique_ptr<A[]> shares(new A[static_cast<size_t>(2 * C)]());
  A *dz_share = shares.get(), *x_share = dz_share + C;
  if (args.dweight || args.dbias || (problem.training && dx)) {
    const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(2 * C)]);
    double *dz_sum = sums.get(), *product_sum = dz_sum + C;
    const auto block = [&](const Part& part, Pair& out) {
      Sums<T, 2> sums(sum_lines, part);
      for_summands(part, [&](const Part& some, const Shifted<T>& dy, const Shifted<T>& x) {
        for_part<T>(sum_lines, some, [&]<class W>(W width, int64_t i, const auto& param, int64_t k) {
          const Vec<A> dz = gradient_at(width, dy, x, i, param);
          sums.template add<W>(k, dz, dz * (read<W>(x + i) - param(affine.mean)));
        });
      });
      sums.fold(sum_lines);
      std::copy_n(sums.at[0], part.width, out.first);
      std::copy_n(sums.at[1], part.width, out.second);
    };
    const auto add = [](int64_t, double* first, double* second, int64_t, const double* more_first,
                        const double* more_second, int64_t width) {
      for (int64_t c = 0; c < width; ++c) {
        first[c] += more_first[c];
        second[c] += more_second[c];
      }
    };
    reduce(sum_lines, block, add, dz_sum, product_sum);
    for (int64_t c = 0; c < C; ++c) {
      if (args.dbias) static_cast<A*>(args.dbias)[c] = static_cast<A>(dz_sum[c]);
      if (args.dweight) static_cast<A*>(args.dweight)[c] = static_cast<A>(product_sum[c] * rstd[c]);
      dz_share[c] = static_cast<A>(dz_sum[c] / count);
      x_share[c] = static_cast<A>(product_sum[c] * rstd[c] * rstd[c] / count);
    }
  }
  if (!dx && !dresidual) return;

  for_chunks(lines, [&](const Part& part) {
    for_gradients(part, [&](const Part& some, const Shifted<T>& dy) {
      for_part<T>(lines, some, [&]<class W>(W width, int64_t i, const auto& param, int64_t) {
        const Vec<A> dz = gradient_at(width, dy, x, i, param);
        if (dresidual) write<W>(dresidual + i, dz);
        if (!dx) return;
        Vec<A> rest = dz;
        if (problem.training) rest -= param(dz_share) + (read<W>(x + i) - param(affine.mean)) * param(x_share);
        write<W>(dx + i, rest * param(affine.scale));
      });
    });
  });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
