// Convolution of groups with few channels: several groups to a block, side by side in one product.
//
//   y[n,p,q,k]       = sum over (r,s,c) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s,c], c of k's group
//   dx[n,h,w,c]      = sum over (r,s,k) of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s,c],
//                      k of c's group, where stride divides
//   dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//
// Layout     As in conv2d_portable.cu; nothing is padded in memory. A pack is as many groups as have together no more
//            than kSlots channels and kSlots filters, which lie side by side in x and y.
// Ownership  y, dx: one block owns 128 pixels of one pack. A step of the product is one tap: pixels x the pack's
//            channels, times a tile of filters that is zero but for one square a group. dweight: one block owns the
//            pack's filters at four taps; of the product with all of the pack's channels, the squares are kept.
//            Fragments that have nothing of any square are left out.
// Traffic    x or dy once for each tap, weight once for each 128 pixels; backward_weight: dy once for each four taps.
//
// A zero of the filters' tile times another group's infinity would be NaN where torch has none. So what is not finite
// in y and dx is summed again, over its own group.

#include <algorithm>
#include <cmath>

#include "conv2d.cuh"

namespace cnnops::cuda {
namespace {

template <class T>
constexpr int kSlots = kBlockK<T>;  // channels and filters of a pack: one step of the product

using PixelTile = Shape<128, 32, 4, 1, 3, false>;
template <class T>
using WeightTile = Shape<32, 4 * kSlots<T>, 1, 4, 3, false>;

// Said to the compiler, which otherwise saves registers for a fourth and spills.
constexpr int kPackedResidentBlocks = 3;

// The groups of a pack: the most that fit, of the numbers that keep packs aligned to 16 bytes if there are any.
template <class T>
int groups_of_a_pack(const Conv2dProblem& p) {
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int most = kSlots<T> / std::max(channels, filters);
  for (int groups = most; groups > 0; --groups)
    if (groups * channels % kVectorOf<T> == 0 && groups * filters % kVectorOf<T> == 0) return groups;
  return most;
}

struct Pack {
  int groups, channels, filters;    // channels and filters of one group
  int first_channel, first_filter;  // of the pack
  bool aligned;                     // whether all packs' channels and filters are, to 16 bytes

  // The `index`-th of packs of `most` groups.
  template <class T>
  static __device__ Pack of(const Conv2dProblem& p, int most, int64_t index) {
    const int first = static_cast<int>(index) * most, channels = p.C / p.groups, filters = p.K / p.groups;
    const bool aligned = most * channels % kVectorOf<T> == 0 && most * filters % kVectorOf<T> == 0 &&
                         p.C % kVectorOf<T> == 0 && p.K % kVectorOf<T> == 0;
    return {p.groups - first < most ? p.groups - first : most,
            channels,
            filters,
            first * channels,
            first * filters,
            aligned};
  }

  // Whether any group has one of `count_a` slots from a on, each group having size_a, and one of those from b on.
  static __device__ bool meet(int a, int count_a, int size_a, int b, int count_b, int size_b) {
    return a / size_a <= (b + count_b - 1) / size_b && b / size_b <= (a + count_a - 1) / size_a;
  }
};

template <class T>
int64_t packs(const Conv2dProblem& p) {
  return ceil_div(p.groups, groups_of_a_pack<T>(p));
}

// A pack's slots of the positions' taps: k counts kSlots of each tap.
template <class T, int kSlotsOfATap>
struct PackedRows : TappedRows<T> {
  using typename TappedRows<T>::Fixed, typename TappedRows<T>::Walk;

  __device__ PackedRows(const T* tensor, int width, bool aligned, int pitch, const Axis& h, const Axis& w,
                        int64_t pixels)
      : TappedRows<T>(tensor, 0, width, pitch, h, w, pixels) {
    this->vectorised = aligned;
  }
  __device__ Walk walk(int64_t k) const {
    return {this->w.taps ? 0 : this->h.taps, 0, static_cast<int>(k)};  // of the first tap
  }
  __device__ void advance(Walk& walk, int by) const {
    walk.c += by;
    if (walk.c < kSlotsOfATap) return;
    walk.c -= kSlotsOfATap;
    if (++walk.s == this->w.taps) walk.s = 0, ++walk.r;
  }
  __device__ const T* at(const Fixed& pixel, const Walk& walk) const {
    return walk.c < this->channels ? TappedRows<T>::at(pixel, walk) : nullptr;
  }
};

// The same for backward_weight: n counts kSlots of each tap.
template <class T, int kSlotsOfATap>
struct PackedColumns : TappedColumns<T> {
  using typename TappedColumns<T>::Fixed;

