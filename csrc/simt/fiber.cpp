#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* p, size_t bytes);
void __tsan_write_range(void* p, size_t bytes);
}
#endif

#if !defined(__x86_64__)
#error "the emulator's stack switch is written for x86-64"
#endif

// Pushes what the System V ABI lets a callee keep, swaps stacks, and pops the same of the other fiber.
extern "C" void cnnops_simt_switch(void** save, void* to);
asm(R"(
.text
.hidden cnnops_simt_switch
.globl cnnops_simt_switch
.type cnnops_simt_switch, @function
cnnops_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cnnops_simt_switch, .-cnnops_simt_switch
)");

namespace cnnops::simt {
namespace {

constexpr size_t kPage = 4096;
constexpr int kSavedRegisters = 6;

#if defined(__SANITIZE_THREAD__)
constexpr unsigned kAgents = 64;  // enough that those of copies under way together differ
void* agents[kAgents];
unsigned agents_used;
#endif

// Sanitized frames are several times the plain ones; pages commit on touch.
char* new_stack() {
  void* const pages =
      mmap(nullptr, 2 * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  auto* const begin = static_cast<char*>(pages);
  const size_t before = -reinterpret_cast<uintptr_t>(begin) % kStackBytes;
  if (before) munmap(begin, before);
  munmap(begin + before + kStackBytes, kStackBytes - before);
  mprotect(begin + before, kPage, PROT_NONE);  // an overflow faults instead of running into the neighbour
  return begin + before;
}

}  // namespace

CNNOPS_SIMT_RUNTIME void restart(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) {
    fiber.stack = new_stack() + kPage;
    fiber.stack_bytes = kStackBytes - kPage;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
  fiber.asan_fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  if (fiber.tsan_fiber) {
    void* const self = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    for (; fiber.hidden; --fiber.hidden) {  // TSan wants none left
      AnnotateIgnoreWritesEnd("", 0);
      AnnotateIgnoreReadsEnd("", 0);
    }
    __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(fiber.tsan_fiber);
  }
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  // From the top: a null return address, which also puts the stack where the ABI wants it at a function's entry; the
  // entry that the switch returns to; the registers that it pops.
  auto** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + fiber.stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void adopt_this_thread([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &fiber.stack, &fiber.stack_bytes);
  pthread_attr_destroy(&attributes);
#endif
#if defined(__SANITIZE_THREAD__)
  fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
}

CNNOPS_SIMT_RUNTIME void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  cnnops_simt_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

void arrive_on_fresh_stack() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_THREAD__)
CNNOPS_SIMT_RUNTIME Hidden::Hidden() {
  ++running_fiber().hidden;
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
}
CNNOPS_SIMT_RUNTIME Hidden::~Hidden() {
  AnnotateIgnoreWritesEnd("", 0);
  AnnotateIgnoreReadsEnd("", 0);
  --running_fiber().hidden;
}
CNNOPS_SIMT_RUNTIME Shown::Shown() {
  AnnotateIgnoreWritesEnd("", 0);
  AnnotateIgnoreReadsEnd("", 0);
  --running_fiber().hidden;
}
CNNOPS_SIMT_RUNTIME Shown::~Shown() {
  ++running_fiber().hidden;
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
}
CNNOPS_SIMT_RUNTIME Agent::Agent(void* cause) : interrupted_(__tsan_get_current_fiber()) {
  void*& agent = agents[agents_used++ % kAgents];
  if (!agent) agent = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(agent, __tsan_switch_to_fiber_no_sync);
  __tsan_acquire(cause);
}
CNNOPS_SIMT_RUNTIME Agent::~Agent() { __tsan_switch_to_fiber(interrupted_, __tsan_switch_to_fiber_no_sync); }
CNNOPS_SIMT_RUNTIME void note_read(const void* p, size_t bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
CNNOPS_SIMT_RUNTIME void note_write(void* p, size_t bytes) { __tsan_write_range(p, bytes); }
#else
Hidden::Hidden() = default;
Hidden::~Hidden() = default;
Shown::Shown() = default;
Shown::~Shown() = default;
Agent::Agent(void*) {}
Agent::~Agent() = default;
void note_read(const void*, size_t) {}
void note_write(void*, size_t) {}
#endif

}  // namespace cnnops::simt
