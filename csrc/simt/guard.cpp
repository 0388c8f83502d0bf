#include "guard.h"

#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>

#include "poison.h"
#include "trace.h"

namespace cnnops::simt {
namespace {

constexpr size_t kPage = 4096, kAlignment = 16;

std::atomic<Guard> setting{Guard::kNone};
std::mutex one_call;
// Filled while the library loads, maybe before this file's turn: nothing may be left to initialise.
constinit Kernels plain{};

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

// One tensor: a page that faults, the tensor among bytes of poison, a page that faults.
class GuardedCall::Pages {
 public:
  Pages(const char* name, size_t bytes, size_t misalignment, Guard where, void* copy_back_to)
      : name_(name), bytes_(bytes), open_bytes_(round_up(bytes + misalignment, kPage)), copy_back_to_(copy_back_to) {
    void* const all = mmap(nullptr, kPage + open_bytes_ + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    open_ = static_cast<unsigned char*>(all) + kPage;
    mprotect(open_, open_bytes_, PROT_READ | PROT_WRITE);
    poison(open_, open_bytes_);
    const size_t last = (open_bytes_ - bytes - misalignment) / kAlignment * kAlignment + misalignment;
    tensor_ = open_ + (where == Guard::kEnd ? last : misalignment);
  }
  ~Pages() { munmap(open_ - kPage, kPage + open_bytes_ + kPage); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  const char* name() const { return name_; }
  unsigned char* tensor() const { return tensor_; }

  void copy_back() const {
    if (copy_back_to_) std::memcpy(copy_back_to_, tensor_, bytes_);
  }
  // Where beside the tensor something was written, in words; empty if nowhere.
  std::string stain() const {
    const unsigned char* const end = tensor_ + bytes_;
    for (const unsigned char* p = end; p < open_ + open_bytes_; ++p)
      if (written(p)) return std::string("beyond the end of ") + name_ + ", at distance " + std::to_string(p - end + 1);
    for (const unsigned char* p = tensor_; p-- > open_;)
      if (written(p))
        return std::string("before the start of ") + name_ + ", at distance " + std::to_string(tensor_ - p);
    return "";
  }

 private:
  bool written(const unsigned char* p) const { return *p != poison_at(static_cast<size_t>(p - open_)); }

  const char* name_;
  size_t bytes_, open_bytes_;
  void* copy_back_to_;
  unsigned char *open_, *tensor_;
};

void guard_tensors(Guard where) { setting = where; }

GuardedCall::GuardedCall(std::string name) : name_(std::move(name)), where_(setting) {
  if (where_ != Guard::kNone) lock_ = std::unique_lock(one_call);
}

GuardedCall::~GuardedCall() {
  if (where_ != Guard::kNone) trace::forget_tensors();
}

void* GuardedCall::place(const char* name, const void* tensor, int64_t bytes, bool writable, bool filled,
                         void* copy_back_to) {
  const auto size = static_cast<size_t>(bytes);
  auto pages =
      std::make_unique<Pages>(name, size, reinterpret_cast<uintptr_t>(tensor) % kAlignment, where_, copy_back_to);
  if (filled) std::memcpy(pages->tensor(), tensor, size);
  trace::add_tensor({name, reinterpret_cast<uintptr_t>(pages->tensor()), size, writable});
  tensors_.push_back(std::move(pages));
  return tensors_.back()->tensor();
}

const void* GuardedCall::in(const char* name, const void* tensor, int64_t bytes) {
  return stays(tensor, bytes) ? tensor : place(name, tensor, bytes, false, true, nullptr);
}
void* GuardedCall::out(const char* name, void* tensor, int64_t bytes) {
  return stays(tensor, bytes) ? tensor : place(name, tensor, bytes, true, false, tensor);
}
void* GuardedCall::in_out(const char* name, void* tensor, int64_t bytes) {
  return stays(tensor, bytes) ? tensor : place(name, tensor, bytes, true, true, tensor);
}
void* GuardedCall::scratch(const char* name, void* tensor, int64_t bytes) {
  return stays(tensor, bytes) ? tensor : place(name, tensor, bytes, true, false, nullptr);
}

void GuardedCall::finish() {
  for (const auto& each : tensors_) {
    const std::string stain = each->stain();
    if (!stain.empty()) throw std::runtime_error("simt: " + name_ + ": a write " + stain);
  }
  for (const auto& each : tensors_) each->copy_back();
}

namespace {

int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kDouble:
      return 8;
    case DType::kFloat:
      return 4;
    case DType::kHalf:
    case DType::kBFloat16:
      return 2;
  }
  return 0;
}

// Of a per-channel number in the accumulation type.
int64_t accumulator_bytes(DType dtype) { return dtype == DType::kDouble ? 8 : 4; }

int64_t x_bytes(const Conv2dProblem& p) { return int64_t{p.N} * p.H * p.W * p.C * element_bytes(p.dtype); }
int64_t y_bytes(const Conv2dProblem& p) { return int64_t{p.N} * p.P * p.Q * p.K * element_bytes(p.dtype); }
int64_t weight_bytes(const Conv2dProblem& p) {
  return int64_t{p.K} * p.R * p.S * (p.C / p.groups) * element_bytes(p.dtype);
}

// From the first element to the last one that a copy touches.
int64_t span_bytes(DType dtype, const int64_t (&size)[4], const int64_t (&stride)[4]) {
  int64_t last = 0;
  for (int axis = 0; axis < 4; ++axis) last += (size[axis] - 1) * stride[axis];
  return (last + 1) * element_bytes(dtype);
}

void conv2d_forward(const Conv2dProblem& p, const Epilogue& epilogue, const void* x, const void* weight, void* y,
                    void* workspace, Stream stream) {
  GuardedCall call("conv2d_forward");
  const int64_t scale_bytes = p.K * accumulator_bytes(p.dtype);
  Epilogue inside = epilogue;
  inside.bias = call.in("bias", epilogue.bias, epilogue.scale ? scale_bytes : p.K * element_bytes(p.dtype));
  inside.scale = call.in("scale", epilogue.scale, scale_bytes);
  inside.residual = call.in("residual", epilogue.residual, y_bytes(p));
  inside.mean = call.out("mean", epilogue.mean, scale_bytes);
  inside.m2 = call.out("m2", epilogue.m2, scale_bytes);
  inside.pooled = call.out("pooled", epilogue.pooled, p.N * scale_bytes);
  plain.conv2d_forward(p, inside, call.in("x", x, x_bytes(p)), call.in("weight", weight, weight_bytes(p)),
                       call.out("y", y, y_bytes(p)),
                       call.scratch("workspace", workspace, plain.conv2d_forward_workspace(p, epilogue)), stream);
  call.finish();
}

void conv2d_backward(const Conv2dProblem& p, const void* dy, const void* x, const void* weight, void* dx, void* dweight,
                     void* dbias, void* workspace, Stream stream) {
  GuardedCall call("conv2d_backward");
  const int64_t scratch_bytes = plain.conv2d_backward_workspace(p, dx, dweight, dbias);
  plain.conv2d_backward(p, call.in("dy", dy, y_bytes(p)), call.in("x", x, x_bytes(p)),
                        call.in("weight", weight, weight_bytes(p)), call.out("dx", dx, x_bytes(p)),
                        call.out("dweight", dweight, weight_bytes(p)),
                        call.out("dbias", dbias, p.K * element_bytes(p.dtype)),
                        call.scratch("workspace", workspace, scratch_bytes), stream);
  call.finish();
}

void conv_transpose2d_forward(const Conv2dProblem& p, const void* x, const void* weight, const void* bias, void* y,
                              void* workspace, Stream stream) {
  GuardedCall call("conv_transpose2d_forward");
  plain.conv_transpose2d_forward(
      p, call.in("x", x, y_bytes(p)), call.in("weight", weight, weight_bytes(p)),
      call.in("bias", bias, p.C * element_bytes(p.dtype)), call.out("y", y, x_bytes(p)),
      call.scratch("workspace", workspace, plain.conv2d_backward_workspace(p, true, false, false)), stream);
  call.finish();
}

void activation_forward(DType dtype, Activation activation, int64_t count, const void* z, void* y, Stream stream) {
  GuardedCall call("activation_forward");
  const int64_t bytes = count * element_bytes(dtype);
  plain.activation_forward(dtype, activation, count, call.in("z", z, bytes), call.out("y", y, bytes), stream);
  call.finish();
}

void activation_backward(DType dtype, Activation activation, int64_t count, const void* dy, const void* saved, void* dz,
                         Stream stream) {
  GuardedCall call("activation_backward");
  const int64_t bytes = count * element_bytes(dtype);
  plain.activation_backward(dtype, activation, count, call.in("dy", dy, bytes), call.in("saved", saved, bytes),
                            call.out("dz", dz, bytes), stream);
  call.finish();
}

void fold_batch_norm(DType dtype, int64_t channels, double eps, const BatchNormFold& fold, Stream stream) {
  GuardedCall call("fold_batch_norm");
  const int64_t bytes = channels * accumulator_bytes(dtype);
  const BatchNormFold inside{call.in("conv_bias", fold.conv_bias, bytes),
                             call.in("running_mean", fold.running_mean, bytes),
                             call.in("running_var", fold.running_var, bytes),
                             call.in("weight", fold.weight, bytes),
                             call.in("bias", fold.bias, bytes),
                             call.out("scale", fold.scale, bytes),
                             call.out("shift", fold.shift, bytes)};
  plain.fold_batch_norm(dtype, channels, eps, inside, stream);
  call.finish();
}

int64_t x_bytes(const Pool2dProblem& p) { return int64_t{p.N} * p.C * p.H * p.W * element_bytes(p.dtype); }
int64_t y_bytes(const Pool2dProblem& p) { return int64_t{p.N} * p.C * p.P * p.Q * element_bytes(p.dtype); }
int64_t outputs(const Pool2dProblem& p) { return int64_t{p.N} * p.C * p.P * p.Q; }
int64_t offsets_bytes(const Pool2dProblem& p) {
  return outputs(p) * static_cast<int64_t>(int64_t{p.R} * p.S <= 256 ? sizeof(uint8_t) : sizeof(int32_t));
}
int64_t adaptive_offsets_bytes(const Pool2dProblem& p) { return outputs(p) * int64_t{sizeof(int32_t)}; }
int64_t indices_bytes(const Pool2dProblem& p) { return outputs(p) * int64_t{sizeof(int64_t)}; }

void max_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, void* offsets, Stream stream) {
  GuardedCall call("max_pool2d_forward");
  plain.max_pool2d_forward(p, call.in("x", x, x_bytes(p)), call.out("y", y, y_bytes(p)),
                           call.out("offsets", offsets, offsets_bytes(p)), stream);
  call.finish();
}

void max_pool2d_backward(const Pool2dProblem& p, const void* dy, const void* offsets, void* dx, Stream stream) {
  GuardedCall call("max_pool2d_backward");
  plain.max_pool2d_backward(p, call.in("dy", dy, y_bytes(p)), call.in("offsets", offsets, offsets_bytes(p)),
                            call.out("dx", dx, x_bytes(p)), stream);
  call.finish();
}

void max_pool2d_indices(const Pool2dProblem& p, const void* offsets, int64_t* indices, Stream stream) {
  GuardedCall call("max_pool2d_indices");
  plain.max_pool2d_indices(p, call.in("offsets", offsets, offsets_bytes(p)),
                           static_cast<int64_t*>(call.out("indices", indices, indices_bytes(p))), stream);
  call.finish();
}

void adaptive_max_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, int32_t* offsets, Stream stream) {
  GuardedCall call("adaptive_max_pool2d_forward");
  plain.adaptive_max_pool2d_forward(p, call.in("x", x, x_bytes(p)), call.out("y", y, y_bytes(p)),
                                    static_cast<int32_t*>(call.out("offsets", offsets, adaptive_offsets_bytes(p))),
                                    stream);
  call.finish();
}

void adaptive_max_pool2d_backward(const Pool2dProblem& p, const void* dy, const int32_t* offsets, void* dx,
                                  Stream stream) {
  GuardedCall call("adaptive_max_pool2d_backward");
  plain.adaptive_max_pool2d_backward(
      p, call.in("dy", dy, y_bytes(p)),
      static_cast<const int32_t*>(call.in("offsets", offsets, adaptive_offsets_bytes(p))),
      call.out("dx", dx, x_bytes(p)), stream);
  call.finish();
}

void adaptive_max_pool2d_indices(const Pool2dProblem& p, const int32_t* offsets, int64_t* indices, Stream stream) {
  GuardedCall call("adaptive_max_pool2d_indices");
  plain.adaptive_max_pool2d_indices(p,
                                    static_cast<const int32_t*>(call.in("offsets", offsets, adaptive_offsets_bytes(p))),
                                    static_cast<int64_t*>(call.out("indices", indices, indices_bytes(p))), stream);
  call.finish();
}

void avg_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, Stream stream) {
  GuardedCall call("avg_pool2d_forward");
  plain.avg_pool2d_forward(p, call.in("x", x, x_bytes(p)), call.out("y", y, y_bytes(p)), stream);
  call.finish();
}

