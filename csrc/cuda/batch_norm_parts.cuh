// What one block does of each sweep of batch norm and between them, in the pieces of batch_norm.cuh: the kernels that
// sweep once, in batch_norm.cu and batch_norm_sums.cu, and those that do all in one launch, in batch_norm_resident.cu,
// are made of it, so that they have the same results, bit for bit.
#pragma once

#include <cmath>

#include "activation.cuh"
#include "batch_norm.cuh"
#include "batch_norm_planes.cuh"
#include "dtype.h"

namespace cnnops::cuda {

constexpr int kMomentsAhead = 4, kGradientAhead = 2;
constexpr int kMomentsBlocks = 3;  // that a multiprocessor holds, and all of them run at once
constexpr int kMergeThreads = kMergeChannels * kMergeShares;

// The channel arrays that both directions read; weight and bias may be null.
struct Parameters {
  const float *mean, *rstd, *weight, *bias;

  __device__ BatchNormMap map(int64_t c) const { return batch_norm_map(c, mean, rstd, weight, bias); }
};

// The maps of a thread's elements.
template <int kWidth>
__device__ __forceinline__ void load_maps(const Sweep& s, const SweepPart& part, const Parameters& p,
                                          BatchNormMap (&maps)[kWidth]) {
  float mean[kWidth], rstd[kWidth], weight[kWidth], bias[kWidth];
  load_channels(s, part, p.mean, 0, mean);
  load_channels(s, part, p.rstd, 0, rstd);
  load_channels(s, part, p.weight, 1, weight);
  load_channels(s, part, p.bias, 0, bias);
  CNNOPS_UNROLL
  for (int i = 0; i < kWidth; ++i) maps[i] = {mean[i], rstd[i] * weight[i], bias[i]};
}
template <int kWidth>
__device__ __forceinline__ void load_maps(const Sweep& s, const StretchPiece& piece, const Parameters& p,
                                          BatchNormMap (&maps)[kWidth]) {
  for_channels<kWidth>(
      s, piece, [&](int64_t c) { return p.map(c); }, [&](int i, const BatchNormMap& map) { maps[i] = map; });
}

// What training takes from dz at each of them: nothing where shares are null.
template <int kWidth>
__device__ __forceinline__ void load_shares(const Sweep& s, const SweepPart& part, int64_t channels,
                                            const float* shares, BatchNormShares (&taken)[kWidth]) {
  float dz[kWidth], x[kWidth];
  load_channels(s, part, shares, 0, dz);
  load_channels(s, part, shares ? shares + channels : nullptr, 0, x);
  CNNOPS_UNROLL
  for (int i = 0; i < kWidth; ++i) taken[i] = {dz[i], x[i]};
}
template <int kWidth>
__device__ __forceinline__ void load_shares(const Sweep& s, const StretchPiece& piece, int64_t channels,
                                            const float* shares, BatchNormShares (&taken)[kWidth]) {
  for_channels<kWidth>(
      s, piece, [&](int64_t c) { return shares ? batch_norm_shares(c, channels, shares) : BatchNormShares{}; },
      [&](int i, const BatchNormShares& share) { taken[i] = share; });
}

// partial[slice][mean, m2][C] of block `number`, as all that follow.
template <class T, int kWidth, bool kPlanes>
__device__ __forceinline__ void sum_moments(const Sweep& s, int64_t number, int64_t channels, const T* x,
                                            float* partial) {
  const SweepPart part(s, number);
  const auto leave = [&](int64_t c, const Moments& all) {
    float* const to = partial + part.slice * 2 * channels + c;
    to[0] = all.mean;
    to[channels] = all.m2;
  };
  if constexpr (kPlanes) {
    Moments mine[1];
    for_plane_pieces<kWidth, kMomentsAhead>(s, part, [&]<int kCount>(const PlanePiece(&pieces)[kCount]) {
      Vector<T> values[kCount];
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) values[k] = load(x + pieces[k].offset, pieces[k].loaded);
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) {
        float numbers[kWidth];
        CNNOPS_UNROLL
        for (int i = 0; i < kWidth; ++i) numbers[i] = to_float(values[k].at[i]);
        const auto more = static_cast<float>(pieces[k].elements());
        if (more > 0) mine[0].add(numbers, pieces[k].there(), more, 1 / (mine[0].count + more));
      }
    });
    merge_block(s, part, mine, leave);
  } else {
    Moments mine[kWidth];
    for_pieces<kMomentsAhead>(s, part, [&]<int kCount>(const int64_t (&offsets)[kCount]) {
      Vector<T> values[kCount];
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) values[k] = load(x + offsets[k], kWidth);
      const float inverse = 1 / (mine[0].count + kCount);
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        float numbers[kCount];
        CNNOPS_UNROLL
        for (int k = 0; k < kCount; ++k) numbers[k] = to_float(values[k].at[i]);
        mine[i].add(numbers, ~0u, kCount, inverse);
      }
    });
    merge_block(s, part, mine, leave);
  }
}

