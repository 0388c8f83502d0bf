// A CUDA device in software, for tests: runs kernels compiled by g++, one fiber for each CUDA thread of one cluster of
// blocks at a time, or of all blocks of a cooperative launch. Kernel sources reach it through cuda/launch.h and
// cuda/ptx.cuh; nothing else includes it.
//
// It is adversarial where hardware may be. Shared memory starts as NaN and is fenced at both ends; asynchronous copies
// land as late as allowed (in random schedules some at once); threads and blocks run in an order that the test chooses.
// Plain `__shared__` is left undefined: shared variables go through CNNOPS_SHARED, so that they lie in that memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#include "trace.h"
#include "vector_types.h"

// Never part of the host code that launches it, which is not traced.
#define __global__ __attribute__((noipa))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (::cnnops::simt::thread_index())
#define blockIdx (::cnnops::simt::block_index())
#define blockDim (::cnnops::simt::block_dim())
#define gridDim (::cnnops::simt::grid_dim())

namespace cnnops::simt {

using Where = std::source_location;

enum class Order { kForward, kReversed, kRandom };

struct Configuration {
  unsigned threads = 0;     // of a block
  size_t shared_bytes = 0;  // dynamic
};

struct Counters {
  uint64_t launches = 0, blocks = 0, switches = 0, block_barriers = 0, warp_collectives = 0;
  std::map<std::string, uint64_t> kernels;              // launches by name
  std::map<std::string, Configuration> configurations;  // by name, the most of all launches
  std::map<std::string, Traffic> traffic;               // by kernel, of launches while accesses were counted
};

void set_schedule(Order order, uint64_t seed);
// What the device claims to be. Throws std::invalid_argument for an architecture that is not 80, 86 or 90.
void set_device(int architecture, int multiprocessors, int l2_bytes);
int architecture();
size_t max_shared();    // bytes a block
int multiprocessors();  // 3 unless set: few, so that small tests fill more than one wave
int l2_bytes();         // 256 KiB unless set: little, so that tensors of small tests fit or do not
// How many blocks of so many threads a cooperative launch may have: 2 for each multiprocessor, 16 in all.
unsigned resident_blocks(unsigned threads);
// Launches run only these blocks, by linear index (whole clusters): a part of a grid too large to run.
void run_blocks(uint64_t first, uint64_t count);

// What CUDA code synchronises with: every such wrapper of cuda/ptx.cuh and ptx_sm90.cuh, and CUDA's own. The names are
// those that kernels call.
enum class Sync {
  kSyncthreads,
  kSyncwarp,
  kThreadfence,
  kCommitAsync,
  kWaitAsync,
  kBarrierSync,
  kBarrierArrive,
  kMbarrierInit,
  kFenceMbarrierInit,
  kMbarrierArrive,
  kMbarrierArriveRemote,
  kMbarrierExpect,
  kMbarrierWait,
  kFenceProxyAsync,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait,
  kClusterSync,
  kGridBarrier,
};
std::vector<std::string> sync_wrappers();
// From here on this wrapper does nothing; "" restores all. Throws std::invalid_argument for an unknown name.
void disable_sync(const std::string& name);
bool disabled(Sync sync);

Counters counters();
void reset_counters();
void count_accesses(bool on);

// Runs `thread` once for each thread of the grid. Throws std::runtime_error, naming kernel, block and threads, for a
// launch that a device would refuse, a deadlock, a misused intrinsic, or a write beyond shared memory; the next launch
// finds everything as new.
void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread,
            unsigned cluster = 1, bool cooperative = false);

// By value: reading them is no access to memory.
dim3 thread_index();
dim3 block_index();
dim3 block_dim();
dim3 grid_dim();
int lane();

// Ends the launch with an error that names the calling thread.
[[noreturn]] void fail(const std::string& what);

void* dynamic_shared();
// This block's shared variable of the declaration that `site` stands for.
void* static_shared(const void* site, size_t bytes, size_t alignment);

// A copy to shared memory that may land at any time until wait_async: `bytes` from source, then zeros up to 16.
void copy_async(void* destination, const void* source, int bytes);
void commit_async();
void wait_async(int groups_left);

