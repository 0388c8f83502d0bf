// 2-d convolution of 64 channels to 64 on Hopper, stride 1, for small filters: every tap from one tile of x.
//
//   y[n,p,q,k]  = sum over (r,s,c) of x[n, p - pad + r, q - pad + s, c] * weight[k,r,s,c]
//   dx[n,h,w,c] = sum over (r,s,k) of dy[n, h + pad - r, w + pad - s, k] * weight[k,r,s,c],
//                 which is the same with pad = R - 1 - pad and the taps in the opposite order
//
// Layout     x, dx [N,H,W,64]; y, dy [N,P,Q,64]; weight [64,R,S,64]; 16-bit numbers, sums in float.
// Ownership  One block owns tiles of 256 pixels, rows x columns, of all filters. It is persistent: the filters stay in
//            its shared memory. They are on wgmma's M and pixels on its N, 128 of them for each warpgroup of
//            consumers; a warpgroup of producers runs ahead into the next tile.
// Traffic    A tap's pixels must begin at a period of the swizzle, 8 pixels: elsewhere the matrix descriptor would need
//            its base offset, which nobody has tried here on hardware. Tiles are multiples of 8 columns wide, so that
//            the taps of one column of the filter all do; for the S columns there are S copies of the tile, each begun
//            one column later, with R - 1 rows more. So x is read S * (rows + R - 1) / rows times from L2 and not R * S
//            times, and the filters once for each block.

#include "conv2d_halo_sm90.h"
#include "conv2d_sm90.h"
#include "dtype.h"
#include "epilogue.cuh"
#include "pipeline_sm90.cuh"
#include "tensor_maps.h"

namespace cnnops::cuda {
namespace {

constexpr int kSlots = 3, kWarpgroups = 2;
constexpr int kGroupPixels = kHaloPixels / kWarpgroups;  // of one warpgroup
constexpr int kChunkPixels = 64;                         // that a warpgroup writes at a time
constexpr int kWarpPixels = kChunkPixels / 4;
constexpr int kStagePitch = kHaloChannels + 4;
constexpr int kFilterBytes = kHaloChannels * kHaloChannels * 2;  // of one tap
constexpr int kWarpgroupBarrier = 2;                             // and the next: named ones, of one warpgroup each

// What shared memory has beside filters and slots, whose sizes depend on the problem.
struct Fixed {
  float stage[kWarpgroups][kChunkPixels * kStagePitch];
  Ring<kSlots> ring;
  uint64_t filters;  // a barrier: they have landed
};

static_assert(sizeof(Fixed) == 2 * kChunkPixels * kStagePitch * sizeof(float) + 7 * sizeof(uint64_t));

struct Maps {
  TensorMap x, filters;
};

struct Shared {
  unsigned char *filters, *slots;
  Fixed* fixed;

