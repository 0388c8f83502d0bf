// Batch norm, an activation and a maximum over windows, NHWC: the stem of an ImageNet network.
//
//   y[n,p,q,c]  = max over (r,s) of a[n, p*stride_h - pad_h + r*dilation_h, q*.. + s*dilation_w, c]
//   a           = activation((x - mean) * rstd * weight + bias), rounded to x's type as batch_norm_act rounds it
//   da[n,h,w,c] = sum over the windows (p,q) whose kept tap is (h,w) of dy[n,p,q,c], rounded as max_pool2d rounds it
//   dx, dweight and dbias are batch norm's, of da.
//
// Layout     x, dx [N,H,W,C]; y, dy and the offsets r * S + s of the kept taps [N,P,Q,C]; everything else [C].
// Tile       forward: a thread has up to 16 bytes of channels c deep; columns w ->
//                        +- x: what the windows read, in place ---------------+
//            rows h    | | [window m: R x S]        a, maximum and tap:       |  a block: `columns` threads, up to 32,
//                      v |        [window m + 1] ..          registers        |  along c, 256 / columns along (n,p,q)
//                        +- halo: columns of both, rows of others: L1 --------+
//            backward: (n,h,w) instead, da from the windows over it: registers; sums are split into slices.
// Ownership  Blocks own slices of the positions of some channels, as batch norm's do: forward, of y's, backward of x's.
//            A thread keeps to its channels. It computes a at the taps of its windows, and gathers da from the windows
//            over its positions, so that there are no atomics and neither a nor da is written to memory.
// Traffic    forward: x for the statistics, then x + y (+ offsets); backward: x, dy and offsets for the sums, then the
//            same + dx. Windows overlap: what several read of x, dy and offsets comes from cache but for the first.

#include <algorithm>

#include "batch_norm.h"
#include "batch_norm_parts.cuh"
#include "launchers.h"
#include "pool2d_window.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kMappingBlocks = 8;  // for each multiprocessor, of sweeps that sum nothing up

// Line `line` of [N,height,width].
struct Place {
  int64_t n;
  int row, col;

  __device__ Place(int64_t line, int height, int width) {
    const Split by_col = divided(line, width), by_row = divided(by_col.quotient, height);
    n = by_row.quotient, row = static_cast<int>(by_row.remainder), col = static_cast<int>(by_col.remainder);
  }
};

// Channels of a thread: as many as 16 bytes of x or of offsets hold, so that both are moved by whole sectors.
template <class T, class O>
constexpr int kChannels = 16 / std::max<int>(sizeof(T), sizeof(O));

// A window without a tap inside the input gives -inf and the offset 0. A NaN always replaces what is kept, and nothing
// replaces a NaN but another; a tie replaces nothing. offsets may be null.
template <class T, class O, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    bn_act_max_pool2d_forward_kernel(Sweep s, Pool pool, Activation activation, Parameters parameters, const T* x, T* y,
                                     O* offsets) {
  SweepPart part(s);
  if (part.left == 0) return;
  BatchNormMap maps[kWidth];
  load_maps(s, part, parameters, maps);
  with_activation(activation, [&](auto activate) {
    while (part.left > 0) {
      const Place out(part.in_run, pool.rows.out, pool.cols.out);
      const int64_t to = part.next(s);
      const Window rows = pool.rows.window(out.row), cols = pool.cols.window(out.col);
      float best[kWidth];
      int kept[kWidth];
      CNNOPS_UNROLL
      for (int k = 0; k < kWidth; ++k) best[k] = -INFINITY, kept[k] = first_tap(rows, cols);
      for (int r = rows.inside.begin; r < rows.inside.end; ++r) {
        const int64_t row = out.n * pool.rows.in + rows.first + int64_t{r} * pool.rows.dilation;
        for (int s = cols.inside.begin; s < cols.inside.end; ++s) {
          const int64_t col = cols.first + int64_t{s} * pool.cols.dilation;
          const Raw<T, kWidth> values = fetch<kWidth>(x + (row * pool.cols.in + col) * pool.C + part.channel);
          const int tap = r * cols.taps + s;
          CNNOPS_UNROLL
          for (int k = 0; k < kWidth; ++k) {
            T rounded;
            from_float(activate(maps[k](number<kWidth, T>(values, k))), rounded);
            const float a = to_float(rounded);
            const bool wins = a > best[k] || a != a;
            best[k] = wins ? a : best[k];
            kept[k] = wins ? tap : kept[k];
          }
        }
      }
      write_numbers(best, y + to);
      if (offsets) store_taps(kept, offsets + to);
    }
  });
}

