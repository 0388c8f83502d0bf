// The tiled matrix product under every dense kernel: D[m,n] = sum over k of A[m,k] * B[n,k], for one 64 x 64 tile of D.
//
// A and B are read through operands, which know where an element lies in memory and which ones are zero. An operand is
// a matrix [outer][inner] whose consecutive inner elements are consecutive in memory:
//
//   Outer outer(int64_t i), Inner inner(int64_t i)   what all elements of a row, of a column have in common
//   Inner next(Inner)                                the column after
//   const T* at(Outer, Inner)                        the element's address, or null for a zero
//   bool vectorised                                  whether kVector elements from a multiple of kVector on are all
//                                                    zeros or all in memory, aligned to 16 bytes
//   const T* readable                                any address, for copies that read nothing
//
// Tiles go through a ring in shared memory, filled by cp.async where the operand is vectorised and element by element
// where it is not. The inner axis is k or the other one, and the tile keeps memory's order: [64][k] or [k][64].
#pragma once

#include "epilogue.cuh"

namespace cnnops::cuda {

constexpr int kBlock = 64;     // rows and columns of D that one thread block owns
constexpr int kThreads = 128;  // of one thread block
constexpr int kStages = 3;     // of the ring: two steps in flight while one is multiplied

template <class T>
constexpr int kBlockK = 4 * kVector<T>;

// A padding of one vector a row makes the rows that a warp reads together start in different banks.
template <class T, bool kInnerIsK>
struct Tile {
  static constexpr int kOuter = kInnerIsK ? kBlock : kBlockK<T>, kInner = kInnerIsK ? kBlockK<T> : kBlock;
  static constexpr int kPitch = kInner + kVector<T>;
  static constexpr int kElements = kOuter * kPitch;
  static constexpr int kVectorsPerRow = kInner / kVector<T>;
  static constexpr int kVectorsPerThread = kOuter * kVectorsPerRow / kThreads;
  static constexpr int kRowsPerPass = kThreads / kVectorsPerRow;
  static_assert(kThreads % kVectorsPerRow == 0 && kOuter % kRowsPerPass == 0);
};

// Fills tiles of one operand. Each thread has the same column of vectors in every pass, so what depends on the axis
// that is not k is worked out once.
template <class T, bool kInnerIsK, class Operand>
class Loader {
 public:
  using Shape = Tile<T, kInnerIsK>;

  __device__ Loader(const Operand& operand, int64_t first)
      : operand_(operand),
        row_(static_cast<int>(threadIdx.x) / Shape::kVectorsPerRow),
        column_(static_cast<int>(threadIdx.x) % Shape::kVectorsPerRow * kVector<T>) {
    if constexpr (kInnerIsK) {
      CNNOPS_UNROLL
      for (int i = 0; i < Shape::kVectorsPerThread; ++i)
        rows_[i] = operand.outer(first + row_ + i * Shape::kRowsPerPass);
    } else {
      inner_ = operand.inner(first + column_);
    }
  }

  __device__ void load(T* tile, int64_t k) const {
    if constexpr (kInnerIsK) {
      const auto inner = operand_.inner(k + column_);
      CNNOPS_UNROLL
      for (int i = 0; i < Shape::kVectorsPerThread; ++i) put(tile, i, rows_[i], inner);
    } else {
      CNNOPS_UNROLL
      for (int i = 0; i < Shape::kVectorsPerThread; ++i)
        put(tile, i, operand_.outer(k + row_ + i * Shape::kRowsPerPass), inner_);
    }
  }

 private:
  __device__ void put(T* tile, int pass, typename Operand::Outer outer, typename Operand::Inner inner) const {
    T* const to = tile + (row_ + pass * Shape::kRowsPerPass) * Shape::kPitch + column_;
    if (operand_.vectorised) {
      const T* const from = operand_.at(outer, inner);
      copy_async_16(to, from ? from : operand_.readable, from != nullptr);
      return;
    }
    for (int e = 0; e < kVector<T>; ++e, inner = operand_.next(inner)) {
      const T* const from = operand_.at(outer, inner);
      to[e] = from ? *from : T{};
    }
  }

