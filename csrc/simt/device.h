// The emulated device's state and its scheduler, for the sources of this folder alone.
//
// The blocks of one cluster live at once, each thread of theirs a fiber; clusters run one after another. A cooperative
// launch has all its blocks live at once. Whoever waits is not scheduled until it is woken: nothing polls.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "async.h"
#include "fiber.h"
#include "shared_memory.h"
#include "simt.h"

namespace cnnops::simt {

constexpr unsigned kMaxThreads = 1024, kWarp = 32, kWarpgroup = 128, kMaxCluster = 8;
constexpr unsigned kMaxBlocks = 16, kMaxFibers = kMaxCluster * kMaxThreads;  // that live at once

struct Block;
struct Mbarrier;

// cp.async, which has 16 bytes.
struct AsyncCopy {
  void* destination;
  const void* source;
  int bytes, group;
};

enum class State {
  kReady,
  kAtBarrier,
  kAtNamedBarrier,
  kAtClusterBarrier,
  kAtGridBarrier,
  kAtMbarrier,
  kInCollective,
  kInStep,
  kExited
};

struct Thread {
  Fiber fiber;
  unsigned slot = 0;   // among the device's fibers
  unsigned index = 0;  // in its block
  Block* block = nullptr;
  dim3 position;
  State state = State::kExited;
  // What it waits in and for: a collective's mask, a named barrier's number, the parity of an mbarrier's phase.
  const char* waits_in = nullptr;
  Where where;
  unsigned waits_for = 0;
  const Mbarrier* mbarrier = nullptr;
  Thread* next_waiter = nullptr;

  std::vector<AsyncCopy> copies;
  int committed_groups = 0;
  bool published = false;                 // has executed __threadfence
  std::vector<uint32_t> unfenced_chunks;  // that it wrote since its last fence_proxy_async
};

// Threads that wait for the same event.
class WaitList {
 public:
  void add(Thread& thread);
  void wake_all();
  Thread* first() const { return first_; }

 private:
  Thread* first_ = nullptr;
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

// Sync objects of barriers alternate by phase, for the same reason.
struct NamedBarrier {
  int threads = 0, arrived = 0;  // threads: 0 while nobody has come
  uint64_t passed = 0;
  WaitList waiting;
  char syncs[2] = {};
};

struct Mbarrier {
  Block* block;
  uint64_t* word;
  uint32_t count, pending;
  int64_t bytes = 0;   // expected less landed in this phase
  uint64_t phase = 0;  // how many have completed
  WaitList waiting;
  char syncs[2] = {};

  // Others of the block may use it after a barrier, TMA after a fence, other blocks after a fence and a cluster_sync.
  unsigned initialiser;  // thread
  uint64_t initialised_at, fenced_at = 0;
  bool fenced = false;

  uint64_t observed = 0;  // phases that a thread of the block has waited for, or could have
  bool foreign = false;   // another block has arrived here, in the phase and cluster epoch below
  uint64_t foreign_phase = 0, foreign_epoch = 0;
};

// A part of a block's shared memory that TMA fills, from the copy's issue until a thread has waited for it.
struct Landing {
  size_t begin, end;  // in the block's window
  uint64_t* barrier;
  bool landed;
  uint64_t phase;  // of the barrier, once landed
  Where where;
};

// A copy by TMA to one block, issued and not landed.
struct TmaCopy {
  TensorMap map;
  int at[5];
  int offset_w, offset_h;
  Block* target;
  size_t destination;  // in the target's window
  uint64_t* barrier;   // the target's
  bool foreign;        // issued by another block
  Where where;
  char* sync;
  bool reads;  // of the copies of one multicast, one reads for all
};

// Who wrote a 16-byte chunk of dynamic memory by ordinary instructions. wgmma may read it once the writer has executed
// fence_proxy_async, and a barrier has been passed since.
struct Chunk {
  uint16_t writer = 0;  // thread + 1, or 0
  bool fenced = false;
  uint64_t fenced_at = 0;  // the block's epoch
};

struct Accumulator {
  float* d[kWarpgroup];
  int n, products;                // products under way
  std::unique_ptr<float[]> sums;  // [64][n]
};

struct Product {
  WarpgroupProduct operands;  // of the first lane; d and a_registers are not used
  Accumulator* accumulator;
  int group;
  unsigned lanes;  // that have handed in their part
  bool from_registers, done;
  Where where;
  float a[64 * 16];
};

// The instructions that a warpgroup executes as one, since its last wait: each lane goes through the same.
struct Step {
  const char* name;
  uint64_t argument;
  Where where;
  unsigned arrived;
  Product* product;
};

struct Warpgroup {
  std::vector<Step> steps;
  unsigned next_step[kWarpgroup] = {};
  std::deque<Product> products;  // not waited for
  std::vector<std::unique_ptr<Accumulator>> accumulators, spare;
  int committed = 0;
  bool fenced = false;
  uint64_t waits = 0;
  WaitList waiting;
  char syncs[2] = {};
};

struct Block {
  unsigned rank = 0;
  dim3 index;
  Thread* threads = nullptr;
  SharedMemory memory;
  unsigned exited = 0;
  uint64_t epoch = 0;  // how many barriers have been passed, phases completed and warps synchronised

