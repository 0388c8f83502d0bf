// The only file that sees torch tensors. Compiled once for each backend with
//   -DCNNOPS_NS=cnnops_<backend> -DCNNOPS_KEY=CPU|CUDA,
// it registers in that namespace an op for every entry of the backend's kernel table. An op allocates its outputs,
// brings operands into the layout that kernels want (NHWC, dense, but for those that take NCHW too) and calls the
// kernel. Calls arrive checked (geometry.py), below autograd; the outputs' strides follow torch's rule, channels_last
// if x or the weight is.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "schema.h"

namespace cnnops {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::array<int64_t, 4>;

constexpr int64_t kMaxDims = 8;

// What CUDA kernels, emulated ones too, take for granted of every operand's address.
#if defined(USE_CUDA) || defined(CNNOPS_SIMT)
constexpr uintptr_t kOperandAlignment = 16;
#else
constexpr uintptr_t kOperandAlignment = 1;
#endif

// Extents cross to kernels as ints: a backend's supports() refuses larger ones.
constexpr int narrow(int64_t v) { return static_cast<int>(v); }

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "expected a float, double, half or bfloat16 tensor");
  }
}

DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

// The type sums are made in, and that per-channel arrays have.
ScalarType accumulation(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "relu6", "silu", "hardswish", "sigmoid"};
  for (int i = 0; i < 6; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "unknown activation '", name, "'");
}