  const Operand& operand_;
  const int row_, column_;
  typename Operand::Outer rows_[kInnerIsK ? Shape::kVectorsPerThread : 1];
  typename Operand::Inner inner_;
};

// This thread's part of D, and how it multiplies two tiles. Sixteen-bit numbers go to the tensor cores: each of four
// warps owns a 32 x 32 quarter of D, as 2 x 4 fragments of 16 x 8.
template <class T, bool kAInnerIsK, bool kBInnerIsK>
class Product {
 public:
  __device__ void multiply(const T* a_tile, const T* b_tile) {
    CNNOPS_UNROLL
    for (int k = 0; k < kBlockK<T>; k += 16) {
      uint32_t a[2][4], b[2][4];
      CNNOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        load_a(a[i], a_tile, warp_m() + i * 16, k);
        load_b(b[i], b_tile, warp_n() + i * 16, k);
      }
      CNNOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        CNNOPS_UNROLL
        for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sum_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // f(row(m), n, sum) for every element that this thread holds, m and n within the tile; row once for each m.
  template <class Row, class F>
  __device__ void for_each(Row&& row, F&& f) const {
    CNNOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto at = row(warp_m() + i * 8 + lane() / 4);
      CNNOPS_UNROLL
      for (int j = 0; j < 8; ++j)
        f(at, warp_n() + j / 2 * 8 + lane() % 4 * 2 + j % 2, sum_[i / 2][j / 2][i % 2 * 2 + j % 2]);
    }
  }

 private:
  using A = Tile<T, kAInnerIsK>;
  using B = Tile<T, kBInnerIsK>;

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ int warp_m() { return static_cast<int>(threadIdx.x) / 64 * 32; }
  static __device__ int warp_n() { return static_cast<int>(threadIdx.x) / 32 % 2 * 32; }

  // The 16 x 16 fragment's quarters in mma's order: down m first, then along k.
  static __device__ void load_a(uint32_t (&a)[4], const T* tile, int m, int k) {
    const int l = lane();
    if constexpr (kAInnerIsK)
      ldmatrix_x4<false>(a, tile + (m + l % 16) * A::kPitch + k + l / 16 * 8);
    else
      ldmatrix_x4<true>(a, tile + (k + l / 16 * 8 + l % 8) * A::kPitch + m + l / 8 % 2 * 8);
  }
  // Two fragments of 16 x 8, each as its two quarters along k.
  static __device__ void load_b(uint32_t (&b)[4], const T* tile, int n, int k) {
    const int l = lane();
    if constexpr (kBInnerIsK)
      ldmatrix_x4<false>(b, tile + (n + l / 16 * 8 + l % 8) * B::kPitch + k + l / 8 % 2 * 8);
    else
      ldmatrix_x4<true>(b, tile + (k + l / 8 % 2 * 8 + l % 8) * B::kPitch + n + l / 16 * 8);
  }

  float sum_[2][4][4] = {};
};

// Floats go to the CUDA cores, exactly: each thread owns 4 x 8 elements and reads four steps of k at a time.
template <bool kAInnerIsK, bool kBInnerIsK>
class Product<float, kAInnerIsK, kBInnerIsK> {
 public:
  __device__ void multiply(const float* a_tile, const float* b_tile) {
    CNNOPS_UNROLL
    for (int k = 0; k < kBlockK<float>; k += 4) {
      float a[kRows][4], b[kColumns][4];
      load<kAInnerIsK, kRows, kThreadsM>(a, a_tile, thread_m(), k);
      load<kBInnerIsK, kColumns, kThreadsN>(b, b_tile, thread_n(), k);
      CNNOPS_UNROLL
      for (int kk = 0; kk < 4; ++kk) {
        CNNOPS_UNROLL
        for (int i = 0; i < kRows; ++i) {
          CNNOPS_UNROLL
          for (int j = 0; j < kColumns; ++j) sum_[i][j] += a[i][kk] * b[j][kk];
        }
      }
    }
  }

