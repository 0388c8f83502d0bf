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
Kernels plain;

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
  table.conv2d_forward_workspace = plain.conv2d_forward_workspace;
  table.conv2d_backward_workspace = plain.conv2d_backward_workspace;
  table.conv2d_plan = plain.conv2d_plan;
  table.use_architecture = plain.use_architecture;
  table.conv2d_statistics = plain.conv2d_statistics;
  table.tf32 = plain.tf32;
  table.conv2d_in_float = plain.conv2d_in_float;
#define CNNOPS_GUARDED(entry) \
  if (plain.entry) table.entry = entry
  CNNOPS_GUARDED(conv2d_forward);
  CNNOPS_GUARDED(conv2d_backward);
  CNNOPS_GUARDED(conv_transpose2d_forward);
  CNNOPS_GUARDED(activation_forward);
  CNNOPS_GUARDED(activation_backward);
  CNNOPS_GUARDED(fold_batch_norm);
  CNNOPS_GUARDED(copy);
#undef CNNOPS_GUARDED
  return table;
}

}  // namespace cnnops::simt
