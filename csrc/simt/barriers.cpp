// Barriers: of a block, named ones, of a cluster, of a grid, mbarriers; and what orders memory without waiting.

#include <algorithm>

#include "device.h"
#include "trace.h"

namespace cnnops::simt {

CNNOPS_SIMT_RUNTIME void block_barrier(Where where) {
  if (disabled(Sync::kSyncthreads)) return;
  Thread& me = *device.current;
  Block& block = *me.block;
  ++device.counters.block_barriers;
  if (!block.at_barrier) block.first_at_barrier = &me;
  const Thread& first = *block.first_at_barrier;
  if (&first != &me && first.where.line() != where.line())
    fail("divergent barrier: __syncthreads at " + text(where) + " while thread " + std::to_string(first.index) +
         " is " + doing(first));
  void* const sync = &block.barrier_syncs[block.barriers_passed % 2];
  release(sync);
  me.state = State::kAtBarrier;
  me.where = where;
  if (++block.at_barrier == device.thread_count) {
    block.at_barrier = 0;
    ++block.barriers_passed;
    trace::together(block.rank * kMaxThreads, device.thread_count);
    ++block.epoch;
    for (unsigned i = 0; i < device.thread_count; ++i) wake(block.threads[i]);
    yield();
  } else {
    suspend();
  }
  acquire(sync);
}

namespace {

CNNOPS_SIMT_RUNTIME void come_to_named_barrier(const char* name, int id, int threads, bool waits, Where where) {
  Thread& me = *device.current;
  Block& block = *me.block;
  if (id < 1 || id > 15) fail_at(name, where, "barrier " + std::to_string(id) + " is none of 1 to 15");
  if (threads <= 0 || threads % static_cast<int>(kWarp) || threads > static_cast<int>(device.thread_count))
    fail_at(name, where, std::to_string(threads) + " threads are not whole warps of the block");
  NamedBarrier& barrier = block.named[id];
  if (barrier.arrived && barrier.threads != threads)
    fail_at(name, where,
            "barrier " + std::to_string(id) + " is for " + std::to_string(threads) + " threads here and for " +
                std::to_string(barrier.threads) + " elsewhere");
  barrier.threads = threads;
  ++device.counters.block_barriers;
  void* const sync = &barrier.syncs[barrier.passed % 2];
  release(sync);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.passed;
    ++block.epoch;
    barrier.waiting.wake_all();
    if (waits) yield();
  } else if (waits) {
    me.state = State::kAtNamedBarrier;
    me.waits_in = name;
    me.waits_for = static_cast<unsigned>(id);
    me.where = where;
    barrier.waiting.add(me);
    suspend();
  }
  if (waits) acquire(sync);
}

}  // namespace

void named_barrier_sync(int id, int threads, Where where) {
  if (!disabled(Sync::kBarrierSync)) come_to_named_barrier("barrier_sync", id, threads, true, where);
}
void named_barrier_arrive(int id, int threads, Where where) {
  if (!disabled(Sync::kBarrierArrive)) come_to_named_barrier("barrier_arrive", id, threads, false, where);
}

CNNOPS_SIMT_RUNTIME uint32_t cluster_rank() { return device.current->block->rank; }
CNNOPS_SIMT_RUNTIME uint32_t cluster_size() { return device.cluster; }

// Exited threads are not waited for.
CNNOPS_SIMT_RUNTIME void open_cluster_barrier_if_all_came() {
  if (!device.at_cluster_barrier || device.at_cluster_barrier + device.exited < device.thread_count * device.cluster)
    return;
  device.at_cluster_barrier = 0;
  ++device.cluster_barriers_passed;
  for (unsigned rank = 0; rank < device.cluster; ++rank) ++device.blocks[rank].epoch;
  device.cluster_waiting.wake_all();
}

CNNOPS_SIMT_RUNTIME void cluster_sync(Where where) {
  if (disabled(Sync::kClusterSync)) return;
  Thread& me = *device.current;
  void* const sync = &device.cluster_syncs[device.cluster_barriers_passed % 2];
  release(sync);
  me.state = State::kAtClusterBarrier;
  me.waits_in = "cluster_sync";
  me.where = where;
  device.cluster_waiting.add(me);
  ++device.at_cluster_barrier;
  open_cluster_barrier_if_all_came();
  if (me.state == State::kReady)
    yield();
  else
    suspend();
  acquire(sync);
}