void avg_pool2d_backward(const Pool2dProblem& p, const void* dy, void* dx, Stream stream) {
  GuardedCall call("avg_pool2d_backward");
  plain.avg_pool2d_backward(p, call.in("dy", dy, y_bytes(p)), call.out("dx", dx, x_bytes(p)), stream);
  call.finish();
}

void adaptive_avg_pool2d_forward(const Pool2dProblem& p, const void* x, void* y, Stream stream) {
  GuardedCall call("adaptive_avg_pool2d_forward");
  plain.adaptive_avg_pool2d_forward(p, call.in("x", x, x_bytes(p)), call.out("y", y, y_bytes(p)), stream);
  call.finish();
}

void adaptive_avg_pool2d_backward(const Pool2dProblem& p, const void* dy, void* dx, Stream stream) {
  GuardedCall call("adaptive_avg_pool2d_backward");
  plain.adaptive_avg_pool2d_backward(p, call.in("dy", dy, y_bytes(p)), call.out("dx", dx, x_bytes(p)), stream);
  call.finish();
}

int64_t x_bytes(const Unpool2dProblem& p) { return p.N * p.C * p.H * p.W * element_bytes(p.dtype); }
int64_t y_bytes(const Unpool2dProblem& p) { return p.N * p.C * p.P * p.Q * element_bytes(p.dtype); }

