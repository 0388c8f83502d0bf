#include "trace.h"

#include <algorithm>
#include <bitset>
#include <memory>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace cnnops::simt {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kLargestAccess = 16;
constexpr size_t kBanks = 32, kBankBytes = 4;
constexpr size_t kPageBytes = 4096;

enum class Kind : unsigned { kGlobalRead, kGlobalWrite, kShared };

// What lanes of one warp access together.
struct Request {
  uint32_t lanes = 0;
  uintptr_t address[kWarp];
};

// An instruction of one warp: the requests since the warp was last together, and how often each lane came by.
struct Site {
  Kind kind;
  size_t bytes;
  unsigned times[kWarp] = {};
  std::vector<Request> requests;
};

struct Warp {
  std::unordered_map<uintptr_t, Site> sites;  // by the address in the code, piece and kind
  std::vector<Site*> open;                    // those that have requests
};

// Which sectors of a page a launch has read and written.
struct Page {
  std::bitset<kPageBytes / kSectorBytes> read, written;
};

struct Range {
  uintptr_t begin;
  size_t bytes;
  bool holds(uintptr_t address) const { return address - begin < bytes; }
};

// Where a read needs no more than a look, because it is not counted: dynamic shared memory of the only block.
struct Quick {
  uintptr_t begin;
  size_t bytes;
};
Quick quick;

struct Tracer {
  bool counting = false;
  std::map<std::string, Traffic> traffic;
  Traffic* current = nullptr;  // the launched kernel's

  std::vector<trace::Tensor> tensors;
  std::vector<Range> arenas;
  Range body = {};

  std::vector<Warp> warps;
  std::unordered_map<uintptr_t, Page> pages;  // by number
};

Tracer tracer;

// Whether this host thread executes a kernel's own instructions: others may run host code of the kernel sources.
__attribute__((tls_model("initial-exec"))) thread_local bool in_kernel = false;

std::string text(const char* does, size_t bytes) { return std::string(does) + " " + std::to_string(bytes) + " bytes "; }

[[noreturn]] void fail_shared(const SharedMemory& mine, uintptr_t address, size_t bytes, const char* does) {
  const std::string why = mine.misplaced(address, bytes);
  fail(text(does, bytes) + (why.empty() ? "of another block's shared memory" : why));
}

// Names the nearest tensor.
[[noreturn]] void fail_global(uintptr_t address, size_t bytes, const char* does) {
  const trace::Tensor* nearest = nullptr;
  uintptr_t least = UINTPTR_MAX;
  bool after = false;
  for (const trace::Tensor& each : tracer.tensors) {
    const bool beyond = address >= each.begin;
    const uintptr_t distance = beyond ? address + bytes - (each.begin + each.bytes) : each.begin - address;
    if (distance < least) nearest = &each, least = distance, after = beyond;
  }
  fail(text(does, bytes) + "of global memory, " +
       (after ? "up to " + std::to_string(least) + " bytes beyond the end of "
              : "from " + std::to_string(least) + " bytes before the start of ") +
       nearest->name + " (" + std::to_string(nearest->bytes) + " bytes)");
}

void check_global(uintptr_t address, size_t bytes, bool write) {
  if (tracer.tensors.empty()) return;
  for (const trace::Tensor& each : tracer.tensors) {
    if (address - each.begin >= each.bytes || address + bytes > each.begin + each.bytes) continue;
    if (write && !each.writable) fail("writes " + std::to_string(bytes) + " bytes to " + each.name + ", an input");
    return;
  }
  fail_global(address, bytes, write ? "writes" : "reads");
}

bool in_an_arena(uintptr_t address) {
  return std::any_of(tracer.arenas.begin(), tracer.arenas.end(), [&](const Range& r) { return r.holds(address); });
}

