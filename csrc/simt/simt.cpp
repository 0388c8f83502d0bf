#include "simt.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"
#include "trace.h"

namespace cnnops::simt {
namespace {

constexpr unsigned kMaxThreads = 1024, kWarp = 32, kMaxGridYZ = 65535, kMaxBlockZ = 64;

struct AsyncCopy {
  void* destination;
  const void* source;
  int bytes, group;
};

enum class State { kReady, kAtBarrier, kInCollective, kExited };

struct Thread {
  Fiber fiber;
  unsigned index = 0;
  dim3 position;
  State state = State::kExited;
  const char* waits_in = nullptr;
  unsigned mask = 0;
  Where where;
  std::vector<AsyncCopy> copies;
  int committed_groups = 0;
};

// Lanes of one warp that have arrived at a collective and wait for the rest of their mask.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  Combine combine = nullptr;
  Lanes operands = {};
  void* sync = nullptr;
};

struct Warp {
  Meeting meetings[kWarp];
  unsigned meeting_count = 0, syncs_used = 0;
  // One object for each meeting that may still be left while the next ones form; sharing one would order threads that
  // nothing orders, and so hide races from TSan.
  char syncs[64] = {};
};

// The threads that can run, as one bit each.
class ReadySet {
 public:
  CNNOPS_SIMT_RUNTIME void insert(unsigned i) { words_[i / 64] |= uint64_t{1} << i % 64; }
  CNNOPS_SIMT_RUNTIME void erase(unsigned i) { words_[i / 64] &= ~(uint64_t{1} << i % 64); }
  CNNOPS_SIMT_RUNTIME void clear() { std::fill(std::begin(words_), std::end(words_), 0); }

  // The first member at or after `from`, going round; -1 if there is none.
  CNNOPS_SIMT_RUNTIME int next(unsigned from) const {
    unsigned w = from / 64;
    uint64_t bits = words_[w] >> from % 64 << from % 64;
    for (unsigned tries = 0; tries <= kWords; ++tries) {
      if (bits) return static_cast<int>(w * 64 + static_cast<unsigned>(__builtin_ctzll(bits)));
      w = (w + 1) % kWords;
      bits = words_[w];
    }
    return -1;
  }
  // The last member at or before `from`, going round; -1 if there is none.
  CNNOPS_SIMT_RUNTIME int previous(unsigned from) const {
    unsigned w = from / 64;
    uint64_t bits = words_[w] << (63 - from % 64) >> (63 - from % 64);
    for (unsigned tries = 0; tries <= kWords; ++tries) {
      if (bits) return static_cast<int>(w * 64 + 63 - static_cast<unsigned>(__builtin_clzll(bits)));
      w = (w + kWords - 1) % kWords;
      bits = words_[w];
    }
    return -1;
  }

 private:
  static constexpr unsigned kWords = kMaxThreads / 64;
  uint64_t words_[kWords] = {};
};

struct Device {
  std::mutex mutex;  // one launch at a time
  Order order = Order::kForward;
  uint64_t random = 1;
  Counters counters;

  Fiber host;
  Thread threads[kMaxThreads];
  unsigned started_threads = 0;
  Thread* current = nullptr;
  Warp warps[kMaxThreads / kWarp];
  ReadySet ready;

  const char* kernel = nullptr;
  const std::function<void()>* body = nullptr;
  dim3 grid, block, block_index;
  unsigned thread_count = 0, exited = 0, at_barrier = 0, barriers_passed = 0;
  const Thread* first_at_barrier = nullptr;
  char begin_sync = 0, end_sync = 0, barrier_syncs[2] = {};
  std::string error;