// Whether the strides order the axes as channels_last does: channels innermost, then W, H, N (torch's rule).
bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  if (t.size(0) > 1 && t.numel() == t.size(0)) return false;  // torch decides on a dense copy, whose strides are all 1
  int64_t least = 0;
  for (const int axis : {1, 3, 2, 0}) {
    const int64_t size = t.size(axis), stride = t.stride(axis);
    if (size == 0 || stride < least || (axis == 0 && least == t.stride(1))) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

// Whether t's elements lie in memory as [N, H, W, C], without gaps.
bool is_dense_nhwc(const Tensor& t) {
  int64_t expected = 1;
  for (const int axis : {1, 3, 2, 0}) {
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  return true;
}

bool is_aligned(const Tensor& t) {
  return kOperandAlignment == 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % kOperandAlignment == 0;
}

// A fresh large block costs a page fault for every 4 KiB unless the kernel is asked for huge pages.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (!t.is_cpu() || bytes < 2 * kHugePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Tests set CNNOPS_POISON, so that an element that no kernel writes shows as a NaN.
void poison(void* data, size_t bytes) {
  static const bool wanted = std::getenv("CNNOPS_POISON") != nullptr;
  if (wanted && bytes > 0) std::memset(data, 0xFF, bytes);
}

// By aoti_torch_empty_strided: torch::stable::empty looks the op up by its name, which costs more than the allocation.
template <class Shape>
Tensor empty(const Shape& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dims <= kMaxDims, "expected at most ", kMaxDims, " dimensions, but got ", dims);
  int64_t strides[kMaxDims], next = 1;
  constexpr int kChannelsLast[] = {1, 3, 2, 0};
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t axis = channels_last ? kChannelsLast[i] : dims - 1 - i;
    strides[axis] = next;
    next *= channels_last ? sizes[axis] : std::max<int64_t>(sizes[axis], 1);  // torch treats empty extents so
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  const Tensor t(handle);
  advise_huge_pages(t);
  if (t.is_cpu()) poison(t.data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
  return t;
}

// Makes the device of `t` current for as long as it lives, and names the stream to launch on.
class Launch {
 public:
  explicit Launch(const Tensor& t) {
#ifdef USE_CUDA
    guard_.emplace(t.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
#else
    (void)t;
#endif
  }
  operator Stream() const { return stream_; }

 private:
#ifdef USE_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  Stream stream_ = nullptr;
};

// The kernel copies up to four axes; further ones in front are walked here.
void copy(const Tensor& src, const Tensor& dst, Stream stream) {
  if (src.numel() == 0) return;
  CopyProblem problem{
      .src_dtype = dtype_of(src), .dst_dtype = dtype_of(dst), .size = {1, 1, 1, 1}, .src_stride = {}, .dst_stride = {}};
  const int64_t front = std::max<int64_t>(src.dim() - 4, 0), pad = std::max<int64_t>(4 - src.dim(), 0);
  int64_t inner = 1;
  for (int64_t i = front; i < src.dim(); ++i) {
    problem.size[pad + i - front] = src.size(i);
    problem.src_stride[pad + i - front] = src.stride(i);
    problem.dst_stride[pad + i - front] = dst.stride(i);
    inner *= src.size(i);
  }
  for (int64_t step = 0; step < src.numel() / inner; ++step) {
    int64_t from = 0, to = 0, rest = step;
    for (int64_t i = front - 1; i >= 0; rest /= src.size(i--)) {
      from += rest % src.size(i) * src.stride(i);
      to += rest % src.size(i) * dst.stride(i);
    }
    kernels().copy(problem, static_cast<const char*>(src.data_ptr()) + from * static_cast<int64_t>(src.element_size()),
                   static_cast<char*>(dst.data_ptr()) + to * static_cast<int64_t>(dst.element_size()), stream);
  }
}

// t with elements of `dtype` as dense [N, H, W, C], aligned; t itself where it is that already.
Tensor nhwc(const Tensor& t, ScalarType dtype, Stream stream) {
  if (t.scalar_type() == dtype && is_dense_nhwc(t) && is_aligned(t)) return t;
  Tensor dense = empty(t.sizes(), dtype, t, true);
  copy(t, dense, stream);
  return dense;
}

// t as kernels want it that take both layouts: dense NHWC where channels_last, else dense NCHW; both aligned.
Tensor dense_as(const Tensor& t, ScalarType dtype, bool channels_last, Stream stream) {
  if (channels_last) return nhwc(t, dtype, stream);
  if (t.scalar_type() == dtype && t.is_contiguous() && is_aligned(t)) return t;
  Tensor dense = empty(t.sizes(), dtype, t, false);
  copy(t, dense, stream);
  return dense;
}

OptionalTensor dense_as(const OptionalTensor& t, ScalarType dtype, bool channels_last, Stream stream) {
  return t ? OptionalTensor(dense_as(*t, dtype, channels_last, stream)) : std::nullopt;
}

Tensor dense_as(const Tensor& t, bool channels_last, Stream stream) {
  return dense_as(t, t.scalar_type(), channels_last, stream);
}

OptionalTensor dense_as(const OptionalTensor& t, bool channels_last, Stream stream) {
  return t ? OptionalTensor(dense_as(*t, channels_last, stream)) : std::nullopt;
}

// A per-channel array with elements of `dtype`, dense and aligned.
OptionalTensor vector(const OptionalTensor& t, ScalarType dtype, Stream stream) {
  if (!t || (t->scalar_type() == dtype && t->is_contiguous() && is_aligned(*t))) return t;
  Tensor dense = empty(t->sizes(), dtype, *t, false);
  copy(*t, dense, stream);
  return dense;
}

void* pointer(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }

void zero_elements(const Tensor& t) {
  if (t.numel() == 0) return;
  if (t.is_cpu()) {
    std::memset(t.data_ptr(), 0, static_cast<size_t>(t.numel()) * t.element_size());
  } else {
    torch::stable::zero_(const_cast<Tensor&>(t));
  }
}

// A result that kernels write dense in one layout and dtype, and the caller sees in those that it expects.
class Output {
 public:
  template <class Shape>
  Output(const Shape& sizes, const Tensor& like, ScalarType compute, bool channels_last, bool written_as_nhwc = true)
      : result_(empty(sizes, like.scalar_type(), like, channels_last)),
        dense_(like.scalar_type() == compute && (written_as_nhwc ? is_dense_nhwc(result_) : result_.is_contiguous())
                   ? result_
                   : empty(sizes, compute, like, written_as_nhwc)) {}

  void* data() const { return dense_.data_ptr(); }
  int64_t numel() const { return result_.numel(); }
  void zero() const { zero_elements(dense_); }
  Tensor finish(Stream stream) const {
    if (dense_.data_ptr() != result_.data_ptr()) copy(dense_, result_, stream);
    return result_;
  }

 private:
  Tensor result_, dense_;
};

// Scratch memory for one call. On CUDA a tensor, so that the stream and graph capture know it; on the CPU a block that
// each thread keeps for its next call, unless it is larger than the cap.
class Workspace {
 public:
  Workspace(int64_t bytes, const Tensor& like) {
    if (bytes == 0) return;
    if (!like.is_cpu()) {
      tensor_ = empty(std::array<int64_t, 1>{bytes}, ScalarType::Byte, like, false);
      data_ = tensor_->data_ptr();
      return;
    }
    if (bytes > kept_bytes_ || !kept_) {
      const int64_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
      Block block(static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(rounded))), &std::free);
      STD_TORCH_CHECK(block != nullptr, "out of memory: a kernel wants ", bytes, " bytes of workspace");
#if defined(__linux__)
      madvise(block.get(), static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
      if (rounded > kKeptAtMost) {
        own_ = std::move(block);
        data_ = own_.get();
        poison(data_, static_cast<size_t>(bytes));
        return;
      }
      kept_ = std::move(block);
      kept_bytes_ = rounded;
    }
    data_ = kept_.get();
    poison(data_, static_cast<size_t>(bytes));
  }
  void* data() const { return data_; }

 private:
  using Block = std::unique_ptr<char, void (*)(void*)>;
  static constexpr int64_t kAlign = 2 << 20, kKeptAtMost = int64_t{256} << 20;
  inline static thread_local Block kept_{nullptr, &std::free};
  inline static thread_local int64_t kept_bytes_ = 0;

  OptionalTensor tensor_;
  Block own_{nullptr, &std::free};
  void* data_ = nullptr;
};

// Scratch memory for one call as its workspace function has it.
template <class... Problems>
Workspace workspace_of(int64_t (*bytes)(const Problems&...), const Tensor& like, const Problems&... problems) {
  return Workspace(bytes ? bytes(problems...) : 0, like);
}

#define CNNOPS_CONV2D_PARAMS                                                                                \
  int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, \
      int64_t groups, int64_t pad_mode
#define CNNOPS_CONV2D_ARGS stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, pad_mode

// The convolutions' ops are registered twice where the kernels know TF32: the one with kTf32 computes kFloat in it.
Conv2dProblem conv2d_problem(DType dtype, bool tf32, int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t R,
                             int64_t S, CNNOPS_CONV2D_PARAMS) {
  return {.dtype = dtype,
          .N = narrow(N),
          .C = narrow(C),
          .H = narrow(H),
          .W = narrow(W),
          .K = narrow(K),
          .R = narrow(R),
          .S = narrow(S),
          .P = narrow(output_size(H, R, stride_h, pad_h, dilation_h)),
          .Q = narrow(output_size(W, S, stride_w, pad_w, dilation_w)),
          .stride_h = narrow(stride_h),
          .stride_w = narrow(stride_w),
          .pad_h = narrow(pad_h),
          .pad_w = narrow(pad_w),
          .dilation_h = narrow(dilation_h),
          .dilation_w = narrow(dilation_w),
          .groups = narrow(groups),
          .pad_mode = static_cast<PadMode>(pad_mode),
          .tf32 = tf32};
}

// The problem whose operands the kernels take as they lie, or as NHWC. Of an empty one nobody asks them.
Conv2dProblem laid_out(Conv2dProblem problem, bool channels_last) {
  const bool some = std::min({problem.N, problem.C, problem.H, problem.W, problem.P, problem.Q}) > 0;
  problem.channels_last = channels_last || !some || !kernels().conv2d_nchw || !kernels().conv2d_nchw(problem);
  return problem;
}

// The layout of y, and of dx.
bool conv2d_channels_last(const Tensor& x, const Tensor& weight) {
  return is_channels_last(x) || is_channels_last(weight);
}

Conv2dProblem conv2d_problem(bool tf32, const Tensor& x, const Tensor& weight, ScalarType compute,
                             CNNOPS_CONV2D_PARAMS) {
  return laid_out(conv2d_problem(dtype_of(compute), tf32, x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0),
                                 weight.size(2), weight.size(3), CNNOPS_CONV2D_ARGS),
                  conv2d_channels_last(x, weight));
}

ScalarType conv2d_compute(const Tensor& x) {
  return kernels().conv2d_in_float ? accumulation(x.scalar_type()) : x.scalar_type();
}

Output conv2d_output(const Conv2dProblem& problem, const Tensor& x, const Tensor& weight, ScalarType compute) {
  return Output(Sizes{problem.N, problem.K, problem.P, problem.Q}, x, compute, conv2d_channels_last(x, weight),
                problem.channels_last);
}

// y, dense in the problem's layout and of the type that it computes in, with an epilogue that has this residual
// besides.
void convolve(const Conv2dProblem& problem, const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
              Epilogue epilogue, void* y, Stream stream) {
  const ScalarType compute = conv2d_compute(x);
  const Tensor dense_x = dense_as(x, compute, problem.channels_last, stream);
  const Tensor dense_weight = nhwc(weight, compute, stream);
  const OptionalTensor dense_residual = dense_as(residual, compute, problem.channels_last, stream);
  epilogue.residual = pointer(dense_residual);
  const Workspace workspace(kernels().conv2d_forward_workspace(problem, epilogue), x);
  kernels().conv2d_forward(problem, epilogue, dense_x.data_ptr(), dense_weight.data_ptr(), y, workspace.data(), stream);
}

template <bool kTf32>
std::tuple<Tensor, OptionalTensor> conv2d_act_forward(const Tensor& x, const Tensor& weight, OptionalTensor bias,
                                                      OptionalTensor residual, CNNOPS_CONV2D_PARAMS,
                                                      std::string activation, bool need_z) {
  const Launch launch(x);
  const ScalarType compute = conv2d_compute(x);
  const Conv2dProblem problem = conv2d_problem(kTf32, x, weight, compute, CNNOPS_CONV2D_ARGS);
  const Activation act = activation_of(activation);
  const Output y = conv2d_output(problem, x, weight, compute);
  std::optional<Output> z;
  if (need_z) z.emplace(conv2d_output(problem, x, weight, compute));
  if (y.numel() > 0) {
    const OptionalTensor dense_bias = vector(bias, compute, launch);
    const Epilogue epilogue{.bias = pointer(dense_bias), .activation = need_z ? Activation::kNone : act};
    convolve(problem, x, weight, residual, epilogue, need_z ? z->data() : y.data(), launch);
    if (need_z) kernels().activation_forward(problem.dtype, act, y.numel(), z->data(), y.data(), launch);
  }
  return {y.finish(launch), z ? OptionalTensor(z->finish(launch)) : std::nullopt};
}

template <bool kTf32>
Tensor conv2d_forward(const Tensor& x, const Tensor& weight, OptionalTensor bias, CNNOPS_CONV2D_PARAMS) {
  return std::get<0>(
      conv2d_act_forward<kTf32>(x, weight, std::move(bias), std::nullopt, CNNOPS_CONV2D_ARGS, "none", false));
}

// Of each filter's results, as rounded: the mean and the sum of squared deviations from it.
template <bool kTf32>
std::tuple<Tensor, Tensor, Tensor> conv2d_statistics_forward(const Tensor& x, const Tensor& weight, OptionalTensor bias,
                                                             CNNOPS_CONV2D_PARAMS) {
  const Launch launch(x);
  const ScalarType compute = conv2d_compute(x), acc = accumulation(x.scalar_type());
  const Conv2dProblem problem = conv2d_problem(kTf32, x, weight, compute, CNNOPS_CONV2D_ARGS);
  const Output y = conv2d_output(problem, x, weight, compute);
  const std::array<int64_t, 1> filters{problem.K};
  const Tensor mean = empty(filters, acc, x, false), m2 = empty(filters, acc, x, false);
  if (y.numel() == 0) {
    zero_elements(mean);
    zero_elements(m2);
  } else {
    const OptionalTensor dense_bias = vector(bias, compute, launch);
    const Epilogue epilogue{.bias = pointer(dense_bias), .mean = mean.data_ptr(), .m2 = m2.data_ptr()};
    convolve(problem, x, weight, std::nullopt, epilogue, y.data(), launch);
  }
  return {y.finish(launch), mean, m2};
}

// What a convolution's backward gives: each gradient that is wanted, in the layout torch gives it.
struct ConvGradients {
  std::optional<Output> dx, dweight;
  OptionalTensor dbias, dense_dbias;

  ConvGradients(const Conv2dProblem& problem, const Tensor& x, const Tensor& weight, int64_t filters,
                ScalarType compute, bool need_dx, bool need_dweight, bool need_dbias) {
    if (need_dx) dx.emplace(x.sizes(), x, compute, conv2d_channels_last(x, weight), problem.channels_last);
    if (need_dweight) dweight.emplace(weight.sizes(), weight, compute, is_channels_last(weight));
    if (!need_dbias) return;
    dbias = empty(std::array<int64_t, 1>{filters}, x.scalar_type(), x, false);
    dense_dbias = x.scalar_type() == compute ? dbias : empty(dbias->sizes(), compute, x, false);
  }

  // What an empty dy gives.
  void zero() const {
    if (dx) dx->zero();
    if (dweight) dweight->zero();
    if (dense_dbias) zero_elements(*dense_dbias);
  }

  std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> finish(Stream stream) const {
    if (dbias && dbias->data_ptr() != dense_dbias->data_ptr()) copy(*dense_dbias, *dbias, stream);
    const auto finished = [&](const std::optional<Output>& output) {
      return output ? OptionalTensor(output->finish(stream)) : std::nullopt;
    };
    return {finished(dx), finished(dweight), dbias};
  }
};

template <bool kTf32>
Tensor conv2d_bn_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                     const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& bn_weight,
                     const OptionalTensor& bn_bias, CNNOPS_CONV2D_PARAMS, double eps, const std::string& activation,
                     void* pooled) {
  const Launch launch(x);
  const ScalarType compute = conv2d_compute(x), acc = accumulation(x.scalar_type());
  const Conv2dProblem problem = conv2d_problem(kTf32, x, weight, compute, CNNOPS_CONV2D_ARGS);
  const Output y = conv2d_output(problem, x, weight, compute);
  if (y.numel() == 0) return y.finish(launch);
  const std::array<int64_t, 1> channels{problem.K};
  const Tensor scale = empty(channels, acc, x, false), shift = empty(channels, acc, x, false);
  const OptionalTensor conv_bias = vector(bias, acc, launch), mean = vector(running_mean, acc, launch),
                       var = vector(running_var, acc, launch), w = vector(bn_weight, acc, launch),
                       b = vector(bn_bias, acc, launch);
  kernels().fold_batch_norm(problem.dtype, problem.K, eps,
                            {.conv_bias = pointer(conv_bias),
                             .running_mean = pointer(mean),
                             .running_var = pointer(var),
                             .weight = pointer(w),
                             .bias = pointer(b),
                             .scale = scale.data_ptr(),
                             .shift = shift.data_ptr()},
                            launch);
  const Epilogue epilogue{
      .bias = shift.data_ptr(), .activation = activation_of(activation), .scale = scale.data_ptr(), .pooled = pooled};
  convolve(problem, x, weight, residual, epilogue, y.data(), launch);
  return y.finish(launch);
}