// The block's last thread counts it in the kernel's own memory, so that a count not cleared before opens too early.
CNNOPS_SIMT_RUNTIME void grid_barrier(unsigned* arrived, unsigned due, Where where) {
  if (disabled(Sync::kGridBarrier)) return;
  if (!device.cooperative)
    fail_at("grid_barrier", where, "the launch is not cooperative: blocks may wait for one that never starts");
  Thread& me = *device.current;
  Block& block = *me.block;
  void* const sync = &device.grid_syncs[due / device.together % 2];
  release(sync);
  me.waits_in = "grid_barrier";
  me.waits_for = due;
  me.where = where;
  if (++block.at_grid_barrier == device.thread_count) {
    block.at_grid_barrier = 0;
    ++block.epoch;
    trace::together(block.rank * kMaxThreads, device.thread_count);
    if (++*arrived >= due) {
      device.grid_waiting.wake_all();
      yield();
    }
  }
  while (*arrived < due) {
    me.state = State::kAtGridBarrier;
    device.grid_waiting.add(me);
    suspend();
  }
  acquire(sync);
}

namespace {

// A barrier's word holds this and its number, so that a write over it shows.
constexpr uint64_t kMbarrierMark = 0x6d626172ull << 32;
constexpr int64_t kMaxBytes = (1 << 20) - 1;  // that a phase can count

Mbarrier& find(const char* name, Block& block, uint64_t* word, Where where) {
  if (!block.memory.holds(word, sizeof *word)) fail_at(name, where, "the barrier is not in this block's shared memory");
  const uint64_t number = *word & 0xffffffffu;
  if ((*word & ~uint64_t{0xffffffffu}) == kMbarrierMark && number < block.mbarriers.size() &&
      block.mbarriers[number].word == word)
    return block.mbarriers[number];
  const bool known = std::any_of(block.mbarriers.begin(), block.mbarriers.end(),
                                 [&](const Mbarrier& each) { return each.word == word; });
  fail_at(name, where, known ? "the barrier has been written over" : "the barrier was never initialised");
}

// The barrier, for a thread of its own block.
Mbarrier& find_own(const char* name, uint64_t* word, Where where) {
  const Thread& me = *device.current;
  Mbarrier& barrier = find(name, *me.block, word, where);
  if (me.index / kWarp != barrier.initialiser / kWarp && me.block->epoch == barrier.initialised_at)
    fail_at(name, where, "no barrier lies between the mbarrier's initialisation and this use by another warp");
  return barrier;
}

void complete_if_due(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  ++barrier.block->epoch;
  barrier.pending = barrier.count;
  barrier.waiting.wake_all();
}

void arrive(const char* name, Mbarrier& barrier, Where where) {
  if (!barrier.pending)
    fail_at(name, where, "more arrivals than the barrier's count of " + std::to_string(barrier.count));
  release(&barrier.syncs[barrier.phase % 2]);
  --barrier.pending;
  Thread* const waiter = barrier.waiting.first();
  complete_if_due(barrier);
  // Whoever waited may run before the caller's next instruction, such as one that should have come first.
  const bool at_once = device.order == Order::kForward || coin();
  if (waiter && waiter->state == State::kReady && at_once) yield_to(*waiter);
}

void mark_foreign(Mbarrier& barrier) {
  barrier.foreign = true;
  barrier.foreign_phase = barrier.phase;
  barrier.foreign_epoch = device.cluster_barriers_passed;
}

}  // namespace

void mbarrier_init(uint64_t* word, uint32_t arrivals, Where where) {
  if (disabled(Sync::kMbarrierInit)) return;
  const Hidden hidden;
  const Thread& me = *device.current;
  Block& block = *me.block;
  require_sm90("mbarrier_init", where);
  if (!block.memory.holds(word, sizeof *word) || reinterpret_cast<uintptr_t>(word) % sizeof *word)
    fail_at("mbarrier_init", where, "the barrier is not an aligned word of this block's shared memory");
  if (!arrivals || arrivals > kMaxBytes) fail_at("mbarrier_init", where, "a count of " + std::to_string(arrivals));
  for (const Mbarrier& each : block.mbarriers)
    if (each.word == word) fail_at("mbarrier_init", where, "the barrier is initialised already");
  *word = kMbarrierMark | block.mbarriers.size();
  Mbarrier& fresh = block.mbarriers.emplace_back();
  fresh.block = &block;
  fresh.word = word;
  fresh.count = fresh.pending = arrivals;
  fresh.initialiser = me.index;
  fresh.initialised_at = block.epoch;
}

