// The tiled matrix product under every dense kernel: D[m,n] = sum over k of A[m,k] * B[n,k], for one tile of D.
//
// A and B are read through operands, which know where an element lies in memory and which ones are zero. One of an
// operand's axes is k, along which the tiles walk without a division; elements that are consecutive along its inner
// axis, which is k or the other one, are consecutive in memory:
//
//   Fixed fixed(int64_t i)        what all elements of a row m of A, or n of B, have in common
//   Walk walk(int64_t k)          a place on the axis k; advance(Walk&, int by) goes on from there
//   const T* at(Fixed, Walk)      the element's address, or null for a zero
//   bool vectorised               whether kVector elements from a multiple of kVector on along the inner axis are all
//                                 zeros or all in memory, aligned to 16 bytes
//   const T* readable             any address, for copies that read nothing
//
// Tiles go through a ring in shared memory, filled by cp.async where the operand is vectorised and element by element
// where it is not. A tile keeps memory's order: [m or n][k], or [k][m or n].
#pragma once

#include "epilogue.cuh"

namespace cnnops::cuda {

// Floats that are multiplied in TF32. Exact floats are `float`.
struct Tf32 {};

template <class T>
struct StoredAs {
  using Type = T;
};
template <>
struct StoredAs<Tf32> {
  using Type = float;
};
template <class T>
using Stored = typename StoredAs<T>::Type;

template <class T>
constexpr int kVectorOf = kVector<Stored<T>>;
template <class T>
constexpr int kBlockK = 4 * kVectorOf<T>;

// A tile of D, how warps share it, and how many steps of k the ring holds. kAligned: both operands are vectorised.
template <int kBlockM, int kBlockN, int kWarpRows, int kWarpColumns, int kRingStages, bool kIsAligned>
struct Shape {
  static constexpr int kM = kBlockM, kN = kBlockN, kWarpsM = kWarpRows, kWarpsN = kWarpColumns, kStages = kRingStages;
  static constexpr bool kAligned = kIsAligned;
  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
};

// As many blocks as their sums and fragments leave registers for: said to the compiler, which otherwise saves registers
// for one more and spills. Exact floats have wider fragments.
template <class T, class Shape>
constexpr int kResidentBlocks = (Shape::kM * Shape::kN / Shape::kThreads <= 32   ? 4
                                 : Shape::kM * Shape::kN / Shape::kThreads <= 64 ? 3
                                                                                 : 2) -
                                (std::is_same_v<T, float> ? 1 : 0);

// A tile of kLength rows m or n. The padding makes what a warp reads together start in different banks: rows of 80
// bytes for ldmatrix along k; across k, rows that are 16 bytes off for ldmatrix and 8 words off for words of TF32.
template <class T, int kThreads, int kLength, bool kInnerIsK>
struct Tile {
  static constexpr int kOuter = kInnerIsK ? kLength : kBlockK<T>, kInner = kInnerIsK ? kBlockK<T> : kLength;
  static constexpr int kPitch = kInner + (kInnerIsK ? kVectorOf<T> : 8);
  static constexpr int kElements = kOuter * kPitch;
  static constexpr int kVectorsPerRow = kInner / kVectorOf<T>, kThreadCount = kThreads;
  static constexpr int kRowsPerPass = kThreads / kVectorsPerRow;
  static constexpr int kPasses = kOuter / kRowsPerPass;
};

// Fills tiles of one operand, each further along k by kBlockK than the one before. A thread has the same column of
// vectors in every pass.
template <class T, class Tile, bool kInnerIsK, bool kAligned, class Operand>
class Loader {
  static_assert(Tile::kThreadCount % Tile::kVectorsPerRow == 0 && Tile::kOuter % Tile::kRowsPerPass == 0);