template <bool kTf32>
Tensor conv2d_bn_act_forward(const Tensor& x, const Tensor& weight, OptionalTensor bias, OptionalTensor residual,
                             const Tensor& running_mean, const Tensor& running_var, OptionalTensor bn_weight,
                             OptionalTensor bn_bias, CNNOPS_CONV2D_PARAMS, double eps, std::string activation) {
  return conv2d_bn_act<kTf32>(x, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
                              CNNOPS_CONV2D_ARGS, eps, activation, nullptr);
}

// And the mean of each image's results of a filter, as rounded.
template <bool kTf32>
std::tuple<Tensor, Tensor> conv2d_bn_act_pooled_forward(const Tensor& x, const Tensor& weight, OptionalTensor bias,
                                                        OptionalTensor residual, const Tensor& running_mean,
                                                        const Tensor& running_var, OptionalTensor bn_weight,
                                                        OptionalTensor bn_bias, CNNOPS_CONV2D_PARAMS, double eps,
                                                        std::string activation) {
  const Launch launch(x);
  const std::array<int64_t, 2> sizes{x.size(0), weight.size(0)};
  const Tensor pooled = empty(sizes, accumulation(x.scalar_type()), x, false);
  const Tensor y = conv2d_bn_act<kTf32>(x, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
                                        CNNOPS_CONV2D_ARGS, eps, activation, pooled.data_ptr());
  return {y, pooled};
}

template <bool kTf32>
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> conv2d_backward(const Tensor& dy, const Tensor& x,
                                                                           const Tensor& weight, CNNOPS_CONV2D_PARAMS,
                                                                           bool need_dx, bool need_dweight,
                                                                           bool need_dbias) {
  const Launch launch(x);
  const ScalarType compute = conv2d_compute(x);
  const Conv2dProblem problem = conv2d_problem(kTf32, x, weight, compute, CNNOPS_CONV2D_ARGS);
  const ConvGradients to(problem, x, weight, problem.K, compute, need_dx, need_dweight, need_dbias);
  if (dy.numel() == 0) {
    to.zero();
  } else if (need_dx || need_dweight || need_dbias) {
    const Tensor dense_dy = dense_as(dy, compute, problem.channels_last, launch);
    OptionalTensor dense_x;
    if (need_dweight) dense_x = dense_as(x, compute, problem.channels_last, launch);
    const OptionalTensor dense_weight = need_dx ? OptionalTensor(nhwc(weight, compute, launch)) : std::nullopt;
    const Workspace workspace(kernels().conv2d_backward_workspace(problem, need_dx, need_dweight, need_dbias), x);
    kernels().conv2d_backward(problem, dense_dy.data_ptr(), pointer(dense_x), pointer(dense_weight),
                              to.dx ? to.dx->data() : nullptr, to.dweight ? to.dweight->data() : nullptr,
                              pointer(to.dense_dbias), workspace.data(), launch);
  }
  return to.finish(launch);
}

#define CNNOPS_CONV_TRANSPOSE2D_PARAMS                                                                          \
  int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t output_pad_h, int64_t output_pad_w, \
      int64_t dilation_h, int64_t dilation_w, int64_t groups
#define CNNOPS_CONV_TRANSPOSE2D_ARGS \
  stride_h, stride_w, pad_h, pad_w, output_pad_h, output_pad_w, dilation_h, dilation_w, groups

// The convolution that a transposed one is the gradient of: x is its output, y its input, and the weight its own.
Conv2dProblem conv_transpose2d_problem(bool tf32, const Tensor& x, const Tensor& weight, ScalarType compute,
                                       CNNOPS_CONV_TRANSPOSE2D_PARAMS) {
  const Conv2dProblem problem{
      .dtype = dtype_of(compute),
      .N = narrow(x.size(0)),
      .C = narrow(weight.size(1) * groups),
      .H = narrow(transposed_output_size(x.size(2), weight.size(2), stride_h, pad_h, output_pad_h, dilation_h)),
      .W = narrow(transposed_output_size(x.size(3), weight.size(3), stride_w, pad_w, output_pad_w, dilation_w)),
      .K = narrow(weight.size(0)),
      .R = narrow(weight.size(2)),
      .S = narrow(weight.size(3)),
      .P = narrow(x.size(2)),
      .Q = narrow(x.size(3)),
      .stride_h = narrow(stride_h),
      .stride_w = narrow(stride_w),
      .pad_h = narrow(pad_h),
      .pad_w = narrow(pad_w),
      .dilation_h = narrow(dilation_h),
      .dilation_w = narrow(dilation_w),
      .groups = narrow(groups),
      .pad_mode = PadMode::kZeros,
      .tf32 = tf32};
  return laid_out(problem, conv2d_channels_last(x, weight));
}

