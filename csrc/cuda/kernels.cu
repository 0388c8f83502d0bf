// This backend's kernel table, and what was compiled into it.

#include <algorithm>
#include <string>

#include "launch.h"
#include "launchers.h"

#if defined(CNNOPS_SIMT)
#include "../simt/guard.h"
#endif

// The architectures, the flags and what the sources were are the build's to know.
#if !defined(CNNOPS_ARCHES)
#define CNNOPS_ARCHES ""
#endif
#if !defined(CNNOPS_FLAGS)
#define CNNOPS_FLAGS ""
#endif
#if !defined(CNNOPS_SOURCES)
#define CNNOPS_SOURCES ""
#endif

namespace cnnops {
namespace {

#if defined(CNNOPS_SIMT)
const std::string kBackend = "simt", kCompiler = "g++ " __VERSION__;
#else
const std::string kBackend = "cuda", kCompiler = "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." +
                                                 std::to_string(__CUDACC_VER_MINOR__) + "." +
                                                 std::to_string(__CUDACC_VER_BUILD__);
#endif

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

// CNNOPS_ARCHES names the images as nvcc does, with commas between: "sm_80,sm_90a".
std::string arches() {
  std::string out;
  const std::string names = CNNOPS_ARCHES;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    out += (out.empty() ? "" : ", ") + quoted(names.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

// The runtime that was compiled in, and the latest one that the driver knows: 13000 for 13.0.
std::string versions() {
#if defined(CNNOPS_SIMT)
  return "";
#else
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return ", \"cuda\": " + std::to_string(CUDART_VERSION) + ", \"driver\": " + std::to_string(driver);
#endif
}

std::string describe() {
  std::string names;
  for (const cuda::KernelEntry& each : cuda::launched_kernels())
    names += (names.empty() ? "" : ", ") + quoted(each.name);
  return "{\"backend\": " + quoted(kBackend) + ", \"compiler\": " + quoted(kCompiler) +
         ", \"flags\": " + quoted(CNNOPS_FLAGS) + ", \"sources\": " + quoted(CNNOPS_SOURCES) + ", \"arches\": [" +
         arches() + "], \"kernels\": [" + names + "]" + versions() + "}";
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels t{};
    t.conv2d_forward_workspace = cuda::conv2d_forward_workspace;
    t.conv2d_backward_workspace = cuda::conv2d_backward_workspace;
    t.conv2d_forward = cuda::conv2d_forward;
    t.conv2d_backward = cuda::conv2d_backward;
    t.conv_transpose2d_forward = cuda::conv_transpose2d_forward;
    t.activation_forward = cuda::activation_forward;
    t.activation_backward = cuda::activation_backward;
    t.batch_norm_act_forward_workspace = cuda::batch_norm_act_forward_workspace;
    t.batch_norm_act_backward_workspace = cuda::batch_norm_act_backward_workspace;
    t.batch_norm_act_forward = cuda::batch_norm_act_forward;
    t.batch_norm_act_backward = cuda::batch_norm_act_backward;
    t.fold_batch_norm = cuda::fold_batch_norm;
    t.bn_act_max_pool2d_forward_workspace = cuda::bn_act_max_pool2d_forward_workspace;
    t.bn_act_max_pool2d_backward_workspace = cuda::bn_act_max_pool2d_backward_workspace;
    t.bn_act_max_pool2d_forward = cuda::bn_act_max_pool2d_forward;
    t.bn_act_max_pool2d_backward = cuda::bn_act_max_pool2d_backward;
    t.squeeze_excite_forward_workspace = cuda::squeeze_excite_forward_workspace;
    t.squeeze_excite_backward_workspace = cuda::squeeze_excite_backward_workspace;
    t.squeeze_excite_forward = cuda::squeeze_excite_forward;
    t.squeeze_excite_backward = cuda::squeeze_excite_backward;
    t.max_unpool2d_workspace = cuda::max_unpool2d_workspace;
    t.max_unpool2d_misplaced = cuda::max_unpool2d_misplaced;
    t.max_unpool2d_forward = cuda::max_unpool2d_forward;
    t.max_unpool2d_backward = cuda::max_unpool2d_backward;
    t.max_pool2d_forward = cuda::max_pool2d_forward;
    t.max_pool2d_backward = cuda::max_pool2d_backward;
    t.max_pool2d_indices = cuda::max_pool2d_indices;
    t.adaptive_max_pool2d_forward = cuda::adaptive_max_pool2d_forward;
    t.adaptive_max_pool2d_backward = cuda::adaptive_max_pool2d_backward;
    t.adaptive_max_pool2d_indices = cuda::adaptive_max_pool2d_indices;
    t.avg_pool2d_forward = cuda::avg_pool2d_forward;
    t.avg_pool2d_backward = cuda::avg_pool2d_backward;
    t.adaptive_avg_pool2d_forward = cuda::adaptive_avg_pool2d_forward;
    t.adaptive_avg_pool2d_backward = cuda::adaptive_avg_pool2d_backward;
    t.copy = cuda::copy;
    t.conv2d_plan = cuda::conv2d_plan;
    t.conv2d_nchw = cuda::conv2d_nchw;
    t.use_architecture = cuda::use_architecture;
    t.conv2d_statistics = true;
    t.conv2d_pooled = true;
    t.pool2d_nchw = true;
    t.tf32 = true;
#if defined(CNNOPS_SIMT)
    t = simt::guarded(t);
#endif
    return t;
  }();
  return table;
}

const char* build_info() {
  static const std::string info = describe();
  return info.c_str();
}

}  // namespace cnnops
