// What follows a tile's sums: y = activation(sum * scale[k] + bias[k] + residual), rounded and written in rows of
// 16-byte pieces, and the statistics of what was written.
//
// A warp brings a piece of its sums, rows x kColumns, to shared memory of its own as floats and calls write_rows, which
// gives each lane kVector neighbouring columns of every few rows, whatever the fragments were. Nobody else takes part,
// so that __syncwarp is all the synchronisation.
#pragma once

#include "activation.cuh"
#include "moments.cuh"
#include "vector.cuh"

namespace cnnops::cuda {

// The scale and shift of this lane's columns, in float.
template <class T>
struct Affine {
  float scale[kVector<T>], shift[kVector<T>];

  __device__ Affine(const Epilogue& epilogue, int64_t k, int columns) {
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      scale[i] = 1, shift[i] = 0;
      if (i >= columns) continue;
      if (epilogue.scale) {
        scale[i] = static_cast<const float*>(epilogue.scale)[k + i];
        shift[i] = static_cast<const float*>(epilogue.bias)[k + i];
      } else if (epilogue.bias) {
        shift[i] = to_float(static_cast<const T*>(epilogue.bias)[k + i]);
      }
    }
  }
};

// The first of this lane's columns, of which it has kVector.
template <class T, int kColumns>
__device__ __forceinline__ int column_of() {
  constexpr int kLanes = kColumns / kVector<T>;
  return static_cast<int>(threadIdx.x) % 32 % kLanes * kVector<T>;
}

// Writes `rows` rows of kColumns sums, `pitch` floats apart in shared memory (a multiple of 4), to y at row_of(row) +
// k, row_of giving the offset of a row's first filter or -1 for a row that is none. Columns from k_end on are none
// either. `aligned`: every row_of() and k are multiples of kVector. All lanes of a warp call this; what they wrote to
// `stage` is visible. With kMoments, adds what was written to `moments`, of this lane's columns.
template <class T, int kColumns, bool kMoments, class RowOf>
__device__ void write_rows(const Epilogue& epilogue, const float* stage, int pitch, int rows, const RowOf& row_of,
                           int64_t k, int64_t k_end, bool aligned, T* y, Moments (&moments)[kVector<T>]) {
  constexpr int kLanes = kColumns / kVector<T>, kRowsPerPass = 32 / kLanes;
  static_assert(32 % kLanes == 0);
  const int column = column_of<T, kColumns>();
  const int64_t first = k + column;
  const int columns = first >= k_end ? 0 : k_end - first < kVector<T> ? static_cast<int>(k_end - first) : kVector<T>;
  if (columns == 0) return;
  const bool whole = aligned && columns == kVector<T>;
  const Affine<T> affine(epilogue, first, columns);
  const auto* const residual = static_cast<const T*>(epilogue.residual);

  for (int row = static_cast<int>(threadIdx.x) % 32 / kLanes; row < rows; row += kRowsPerPass) {
    const int64_t at = row_of(row);
    if (at < 0) continue;
    Vector<T> out = {};
    if (residual) {
      if (whole) {
        out = *reinterpret_cast<const Vector<T>*>(residual + at + first);
      } else {
        CNNOPS_UNROLL
        for (int i = 0; i < kVector<T>; ++i)  // unrolled, so that `out` stays in registers
          if (i < columns) out.at[i] = residual[at + first + i];
      }
    }
    float value[kVector<T>];
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; i += 4) {
      const float4 sums = *reinterpret_cast<const float4*>(stage + row * pitch + column + i);
      value[i] = sums.x, value[i + 1] = sums.y, value[i + 2] = sums.z, value[i + 3] = sums.w;
    }
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      value[i] = value[i] * affine.scale[i] + affine.shift[i];
      if (residual) value[i] += to_float(out.at[i]);
    }
    with_activation(epilogue.activation, [&](auto activate) {
      CNNOPS_UNROLL
      for (int i = 0; i < kVector<T>; ++i) from_float(activate(value[i]), out.at[i]);
    });
    if (whole) {
      store_16(y + at + first, &out);
    } else {
      CNNOPS_UNROLL
      for (int i = 0; i < kVector<T>; ++i)
        if (i < columns) y[at + first + i] = out.at[i];
    }
    if constexpr (kMoments) {
      const float inverse = 1 / (moments[0].count + 1);
      CNNOPS_UNROLL
      for (int i = 0; i < kVector<T>; ++i) moments[i].add(to_float(out.at[i]), inverse);
    }
  }
}

// Merges the moments of the lanes that share columns, in a fixed order, into those of the first row's lanes.
template <class T, int kColumns>
__device__ void merge_lanes(Moments (&moments)[kVector<T>]) {
  constexpr int kLanes = kColumns / kVector<T>;
  CNNOPS_UNROLL
  for (int i = 0; i < kVector<T>; ++i) {
    CNNOPS_UNROLL
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const Moments other{__shfl_down_sync(~0u, moments[i].count, distance),
                          __shfl_down_sync(~0u, moments[i].mean, distance),
                          __shfl_down_sync(~0u, moments[i].m2, distance)};
      moments[i].merge(other);
    }
  }
}

// Merges the moments of all warps into partial[count, mean, m2][K], of the filters from k on that are before k_end, by
// way of what `shared` has room for. All threads of a block call this.
template <class T, int kColumns, int kWarps>
__device__ void merge_warps(Moments (&moments)[kVector<T>], void* shared, int64_t k, int64_t k_end, int64_t K,
                            float* partial) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  merge_lanes<T, kColumns>(moments);
  __syncthreads();  // what lay there was read
  auto* const parts = static_cast<Moments*>(shared);
  if (static_cast<int>(threadIdx.x) % 32 < kColumns / kVector<T>) {
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; ++i) parts[warp * kColumns + column_of<T, kColumns>() + i] = moments[i];
  }
  __syncthreads();
  for (int n = static_cast<int>(threadIdx.x); n < kColumns && k + n < k_end; n += 32 * kWarps) {
    Moments all;
    for (int i = 0; i < kWarps; ++i) all.merge(parts[i * kColumns + n]);
    partial[k + n] = all.count;
    partial[K + k + n] = all.mean;
    partial[2 * K + k + n] = all.m2;
  }
}

}  // namespace cnnops::cuda