template <bool kTf32>
Tensor conv_transpose2d_forward(const Tensor& x, const Tensor& weight, OptionalTensor bias,
                                CNNOPS_CONV_TRANSPOSE2D_PARAMS) {
  const Launch launch(x);
  const ScalarType compute = conv2d_compute(x);
  const Conv2dProblem problem = conv_transpose2d_problem(kTf32, x, weight, compute, CNNOPS_CONV_TRANSPOSE2D_ARGS);
  const Output y(Sizes{problem.N, problem.C, problem.H, problem.W}, x, compute, conv2d_channels_last(x, weight),
                 problem.channels_last);
  if (y.numel() > 0) {
    const Tensor dense_x = dense_as(x, compute, problem.channels_last, launch);
    const Tensor dense_weight = nhwc(weight, compute, launch);
    const OptionalTensor dense_bias = vector(bias, compute, launch);
    const Workspace workspace(kernels().conv2d_backward_workspace(problem, true, false, false), x);
    kernels().conv_transpose2d_forward(problem, dense_x.data_ptr(), dense_weight.data_ptr(), pointer(dense_bias),
                                       y.data(), workspace.data(), launch);
  }
  return y.finish(launch);
}

// dx is the convolution of dy, and dweight that convolution's own for x as the gradient of its output.
template <bool kTf32>
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> conv_transpose2d_backward(const Tensor& dy, const Tensor& x,
                                                                                     const Tensor& weight,
                                                                                     CNNOPS_CONV_TRANSPOSE2D_PARAMS,
                                                                                     bool need_dx, bool need_dweight,
                                                                                     bool need_dbias) {
  const Launch launch(x);
  const ScalarType compute = conv2d_compute(x);
  const Conv2dProblem problem = conv_transpose2d_problem(kTf32, x, weight, compute, CNNOPS_CONV_TRANSPOSE2D_ARGS);
  const ConvGradients to(problem, x, weight, problem.C, compute, need_dx, need_dweight, need_dbias);
  if (dy.numel() == 0) {
    to.zero();
    return to.finish(launch);
  }
  const Tensor dense_dy = dense_as(dy, compute, problem.channels_last, launch);
  if (to.dx) convolve(problem, dense_dy, weight, std::nullopt, Epilogue{}, to.dx->data(), launch);
  if (to.dweight) {
    const Tensor dense_x = dense_as(x, compute, problem.channels_last, launch);
    const Workspace workspace(kernels().conv2d_backward_workspace(problem, false, true, false), x);
    kernels().conv2d_backward(problem, dense_x.data_ptr(), dense_dy.data_ptr(), nullptr, nullptr, to.dweight->data(),
                              nullptr, workspace.data(), launch);
  }
  if (to.dbias) {
    Conv2dProblem sum = problem;  // dbias is a sum over what conv2d_backward calls dy [N,P,Q,K]
    sum.K = problem.C;
    sum.P = problem.H;
    sum.Q = problem.W;
    const Workspace workspace(kernels().conv2d_backward_workspace(sum, false, false, true), x);
    kernels().conv2d_backward(sum, dense_dy.data_ptr(), nullptr, nullptr, nullptr, nullptr, pointer(to.dense_dbias),
                              workspace.data(), launch);
  }
  return to.finish(launch);
}

Tensor activation_backward(const Tensor& dy, const Tensor& saved, std::string activation) {
  const Launch launch(dy);
  const Output dz(saved.sizes(), saved, saved.scalar_type(), is_channels_last(saved));
  if (dz.numel() > 0) {
    const Tensor dense_dy = nhwc(dy, dy.scalar_type(), launch), dense_saved = nhwc(saved, dy.scalar_type(), launch);
    kernels().activation_backward(dtype_of(dy), activation_of(activation), dz.numel(), dense_dy.data_ptr(),
                                  dense_saved.data_ptr(), dz.data(), launch);
  }
  return dz.finish(launch);
}

#define CNNOPS_WINDOW_PARAMS \
  int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w
#define CNNOPS_WINDOW_ARGS kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w

// Whether pools of such a tensor run on it as it lies, or as NHWC.
bool pools_nhwc(bool channels_last) { return channels_last || !kernels().pool2d_nchw; }

Pool2dProblem pool2d_problem(const Tensor& t, bool channels_last, int64_t H, int64_t W, int64_t P, int64_t Q,
                             CNNOPS_WINDOW_PARAMS, int64_t dilation_h = 1, int64_t dilation_w = 1,
                             bool count_include_pad = true, int64_t divisor_override = 0) {
  const bool offsets = t.scalar_type() == ScalarType::Byte || t.scalar_type() == ScalarType::Int;
  return {.dtype = offsets ? DType::kFloat : dtype_of(t),
          .N = narrow(t.size(0)),
          .C = narrow(t.size(1)),
          .H = narrow(H),
          .W = narrow(W),
          .R = narrow(kernel_h),
          .S = narrow(kernel_w),
          .P = narrow(P),
          .Q = narrow(Q),
          .stride_h = narrow(stride_h),
          .stride_w = narrow(stride_w),
          .pad_h = narrow(pad_h),
          .pad_w = narrow(pad_w),
          .dilation_h = narrow(dilation_h),
          .dilation_w = narrow(dilation_w),
          .count_include_pad = count_include_pad,
          .divisor_override = divisor_override,
          .channels_last = pools_nhwc(channels_last)};
}

Tensor pool2d_input(const Tensor& t, bool channels_last, Stream stream) {
  return dense_as(t, pools_nhwc(channels_last), stream);
}

Output pool2d_output(const Tensor& like, const Sizes& sizes, bool channels_last) {
  return {sizes, like, like.scalar_type(), channels_last, pools_nhwc(channels_last)};
}

// torch's ceil_mode: round up, but start no window beyond the input and its left padding.
int64_t pooled_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  if (!ceil_mode) return output_size(in, kernel, stride, pad, dilation);
  const int64_t out = output_size(in + stride - 1, kernel, stride, pad, dilation);
  return (out - 1) * stride >= in + pad ? out - 1 : out;
}

Tensor dense_offsets(const Tensor& offsets) {
  STD_TORCH_CHECK(is_dense_nhwc(offsets), "expected the offsets as max_pool2d made them, channels_last and dense");
  return offsets;
}

std::tuple<Tensor, OptionalTensor> max_pool2d_forward(const Tensor& x, CNNOPS_WINDOW_PARAMS, int64_t dilation_h,
                                                      int64_t dilation_w, bool ceil_mode, bool need_offsets) {
  const Launch launch(x);
  const int64_t P = pooled_size(x.size(2), kernel_h, stride_h, pad_h, dilation_h, ceil_mode);
  const int64_t Q = pooled_size(x.size(3), kernel_w, stride_w, pad_w, dilation_w, ceil_mode);
  const Sizes sizes{x.size(0), x.size(1), P, Q};
  const Output y = pool2d_output(x, sizes, is_channels_last(x));
  OptionalTensor offsets;
  if (need_offsets) offsets = empty(sizes, kernel_h * kernel_w <= 256 ? ScalarType::Byte : ScalarType::Int, x, true);
  if (y.numel() > 0) {
    const Tensor dense_x = pool2d_input(x, is_channels_last(x), launch);
    kernels().max_pool2d_forward(
        pool2d_problem(x, is_channels_last(x), x.size(2), x.size(3), P, Q, CNNOPS_WINDOW_ARGS, dilation_h, dilation_w),
        dense_x.data_ptr(), y.data(), pointer(offsets), launch);
  }
  return {y.finish(launch), offsets};
}