// What dz is made of.
template <class T, class O>
struct PoolGradient {
  Pool pool;
  Activation activation;
  const T *dy, *x;
  const O* offsets;

  // da at channels from c on of a line of x.
  template <int kWidth>
  __device__ __forceinline__ void gather(int64_t line, int64_t c, float (&da)[kWidth]) const {
    const PoolAxis &rows = pool.rows, &cols = pool.cols;
    const Place in(line, rows.in, cols.in);
    const Span over_row = rows.windows_over(in.row), over_col = cols.windows_over(in.col);
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) da[k] = 0;
    for (int p = over_row.begin; p < over_row.end; ++p) {
      const int r = rows.tap_of(p, in.row);
      if (r < 0) continue;
      for (int q = over_col.begin; q < over_col.end; ++q) {
        const int s = cols.tap_of(q, in.col);
        if (s < 0) continue;
        const int tap = r * cols.kernel + s;
        const int64_t at = ((in.n * rows.out + p) * cols.out + q) * pool.C + c;
        const Raw<T, kWidth> values = fetch<kWidth>(dy + at);
        int kept[kWidth];
        load_taps(offsets + at, kept);
        CNNOPS_UNROLL
        for (int k = 0; k < kWidth; ++k) da[k] += kept[k] == tap ? number<kWidth, T>(values, k) : 0;
      }
    }
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      T rounded;
      from_float(da[k], rounded);
      da[k] = to_float(rounded);
    }
  }

  // f(offset, dz, x) for each piece of a part of x, x being zero unless it is needed.
  template <int kWidth, class F>
  __device__ __forceinline__ void for_pieces_of(const Sweep& s, SweepPart part, bool need_x,
                                                const BatchNormMap (&maps)[kWidth], F&& f) const {
    with_gradient(activation, [&](auto gradient) {
      while (part.left > 0) {
        const int64_t line = part.in_run, at = part.next(s);
        Raw<T, kWidth> values = {};
        if (need_x || activation != Activation::kNone) values = fetch<kWidth>(x + at);
        float dz[kWidth], value[kWidth];
        gather(line, part.channel, dz);
        CNNOPS_UNROLL
        for (int k = 0; k < kWidth; ++k) {
          value[k] = number<kWidth, T>(values, k);
          dz[k] = gradient(dz[k], saved_for_gradient(activation, maps[k](value[k])));
        }
        f(at, dz, value);
      }
    });
  }
};

// partial[slice][dz, dz * (x - mean)][C]. Where there is no gradient, an infinite x adds nothing.
template <class T, class O, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    bn_act_max_pool2d_sums_kernel(Sweep s, Parameters parameters, PoolGradient<T, O> from, float* partial) {
  const SweepPart part(s);
  GradientSums mine[kWidth];
  if (part.left > 0) {
    BatchNormMap maps[kWidth];
    load_maps(s, part, parameters, maps);
    from.for_pieces_of(s, part, true, maps, [&](int64_t, const float (&dz)[kWidth], const float (&x)[kWidth]) {
      CNNOPS_UNROLL
      for (int k = 0; k < kWidth; ++k) {
        mine[k].dz += dz[k];
        mine[k].product += dz[k] == 0 ? 0 : dz[k] * (x[k] - maps[k].mean);
      }
    });
  }
  const int64_t channels = from.pool.C;
  merge_block(s, part, mine, [&](int64_t c, const GradientSums& all) {
    float* const to = partial + part.slice * 2 * channels + c;
    to[0] = all.dz;
    to[channels] = all.product;
  });
}

// shares: null where statistics are fixed.
template <class T, class O, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    bn_act_max_pool2d_backward_kernel(Sweep s, Parameters parameters, PoolGradient<T, O> from, const float* shares,
                                      T* dx) {
  const SweepPart part(s);
  if (part.left == 0) return;
  BatchNormMap maps[kWidth];
  load_maps(s, part, parameters, maps);
  BatchNormShares taken[kWidth];
  load_shares(s, part, from.pool.C, shares, taken);
  from.for_pieces_of(s, part, shares, maps, [&](int64_t at, const float (&dz)[kWidth], const float (&x)[kWidth]) {
    float out[kWidth];
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) out[k] = shares ? taken[k].dx(maps[k], dz[k], x[k]) : dz[k] * maps[k].scale;
    write_numbers(out, dx + at);
  });
}

// Over [lines,C], by about so many blocks for each multiprocessor.
template <class T, class O>
Sweep sweep_lines(const NormProblem& norm, int64_t lines, int64_t blocks_each) {
  NormProblem flat = norm;
  flat.N = lines;
  flat.L = 1;
  return make_sweep(flat, blocks_each * device().multiprocessors, kChannels<T, O>);
}

