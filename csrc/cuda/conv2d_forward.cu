// The portable family's forward pass: see conv2d_portable.cu.

#include "conv2d.cuh"

namespace cnnops::cuda {
namespace {

// Of one slab of the sum over (r,s,c). Where there are several, `slabs[slab][pixel][k]` has their sums; else y has the
// result and `partial[tile][count, mean, m2][K]` its moments, if the epilogue wants them.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<T, Tile>)
    conv2d_forward_kernel(Conv2dProblem p, Epilogue epilogue, int64_t slab_size, const Stored<T>* x,
                          const Stored<T>* weight, Stored<T>* y, float* slabs, float* partial) {
  CNNOPS_DYNAMIC_SHARED(float, shared);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q, gemm_k = int64_t{p.R} * p.S * channels;
  const Place at = place_of<Tile>(blockIdx.x, pixels, filters, p.groups);
  const int64_t k_begin = at.part * slab_size, k_end = k_begin + slab_size < gemm_k ? k_begin + slab_size : gemm_k;

  const TappedRows<Stored<T>> a(p, x, at.group, pixels);
  const MatrixRows<Stored<T>> b(weight + int64_t{at.group} * filters * gemm_k, filters, gemm_k, gemm_k);
  multiply<T, Tile, true, true>(a, b, at.m, at.n, k_begin, k_end, shared);

  const auto row_of = [&](int m) { return at.m + m < pixels ? (at.m + m) * p.K : -1; };
  const int64_t k = int64_t{at.group} * filters + at.n, end = int64_t{at.group + 1} * filters;
  if (slabs)
    write_tile<float, Tile, false>({}, shared, row_of, k, end, filters % kVector<float> == 0,
                                   slabs + at.part * pixels * p.K, nullptr, 0);
  else if (partial)
    write_tile<Stored<T>, Tile, true>(epilogue, shared, row_of, k, end, filters % kVectorOf<T> == 0, y,
                                      partial + at.m / Tile::kM * 3 * p.K, p.K);
  else
    write_tile<Stored<T>, Tile, false>(epilogue, shared, row_of, k, end, filters % kVectorOf<T> == 0, y, nullptr, 0);
}

// A block's part of y where sums come in slabs.
using SumTile = Shape<16, 64, 1, 4, 1, false>;

// y = the epilogue of the sum over slabs of slabs[slab], in order, both [pixels][K].
template <class T>
__global__ void __launch_bounds__(SumTile::kThreads, 4)
    conv2d_add_slabs_kernel(Epilogue epilogue, int64_t pixels, int64_t K, int64_t slab_count, const float* slabs, T* y,
                            float* partial) {
  CNNOPS_DYNAMIC_SHARED(float, sums);
  const Place at = place_of<SumTile>(blockIdx.x, pixels, K, 1);
  for (int i = static_cast<int>(threadIdx.x); i < SumTile::kM * SumTile::kN; i += SumTile::kThreads) {
    const int m = i / SumTile::kN, n = i % SumTile::kN;
    float sum = 0;
    if (at.m + m < pixels && at.n + n < K)
      for (int64_t slab = 0; slab < slab_count; ++slab) sum += slabs[(slab * pixels + at.m + m) * K + at.n + n];
    sums[m * kSumsPitch<SumTile> + n] = sum;
  }
  __syncthreads();
  const auto row_of = [&](int m) { return at.m + m < pixels ? (at.m + m) * K : -1; };
  if (partial)
    write_tile<T, SumTile, true>(epilogue, sums, row_of, at.n, K, K % kVector<T> == 0, y,
                                 partial + at.m / SumTile::kM * 3 * K, K);
  else
    write_tile<T, SumTile, false>(epilogue, sums, row_of, at.n, K, K % kVector<T> == 0, y, nullptr, 0);
}

// What lies in the workspace, as numbers of floats.
struct ForwardWorkspace {
  int64_t slabs = 0, partial = 0, moment_tiles = 0;

  ForwardWorkspace(const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue) {
    const int64_t pixels = int64_t{p.N} * p.P * p.Q;
    if (plan.splits > 1) slabs = plan.splits * pixels * p.K;
    if (!epilogue.mean) return;
    moment_tiles = ceil_div(pixels, plan.splits > 1 ? SumTile::kM : plan.block_m);
    partial = moment_tiles * 3 * p.K;
  }
};

template <class T, class Tile>
void launch(const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue, const void* x, const void* weight,
            void* y, float* workspace, Stream stream) {
  const ForwardWorkspace parts(p, plan, epilogue);
  float* const slabs = parts.slabs ? workspace : nullptr;
  float* const partial = parts.partial ? workspace + parts.slabs : nullptr;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q, steps = ceil_div(int64_t{p.R} * p.S * (p.C / p.groups), kBlockK<T>);
  const int64_t slab_size = ceil_div(steps, plan.splits) * kBlockK<T>;
  const int64_t count = tiles(pixels, p.K / p.groups, p.groups, Tile::kM, Tile::kN) * plan.splits;
  constexpr size_t kShared = shared_bytes<T, Tile, true, true>();
  using Number = Stored<T>;
  CNNOPS_LAUNCH((conv2d_forward_kernel<T, Tile>), blocks(count), Tile::kThreads, kShared, stream, p, epilogue,
                slab_size, static_cast<const Number*>(x), static_cast<const Number*>(weight), static_cast<Number*>(y),
                slabs, partial);
  if (slabs) {
    constexpr size_t kSums = SumTile::kM * kSumsPitch<SumTile> * sizeof(float);
    CNNOPS_LAUNCH(conv2d_add_slabs_kernel<Number>, blocks(tiles(pixels, p.K, 1, SumTile::kM, SumTile::kN)),
                  SumTile::kThreads, kSums, stream, epilogue, pixels, p.K, plan.splits, slabs, static_cast<Number*>(y),
                  partial);
  }
  if (partial) finish_moments(parts.moment_tiles, p.K, partial, epilogue, stream);
}

}  // namespace

int64_t portable_forward_workspace(const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue) {
  const ForwardWorkspace parts(p, plan, epilogue);
  return (parts.slabs + parts.partial) * int64_t{sizeof(float)};
}

void portable_forward(const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue, const void* x,
                      const void* weight, void* y, void* workspace, Stream stream) {
  for_numbers(p, [&]<class T>(T) {
    const auto run = [&]<class Tile>(Tile) {
      launch<T, Tile>(p, plan, epilogue, x, weight, y, static_cast<float*>(workspace), stream);
    };
    if constexpr (std::is_same_v<T, float>)
      with_tile<SmallTile, TallTile>(plan, run);
    else
      with_tile<SmallTile, TallTile, LargeTile>(plan, run);
  });
}

}  // namespace cnnops::cuda