  SharedMemory shared_memory;
};

Device device;

CNNOPS_SIMT_RUNTIME uint64_t next_random() {  // xorshift64*
  device.random ^= device.random >> 12;
  device.random ^= device.random << 25;
  device.random ^= device.random >> 27;
  return device.random * 0x2545f4914f6cdd1dULL;
}

CNNOPS_SIMT_RUNTIME Thread* next_thread() {
  const unsigned last = device.current ? device.current->index : kMaxThreads - 1;
  int index = -1;
  switch (device.order) {
    case Order::kForward:
      index = device.ready.next((last + 1) % kMaxThreads);
      break;
    case Order::kReversed:
      index = device.ready.previous((last + kMaxThreads - 1) % kMaxThreads);
      break;
    case Order::kRandom:
      index = device.ready.next(static_cast<unsigned>(next_random() >> 32) % device.thread_count);
      break;
  }
  return index < 0 ? nullptr : &device.threads[index];
}

std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string text(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string place() { return std::string(device.kernel) + ", block " + text(device.block_index); }

std::string doing(const Thread& thread) {
  switch (thread.state) {
    case State::kReady:
      return "able to run";
    case State::kAtBarrier:
      return "waiting in __syncthreads at " + text(thread.where);
    case State::kInCollective: {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", thread.mask);
      return std::string("waiting in ") + thread.waits_in + " with mask " + mask + " at " + text(thread.where);
    }
    case State::kExited:
      return "exited";
  }
  return "";
}

// What every thread of the block is at, those that do the same in one line.
std::string roll_call() {
  std::vector<std::pair<std::string, std::string>> lines;  // what they do, who they are
  for (unsigned first = 0; first < device.thread_count;) {
    const std::string what = doing(device.threads[first]);
    unsigned end = first + 1;
    while (end < device.thread_count && doing(device.threads[end]) == what) ++end;
    const std::string who = std::to_string(first) + (end - first > 1 ? ".." + std::to_string(end - 1) : "");
    const auto line = std::find_if(lines.begin(), lines.end(), [&](const auto& each) { return each.first == what; });
    if (line == lines.end())
      lines.push_back({what, who});
    else
      line->second += ", " + who;
    first = end;
  }
  std::string out;
  for (const auto& [what, who] : lines) out += "\n  " + what + ": thread " + who;
  return out;
}

// Leaves the calling thread for the next one that can run; for the host when the block is over or stuck.
CNNOPS_SIMT_RUNTIME void suspend() {
  Thread& me = *device.current;
  device.ready.erase(me.index);
  Thread* const next = next_thread();
  ++device.counters.switches;
  if (next == &me) return;
  device.current = next;
  switch_fiber(me.fiber, next ? next->fiber : device.host);
}

CNNOPS_SIMT_RUNTIME void wake(Thread& thread) {
  thread.state = State::kReady;
  device.ready.insert(thread.index);
}

CNNOPS_SIMT_RUNTIME void leave_block() {
  device.current->state = State::kExited;
  ++device.exited;
  suspend();
}

CNNOPS_SIMT_RUNTIME const std::function<void()>& current_body() { return *device.body; }

void thread_main() {
  arrive_on_fresh_stack();
  for (;;) {
    acquire(&device.begin_sync);
    try {
      current_body()();
    } catch (const std::exception& e) {
      fail(e.what());
    }
    release(&device.end_sync);
    leave_block();
  }
}

void run_block() {
  for (unsigned i = 0; i < device.thread_count; ++i) {
    Thread& thread = device.threads[i];
    thread.copies.clear();
    thread.committed_groups = 0;
    wake(thread);
  }
  for (Warp& warp : device.warps) warp.meeting_count = 0;
  device.exited = device.at_barrier = 0;
  device.current = nullptr;
  release(&device.begin_sync);
  Thread* const first = next_thread();
  device.current = first;
  switch_fiber(device.host, first->fiber);
  acquire(&device.end_sync);
  device.current = nullptr;
  trace::together(0, device.thread_count);
  ++device.counters.blocks;
  if (device.error.empty() && device.exited < device.thread_count)
    device.error = "deadlock: no thread can run" + roll_call();
  if (device.error.empty()) device.error = device.shared_memory.broken_fence();
}

void check_configuration(const dim3& grid, const dim3& block, size_t dynamic_bytes) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error("simt: " + std::string(device.kernel) + ": invalid launch of grid " + text(grid) +
                             ", block " + text(block) + ", " + std::to_string(dynamic_bytes) +
                             " bytes of dynamic shared memory: " + why);
  };
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) refuse("an extent is zero");
  if (grid.x > 0x7fffffffu) refuse("grid x is limited to 2^31 - 1");
  if (grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) refuse("grid y and z are limited to 65535");
  if (uint64_t{block.x} * block.y * block.z > kMaxThreads || block.z > kMaxBlockZ)
    refuse("a block is limited to 1024 threads, and to 64 in z");
  if (dynamic_bytes > kMaxShared) refuse("shared memory is limited to 227 KB a block");
}