// What the statistics are left in; the running ones may be null.
struct Statistics {
  float *mean, *rstd, *running_mean, *running_var;
};

// Of kMergeChannels channels, from `first` on. All threads of the block call it.
__device__ __forceinline__ void finish_statistics(const Sweep& s, const NormProblem& p, int64_t first,
                                                  const float* partial, const Statistics& to) {
  const int64_t c = first + threadIdx.x % kMergeChannels;
  const Moments all = merge_slices<Moments>(s.slices, c < p.C, [&](int64_t slice) -> Moments {
    const float* const from = partial + slice * 2 * p.C + c;
    return {static_cast<float>(s.elements(slice, c)), from[0], from[p.C]};
  });
  if (threadIdx.x >= kMergeChannels || c >= p.C) return;
  const double count = static_cast<double>(p.N * p.L);
  to.mean[c] = all.mean;
  to.rstd[c] = static_cast<float>(1 / sqrt(all.m2 / count + p.eps));
  const auto update = [&](float& running, double of_batch) {
    running = static_cast<float>((1 - p.momentum) * running + p.momentum * of_batch);
  };
  if (to.running_mean) update(to.running_mean[c], all.mean);
  if (to.running_var) update(to.running_var[c], all.m2 / (count - 1));
}

template <class T, int kWidth, bool kPlanes, int kAhead>
__device__ __forceinline__ void normalise(const Sweep& s, int64_t number, Activation activation,
                                          const Parameters& parameters, const T* x, const T* residual, T* y) {
  if constexpr (kPlanes) {
    for_stretch<kWidth, kAhead>(s, number, [&]<int kCount>(const StretchPiece(&pieces)[kCount]) {
      Vector<T> values[kCount], added[kCount] = {};
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) {
        values[k] = load(x + pieces[k].offset, pieces[k].count);
        if (residual) added[k] = load(residual + pieces[k].offset, pieces[k].count);
      }
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) {
        float z[kWidth];
        for_channels<kWidth>(
            s, pieces[k], [&](int64_t c) { return parameters.map(c); },
            [&](int i, const BatchNormMap& map) {
              z[i] = map(to_float(values[k].at[i]));
              if (residual) z[i] += to_float(added[k].at[i]);
            });
        with_activation(activation, [&](auto activate) {
          CNNOPS_UNROLL
          for (int i = 0; i < kWidth; ++i) from_float(activate(z[i]), values[k].at[i]);
        });
        store(values[k], y + pieces[k].offset, pieces[k].count);
      }
    });
  } else {
    const SweepPart part(s, number);
    if (part.left == 0) return;
    BatchNormMap maps[kWidth];
    load_maps(s, part, parameters, maps);
    for_pieces<kAhead>(s, part, [&]<int kCount>(const int64_t (&offsets)[kCount]) {
      Vector<T> values[kCount], added[kCount] = {};
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) values[k] = load(x + offsets[k], kWidth);
      if (residual) {
        CNNOPS_UNROLL
        for (int k = 0; k < kCount; ++k) added[k] = load(residual + offsets[k], kWidth);
      }
      with_activation(activation, [&](auto activate) {
        CNNOPS_UNROLL
        for (int k = 0; k < kCount; ++k) {
          CNNOPS_UNROLL
          for (int i = 0; i < kWidth; ++i) {
            float z = maps[i](to_float(values[k].at[i]));
            if (residual) z += to_float(added[k].at[i]);
            from_float(activate(z), values[k].at[i]);
          }
        }
      });
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) store(values[k], y + offsets[k], kWidth);
    });
  }
}

// What dz is made of. y: the activation's output if its gradient is read off that; else z is computed again.
template <class T>
struct Gradient {
  Activation activation;
  const T *dy, *x, *residual, *y;

  __device__ bool recomputes() const { return activation != Activation::kNone && !y; }
  __device__ const T* other() const { return activation == Activation::kNone ? nullptr : y ? y : residual; }
};

// What a piece's dz is made of, x being zero unless it is needed.
template <class T>
struct GradientPiece {
  Vector<T> dy, x = {}, other = {};