// Sectors that pieces of `bytes` at these addresses lie in, each once.
class Sectors {
 public:
  void add(uintptr_t address, size_t bytes) {
    for (uintptr_t sector = address / kSectorBytes; sector <= (address + bytes - 1) / kSectorBytes; ++sector)
      found_[count_++] = sector;
  }
  // f(sector) for each; returns how many.
  template <class F>
  size_t for_each(F&& f) {
    std::sort(found_, found_ + count_);
    uintptr_t* const end = std::unique(found_, found_ + count_);
    std::for_each(found_, end, f);
    return static_cast<size_t>(end - found_);
  }

 private:
  uintptr_t found_[2 * kWarp];
  size_t count_ = 0;
};

void mark(uintptr_t sector, bool write) {
  constexpr size_t kPerPage = kPageBytes / kSectorBytes;
  Page& page = tracer.pages[sector / kPerPage];
  (write ? page.written : page.read).set(sector % kPerPage);
}

void tally_global(const Request& request, size_t bytes, bool write) {
  Sectors sectors;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (request.lanes >> lane & 1) sectors.add(request.address[lane], bytes);
  const size_t count = sectors.for_each([&](uintptr_t sector) { mark(sector, write); });
  const auto asked = static_cast<uint64_t>(__builtin_popcount(request.lanes)) * bytes;
  Traffic& to = *tracer.current;
  (write ? to.global_write_bytes : to.global_read_bytes) += asked;
  (write ? to.global_write_sectors : to.global_read_sectors) += count;
}

// A request passes over shared memory once for all its lanes, twice or four times where lanes have 8 or 16 bytes, and
// once more for each further word that lanes of a pass want of one bank.
uint64_t conflicts(const Request& request, size_t bytes) {
  const unsigned lanes_per_pass = bytes <= kBankBytes ? kWarp : bytes <= 2 * kBankBytes ? kWarp / 2 : kWarp / 4;
  uint64_t extra = 0;
  for (unsigned first = 0; first < kWarp; first += lanes_per_pass) {
    uintptr_t words[kWarp * 2];
    size_t count = 0;
    for (unsigned lane = first; lane < first + lanes_per_pass; ++lane)
      if (request.lanes >> lane & 1)
        for (uintptr_t word = request.address[lane] / kBankBytes;
             word <= (request.address[lane] + bytes - 1) / kBankBytes; ++word)
          words[count++] = word;
    std::sort(words, words + count);
    uintptr_t* const end = std::unique(words, words + count);
    unsigned depth[kBanks] = {};
    for (const uintptr_t* word = words; word < end; ++word) ++depth[*word % kBanks];
    const unsigned most = *std::max_element(depth, depth + kBanks);
    if (most > 1) extra += most - 1;
  }
  return extra;
}

void tally(const Site& site, const Request& request) {
  if (site.kind != Kind::kShared) return tally_global(request, site.bytes, site.kind == Kind::kGlobalWrite);
  tracer.current->shared_bytes += static_cast<uint64_t>(__builtin_popcount(request.lanes)) * site.bytes;
  tracer.current->bank_conflicts += conflicts(request, site.bytes);
}

void record(Kind kind, uintptr_t address, size_t bytes, const void* site) {
  const unsigned thread = trace::running_thread();
  if (tracer.warps.size() <= thread / kWarp) tracer.warps.resize(thread / kWarp + 1);
  Warp& warp = tracer.warps[thread / kWarp];
  const unsigned lane = thread % kWarp;
  for (size_t piece = 0; piece < bytes; piece += kLargestAccess) {
    // An address has 47 bits, and an access at most 4096 pieces.
    const uintptr_t key =
        reinterpret_cast<uintptr_t>(site) << 14 | piece / kLargestAccess << 2 | static_cast<unsigned>(kind);
    Site& at = warp.sites[key];
    if (at.requests.empty()) {
      at.kind = kind;
      at.bytes = std::min(bytes - piece, kLargestAccess);
      warp.open.push_back(&at);
    }
    const unsigned time = at.times[lane]++;
    if (at.requests.size() <= time) at.requests.resize(time + 1);
    at.requests[time].lanes |= 1u << lane;
    at.requests[time].address[lane] = address + piece;
  }
}