// The indices have strides of their own.
const int64_t* guarded_indices(GuardedCall& call, const Unpool2dProblem& p, const int64_t* indices) {
  const int64_t last = (p.N - 1) * p.index_stride[0] + (p.C - 1) * p.index_stride[1] + (p.H - 1) * p.index_stride[2] +
                       (p.W - 1) * p.index_stride[3];
  return static_cast<const int64_t*>(call.in("indices", indices, (last + 1) * int64_t{sizeof(int64_t)}));
}

int64_t unpool_workspace(const Unpool2dProblem& p) {
  return plain.max_unpool2d_workspace ? plain.max_unpool2d_workspace(p) : 0;
}

bool max_unpool2d_misplaced(const Unpool2dProblem& p, const int64_t* indices, int64_t* found, void* workspace,
                            Stream stream) {
  GuardedCall call("max_unpool2d_misplaced");
  const bool misplaced = plain.max_unpool2d_misplaced(p, guarded_indices(call, p, indices), found,
                                                      call.in_out("workspace", workspace, unpool_workspace(p)), stream);
  call.finish();
  return misplaced;
}

void max_unpool2d_forward(const Unpool2dProblem& p, const void* x, const int64_t* indices, void* y,
                          const void* workspace, Stream stream) {
  GuardedCall call("max_unpool2d_forward");
  plain.max_unpool2d_forward(p, call.in("x", x, x_bytes(p)), guarded_indices(call, p, indices),
                             call.out("y", y, y_bytes(p)), call.in("workspace", workspace, unpool_workspace(p)),
                             stream);
  call.finish();
}