// The order that blocks run in, as linear indices.
std::vector<uint64_t> block_order(uint64_t count) {
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (device.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (device.order == Order::kRandom) std::shuffle(order.begin(), order.end(), std::mt19937_64(next_random()));
  return order;
}

}  // namespace

void set_schedule(Order order, uint64_t seed) {
  const std::lock_guard lock(device.mutex);
  device.order = order;
  device.random = seed * 2 + 1;  // xorshift must not start at 0
}

Counters counters() {
  const std::lock_guard lock(device.mutex);
  Counters now = device.counters;
  now.traffic = trace::traffic();
  return now;
}

void reset_counters() {
  const std::lock_guard lock(device.mutex);
  device.counters = {};
  trace::reset();
}

void count_accesses(bool on) {
  const std::lock_guard lock(device.mutex);
  trace::count(on);
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread,
            unsigned) {
  const std::lock_guard lock(device.mutex);
  device.kernel = kernel;
  check_configuration(grid, block, dynamic_shared_bytes);
  device.body = &thread;
  device.grid = grid;
  device.block = block;
  device.thread_count = block.x * block.y * block.z;
  for (; device.started_threads < device.thread_count; ++device.started_threads) {
    Thread& fresh = device.threads[device.started_threads];
    fresh.index = device.started_threads;
    restart(fresh.fiber, thread_main);
  }
  for (unsigned i = 0; i < device.thread_count; ++i)
    device.threads[i].position = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  adopt_this_thread(device.host);
  device.shared_memory.prepare(dynamic_shared_bytes);
  ++device.counters.launches;
  ++device.counters.kernels[kernel];

  device.error.clear();
  const trace::Launch traced(kernel, thread, &device.shared_memory);
  for (const uint64_t linear : block_order(uint64_t{grid.x} * grid.y * grid.z)) {
    device.block_index = dim3(static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                              static_cast<unsigned>(linear / grid.x / grid.y));
    run_block();
    if (!device.error.empty()) {
      device.ready.clear();
      for (unsigned i = 0; i < device.started_threads; ++i) restart(device.threads[i].fiber, thread_main);
      throw std::runtime_error("simt: " + place() + ": " + device.error);
    }
    device.shared_memory.refresh();
  }
}

CNNOPS_SIMT_RUNTIME dim3 thread_index() { return device.current->position; }
CNNOPS_SIMT_RUNTIME dim3 block_index() { return device.block_index; }
CNNOPS_SIMT_RUNTIME dim3 block_dim() { return device.block; }
CNNOPS_SIMT_RUNTIME dim3 grid_dim() { return device.grid; }
CNNOPS_SIMT_RUNTIME int lane() { return static_cast<int>(device.current->index % kWarp); }

CNNOPS_SIMT_RUNTIME unsigned trace::running_thread() { return device.current->index; }
CNNOPS_SIMT_RUNTIME const SharedMemory& trace::running_shared_memory() { return device.shared_memory; }

CNNOPS_SIMT_RUNTIME void fail(const std::string& what) {
  device.error = "thread " + std::to_string(device.current->index) + ": " + what;
  Thread& me = *device.current;
  switch_fiber(me.fiber, device.host);
  __builtin_unreachable();  // the host restarts every fiber after an error
}

CNNOPS_SIMT_RUNTIME void* dynamic_shared() { return device.shared_memory.dynamic(); }
CNNOPS_SIMT_RUNTIME void* static_shared(const void* site, size_t bytes, size_t alignment) {
  return device.shared_memory.variable(site, bytes, alignment);
}

