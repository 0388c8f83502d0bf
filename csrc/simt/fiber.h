// Stacks that can be left and entered again: what the emulator runs CUDA threads on. Sanitizers are told of each
// switch.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// The scheduler's own state is touched by every fiber without the synchronisation that CUDA code would need, so its
// functions are hidden from TSan, which then judges the kernels alone.
#define CNNOPS_SIMT_RUNTIME __attribute__((noinline, no_sanitize("thread")))
#else
#define CNNOPS_SIMT_RUNTIME
#endif

namespace cnnops::simt {

// Each stack lies at a multiple of this, a page at its end that faults included.
constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  void* stack_pointer = nullptr;
  void* stack = nullptr;  // its lowest usable address
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
  int hidden = 0;  // how many Hidden live
};

// Gives `fiber` a fresh stack on which the next switch starts `entry`, which must not return. Whatever it ran before
// is abandoned where it stood.
void restart(Fiber& fiber, void (*entry)());

// Makes `fiber` stand for the calling thread and its own stack.
void adopt_this_thread(Fiber& fiber);

void switch_fiber(Fiber& from, Fiber& to);

// The first thing that an entry function calls.
void arrive_on_fresh_stack();

Fiber& running_fiber();  // which this library's scheduler knows

// While it lives, TSan does not see what the running fiber reads and writes.
class Hidden {
 public:
  Hidden();
  ~Hidden();
  Hidden(const Hidden&) = delete;
  Hidden& operator=(const Hidden&) = delete;
};

// Lifts that within it.
class Shown {
 public:
  Shown();
  ~Shown();
  Shown(const Shown&) = delete;
  Shown& operator=(const Shown&) = delete;
};

// While it lives, what runs is done by none of the device's threads, after all that came before release(cause).
class Agent {
 public:
  explicit Agent(void* cause);
  ~Agent();
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;

 private:
  [[maybe_unused]] void* interrupted_ = nullptr;
};

// For TSan: accesses that it cannot see, being made by hidden code.
void note_read(const void* p, size_t bytes);
void note_write(void* p, size_t bytes);

// What happened before release(sync) is visible after acquire(sync).
inline void acquire([[maybe_unused]] void* sync) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}
inline void release([[maybe_unused]] void* sync) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(sync);
#endif
}

}  // namespace cnnops::simt
