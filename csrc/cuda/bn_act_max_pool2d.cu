// Batch norm, an activation and a maximum over windows, NHWC: the stem of an ImageNet network.
//
//   y[n,p,q,c]  = max over (r,s) of a[n, p*stride_h - pad_h + r*dilation_h, q*.. + s*dilation_w, c]
//   a           = activation((x - mean) * rstd * weight + bias), rounded to x's type as batch_norm_act rounds it
//   da[n,h,w,c] = sum over the windows (p,q) whose kept tap is (h,w) of dy[n,p,q,c], rounded as max_pool2d rounds it
//   dx, dweight and dbias are batch norm's, of da.
//
// Layout     x, dx [N,H,W,C]; y, dy and the offsets r * S + s of the kept taps [N,P,Q,C]; everything else [C].
// Ownership  Blocks own slices of the positions of some channels, as batch norm's do: forward, of y's, backward of x's.
//            A thread keeps to its channels. It computes a at the taps of its windows, and gathers da from the windows
//            over its positions, so that there are no atomics and neither a nor da is written to memory.
// Traffic    forward: x for the statistics, then x + y (+ offsets); backward: x, dy and offsets for the sums, then the
//            same + dx. Windows overlap: what several read of x, dy and offsets comes from cache but for the first.

#include "activation.cuh"
#include "batch_norm.cuh"
#include "batch_norm.h"
#include "dtype.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kMappingBlocks = 8;  // for each multiprocessor, of sweeps that sum nothing up

// A half-open range along one axis; empty where end <= begin.
struct Span {
  int64_t begin, end;
};

// One axis of a sliding window.
struct Axis {
  int64_t in, out, kernel, stride, pad, dilation;

  __device__ int64_t first(int64_t p) const { return p * stride - pad; }

  // The taps of output `p` that lie inside the input.
  __device__ Span taps_of(int64_t p) const {
    const int64_t h = first(p), room = in - 1 - h;
    const int64_t begin = h >= 0 ? 0 : split(-h + dilation - 1, dilation).quotient;
    if (room < 0) return {begin, begin};
    return {begin, room >= (kernel - 1) * dilation ? kernel : split(room, dilation).quotient + 1};
  }

  // The outputs whose window spans input `h`; dilation may make a window skip it.
  __device__ Span windows_over(int64_t h) const {
    const int64_t last = split(h + pad, stride).quotient, end = last + 1 < out ? last + 1 : out;
    int64_t begin = end;
    while (begin > 0 && first(begin - 1) + (kernel - 1) * dilation >= h) --begin;
    return {begin, end};
  }

  // The tap by which output `p`, one of windows_over(h), sees input `h`; -1 where it skips it.
  __device__ int tap_of(int64_t p, int64_t h) const {
    const int64_t distance = h - first(p);
    if (dilation == 1) return static_cast<int>(distance);
    const Split tap = split(distance, dilation);
    return tap.remainder ? -1 : static_cast<int>(tap.quotient);
  }
};

struct Window {
  int64_t C;
  Axis rows, cols;

  explicit Window(const Pool2dProblem& p)
      : C(p.C),
        rows{p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h},
        cols{p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w} {}
};

// Line `line` of [N,height,width].
struct Place {
  int64_t n, row, col;

  __device__ Place(int64_t line, int64_t height, int64_t width) {
    const Split by_col = split(line, width), by_row = split(by_col.quotient, height);
    n = by_row.quotient, row = by_row.remainder, col = by_col.remainder;
  }
};

