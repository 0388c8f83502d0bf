// Squeeze and excitation: each channel of an image is scaled by what a small network makes of all channels' means.
//
//   pooled[n,c] = mean over L of x;  hidden[n,m] = bias1[m] + sum over c of weight1[m,c] * pooled[n,c]
//   scale[n,c]  = gate(bias2[c] + sum over m of weight2[c,m] * activation(hidden[n,m]));  y = x * scale
//
//   dscale[n,c] = sum over L of dy * x
//   dgated      = dscale * gate';  dweight2 = dgated^T activation(hidden),  dbias2 = sum over n of dgated
//   dhidden     = dgated weight2 * activation';  dweight1 = dhidden^T pooled,  dbias1 = sum over n of dhidden
//   dx          = dy * scale + dhidden weight1 / L
//
// Layout     x, y and their gradients [N,L,C] or [N,C,L]; weight1 and the transposed weight2 [M,C]; the rest [N,C] and
//            [N,M]. All work on the weights runs along C.
// Tile       an image of [N,L,C], sums and y; of [N,C,L] a slice has some channels' whole planes.
//                          channels c ->
//                        +- all C, kTile = 512 at once -----------------+
//            positions | | slice: kSliceSize = 8192 elements or         |  the layers: an image, or kTogether = 4
//            l         v | more, or all of L; sums: cache               |  that share a reading of the matrices
//                        +- split: the next slice of the image ---------+
// Ownership  An image is cut into slices: positions of [L,C], channels of [C,L]. Where images are many, one index of
//            parallel_for owns an image, and the second sweep finds it in cache; where they are few, one owns a slice.
//            Both sum the same slices in the same order, so any number of threads gives the same bits.
// Traffic    forward: x for the means, then x + y; backward: dy + x for dscale, then dy + dx. The second reading comes
//            from cache where an image fits. The matrices once for each image, or for kTogether of them.
#include <algorithm>
#include <memory>

#include "batch_norm.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kManyImages = 16;   // from here on an index owns an image
constexpr int64_t kSlicesOfAll = 64;  // that all images together are cut into, where they are few
constexpr int64_t kSliceSize = 8192;  // elements in a slice at least
constexpr int kTogether = 4;          // images that share a reading of the weights

// How an image is cut. A slice is positions [begin, end) of all channels, or all positions of channels [begin, end).
struct Slices {
  Lines lines;
  int64_t L, count, extent, size;  // size: of a slice, along an axis of `extent`

  explicit Slices(const SqueezeExciteProblem& p) : lines(p), L(p.L), extent(lines.channels_last ? p.L : p.C) {
    const int64_t wanted = std::clamp<int64_t>(p.C * p.L / kSliceSize, 1, std::max<int64_t>(1, kSlicesOfAll / p.N));
    size = (extent + wanted - 1) / wanted;
    count = (extent + size - 1) / size;
  }

  // Of sums for each channel of an image, which gather_sums adds up.
  int64_t rows() const { return lines.channels_last ? count : 1; }

  // f(part) for parts of slice `s` of image n, each with at most `positions` lines or positions in a row.
  template <class F>
  void for_parts(int64_t n, int64_t s, int64_t positions, const F& f) const {
    const int64_t begin = s * size, end = std::min(extent, begin + size);
    if (lines.channels_last) {
      for (int64_t c = 0; c < lines.C; c += kTile)
        for (int64_t l = begin; l < end; l += positions)
          f(Part{n * L + l, n * L + std::min(end, l + positions), c, std::min(kTile, lines.C - c), 0, 1});
    } else {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t l = 0; l < L; l += positions) f(Part{n, n + 1, c, 1, l, std::min(L, l + positions)});
    }
  }
};

// sweep(n, s) for every slice, then between(n, images) for groups of images, then finish(n, s) for every slice.
template <class Sweep, class Between, class Finish>
void for_images(const SqueezeExciteProblem& problem, const Slices& slices, const Sweep& sweep, const Between& between,
                const Finish& finish) {
  const int64_t N = problem.N, elements = problem.C * problem.L, count = slices.count,
                weights = 2 * problem.M * problem.C;
  if (N >= kManyImages && weights <= elements)  // larger weights are better read for several images at once
    return parallel_for(N, 6 * elements, [&](int64_t n) {
      for (int64_t s = 0; s < count; ++s) sweep(n, s);
      between(n, 1);
      for (int64_t s = count; s-- > 0;) finish(n, s);  // what was read last is found in cache
    });
  const int64_t groups = (N + kTogether - 1) / kTogether;
  parallel_for(N * count, 2 * elements / count, [&](int64_t i) { sweep(i / count, i % count); });
  parallel_for(groups, kTogether * weights,
               [&](int64_t i) { between(i * kTogether, std::min<int64_t>(kTogether, N - i * kTogether)); });
  parallel_for(N * count, 3 * elements / count, [&](int64_t i) { finish(i / count, i % count); });
}