 public:
  __device__ Loader(const Operand& operand, int64_t first, int64_t k_begin)
      : operand_(operand),
        row_(static_cast<int>(threadIdx.x) / Tile::kVectorsPerRow),
        column_(static_cast<int>(threadIdx.x) % Tile::kVectorsPerRow * kVectorOf<T>),
        first_(first + column_),
        walk_(operand.walk(k_begin + (kInnerIsK ? column_ : row_))) {
    CNNOPS_UNROLL
    for (int i = 0; i < kFixed; ++i)
      fixed_[i] = operand.fixed(kInnerIsK ? first + row_ + i * Tile::kRowsPerPass : first + column_);
  }

  __device__ void load(Stored<T>* tile) {
    CNNOPS_UNROLL
    for (int i = 0; i < Tile::kPasses; ++i) {
      put(tile + (row_ + i * Tile::kRowsPerPass) * Tile::kPitch + column_, fixed_[kInnerIsK ? i : 0]);
      if constexpr (!kInnerIsK) operand_.advance(walk_, Tile::kRowsPerPass);
    }
    if constexpr (kInnerIsK) operand_.advance(walk_, kBlockK<T>);
  }

 private:
  static constexpr int kFixed = kInnerIsK ? Tile::kPasses : 1;

  __device__ void put(Stored<T>* to, const typename Operand::Fixed& fixed) const {
    if (kAligned || operand_.vectorised) {
      const Stored<T>* const from = operand_.at(fixed, walk_);
      copy_async_16(to, from ? from : operand_.readable, from != nullptr);
      return;
    }
    typename Operand::Walk walk = walk_;
    for (int e = 0; e < kVectorOf<T>; ++e) {
      const Stored<T>* const from = operand_.at(kInnerIsK ? fixed : operand_.fixed(first_ + e), walk);
      to[e] = from ? *from : Stored<T>{};
      if (kInnerIsK) operand_.advance(walk, 1);
    }
  }

  const Operand& operand_;
  const int row_, column_;
  const int64_t first_;
  typename Operand::Walk walk_;
  typename Operand::Fixed fixed_[kFixed];
};

// Fragments of mma.sync in tiles of either order. Half an operand's k, of 16 or in TF32 of 8 numbers, is 16 bytes.
template <class T, int kPitch, bool kInnerIsK>
struct Fragments {
  // A's 16 rows from m on, as quarters in mma's order: down m first, then along k.
  static __device__ void load_a(uint32_t (&a)[4], const Stored<T>* tile, int m, int k) {
    const int l = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kInnerIsK) {
      ldmatrix_x4<false>(a, tile + (m + l % 16) * kPitch + k + l / 16 * kVectorOf<T>);
      round(a);
    } else if constexpr (std::is_same_v<T, Tf32>) {
      words(a, tile + (k + l % 4) * kPitch + m + l / 4, 8, 4 * kPitch);
    } else {
      ldmatrix_x4<true>(a, tile + (k + l / 16 * 8 + l % 8) * kPitch + m + l / 8 % 2 * 8);
    }
  }
  // B's 16 rows from n on: two fragments of 8, each as its halves along k.
  static __device__ void load_b(uint32_t (&b)[4], const Stored<T>* tile, int n, int k) {
    const int l = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kInnerIsK) {
      ldmatrix_x4<false>(b, tile + (n + l / 16 * 8 + l % 8) * kPitch + k + l / 8 % 2 * kVectorOf<T>);
      round(b);
    } else if constexpr (std::is_same_v<T, Tf32>) {
      words(b, tile + (k + l % 4) * kPitch + n + l / 4, 4 * kPitch, 8);
    } else {
      ldmatrix_x4<true>(b, tile + (k + l / 8 % 2 * 8 + l % 8) * kPitch + n + l / 16 * 8);
    }
  }

  static __device__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, Tf32>)
      mma_m16n8k8_tf32(sum, a, b0, b1);
    else
      mma_m16n8k16<T>(sum, a, b0, b1);
  }

 private:
  static __device__ void round(uint32_t (&words)[4]) {
    if constexpr (std::is_same_v<T, Tf32>) {
      CNNOPS_UNROLL
      for (uint32_t& word : words) word = to_tf32(__uint_as_float(word));
    }
  }
  static __device__ void words(uint32_t (&out)[4], const float* at, int next, int after_next) {
    CNNOPS_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = to_tf32(at[i % 2 * next + i / 2 * after_next]);
  }
};