  template <class Row, class F>
  __device__ void for_each(Row&& row, F&& f) const {
    CNNOPS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const auto at = row(place<kAInnerIsK, kThreadsM>(thread_m(), i));
      CNNOPS_UNROLL
      for (int j = 0; j < kColumns; ++j) f(at, place<kBInnerIsK, kThreadsN>(thread_n(), j), sum_[i][j]);
    }
  }

 private:
  static constexpr int kThreadsM = 16, kThreadsN = kThreads / kThreadsM;
  static constexpr int kRows = kBlock / kThreadsM, kColumns = kBlock / kThreadsN;

  static __device__ int thread_m() { return static_cast<int>(threadIdx.x) / kThreadsN; }
  static __device__ int thread_n() { return static_cast<int>(threadIdx.x) % kThreadsN; }

  // The tile's row of a thread's i-th element, chosen so that its reads are float4s: along k, or four rows together.
  template <bool kInnerIsK, int kAcross>
  static __device__ int place(int thread, int i) {
    return kInnerIsK ? thread + i * kAcross : (i / 4 * kAcross + thread) * 4 + i % 4;
  }

  template <bool kInnerIsK, int kCount, int kAcross>
  static __device__ void load(float (&out)[kCount][4], const float* tile, int thread, int k) {
    constexpr int kPitch = Tile<float, kInnerIsK>::kPitch;
    CNNOPS_UNROLL
    for (int i = 0; i < kCount; i += kInnerIsK ? 1 : 4) {
      const int row = place<kInnerIsK, kAcross>(thread, i);
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

template <class T, bool kAInnerIsK, bool kBInnerIsK>
constexpr int kStageElements = Tile<T, kAInnerIsK>::kElements + Tile<T, kBInnerIsK>::kElements;
template <class T, bool kAInnerIsK, bool kBInnerIsK>
constexpr size_t kRingBytes = kStages * kStageElements<T, kAInnerIsK, kBInnerIsK> * sizeof(T);

// The tile of D at (m, n), summed over k in [k_begin, k_end). Operands are zero from k_end on. `ring` has kRingBytes.
template <class T, bool kAInnerIsK, bool kBInnerIsK, class A, class B>
__device__ Product<T, kAInnerIsK, kBInnerIsK> multiply(const A& a, const B& b, int64_t m, int64_t n, int64_t k_begin,
                                                       int64_t k_end, T* ring) {
  const Loader<T, kAInnerIsK, A> a_loader(a, m);
  const Loader<T, kBInnerIsK, B> b_loader(b, n);
  const int steps = static_cast<int>(ceil_div(k_end - k_begin, kBlockK<T>));
  const auto a_tile = [&](int step) { return ring + step % kStages * kStageElements<T, kAInnerIsK, kBInnerIsK>; };
  const auto b_tile = [&](int step) { return a_tile(step) + Tile<T, kAInnerIsK>::kElements; };
  const auto load = [&](int step) {
    if (step < steps) {
      const int64_t k = k_begin + int64_t{step} * kBlockK<T>;
      a_loader.load(a_tile(step), k);
      b_loader.load(b_tile(step), k);
    }
    commit_async();  // also when empty, so that a step's group is always the same number of groups back
  };

  Product<T, kAInnerIsK, kBInnerIsK> product;
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_async<kStages - 2>();
    // Now everyone's copies of this step have landed, and nobody reads the stage that is refilled below any more.
    __syncthreads();
    load(step + kStages - 1);
    product.multiply(a_tile(step), b_tile(step));
  }
  return product;
}

}  // namespace cnnops::cuda