  __device__ PackedColumns(const T* tensor, int width, bool aligned, int pitch, const Axis& h, const Axis& w,
                           int64_t pixels)
      : TappedColumns<T>(tensor, 0, width, pitch, h, w, pixels) {
    this->vectorised = aligned;
  }
  __device__ Fixed fixed(int64_t i) const {
    const int tap = static_cast<int>(i) / kSlotsOfATap, c = static_cast<int>(i) % kSlotsOfATap;
    if (c >= this->channels) return {kNowhere, 0, 0};
    return TappedColumns<T>::fixed(int64_t{tap} * this->channels + c);
  }
};

// Fills the squares of tiles [n][k], a tap each, n being filters and k channels or the other way round. The zeros
// around them are written once. What a tile takes was fetched when the one before was filled, so that nobody waits for
// it.
template <class T, bool kFiltersAreN>
class SquareLoader {
 public:
  using Tile = cuda::Tile<T, PixelTile::kThreads, PixelTile::kN, true>;

  __device__ SquareLoader(const Conv2dProblem& p, const Pack& pack, const Parity& h, const Parity& w,
                          const Stored<T>* weight)
      : weight_(weight + int64_t{pack.first_filter} * p.R * p.S * pack.channels),
        h_(h),
        w_(w),
        S_(p.S),
        channels_(pack.channels) {
    CNNOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int element = static_cast<int>(threadIdx.x) + i * PixelTile::kThreads;
      const int filter = element / pack.channels, channel = element - filter * pack.channels;
      const int group = filter / pack.filters, slot = group * pack.channels + channel;
      place_[i] = group >= pack.groups ? -1
                  : kFiltersAreN       ? filter * Tile::kPitch + slot
                                       : slot * Tile::kPitch + filter;
      offset_[i] = filter * p.R * p.S * pack.channels + channel;
    }
    fetch();
  }

  __device__ void load(Stored<T>* tile) {
    CNNOPS_UNROLL
    for (int i = 0; i < kEach; ++i)
      if (place_[i] >= 0) tile[place_[i]] = next_[i];
    if (++s_ == w_.taps) s_ = 0, ++r_;
    fetch();
  }

 private:
  static constexpr int kEach = kSlots<T> * kSlots<T> / PixelTile::kThreads;

  __device__ void fetch() {
    if (r_ >= h_.taps || w_.taps == 0) return;
    const Stored<T>* const at = weight_ + ((h_.tap - r_ * h_.tap_step) * S_ + w_.tap - s_ * w_.tap_step) * channels_;
    CNNOPS_UNROLL
    for (int i = 0; i < kEach; ++i)
      if (place_[i] >= 0) next_[i] = at[offset_[i]];
  }

