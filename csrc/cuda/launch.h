// What kernel sources see of the machine: real CUDA, or with CNNOPS_SIMT the emulator that stands in for it.
//
// Kernels are launched by CNNOPS_LAUNCH, CNNOPS_LAUNCH_CLUSTERS with `cluster` blocks to a cluster, or
// CNNOPS_LAUNCH_COOPERATIVE with all blocks, at most resident_blocks(), at once, alone, and have their shared memory by
// CNNOPS_SHARED (a variable; T is a single name) and CNNOPS_DYNAMIC_SHARED (what the launch asked for).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../kernels.h"
#include "device.h"

#if defined(CNNOPS_SIMT)

#include "../simt/simt.h"

#define CNNOPS_UNROLL _Pragma("GCC unroll 8")
#define CNNOPS_NO_UNROLL
#define CNNOPS_SHARED(T, name)     \
  static const char name##_site{}; \
  T& name = *static_cast<T*>(::cnnops::simt::static_shared(&name##_site, sizeof(T), alignof(T)))
#define CNNOPS_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::cnnops::simt::dynamic_shared())
#define CNNOPS_LAUNCH_AS(kernel, grid, block, cluster, cooperative, shared_bytes, stream, ...)            \
  do {                                                                                                    \
    static_cast<void>(stream);                                                                            \
    ::cnnops::simt::launch(                                                                               \
        ::cnnops::cuda::Launched<kernel>::entry.name.c_str(), (grid), (block), (shared_bytes),            \
        [=]() __attribute__((noipa)) CNNOPS_UNTRACED { kernel(__VA_ARGS__); }, (cluster), (cooperative)); \
  } while (false)

#else

#include <cuda_runtime.h>

#define CNNOPS_UNROLL _Pragma("unroll")
#define CNNOPS_NO_UNROLL _Pragma("unroll 1")
#define CNNOPS_SHARED(T, name) __shared__ T name
#define CNNOPS_DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char cnnops_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(cnnops_dynamic_shared)
#define CNNOPS_LAUNCH_AS(kernel, grid, block, cluster, cooperative, shared_bytes, stream, ...)                       \
  ::cnnops::cuda::launch(::cnnops::cuda::Launched<kernel>::entry, kernel, (grid), (block), (cluster), (cooperative), \
                         (shared_bytes), static_cast<cudaStream_t>(stream), __VA_ARGS__)

#endif

#define CNNOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  CNNOPS_LAUNCH_AS(kernel, grid, block, 1, false, shared_bytes, stream, __VA_ARGS__)
#define CNNOPS_LAUNCH_CLUSTERS(kernel, grid, block, cluster, shared_bytes, stream, ...) \
  CNNOPS_LAUNCH_AS(kernel, grid, block, cluster, false, shared_bytes, stream, __VA_ARGS__)
#define CNNOPS_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  CNNOPS_LAUNCH_AS(kernel, grid, block, 1, true, shared_bytes, stream, __VA_ARGS__)

namespace cnnops::cuda {

struct KernelEntry {
  std::string name;
  const void* function;
};

// Every kernel that this library can launch.
inline std::vector<KernelEntry>& launched_kernels() {
  static std::vector<KernelEntry> all;
  return all;
}

// "conv2d_forward_kernel<float>", cut out of the compiler's own name for a function that has the kernel as template
// argument. Namespaces are left out: nvcc gives the unnamed one a name of its own.
inline std::string kernel_name(std::string signature) {
  const size_t begin = signature.find("kernel = ") + 9, end = signature.find_first_of(";]", begin);
  std::string name = signature.substr(begin, end - begin);
  for (size_t scope; (scope = name.find("::")) != std::string::npos;) {
    const size_t before = name.find_last_of("<, ", scope);
    const size_t first = before == std::string::npos ? 0 : before + 1;
    name.erase(first, scope + 2 - first);
  }
  return name;
}

// Naming a kernel in a launch puts it into launched_kernels() when the library is loaded.
template <auto kernel>
struct Launched {
  static KernelEntry make() {
    launched_kernels().push_back({kernel_name(__PRETTY_FUNCTION__), reinterpret_cast<const void*>(kernel)});
    return launched_kernels().back();
  }
  static inline const KernelEntry entry = make();
};

// The current device, of at most the architecture that use_architecture() or CNNOPS_CUDA_ARCH names.
Device device();
// How many blocks of so many threads, and no dynamic shared memory, the current device holds at once.
int64_t resident_blocks(const KernelEntry& kernel, int threads);

#if !defined(CNNOPS_SIMT)
inline void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// A block may use more than 48 KB of shared memory only if its kernel was told so. What it was told never shrinks:
// other threads' launches, and graphs, rely on it.
void allow_shared(const KernelEntry& kernel, size_t bytes);

template <class... Parameters, class... Arguments>
void launch(const KernelEntry& entry, void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
            bool cooperative, size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (shared_bytes > kAlwaysAllowed) allow_shared(entry, shared_bytes);
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  if (cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), entry.name);
}
#endif

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A grid along x, which has room for 2^31 - 1 blocks. Every block writes at least one element of a tensor that fits in
// memory, most of them thousands, so that the limit is never met.
inline dim3 blocks(int64_t count) {
  if (count > INT32_MAX) throw std::runtime_error("a launch of " + std::to_string(count) + " blocks exceeds the grid");
  return dim3(static_cast<unsigned>(count));
}

struct Split {
  int64_t quotient, remainder;
};

// 64-bit division costs a device several times what 32-bit division does, and is seldom needed.
__host__ __device__ __forceinline__ Split split(int64_t n, int64_t by) {
  if ((static_cast<uint64_t>(n) | static_cast<uint64_t>(by)) >> 32) return {n / by, n % by};
  const auto low = static_cast<uint32_t>(n), low_by = static_cast<uint32_t>(by);
  return {low / low_by, low % low_by};
}

__device__ __forceinline__ bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace cnnops::cuda