  unsigned at_barrier = 0, barriers_passed = 0, at_grid_barrier = 0;
  const Thread* first_at_barrier = nullptr;
  char barrier_syncs[2] = {};
  NamedBarrier named[16];
  Warp warps[kMaxThreads / kWarp];
  Warpgroup warpgroups[kMaxThreads / kWarpgroup];
  std::deque<Mbarrier> mbarriers;
  std::vector<Landing> landings;
  std::vector<Chunk> chunks;
  bool any_chunk = false;  // has been written
};

// The threads that can run, as one bit each.
class ReadySet {
 public:
  void resize(unsigned threads) { words_used_ = (threads + 63) / 64; }
  void insert(unsigned i);
  void erase(unsigned i);
  void clear();
  // The first member at or after `from`, going round; -1 if there is none.
  int next(unsigned from) const;
  // The last member at or before `from`, going round; -1 if there is none.
  int previous(unsigned from) const;

 private:
  static constexpr unsigned kWords = kMaxFibers / 64;
  unsigned words_used_ = kWords;
  uint64_t words_[kWords] = {};
};

struct Device {
  std::mutex mutex;  // one launch at a time
  Order order = Order::kForward;
  uint64_t random = 1;
  Counters counters;
  int architecture = 90, multiprocessors = 3, l2_bytes = 256 << 10;
  uint64_t first_block = 0, block_limit = UINT64_MAX;
  int disabled_sync = -1;

  Fiber host;
  Thread threads[kMaxFibers];
  unsigned started_threads = 0;
  Thread* current = nullptr;
  ReadySet ready;

  const char* kernel = nullptr;
  const std::function<void()>* body = nullptr;
  dim3 grid, block;
  unsigned thread_count = 0;           // of a block
  unsigned cluster = 1, together = 1;  // blocks of a cluster; that live at once
  bool cooperative = false;
  Block blocks[kMaxBlocks];
  unsigned exited = 0;  // of all threads
  char begin_sync = 0, end_sync = 0;
  std::string error;

  unsigned at_cluster_barrier = 0;
  uint64_t cluster_barriers_passed = 0;
  WaitList cluster_waiting;
  char cluster_syncs[2] = {};
  WaitList grid_waiting;
  char grid_syncs[2] = {};
  std::vector<TmaCopy> tma_copies;
  uint64_t landing_chance = 0;  // of a copy at a switch, in 2^-32
};

extern Device device;

uint64_t next_random();
bool coin();  // heads, in random schedules; else always tails

// Leaves the calling thread, which waits for something, for the next one that can run; for the host when the cluster is
// over or stuck.
void suspend();
void wake(Thread& thread);
// Lets others run first; this one, which must be able to.
void yield();
void yield_to(Thread& thread);

// Text for reports. report.cpp.
std::string text(const dim3& d);
std::string text(const Where& where);
std::string place(const Block& block);
std::string doing(const Thread& thread);
std::string roll_call();
[[noreturn]] void fail_at(const char* name, Where where, const std::string& what);
void require_sm90(const char* name, Where where);

// What asynchronous work and exits have to say to each other.
bool land_one();                          // false if no copy is under way
void check_block_exit(Block& block);      // fails if something is still to happen to its memory
void check_warpgroup_exit(Block& block);  // likewise for products
void open_cluster_barrier_if_all_came();
// The copy has been written to these bytes; its barrier counts `bytes` of them.
void complete_bytes(const TmaCopy& copy, void* written, size_t written_bytes, size_t bytes);
// The barrier of `target` at the place of this word of the calling block; fails where it may not yet be used there.
Mbarrier& find_for_async(const char* name, Block& target, uint64_t* own_word, Where where);
void reset_asynchronous(Block& block);
// A product not waited for that reads [begin, end) of the block's window; null if there is none.
const Product* reader_of(const Block& block, size_t begin, size_t end);

}  // namespace cnnops::simt
