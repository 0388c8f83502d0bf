// Convolution of few input channels, whose taps and channels together are the sum's axis: the im2col matrix of a tile
// of pixels is built in shared memory.
//
//   y[n,p,q,k]       = sum over (r,s,c) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s,c]
//   dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//
// Layout     x [N,H,W,C], C <= 4; y, dy [N,P,Q,K]; weight, dweight [K,R,S,C].
// Ownership  A block goes through 8 x 8 tiles of pixels for 64 filters, whose weights it keeps. dweight's sums over
//            tiles are cut into slabs of float, which a second kernel adds in order.
// Traffic    x once for each tile whose taps read it, going forward while the tile before is multiplied: rows of x are
//            contiguous, whatever C is. weight once for each block, y or dy once.

#include <algorithm>

#include "conv2d.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kSide = 8, kPixels = kSide * kSide, kFilters = 64;
constexpr int kBlocksPerMultiprocessor = 4;  // of the forward pass, which goes on to the next tile

using ForwardTile = Shape<kPixels, kFilters, 2, 2, 1, false>;
using ShortTile = Shape<kFilters, 32, 2, 1, 1, false>;  // of dweight, for 3 x 3 filters of 3 channels
using LongTile = Shape<kFilters, 160, 1, 5, 1, false>;  // for 7 x 7

// The part of x that a tile's taps read, as rows of `pitch` elements in shared memory.
struct Halo {
  int rows, columns, pitch;