void fence_mbarrier_init(Where) {
  if (disabled(Sync::kFenceMbarrierInit)) return;
  const Hidden hidden;
  const Thread& me = *device.current;
  for (Mbarrier& barrier : me.block->mbarriers) {
    if (barrier.fenced || barrier.initialiser != me.index) continue;
    barrier.fenced = true;
    barrier.fenced_at = device.cluster_barriers_passed;
  }
}

void mbarrier_arrive(uint64_t* word, Where where) {
  if (disabled(Sync::kMbarrierArrive)) return;
  const Hidden hidden;
  arrive("mbarrier_arrive", find_own("mbarrier_arrive", word, where), where);
}

Mbarrier& find_for_async(const char* name, Block& target, uint64_t* own_word, Where where) {
  Block& mine = *device.current->block;
  if (&target == &mine) {
    Mbarrier& barrier = find_own(name, own_word, where);
    if (!barrier.fenced) fail_at(name, where, "no fence_mbarrier_init follows the barrier's initialisation");
    return barrier;
  }
  if (!mine.memory.holds(own_word, sizeof *own_word))
    fail_at(name, where, "the barrier is not in this block's shared memory");
  if (target.exited) {
    if (target.exited == device.thread_count)
      fail_at(name, where, "block " + std::to_string(target.rank) + " of the cluster has exited");
  }
  auto* const word = reinterpret_cast<uint64_t*>(target.memory.at(mine.memory.offset(own_word)));
  Mbarrier& barrier = find(name, target, word, where);
  if (!barrier.fenced || barrier.fenced_at == device.cluster_barriers_passed)
    fail_at(name, where,
            "no fence_mbarrier_init and cluster_sync lie between the initialisation of another block's barrier and "
            "this use of it");
  return barrier;
}

void mbarrier_arrive_remote(uint64_t* word, uint32_t rank, Where where) {
  if (disabled(Sync::kMbarrierArriveRemote)) return;
  const Hidden hidden;
  if (rank >= device.cluster)
    fail_at("mbarrier_arrive_remote", where, "the cluster has no block " + std::to_string(rank));
  Block& target = device.blocks[rank];
  Mbarrier& barrier = find_for_async("mbarrier_arrive_remote", target, word, where);
  if (&target != device.current->block) mark_foreign(barrier);
  arrive("mbarrier_arrive_remote", barrier, where);
}

void mbarrier_expect(uint64_t* word, uint32_t bytes, Where where) {
  if (disabled(Sync::kMbarrierExpect)) return;
  const Hidden hidden;
  Mbarrier& barrier = find_own("mbarrier_expect", word, where);
  barrier.bytes += bytes;
  if (barrier.bytes > kMaxBytes) fail_at("mbarrier_expect", where, "more than 2^20 - 1 bytes in one phase");
  arrive("mbarrier_expect", barrier, where);
}

void mbarrier_wait(uint64_t* word, uint32_t parity, Where where) {
  if (disabled(Sync::kMbarrierWait)) return;
  const Hidden hidden;
  Thread& me = *device.current;
  Mbarrier& barrier = find_own("mbarrier_wait", word, where);
  if (parity > 1) fail_at("mbarrier_wait", where, "a parity of " + std::to_string(parity));
  // Woken late, it may find the next phase complete too, and must then wait as the device's thread would.
  while (barrier.phase % 2 == parity) {
    me.state = State::kAtMbarrier;
    me.waits_in = "mbarrier_wait";
    me.waits_for = parity;
    me.mbarrier = &barrier;
    me.where = where;
    barrier.waiting.add(me);
    suspend();
  }
  if (barrier.phase > barrier.observed) {
    barrier.observed = barrier.phase;
    std::erase_if(me.block->landings, [&](const Landing& each) {
      return each.landed && each.barrier == word && each.phase < barrier.phase;
    });
  }
  acquire(&barrier.syncs[parity]);
}