// The sum of value(W{}, i) over begin <= i < end.
template <class T, class Value>
double sum_row(int64_t begin, int64_t end, const Value& value) {
  using A = Acc<T>;
  Vec<A> sums[kAccumulators] = {};
  int64_t i = begin;
  for (; i + kAccumulators * kLanes<T> <= end; i += kAccumulators * kLanes<T>)
    for (int k = 0; k < kAccumulators; ++k) sums[k] += value(Full{}, i + k * kLanes<T>);
  for (; i + kLanes<T> <= end; i += kLanes<T>) sums[0] += value(Full{}, i);
  A rest = 0;
  for (; i < end; ++i) rest += value(One{}, i)[0];
  for (int k = 1; k < kAccumulators; ++k) sums[0] += sums[k];
  for (int lane = 0; lane < kLanes<T>; ++lane) rest += sums[0][lane];
  return rest;
}

// The sums over L of value(W{}, i) for each channel, of slice s of image n: into the image's sums [rows,C], of which it
// owns a row or, in the other layout, some channels of the only one.
template <class T, class Value>
void sum_slice(const Slices& slices, int64_t n, int64_t s, double* sums, const Value& value) {
  const Lines& lines = slices.lines;
  if (!lines.channels_last)
    return slices.for_parts(n, s, kBlock, [&](const Part& part) {
      const int64_t row = (n * lines.C + part.c) * lines.L;
      sums[part.c] += sum_row<T>(row + part.l_begin, row + part.l_end, value);
    });
  slices.for_parts(n, s, kRun, [&](const Part& part) {
    Sums<T, 1> found(lines, part);
    for_part<T>(lines, part,
                [&]<class W>(W width, int64_t i, auto, int64_t k) { found.template add<W>(k, value(width, i)); });
    for (int64_t k = 0; k < part.width; ++k) sums[s * lines.C + part.c + k] += found.at[0][k];
  });
}

// Adds up an image's sums [rows,C], divided by `by`, into out [C].
template <class A>
void gather_sums(const Slices& slices, const double* sums, int64_t by, A* out) {
  const int64_t C = slices.lines.C, rows = slices.rows();
  for (int64_t c = 0; c < C; ++c) {
    double sum = sums[c];
    for (int64_t s = 1; s < rows; ++s) sum += sums[s * C + c];
    out[c] = static_cast<A>(sum / static_cast<double>(by));
  }
}

// f(std::integral_constant<int, count>{}), count being 1 to kTogether.
template <class F>
void for_count(int64_t count, const F& f) {
  static_assert(kTogether == 4);
  if (count == 1) return f(std::integral_constant<int, 1>{});
  if (count == 2) return f(std::integral_constant<int, 2>{});
  if (count == 3) return f(std::integral_constant<int, 3>{});
  f(std::integral_constant<int, 4>{});
}

// The vector of p's numbers from c on, and back; beyond `size` there are none.
template <class A>
Vec<A> load_from(const A* p, int64_t c, int64_t size) {
  return c + kLanes<A> <= size ? load(p + c) : load(p + c, static_cast<int>(size - c));
}
template <class A>
void store_to(A* p, int64_t c, int64_t size, Vec<A> v) {
  if (c + kLanes<A> <= size)
    store(p + c, v);
  else
    store(p + c, v, static_cast<int>(size - c));
}

// out[i,r] = sum over c of matrix[r,c] * in[i,c], for `count` rows i at once.
template <class A>
void dots(int64_t count, const A* matrix, int64_t rows, int64_t C, const A* in, A* out) {
  for_count(count, [&](auto images) {
    for (int64_t r = 0; r < rows; ++r) {
      Vec<A> sums[images.value] = {};
      int64_t c = 0;
      for (; c + kLanes<A> <= C; c += kLanes<A>) {
        const Vec<A> row = load(matrix + r * C + c);
        for (int i = 0; i < images.value; ++i) sums[i] += row * load(in + i * C + c);
      }
      if (c < C)
        for (int i = 0; i < images.value; ++i) sums[i] += load_from(matrix + r * C, c, C) * load_from(in + i * C, c, C);
      for (int i = 0; i < images.value; ++i) {
        A sum = 0;
        for (int lane = 0; lane < kLanes<A>; ++lane) sum += sums[i][lane];
        out[i * rows + r] = sum;
      }
    }
  });
}

