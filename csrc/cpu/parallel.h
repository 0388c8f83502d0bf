// Work shared among torch's CPU threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cnnops::cpu {

// Numbers that one thread must have to work on: below, waking another and waiting for it (2 to 15 us on two cores of a
// busy Xeon) costs more than it saves.
constexpr int64_t kThreadWork = 65536;

// grain: how many indices a thread takes at least.
void parallel_for(int64_t count, int64_t grain, void (*body)(void* context, int64_t index), void* context);

// body(i) for every i in [0, count), in any order on any thread. Results are the same for any number of threads as long
// as what an index computes depends on the index alone: cut the work by shape, never by thread. body must not throw.
// work: about how many numbers one index reads, writes or multiplies, which decides how many threads are worth it.
template <class Body>
void parallel_for(int64_t count, int64_t work, const Body& body) {
  parallel_for(
      count, kThreadWork / std::clamp<int64_t>(work, 1, kThreadWork),
      [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace cnnops::cpu
