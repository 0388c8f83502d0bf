// The portable family's backward_weight: see conv2d_portable.cu. dy is read once for each kN taps and channels, and x
// once for each kM filters and tap.

#include "conv2d.cuh"

namespace cnnops::cuda {
namespace {

// slabs[slab][k][r,s,c] = the sum over pixels [slab * pixels_per_slab, ..).
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<T, Tile>)
    conv2d_backward_weight_kernel(Conv2dProblem p, int64_t pixels_per_slab, const Stored<T>* dy, const Stored<T>* x,
                                  float* slabs) {
  CNNOPS_DYNAMIC_SHARED(float, shared);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q, taps = int64_t{p.R} * p.S * channels;
  const Place at = place_of<Tile>(blockIdx.x, filters, taps, p.groups);
  const int64_t begin = at.part * pixels_per_slab;
  const int64_t end = begin + pixels_per_slab < pixels ? begin + pixels_per_slab : pixels;

  const MatrixColumns<Stored<T>> a(dy + int64_t{at.group} * filters, end, filters, p.K);
  const TappedColumns<Stored<T>> b(p, x, at.group, end);
  multiply<T, Tile, false, false>(a, b, at.m, at.n, begin, end, shared);

  const int64_t first_row = at.part * p.K + int64_t{at.group} * filters + at.m;
  const auto row_of = [&](int m) { return at.m + m < filters ? (first_row + m) * taps : -1; };
  write_tile<float, Tile, false>({}, shared, row_of, at.n, taps, taps % kVector<float> == 0, slabs, nullptr, 0);
}

template <class T, class Tile>
void launch(const Conv2dProblem& p, const Conv2dPlan& plan, const Stored<T>* dy, const Stored<T>* x, float* slabs,
            Stream stream) {
  const int64_t taps = int64_t{p.R} * p.S * (p.C / p.groups);
  const int64_t count = tiles(p.K / p.groups, taps, p.groups, Tile::kM, Tile::kN) * plan.splits;
  constexpr size_t kShared = shared_bytes<T, Tile, false, false>();
  CNNOPS_LAUNCH((conv2d_backward_weight_kernel<T, Tile>), blocks(count), Tile::kThreads, kShared, stream, p,
                ceil_div(int64_t{p.N} * p.P * p.Q, plan.splits), dy, x, slabs);
}

}  // namespace

int64_t portable_backward_weight_workspace(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return plan.splits * slab_size(p) * int64_t{sizeof(float)};
}

void portable_backward_weight(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x,
                              void* dweight, void* workspace, Stream stream) {
  auto* const slabs = static_cast<float*>(workspace);
  for_numbers(p, [&]<class T>(T) {
    using Number = Stored<T>;
    const auto run = [&]<class Tile>(Tile) {
      launch<T, Tile>(p, plan, static_cast<const Number*>(dy), static_cast<const Number*>(x), slabs, stream);
    };
    if constexpr (std::is_same_v<T, float>)
      with_tile<SmallTile, TallTile>(plan, run);
    else
      with_tile<SmallTile, TallTile, LargeTile, WideTile>(plan, run);
  });
  add_slabs(p.dtype, plan.splits, slab_size(p), slabs, dweight, stream);
}

}  // namespace cnnops::cuda