void check_shared(uintptr_t address, size_t bytes, const char* does) {
  const SharedMemory& mine = trace::running_shared_memory();
  if (!mine.holds(address, bytes)) fail_shared(mine, address, bytes, does);
}

__attribute__((noinline)) void ordinary(uintptr_t address, size_t bytes, bool write, const void* site) {
  if (!in_kernel) return;
  Kind kind = Kind::kShared;
  const SharedMemory& mine = trace::running_shared_memory();
  if (mine.holds(address, bytes)) {
    if (write) ordinary_shared_write(reinterpret_cast<void*>(address), bytes);
  } else if (in_an_arena(address)) {
    fail_shared(mine, address, bytes, write ? "writes" : "reads");
  } else if (tracer.body.holds(address)) {
    return;
  } else {
    check_global(address, bytes, write);
    kind = write ? Kind::kGlobalWrite : Kind::kGlobalRead;
  }
  if (tracer.counting) record(kind, address, bytes, site);
}

// A thread's stack stands for its registers and local memory. Stacks are aligned to their size, so that the address of
// any frame tells which addresses they are.
inline void access(const void* p, size_t bytes, bool write, const void* site) {
  const auto address = reinterpret_cast<uintptr_t>(p), frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  if ((address ^ frame) < kStackBytes) return;
  if (!write && address - quick.begin < quick.bytes && address - quick.begin + bytes <= quick.bytes) return;
  ordinary(address, bytes, write, site);
}

}  // namespace

namespace trace {

bool available() {
#if defined(CNNOPS_TRACED)
  return true;
#else
  return false;
#endif
}

void add_arena(const void* begin, size_t bytes) {
  tracer.arenas.push_back({reinterpret_cast<uintptr_t>(begin), bytes});
}

void count(bool on) { tracer.counting = on; }
std::map<std::string, Traffic> traffic() { return tracer.traffic; }
void reset() { tracer.traffic.clear(); }

void add_tensor(const Tensor& tensor) { tracer.tensors.push_back(tensor); }
void forget_tensors() { tracer.tensors.clear(); }

Launch::Launch(const char* kernel, const std::function<void()>& body, const SharedMemory* only) {
  in_kernel = true;
  if (only && !tracer.counting) quick = {reinterpret_cast<uintptr_t>(only->dynamic()), only->dynamic_bytes()};
  tracer.body = {reinterpret_cast<uintptr_t>(&body), sizeof body};
  if (!tracer.counting) return;
  tracer.current = &tracer.traffic[kernel];
  tracer.warps.clear();
  tracer.pages.clear();
}

Launch::~Launch() {
  in_kernel = false;
  quick = {};
  if (!tracer.counting) return;
  for (const auto& [number, page] : tracer.pages) {
    tracer.current->dram_read_bytes += page.read.count() * kSectorBytes;
    tracer.current->dram_write_bytes += page.written.count() * kSectorBytes;
  }
}

void together(unsigned first, unsigned count) {
  if (!tracer.counting) return;
  for (size_t i = first / kWarp; i < std::min<size_t>((first + count + kWarp - 1) / kWarp, tracer.warps.size()); ++i) {
    Warp& warp = tracer.warps[i];
    for (Site* site : warp.open) {
      for (const Request& request : site->requests) tally(*site, request);
      site->requests.clear();
      std::fill(std::begin(site->times), std::end(site->times), 0u);
    }
    warp.open.clear();
  }
}

CNNOPS_SIMT_RUNTIME Instruction::Instruction() { in_kernel = false; }
CNNOPS_SIMT_RUNTIME Instruction::~Instruction() { in_kernel = true; }

void global_read(const void* address, size_t bytes, const void* site) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  check_global(at, bytes, false);
  if (tracer.counting) record(Kind::kGlobalRead, at, bytes, site);
}