void max_unpool2d_backward(const Unpool2dProblem& p, const void* dy, const int64_t* indices, void* dx, Stream stream) {
  GuardedCall call("max_unpool2d_backward");
  plain.max_unpool2d_backward(p, call.in("dy", dy, y_bytes(p)), guarded_indices(call, p, indices),
                              call.out("dx", dx, x_bytes(p)), stream);
  call.finish();
}

int64_t x_bytes(const NormProblem& p) { return p.N * p.C * p.L * element_bytes(p.dtype); }

template <class... Problems>
int64_t scratch_bytes(int64_t (*workspace)(const Problems&...), const Problems&... problems) {
  return workspace ? workspace(problems...) : 0;
}

BatchNormForward guarded_norm(GuardedCall& call, const NormProblem& p, const BatchNormForward& b, int64_t y_bytes,
                              int64_t workspace_bytes) {
  const int64_t bytes = p.C * accumulator_bytes(p.dtype);
  const auto running = [&](const char* name, void* tensor) {
    return p.training ? call.in_out(name, tensor, bytes) : const_cast<void*>(call.in(name, tensor, bytes));
  };
  return {call.in("x", b.x, x_bytes(p)),
          call.in("residual", b.residual, x_bytes(p)),
          call.in("weight", b.weight, bytes),
          call.in("bias", b.bias, bytes),
          running("running_mean", b.running_mean),
          running("running_var", b.running_var),
          call.out("y", b.y, y_bytes),
          call.out("mean", b.mean, bytes),
          call.out("rstd", b.rstd, bytes),
          call.scratch("workspace", b.workspace, workspace_bytes)};
}