// Factors of a matrix's rows: that of row r for result i is at[i * result + r * row].
template <class A>
struct Factors {
  const A* at;
  int64_t result, row;
};

// out[i,c] = start[c] + sum over r of factor[i,r] * matrix[r,c], for `count` rows i at once; start may be null. Several
// vectors in a row are worked on together, for rows whose distance is a power of 2 share few places in the cache.
template <class A>
void combine(int64_t count, const A* matrix, int64_t rows, int64_t C, Factors<A> factors, const A* start, A* out) {
  constexpr int kVectors = 4;
  for_count(count, [&](auto results) {
    const auto columns = [&](int64_t begin, auto vectors) {
      Vec<A> sums[results.value][vectors.value];
      for (int v = 0; v < vectors.value; ++v)
        for (int i = 0; i < results.value; ++i)
          sums[i][v] = start ? load_from(start, begin + v * kLanes<A>, C) : Vec<A>{};
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < vectors.value; ++v) {
          const int64_t c = begin + v * kLanes<A>;
          const Vec<A> row = vectors.value > 1 ? load(matrix + r * C + c) : load_from(matrix + r * C, c, C);
          for (int i = 0; i < results.value; ++i) sums[i][v] += row * factors.at[i * factors.result + r * factors.row];
        }
      for (int v = 0; v < vectors.value; ++v)
        for (int i = 0; i < results.value; ++i) store_to(out + i * C, begin + v * kLanes<A>, C, sums[i][v]);
    };
    int64_t c = 0;
    for (; c + kVectors * kLanes<A> <= C; c += kVectors * kLanes<A>)
      columns(c, std::integral_constant<int, kVectors>{});
    for (; c < C; c += kLanes<A>) columns(c, std::integral_constant<int, 1>{});
  });
}

// dweight[m,c] = sum over n of by_m[n,m] * by_c[n,c].
template <class A>
void weight_gradient(const SqueezeExciteProblem& p, const A* by_m, const A* by_c, void* dweight) {
  if (!dweight) return;
  parallel_for((p.M + kTogether - 1) / kTogether, kTogether * p.N * p.C, [&](int64_t i) {
    const int64_t m = i * kTogether;
    combine(std::min<int64_t>(kTogether, p.M - m), by_c, p.N, p.C, Factors<A>{by_m + m, 1, p.M},
            static_cast<const A*>(nullptr), static_cast<A*>(dweight) + m * p.C);
  });
}
template <class A>
void bias_gradient(int64_t N, int64_t size, const A* gradient, void* dbias) {
  if (!dbias) return;
  const A one = 1;
  combine(1, gradient, N, size, Factors<A>{&one, 0, 0}, static_cast<const A*>(nullptr), static_cast<A*>(dbias));
}

template <class V>
V gated(Gate gate, V z) {
  return gate == Gate::kSigmoid ? logistic(z) : activate<Activation::kRelu6>(z + 3) / 6;
}
template <class V>
V gate_gradient(Gate gate, V dscale, V scale) {
  if (gate == Gate::kSigmoid) return dscale * (1 - scale) * scale;
  const V above = scale > 0 ? dscale / 6 : V{};
  return scale < 1 ? above : V{};
}

template <class T>
void forward(const SqueezeExciteProblem& p, const SqueezeExciteForward& args) {
  using A = Acc<T>;
  const Slices slices(p);
  const int64_t C = p.C, M = p.M;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const A *weight1 = static_cast<const A*>(args.weight1), *bias1 = static_cast<const A*>(args.bias1);
  const A *weight2 = static_cast<const A*>(args.weight2), *bias2 = static_cast<const A*>(args.bias2);
  A *pooled = static_cast<A*>(args.pooled), *hidden = static_cast<A*>(args.hidden),
    *scale = static_cast<A*>(args.scale);
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(p.N * slices.rows() * C)]());
  const std::unique_ptr<A[]> activated(new A[static_cast<size_t>(p.N * M)]);

  const auto sweep = [&](int64_t n, int64_t s) {
    sum_slice<T>(slices, n, s, sums.get() + n * slices.rows() * C,
                 [&]<class W>(W, int64_t i) { return read<W>(x + i); });
  };
  const auto between = [&](int64_t n, int64_t images) {
    for (int64_t i = n; i < n + images; ++i)
      gather_sums(slices, sums.get() + i * slices.rows() * C, p.L, pooled + i * C);
    dots(images, weight1, M, C, pooled + n * C, hidden + n * M);
    for (int64_t k = n * M; k < (n + images) * M; ++k) {
      if (bias1) hidden[k] += bias1[k % M];
      activated[k] = activate(p.activation, hidden[k]);
    }
    combine(images, weight2, M, C, Factors<A>{activated.get() + n * M, M, 1}, bias2, scale + n * C);
    for (int64_t k = n * C; k < (n + images) * C; k += kLanes<A>)
      store_to(scale, k, (n + images) * C, gated(p.gate, load_from(scale, k, (n + images) * C)));
  };
  const auto finish = [&](int64_t n, int64_t s) {
    slices.for_parts(n, s, p.L, [&](const Part& part) {
      for_part<T>(slices.lines, part, [&]<class W>(W, int64_t i, const auto& param, int64_t) {
        write<W>(y + i, read<W>(x + i) * param(scale + n * C));
      });
    });
  };
  for_images(p, slices, sweep, between, finish);
}

