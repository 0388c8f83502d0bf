#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

#include "device.h"
#include "trace.h"

namespace cnnops::simt {

Device device;

namespace {

constexpr unsigned kMaxGridYZ = 65535, kMaxBlockZ = 64;

}  // namespace

CNNOPS_SIMT_RUNTIME void ReadySet::insert(unsigned i) { words_[i / 64] |= uint64_t{1} << i % 64; }
CNNOPS_SIMT_RUNTIME void ReadySet::erase(unsigned i) { words_[i / 64] &= ~(uint64_t{1} << i % 64); }
CNNOPS_SIMT_RUNTIME void ReadySet::clear() { std::fill(std::begin(words_), std::end(words_), 0); }

CNNOPS_SIMT_RUNTIME int ReadySet::next(unsigned from) const {
  unsigned w = from / 64;
  uint64_t bits = words_[w] >> from % 64 << from % 64;
  for (unsigned tries = 0; tries <= words_used_; ++tries) {
    if (bits) return static_cast<int>(w * 64 + static_cast<unsigned>(__builtin_ctzll(bits)));
    w = (w + 1) % words_used_;
    bits = words_[w];
  }
  return -1;
}

CNNOPS_SIMT_RUNTIME int ReadySet::previous(unsigned from) const {
  unsigned w = from / 64;
  uint64_t bits = words_[w] << (63 - from % 64) >> (63 - from % 64);
  for (unsigned tries = 0; tries <= words_used_; ++tries) {
    if (bits) return static_cast<int>(w * 64 + 63 - static_cast<unsigned>(__builtin_clzll(bits)));
    w = (w + words_used_ - 1) % words_used_;
    bits = words_[w];
  }
  return -1;
}

CNNOPS_SIMT_RUNTIME void WaitList::add(Thread& thread) {
  thread.next_waiter = first_;
  first_ = &thread;
}

CNNOPS_SIMT_RUNTIME void WaitList::wake_all() {
  for (Thread* each = first_; each;) {
    Thread* const next = each->next_waiter;
    wake(*each);
    each = next;
  }
  first_ = nullptr;
}

CNNOPS_SIMT_RUNTIME uint64_t next_random() {  // xorshift64*
  device.random ^= device.random >> 12;
  device.random ^= device.random << 25;
  device.random ^= device.random >> 27;
  return device.random * 0x2545f4914f6cdd1dULL;
}

CNNOPS_SIMT_RUNTIME Fiber& running_fiber() { return device.current->fiber; }

CNNOPS_SIMT_RUNTIME bool coin() { return device.order == Order::kRandom && next_random() >> 63; }

namespace {

CNNOPS_SIMT_RUNTIME unsigned total_threads() { return device.thread_count * device.together; }

CNNOPS_SIMT_RUNTIME Thread* next_thread() {
  const unsigned total = total_threads();
  const unsigned last = device.current ? device.current->slot : total - 1;
  int slot = -1;
  switch (device.order) {
    case Order::kForward:
      slot = device.ready.next((last + 1) % total);
      break;
    case Order::kReversed:
      slot = device.ready.previous((last + total - 1) % total);
      break;
    case Order::kRandom:
      slot = device.ready.next(static_cast<unsigned>(next_random() >> 32) % total);
      break;
  }
  return slot < 0 ? nullptr : &device.threads[slot];
}

}  // namespace

CNNOPS_SIMT_RUNTIME void suspend() {
  Thread& me = *device.current;
  device.ready.erase(me.slot);
  if (!device.tma_copies.empty() && device.order == Order::kRandom && next_random() >> 32 < device.landing_chance)
    land_one();
  Thread* next = next_thread();
  while (!next && land_one()) next = next_thread();
  ++device.counters.switches;
  if (next == &me) return;
  device.current = next;
  switch_fiber(me.fiber, next ? next->fiber : device.host);
}

CNNOPS_SIMT_RUNTIME void wake(Thread& thread) {
  thread.state = State::kReady;
  device.ready.insert(thread.slot);
}

CNNOPS_SIMT_RUNTIME void yield() {
  Thread& me = *device.current;
  device.ready.erase(me.slot);
  Thread* const next = next_thread();
  device.ready.insert(me.slot);
  if (next) yield_to(*next);
}

CNNOPS_SIMT_RUNTIME void yield_to(Thread& thread) {
  Thread& me = *device.current;
  ++device.counters.switches;
  device.current = &thread;
  switch_fiber(me.fiber, thread.fiber);
}

namespace {

CNNOPS_SIMT_RUNTIME void leave_block() {
  Thread& me = *device.current;
  me.state = State::kExited;
  ++device.exited;
  if (++me.block->exited == device.thread_count) check_block_exit(*me.block);
  open_cluster_barrier_if_all_came();
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

void start_block(Block& block) {
  for (unsigned i = 0; i < device.thread_count; ++i) {
    Thread& thread = block.threads[i];
    thread.copies.clear();
    thread.committed_groups = 0;
    thread.published = false;
    thread.unfenced_chunks.clear();
    wake(thread);
  }
  for (Warp& warp : block.warps) warp.meeting_count = 0;
  block.exited = block.at_barrier = block.at_grid_barrier = 0;
  block.epoch = 0;
  reset_asynchronous(block);
}

void run_together(uint64_t first_block) {
  for (unsigned rank = 0; rank < device.together; ++rank) {
    const uint64_t linear = first_block + rank;
    device.blocks[rank].index = dim3(static_cast<unsigned>(linear % device.grid.x),
                                     static_cast<unsigned>(linear / device.grid.x % device.grid.y),
                                     static_cast<unsigned>(linear / device.grid.x / device.grid.y));
    start_block(device.blocks[rank]);
  }
  device.exited = device.at_cluster_barrier = 0;
  device.cluster_barriers_passed = 0;
  device.cluster_waiting = device.grid_waiting = {};
  device.tma_copies.clear();
  // One in 1 to 128 switches lets a copy land: in some clusters early, in others late.
  device.landing_chance = (uint64_t{1} << 32) >> (next_random() >> 32) % 8;
  device.current = nullptr;
  release(&device.begin_sync);
  Thread* const first = next_thread();
  device.current = first;
  switch_fiber(device.host, first->fiber);
  acquire(&device.end_sync);
  device.current = nullptr;
  for (unsigned rank = 0; rank < device.together; ++rank) trace::together(rank * kMaxThreads, device.thread_count);
  device.counters.blocks += device.together;
  if (device.error.empty() && device.exited < total_threads())
    device.error = place(device.blocks[0]) + ": deadlock: no thread can run" + roll_call();
  for (unsigned rank = 0; rank < device.together && device.error.empty(); ++rank) {
    const std::string broken = device.blocks[rank].memory.broken_fence();
    if (!broken.empty()) device.error = place(device.blocks[rank]) + ": " + broken;
  }
}

void check_configuration(const dim3& grid, const dim3& block, size_t dynamic_bytes, unsigned cluster,
                         bool cooperative) {
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
  if (dynamic_bytes > max_shared())
    refuse("shared memory is limited to " + std::to_string(max_shared() >> 10) + " KB a block");
  if (cluster > 1 && device.architecture < 90) refuse("clusters need sm_90");
  if (!cluster || cluster > kMaxCluster)
    refuse("a cluster of " + std::to_string(cluster) + " blocks; 1 to 8 are possible");
  if (grid.x % cluster) refuse("grid x is not a multiple of the cluster's " + std::to_string(cluster) + " blocks");
  if (!cooperative) return;
  if (cluster > 1) refuse("a cooperative launch of clusters, which the emulator has not");
  const unsigned most = resident_blocks(block.x * block.y * block.z);
  if (uint64_t{grid.x} * grid.y * grid.z > most)
    refuse("a cooperative launch, of which " + std::to_string(most) + " blocks are resident at once");
}

// The first of the blocks that run together, in the order that they run in.
std::vector<uint64_t> order_of(uint64_t blocks) {
  const uint64_t first = std::min(device.first_block, blocks);
  const uint64_t count = std::min(device.block_limit, blocks - first);
  if (first % device.together || count % device.together)
    throw std::runtime_error("simt: run_blocks cuts a cluster of " + std::string(device.kernel) + " apart");
  std::vector<uint64_t> order;
  for (uint64_t block = first; block < first + count; block += device.together) order.push_back(block);
  if (device.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (device.order == Order::kRandom) std::shuffle(order.begin(), order.end(), std::mt19937_64(next_random()));
  return order;
}

constexpr const char* kSyncNames[] = {
    "__syncthreads",          "__syncwarp",      "__threadfence", "commit_async",        "wait_async",
    "barrier_sync",           "barrier_arrive",  "mbarrier_init", "fence_mbarrier_init", "mbarrier_arrive",
    "mbarrier_arrive_remote", "mbarrier_expect", "mbarrier_wait", "fence_proxy_async",   "wgmma_fence",
    "wgmma_commit",           "wgmma_wait",      "cluster_sync",  "grid_barrier",
};
static_assert(std::size(kSyncNames) == static_cast<size_t>(Sync::kGridBarrier) + 1);

}  // namespace

size_t max_shared() {
  return device.architecture == 86 ? size_t{99} << 10 : device.architecture == 80 ? size_t{163} << 10 : kMaxShared;
}

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

void set_device(int architecture, int multiprocessors, int l2_bytes) {
  const std::lock_guard lock(device.mutex);
  if (architecture != 80 && architecture != 86 && architecture != 90)
    throw std::invalid_argument("the emulated architecture is 80, 86 or 90, not " + std::to_string(architecture));
  if (multiprocessors < 1) throw std::invalid_argument("a device has at least one multiprocessor");
  if (l2_bytes < 0) throw std::invalid_argument("a device has no less than no L2");
  device.architecture = architecture;
  device.multiprocessors = multiprocessors;
  device.l2_bytes = l2_bytes;
}

int architecture() { return device.architecture; }
int multiprocessors() { return device.multiprocessors; }
int l2_bytes() { return device.l2_bytes; }

unsigned resident_blocks(unsigned threads) {
  constexpr unsigned kEach = 2, kMostThreads = 4096;  // ThreadSanitizer has no room for twice as many fibers
  return std::min({kEach * static_cast<unsigned>(device.multiprocessors), kMaxBlocks, kMostThreads / threads});
}

void run_blocks(uint64_t first, uint64_t count) {
  const std::lock_guard lock(device.mutex);
  device.first_block = first;
  device.block_limit = count;
}

std::vector<std::string> sync_wrappers() { return {std::begin(kSyncNames), std::end(kSyncNames)}; }

void disable_sync(const std::string& name) {
  const std::lock_guard lock(device.mutex);
  const auto* const found = std::find(std::begin(kSyncNames), std::end(kSyncNames), name);
  if (!name.empty() && found == std::end(kSyncNames)) throw std::invalid_argument("no such wrapper: " + name);
  device.disabled_sync = name.empty() ? -1 : static_cast<int>(found - std::begin(kSyncNames));
}

CNNOPS_SIMT_RUNTIME bool disabled(Sync sync) { return device.disabled_sync == static_cast<int>(sync); }

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread,
            unsigned cluster, bool cooperative) {
  const std::lock_guard lock(device.mutex);
  device.kernel = kernel;
  check_configuration(grid, block, dynamic_shared_bytes, cluster, cooperative);
  device.body = &thread;
  device.grid = grid;
  device.block = block;
  device.cluster = cluster;
  device.cooperative = cooperative;
  device.together = cooperative ? grid.x * grid.y * grid.z : cluster;
  device.thread_count = block.x * block.y * block.z;
  device.ready.resize(total_threads());
  for (; device.started_threads < total_threads(); ++device.started_threads)
    restart(device.threads[device.started_threads].fiber, thread_main);
  for (unsigned slot = 0; slot < total_threads(); ++slot) {
    Thread& each = device.threads[slot];
    each.slot = slot;
    each.index = slot % device.thread_count;
    each.block = &device.blocks[slot / device.thread_count];
    each.position = dim3(each.index % block.x, each.index / block.x % block.y, each.index / (block.x * block.y));
  }
  for (unsigned rank = 0; rank < device.together; ++rank) {
    device.blocks[rank].rank = rank;
    device.blocks[rank].threads = &device.threads[rank * device.thread_count];
    device.blocks[rank].memory.prepare(dynamic_shared_bytes);
  }
  adopt_this_thread(device.host);
  ++device.counters.launches;
  ++device.counters.kernels[kernel];
  Configuration& most = device.counters.configurations[kernel];
  most = {std::max(most.threads, device.thread_count), std::max(most.shared_bytes, dynamic_shared_bytes)};

  device.error.clear();
  const trace::Launch traced(kernel, thread, device.together == 1 ? &device.blocks[0].memory : nullptr);
  for (const uint64_t first : order_of(uint64_t{grid.x} * grid.y * grid.z)) {
    run_together(first);
    if (!device.error.empty()) {
      device.ready.clear();
      for (unsigned i = 0; i < device.started_threads; ++i) restart(device.threads[i].fiber, thread_main);
      throw std::runtime_error("simt: " + device.error);
    }
    for (unsigned rank = 0; rank < device.together; ++rank) device.blocks[rank].memory.refresh();
  }
}

CNNOPS_SIMT_RUNTIME dim3 thread_index() { return device.current->position; }
CNNOPS_SIMT_RUNTIME dim3 block_index() { return device.current->block->index; }
CNNOPS_SIMT_RUNTIME dim3 block_dim() { return device.block; }
CNNOPS_SIMT_RUNTIME dim3 grid_dim() { return device.grid; }
CNNOPS_SIMT_RUNTIME int lane() { return static_cast<int>(device.current->index % kWarp); }

CNNOPS_SIMT_RUNTIME unsigned trace::running_thread() {
  return device.current->block->rank * kMaxThreads + device.current->index;
}
CNNOPS_SIMT_RUNTIME const SharedMemory& trace::running_shared_memory() { return device.current->block->memory; }

CNNOPS_SIMT_RUNTIME void fail(const std::string& what) {
  Thread& me = *device.current;
  device.error = place(*me.block) + ": thread " + std::to_string(me.index) + ": " + what;
  switch_fiber(me.fiber, device.host);
  __builtin_unreachable();  // the host restarts every fiber after an error
}

CNNOPS_SIMT_RUNTIME void* dynamic_shared() { return device.current->block->memory.dynamic(); }
CNNOPS_SIMT_RUNTIME void* static_shared(const void* site, size_t bytes, size_t alignment) {
  return device.current->block->memory.variable(site, bytes, alignment);
}

namespace {

void land(const AsyncCopy& copy) {
  ordinary_shared_write(copy.destination, 16);
  if (copy.bytes) std::memcpy(copy.destination, copy.source, static_cast<size_t>(copy.bytes));
  if (copy.bytes < 16)
    std::memset(static_cast<char*>(copy.destination) + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

CNNOPS_SIMT_RUNTIME Thread& current_thread() { return *device.current; }

}  // namespace

void copy_async(void* destination, const void* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(destination) % 16 || (bytes && reinterpret_cast<uintptr_t>(source) % 16))
    fail("an asynchronous copy of 16 bytes is not aligned to 16");
  if (bytes) trace::global_read(source, static_cast<size_t>(bytes), __builtin_return_address(0));
  trace::shared_write(destination, 16, __builtin_return_address(0));
  Thread& me = current_thread();
  const AsyncCopy copy{destination, source, bytes, me.committed_groups};
  if (coin())
    land(copy);
  else
    me.copies.push_back(copy);
}

void commit_async() {
  if (!disabled(Sync::kCommitAsync)) ++current_thread().committed_groups;
}

void wait_async(int groups_left) {
  if (disabled(Sync::kWaitAsync)) return;
  Thread& me = current_thread();
  const int landed = me.committed_groups - groups_left;
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group < landed; ++copy) land(*copy);
  me.copies.erase(me.copies.begin(), copy);
}

CNNOPS_SIMT_RUNTIME void collective(const char* name, unsigned mask, void* operands, Combine combine, Where where) {
  Thread& me = *device.current;
  const unsigned lane = me.index % kWarp, first = me.index - lane;
  ++device.counters.warp_collectives;
  if (!(mask >> lane & 1))
    fail(std::string(name) + " at " + text(where) + ": lane " + std::to_string(lane) + " is not in its own mask");

  Warp& warp = me.block->warps[me.index / kWarp];
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
    me.waits_for = mask;
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
  if (mask == ~0u) trace::together(me.block->rank * kMaxThreads + first, kWarp);
  release(sync);
  meeting = warp.meetings[--warp.meeting_count];
  for (unsigned other = 0; other < kWarp; ++other)
    if (mask >> other & 1 && other != lane) wake(me.block->threads[first + other]);
}

namespace {

CNNOPS_SIMT_RUNTIME void begin_epoch() { ++device.current->block->epoch; }

}  // namespace

void warp_barrier(unsigned mask, Where where) {
  if (disabled(Sync::kSyncwarp)) return;
  collective("__syncwarp", mask, &mask, [](const Lanes&) { begin_epoch(); }, where);
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
