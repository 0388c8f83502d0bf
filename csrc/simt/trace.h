// Every access that kernels make to memory: checked against what they may touch, and, where a test asks for it,
// counted as the traffic that a device would have.
//
// The compiler reports ordinary accesses: kernel sources are compiled as for ThreadSanitizer but without its runtime,
// and trace.cpp defines what they call before each access. Instructions that ptx.cuh emulates are reported by calls of
// their own. A sanitized library keeps the sanitizer's instrumentation instead and checks and counts only the latter.
//
// Lanes of a warp that are at the same instruction for the same time since the warp last was together make one request.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "shared_memory.h"

// On functions in kernel sources that stand for the device's circuits: what they touch is no access of a kernel. A
// sanitized library has no CNNOPS_TRACED.
#if defined(CNNOPS_TRACED)
#define CNNOPS_UNTRACED __attribute__((no_sanitize("thread")))
#else
#define CNNOPS_UNTRACED
#endif

namespace cnnops::simt {

constexpr size_t kSectorBytes = 32;

// What one kernel moved. Of global memory: what its instructions asked for, the 32-byte sectors that its requests
// fetched from or sent to L2, and the bytes of the distinct sectors of each launch, which are what DRAM moves at least.
// A bank conflict is one more pass over shared memory than its request would need. FLOPs are those of matrix products.
struct Traffic {
  uint64_t global_read_bytes = 0, global_read_sectors = 0, global_write_bytes = 0, global_write_sectors = 0;
  uint64_t dram_read_bytes = 0, dram_write_bytes = 0;
  uint64_t shared_bytes = 0, bank_conflicts = 0, flops = 0;
};

namespace trace {

// Whether ordinary accesses are reported in this library.
bool available();
// Where a block's shared memory can lie, its fences included.
void add_arena(const void* begin, size_t bytes);
// From now on. Bounds are checked in any case.
void count(bool on);
std::map<std::string, Traffic> traffic();  // by kernel, since reset()
void reset();

// A tensor of the calls that follow. While there is one, they may touch no other global memory.
struct Tensor {
  std::string name;
  uintptr_t begin;
  size_t bytes;
  bool writable;
};
void add_tensor(const Tensor& tensor);
void forget_tensors();

// What the scheduler says.

// Stands for a launch on the calling host thread. `body` is where the parameters lie, a device's constant memory;
// `only` the shared memory of the block that runs, null where blocks take turns.
class Launch {
 public:
  Launch(const char* kernel, const std::function<void()>& body, const SharedMemory* only);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};
// The threads [first, first + count) have all come to the same point.
void together(unsigned first, unsigned count);
// Stands for an instruction that the last of its lanes executes for all.
class Instruction {
 public:
  Instruction();
  ~Instruction();
  Instruction(const Instruction&) = delete;
  Instruction& operator=(const Instruction&) = delete;
};

// What it is asked; defined in simt.cpp. The thread that runs, numbered so that no two threads under way share a number
// and lanes of a warp come together; its block's shared memory.
unsigned running_thread();
const SharedMemory& running_shared_memory();

// What emulated instructions say: checks that end the launch with an error, and counts.

// By the calling thread, at an instruction that `site` stands for.
void global_read(const void* address, size_t bytes, const void* site);
void shared_write(const void* address, size_t bytes, const void* site);
// One row of 16 bytes for each lane.
void matrix_read(const void* const (&rows)[32]);
void product(int m, int n, int k);

// By the device's own engines (TMA, wgmma), in one piece. At least one byte.
void bulk_global_read(const void* address, size_t bytes);
void bulk_shared(size_t bytes);

}  // namespace trace

}  // namespace cnnops::simt
