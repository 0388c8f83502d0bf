// The shared memory of the block that runs: poisoned with NaN when a block starts, fenced, checked when it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

namespace cnnops::simt {

constexpr size_t kMaxShared = 227 << 10;  // bytes a block, of the architecture that has most
constexpr size_t kMaxStaticShared = 48 << 10;
constexpr size_t kWindowBase = 1024;  // where dynamic memory begins in the block's window, after what sm_90 reserves

class SharedMemory {
 public:
  // Makes everything fresh, with exactly `dynamic_bytes` of dynamic memory between its fences.
  void prepare(size_t dynamic_bytes);
  // What a block leaves behind becomes poison again.
  void refresh();

  unsigned char* dynamic() const { return dynamic_; }
  size_t dynamic_bytes() const { return dynamic_bytes_; }
  // Whether these bytes lie in dynamic memory.
  bool dynamic_holds(const void* p, size_t bytes) const;
  // Offsets in the window of dynamic memory.
  size_t offset(const void* p) const {
    return kWindowBase + static_cast<size_t>(static_cast<const unsigned char*>(p) - dynamic_);
  }
  unsigned char* at(size_t offset) const { return dynamic_ + (offset - kWindowBase); }
  size_t window_end() const { return kWindowBase + dynamic_bytes_; }
  // The variable that stands for a declaration, made when a block's first thread reaches it.
  void* variable(const void* site, size_t bytes, size_t alignment);

  // Whether these bytes are dynamic memory that the launch asked for, or of one variable.
  bool holds(uintptr_t address, size_t bytes) const {
    const size_t offset = address - reinterpret_cast<uintptr_t>(dynamic_);
    return (offset < dynamic_bytes_ && bytes <= dynamic_bytes_ - offset) || in_a_variable(address, bytes);
  }
  bool holds(const void* p, size_t bytes) const { return holds(reinterpret_cast<uintptr_t>(p), bytes); }
  // Where else in this memory they are, in words; empty if they are not in it.
  std::string misplaced(uintptr_t address, size_t bytes) const;

  // Which fence was written to, in words; empty if none was.
  std::string broken_fence() const;

 private:
  static constexpr size_t kAlignment = 1024;  // what TMA wants of a swizzled tile
  static constexpr size_t kMaxVariables = 64;

  bool in_a_variable(uintptr_t address, size_t bytes) const;

  struct Variable {
    const void* site;
    unsigned char* begin;
    size_t bytes;
  };
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
  };

  // One arena: variables with a fence around each, a fence, dynamic memory, a fence.
  std::unique_ptr<unsigned char[], Free> arena_;
  unsigned char *variables_begin_ = nullptr, *variables_end_ = nullptr, *dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0, variable_bytes_ = 0, variable_count_ = 0;
  Variable variables_[kMaxVariables] = {};
};

}  // namespace cnnops::simt
