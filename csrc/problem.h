// The problem descriptions: what a kernel must know beside its pointers. Same names as in cnnops/geometry.py.
// Plain structs, passed by value to device code. Extents that are ints fit them (a backend's supports() refuses larger
// ones); offsets are 64-bit.
#pragma once

#include <cstdint>

namespace cnnops {

enum class DType : int { kFloat, kDouble, kHalf, kBFloat16 };

enum class Activation : int { kNone, kRelu, kRelu6, kSilu, kHardswish, kSigmoid };

enum class Gate : int { kSigmoid, kHardsigmoid };

// What a tap beside the input reads: zero, or the input's pixel that torch's nn.Conv2d(padding_mode=...) repeats there.
enum class PadMode : int { kZeros, kReflect, kReplicate, kCircular };

// floor((in + 2 pad - dilation (kernel - 1) - 1) / stride) + 1, in 64 bits: dilation * kernel may exceed an int.
constexpr int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

// The input size of a convolution with this output: of the `stride` that have it the least, plus output_pad.
constexpr int64_t transposed_output_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t output_pad,
                                         int64_t dilation) {
  return (in - 1) * stride - 2 * pad + dilation * (kernel - 1) + output_pad + 1;
}

// y[n,p,q,k] = sum over (r,s,c) of x[n, p*stride_h - pad_h + r*dilation_h, q*stride_w - pad_w + s*dilation_w, c]
//                                * weight[k,r,s,c],
// c over the C / groups channels of k's group. x [N,H,W,C], weight [K,R,S,C/groups], y [N,P,Q,K], all dense; without
// channels_last x [N,C,H,W] and y [N,K,P,Q].
struct Conv2dProblem {
  DType dtype;
  int N, C, H, W, K, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  PadMode pad_mode;
  bool tf32 = false;  // whether products of kFloat may be those of TF32, as torch's switch says on CUDA
  bool channels_last = true;
};

// Windows of R x S taps over x [N,H,W,C], giving y [N,P,Q,C]; without channels_last [N,C,H,W], giving [N,C,P,Q].
// Adaptive pools use H, W, P, Q alone.
struct Pool2dProblem {
  DType dtype;
  int N, C, H, W, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool count_include_pad;
  int64_t divisor_override;  // 0: none
  bool channels_last;
};

// y[n,c,indices[n,c,h,w]] = x[n,c,h,w], the planes of y [N,C,P,Q] being flat; the rest is zero. channels_last: x, y and
// their gradients are dense [N,H,W,C] and [N,P,Q,C], else [N,C,H,W] and [N,C,P,Q]. indices have strides of their own.
struct Unpool2dProblem {
  DType dtype;
  int64_t N, C, H, W, P, Q;
  int64_t index_stride[4];  // of N, C, H and W, in elements
  bool channels_last;
};

// y = activation((x - mean) * rstd * weight + bias + residual), statistics per channel over N and L (all positions).
// channels_last: x is [N,L,C], else [N,C,L]; y, residual and the gradients have x's layout.
struct NormProblem {
  DType dtype;
  int64_t N, C, L;
  bool channels_last;
  bool training;  // statistics of this batch, else the running ones
  double momentum, eps;
  Activation activation;
};

// y[n,c,l] = x[n,c,l] * gate(bias2[c] + sum over m of weight2[c,m] * activation(hidden[n,m])), hidden[n,m] = bias1[m] +
// sum over c of weight1[m,c] * the mean over l of x[n,c,l]. Layout as in NormProblem; M: the hidden channels.
struct SqueezeExciteProblem {
  DType dtype;
  int64_t N, C, L, M;
  bool channels_last;
  Activation activation;
  Gate gate;
};

// dst[i] = src[i] for a 4-d tensor of any strides (in elements), converting the dtype.
struct CopyProblem {
  DType src_dtype, dst_dtype;
  int64_t size[4], src_stride[4], dst_stride[4];
};

}  // namespace cnnops