Tensor max_pool2d_backward(const Tensor& dy, const Tensor& offsets, int64_t H, int64_t W, bool channels_last,
                           CNNOPS_WINDOW_PARAMS, int64_t dilation_h, int64_t dilation_w) {
  const Launch launch(dy);
  const Output dx = pool2d_output(dy, {dy.size(0), dy.size(1), H, W}, channels_last);
  if (dx.numel() > 0) {
    const Tensor dense_dy = pool2d_input(dy, channels_last, launch);
    kernels().max_pool2d_backward(
        pool2d_problem(dy, channels_last, H, W, dy.size(2), dy.size(3), CNNOPS_WINDOW_ARGS, dilation_h, dilation_w),
        dense_dy.data_ptr(), dense_offsets(offsets).data_ptr(), dx.data(), launch);
  }
  return dx.finish(launch);
}

Tensor max_pool2d_indices(const Tensor& offsets, int64_t H, int64_t W, CNNOPS_WINDOW_PARAMS, int64_t dilation_h,
                          int64_t dilation_w) {
  const Launch launch(offsets);
  const Tensor indices = empty(offsets.sizes(), ScalarType::Long, offsets, true);
  if (indices.numel() > 0)
    kernels().max_pool2d_indices(pool2d_problem(offsets, true, H, W, offsets.size(2), offsets.size(3),
                                                CNNOPS_WINDOW_ARGS, dilation_h, dilation_w),
                                 dense_offsets(offsets).data_ptr(), static_cast<int64_t*>(indices.data_ptr()), launch);
  return indices;
}

std::tuple<Tensor, OptionalTensor> adaptive_max_pool2d_forward(const Tensor& x, int64_t P, int64_t Q,
                                                               bool need_offsets) {
  const Launch launch(x);
  const Sizes sizes{x.size(0), x.size(1), P, Q};
  const Output y = pool2d_output(x, sizes, is_channels_last(x));
  OptionalTensor offsets;
  if (need_offsets) offsets = empty(sizes, ScalarType::Int, x, true);
  if (y.numel() > 0)
    kernels().adaptive_max_pool2d_forward(
        pool2d_problem(x, is_channels_last(x), x.size(2), x.size(3), P, Q, 0, 0, 0, 0, 0, 0),
        pool2d_input(x, is_channels_last(x), launch).data_ptr(), y.data(), static_cast<int32_t*>(pointer(offsets)),
        launch);
  return {y.finish(launch), offsets};
}

Tensor adaptive_max_pool2d_backward(const Tensor& dy, const Tensor& offsets, int64_t H, int64_t W, bool channels_last) {
  const Launch launch(dy);
  const Output dx = pool2d_output(dy, {dy.size(0), dy.size(1), H, W}, channels_last);
  if (dy.numel() == 0) {
    dx.zero();
  } else {
    kernels().adaptive_max_pool2d_backward(
        pool2d_problem(dy, channels_last, H, W, dy.size(2), dy.size(3), 0, 0, 0, 0, 0, 0),
        pool2d_input(dy, channels_last, launch).data_ptr(),
        static_cast<const int32_t*>(dense_offsets(offsets).data_ptr()), dx.data(), launch);
  }
  return dx.finish(launch);
}

Tensor adaptive_max_pool2d_indices(const Tensor& offsets, int64_t H, int64_t W) {
  const Launch launch(offsets);
  const Tensor indices = empty(offsets.sizes(), ScalarType::Long, offsets, true);
  if (indices.numel() > 0)
    kernels().adaptive_max_pool2d_indices(
        pool2d_problem(offsets, true, H, W, offsets.size(2), offsets.size(3), 0, 0, 0, 0, 0, 0),
        static_cast<const int32_t*>(dense_offsets(offsets).data_ptr()), static_cast<int64_t*>(indices.data_ptr()),
        launch);
  return indices;
}

Tensor avg_pool2d_forward(const Tensor& x, CNNOPS_WINDOW_PARAMS, bool ceil_mode, bool count_include_pad,
                          int64_t divisor_override) {
  const Launch launch(x);
  const int64_t P = pooled_size(x.size(2), kernel_h, stride_h, pad_h, 1, ceil_mode);
  const int64_t Q = pooled_size(x.size(3), kernel_w, stride_w, pad_w, 1, ceil_mode);
  const Output y = pool2d_output(x, {x.size(0), x.size(1), P, Q}, is_channels_last(x));
  if (y.numel() > 0)
    kernels().avg_pool2d_forward(pool2d_problem(x, is_channels_last(x), x.size(2), x.size(3), P, Q, CNNOPS_WINDOW_ARGS,
                                                1, 1, count_include_pad, divisor_override),
                                 pool2d_input(x, is_channels_last(x), launch).data_ptr(), y.data(), launch);
  return y.finish(launch);
}

Tensor avg_pool2d_backward(const Tensor& dy, int64_t H, int64_t W, bool channels_last, CNNOPS_WINDOW_PARAMS, bool,
                           bool count_include_pad, int64_t divisor_override) {
  const Launch launch(dy);
  const Output dx = pool2d_output(dy, {dy.size(0), dy.size(1), H, W}, channels_last);
  if (dx.numel() > 0)
    kernels().avg_pool2d_backward(pool2d_problem(dy, channels_last, H, W, dy.size(2), dy.size(3), CNNOPS_WINDOW_ARGS, 1,
                                                 1, count_include_pad, divisor_override),
                                  pool2d_input(dy, channels_last, launch).data_ptr(), dx.data(), launch);
  return dx.finish(launch);
}

Tensor adaptive_avg_pool2d_forward(const Tensor& x, int64_t P, int64_t Q) {
  const Launch launch(x);
  const Output y = pool2d_output(x, {x.size(0), x.size(1), P, Q}, is_channels_last(x));
  if (y.numel() > 0)
    kernels().adaptive_avg_pool2d_forward(
        pool2d_problem(x, is_channels_last(x), x.size(2), x.size(3), P, Q, 0, 0, 0, 0, 0, 0),
        pool2d_input(x, is_channels_last(x), launch).data_ptr(), y.data(), launch);
  return y.finish(launch);
}

Tensor adaptive_avg_pool2d_backward(const Tensor& dy, int64_t H, int64_t W, bool channels_last) {
  const Launch launch(dy);
  const Output dx = pool2d_output(dy, {dy.size(0), dy.size(1), H, W}, channels_last);
  if (dy.numel() == 0) {
    dx.zero();
  } else {
    kernels().adaptive_avg_pool2d_backward(
        pool2d_problem(dy, channels_last, H, W, dy.size(2), dy.size(3), 0, 0, 0, 0, 0, 0),
        pool2d_input(dy, channels_last, launch).data_ptr(), dx.data(), launch);
  }
  return dx.finish(launch);
}

Unpool2dProblem unpool2d_problem(DType dtype, const Tensor& indices, int64_t P, int64_t Q, bool channels_last) {
  Unpool2dProblem problem{.dtype = dtype,
                          .N = indices.size(0),
                          .C = indices.size(1),
                          .H = indices.size(2),
                          .W = indices.size(3),
                          .P = P,
                          .Q = Q,
                          .index_stride = {},
                          .channels_last = channels_last};
  for (int i = 0; i < 4; ++i) problem.index_stride[i] = indices.stride(i);
  return problem;
}