BatchNormBackward guarded_norm(GuardedCall& call, const NormProblem& p, const BatchNormBackward& b, int64_t dy_bytes,
                               int64_t workspace_bytes) {
  const int64_t bytes = p.C * accumulator_bytes(p.dtype);
  return {call.in("dy", b.dy, dy_bytes),
          call.in("x", b.x, x_bytes(p)),
          call.in("residual", b.residual, x_bytes(p)),
          call.in("y", b.y, x_bytes(p)),
          call.in("weight", b.weight, bytes),
          call.in("bias", b.bias, bytes),
          call.in("mean", b.mean, bytes),
          call.in("rstd", b.rstd, bytes),
          call.out("dx", b.dx, x_bytes(p)),
          call.out("dresidual", b.dresidual, x_bytes(p)),
          call.out("dweight", b.dweight, bytes),
          call.out("dbias", b.dbias, bytes),
          call.scratch("workspace", b.workspace, workspace_bytes)};
}

void batch_norm_act_forward(const NormProblem& p, const BatchNormForward& b, Stream stream) {
  GuardedCall call("batch_norm_act_forward");
  const int64_t scratch = scratch_bytes(plain.batch_norm_act_forward_workspace, p);
  plain.batch_norm_act_forward(p, guarded_norm(call, p, b, x_bytes(p), scratch), stream);
  call.finish();
}

void batch_norm_act_backward(const NormProblem& p, const BatchNormBackward& b, Stream stream) {
  GuardedCall call("batch_norm_act_backward");
  const int64_t scratch = scratch_bytes(plain.batch_norm_act_backward_workspace, p);
  plain.batch_norm_act_backward(p, guarded_norm(call, p, b, x_bytes(p), scratch), stream);
  call.finish();
}

void bn_act_max_pool2d_forward(const NormProblem& p, const Pool2dProblem& pool, const BatchNormForward& b,
                               void* offsets, Stream stream) {
  GuardedCall call("bn_act_max_pool2d_forward");
  const int64_t scratch = scratch_bytes(plain.bn_act_max_pool2d_forward_workspace, p, pool);
  plain.bn_act_max_pool2d_forward(p, pool, guarded_norm(call, p, b, y_bytes(pool), scratch),
                                  call.out("offsets", offsets, offsets_bytes(pool)), stream);
  call.finish();
}

void bn_act_max_pool2d_backward(const NormProblem& p, const Pool2dProblem& pool, const BatchNormBackward& b,
                                const void* offsets, Stream stream) {
  GuardedCall call("bn_act_max_pool2d_backward");
  const int64_t scratch = scratch_bytes(plain.bn_act_max_pool2d_backward_workspace, p, pool);
  plain.bn_act_max_pool2d_backward(p, pool, guarded_norm(call, p, b, y_bytes(pool), scratch),
                                   call.in("offsets", offsets, offsets_bytes(pool)), stream);
  call.finish();
}

void squeeze_excite_forward(const SqueezeExciteProblem& p, const SqueezeExciteForward& s, Stream stream) {
  GuardedCall call("squeeze_excite_forward");
  const int64_t x_bytes = p.N * p.C * p.L * element_bytes(p.dtype), each = accumulator_bytes(p.dtype);
  const SqueezeExciteForward inside{
      call.in("x", s.x, x_bytes),
      call.in("weight1", s.weight1, p.M * p.C * each),
      call.in("bias1", s.bias1, p.M * each),
      call.in("weight2", s.weight2, p.M * p.C * each),
      call.in("bias2", s.bias2, p.C * each),
      call.out("y", s.y, x_bytes),
      call.out("pooled", s.pooled, p.N * p.C * each),
      call.out("hidden", s.hidden, p.N * p.M * each),
      call.out("scale", s.scale, p.N * p.C * each),
      call.scratch("workspace", s.workspace, scratch_bytes(plain.squeeze_excite_forward_workspace, p))};
  plain.squeeze_excite_forward(p, inside, stream);
  call.finish();
}

