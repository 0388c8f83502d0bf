#include "shared_memory.h"

#include <algorithm>

#include "device.h"
#include "poison.h"
#include "trace.h"

namespace cnnops::simt {
namespace {

constexpr size_t kFence = 1024;                          // bytes around dynamic memory
constexpr size_t kVariableFence = 64;                    // bytes around each variable
constexpr size_t kVariableArena = 2 * kMaxStaticShared;  // room for the variables, their fences and alignment
constexpr size_t kArena = kVariableArena + kFence + kMaxShared + kFence;

// `origin` is where the poisoning began.
bool poisoned(const unsigned char* begin, const unsigned char* end, const unsigned char* origin) {
  for (const unsigned char* p = begin; p < end; ++p)
    if (*p != poison_at(static_cast<size_t>(p - origin))) return false;
  return true;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

void SharedMemory::prepare(size_t dynamic_bytes) {
  if (!arena_) {
    arena_.reset(new (std::align_val_t{kAlignment}) unsigned char[kArena]);
    trace::add_arena(arena_.get(), kArena);
    variables_begin_ = variables_end_ = arena_.get();
    dynamic_ = variables_begin_ + kVariableArena + kFence;
    poison(variables_begin_, kVariableArena);
  }
  refresh();
  dynamic_bytes_ = dynamic_bytes;
  poison(dynamic_ - kFence, kFence + dynamic_bytes + kFence);
}

void SharedMemory::refresh() {
  poison(dynamic_, dynamic_bytes_);
  poison(variables_begin_, static_cast<size_t>(variables_end_ - variables_begin_));
  variables_end_ = variables_begin_;
  variable_count_ = variable_bytes_ = 0;
}

CNNOPS_SIMT_RUNTIME void* SharedMemory::variable(const void* site, size_t bytes, size_t alignment) {
  for (size_t i = 0; i < variable_count_; ++i)
    if (variables_[i].site == site) return variables_[i].begin;
  const size_t used = static_cast<size_t>(variables_end_ - variables_begin_);
  const size_t begin = round_up(used + kVariableFence, std::max(alignment, kVariableFence));
  const size_t end = begin + bytes + kVariableFence;
  variable_bytes_ += bytes;
  if (variable_bytes_ > kMaxStaticShared) fail("shared variables are limited to 48 KB a block");
  if (variable_bytes_ + dynamic_bytes_ > max_shared())
    fail("shared variables and dynamic shared memory are limited to " + std::to_string(max_shared() >> 10) +
         " KB a block");
  if (end > kVariableArena || variable_count_ == kMaxVariables) fail("too many shared variables for the emulator");
  variables_end_ = variables_begin_ + end;
  variables_[variable_count_++] = {site, variables_begin_ + begin, bytes};
  return variables_begin_ + begin;
}

bool SharedMemory::in_a_variable(uintptr_t address, size_t bytes) const {
  return std::any_of(variables_, variables_ + variable_count_, [&](const Variable& each) {
    const size_t offset = address - reinterpret_cast<uintptr_t>(each.begin);
    return offset < each.bytes && bytes <= each.bytes - offset;
  });
}

std::string SharedMemory::misplaced(uintptr_t address, size_t bytes) const {
  const auto arena = reinterpret_cast<uintptr_t>(arena_.get()), dynamic = reinterpret_cast<uintptr_t>(dynamic_);
  if (address - arena >= kArena || holds(address, bytes)) return "";
  if (address < arena + kVariableArena) return "outside a shared variable";
  return address < dynamic ? "before the start of dynamic shared memory"
                           : "beyond the " + std::to_string(dynamic_bytes_) + " bytes of dynamic shared memory";
}

bool SharedMemory::dynamic_holds(const void* p, size_t bytes) const {
  const auto* const begin = static_cast<const unsigned char*>(p);
  return begin >= dynamic_ && begin + bytes <= dynamic_ + dynamic_bytes_;
}

std::string SharedMemory::broken_fence() const {
  const unsigned char* const dynamic_end = dynamic_ + dynamic_bytes_;
  if (!poisoned(dynamic_ - kFence, dynamic_, dynamic_)) return "a write before the start of dynamic shared memory";
  if (!poisoned(dynamic_end, dynamic_end + kFence, dynamic_))
    return "a write beyond the " + std::to_string(dynamic_bytes_) + " bytes of dynamic shared memory";
  const unsigned char* fence = variables_begin_;
  for (size_t i = 0; i < variable_count_; ++i) {
    if (!poisoned(fence, variables_[i].begin, variables_begin_)) return "a write outside a shared variable";
    fence = variables_[i].begin + variables_[i].bytes;
  }
  return poisoned(fence, variables_end_, variables_begin_) ? "" : "a write outside a shared variable";
}

}  // namespace cnnops::simt
