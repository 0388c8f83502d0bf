// Average pooling over windows of R x S taps, and adaptive average pooling.
//
//   y[n,p,q,c]  = 1/divisor(p,q) * sum over (r,s) of x[n, p*stride_h - pad_h + r, q*stride_w - pad_w + s, c]
//   dx[n,h,w,c] = sum over the windows (p,q) that cover (h,w) of dy[n,p,q,c] / divisor(p,q)
//
// Layout     x, dx [N,H,W,C] or [N,C,H,W], y and dy likewise.
// Ownership  pool2d.cuh. Sums are in float.
// Traffic    forward: x once + y; backward: dy once + dx.

#include <cmath>

#include "pool2d.cuh"

namespace cnnops::cuda {
namespace {

__device__ __forceinline__ float divisor(const Pool& pool, int p, int q) {
  if (pool.divisor_override) return static_cast<float>(pool.divisor_override);
  if (pool.count_include_pad) return static_cast<float>(int64_t{pool.rows.padded_size(p)} * pool.cols.padded_size(q));
  return static_cast<float>(int64_t{pool.rows.size(p)} * pool.cols.size(q));
}

struct Average {
  using Offset = uint8_t;  // there are none
  static constexpr bool kKeepsTaps = false, kUnrolls = false;

  template <int kWidth>
  struct Kept {
    float value[kWidth];

    __device__ void start(int) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) value[i] = 0;
    }
    template <class T>
    __device__ void add(const Raw<T, kWidth>& raw, int) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) value[i] += number<kWidth, T>(raw, i);
    }
    __device__ void merge(const Kept& other) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) value[i] += other.value[i];
    }
    __device__ void finish(const Pool& pool, int p, int q) {
      // The quotient by way of the reciprocal and one correction: division is a call, for which registers would have to
      // be saved. An infinity leaves no rest.
      const float count = divisor(pool, p, q), inverse = 1 / count;
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const float quotient = value[i] * inverse, rest = fmaf(-quotient, count, value[i]);
        value[i] = rest == rest ? fmaf(rest, inverse, quotient) : quotient;
      }
    }
    __device__ void write_taps(uint8_t*) const {}
  };

  // What window (p, q) gives each of its inputs.
  struct Share {
    float factor;
    __device__ Share(const Pool& pool, int p, int q, int, int) : factor(1 / divisor(pool, p, q)) {}

    template <class T, int kWidth>
    __device__ void add(const Raw<T, kWidth>& dy, const uint8_t*, float (&sum)[kWidth]) const {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i) sum[i] += number<kWidth, T>(dy, i) * factor;
    }
  };
};

}  // namespace

void avg_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    pool2d_forward<Average>(p, static_cast<const T*>(x), static_cast<T*>(y), nullptr, stream);
  });
}

void avg_pool2d_backward(const Pool2dProblem& p, const void* dy, void* dx, Stream stream) {
  for_dtype(p.dtype, [&]<class T>(T) {
    pool2d_backward<Average>(p, static_cast<const T*>(dy), nullptr, static_cast<T*>(dx), stream);
  });
}

// Windows without a kernel are adaptive.
void adaptive_avg_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, Stream stream) {
  avg_pool2d_forward(p, x, y, stream);
}

void adaptive_avg_pool2d_backward(const Pool2dProblem& p, const void* dy, void* dx, Stream stream) {
  avg_pool2d_backward(p, dy, dx, stream);
}

}  // namespace cnnops::cuda