// shares[2][C], and sums[slice][2][C] from a place aligned to 256 bytes on.
int64_t shares_bytes(const NormProblem& norm) { return ceil_div(2 * norm.C * int64_t{sizeof(float)}, 256) * 256; }

// f(T{}, O{}) for the types of x and of the offsets.
template <class F>
void for_types(const Pool2dProblem& pool, F&& f) {
  for_dtype(pool.dtype, [&]<class T>(T type) { for_offset(pool, [&]<class O>(O offset) { f(type, offset); }); });
}

// f(std::integral_constant<int, kWidth>{}) for a sweep's kernels.
template <class T, class O, class F>
void for_width(const Sweep& s, F&& f) {
  if (s.width > 1)
    f(std::integral_constant<int, kChannels<T, O>>{});
  else
    f(std::integral_constant<int, 1>{});
}

template <class T, class O>
void forward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormForward& args, void* kept,
             Stream stream) {
  const Sweep s = sweep_lines<T, O>(norm, int64_t{pool.N} * pool.P * pool.Q, kMappingBlocks);
  const Pool windows(pool);
  const Parameters parameters = parameters_of(args);
  const auto* const x = static_cast<const T*>(args.x);
  auto* const y = static_cast<T*>(args.y);
  auto* const offsets = static_cast<O*>(kept);
  for_width<T, O>(s, [&]<int kWidth>(std::integral_constant<int, kWidth>) {
    constexpr auto kernel = bn_act_max_pool2d_forward_kernel<T, O, kWidth>;
    CNNOPS_LAUNCH(kernel, blocks(s.blocks()), kSweepThreads, 0, stream, s, windows, norm.activation, parameters, x, y,
                  offsets);
  });
}

template <class T, class O>
void backward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormBackward& args, const void* offsets,
              Stream stream) {
  const PoolGradient<T, O> from{Pool(pool), norm.activation, static_cast<const T*>(args.dy),
                                static_cast<const T*>(args.x), static_cast<const O*>(offsets)};
  const Parameters parameters = parameters_of(args);
  auto* const shares = static_cast<float*>(args.workspace);
  if (args.dweight || args.dbias || (norm.training && args.dx)) {
    auto* const sums = shares + shares_bytes(norm) / static_cast<int64_t>(sizeof(float));
    const Sweep s = sweep_lines<T, O>(norm, norm.N * norm.L, kSummingBlocks);
    for_width<T, O>(s, [&]<int kWidth>(std::integral_constant<int, kWidth>) {
      constexpr auto kernel = bn_act_max_pool2d_sums_kernel<T, O, kWidth>;
      CNNOPS_LAUNCH(kernel, blocks(s.blocks()), kSweepThreads, 0, stream, s, parameters, from, sums);
    });
    finish_batch_norm_gradients(norm, args, s.slices, sums, shares, stream);
  }
  if (!args.dx) return;
  const Sweep s = sweep_lines<T, O>(norm, norm.N * norm.L, kMappingBlocks);
  const float* const taken = norm.training ? shares : nullptr;
  auto* const dx = static_cast<T*>(args.dx);
  for_width<T, O>(s, [&]<int kWidth>(std::integral_constant<int, kWidth>) {
    constexpr auto kernel = bn_act_max_pool2d_backward_kernel<T, O, kWidth>;
    CNNOPS_LAUNCH(kernel, blocks(s.blocks()), kSweepThreads, 0, stream, s, parameters, from, taken, dx);
  });
}

}  // namespace

int64_t bn_act_max_pool2d_forward_workspace(const NormProblem& norm, const Pool2dProblem&) {
  return batch_norm_statistics_workspace(norm);
}

int64_t bn_act_max_pool2d_backward_workspace(const NormProblem& norm, const Pool2dProblem& pool) {
  int64_t slices = 0;
  for_types(pool,
            [&]<class T, class O>(T, O) { slices = sweep_lines<T, O>(norm, norm.N * norm.L, kSummingBlocks).slices; });
  return shares_bytes(norm) + slices * 2 * norm.C * int64_t{sizeof(float)};
}

void bn_act_max_pool2d_forward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormForward& args,
                               void* offsets, Stream stream) {
  batch_norm_statistics(norm, args, stream);
  for_types(pool, [&]<class T, class O>(T, O) { forward<T, O>(norm, pool, args, offsets, stream); });
}

void bn_act_max_pool2d_backward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormBackward& args,
                                const void* offsets, Stream stream) {
  for_types(pool, [&]<class T, class O>(T, O) { backward<T, O>(norm, pool, args, offsets, stream); });
}

}  // namespace cnnops::cuda