template <class T>
void backward(const SqueezeExciteProblem& p, const SqueezeExciteBackward& args) {
  using A = Acc<T>;
  const Slices slices(p);
  const int64_t N = p.N, C = p.C, M = p.M;
  const T *dy = static_cast<const T*>(args.dy), *x = static_cast<const T*>(args.x);
  const A *weight1 = static_cast<const A*>(args.weight1), *weight2 = static_cast<const A*>(args.weight2);
  const A *pooled = static_cast<const A*>(args.pooled), *hidden = static_cast<const A*>(args.hidden);
  const A* scale = static_cast<const A*>(args.scale);
  T* dx = static_cast<T*>(args.dx);
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(N * slices.rows() * C)]());
  const std::unique_ptr<A[]> scratch(new A[static_cast<size_t>(2 * N * (C + M))]);
  A *dgated = scratch.get(), *dpooled = dgated + N * C, *dhidden = dpooled + N * C, *activated = dhidden + N * M;
  const bool need_dhidden = dx || args.dweight1 || args.dbias1;

  const auto sweep = [&](int64_t n, int64_t s) {
    sum_slice<T>(slices, n, s, sums.get() + n * slices.rows() * C,
                 [&]<class W>(W, int64_t i) { return read<W>(dy + i) * read<W>(x + i); });
  };
  const auto between = [&](int64_t n, int64_t images) {
    for (int64_t i = n; i < n + images; ++i) gather_sums(slices, sums.get() + i * slices.rows() * C, 1, dgated + i * C);
    const int64_t end = (n + images) * C;
    for (int64_t k = n * C; k < end; k += kLanes<A>)
      store_to(dgated, k, end, gate_gradient(p.gate, load_from(dgated, k, end), load_from(scale, k, end)));
    if (need_dhidden) dots(images, weight2, M, C, dgated + n * C, dhidden + n * M);
    for_activation(p.activation, [&](auto act) {
      for (int64_t k = n * M; k < (n + images) * M; ++k) {
        activated[k] = activate<act.value>(hidden[k]);
        const A saved = gradient_reads_input(act.value) ? hidden[k] : activated[k];
        if (need_dhidden) dhidden[k] = activation_gradient<act.value>(dhidden[k], saved);
      }
    });
    if (!dx) return;
    combine(images, weight1, M, C, Factors<A>{dhidden + n * M, M, 1}, static_cast<const A*>(nullptr), dpooled + n * C);
    for (int64_t k = n * C; k < end; ++k) dpooled[k] /= static_cast<A>(p.L);
  };
  const auto finish = [&](int64_t n, int64_t s) {
    if (!dx) return;
    slices.for_parts(n, s, p.L, [&](const Part& part) {
      for_part<T>(slices.lines, part, [&]<class W>(W, int64_t i, const auto& param, int64_t) {
        write<W>(dx + i, read<W>(dy + i) * param(scale + n * C) + param(dpooled + n * C));
      });
    });
  };
  for_images(p, slices, sweep, between, finish);
  weight_gradient<A>(p, dhidden, pooled, args.dweight1);
  weight_gradient<A>(p, activated, dgated, args.dweight2);
  bias_gradient<A>(N, M, dhidden, args.dbias1);
  bias_gradient<A>(N, C, dgated, args.dbias2);
}

}  // namespace

void squeeze_excite_forward(const SqueezeExciteProblem& problem, const SqueezeExciteForward& args, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) { forward<T>(problem, args); });
}

void squeeze_excite_backward(const SqueezeExciteProblem& problem, const SqueezeExciteBackward& args, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) { backward<T>(problem, args); });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