  template <class T>
  static __host__ __device__ Halo of(const Conv2dProblem& p) {
    const int rows = (kSide - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
    const int columns = (kSide - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1;
    constexpr int kElements = kVectorOf<T>;
    return {rows, columns, (columns * p.C + 2 * kElements - 2) / kElements * kElements};
  }
};

// A tile's place among all: q fastest, then p, then n.
struct PixelTile {
  int64_t n;
  int p, q;

  __device__ PixelTile(const Conv2dProblem& problem, int64_t index) {
    const Split column = split(index, ceil_div(problem.Q, kSide)),
                row = split(column.quotient, ceil_div(problem.P, kSide));
    n = row.quotient;
    p = static_cast<int>(row.remainder) * kSide;
    q = static_cast<int>(column.remainder) * kSide;
  }
  // The number of a tile's pixel among all, or -1 for one beside the image.
  __device__ int64_t pixel(const Conv2dProblem& problem, int m) const {
    const int row = p + m / kSide, column = q + m % kSide;
    return row < problem.P && column < problem.Q ? (n * problem.P + row) * problem.Q + column : -1;
  }
};

__host__ __device__ inline int64_t pixel_tiles(const Conv2dProblem& p) {
  return p.N * ceil_div(p.P, kSide) * ceil_div(p.Q, kSide);
}

// Brings x to `halo` and makes im2col rows of it. Rows of x start at the same place within 16 bytes, or are copied
// element by element.
template <class T, int kThreads>
class Im2col {
 public:
  using Number = Stored<T>;

  // `taps` has an int for each of `depth` elements of a row, a multiple of kVector. All threads of the block make one
  // and meet before build(); the first kThreads of them load() and build().
  __device__ Im2col(const Conv2dProblem& p, const Number* x, Number* halo, int* taps, int depth)
      : p_(p), x_(x), shape_(Halo::of<T>(p)), halo_(halo), taps_(taps), depth_(depth) {
    for (int k = static_cast<int>(threadIdx.x); k < depth; k += static_cast<int>(blockDim.x)) {
      const int tap = k / p.C, r = tap / p.S, s = tap - r * p.S;
      taps[k] = r < p.R ? r * p.dilation_h * shape_.pitch + s * p.dilation_w * p.C + k - tap * p.C : -1;
    }
  }

  // Starts copies of the tile's part of x, with zeros for what is beside it.
  __device__ void load(const PixelTile& tile) const {
    const int first_row = tile.p * p_.stride_h - p_.pad_h, first = (tile.q * p_.stride_w - p_.pad_w) * p_.C;
    const int phase = phase_of(tile), row_elements = p_.W * p_.C, vectors = shape_.pitch / kVectorOf<T>;
    for (int i = static_cast<int>(threadIdx.x); i < shape_.rows * vectors; i += kThreads) {
      const int halo_row = i / vectors, vector = i - halo_row * vectors;
      const int row = first_row + halo_row, element = first - phase + vector * kVectorOf<T>;
      Number* const to = halo_ + halo_row * shape_.pitch + vector * kVectorOf<T>;
      const bool inside = row >= 0 && row < p_.H;
      const Number* const from = x_ + (tile.n * p_.H + row) * row_elements + element;
      if (inside && rows_aligned() && element >= 0 && element + kVectorOf<T> <= row_elements) {
        copy_async_16(to, from, true);
      } else {
        for (int e = 0; e < kVectorOf<T>; ++e)
          to[e] = inside && element + e >= 0 && element + e < row_elements ? from[e] : Number{};
      }
    }
  }

  // to(m, v) is where vector v of pixel m's row belongs.
  template <class To>
  __device__ void build(const PixelTile& tile, const To& to) const {
    const int m = static_cast<int>(threadIdx.x) % kPixels;
    const Number* const pixel =
        halo_ + m / kSide * p_.stride_h * shape_.pitch + m % kSide * p_.stride_w * p_.C + phase_of(tile);
    for (int v = static_cast<int>(threadIdx.x) / kPixels; v < depth_ / kVectorOf<T>; v += kThreads / kPixels) {
      Vector<Number> row;
      CNNOPS_UNROLL
      for (int e = 0; e < kVectorOf<T>; ++e) {
        const int tap = taps_[v * kVectorOf<T> + e];
        row.at[e] = tap < 0 ? Number{} : pixel[tap];
      }
      *reinterpret_cast<Vector<Number>*>(to(m, v)) = row;
    }
  }

 private:
  __device__ bool rows_aligned() const { return p_.W * p_.C % kVectorOf<T> == 0; }
  __device__ int phase_of(const PixelTile& tile) const {
    if (!rows_aligned()) return 0;
    const int element = (tile.q * p_.stride_w - p_.pad_w) * p_.C % kVectorOf<T>;
    return element < 0 ? element + kVectorOf<T> : element;
  }

  const Conv2dProblem& p_;
  const Number* const x_;
  const Halo shape_;
  Number* const halo_;
  int* const taps_;
  const int depth_;
};

// The parts of dynamic shared memory, in bytes from its start: the im2col tiles, where the sums lie afterwards; the
// other operand's tiles; the halo; the taps' places.
struct Layout {
  int steps;  // of the product
  size_t other, halo, taps, end;

  template <class T, class Tile>
  static __host__ __device__ Layout make(const Conv2dProblem& p, int steps, int im2col_elements, int other_elements,
                                         int depth) {
    const size_t im2col = steps * im2col_elements * sizeof(Stored<T>),
                 sums = Tile::kM * kSumsPitch<Tile> * sizeof(float);
    const Halo halo = Halo::of<T>(p);
    Layout at{steps, im2col > sums ? im2col : sums, 0, 0, 0};
    at.halo = at.other + steps * other_elements * sizeof(Stored<T>);
    at.taps = at.halo + halo.rows * halo.pitch * sizeof(Stored<T>);
    at.end = at.taps + depth * sizeof(int);
    return at;
  }
  template <class T>
  static __host__ __device__ Layout forward(const Conv2dProblem& p) {
    using Product = cuda::Product<T, ForwardTile, true, true>;
    const int steps = static_cast<int>(ceil_div(p.R * p.S * p.C, kBlockK<T>));
    return make<T, ForwardTile>(p, steps, Product::A::kElements, Product::B::kElements, steps * kBlockK<T>);
  }
  template <class T, class Tile>
  static __host__ __device__ Layout backward_weight(const Conv2dProblem& p) {
    using Product = cuda::Product<T, Tile, false, false>;
    return make<T, Tile>(p, kPixels / kBlockK<T>, Product::B::kElements, Product::A::kElements, Tile::kN);
  }
};

template <class T>
__global__ void __launch_bounds__(ForwardTile::kThreads, kResidentBlocks<T, ForwardTile>)
    conv2d_stem_forward_kernel(Conv2dProblem p, Epilogue epilogue, const Stored<T>* x, const Stored<T>* weight,
                               Stored<T>* y, float* partial) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  using Product = cuda::Product<T, ForwardTile, true, true>;
  using Number = Stored<T>;
  const Layout at = Layout::forward<T>(p);
  auto* const im2col = reinterpret_cast<Number*>(shared);
  auto* const filters = reinterpret_cast<Number*>(shared + at.other);
  const int gemm_k = p.R * p.S * p.C;
  const Im2col<T, ForwardTile::kThreads> input(p, x, reinterpret_cast<Number*>(shared + at.halo),
                                               reinterpret_cast<int*>(shared + at.taps), at.steps * kBlockK<T>);
  const Split block = split(blockIdx.x, ceil_div(p.K, kFilters));
  const int64_t first_filter = block.remainder * kFilters, tiles = pixel_tiles(p);
  const int64_t stride = ceil_div(gridDim.x, ceil_div(p.K, kFilters));
  for (int i = static_cast<int>(threadIdx.x); i < at.steps * kFilters * kBlockK<T>; i += ForwardTile::kThreads) {
    const int k = i % (at.steps * kBlockK<T>), filter = i / (at.steps * kBlockK<T>);
    filters[k / kBlockK<T> * Product::B::kElements + filter * Product::B::kPitch + k % kBlockK<T>] =
        k < gemm_k && first_filter + filter < p.K ? weight[(first_filter + filter) * gemm_k + k] : Number{};
  }

  int64_t index = block.quotient;
  input.load(PixelTile(p, index));
  commit_async();
  for (; index < tiles; index += stride) {
    const PixelTile tile(p, index);
    wait_async<0>();
    __syncthreads();  // the halo has landed, and nobody reads the sums before any more
    input.build(tile, [&](int m, int v) {
      return im2col + v / 4 * Product::A::kElements + m * Product::A::kPitch + v % 4 * kVectorOf<T>;
    });
    __syncthreads();  // nobody reads the halo any more
    if (index + stride < tiles) input.load(PixelTile(p, index + stride));
    commit_async();
    Product product;
    for (int step = 0; step < at.steps; ++step)
      product.multiply(im2col + step * Product::A::kElements, filters + step * Product::B::kElements, All{});
    __syncthreads();
    product.store(reinterpret_cast<float*>(shared), kSumsPitch<ForwardTile>);
    __syncthreads();
    const auto row_of = [&](int m) {
      const int64_t pixel = tile.pixel(p, m);
      return pixel < 0 ? -1 : pixel * p.K;
    };
    const bool aligned = p.K % kVectorOf<T> == 0;
    if (partial)
      write_tile<Number, ForwardTile, true>(epilogue, shared, row_of, first_filter, p.K, aligned, y,
                                            partial + index * 3 * p.K, p.K);
    else
      write_tile<Number, ForwardTile, false>(epilogue, shared, row_of, first_filter, p.K, aligned, y, nullptr, 0);
  }
}

// slabs[slab][k][r,s,c] = the sum over tiles [slab * tiles_per_slab, ..).
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    conv2d_stem_backward_weight_kernel(Conv2dProblem p, int64_t tiles_per_slab, const Stored<T>* dy, const Stored<T>* x,
                                       float* slabs) {
  CNNOPS_DYNAMIC_SHARED(char, shared);
  using Product = cuda::Product<T, Tile, false, false>;
  using Number = Stored<T>;
  constexpr int kImThreads = Tile::kThreads / kPixels * kPixels;  // so that each has one pixel
  const Layout at = Layout::backward_weight<T, Tile>(p);
  auto* const im2col = reinterpret_cast<Number*>(shared);
  auto* const dy_tiles = reinterpret_cast<Number*>(shared + at.other);
  const Im2col<T, kImThreads> input(p, x, reinterpret_cast<Number*>(shared + at.halo),
                                    reinterpret_cast<int*>(shared + at.taps), Tile::kN);
  const Split block = split(blockIdx.x, ceil_div(p.K, kFilters));
  const int64_t first_filter = block.remainder * kFilters, first_tile = block.quotient * tiles_per_slab;
  const int64_t tiles = pixel_tiles(p), end = first_tile + tiles_per_slab < tiles ? first_tile + tiles_per_slab : tiles;

  Product product;
  for (int64_t index = first_tile; index < end; ++index) {
    const PixelTile tile(p, index);
    __syncthreads();  // nobody reads the tiles before any more
    if (static_cast<int>(threadIdx.x) < kImThreads) input.load(tile);
    constexpr int kVectors = kFilters / kVectorOf<T>;
    for (int i = static_cast<int>(threadIdx.x); i < kPixels * kVectors; i += Tile::kThreads) {
      const int m = i / kVectors, column = i % kVectors * kVectorOf<T>;
      const int64_t pixel = tile.pixel(p, m), filter = first_filter + column;
      Number* const to =
          dy_tiles + m / kBlockK<T> * Product::A::kElements + m % kBlockK<T> * Product::A::kPitch + column;
      if (p.K % kVectorOf<T> == 0) {
        const bool inside = pixel >= 0 && filter < p.K;
        copy_async_16(to, inside ? dy + pixel * p.K + filter : dy, inside);
      } else {
        for (int e = 0; e < kVectorOf<T>; ++e)
          to[e] = pixel >= 0 && filter + e < p.K ? dy[pixel * p.K + filter + e] : Number{};
      }
    }
    commit_async();
    wait_async<0>();
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < kImThreads)
      input.build(tile, [&](int m, int v) {
        return im2col + m / kBlockK<T> * Product::B::kElements + m % kBlockK<T> * Product::B::kPitch + v * kVectorOf<T>;
      });
    __syncthreads();
    for (int step = 0; step < at.steps; ++step)
      product.multiply(dy_tiles + step * Product::A::kElements, im2col + step * Product::B::kElements, All{});
  }
  __syncthreads();
  product.store(reinterpret_cast<float*>(shared), kSumsPitch<Tile>);
  __syncthreads();
  const int gemm_n = p.R * p.S * p.C;
  const auto* const sums = reinterpret_cast<const float*>(shared);
  for (int i = static_cast<int>(threadIdx.x); i < kFilters * gemm_n; i += Tile::kThreads) {
    const int filter = i / gemm_n, n = i - filter * gemm_n;
    if (first_filter + filter < p.K)
      slabs[(block.quotient * p.K + first_filter + filter) * gemm_n + n] = sums[filter * kSumsPitch<Tile> + n];
  }
}

}  // namespace

