// Which device this is.

#include <array>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

#if defined(CNNOPS_SIMT)
Device current() {
  return {simt::architecture(), simt::multiprocessors(), static_cast<int>(simt::max_shared()), simt::l2_bytes()};
}
#else
int current_id() {
  int id = 0;
  check(cudaGetDevice(&id), "cudaGetDevice");
  return id;
}

Device query(int id) {
  const auto read = [id](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, id), "cudaDeviceGetAttribute");
    return value;
  };
  return {10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor),
          read(cudaDevAttrMultiProcessorCount), read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          read(cudaDevAttrL2CacheSize)};
}

// Every launch asks, so that the answers are kept.
Device current() {
  constexpr size_t kKept = 64;
  static std::array<std::once_flag, kKept> asked;
  static std::array<Device, kKept> answers;
  const int id = current_id();
  const auto i = static_cast<size_t>(id);
  if (i >= kKept) return query(id);
  std::call_once(asked[i], [&] { answers[i] = query(id); });
  return answers[i];
}
#endif

int architecture_in_environment() {
  const char* const text = std::getenv("CNNOPS_CUDA_ARCH");
  if (!text) return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (end == text || *end || value < 0 || value > INT32_MAX)
    throw std::runtime_error(std::string("CNNOPS_CUDA_ARCH must be an architecture like 80, but is '") + text + "'");
  return static_cast<int>(value);
}

std::atomic<int>& most() {
  static std::atomic<int> architecture{architecture_in_environment()};
  return architecture;
}

}  // namespace

Device device() {
  Device found = current();
  const int limit = most();
  if (limit > 0 && limit < found.architecture) found.architecture = limit;
  return found;
}

#if defined(CNNOPS_SIMT)
int64_t resident_blocks(const KernelEntry&, int threads) {
  return simt::resident_blocks(static_cast<unsigned>(threads));
}
#else
int64_t resident_blocks(const KernelEntry& kernel, int threads) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> answers;
  const std::pair asked{current_id(), kernel.function};
  const std::lock_guard lock(mutex);
  if (const auto known = answers.find(asked); known != answers.end()) return known->second;
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, threads, 0), kernel.name);
  return answers[asked] = int64_t{each} * device().multiprocessors;
}

void allow_shared(const KernelEntry& kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{current_id(), kernel.function}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        kernel.name);
  most = bytes;
}
#endif

void use_architecture(int architecture) { most() = architecture; }

}  // namespace cnnops::cuda