void complete_bytes(const TmaCopy& copy, void* written, size_t written_bytes, size_t bytes) {
  Mbarrier& barrier = find("TMA", *copy.target, copy.barrier, copy.where);
  if (copy.foreign) mark_foreign(barrier);
  for (Landing& each : copy.target->landings)
    if (each.begin == copy.destination && !each.landed) {
      each.landed = true;
      each.phase = barrier.phase;
    }
  barrier.bytes -= static_cast<int64_t>(bytes);
  if (barrier.bytes < -kMaxBytes) fail_at("TMA", copy.where, "more bytes have landed than the barrier can count");
  {
    const Agent agent(copy.sync, &device.end_sync);
    note_write(written, written_bytes);
    release(&barrier.syncs[barrier.phase % 2]);
  }
  complete_if_due(barrier);
}

void check_block_exit(Block& block) {
  const Hidden hidden;
  check_warpgroup_exit(block);
  for (const Landing& each : block.landings)
    fail_at("TMA", each.where, "the block exits, and no thread of it has waited for this copy");
  for (const Mbarrier& each : block.mbarriers)
    if (each.foreign && each.foreign_phase >= each.observed && each.foreign_epoch == device.cluster_barriers_passed)
      fail("the block exits while another may still arrive at its barrier: neither a wait nor a cluster_sync follows");
}

void reset_asynchronous(Block& block) {
  for (NamedBarrier& each : block.named) each.arrived = each.threads = 0, each.waiting = {};
  for (Warpgroup& each : block.warpgroups) {
    each.steps.clear();
    std::fill(std::begin(each.next_step), std::end(each.next_step), 0u);
    each.products.clear();
    for (auto& accumulator : each.accumulators) each.spare.push_back(std::move(accumulator));
    each.accumulators.clear();
    each.committed = 0;
    each.fenced = false;
    each.waiting = {};
  }
  block.mbarriers.clear();
  block.landings.clear();
  block.any_chunk = false;
  block.chunks.assign((block.memory.dynamic_bytes() + 15) / 16, {});
}

CNNOPS_SIMT_RUNTIME void thread_fence() {
  if (!disabled(Sync::kThreadfence)) device.current->published = true;
}

CNNOPS_SIMT_RUNTIME void atomic_begins(void* p, Where where) {
  if (!device.current->block->memory.holds(p, 1) && !device.current->published)
    fail_at("an atomic", where,
            "without a __threadfence before it, other blocks may not see what this one has written");
  acquire(p);
}
CNNOPS_SIMT_RUNTIME void atomic_ends(void* p) { release(p); }

CNNOPS_SIMT_RUNTIME void ordinary_shared_write(const void* address, size_t bytes) {
  if (!device.current || !bytes) return;
  Thread& me = *device.current;
  Block& block = *me.block;
  if (!block.memory.dynamic_holds(address, bytes)) return;
  const size_t begin = block.memory.offset(address) - kWindowBase;
  block.any_chunk = true;
  Chunk* const chunks = block.chunks.data();
  for (size_t chunk = begin / 16; chunk <= (begin + bytes - 1) / 16; ++chunk) {
    Chunk& written = chunks[chunk];
    if (written.writer == me.index + 1 && !written.fenced) continue;
    written = {static_cast<uint16_t>(me.index + 1), false, 0};
    const Hidden hidden;
    me.unfenced_chunks.push_back(static_cast<uint32_t>(chunk));
  }
}

void fence_proxy_async(Where) {
  if (disabled(Sync::kFenceProxyAsync)) return;
  const Hidden hidden;
  Thread& me = *device.current;
  for (const uint32_t each : me.unfenced_chunks) {
    Chunk& chunk = me.block->chunks[each];
    if (chunk.writer != me.index + 1) continue;
    chunk.fenced = true;
    chunk.fenced_at = me.block->epoch;
  }
  me.unfenced_chunks.clear();
}

CNNOPS_SIMT_RUNTIME uint32_t shared_offset(const void* address) {
  const SharedMemory& memory = device.current->block->memory;
  if (!memory.dynamic_holds(address, 1)) fail("a tile that is not in the block's dynamic shared memory");
  return static_cast<uint32_t>(memory.offset(address));
}

}  // namespace cnnops::simt