const int64_t* checked_indices(const Unpool2dProblem& problem, const Tensor& indices, const Workspace& workspace,
                               Stream stream) {
  const int64_t* pointer = static_cast<const int64_t*>(indices.data_ptr());
  int64_t found = 0;
  // A user's mistake: no place in our source.
  if (kernels().max_unpool2d_misplaced(problem, pointer, &found, workspace.data(), stream))
    throw std::runtime_error("max_unpool2d: indices must be positions of a " + std::to_string(problem.P) + "x" +
                             std::to_string(problem.Q) + " plane, at least 0 and below " +
                             std::to_string(problem.P * problem.Q) + ", but got " + std::to_string(found));
  return pointer;
}

Tensor max_unpool2d_forward(const Tensor& x, const Tensor& indices, int64_t P, int64_t Q) {
  const Launch launch(x);
  const bool channels_last = is_channels_last(x);
  const Tensor y = empty(Sizes{x.size(0), x.size(1), P, Q}, x.scalar_type(), x, channels_last);
  if (y.numel() > 0) {
    const Unpool2dProblem problem = unpool2d_problem(dtype_of(x), indices, P, Q, channels_last);
    const Tensor dense_x = dense_as(x, channels_last, launch);
    const Workspace workspace = workspace_of(kernels().max_unpool2d_workspace, indices, problem);
    const int64_t* checked = checked_indices(problem, indices, workspace, launch);
    kernels().max_unpool2d_forward(problem, dense_x.data_ptr(), checked, y.data_ptr(), workspace.data(), launch);
  }
  return y;
}

Tensor max_unpool2d_backward(const Tensor& dy, const Tensor& indices, bool channels_last) {
  const Launch launch(dy);
  const Tensor dx = empty(indices.sizes(), dy.scalar_type(), dy, channels_last);
  if (dx.numel() > 0) {
    const Unpool2dProblem problem = unpool2d_problem(dtype_of(dy), indices, dy.size(2), dy.size(3), channels_last);
    const Tensor dense_dy = dense_as(dy, channels_last, launch);
    const Workspace workspace = workspace_of(kernels().max_unpool2d_workspace, indices, problem);
    const int64_t* checked = checked_indices(problem, indices, workspace, launch);
    kernels().max_unpool2d_backward(problem, dense_dy.data_ptr(), checked, dx.data_ptr(), launch);
  }
  return dx;
}

