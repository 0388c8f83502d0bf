// What one block does of each sweep of batch norm and between them, in the pieces of batch_norm.cuh: the kernels that
// sweep once, in batch_norm.cu and batch_norm_sums.cu, and those that do all in one launch, in batch_norm_resident.cu,
// are made of it, so that they have the same results, bit for bit.
#pragma once

#include <cmath>

#include "activation.cuh"
#include "batch_norm.cuh"
#include "dtype.h"

namespace cnnops::cuda {

constexpr int kMomentsAhead = 4, kGradientAhead = 2;
constexpr int kMomentsBlocks = 3;  // that a multiprocessor holds, and all of them run at once
constexpr int kMergeThreads = kMergeChannels * kMergeShares;

// The channel arrays that both directions read; weight and bias may be null.
struct Parameters {
  const float *mean, *rstd, *weight, *bias;
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

// partial[slice][mean, m2][C]
template <class T, int kWidth>
__device__ __forceinline__ void sum_moments(const Sweep& s, const SweepPart& part, int64_t channels, const T* x,
                                            float* partial) {
  Moments mine[kWidth];
  for_pieces<kMomentsAhead>(s, part, [&]<int kCount>(const int64_t (&offsets)[kCount]) {
    Vector<T> values[kCount];
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = load(x + offsets[k], kWidth);
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const float inverse = 1 / (mine[0].count + 1);
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) mine[i].add(to_float(values[k].at[i]), inverse);
    }
  });
  merge_block(s, part, mine, [&](int64_t c, const Moments& all) {
    float* const to = partial + part.slice * 2 * channels + c;
    to[0] = all.mean;
    to[channels] = all.m2;
  });
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
    return {static_cast<float>(s.elements(slice)), from[0], from[p.C]};
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

template <class T, int kWidth, int kAhead>
__device__ __forceinline__ void normalise(const Sweep& s, const SweepPart& part, Activation activation,
                                          const Parameters& parameters, const T* x, const T* residual, T* y) {
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

// What dz is made of. y: the activation's output if its gradient is read off that; else z is computed again.
template <class T>
struct Gradient {
  Activation activation;
  const T *dy, *x, *residual, *y;
};

// f(piece, dz, x) for the pieces at `offsets`, x being zero unless it is needed.
template <int kWidth, class T, int kCount, class F>
__device__ __forceinline__ void for_gradients(const Gradient<T>& from, bool need_x, const BatchNormMap (&maps)[kWidth],
                                              const int64_t (&offsets)[kCount], F&& f) {
  const bool recompute = from.activation != Activation::kNone && !from.y;
  const T* const other = from.activation == Activation::kNone ? nullptr : from.y ? from.y : from.residual;
  Vector<T> dy[kCount], x[kCount] = {}, others[kCount] = {};
  CNNOPS_UNROLL
  for (int k = 0; k < kCount; ++k) {
    dy[k] = load(from.dy + offsets[k], kWidth);
    if (need_x || recompute) x[k] = load(from.x + offsets[k], kWidth);
    if (other) others[k] = load(other + offsets[k], kWidth);
  }
  with_gradient(from.activation, [&](auto gradient) {
    CNNOPS_UNROLL
    for (int k = 0; k < kCount; ++k) {
      float dz[kWidth], value[kWidth];
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        value[i] = to_float(x[k].at[i]);
        float saved = to_float(others[k].at[i]);
        if (recompute)
          saved = saved_for_gradient(from.activation, other ? maps[i](value[i]) + saved : maps[i](value[i]));
        dz[i] = gradient(to_float(dy[k].at[i]), saved);
      }
      f(offsets[k], dz, value);
    }
  });
}

// partial[slice][dz, dz * (x - mean)][C]
template <class T, int kWidth>
__device__ __forceinline__ void sum_gradients(const Sweep& s, const SweepPart& part, int64_t channels,
                                              const Parameters& parameters, const Gradient<T>& from, float* partial) {
  GradientSums mine[kWidth];
  if (part.left > 0) {
    BatchNormMap maps[kWidth];
    load_maps(s, part, parameters, maps);
    for_pieces<kGradientAhead>(s, part, [&](const auto& offsets) {
      for_gradients(from, true, maps, offsets, [&](int64_t, const float (&dz)[kWidth], const float (&x)[kWidth]) {
        CNNOPS_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          mine[i].dz += dz[i];
          mine[i].product += dz[i] * (x[i] - maps[i].mean);
        }
      });
    });
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

// shares: null where statistics are fixed. dx and dresidual: one of them may be null.
template <class T, int kWidth>
__device__ __forceinline__ void differentiate(const Sweep& s, const SweepPart& part, int64_t channels,
                                              const Parameters& parameters, const Gradient<T>& from,
                                              const float* shares, T* dx, T* dresidual) {
  if (part.left == 0) return;
  BatchNormMap maps[kWidth];
  load_maps(s, part, parameters, maps);
  float dz_share[kWidth], x_share[kWidth];
  load_channels(s, part, shares, 0, dz_share);
  load_channels(s, part, shares ? shares + channels : nullptr, 0, x_share);
  for_pieces<kGradientAhead>(s, part, [&](const auto& offsets) {
    for_gradients(
        from, shares && dx, maps, offsets, [&](int64_t offset, const float (&dz)[kWidth], const float (&x)[kWidth]) {
          Vector<T> out;
          if (dresidual) {
            CNNOPS_UNROLL
            for (int i = 0; i < kWidth; ++i) from_float(dz[i], out.at[i]);
            store(out, dresidual + offset, kWidth);
          }
          if (!dx) return;
          CNNOPS_UNROLL
          for (int i = 0; i < kWidth; ++i)
            from_float(
                shares ? BatchNormShares{dz_share[i], x_share[i]}.dx(maps[i], dz[i], x[i]) : dz[i] * maps[i].scale,
                out.at[i]);
          store(out, dx + offset, kWidth);
        });
  });
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