void shared_write(const void* address, size_t bytes, const void* site) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  check_shared(at, bytes, "writes");
  if (tracer.counting) record(Kind::kShared, at, bytes, site);
}

void matrix_read(const void* const (&rows)[32]) {
  constexpr size_t kRowBytes = 16;
  Request request{~0u, {}};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    request.address[lane] = reinterpret_cast<uintptr_t>(rows[lane]);
    check_shared(request.address[lane], kRowBytes, "reads");
  }
  if (!tracer.counting) return;
  tracer.current->shared_bytes += kWarp * kRowBytes;
  tracer.current->bank_conflicts += conflicts(request, kRowBytes);
}

void product(int m, int n, int k) {
  if (tracer.counting) tracer.current->flops += uint64_t{2} * static_cast<unsigned>(m * n) * static_cast<unsigned>(k);
}

void bulk_global_read(const void* address, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  check_global(at, bytes, false);
  if (!tracer.counting) return;
  tracer.current->global_read_bytes += bytes;
  for (uintptr_t sector = at / kSectorBytes; sector <= (at + bytes - 1) / kSectorBytes; ++sector) {
    ++tracer.current->global_read_sectors;
    mark(sector, false);
  }
}

void bulk_shared(size_t bytes) {
  if (tracer.counting) tracer.current->shared_bytes += bytes;
}

}  // namespace trace

}  // namespace cnnops::simt

#if defined(CNNOPS_TRACED)

// What instrumented code calls, in place of ThreadSanitizer's runtime. Hidden in this library, like all that it does
// not export, so that a runtime elsewhere in the process is not disturbed.
extern "C" {

#define CNNOPS_ACCESS(name, bytes, write) \
  void __tsan_##name(void* p) { cnnops::simt::access(p, bytes, write, __builtin_return_address(0)); }
CNNOPS_ACCESS(read1, 1, false)
CNNOPS_ACCESS(read2, 2, false)
CNNOPS_ACCESS(read4, 4, false)
CNNOPS_ACCESS(read8, 8, false)
CNNOPS_ACCESS(read16, 16, false)
CNNOPS_ACCESS(unaligned_read2, 2, false)
CNNOPS_ACCESS(unaligned_read4, 4, false)
CNNOPS_ACCESS(unaligned_read8, 8, false)
CNNOPS_ACCESS(unaligned_read16, 16, false)
CNNOPS_ACCESS(write1, 1, true)
CNNOPS_ACCESS(write2, 2, true)
CNNOPS_ACCESS(write4, 4, true)
CNNOPS_ACCESS(write8, 8, true)
CNNOPS_ACCESS(write16, 16, true)
CNNOPS_ACCESS(unaligned_write2, 2, true)
CNNOPS_ACCESS(unaligned_write4, 4, true)
CNNOPS_ACCESS(unaligned_write8, 8, true)
CNNOPS_ACCESS(unaligned_write16, 16, true)
#undef CNNOPS_ACCESS

void __tsan_read_range(void* p, size_t bytes) { cnnops::simt::access(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { cnnops::simt::access(p, bytes, true, __builtin_return_address(0)); }

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
// Atomics of host code: whether a static variable is initialised, settings, and a count.
unsigned __tsan_atomic32_load(const volatile void* p, int) {
  return __atomic_load_n(static_cast<const volatile unsigned*>(p), __ATOMIC_ACQUIRE);
}
void __tsan_atomic32_store(volatile void* p, unsigned value, int) {
  __atomic_store_n(static_cast<volatile unsigned*>(p), value, __ATOMIC_RELEASE);
}
unsigned __tsan_atomic32_fetch_add(volatile void* p, unsigned value, int) {
  return __atomic_fetch_add(static_cast<volatile unsigned*>(p), value, __ATOMIC_ACQ_REL);
}
unsigned char __tsan_atomic8_load(const volatile void* p, int) {
  return __atomic_load_n(static_cast<const volatile unsigned char*>(p), __ATOMIC_ACQUIRE);
}

}  // extern "C"

#endif
