// The portable family's backward_input: see conv2d_portable.cu.

#include "conv2d.cuh"

namespace cnnops::cuda {
namespace {

// A block's pixels are of one parity class along each axis, so that all of them have the same taps. The epilogue has at
// most a bias.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<T, Tile>)
    conv2d_backward_input_kernel(Conv2dProblem p, Epilogue epilogue, const Stored<T>* dy, const Stored<T>* weight,
                                 Stored<T>* dx) {
  CNNOPS_DYNAMIC_SHARED(float, shared);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const Place at = place_of<Tile>(blockIdx.x, largest_class(p), channels, p.groups);
  const Split residue = split(at.part, classes(p.W, p.stride_w));
  const Parity parity_h = parity(static_cast<int>(residue.quotient), p.R, p.stride_h, p.pad_h, p.dilation_h);
  const Parity parity_w = parity(static_cast<int>(residue.remainder), p.S, p.stride_w, p.pad_w, p.dilation_w);
  const Axis h = taps_of_inputs(parity_h, p.H, p.P, p.stride_h, p.pad_h, p.dilation_h);
  const Axis w = taps_of_inputs(parity_w, p.W, p.Q, p.stride_w, p.pad_w, p.dilation_w);
  const int64_t pixels = int64_t{p.N} * h.positions * w.positions, gemm_k = int64_t{h.taps} * w.taps * filters;
  if (at.m >= pixels) return;

  const TappedRows<Stored<T>> a(dy, at.group, filters, p.K, h, w, pixels);
  const FilterColumns<Stored<T>> b(p, weight, at.group, parity_h, parity_w);
  multiply<T, Tile, true, false>(a, b, at.m, at.n, 0, gemm_k, shared);

  const auto row_of = [&](int m) -> int64_t {
    if (at.m + m >= pixels) return -1;
    const Split column = split(at.m + m, w.positions), row = split(column.quotient, h.positions);
    const int64_t in_image =
        (parity_h.first + row.remainder * p.stride_h) * p.W + parity_w.first + column.remainder * p.stride_w;
    return (row.quotient * p.H * p.W + in_image) * p.C;
  };
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