// The values of half and bfloat16 numbers.
__forceinline__ float bfloat16_value(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
__forceinline__ float half_value(uint16_t bits) {
  const float scaled = __builtin_bit_cast(float, static_cast<uint32_t>(bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t infinite = scaled >= 0x1p16f ? 0x7f800000u : 0;
  return __builtin_bit_cast(
      float, __builtin_bit_cast(uint32_t, scaled) | infinite | static_cast<uint32_t>(bits & 0x8000) << 16);
}

void block_barrier(Where where);
void warp_barrier(unsigned mask, Where where);
// Counts the block in once all of its threads have come, and waits until `due` are counted. Fails in a launch that is
// not cooperative.
void grid_barrier(unsigned* arrived, unsigned due, Where where);

// Where an integer atomic reads and writes. A block that counts itself in must have published its results before:
// without a __threadfence, it fails.
void atomic_begins(void* p, Where where);
void atomic_ends(void* p);
void thread_fence();

// What the trace of a kernel's memory accesses reports of its writes to shared memory: wgmma must not read these bytes
// before the calling thread has executed fence_proxy_async. Other addresses are ignored.
void ordinary_shared_write(const void* address, size_t bytes);

// An instruction that the lanes of `mask` execute as one. Each hands in its operands; the last to arrive runs `combine`
// on all of them, which leaves every lane's result there. Pointers of lanes outside the mask are null.
using Lanes = void* [32];
using Combine = void (*)(const Lanes& operands);
void collective(const char* name, unsigned mask, void* operands, Combine combine, Where where);

template <class T>
struct Shuffle {
  T value, result;
  int source;
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Where where) {
  Shuffle<T> mine{value, value, source};
  collective(
      name, mask, &mine,
      [](const Lanes& operands) CNNOPS_UNTRACED {
        for (void* each : operands) {
          if (!each) continue;
          auto& reader = *static_cast<Shuffle<T>*>(each);
          const void* const owner = operands[reader.source];
          if (!owner) fail("a shuffle reads lane " + std::to_string(reader.source) + ", which is outside its mask");
          reader.result = static_cast<const Shuffle<T>*>(owner)->value;
        }
      },
      where);
  return mine.result;
}

unsigned ballot(const char* name, unsigned mask, bool vote, Where where);

}  // namespace cnnops::simt

inline void __syncthreads(cnnops::simt::Where where = cnnops::simt::Where::current()) {
  cnnops::simt::block_barrier(where);
}

inline void __syncwarp(unsigned mask = ~0u, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  cnnops::simt::warp_barrier(mask, where);
}

// Lanes whose source falls outside their segment of `width` keep their own value, as on a device.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cnnops::simt::Where where = cnnops::simt::Where::current()) {
  const int first = cnnops::simt::lane() & ~(width - 1);
  return cnnops::simt::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cnnops::simt::Where where = cnnops::simt::Where::current()) {
  const int lane = cnnops::simt::lane(), source = lane ^ lane_mask;
  const bool inside = (source & ~(width - 1)) == (lane & ~(width - 1));
  return cnnops::simt::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cnnops::simt::Where where = cnnops::simt::Where::current()) {
  const int lane = cnnops::simt::lane(), source = lane + static_cast<int>(delta);
  const bool inside = (source & ~(width - 1)) == (lane & ~(width - 1));
  return cnnops::simt::shuffle("__shfl_down_sync", mask, value, inside ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int vote, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  return cnnops::simt::ballot("__ballot_sync", mask, vote != 0, where);
}
inline int __any_sync(unsigned mask, int vote, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  return cnnops::simt::ballot("__any_sync", mask, vote != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  return cnnops::simt::ballot("__all_sync", mask, vote != 0, where) == mask;
}

__forceinline__ float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
__forceinline__ unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }

inline void __threadfence() { cnnops::simt::thread_fence(); }
inline void __threadfence_block() {}

template <class T>
T atomicAdd(T* p, T value, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  static_assert(std::is_integral_v<T>, "sums of floating-point atomics depend on their order");
  cnnops::simt::atomic_begins(p, where);
  const T old = *p;
  *p = old + value;
  cnnops::simt::atomic_ends(p);
  return old;
}
template <class T>
T atomicExch(T* p, T value, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  cnnops::simt::atomic_begins(p, where);
  const T old = *p;
  *p = value;
  cnnops::simt::atomic_ends(p);
  return old;
}
template <class T>
T atomicMax(T* p, T value, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  static_assert(std::is_integral_v<T>);
  cnnops::simt::atomic_begins(p, where);
  const T old = *p;
  if (value > old) *p = value;
  cnnops::simt::atomic_ends(p);
  return old;
}
template <class T>
T atomicCAS(T* p, T compare, T value, cnnops::simt::Where where = cnnops::simt::Where::current()) {
  cnnops::simt::atomic_begins(p, where);
  const T old = *p;
  if (old == compare) *p = value;
  cnnops::simt::atomic_ends(p);
  return old;
}