// Offsets of kWidth channels, in as few pieces as their type allows.
template <int kWidth>
__device__ __forceinline__ void load_offsets(const int32_t* from, int (&taps)[kWidth]) {
  if constexpr (kWidth == 1) {
    taps[0] = *from;
  } else {
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; k += 4) {
      const Vector<int32_t> four = load(from + k, 4);
      CNNOPS_UNROLL
      for (int i = 0; i < 4; ++i) taps[k + i] = four.at[i];
    }
  }
}
template <int kWidth>
__device__ __forceinline__ void store_offsets(const int (&taps)[kWidth], int32_t* to) {
  if constexpr (kWidth == 1) {
    *to = taps[0];
  } else {
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; k += 4)
      store(Vector<int32_t>{{taps[k], taps[k + 1], taps[k + 2], taps[k + 3]}}, to + k, 4);
  }
}
template <int kWidth>
using PackedBytes = std::conditional_t<kWidth == 8, uint64_t, std::conditional_t<kWidth == 4, uint32_t, uint8_t>>;
template <int kWidth>
__device__ __forceinline__ void load_offsets(const uint8_t* from, int (&taps)[kWidth]) {
  const auto packed = *reinterpret_cast<const PackedBytes<kWidth>*>(from);
  CNNOPS_UNROLL
  for (int k = 0; k < kWidth; ++k) taps[k] = static_cast<int>(packed >> 8 * k & 0xff);
}
template <int kWidth>
__device__ __forceinline__ void store_offsets(const int (&taps)[kWidth], uint8_t* to) {
  uint64_t packed = 0;
  CNNOPS_UNROLL
  for (int k = 0; k < kWidth; ++k) packed |= static_cast<uint64_t>(taps[k]) << 8 * k;
  *reinterpret_cast<PackedBytes<kWidth>*>(to) = static_cast<PackedBytes<kWidth>>(packed);
}

// The channel arrays; weight and bias may be null.
struct Parameters {
  const float *mean, *rstd, *weight, *bias;

  // The maps of a thread's channels.
  template <int kWidth>
  __device__ __forceinline__ void load_maps(const Sweep& s, const SweepPart& part, BatchNormMap (&maps)[kWidth]) const {
    float means[kWidth], rstds[kWidth], weights[kWidth], biases[kWidth];
    load_channels(s, part, mean, 0, means);
    load_channels(s, part, rstd, 0, rstds);
    load_channels(s, part, weight, 1, weights);
    load_channels(s, part, bias, 0, biases);
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) maps[k] = {means[k], rstds[k] * weights[k], biases[k]};
  }
};

// A window without a tap inside the input gives -inf and the offset 0. A NaN always replaces what is kept, and nothing
// replaces a NaN but another; a tie replaces nothing. offsets may be null.
template <class T, class O, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    bn_act_max_pool2d_forward_kernel(Sweep s, Window window, Activation activation, Parameters parameters, const T* x,
                                     T* y, O* offsets) {
  SweepPart part(s);
  if (part.left == 0) return;
  BatchNormMap maps[kWidth];
  parameters.load_maps(s, part, maps);
  const int width = static_cast<int>(window.cols.kernel);
  with_activation(activation, [&](auto activate) {
    while (part.left > 0) {
      const Place out(part.in_run, window.rows.out, window.cols.out);
      const int64_t to = part.next(s);
      const Span r_span = window.rows.taps_of(out.row), s_span = window.cols.taps_of(out.col);
      const bool any = r_span.begin < r_span.end && s_span.begin < s_span.end;
      const int first_tap = any ? static_cast<int>(r_span.begin) * width + static_cast<int>(s_span.begin) : 0;
      float best[kWidth];
      int kept[kWidth];
      CNNOPS_UNROLL
      for (int k = 0; k < kWidth; ++k) best[k] = -INFINITY, kept[k] = first_tap;
      for (int64_t r = r_span.begin; r < r_span.end; ++r) {
        const int64_t row = out.n * window.rows.in + window.rows.first(out.row) + r * window.rows.dilation;
        for (int64_t s = s_span.begin; s < s_span.end; ++s) {
          const int64_t col = window.cols.first(out.col) + s * window.cols.dilation;
          const Vector<T> values = load(x + (row * window.cols.in + col) * window.C + part.channel, kWidth);
          const int tap = static_cast<int>(r) * width + static_cast<int>(s);
          CNNOPS_UNROLL
          for (int k = 0; k < kWidth; ++k) {
            T rounded;
            from_float(activate(maps[k](to_float(values.at[k]))), rounded);
            const float a = to_float(rounded);
            const bool wins = a > best[k] || a != a;
            best[k] = wins ? a : best[k];
            kept[k] = wins ? tap : kept[k];
          }
        }
      }
      Vector<T> found = {};
      CNNOPS_UNROLL
      for (int k = 0; k < kWidth; ++k) from_float(best[k], found.at[k]);
      store(found, y + to, kWidth);
      if (offsets) store_offsets(kept, offsets + to);
    }
  });
}