// This thread's part of D on the tensor cores, and how it multiplies two tiles: each warp owns a kM/kWarpsM x
// kN/kWarpsN part of D as fragments of 16 x 8.
template <class T, class Shape, bool kAInnerIsK, bool kBInnerIsK>
class Product {
 public:
  using A = Tile<T, Shape::kThreads, Shape::kM, kAInnerIsK>;
  using B = Tile<T, Shape::kThreads, Shape::kN, kBInnerIsK>;

  template <class Needed>
  __device__ void multiply(const Stored<T>* a_tile, const Stored<T>* b_tile, const Needed& needed) {
    using FragmentsA = Fragments<T, A::kPitch, kAInnerIsK>;
    using FragmentsB = Fragments<T, B::kPitch, kBInnerIsK>;
    CNNOPS_UNROLL
    for (int k = 0; k < kBlockK<T>; k += 2 * kVectorOf<T>) {
      uint32_t a[kDown][4], b[kAcross / 2][4];
      CNNOPS_UNROLL
      for (int i = 0; i < kDown; ++i) FragmentsA::load_a(a[i], a_tile, warp_m() + i * 16, k);
      CNNOPS_UNROLL
      for (int j = 0; j < kAcross / 2; ++j) FragmentsB::load_b(b[j], b_tile, warp_n() + j * 16, k);
      CNNOPS_UNROLL
      for (int i = 0; i < kDown; ++i) {
        CNNOPS_UNROLL
        for (int j = 0; j < kAcross; ++j)
          if (needed(warp_m() + i * 16, warp_n() + j * 8, k))
            FragmentsA::multiply(sum_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // Writes the sums to rows of kM x kN floats, `pitch` apart.
  __device__ void store(float* rows, int pitch) const {
    const int l = static_cast<int>(threadIdx.x) % 32;
    CNNOPS_UNROLL
    for (int i = 0; i < kDown; ++i) {
      CNNOPS_UNROLL
      for (int j = 0; j < kAcross; ++j) {
        CNNOPS_UNROLL
        for (int half = 0; half < 2; ++half) {
          float* const to = rows + (warp_m() + i * 16 + half * 8 + l / 4) * pitch + warp_n() + j * 8 + l % 4 * 2;
          *reinterpret_cast<Pair*>(to) = {sum_[i][j][half * 2], sum_[i][j][half * 2 + 1]};
        }
      }
    }
  }

 private:
  struct alignas(8) Pair {
    float first, second;
  };
  static constexpr int kDown = Shape::kM / Shape::kWarpsM / 16, kAcross = Shape::kN / Shape::kWarpsN / 8;
  static_assert(kDown > 0 && kAcross % 2 == 0);

  static __device__ int warp_m() {
    return static_cast<int>(threadIdx.x) / 32 / Shape::kWarpsN * (Shape::kM / Shape::kWarpsM);
  }
  static __device__ int warp_n() {
    return static_cast<int>(threadIdx.x) / 32 % Shape::kWarpsN * (Shape::kN / Shape::kWarpsN);
  }

  float sum_[kDown][kAcross][4] = {};
};

// Floats go to the CUDA cores, exactly: each thread owns kRows x kColumns elements and reads four steps of k at a time.
template <class Shape, bool kAInnerIsK, bool kBInnerIsK>
class Product<float, Shape, kAInnerIsK, kBInnerIsK> {
 public:
  using A = Tile<float, Shape::kThreads, Shape::kM, kAInnerIsK>;
  using B = Tile<float, Shape::kThreads, Shape::kN, kBInnerIsK>;

  template <class Needed>
  __device__ void multiply(const float* a_tile, const float* b_tile, const Needed&) {
    CNNOPS_UNROLL
    for (int k = 0; k < kBlockK<float>; k += 4) {
      float a[kRows][4];
      load<kAInnerIsK, A::kPitch, kRows, kThreadsM>(a, a_tile, thread_m(), 0, k);
      CNNOPS_UNROLL
      for (int j = 0; j < kColumns; j += 4) {
        float b[4][4];
        load<kBInnerIsK, B::kPitch, 4, kThreadsN>(b, b_tile, thread_n(), j, k);
        CNNOPS_UNROLL
        for (int kk = 0; kk < 4; ++kk) {
          CNNOPS_UNROLL
          for (int i = 0; i < kRows; ++i) {
            CNNOPS_UNROLL
            for (int jj = 0; jj < 4; ++jj) sum_[i][j + jj] += a[i][kk] * b[jj][kk];
          }
        }
      }
    }
  }

  __device__ void store(float* rows, int pitch) const {
    CNNOPS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CNNOPS_UNROLL
      for (int j = 0; j < kColumns; ++j)
        rows[place<kAInnerIsK, kThreadsM>(thread_m(), i) * pitch + place<kBInnerIsK, kThreadsN>(thread_n(), j)] =
            sum_[i][j];
    }
  }

 private:
  static constexpr int kThreadsM = Shape::kM < 64 ? 8 : 16, kThreadsN = Shape::kThreads / kThreadsM;
  static constexpr int kRows = Shape::kM / kThreadsM, kColumns = Shape::kN / kThreadsN;

  static __device__ int thread_m() { return static_cast<int>(threadIdx.x) / kThreadsN; }
  static __device__ int thread_n() { return static_cast<int>(threadIdx.x) % kThreadsN; }

  // The tile's row of a thread's i-th element, chosen so that its reads are float4s: along k, or four rows together.
  template <bool kInnerIsK, int kAcross>
  static __device__ int place(int thread, int i) {
    return kInnerIsK ? thread + i * kAcross : (i / 4 * kAcross + thread) * 4 + i % 4;
  }

  template <bool kInnerIsK, int kPitch, int kCount, int kAcross>
  static __device__ void load(float (&out)[kCount][4], const float* tile, int thread, int first, int k) {
    CNNOPS_UNROLL
    for (int i = 0; i < kCount; i += kInnerIsK ? 1 : 4) {
      const int row = place<kInnerIsK, kAcross>(thread, first + i);
      if constexpr (kInnerIsK) {
        const float4 four = *reinterpret_cast<const float4*>(tile + row * kPitch + k);
        out[i][0] = four.x, out[i][1] = four.y, out[i][2] = four.z, out[i][3] = four.w;
      } else {
        CNNOPS_UNROLL
        for (int kk = 0; kk < 4; ++kk) {
          const float4 four = *reinterpret_cast<const float4*>(tile + (k + kk) * kPitch + row);
          out[i][kk] = four.x, out[i + 1][kk] = four.y, out[i + 2][kk] = four.z, out[i + 3][kk] = four.w;
        }
      }
    }
  }

  float sum_[kRows][kColumns] = {};
};

// The sums of a tile lie in the ring's memory once the ring is done with.
template <class Shape>
constexpr int kSumsPitch = Shape::kN + 4;

template <class T, class Shape, bool kAInnerIsK, bool kBInnerIsK>
constexpr int kStageElements = Tile<T, Shape::kThreads, Shape::kM, kAInnerIsK>::kElements +
                               Tile<T, Shape::kThreads, Shape::kN, kBInnerIsK>::kElements;

// The dynamic shared memory that `multiply` wants.
template <class T, class Shape, bool kAInnerIsK, bool kBInnerIsK>
constexpr size_t shared_bytes() {
  constexpr size_t kRing = Shape::kStages * kStageElements<T, Shape, kAInnerIsK, kBInnerIsK> * sizeof(Stored<T>);
  constexpr size_t kSums = Shape::kM * kSumsPitch<Shape> * sizeof(float);
  return kRing > kSums ? kRing : kSums;
}

// Whether the fragments at m, n and k of a tile have products that count: here all of them.
struct All {
  __device__ constexpr bool operator()(int, int, int) const { return true; }
};

// Leaves the sum over `steps` tiles in `shared` as rows of floats kSumsPitch apart, for all threads to read.
template <class T, class Shape, bool kAInnerIsK, bool kBInnerIsK, class LoaderA, class LoaderB, class Needed>
__device__ void multiply_tiles(LoaderA& a_loader, LoaderB& b_loader, int steps, void* shared, const Needed& needed) {
  using Product = Product<T, Shape, kAInnerIsK, kBInnerIsK>;
  constexpr int kStages = Shape::kStages;
  auto* const ring = static_cast<Stored<T>*>(shared);
  const auto a_tile = [&](int step) {
    return ring + step % kStages * kStageElements<T, Shape, kAInnerIsK, kBInnerIsK>;
  };
  const auto b_tile = [&](int step) { return a_tile(step) + Product::A::kElements; };
  const auto load = [&](int step) {
    if (step < steps) {
      a_loader.load(a_tile(step));
      b_loader.load(b_tile(step));
    }
    commit_async();  // also when empty, so that a step's group is always the same number of groups back
  };

  Product product;
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_async<kStages - 2>();
    // Now everyone's copies of this step have landed, and nobody reads the stage that is refilled below any more.
    __syncthreads();
    load(step + kStages - 1);
    product.multiply(a_tile(step), b_tile(step), needed);
  }
  __syncthreads();  // nobody reads the ring any more
  product.store(static_cast<float*>(shared), kSumsPitch<Shape>);
  __syncthreads();
}

// The tile of D at (m, n), summed over k in [k_begin, k_end). Operands are zero from k_end on.
template <class T, class Shape, bool kAInnerIsK, bool kBInnerIsK, class A, class B, class Needed = All>
__device__ void multiply(const A& a, const B& b, int64_t m, int64_t n, int64_t k_begin, int64_t k_end, void* shared,
                         const Needed& needed = {}) {
  using Product = Product<T, Shape, kAInnerIsK, kBInnerIsK>;
  Loader<T, typename Product::A, kAInnerIsK, Shape::kAligned, A> a_loader(a, m, k_begin);
  Loader<T, typename Product::B, kBInnerIsK, Shape::kAligned, B> b_loader(b, n, k_begin);
  const int steps = static_cast<int>(ceil_div(k_end - k_begin, kBlockK<T>));
  multiply_tiles<T, Shape, kAInnerIsK, kBInnerIsK>(a_loader, b_loader, steps, shared, needed);
}

// Writes the sums that `multiply` left, those of column n to y[row_of(m) + k + n] for k + n < k_end, through the
// epilogue. With kMoments, the moments of what was written go to partial[count, mean, m2][K], at filter k + n.
template <class T, class Shape, bool kMoments, class RowOf>
__device__ void write_tile(const Epilogue& epilogue, void* shared, const RowOf& row_of, int64_t k, int64_t k_end,
                           bool aligned, T* y, float* partial, int64_t K) {
  constexpr int kColumns = Shape::kN < 32 * kVector<T> ? Shape::kN : 32 * kVector<T>;
  constexpr int kRows = Shape::kM / Shape::kWarps;
  const int warp = static_cast<int>(threadIdx.x) / 32, first = warp * kRows;
  const auto* const sums = static_cast<const float*>(shared) + first * kSumsPitch<Shape>;
  const auto row = [&](int m) { return row_of(first + m); };
  Moments moments[kVector<T>];
  for (int n = 0; n < Shape::kN; n += kColumns)
    write_rows<T, kColumns, kMoments>(epilogue, sums + n, kSumsPitch<Shape>, kRows, row, k + n, k_end, aligned, y,
                                      moments);
  if constexpr (kMoments) {
    static_assert(kColumns == Shape::kN);
    merge_warps<T, kColumns, Shape::kWarps>(moments, shared, k, k_end, K, partial);
  }
}

}  // namespace cnnops::cuda