  const Stored<T>* const weight_;
  const Parity h_, w_;
  const int S_, channels_;
  int r_ = 0, s_ = 0;
  int place_[kEach], offset_[kEach];
  Stored<T> next_[kEach] = {};
};

// The products of a tile of pixels with one pack's filters, in `shared`.
template <class T, bool kFiltersAreN>
__device__ void multiply_squares(const Conv2dProblem& p, const Pack& pack, const PackedRows<Stored<T>, kSlots<T>>& a,
                                 int64_t m, const Parity& parity_h, const Parity& parity_w, const Stored<T>* weight,
                                 float* shared) {
  using Product = Product<T, PixelTile, true, true>;
  const int slots_n = kFiltersAreN ? pack.filters : pack.channels,
            slots_k = kFiltersAreN ? pack.channels : pack.filters;
  constexpr int kStageBytes = kStageElements<T, PixelTile, true, true> * static_cast<int>(sizeof(Stored<T>));
  constexpr int kWords = PixelTile::kStages * kStageBytes / 4;
  for (int i = static_cast<int>(threadIdx.x); i < kWords; i += PixelTile::kThreads) shared[i] = 0;
  __syncthreads();

  constexpr int kFragmentK = 2 * kVectorOf<T>;
  unsigned needed = 0;
  CNNOPS_UNROLL
  for (int n = 0; n < PixelTile::kN; n += 8) {
    CNNOPS_UNROLL
    for (int k = 0; k < kBlockK<T>; k += kFragmentK)
      needed |= static_cast<unsigned>(Pack::meet(n, 8, slots_n, k, kFragmentK, slots_k))
                << (n / 8 * 2 + k / kFragmentK);
  }
  Loader<T, typename Product::A, true, false, PackedRows<Stored<T>, kSlots<T>>> a_loader(a, m, 0);
  SquareLoader<T, kFiltersAreN> b_loader(p, pack, parity_h, parity_w, weight);
  multiply_tiles<T, PixelTile, true, true>(a_loader, b_loader, a.h.taps * a.w.taps, shared, [&](int, int n, int k) {
    return (needed >> (n / 8 * 2 + k / kFragmentK) & 1) != 0;
  });

  for (int i = static_cast<int>(threadIdx.x); i < PixelTile::kM * PixelTile::kN; i += PixelTile::kThreads) {
    float& sum = shared[i / PixelTile::kN * kSumsPitch<PixelTile> + i % PixelTile::kN];
    const int n = i % PixelTile::kN, group = n / slots_n;
    if (std::isfinite(sum) || group >= pack.groups) continue;
    const auto pixel = a.fixed(m + i / PixelTile::kN);
    sum = 0;
    for (int r = 0; r < a.h.taps; ++r)
      for (int s = 0; s < a.w.taps; ++s)
        for (int j = 0; j < slots_k; ++j) {
          const int filter = kFiltersAreN ? n : group * slots_k + j, channel = kFiltersAreN ? j : n - group * slots_n;
          const int row = parity_h.tap - r * parity_h.tap_step, column = parity_w.tap - s * parity_w.tap_step;
          const Stored<T>* const from = a.at(pixel, {r, s, group * slots_k + j});
          const float factor = to_float(
              weight[((int64_t{pack.first_filter + filter} * p.R + row) * p.S + column) * pack.channels + channel]);
          sum += (from ? to_float(*from) : 0.f) * factor;
        }
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(PixelTile::kThreads, kPackedResidentBlocks)
    conv2d_packed_forward_kernel(Conv2dProblem p, int pack_groups, Epilogue epilogue, const Stored<T>* x,
                                 const Stored<T>* weight, Stored<T>* y, float* partial) {
  CNNOPS_DYNAMIC_SHARED(float, shared);
  const int64_t pixels = int64_t{p.N} * p.P * p.Q;
  const Split block = split(blockIdx.x, ceil_div(p.groups, pack_groups));
  const int64_t m = block.quotient * PixelTile::kM;
  const Pack pack = Pack::of<T>(p, pack_groups, block.remainder);
  const PackedRows<Stored<T>, kSlots<T>> a(x + pack.first_channel, pack.groups * pack.channels, pack.aligned, p.C,
                                           taps_of_outputs(p.P, p.R, p.H, p.stride_h, p.pad_h, p.dilation_h),
                                           taps_of_outputs(p.Q, p.S, p.W, p.stride_w, p.pad_w, p.dilation_w), pixels);
  multiply_squares<T, true>(p, pack, a, m, {0, 0, -1, p.R}, {0, 0, -1, p.S}, weight, shared);

  const auto row_of = [&](int row) { return m + row < pixels ? (m + row) * p.K : -1; };
  const int64_t k = pack.first_filter, end = k + pack.groups * pack.filters;
  if (partial)
    write_tile<Stored<T>, PixelTile, true>(epilogue, shared, row_of, k, end, pack.aligned, y,
                                           partial + block.quotient * 3 * p.K, p.K);
  else
    write_tile<Stored<T>, PixelTile, false>(epilogue, shared, row_of, k, end, pack.aligned, y, nullptr, 0);
}

template <class T>
__global__ void __launch_bounds__(PixelTile::kThreads, kPackedResidentBlocks)
    conv2d_packed_backward_input_kernel(Conv2dProblem p, int pack_groups, Epilogue epilogue, const Stored<T>* dy,
                                        const Stored<T>* weight, Stored<T>* dx) {
  CNNOPS_DYNAMIC_SHARED(float, shared);
  const Split block = split(blockIdx.x, ceil_div(p.groups, pack_groups));
  const Split part = split(block.quotient, ceil_div(largest_class(p), PixelTile::kM));
  const int64_t m = part.remainder * PixelTile::kM;
  const InputClass at(p, part.quotient);
  if (m >= at.pixels) return;
  const Pack pack = Pack::of<T>(p, pack_groups, block.remainder);
  const PackedRows<Stored<T>, kSlots<T>> a(dy + pack.first_filter, pack.groups * pack.filters, pack.aligned, p.K, at.h,
                                           at.w, at.pixels);
  multiply_squares<T, false>(p, pack, a, m, at.parity_h, at.parity_w, weight, shared);

  const auto row_of = [&](int row) { return at.row_of(p, m + row); };
  write_tile<Stored<T>, PixelTile, false>(epilogue, shared, row_of, pack.first_channel,
                                          pack.first_channel + pack.groups * pack.channels, pack.aligned, dx, nullptr,
                                          0);
}

// slabs[slab][k][r,s,c] = the sum over pixels [slab * pixels_per_slab, ..).
template <class T>
__global__ void __launch_bounds__(WeightTile<T>::kThreads, kPackedResidentBlocks)
    conv2d_packed_backward_weight_kernel(Conv2dProblem p, int pack_groups, int64_t pixels_per_slab, const Stored<T>* dy,
                                         const Stored<T>* x, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(float, shared);
  using Tile = WeightTile<T>;
  constexpr int kTaps = Tile::kN / kSlots<T>;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q;
  const Split tap_tile = split(blockIdx.x, ceil_div(p.R * p.S, kTaps));
  const Split part = split(tap_tile.quotient, ceil_div(p.groups, pack_groups));
  const Pack pack = Pack::of<T>(p, pack_groups, part.remainder);
  const int64_t begin = part.quotient * pixels_per_slab;
  const int64_t end = begin + pixels_per_slab < pixels ? begin + pixels_per_slab : pixels;

  MatrixColumns<Stored<T>> a(dy + pack.first_filter, end, pack.groups * pack.filters, p.K);
  a.vectorised = pack.aligned;
  const PackedColumns<Stored<T>, kSlots<T>> b(x + pack.first_channel, pack.groups * pack.channels, pack.aligned, p.C,
                                              taps_of_outputs(p.P, p.R, p.H, p.stride_h, p.pad_h, p.dilation_h),
                                              taps_of_outputs(p.Q, p.S, p.W, p.stride_w, p.pad_w, p.dilation_w), end);
  // Of the 2 x 4 fragments that a warp has for its tap, or 2 x 2 of TF32, those on the diagonal.
  unsigned needed = 0;
  CNNOPS_UNROLL
  for (int i = 0; i < 8; ++i)
    needed |= static_cast<unsigned>(Pack::meet(i / 4 * 16, 16, pack.filters, i % 4 * 8, 8, pack.channels)) << i;
  multiply<T, Tile, false, false>(a, b, 0, tap_tile.remainder * Tile::kN, begin, end, shared, [&](int m, int n, int) {
    return (needed >> (m / 16 * 4 + n % kSlots<T> / 8) & 1) != 0;
  });

  const int filters = pack.groups * pack.filters;
  for (int i = static_cast<int>(threadIdx.x); i < filters * kTaps * pack.channels; i += Tile::kThreads) {
    const int c = i % pack.channels, tap = i / pack.channels % kTaps, filter = i / pack.channels / kTaps;
    const int64_t tap_of_all = tap_tile.remainder * kTaps + tap;
    if (tap_of_all >= p.R * p.S) continue;
    const int64_t row = part.quotient * p.K + pack.first_filter + filter;
    slabs[(row * p.R * p.S + tap_of_all) * pack.channels + c] =
        shared[filter * kSumsPitch<Tile> + tap * kSlots<T> + filter / pack.filters * pack.channels + c];
  }
}

int64_t moment_tiles(const Conv2dProblem& p) { return ceil_div(int64_t{p.N} * p.P * p.Q, PixelTile::kM); }

template <class T>
void launch_forward(const Conv2dProblem& p, const Epilogue& epilogue, const void* x, const void* weight, void* y,
                    void* workspace, Stream stream) {
  using Number = Stored<T>;
  constexpr size_t kShared = shared_bytes<T, PixelTile, true, true>();
  auto* const partial = epilogue.mean ? static_cast<float*>(workspace) : nullptr;
  CNNOPS_LAUNCH(conv2d_packed_forward_kernel<T>, blocks(moment_tiles(p) * packs<T>(p)), PixelTile::kThreads, kShared,
                stream, p, groups_of_a_pack<T>(p), epilogue, static_cast<const Number*>(x),
                static_cast<const Number*>(weight), static_cast<Number*>(y), partial);
  if (partial) finish_moments(moment_tiles(p), p.K, partial, epilogue, stream);
}

template <class T>
void launch_backward_input(const Conv2dProblem& p, const Epilogue& epilogue, const void* dy, const void* weight,
                           void* dx, Stream stream) {
  using Number = Stored<T>;
  constexpr size_t kShared = shared_bytes<T, PixelTile, true, true>();
  const int64_t count =
      ceil_div(largest_class(p), PixelTile::kM) * classes(p.H, p.stride_h) * classes(p.W, p.stride_w) * packs<T>(p);
  CNNOPS_LAUNCH(conv2d_packed_backward_input_kernel<T>, blocks(count), PixelTile::kThreads, kShared, stream, p,
                groups_of_a_pack<T>(p), epilogue, static_cast<const Number*>(dy), static_cast<const Number*>(weight),
                static_cast<Number*>(dx));
}

template <class T>
void launch_backward_weight(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x,
                            void* dweight, float* slabs, Stream stream) {
  using Number = Stored<T>;
  using Tile = WeightTile<T>;
  constexpr size_t kShared = shared_bytes<T, Tile, false, false>();
  const int64_t count = ceil_div(p.R * p.S, Tile::kN / kSlots<T>) * packs<T>(p) * plan.splits;
  CNNOPS_LAUNCH(conv2d_packed_backward_weight_kernel<T>, blocks(count), Tile::kThreads, kShared, stream, p,
                groups_of_a_pack<T>(p), ceil_div(int64_t{p.N} * p.P * p.Q, plan.splits), static_cast<const Number*>(dy),
                static_cast<const Number*>(x), slabs);
  add_slabs(p.dtype, plan.splits, slab_size(p), slabs, dweight, stream);
}

}  // namespace

const Conv2dFamily kPackedConv2d = {
    .forward_workspace = [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue) -> int64_t {
      return epilogue.mean ? moment_tiles(p) * 3 * p.K * int64_t{sizeof(float)} : 0;
    },
    .forward =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* x, const void* weight,
           void* y, void* workspace, Stream stream) {
          for_numbers(p, [&]<class T>(T) { launch_forward<T>(p, epilogue, x, weight, y, workspace, stream); });
        },
    .backward_input_workspace = [](const Conv2dProblem&, const Conv2dPlan&) -> int64_t { return 0; },
    .backward_input =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* dy, const void* weight,
           void* dx, void*, Stream stream) {
          for_numbers(p, [&]<class T>(T) { launch_backward_input<T>(p, epilogue, dy, weight, dx, stream); });
        },
    .backward_weight_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan) -> int64_t {
      return plan.splits * slab_size(p) * int64_t{sizeof(float)};
    },
    .backward_weight =
        [](const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, void* dweight,
           void* workspace, Stream stream) {
          for_numbers(p, [&]<class T>(T) {
            launch_backward_weight<T>(p, plan, dy, x, dweight, static_cast<float*>(workspace), stream);
          });
        },
};

}  // namespace cnnops::cuda