void squeeze_excite_backward(const SqueezeExciteProblem& p, const SqueezeExciteBackward& s, Stream stream) {
  GuardedCall call("squeeze_excite_backward");
  const int64_t x_bytes = p.N * p.C * p.L * element_bytes(p.dtype), each = accumulator_bytes(p.dtype);
  const SqueezeExciteBackward inside{
      call.in("dy", s.dy, x_bytes),
      call.in("x", s.x, x_bytes),
      call.in("weight1", s.weight1, p.M * p.C * each),
      call.in("weight2", s.weight2, p.M * p.C * each),
      call.in("pooled", s.pooled, p.N * p.C * each),
      call.in("hidden", s.hidden, p.N * p.M * each),
      call.in("scale", s.scale, p.N * p.C * each),
      call.out("dx", s.dx, x_bytes),
      call.out("dweight1", s.dweight1, p.M * p.C * each),
      call.out("dbias1", s.dbias1, p.M * each),
      call.out("dweight2", s.dweight2, p.M * p.C * each),
      call.out("dbias2", s.dbias2, p.C * each),
      call.scratch("workspace", s.workspace, scratch_bytes(plain.squeeze_excite_backward_workspace, p))};
  plain.squeeze_excite_backward(p, inside, stream);
  call.finish();
}

// Between the elements that a copy writes there may be others, which keep their values.
void copy(const CopyProblem& p, const void* src, void* dst, Stream stream) {
  GuardedCall call("copy");
  plain.copy(p, call.in("src", src, span_bytes(p.src_dtype, p.size, p.src_stride)),
             call.in_out("dst", dst, span_bytes(p.dst_dtype, p.size, p.dst_stride)), stream);
  call.finish();
}

}  // namespace

Kernels guarded(const Kernels& all) {
  plain = all;
  Kernels table{};
#define CNNOPS_AS_IT_IS(entry) table.entry = plain.entry
  CNNOPS_AS_IT_IS(conv2d_forward_workspace);
  CNNOPS_AS_IT_IS(conv2d_backward_workspace);
  CNNOPS_AS_IT_IS(batch_norm_act_forward_workspace);
  CNNOPS_AS_IT_IS(batch_norm_act_backward_workspace);
  CNNOPS_AS_IT_IS(bn_act_max_pool2d_forward_workspace);
  CNNOPS_AS_IT_IS(bn_act_max_pool2d_backward_workspace);
  CNNOPS_AS_IT_IS(squeeze_excite_forward_workspace);
  CNNOPS_AS_IT_IS(squeeze_excite_backward_workspace);
  CNNOPS_AS_IT_IS(conv2d_plan);
  CNNOPS_AS_IT_IS(conv2d_nchw);
  CNNOPS_AS_IT_IS(use_architecture);
  CNNOPS_AS_IT_IS(max_unpool2d_workspace);
  CNNOPS_AS_IT_IS(pool2d_nchw);
  CNNOPS_AS_IT_IS(conv2d_statistics);
  CNNOPS_AS_IT_IS(conv2d_pooled);
  CNNOPS_AS_IT_IS(tf32);
  CNNOPS_AS_IT_IS(conv2d_in_float);
#undef CNNOPS_AS_IT_IS
#define CNNOPS_GUARDED(entry) \
  if (plain.entry) table.entry = entry
  CNNOPS_GUARDED(conv2d_forward);
  CNNOPS_GUARDED(conv2d_backward);
  CNNOPS_GUARDED(conv_transpose2d_forward);
  CNNOPS_GUARDED(activation_forward);
  CNNOPS_GUARDED(activation_backward);
  CNNOPS_GUARDED(max_pool2d_forward);
  CNNOPS_GUARDED(max_pool2d_backward);
  CNNOPS_GUARDED(max_pool2d_indices);
  CNNOPS_GUARDED(adaptive_max_pool2d_forward);
  CNNOPS_GUARDED(adaptive_max_pool2d_backward);
  CNNOPS_GUARDED(adaptive_max_pool2d_indices);
  CNNOPS_GUARDED(max_unpool2d_misplaced);
  CNNOPS_GUARDED(max_unpool2d_forward);
  CNNOPS_GUARDED(max_unpool2d_backward);
  CNNOPS_GUARDED(avg_pool2d_forward);
  CNNOPS_GUARDED(avg_pool2d_backward);
  CNNOPS_GUARDED(adaptive_avg_pool2d_forward);
  CNNOPS_GUARDED(adaptive_avg_pool2d_backward);
  CNNOPS_GUARDED(batch_norm_act_forward);
  CNNOPS_GUARDED(batch_norm_act_backward);
  CNNOPS_GUARDED(fold_batch_norm);
  CNNOPS_GUARDED(bn_act_max_pool2d_forward);
  CNNOPS_GUARDED(bn_act_max_pool2d_backward);
  CNNOPS_GUARDED(squeeze_excite_forward);
  CNNOPS_GUARDED(squeeze_excite_backward);
  CNNOPS_GUARDED(copy);
#undef CNNOPS_GUARDED
  return table;
}

}  // namespace cnnops::simt