size_t stem_shared_bytes(const Conv2dProblem& p) {
  size_t bytes = 0;
  for_numbers(p, [&]<class T>(T) {
    bytes = std::max(Layout::forward<T>(p).end, p.R * p.S * p.C <= ShortTile::kN
                                                    ? Layout::backward_weight<T, ShortTile>(p).end
                                                    : Layout::backward_weight<T, LongTile>(p).end);
  });
  return bytes;
}

const Conv2dFamily kStemConv2d = {
    .forward_workspace = [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue) -> int64_t {
      return epilogue.mean ? pixel_tiles(p) * 3 * p.K * int64_t{sizeof(float)} : 0;
    },
    .forward =
        [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* x, const void* weight,
           void* y, void* workspace, Stream stream) {
          auto* const partial = epilogue.mean ? static_cast<float*>(workspace) : nullptr;
          const int64_t filter_tiles = ceil_div(p.K, kFilters);
          const int64_t resident = ceil_div(int64_t{kBlocksPerMultiprocessor} * device().multiprocessors, filter_tiles);
          for_numbers(p, [&]<class T>(T) {
            using Number = Stored<T>;
            CNNOPS_LAUNCH(conv2d_stem_forward_kernel<T>, blocks(std::min(pixel_tiles(p), resident) * filter_tiles),
                          ForwardTile::kThreads, Layout::forward<T>(p).end, stream, p, epilogue,
                          static_cast<const Number*>(x), static_cast<const Number*>(weight), static_cast<Number*>(y),
                          partial);
          });
          if (partial) finish_moments(pixel_tiles(p), p.K, partial, epilogue, stream);
        },
    .backward_input_workspace = nullptr,
    .backward_input = nullptr,
    .backward_weight_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan) -> int64_t {
      return plan.splits * slab_size(p) * int64_t{sizeof(float)};
    },
    .backward_weight =
        [](const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, void* dweight,
           void* workspace, Stream stream) {
          auto* const slabs = static_cast<float*>(workspace);
          for_numbers(p, [&]<class T>(T) {
            using Number = Stored<T>;
            with_tile<ShortTile, LongTile>(plan, [&]<class Tile>(Tile) {
              CNNOPS_LAUNCH((conv2d_stem_backward_weight_kernel<T, Tile>),
                            blocks(ceil_div(p.K, kFilters) * plan.splits), Tile::kThreads,
                            (Layout::backward_weight<T, Tile>(p).end), stream, p, ceil_div(pixel_tiles(p), plan.splits),
                            static_cast<const Number*>(dy), static_cast<const Number*>(x), slabs);
            });
          });
          add_slabs(p.dtype, plan.splits, slab_size(p), slabs, dweight, stream);
        },
};

}  // namespace cnnops::cuda