// What dz is made of.
template <class T, class O>
struct Gradient {
  Window window;
  Activation activation;
  const T *dy, *x;
  const O* offsets;

  // da at channels from c on of a line of x.
  template <int kWidth>
  __device__ __forceinline__ void gather(int64_t line, int64_t c, float (&da)[kWidth]) const {
    const Axis &rows = window.rows, &cols = window.cols;
    const Place in(line, rows.in, cols.in);
    const Span over_row = rows.windows_over(in.row), over_col = cols.windows_over(in.col);
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k) da[k] = 0;
    for (int64_t p = over_row.begin; p < over_row.end; ++p) {
      const int r = rows.tap_of(p, in.row);
      if (r < 0) continue;
      for (int64_t q = over_col.begin; q < over_col.end; ++q) {
        const int s = cols.tap_of(q, in.col);
        if (s < 0) continue;
        const int tap = r * static_cast<int>(cols.kernel) + s;
        const int64_t at = ((in.n * rows.out + p) * cols.out + q) * window.C + c;
        const Vector<T> values = load(dy + at, kWidth);
        int kept[kWidth];
        load_offsets(offsets + at, kept);
        CNNOPS_UNROLL
        for (int k = 0; k < kWidth; ++k) da[k] += kept[k] == tap ? to_float(values.at[k]) : 0;
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
        Vector<T> values = {};
        if (need_x || activation != Activation::kNone) values = load(x + at, kWidth);
        float dz[kWidth], value[kWidth];
        gather(line, part.channel, dz);
        CNNOPS_UNROLL
        for (int k = 0; k < kWidth; ++k) {
          value[k] = to_float(values.at[k]);
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
    bn_act_max_pool2d_sums_kernel(Sweep s, Parameters parameters, Gradient<T, O> from, float* partial) {
  const SweepPart part(s);
  GradientSums mine[kWidth];
  if (part.left > 0) {
    BatchNormMap maps[kWidth];
    parameters.load_maps(s, part, maps);
    from.for_pieces_of(s, part, true, maps, [&](int64_t, const float (&dz)[kWidth], const float (&x)[kWidth]) {
      CNNOPS_UNROLL
      for (int k = 0; k < kWidth; ++k) {
        mine[k].dz += dz[k];
        mine[k].product += dz[k] == 0 ? 0 : dz[k] * (x[k] - maps[k].mean);
      }
    });
  }
  const int64_t channels = from.window.C;
  merge_block(s, part, mine, [&](int64_t c, const GradientSums& all) {
    float* const to = partial + part.slice * 2 * channels + c;
    to[0] = all.dz;
    to[channels] = all.product;
  });
}

// shares: null where statistics are fixed.
template <class T, class O, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, 2)
    bn_act_max_pool2d_backward_kernel(Sweep s, Parameters parameters, Gradient<T, O> from, const float* shares, T* dx) {
  const SweepPart part(s);
  if (part.left == 0) return;
  BatchNormMap maps[kWidth];
  parameters.load_maps(s, part, maps);
  float dz_shares[kWidth], x_shares[kWidth];
  load_channels(s, part, shares, 0, dz_shares);
  load_channels(s, part, shares ? shares + from.window.C : nullptr, 0, x_shares);
  from.for_pieces_of(s, part, shares, maps, [&](int64_t at, const float (&dz)[kWidth], const float (&x)[kWidth]) {
    Vector<T> out = {};
    CNNOPS_UNROLL
    for (int k = 0; k < kWidth; ++k)
      from_float(shares ? BatchNormShares{dz_shares[k], x_shares[k]}.dx(maps[k], dz[k], x[k]) : dz[k] * maps[k].scale,
                 out.at[k]);
    store(out, dx + at, kWidth);
  });
}

// Over [lines,C], by about so many blocks for each multiprocessor.
Sweep sweep_lines(const NormProblem& norm, int64_t lines, int64_t blocks_each) {
  NormProblem flat = norm;
  flat.N = lines;
  flat.L = 1;
  return make_sweep(flat, blocks_each * device().multiprocessors);
}

Sweep summing_sweep(const NormProblem& norm) { return sweep_lines(norm, norm.N * norm.L, kSummingBlocks); }

// shares[2][C], and sums[slice][2][C] from a place aligned to 256 bytes on.
int64_t shares_bytes(const NormProblem& norm) { return ceil_div(2 * norm.C * int64_t{sizeof(float)}, 256) * 256; }

template <class Args>
Parameters parameters_of(const Args& args) {
  return {static_cast<const float*>(args.mean), static_cast<const float*>(args.rstd),
          static_cast<const float*>(args.weight), static_cast<const float*>(args.bias)};
}

// f(T{}, O{}) for the types of x and of the offsets.
template <class F>
void for_types(const Pool2dProblem& pool, F&& f) {
  for_dtype(pool.dtype, [&]<class T>(T type) {
    if (int64_t{pool.R} * pool.S <= 256)
      f(type, uint8_t{});
    else
      f(type, int32_t{});
  });
}

template <class T, class O>
void forward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormForward& args, void* kept,
             Stream stream) {
  const Sweep s = sweep_lines(norm, int64_t{pool.N} * pool.P * pool.Q, kMappingBlocks);
  const Window window(pool);
  const Parameters parameters = parameters_of(args);
  const auto* const x = static_cast<const T*>(args.x);
  auto* const y = static_cast<T*>(args.y);
  auto* const offsets = static_cast<O*>(kept);
  constexpr auto whole = bn_act_max_pool2d_forward_kernel<T, O, kVector<T>>;
  constexpr auto single = bn_act_max_pool2d_forward_kernel<T, O, 1>;
  if (s.width > 1)
    CNNOPS_LAUNCH(whole, blocks(s.blocks()), kSweepThreads, 0, stream, s, window, norm.activation, parameters, x, y,
                  offsets);
  else
    CNNOPS_LAUNCH(single, blocks(s.blocks()), kSweepThreads, 0, stream, s, window, norm.activation, parameters, x, y,
                  offsets);
}

template <class T, class O>
void backward(const NormProblem& norm, const Pool2dProblem& pool, const BatchNormBackward& args, const void* offsets,
              Stream stream) {
  const Gradient<T, O> from{Window(pool), norm.activation, static_cast<const T*>(args.dy),
                            static_cast<const T*>(args.x), static_cast<const O*>(offsets)};
  const Parameters parameters = parameters_of(args);
  auto* const shares = static_cast<float*>(args.workspace);
  if (args.dweight || args.dbias || (norm.training && args.dx)) {
    auto* const sums = shares + shares_bytes(norm) / static_cast<int64_t>(sizeof(float));
    const Sweep s = summing_sweep(norm);
    constexpr auto whole = bn_act_max_pool2d_sums_kernel<T, O, kVector<T>>;
    constexpr auto single = bn_act_max_pool2d_sums_kernel<T, O, 1>;
    if (s.width > 1)
      CNNOPS_LAUNCH(whole, blocks(s.blocks()), kSweepThreads, 0, stream, s, parameters, from, sums);
    else
      CNNOPS_LAUNCH(single, blocks(s.blocks()), kSweepThreads, 0, stream, s, parameters, from, sums);
    finish_batch_norm_gradients(norm, args, s.slices, sums, shares, stream);
  }
  if (!args.dx) return;
  const Sweep s = sweep_lines(norm, norm.N * norm.L, kMappingBlocks);
  const float* const taken = norm.training ? shares : nullptr;
  auto* const dx = static_cast<T*>(args.dx);
  constexpr auto whole = bn_act_max_pool2d_backward_kernel<T, O, kVector<T>>;
  constexpr auto single = bn_act_max_pool2d_backward_kernel<T, O, 1>;
  if (s.width > 1)
    CNNOPS_LAUNCH(whole, blocks(s.blocks()), kSweepThreads, 0, stream, s, parameters, from, taken, dx);
  else
    CNNOPS_LAUNCH(single, blocks(s.blocks()), kSweepThreads, 0, stream, s, parameters, from, taken, dx);
}

}  // namespace

int64_t bn_act_max_pool2d_forward_workspace(const NormProblem& norm, const Pool2dProblem&) {
  return batch_norm_statistics_workspace(norm);
}

int64_t bn_act_max_pool2d_backward_workspace(const NormProblem& norm, const Pool2dProblem&) {
  return shares_bytes(norm) + summing_sweep(norm).slices * 2 * norm.C * int64_t{sizeof(float)};
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