  __device__ __forceinline__ void load_from(const Gradient<T>& from, bool need_x, int64_t offset, int count) {
    dy = load(from.dy + offset, count);
    if (need_x || from.recomputes()) x = load(from.x + offset, count);
    if (from.other()) other = load(from.other() + offset, count);
  }
};

// f(k, dz, x) for the pieces.
template <class T, int kWidth, int kCount, class F>
__device__ __forceinline__ void for_gradients(const Gradient<T>& from, const BatchNormMap (&maps)[kWidth],
                                              const GradientPiece<T> (&pieces)[kCount], F&& f) {
  with_gradient(from.activation, [&](auto gradient) {
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) {
      float dz[kWidth], x[kWidth];
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        x[i] = to_float(pieces[k].x.at[i]);
        float saved = to_float(pieces[k].other.at[i]);
        if (from.recomputes())
          saved = saved_for_gradient(from.activation, from.other() ? maps[i](x[i]) + saved : maps[i](x[i]));
        dz[i] = gradient(to_float(pieces[k].dy.at[i]), saved);
      }
      f(k, dz, x);
    }
  });
}

// partial[slice][dz, dz * (x - mean)][C]
template <class T, int kWidth, bool kPlanes>
__device__ __forceinline__ void sum_gradients(const Sweep& s, int64_t number, int64_t channels,
                                              const Parameters& parameters, const Gradient<T>& from, float* partial) {
  const SweepPart part(s, number);
  constexpr int kSums = kPlanes ? 1 : kWidth;
  GradientSums mine[kSums];
  if (part.left > 0) {
    BatchNormMap maps[kWidth];
    if constexpr (kPlanes) {
      const BatchNormMap map = parameters.map(part.channel);
      CNNOPS_UNROLL
      for (BatchNormMap& each : maps) each = map;
      for_plane_pieces<kWidth, kGradientAhead>(s, part, [&]<int kCount>(const PlanePiece(&pieces)[kCount]) {
        GradientPiece<T> loaded[kCount];
        CNNOPS_UNROLL
        for (int k = 0; k < kCount; ++k) loaded[k].load_from(from, true, pieces[k].offset, pieces[k].loaded);
        for_gradients(from, maps, loaded, [&](int k, const float (&dz)[kWidth], const float (&x)[kWidth]) {
          const unsigned there = pieces[k].there();
          GradientSums sums;
          CNNOPS_UNROLL
          for (int i = 0; i < kWidth; ++i)
            if (there >> i & 1) sums.merge({dz[i], dz[i] * (x[i] - map.mean)});
          mine[0].merge(sums);
        });
      });
    } else {
      load_maps(s, part, parameters, maps);
      for_pieces<kGradientAhead>(s, part, [&]<int kCount>(const int64_t (&offsets)[kCount]) {
        GradientPiece<T> loaded[kCount];
        CNNOPS_UNROLL
        for (int k = 0; k < kCount; ++k) loaded[k].load_from(from, true, offsets[k], kWidth);
        for_gradients(from, maps, loaded, [&](int, const float (&dz)[kWidth], const float (&x)[kWidth]) {
          CNNOPS_UNROLL
          for (int i = 0; i < kWidth; ++i) mine[i].merge({dz[i], dz[i] * (x[i] - maps[i].mean)});
        });
      });
    }
  }
  merge_block(s, part, mine, [&](int64_t c, const GradientSums& all) {
    float* const to = partial + part.slice * 2 * channels + c;
    to[0] = all.dz;
    to[channels] = all.product;
  });
}

// What the sums are left in: dweight and dbias, which may be null, and shares[2][C].
struct GradientResults {
  float *dweight, *dbias, *shares;
};

// As above.
__device__ __forceinline__ void finish_gradients(const NormProblem& p, int64_t first, int64_t slabs, const float* sums,
                                                 const float* rstd, const GradientResults& to) {
  const int64_t c = first + threadIdx.x % kMergeChannels;
  const auto all = merge_slices<GradientSums>(slabs, c < p.C, [&](int64_t slab) -> GradientSums {
    const float* const from = sums + slab * 2 * p.C + c;
    return {from[0], from[p.C]};
  });
  if (threadIdx.x >= kMergeChannels || c >= p.C) return;
  const float spread = all.product * rstd[c];
  const auto count = static_cast<float>(p.N * p.L);
  if (to.dweight) to.dweight[c] = spread;
  if (to.dbias) to.dbias[c] = all.dz;
  to.shares[c] = all.dz / count;
  to.shares[p.C + c] = spread * rstd[c] / count;
}

