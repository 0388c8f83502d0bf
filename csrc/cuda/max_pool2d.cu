// Max pooling over windows of R x S taps, and adaptive max pooling.
//
//   y[n,p,q,c]       = max over (r,s) of x[n, p*stride_h - pad_h + r*dilation_h, q*stride_w - pad_w + s*dilation_w, c]
//   offsets[n,p,q,c] = r * S + s of the tap that is kept
//   dx[n,h,w,c]      = sum over the windows (p,q) whose kept tap is (h,w) of dy[n,p,q,c]
//
// A NaN always replaces what is kept, and nothing replaces a NaN but a later one; a tie replaces nothing. A window
// without a tap inside the input gives -inf and the offset 0.
//
// Layout     x, dx [N,H,W,C] or [N,C,H,W], y and dy likewise; offsets [N,P,Q,C] for either: uint8 where R * S <= 256,
//            else, and where windows are adaptive, int32 (r * S + s in a window's own S columns).
// Tile       forward, [N,H,W,C]: a thread has 16 bytes of channels c deep; columns w ->
//                        +- x: two windows of 3 x 3, stride 2, in place ------+
//            rows h    | | [window (p,q)]            maximum and tap:         |  a block: 256 threads along c, q, p, n;
//                      v | [window (p+1,q)]          registers                |  windows of other shapes: one a thread
//                        +- halo: the row of both, read once -----------------+
//            [N,C,H,W]: a block has 64 windows of a row in 32 channels; row r of x, kStagedInputs = 136 columns of it,
//            lies in shared memory. backward: 64 inputs of a row, with kStagedWindows = 72 windows at once.
// Ownership  forward: of NHWC, one thread owns 16 bytes of channels of one output or of two; of NCHW, a block owns 64
//            outputs of a row in 32 channels. Where outputs are few and windows large, threads share a window's taps,
//            and what they kept is merged in pairs. backward: one input or 64 of a row, which ask the windows over
//            them. indices: one thread owns one of them. Every schedule gives the same bits; see pool2d.cuh.
// Traffic    forward: x once (overlapping windows meet in cache) + y (+ offsets); backward: dy and offsets once + dx;
//            indices: offsets once + indices.

#include "pool2d.cuh"

namespace cnnops::cuda {
namespace {

template <class O>
struct Maximum {
  using Offset = O;
  static constexpr bool kKeepsTaps = true, kUnrolls = sizeof(O) == 1;

  template <int kWidth>
  struct Kept {
    float value[kWidth];
    int tap[kWidth];

    __device__ void start(int first) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        value[i] = __uint_as_float(0xff800000);  // -inf
        tap[i] = first;
      }
    }
    // Taps come in order.
    template <class T>
    __device__ void add(const Raw<T, kWidth>& raw, int at) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const float v = number<kWidth, T>(raw, i);
        const bool wins = v > value[i] || v != v;
        value[i] = wins ? v : value[i];
        tap[i] = wins ? at : tap[i];
      }
    }
    // Of two that kept taps of the same window, whatever their order: what all taps in order would have kept.
    __device__ void merge(const Kept& other) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const float v = other.value[i];
        const bool later = other.tap[i] > tap[i], nan = value[i] != value[i];
        const bool wins = v != v ? !nan || later : !nan && (v > value[i] || (v == value[i] && !later));
        value[i] = wins ? v : value[i];
        tap[i] = wins ? other.tap[i] : tap[i];
      }
    }
    __device__ void finish(const Pool&, int, int) {}
    __device__ void write_taps(O* to) const { store_taps(tap, to); }
  };

  // What window (p, q) gives the input at its tap (r, s): dy, where it kept that tap.
  struct Share {
    int tap;
    __device__ Share(const Pool& pool, int, int q, int r, int s) : tap(r * pool.cols.window(q).taps + s) {}

    template <class T, int kWidth>
    __device__ void add(const Raw<T, kWidth>& dy, const O* offsets, float (&sum)[kWidth]) const {
      int kept[kWidth];
      load_taps(offsets, kept);
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) sum[i] += kept[i] == tap ? number<kWidth, T>(dy, i) : 0.f;
    }
  };
};

// The offset of a window without a tap inside the input points outside; the nearest position stands for it.
template <class O>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool2d_indices_kernel(Pool pool, const O* offsets, int64_t* indices) {
  const int64_t i = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  const PoolSite at = pool_site(i, 1, pool.C, pool.rows.out, pool.cols.out);
  if (at.n >= pool.N) return;
  const Split tap = divided(offsets[i], pool.cols.window(at.col).taps);
  const auto inside = [](const PoolAxis& axis, int p, int64_t tap) -> int64_t {
    const int64_t h = axis.window(p).first + tap * axis.dilation;
    return h < 0 ? 0 : h < axis.in ? h : axis.in - 1;
  };
  indices[i] = inside(pool.rows, at.row, tap.quotient) * pool.cols.in + inside(pool.cols, at.col, tap.remainder);
}

template <class O>
void forward(const Pool2dProblem& p, const void* x, void* y, void* offsets, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    pool2d_forward<Maximum<O>>(p, static_cast<const T*>(x), static_cast<T*>(y), static_cast<O*>(offsets), stream);
  });
}

template <class O>
void backward(const Pool2dProblem& p, const void* dy, const void* offsets, void* dx, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    pool2d_backward<Maximum<O>>(p, static_cast<const T*>(dy), static_cast<const O*>(offsets), static_cast<T*>(dx),
                                stream);
  });
}

template <class O>
void indices_of(const Pool2dProblem& p, const void* offsets, int64_t* indices, Stream stream) {
  const Pool pool(p);
  const auto* const from = static_cast<const O*>(offsets);
  CNNOPS_LAUNCH(max_pool2d_indices_kernel<O>, blocks(ceil_div(pool.outputs(), kPoolThreads)), kPoolThreads, 0, stream,
                pool, from, indices);
}

}  // namespace

void max_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, void* offsets, Stream stream) {
  for_offset(p, [&]<class O>(O) { forward<O>(p, x, y, offsets, stream); });
}

void max_pool2d_backward(const Pool2dProblem& p, const void* dy, const void* offsets, void* dx, Stream stream) {
  for_offset(p, [&]<class O>(O) { backward<O>(p, dy, offsets, dx, stream); });
}

void max_pool2d_indices(const Pool2dProblem& p, const void* offsets, int64_t* indices, Stream stream) {
  for_offset(p, [&]<class O>(O) { indices_of<O>(p, offsets, indices, stream); });
}

void adaptive_max_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, int32_t* offsets, Stream stream) {
  forward<int32_t>(p, x, y, offsets, stream);
}

void adaptive_max_pool2d_backward(const Pool2dProblem& p, const void* dy, const int32_t* offsets, void* dx,
                                  Stream stream) {
  backward<int32_t>(p, dy, offsets, dx, stream);
}

void adaptive_max_pool2d_indices(const Pool2dProblem& p, const int32_t* offsets, int64_t* indices, Stream stream) {
  indices_of<int32_t>(p, offsets, indices, stream);
}

}  // namespace cnnops::cuda