NormProblem norm_problem(const Tensor& x, bool training, double momentum, double eps, const std::string& activation) {
  int64_t L = 1;
  for (int64_t i = 2; i < x.dim(); ++i) L *= x.size(i);
  return {.dtype = dtype_of(x),
          .N = x.size(0),
          .C = x.size(1),
          .L = L,
          .channels_last = is_channels_last(x),
          .training = training,
          .momentum = momentum,
          .eps = eps,
          .activation = activation_of(activation)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_forward(const Tensor& x, OptionalTensor weight, OptionalTensor bias,
                                                          OptionalTensor residual, OptionalTensor running_mean,
                                                          OptionalTensor running_var, bool training, double momentum,
                                                          double eps, std::string activation) {
  const Launch launch(x);
  const NormProblem problem = norm_problem(x, training, momentum, eps, activation);
  const ScalarType acc = accumulation(x.scalar_type());
  const std::array<int64_t, 1> channels{problem.C};
  const Tensor y = empty(x.sizes(), x.scalar_type(), x, problem.channels_last);
  const Tensor mean = empty(channels, acc, x, false), rstd = empty(channels, acc, x, false);
  if (y.numel() == 0) {
    zero_elements(mean);
    zero_elements(rstd);
    return {y, mean, rstd};
  }
  const Tensor dense_x = dense_as(x, problem.channels_last, launch);
  const OptionalTensor dense_residual = dense_as(residual, problem.channels_last, launch);
  const OptionalTensor w = vector(weight, acc, launch), b = vector(bias, acc, launch);
  const OptionalTensor m = vector(running_mean, acc, launch), v = vector(running_var, acc, launch);
  const Workspace workspace = workspace_of(kernels().batch_norm_act_forward_workspace, x, problem);
  kernels().batch_norm_act_forward(problem,
                                   {.x = dense_x.data_ptr(),
                                    .residual = pointer(dense_residual),
                                    .weight = pointer(w),
                                    .bias = pointer(b),
                                    .running_mean = pointer(m),
                                    .running_var = pointer(v),
                                    .y = y.data_ptr(),
                                    .mean = mean.data_ptr(),
                                    .rstd = rstd.data_ptr(),
                                    .workspace = workspace.data()},
                                   launch);
  if (training && m && pointer(m) != pointer(running_mean)) copy(*m, *running_mean, launch);
  if (training && v && pointer(v) != pointer(running_var)) copy(*v, *running_var, launch);
  return {y, mean, rstd};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> batch_norm_act_backward(
    const Tensor& dy, const Tensor& x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor y, const Tensor& mean, const Tensor& rstd, bool training, double eps, std::string activation,
    bool need_dx, bool need_dweight, bool need_dbias, bool need_dresidual) {
  const Launch launch(x);
  const NormProblem problem = norm_problem(x, training, 0, eps, activation);
  const ScalarType acc = accumulation(x.scalar_type());
  const ScalarType param = weight ? weight->scalar_type() : bias ? bias->scalar_type() : acc;
  const std::array<int64_t, 1> channels{problem.C};
  OptionalTensor dx, dresidual, dweight, dbias;
  if (need_dx) dx = empty(x.sizes(), x.scalar_type(), x, problem.channels_last);
  if (need_dresidual) dresidual = empty(x.sizes(), x.scalar_type(), x, problem.channels_last);
  if (need_dweight) dweight = empty(channels, acc, x, false);
  if (need_dbias) dbias = empty(channels, acc, x, false);
  if (x.numel() == 0) {
    if (dweight) zero_elements(*dweight);
    if (dbias) zero_elements(*dbias);
  } else {
    const bool channels_last = problem.channels_last;
    const Tensor dense_dy = dense_as(dy, channels_last, launch), dense_x = dense_as(x, channels_last, launch);
    const OptionalTensor dense_residual = dense_as(residual, channels_last, launch);
    const OptionalTensor dense_y = dense_as(y, channels_last, launch);
    const OptionalTensor w = vector(weight, acc, launch), b = vector(bias, acc, launch);
    const OptionalTensor m = vector(mean, acc, launch), r = vector(rstd, acc, launch);
    const Workspace workspace = workspace_of(kernels().batch_norm_act_backward_workspace, x, problem);
    kernels().batch_norm_act_backward(problem,
                                      {.dy = dense_dy.data_ptr(),
                                       .x = dense_x.data_ptr(),
                                       .residual = pointer(dense_residual),
                                       .y = pointer(dense_y),
                                       .weight = pointer(w),
                                       .bias = pointer(b),
                                       .mean = pointer(m),
                                       .rstd = pointer(r),
                                       .dx = pointer(dx),
                                       .dresidual = pointer(dresidual),
                                       .dweight = pointer(dweight),
                                       .dbias = pointer(dbias),
                                       .workspace = workspace.data()},
                                      launch);
  }
  return {dx, vector(dweight, param, launch), vector(dbias, param, launch), dresidual};
}

// Offsets that nobody wants are empty: torch functionalizes no op that writes to arguments and has optional results.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_max_pool2d_forward(
    const Tensor& x, OptionalTensor weight, OptionalTensor bias, OptionalTensor running_mean,
    OptionalTensor running_var, bool training, double momentum, double eps, std::string activation,
    CNNOPS_WINDOW_PARAMS, int64_t dilation_h, int64_t dilation_w, bool ceil_mode, bool need_offsets) {
  const Launch launch(x);
  NormProblem norm = norm_problem(x, training, momentum, eps, activation);
  norm.channels_last = true;
  const int64_t P = pooled_size(x.size(2), kernel_h, stride_h, pad_h, dilation_h, ceil_mode);
  const int64_t Q = pooled_size(x.size(3), kernel_w, stride_w, pad_w, dilation_w, ceil_mode);
  const Sizes sizes{x.size(0), x.size(1), P, Q};
  const ScalarType acc = accumulation(x.scalar_type());
  const std::array<int64_t, 1> channels{norm.C};
  const Output y(sizes, x, x.scalar_type(), is_channels_last(x));
  const Tensor mean = empty(channels, acc, x, false), rstd = empty(channels, acc, x, false);
  const ScalarType tap = kernel_h * kernel_w <= 256 ? ScalarType::Byte : ScalarType::Int;
  const Tensor offsets = need_offsets ? empty(sizes, tap, x, true) : empty(std::array<int64_t, 1>{0}, tap, x, false);
  if (y.numel() == 0) {
    zero_elements(mean);
    zero_elements(rstd);
    return {y.finish(launch), mean, rstd, offsets};
  }
  const Pool2dProblem pool =
      pool2d_problem(x, true, x.size(2), x.size(3), P, Q, CNNOPS_WINDOW_ARGS, dilation_h, dilation_w);
  const Tensor dense_x = nhwc(x, x.scalar_type(), launch);
  const OptionalTensor w = vector(weight, acc, launch), b = vector(bias, acc, launch);
  const OptionalTensor m = vector(running_mean, acc, launch), v = vector(running_var, acc, launch);
  const Workspace workspace = workspace_of(kernels().bn_act_max_pool2d_forward_workspace, x, norm, pool);
  kernels().bn_act_max_pool2d_forward(norm, pool,
                                      {.x = dense_x.data_ptr(),
                                       .residual = nullptr,
                                       .weight = pointer(w),
                                       .bias = pointer(b),
                                       .running_mean = pointer(m),
                                       .running_var = pointer(v),
                                       .y = y.data(),
                                       .mean = mean.data_ptr(),
                                       .rstd = rstd.data_ptr(),
                                       .workspace = workspace.data()},
                                      need_offsets ? offsets.data_ptr() : nullptr, launch);
  if (training && m && pointer(m) != pointer(running_mean)) copy(*m, *running_mean, launch);
  if (training && v && pointer(v) != pointer(running_var)) copy(*v, *running_var, launch);
  return {y.finish(launch), mean, rstd, offsets};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bn_act_max_pool2d_backward(
    const Tensor& dy, const Tensor& offsets, const Tensor& x, OptionalTensor weight, OptionalTensor bias,
    const Tensor& mean, const Tensor& rstd, bool training, double eps, std::string activation, CNNOPS_WINDOW_PARAMS,
    int64_t dilation_h, int64_t dilation_w, bool need_dx, bool need_dweight, bool need_dbias) {
  const Launch launch(x);
  NormProblem norm = norm_problem(x, training, 0, eps, activation);
  norm.channels_last = true;
  const ScalarType acc = accumulation(x.scalar_type());
  const ScalarType param = weight ? weight->scalar_type() : bias ? bias->scalar_type() : acc;
  const std::array<int64_t, 1> channels{norm.C};
  std::optional<Output> dx;
  OptionalTensor dweight, dbias;
  if (need_dx) dx.emplace(x.sizes(), x, x.scalar_type(), is_channels_last(x));
  if (need_dweight) dweight = empty(channels, acc, x, false);
  if (need_dbias) dbias = empty(channels, acc, x, false);
  if (x.numel() == 0) {
    if (dweight) zero_elements(*dweight);
    if (dbias) zero_elements(*dbias);
  } else {
    const Pool2dProblem pool = pool2d_problem(x, true, x.size(2), x.size(3), dy.size(2), dy.size(3), CNNOPS_WINDOW_ARGS,
                                              dilation_h, dilation_w);
    const Tensor dense_dy = nhwc(dy, dy.scalar_type(), launch), dense_x = nhwc(x, x.scalar_type(), launch);
    const OptionalTensor w = vector(weight, acc, launch), b = vector(bias, acc, launch);
    const OptionalTensor m = vector(mean, acc, launch), r = vector(rstd, acc, launch);
    const Workspace workspace = workspace_of(kernels().bn_act_max_pool2d_backward_workspace, x, norm, pool);
    kernels().bn_act_max_pool2d_backward(norm, pool,
                                         {.dy = dense_dy.data_ptr(),
                                          .x = dense_x.data_ptr(),
                                          .residual = nullptr,
                                          .y = nullptr,
                                          .weight = pointer(w),
                                          .bias = pointer(b),
                                          .mean = pointer(m),
                                          .rstd = pointer(r),
                                          .dx = dx ? dx->data() : nullptr,
                                          .dresidual = nullptr,
                                          .dweight = pointer(dweight),
                                          .dbias = pointer(dbias),
                                          .workspace = workspace.data()},
                                         dense_offsets(offsets).data_ptr(), launch);
  }
  return {dx ? OptionalTensor(dx->finish(launch)) : std::nullopt, vector(dweight, param, launch),
          vector(dbias, param, launch)};
}

Gate gate_of(const std::string& name) {
  if (name == "sigmoid") return Gate::kSigmoid;
  STD_TORCH_CHECK(name == "hardsigmoid", "unknown gate '", name, "'");
  return Gate::kHardsigmoid;
}

SqueezeExciteProblem squeeze_excite_problem(const Tensor& x, const Tensor& weight1, const std::string& activation,
                                            const std::string& gate) {
  return {.dtype = dtype_of(x),
          .N = x.size(0),
          .C = x.size(1),
          .L = x.size(2) * x.size(3),
          .M = weight1.size(0),
          .channels_last = is_channels_last(x),
          .activation = activation_of(activation),
          .gate = gate_of(gate)};
}

// src [rows, columns] as dense dst [columns, rows], converted; either may have axes of one element behind.
void transpose(const Tensor& src, const Tensor& dst, Stream stream) {
  const int64_t rows = src.size(0), columns = src.size(1);
  const CopyProblem problem{.src_dtype = dtype_of(src),
                            .dst_dtype = dtype_of(dst),
                            .size = {1, 1, columns, rows},
                            .src_stride = {0, 0, src.stride(1), src.stride(0)},
                            .dst_stride = {0, 0, dst.stride(0), dst.stride(1)}};
  kernels().copy(problem, src.data_ptr(), dst.data_ptr(), stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_forward(const Tensor& x, const Tensor& weight1,
                                                                  OptionalTensor bias1, const Tensor& weight2,
                                                                  OptionalTensor bias2, std::string activation,
                                                                  std::string gate) {
  const Launch launch(x);
  const SqueezeExciteProblem problem = squeeze_excite_problem(x, weight1, activation, gate);
  const ScalarType acc = accumulation(x.scalar_type());
  const std::array<int64_t, 2> by_channel{problem.N, problem.C}, by_hidden{problem.N, problem.M};
  const Tensor y = empty(x.sizes(), x.scalar_type(), x, problem.channels_last);
  const Tensor pooled = empty(by_channel, acc, x, false), hidden = empty(by_hidden, acc, x, false);
  const Tensor scale = empty(by_channel, acc, x, false);
  if (y.numel() > 0) {
    const Tensor w2 = empty(std::array<int64_t, 2>{problem.M, problem.C}, acc, x, false);
    transpose(weight2, w2, launch);
    const Tensor dense_x = dense_as(x, problem.channels_last, launch);
    const OptionalTensor w1 = vector(weight1, acc, launch), b1 = vector(bias1, acc, launch);
    const OptionalTensor b2 = vector(bias2, acc, launch);
    const Workspace workspace = workspace_of(kernels().squeeze_excite_forward_workspace, x, problem);
    kernels().squeeze_excite_forward(problem,
                                     {.x = dense_x.data_ptr(),
                                      .weight1 = pointer(w1),
                                      .bias1 = pointer(b1),
                                      .weight2 = w2.data_ptr(),
                                      .bias2 = pointer(b2),
                                      .y = y.data_ptr(),
                                      .pooled = pooled.data_ptr(),
                                      .hidden = hidden.data_ptr(),
                                      .scale = scale.data_ptr(),
                                      .workspace = workspace.data()},
                                     launch);
  }
  return {y, pooled, hidden, scale};
}

// The biases are there for the second derivative, which Python makes of them.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> squeeze_excite_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight1, OptionalTensor, const Tensor& weight2, OptionalTensor,
    const Tensor& pooled, const Tensor& hidden, const Tensor& scale, std::string activation, std::string gate,
    bool need_dx, bool need_dweight1, bool need_dbias1, bool need_dweight2, bool need_dbias2) {
  const Launch launch(x);
  const SqueezeExciteProblem problem = squeeze_excite_problem(x, weight1, activation, gate);
  const ScalarType acc = accumulation(x.scalar_type()), param = weight1.scalar_type();
  const std::array<int64_t, 2> matrix{problem.M, problem.C};
  OptionalTensor dx, dweight1, dbias1, dweight2, transposed, dbias2;
  if (need_dx) dx = empty(x.sizes(), x.scalar_type(), x, problem.channels_last);
  if (need_dweight1) dweight1 = empty(weight1.sizes(), acc, x, false);
  if (need_dbias1) dbias1 = empty(std::array<int64_t, 1>{problem.M}, acc, x, false);
  if (need_dweight2) dweight2 = empty(weight2.sizes(), param, x, false);
  if (need_dbias2) dbias2 = empty(std::array<int64_t, 1>{problem.C}, acc, x, false);
  if (x.numel() == 0) {
    for (const OptionalTensor& t : {dweight1, dbias1, dweight2, dbias2})
      if (t) zero_elements(*t);
  } else {
    const Tensor w2 = empty(matrix, acc, x, false);
    transpose(weight2, w2, launch);
    if (need_dweight2) transposed = empty(matrix, acc, x, false);
    const Tensor dense_dy = dense_as(dy, problem.channels_last, launch);
    const Tensor dense_x = dense_as(x, problem.channels_last, launch);
    const OptionalTensor w1 = vector(weight1, acc, launch);
    const Workspace workspace = workspace_of(kernels().squeeze_excite_backward_workspace, x, problem);
    kernels().squeeze_excite_backward(problem,
                                      {.dy = dense_dy.data_ptr(),
                                       .x = dense_x.data_ptr(),
                                       .weight1 = pointer(w1),
                                       .weight2 = w2.data_ptr(),
                                       .pooled = pooled.data_ptr(),
                                       .hidden = hidden.data_ptr(),
                                       .scale = scale.data_ptr(),
                                       .dx = pointer(dx),
                                       .dweight1 = pointer(dweight1),
                                       .dbias1 = pointer(dbias1),
                                       .dweight2 = pointer(transposed),
                                       .dbias2 = pointer(dbias2),
                                       .workspace = workspace.data()},
                                      launch);
    if (need_dweight2) transpose(*transposed, *dweight2, launch);
  }
  return {dx, vector(dweight1, param, launch), vector(dbias1, param, launch), dweight2, vector(dbias2, param, launch)};
}

std::string conv2d_plan(std::string direction, int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t R,
                        int64_t S, CNNOPS_CONV2D_PARAMS, ScalarType dtype, bool channels_last, bool tf32,
                        int64_t architecture, int64_t multiprocessors, int64_t shared_bytes) {
  Conv2dProblem problem = conv2d_problem(dtype_of(dtype), tf32, N, C, H, W, K, R, S, CNNOPS_CONV2D_ARGS);
  problem.channels_last = channels_last;
  return kernels().conv2d_plan(direction, problem, narrow(architecture), narrow(multiprocessors), narrow(shared_bytes));
}

void use_architecture(int64_t architecture) { kernels().use_architecture(narrow(architecture)); }

std::string build_info_op() { return build_info(); }

}  // namespace
}  // namespace cnnops

#define CNNOPS_DEFINE(name, arguments, results) m.def(#name "(" arguments ") -> " results);
#define CNNOPS_DEFINE_TF32(name, arguments, results) m.def(#name "_tf32(" arguments ") -> " results);

STABLE_TORCH_LIBRARY(CNNOPS_NS, m) {
  CNNOPS_SCHEMA(CNNOPS_DEFINE)
  CNNOPS_CONV_SCHEMA(CNNOPS_DEFINE)
  if (cnnops::kernels().tf32) {
    CNNOPS_CONV_SCHEMA(CNNOPS_DEFINE_TF32)
  }
}

#define CNNOPS_IMPL(entry, op) \
  if (cnnops::kernels().entry) m.impl(#op, TORCH_BOX(&cnnops::op))
#define CNNOPS_IMPL_CONV(entry, op)                                                \
  if (cnnops::kernels().entry) {                                                   \
    m.impl(#op, TORCH_BOX(&cnnops::op<false>));                                    \
    if (cnnops::kernels().tf32) m.impl(#op "_tf32", TORCH_BOX(&cnnops::op<true>)); \
  }

STABLE_TORCH_LIBRARY_IMPL(CNNOPS_NS, CNNOPS_KEY, m) {
  CNNOPS_IMPL_CONV(conv2d_forward, conv2d_forward);
  CNNOPS_IMPL_CONV(conv2d_backward, conv2d_backward);
  CNNOPS_IMPL_CONV(activation_forward, conv2d_act_forward);
  CNNOPS_IMPL_CONV(conv_transpose2d_forward, conv_transpose2d_forward);
  CNNOPS_IMPL_CONV(conv_transpose2d_forward, conv_transpose2d_backward);
  CNNOPS_IMPL_CONV(fold_batch_norm, conv2d_bn_act_forward);
  CNNOPS_IMPL_CONV(conv2d_statistics, conv2d_statistics_forward);
  CNNOPS_IMPL_CONV(conv2d_pooled, conv2d_bn_act_pooled_forward);
  CNNOPS_IMPL(activation_backward, activation_backward);
  CNNOPS_IMPL(max_pool2d_forward, max_pool2d_forward);
  CNNOPS_IMPL(max_pool2d_backward, max_pool2d_backward);
  CNNOPS_IMPL(max_pool2d_indices, max_pool2d_indices);
  CNNOPS_IMPL(adaptive_max_pool2d_forward, adaptive_max_pool2d_forward);
  CNNOPS_IMPL(adaptive_max_pool2d_backward, adaptive_max_pool2d_backward);
  CNNOPS_IMPL(adaptive_max_pool2d_indices, adaptive_max_pool2d_indices);
  CNNOPS_IMPL(max_unpool2d_forward, max_unpool2d_forward);
  CNNOPS_IMPL(max_unpool2d_backward, max_unpool2d_backward);
  CNNOPS_IMPL(avg_pool2d_forward, avg_pool2d_forward);
  CNNOPS_IMPL(avg_pool2d_backward, avg_pool2d_backward);
  CNNOPS_IMPL(adaptive_avg_pool2d_forward, adaptive_avg_pool2d_forward);
  CNNOPS_IMPL(adaptive_avg_pool2d_backward, adaptive_avg_pool2d_backward);
  CNNOPS_IMPL(batch_norm_act_forward, batch_norm_act_forward);
  CNNOPS_IMPL(batch_norm_act_backward, batch_norm_act_backward);
  CNNOPS_IMPL(bn_act_max_pool2d_forward, bn_act_max_pool2d_forward);
  CNNOPS_IMPL(bn_act_max_pool2d_backward, bn_act_max_pool2d_backward);
  CNNOPS_IMPL(squeeze_excite_forward, squeeze_excite_forward);
  CNNOPS_IMPL(squeeze_excite_backward, squeeze_excite_backward);
}

STABLE_TORCH_LIBRARY_IMPL(CNNOPS_NS, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&cnnops::build_info_op));
  CNNOPS_IMPL(conv2d_plan, conv2d_plan);
  CNNOPS_IMPL(use_architecture, use_architecture);
}