  __device__ __forceinline__ Shared(unsigned char* first, const HaloConv& at, int slot_bytes)
      : filters(first),
        slots(first + at.R * at.S * kFilterBytes),
        fixed(reinterpret_cast<Fixed*>(slots + kSlots * slot_bytes)) {}
};

struct Tile {
  int n, p, q;
};

__device__ __forceinline__ Tile tile_of(const HaloConv& at, int index) {
  const int row = index / at.tiles_w, n = row / at.tiles_h;
  return {n, (row - n * at.tiles_h) * at.rows, (index - row * at.tiles_w) * at.columns};
}

__device__ __forceinline__ void produce(const Maps& maps, const HaloConv& at, int slot_bytes, const Shared& shared) {
  Ring<kSlots>& ring = shared.fixed->ring;
  mbarrier_expect(&shared.fixed->filters, static_cast<uint32_t>(at.R * at.S * kFilterBytes));
  for (int tap = 0; tap < at.R * at.S; ++tap) {
    const int from[] = {0, tap, 0};
    tma_load(shared.filters + tap * kFilterBytes, &maps.filters, &shared.fixed->filters, from);
  }
  Slot<kSlots> slot;
  for (int index = static_cast<int>(blockIdx.x); index < at.tiles; index += static_cast<int>(gridDim.x)) {
    const Tile tile = tile_of(at, index);
    for (int s = 0; s < at.S; ++s) {
      const int from[] = {0, tile.q - at.pad_w + s, tile.p - at.pad_h, tile.n};
      mbarrier_wait(&ring.empty[slot.index], slot.parity ^ 1);
      mbarrier_expect(&ring.full[slot.index], static_cast<uint32_t>(slot_bytes));
      tma_load(shared.slots + slot.index * slot_bytes, &maps.x, &ring.full[slot.index], from);
      slot.advance();
    }
  }
}

// The sums of this warpgroup's pixels over all taps.
template <class T, bool kBackward>
__device__ __forceinline__ void multiply(float (&sum)[kGroupPixels / 2], const HaloConv& at, int slot_bytes,
                                         Slot<kSlots>& slot, const Shared& shared) {
  const int warpgroup = warpgroup_index();
  Ring<kSlots>& ring = shared.fixed->ring;
  int previous = 0;
  for (int s = 0; s < at.S; ++s) {
    const unsigned char* const pixels = shared.slots + slot.index * slot_bytes + warpgroup * kGroupPixels * kRowBytes;
    mbarrier_wait(&ring.full[slot.index], slot.parity);
    CNNOPS_NO_UNROLL
    for (int r = 0; r < at.R; ++r) {
      const int tap = kBackward ? (at.R - r) * at.S - 1 - s : r * at.S + s;
      const uint64_t a = matrix_descriptor(shared.filters + tap * kFilterBytes, kGroupBytes);
      const uint64_t b = matrix_descriptor(pixels + r * at.columns * kRowBytes, kGroupBytes);
      wgmma_fence();
      CNNOPS_UNROLL
      for (int i = 0; i < kHaloChannels / 16; ++i)
        wgmma<T, kGroupPixels, kBackward, false>(sum, further<kBackward>(a, i), further<false>(b, i), true);
      wgmma_commit();
      // The tap before this one is done with now, and with it, at a slot's first, the slot before.
      wgmma_wait<1>();
      if (r == 0 && s > 0) release(&ring.empty[previous], 1);
    }
    previous = slot.index;
    slot.advance();
  }
  wgmma_wait<0>();
  release(&ring.empty[previous], 1);
}

// wgmma's sums have filters down and pixels across: shared memory turns them round.
template <class T>
__device__ __forceinline__ void write(const float (&sum)[kGroupPixels / 2], const HaloConv& at, int index,
                                      const Epilogue& epilogue, T* result, float* moments_of_tiles,
                                      const Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warpgroup = thread / kWarpgroup, warp = thread % kWarpgroup / 32;
  const Tile tile = tile_of(at, index);
  float* const stage = shared.fixed->stage[warpgroup];
  Moments moments[kVector<T>] = {};
  CNNOPS_UNROLL
  for (int chunk = 0; chunk < kGroupPixels / kChunkPixels; ++chunk) {
    CNNOPS_UNROLL
    for (int i = 0; i < kChunkPixels / 2; ++i) {
      const int filter = warp * 16 + lane / 4 + i / 2 % 2 * 8, pixel = i / 4 * 8 + lane % 4 * 2 + i % 2;
      stage[pixel * kStagePitch + filter] = sum[chunk * kChunkPixels / 2 + i];
    }
    barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroup);
    const int first = warpgroup * kGroupPixels + chunk * kChunkPixels + warp * kWarpPixels;
    const auto row_of = [&](int row) -> int64_t {
      const int pixel = first + row, i = pixel / at.columns;
      const int p = tile.p + i, q = tile.q + pixel - i * at.columns;
      return p < at.P && q < at.Q ? ((int64_t{tile.n} * at.P + p) * at.Q + q) * kHaloChannels : -1;
    };
    const float* const rows = stage + warp * kWarpPixels * kStagePitch;
    if (epilogue.mean)
      write_rows<T, kHaloChannels, true>(epilogue, rows, kStagePitch, kWarpPixels, row_of, 0, kHaloChannels, true,
                                         result, moments);
    else
      write_rows<T, kHaloChannels, false>(epilogue, rows, kStagePitch, kWarpPixels, row_of, 0, kHaloChannels, true,
                                          result, moments);
    barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroup);
  }
  if (!epilogue.mean) return;

  const auto moments_of = [&](int each) { return shared.fixed->stage[each / 4] + each % 4 * 3 * kHaloChannels; };
  merge_lanes<T, kHaloChannels>(moments);
  if (lane < kHaloChannels / kVector<T>) {
    CNNOPS_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      float* const to = moments_of(thread / 32) + column_of<T, kHaloChannels>() + i;
      to[0] = moments[i].count, to[kHaloChannels] = moments[i].mean, to[2 * kHaloChannels] = moments[i].m2;
    }
  }
  barrier_sync(kConsumersBarrier, kConsumerThreads);
  if (thread < kHaloChannels) {
    Moments all;
    for (int each = 0; each < kConsumerWarps; ++each) {
      const float* const from = moments_of(each) + thread;
      all.merge({from[0], from[kHaloChannels], from[2 * kHaloChannels]});
    }
    float* const out = moments_of_tiles + int64_t{index} * 3 * kHaloChannels + thread;
    out[0] = all.count, out[kHaloChannels] = all.mean, out[2 * kHaloChannels] = all.m2;
  }
  barrier_sync(kConsumersBarrier, kConsumerThreads);
}