namespace {

void land(const AsyncCopy& copy) {
  if (copy.bytes) std::memcpy(copy.destination, copy.source, static_cast<size_t>(copy.bytes));
  if (copy.bytes < 16)
    std::memset(static_cast<char*>(copy.destination) + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

CNNOPS_SIMT_RUNTIME Thread& current_thread() { return *device.current; }
CNNOPS_SIMT_RUNTIME bool lands_at_once() { return device.order == Order::kRandom && next_random() >> 63; }

}  // namespace

void copy_async(void* destination, const void* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(destination) % 16 || (bytes && reinterpret_cast<uintptr_t>(source) % 16))
    fail("an asynchronous copy of 16 bytes is not aligned to 16");
  if (bytes) trace::global_read(source, static_cast<size_t>(bytes), __builtin_return_address(0));
  trace::shared_write(destination, 16, __builtin_return_address(0));
  Thread& me = current_thread();
  const AsyncCopy copy{destination, source, bytes, me.committed_groups};
  if (lands_at_once())
    land(copy);
  else
    me.copies.push_back(copy);
}

void commit_async() { ++current_thread().committed_groups; }

void wait_async(int groups_left) {
  Thread& me = current_thread();
  const int landed = me.committed_groups - groups_left;
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group < landed; ++copy) land(*copy);
  me.copies.erase(me.copies.begin(), copy);
}

CNNOPS_SIMT_RUNTIME void block_barrier(Where where) {
  Thread& me = *device.current;
  ++device.counters.block_barriers;
  if (!device.at_barrier) device.first_at_barrier = &me;
  const Thread& first = *device.first_at_barrier;
  if (&first != &me && first.where.line() != where.line())
    fail("divergent barrier: __syncthreads at " + text(where) + " while thread " + std::to_string(first.index) +
         " is " + doing(first));
  void* const sync = &device.barrier_syncs[device.barriers_passed % 2];
  release(sync);
  me.state = State::kAtBarrier;
  me.where = where;
  if (++device.at_barrier == device.thread_count) {
    device.at_barrier = 0;
    ++device.barriers_passed;
    trace::together(0, device.thread_count);
    for (unsigned i = 0; i < device.thread_count; ++i) wake(device.threads[i]);
    device.ready.erase(me.index);
    Thread* const next = next_thread();
    device.ready.insert(me.index);
    if (next) {
      ++device.counters.switches;
      device.current = next;
      switch_fiber(me.fiber, next->fiber);
    }
  } else {
    suspend();
  }
  acquire(sync);
}

CNNOPS_SIMT_RUNTIME void collective(const char* name, unsigned mask, void* operands, Combine combine, Where where) {
  Thread& me = *device.current;
  const unsigned lane = me.index % kWarp, first = me.index - lane;
  ++device.counters.warp_collectives;
  if (!(mask >> lane & 1))
    fail(std::string(name) + " at " + text(where) + ": lane " + std::to_string(lane) + " is not in its own mask");

  Warp& warp = device.warps[me.index / kWarp];
  unsigned slot = 0;
  while (slot < warp.meeting_count && warp.meetings[slot].mask != mask) ++slot;
  Meeting& meeting = warp.meetings[slot];
  if (slot == warp.meeting_count) {
    ++warp.meeting_count;
    void* const sync = &warp.syncs[warp.syncs_used++ % std::size(warp.syncs)];
    meeting = {mask, 0, combine, {}, sync};
  }
  if (meeting.combine != combine)
    fail(std::string(name) + " at " + text(where) + " while other lanes of its mask execute another instruction");
  meeting.operands[lane] = operands;
  meeting.arrived |= 1u << lane;
  void* const sync = meeting.sync;
  release(sync);
  if (meeting.arrived != mask) {
    me.state = State::kInCollective;
    me.waits_in = name;
    me.mask = mask;
    me.where = where;
    suspend();
    acquire(sync);
    return;
  }
  acquire(sync);
  {
    const trace::Instruction instruction;
    combine(meeting.operands);
  }
  if (mask == ~0u) trace::together(first, kWarp);
  release(sync);
  meeting = warp.meetings[--warp.meeting_count];
  for (unsigned other = 0; other < kWarp; ++other)
    if (mask >> other & 1 && other != lane) wake(device.threads[first + other]);
}

namespace {

struct Ballot {
  bool vote;
  unsigned result;
};

}  // namespace

unsigned ballot(const char* name, unsigned mask, bool vote, Where where) {
  Ballot mine{vote, 0};
  collective(
      name, mask, &mine,
      [](const Lanes& operands) {
        unsigned votes = 0;
        for (unsigned i = 0; i < kWarp; ++i)
          if (operands[i] && static_cast<const Ballot*>(operands[i])->vote) votes |= 1u << i;
        for (void* each : operands)
          if (each) static_cast<Ballot*>(each)->result = votes;
      },
      where);
  return mine.result;
}

}  // namespace cnnops::simt
