// The ring of slots in shared memory through which a producer's TMA feeds consumers' wgmma. A slot is either filled or
// read: its `full` barrier says that its bytes have landed, its `empty` barrier that every reader has done with them.
// Producer and consumers walk the ring in the same order, each with a Slot of its own.
#pragma once

#include "ptx_sm90.cuh"

namespace cnnops::cuda {

constexpr int kWarpgroup = 128, kConsumerWarps = 8;
constexpr int kConsumerThreads = 32 * kConsumerWarps, kRingThreads = kConsumerThreads + kWarpgroup;
// Of the 168 registers that each of kRingThreads threads is born with, the producer's warpgroup leaves to the consumers
// what it does not need: 128 * 56 + 256 * 224 <= 65536.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kRowBytes = 128;                        // of a tile in shared memory: what a swizzled row has
constexpr int kGroupBytes = 8 * kRowBytes;            // of the swizzle's period
constexpr int kConsumersBarrier = 1;                  // a named one, of all consumers
constexpr size_t kSharedOfBlock = size_t{227} << 10;  // the most that a block of sm_90 may have

template <int kStages>
struct Ring {
  uint64_t full[kStages], empty[kStages];

  // By one thread, before threads and blocks synchronise. `blocks` of a cluster fill and read each slot.
  __device__ void init(uint32_t blocks) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kConsumerWarps * blocks);
    }
  }
};

template <int kStages>
struct Slot {
  int index = 0;
  uint32_t parity = 0;  // of the ring's round

  __device__ void advance() {
    if (++index < kStages) return;
    index = 0;
    parity ^= 1;
  }
};

// Of this warp; taken from one lane, so that the compiler keeps what depends on it in uniform registers, where wgmma
// wants its descriptors.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// This warp has done with a slot: says so to each block that fills it.
__device__ __forceinline__ void release(uint64_t* empty, uint32_t blocks) {
  const uint32_t lane = threadIdx.x % 32;
  if (blocks == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else if (lane < blocks) {
    mbarrier_arrive_remote(empty, lane);
  }
}

// The 16 steps of k that follow in a matrix descriptor's tile, i times: 32 bytes along rows of k, or two groups of 8
// rows that are steps of k themselves.
template <bool kMnMajor>
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int i) {
  return descriptor + static_cast<uint64_t>(i) * ((kMnMajor ? 2 * kGroupBytes : 32) >> 4);
}

}  // namespace cnnops::cuda
