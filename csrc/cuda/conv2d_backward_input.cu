// The portable family's backward_input: see conv2d_portable.cu.

#include "conv2d.cuh"

namespace cnnops::cuda {
namespace {

// A block's pixels are of one class. The epilogue has at most a bias.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<T, Tile>)
    conv2d_backward_input_kernel(Conv2dProblem p, Epilogue epilogue, const Stored<T>* dy, const Stored<T>* weight,
                                 Stored<T>* dx) {
  CNNOPS_DYNAMIC_SHARED(float, shared);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const Place at = place_of<Tile>(blockIdx.x, largest_class(p), channels, p.groups);
  const InputClass in(p, at.part);
  if (at.m >= in.pixels) return;

  const TappedRows<Stored<T>> a(dy, at.group, filters, p.K, in.h, in.w, in.pixels);
  const FilterColumns<Stored<T>> b(p, weight, at.group, in.parity_h, in.parity_w);
  multiply<T, Tile, true, false>(a, b, at.m, at.n, 0, int64_t{in.h.taps} * in.w.taps * filters, shared);

  const auto row_of = [&](int m) { return in.row_of(p, at.m + m); };
  write_tile<Stored<T>, Tile, false>(epilogue, shared, row_of, int64_t{at.group} * channels + at.n,
                                     int64_t{at.group + 1} * channels, channels % kVectorOf<T> == 0, dx, nullptr, 0);
}

template <class T, class Tile>
void launch(const Conv2dProblem& p, const Epilogue& epilogue, const Stored<T>* dy, const Stored<T>* weight,
            Stored<T>* dx, Stream stream) {
  const int64_t count = tiles(largest_class(p), p.C / p.groups, p.groups, Tile::kM, Tile::kN) *
                        classes(p.H, p.stride_h) * classes(p.W, p.stride_w);
  constexpr size_t kShared = shared_bytes<T, Tile, true, false>();
  CNNOPS_LAUNCH((conv2d_backward_input_kernel<T, Tile>), blocks(count), Tile::kThreads, kShared, stream, p, epilogue,
                dy, weight, dx);
}

}  // namespace

void portable_backward_input(const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue, const void* dy,
                             const void* weight, void* dx, void*, Stream stream) {
  for_numbers(p, [&]<class T>(T) {
    using Number = Stored<T>;
    const auto run = [&]<class Tile>(Tile) {
      launch<T, Tile>(p, epilogue, static_cast<const Number*>(dy), static_cast<const Number*>(weight),
                      static_cast<Number*>(dx), stream);
    };
    if constexpr (std::is_same_v<T, float>)
      with_tile<SmallTile, TallTile>(plan, run);
    else
      with_tile<SmallTile, TallTile, LargeTile>(plan, run);
  });
}

}  // namespace cnnops::cuda
