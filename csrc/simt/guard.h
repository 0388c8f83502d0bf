// Tensors in memory of their own for the time of one call, so that no access beside them goes unseen: flush against a
// page that faults, at their end or at their start as the test chooses, the rest of their pages filled with a pattern.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../kernels.h"

namespace cnnops::simt {

enum class Guard { kNone, kEnd, kStart };
// For the calls that begin from now on.
void guard_tensors(Guard where);

// The same kernels, each call with guarded tensors. A kernel that guard.cpp does not know is missing from it.
Kernels guarded(const Kernels& plain);

// The tensors of one call, under way from construction to finish(). Without a guard they stay where they are; null
// pointers and empty tensors do so in any case. A guarded tensor keeps the alignment that it has, up to 16 bytes.
class GuardedCall {
 public:
  explicit GuardedCall(std::string name);
  ~GuardedCall();
  GuardedCall(const GuardedCall&) = delete;
  GuardedCall& operator=(const GuardedCall&) = delete;

  const void* in(const char* name, const void* tensor, int64_t bytes);
  // Holds NaN until it is written to.
  void* out(const char* name, void* tensor, int64_t bytes);
  void* in_out(const char* name, void* tensor, int64_t bytes);
  // As out, and what is left there is of no interest.
  void* scratch(const char* name, void* tensor, int64_t bytes);

  // Copies what was written to where it belongs. Throws std::runtime_error if anything was written beside a tensor.
  void finish();

 private:
  class Pages;

  bool stays(const void* tensor, int64_t bytes) const { return where_ == Guard::kNone || !tensor || bytes == 0; }
  void* place(const char* name, const void* tensor, int64_t bytes, bool writable, bool filled, void* copy_back_to);

  std::string name_;
  Guard where_;
  std::unique_lock<std::mutex> lock_;  // one guarded call at a time
  std::vector<std::unique_ptr<Pages>> tensors_;
};

}  // namespace cnnops::simt
