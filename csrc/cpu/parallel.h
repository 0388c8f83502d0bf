// Work shared among torch's CPU threads.
#pragma once

#include <cstdint>

namespace cnnops::cpu {

void parallel_for(int64_t count, void (*body)(void* context, int64_t index), void* context);

// body(i) for every i in [0, count), in any order on any thread. Results are the same for any number of threads as long
// as what an index computes depends on the index alone: cut the work by shape, never by thread. body must not throw.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  parallel_for(
      count, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace cnnops::cpu