template <class T, bool kBackward>
__device__ __forceinline__ void convolve(const Maps& maps, const HaloConv& at, int slot_bytes, const Epilogue& epilogue,
                                         T* result, float* moments) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, first);
  const Shared shared(first, at, slot_bytes);
  if (threadIdx.x == 0) {
    shared.fixed->ring.init(1);
    mbarrier_init(&shared.fixed->filters, 1);
    fence_mbarrier_init();
  }
  if (threadIdx.x == kConsumerThreads) {
    prefetch_tensor_map(&maps.filters);
    prefetch_tensor_map(&maps.x);
  }
  __syncthreads();
  if (threadIdx.x >= kConsumerThreads) {
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumerThreads) produce(maps, at, slot_bytes, shared);
    return;
  }
  increase_registers<kConsumerRegisters>();
  mbarrier_wait(&shared.fixed->filters, 0);
  Slot<kSlots> slot;
  for (int index = static_cast<int>(blockIdx.x); index < at.tiles; index += static_cast<int>(gridDim.x)) {
    float sum[kGroupPixels / 2];
    CNNOPS_UNROLL
    for (int i = 0; i < kGroupPixels / 2; ++i) sum[i] = 0;
    multiply<T, kBackward>(sum, at, slot_bytes, slot, shared);
    write<T>(sum, at, index, epilogue, result, moments, shared);
  }
}

template <class T>
__global__ void __launch_bounds__(kRingThreads, 1)
    conv2d_forward_halo_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ HaloConv at,
                                    int slot_bytes, const __grid_constant__ Epilogue epilogue, T* y, float* moments) {
  convolve<T, false>(maps, at, slot_bytes, epilogue, y, moments);
}

template <class T>
__global__ void __launch_bounds__(kRingThreads, 1)
    conv2d_backward_input_halo_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ HaloConv at,
                                           int slot_bytes, const __grid_constant__ Epilogue epilogue, T* dx,
                                           float* moments) {
  convolve<T, true>(maps, at, slot_bytes, epilogue, dx, moments);
}

template <class T, bool kBackward>
void launch(const Conv2dProblem& p, const Epilogue& epilogue, const void* x, const void* weight, void* result,
            float* moments, Stream stream) {
  const HaloConv at = halo_conv(p, kBackward);
  const Maps maps{cached_tensor_map(halo_tensor(p.dtype, at), x),
                  cached_tensor_map(filter_tensor(p, kHaloChannels), weight)};
  const int slot_bytes = halo_slot_bytes(at);
  const size_t shared_bytes = static_cast<size_t>(halo_shared_bytes(at));
  constexpr auto kernel = [] {
    if constexpr (kBackward)
      return conv2d_backward_input_halo_sm90_kernel<T>;
    else
      return conv2d_forward_halo_sm90_kernel<T>;
  }();
  CNNOPS_LAUNCH(kernel, blocks(std::min(at.tiles, device().multiprocessors)), kRingThreads, shared_bytes, stream, maps,
                at, slot_bytes, epilogue, static_cast<T*>(result), moments);
  if (epilogue.mean) finish_moments(at.tiles, kHaloChannels, moments, epilogue, stream);
}

template <bool kBackward>
void run(const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue, const void* x, const void* weight,
         void* result, void* workspace, Stream stream) {
  auto* const moments = static_cast<float*>(workspace);
  if (p.dtype == DType::kHalf)
    launch<Half, kBackward>(p, epilogue, x, weight, result, moments, stream);
  else
    launch<BFloat16, kBackward>(p, epilogue, x, weight, result, moments, stream);
}

}  // namespace

const Conv2dFamily kHaloConv2d = {
    .forward_workspace = [](const Conv2dProblem& p, const Conv2dPlan&, const Epilogue& epilogue) -> int64_t {
      return epilogue.mean ? int64_t{halo_conv(p, false).tiles} * 3 * kHaloChannels * int64_t{sizeof(float)} : 0;
    },
    .forward = run<false>,
    .backward_input_workspace = [](const Conv2dProblem&, const Conv2dPlan&) -> int64_t { return 0; },
    .backward_input = run<true>,
    .backward_weight_workspace = nullptr,
    .backward_weight = nullptr,
};

}  // namespace cnnops::cuda
