// Which device this is.

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>

#include "launch.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

#if defined(CNNOPS_SIMT)
Device current() { return {simt::architecture(), simt::multiprocessors(), static_cast<int>(simt::max_shared())}; }
#else
Device query(int id) {
  const auto read = [id](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, id), "cudaDeviceGetAttribute");
    return value;
  };
  return {10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor),
          read(cudaDevAttrMultiProcessorCount), read(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// Every launch asks, so that the answers are kept.
Device current() {
  constexpr size_t kKept = 64;
  static std::array<std::once_flag, kKept> asked;
  static std::array<Device, kKept> answers;
  int id = 0;
  check(cudaGetDevice(&id), "cudaGetDevice");
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

void use_architecture(int architecture) { most() = architecture; }

}  // namespace cnnops::cuda