// What gradients are written as; shares: null where statistics are fixed. dx and dresidual: one of them may be null.
template <class T>
struct GradientMap {
  const float* shares;
  T *dx, *dresidual;

  __device__ bool needs_x() const { return shares && dx; }
  template <int kWidth>
  __device__ __forceinline__ void put(const BatchNormMap (&maps)[kWidth], const BatchNormShares (&taken)[kWidth],
                                      const float (&dz)[kWidth], const float (&x)[kWidth], int64_t offset,
                                      int count) const {
    Vector<T> out;
    if (dresidual) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) from_float(dz[i], out.at[i]);
      store(out, dresidual + offset, count);
    }
    if (!dx) return;
    CNNOPS_UNROLL
    for (int i = 0; i < kWidth; ++i)
      from_float(shares ? taken[i].dx(maps[i], dz[i], x[i]) : dz[i] * maps[i].scale, out.at[i]);
    store(out, dx + offset, count);
  }
};

template <class T, int kWidth, bool kPlanes, int kAhead>
__device__ __forceinline__ void differentiate(const Sweep& s, int64_t number, int64_t channels,
                                              const Parameters& parameters, const Gradient<T>& from,
                                              const GradientMap<T>& to) {
  BatchNormMap maps[kWidth];
  BatchNormShares taken[kWidth];
  if constexpr (kPlanes) {
    for_stretch<kWidth, kAhead>(s, number, [&]<int kCount>(const StretchPiece(&pieces)[kCount]) {
      GradientPiece<T> loaded[kCount];
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) loaded[k].load_from(from, to.needs_x(), pieces[k].offset, pieces[k].count);
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) {
        load_maps(s, pieces[k], parameters, maps);
        load_shares(s, pieces[k], channels, to.shares, taken);
        const GradientPiece<T> one[1] = {loaded[k]};
        for_gradients(from, maps, one, [&](int, const float (&dz)[kWidth], const float (&x)[kWidth]) {
          to.put(maps, taken, dz, x, pieces[k].offset, pieces[k].count);
        });
      }
    });
  } else {
    const SweepPart part(s, number);
    if (part.left == 0) return;
    load_maps(s, part, parameters, maps);
    load_shares(s, part, channels, to.shares, taken);
    for_pieces<kAhead>(s, part, [&]<int kCount>(const int64_t (&offsets)[kCount]) {
      GradientPiece<T> loaded[kCount];
      CNNOPS_UNROLL
      for (int k = 0; k < kCount; ++k) loaded[k].load_from(from, to.needs_x(), offsets[k], kWidth);
      for_gradients(from, maps, loaded, [&](int k, const float (&dz)[kWidth], const float (&x)[kWidth]) {
        to.put(maps, taken, dz, x, offsets[k], kWidth);
      });
    });
  }
}

// f(Form{}) for what a sweep's kernels are made for: how many elements a piece has, and whether planes are whole
// sectors.
template <int kWidth, bool kPlanes>
struct Form {};

template <class T, class F>
void for_form(const Sweep& s, F&& f) {
  if (s.planes)
    f(Form<kVector<T>, true>{});
  else if (s.width > 1)
    f(Form<kVector<T>, false>{});
  else
    f(Form<1, false>{});
}

inline Sweep moments_sweep(const NormProblem& p) {
  return make_sweep(p, int64_t{kMomentsBlocks} * device().multiprocessors);
}
inline Sweep summing_sweep(const NormProblem& p) {
  return make_sweep(p, int64_t{kSummingBlocks} * device().multiprocessors);
}

template <class B>
Parameters parameters_of(const B& b) {
  return {static_cast<const float*>(b.mean), static_cast<const float*>(b.rstd), static_cast<const float*>(b.weight),
          static_cast<const float*>(b.bias)};
}
inline Statistics statistics_of(const BatchNormForward& b) {
  return {static_cast<float*>(b.mean), static_cast<float*>(b.rstd), static_cast<float*>(b.running_mean),
          static_cast<float*>(b.running_var)};
}
inline GradientResults results_of(const BatchNormBackward& b, float* shares) {
  return {static_cast<float*>(b.dweight), static_cast<float*>(b.dbias), shares};
}
template <class T>
Gradient<T> gradient_of(const NormProblem& p, const BatchNormBackward& b) {
  return {p.activation, static_cast<const T*>(b.dy), static_cast<const T*>(b.x), static_cast<const T*>(b.residual),
          static_cast<const T*>(b.y)};
}

}  // namespace cnnops::cuda
