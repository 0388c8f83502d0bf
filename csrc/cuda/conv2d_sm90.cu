// 2-d convolution on Hopper, by implicit GEMM with TMA and wgmma: forward, and the input's gradient.
//
//   y[n,p,q,k]  = sum over (r,s,c) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s,c]
//   dx[n,h,w,c] = sum over (r,s,k) of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s,c],
//                 where stride divides
//
// Layout     x, dx [N,H,W,C]; y, dy [N,P,Q,K]; weight [K,R,S,C/groups]; 16-bit numbers, sums in float.
// Ownership  One block owns a tile of 128 pixels x kN filters (dx: channels). A warpgroup of producers fills a ring of
//            slots of 64 channels at one tap; two of consumers own 64 pixels each. Blocks are persistent: the producer
//            runs ahead into the next tile while the consumers write this one. Where the last wave of tiles would not
//            be full, its sums over (r,s,c) are divided evenly: a block that has a part leaves its sums in a slab, and
//            the last to come to a tile adds the slabs in order. Nobody waits for another block, and every schedule
//            gives the same bits.
// Traffic    A step reads 128 pixels and kN filters, of 128 bytes each. The blocks of a cluster have the same filters:
//            each loads its part of them and multicasts it to all. Column tiles go fastest, so that blocks in flight
//            together share their pixels in L2.

#include "conv2d_gemm_sm90.h"
#include "conv2d_sm90.h"
#include "dtype.h"
#include "epilogue.cuh"
#include "pipeline_sm90.cuh"
#include "tensor_maps.h"

namespace cnnops::cuda {
namespace {

constexpr int kPixelBytes = kTilePixels * kRowBytes;  // of a slot: its pixels; its filters follow
constexpr int kColumnBytes = 64 * kRowBytes;          // of dx's filters: 64 of them at 64 channels
constexpr int kChunk = 64;  // columns that a warp writes at a time, from its floats in `stage`
constexpr int kStagePitch = kChunk + 4;
constexpr int kWarpRows = 16, kStageFloats = kWarpRows * kStagePitch;

template <int kN>
constexpr int kSlots = kN == 256 ? 4 : 6;

// The block's shared memory.
template <int kN>
struct Shared {
  static constexpr int kSlotBytes = kPixelBytes + kN * kRowBytes;

  unsigned char slots[kSlots<kN>][kSlotBytes];  // first: TMA wants its tiles aligned to 1024 bytes
  float stage[kConsumerWarps][kStageFloats];
  Ring<kSlots<kN>> ring;
  int last;  // whether this block is the last to come to its tile
};
static_assert(sizeof(Shared<64>) <= kSharedOfBlock && sizeof(Shared<128>) <= kSharedOfBlock &&
              sizeof(Shared<256>) <= kSharedOfBlock);

struct Maps {
  TensorMap a[kMostClasses], filters;
};

// What divided sums and statistics leave behind, in the workspace.
struct Scratch {
  float* moments;  // [tile of 128 pixels][3][filters]
  float* slabs;    // [sharer][its first part, or a later one][block of the cluster][kTilePixels * kN]
  int* arrived;    // [shared tile][block of the cluster]: sharers that have left their sums
};

// Steps [begin, end) of a tile.
struct Work {
  int tile, class_index;
  int begin, end;
};

// What one worker does, in order. Producer and consumers each walk through it.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const ImplicitGemm& gemm, const Cut& cut, int worker)
      : gemm_(gemm), cut_(cut), tile_(worker) {
    if (worker >= cut.sharers) return;
    step_ = first_shared_step() + first_of(worker);
    end_ = first_shared_step() + first_of(worker + 1);
  }

  __device__ __forceinline__ bool next(Work& work) {
    if (tile_ < cut_.whole_tiles) {
      work.tile = tile_;
      work.class_index = class_of([&](const PixelClass& at) { return at.first_tile <= tile_; });
      work.begin = 0;
      work.end = cost(gemm_.classes[work.class_index]);
      tile_ += cut_.workers;
      return true;
    }
    if (step_ >= end_) return false;
    work.class_index = class_of([&](const PixelClass& at) { return at.first_step <= step_; });
    const PixelClass& at = gemm_.classes[work.class_index];
    const int tile = (step_ - at.first_step) / cost(at), left = end_ - step_;
    work.tile = at.first_tile + tile;
    work.begin = step_ - at.first_step - tile * cost(at);
    work.end = left < cost(at) - work.begin ? work.begin + left : cost(at);
    step_ += work.end - work.begin;
    return true;
  }

  // The sharers that have a part of a tile, [first, end).
  struct Sharers {
    int first, end;
  };
  __device__ __forceinline__ Sharers sharers_of(const Work& work) const {
    const PixelClass& at = gemm_.classes[work.class_index];
    const int begin = at.first_step + (work.tile - at.first_tile) * cost(at) - first_shared_step();
    return {sharer_of(begin), sharer_of(begin + cost(at) - 1) + 1};
  }

 private:
  template <class IsBefore>
  __device__ __forceinline__ int class_of(const IsBefore& is_before) const {
    int found = 0;
    for (int i = 1; i < gemm_.class_count; ++i)
      if (is_before(gemm_.classes[i])) found = i;
    return found;
  }
  __device__ __forceinline__ int first_shared_step() const {
    const PixelClass& last = gemm_.classes[gemm_.class_count - 1];
    return last.first_step + (cut_.tiles - last.first_tile) * cost(last) - cut_.shared_steps;
  }
  // Sharers have `each` of the shared steps, and the first `longer` of them one more.
  __device__ __forceinline__ int first_of(int sharer) const {
    const int each = cut_.shared_steps / cut_.sharers, longer = cut_.shared_steps - each * cut_.sharers;
    return sharer * each + (sharer < longer ? sharer : longer);
  }
  __device__ __forceinline__ int sharer_of(int step) const {
    const int each = cut_.shared_steps / cut_.sharers, longer = cut_.shared_steps - each * cut_.sharers;
    const int of_longer = longer * (each + 1);
    return step < of_longer ? step / (each + 1) : longer + (step - of_longer) / each;
  }

  const ImplicitGemm& gemm_;
  const Cut& cut_;
  int tile_;
  int step_ = 0, end_ = 0;
};

// Where this block's tile lies in the result. Pixels count through their class.
struct Place {
  int pixel, group, column;  // the first ones; the column of the group
};

__device__ __forceinline__ Place place_of(const ImplicitGemm& gemm, const Cut& cut, const Work& work) {
  const int tile = work.tile - gemm.classes[work.class_index].first_tile;
  const int row = tile / cut.column_tiles, m = row / gemm.groups;
  return {(m * cut.cluster + static_cast<int>(cluster_rank())) * kTilePixels, row - m * gemm.groups,
          (tile - row * cut.column_tiles) * cut.block_n};
}

// One thread of the producers: fills slots with the pixels and filters of the worker's steps.
template <int kN, bool kBackward>
__device__ __forceinline__ void produce(const Maps& maps, const ImplicitGemm& gemm, const Cut& cut,
                                        Shared<kN>& shared) {
  const int blocks = cut.cluster, rank = static_cast<int>(cluster_rank());
  const auto everyone = static_cast<uint16_t>((1 << blocks) - 1);
  const int chunks = static_cast<int>(ceil_div(gemm.channels, kStepChannels));
  Slot<kSlots<kN>> slot;
  Schedule schedule(gemm, cut, static_cast<int>(blockIdx.x) / blocks);
  for (Work work; schedule.next(work);) {
    const PixelClass& at = gemm.classes[work.class_index];
    const TensorMap* const pixels_map = &maps.a[work.class_index];
    const Place place = place_of(gemm, cut, work);
    const int row = place.pixel / at.w.positions, n = row / at.h.positions;
    const int w = at.w.base + (place.pixel - row * at.w.positions) * at.w.move;
    const int h = at.h.base + (row - n * at.h.positions) * at.h.move;

    const int end = work.end < at.steps ? work.end : at.steps;
    const int tap = work.begin / chunks;
    int chunk = work.begin - tap * chunks, r = at.w.taps ? tap / at.w.taps : 0, s = tap - r * at.w.taps;
    for (int step = work.begin; step < end; ++step) {
      const int channel = chunk * kStepChannels;
      const int filter_tap = (at.h.filter + r * at.h.filter_step) * gemm.filter_w + at.w.filter + s * at.w.filter_step;
      uint64_t* const full = &shared.ring.full[slot.index];
      unsigned char* const pixels = shared.slots[slot.index];
      unsigned char* const filters = pixels + kPixelBytes;
      mbarrier_wait(&shared.ring.empty[slot.index], slot.parity ^ 1);
      mbarrier_expect(full, Shared<kN>::kSlotBytes);
      tma_load_im2col(pixels, pixels_map, full, place.group * gemm.channels + channel, w, h, n,
                      static_cast<uint16_t>(s * at.w.step), static_cast<uint16_t>(r * at.h.step));
      const auto load = [&](int offset, int c, int k) {
        const int from[] = {c, filter_tap, k};
        if (blocks > 1)
          tma_multicast(filters + offset, &maps.filters, full, from, everyone);
        else
          tma_load(filters + offset, &maps.filters, full, from);
      };
      if constexpr (kBackward) {
        const int share = kStepChannels / blocks * rank;  // of the step's filters
        for (int i = 0; i < kN / 64; ++i)
          load(i * kColumnBytes + share * kRowBytes, place.column + i * 64,
               place.group * gemm.channels + channel + share);
      } else {
        const int share = kN / blocks * rank;
        load(share * kRowBytes, channel, place.group * gemm.columns + place.column + share);
      }
      slot.advance();
      if (++chunk < chunks) continue;
      chunk = 0;
      if (++s < at.w.taps) continue;
      s = 0;
      ++r;
    }
  }
}

// Adds the products of a tile's steps to this thread's sums.
template <class T, int kN, bool kBackward>
__device__ __forceinline__ void multiply(float (&sum)[kN / 2], int steps, Slot<kSlots<kN>>& slot, uint32_t blocks,
                                         Shared<kN>& shared) {
  const int warpgroup = warpgroup_index();
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    unsigned char* const pixels = shared.slots[slot.index];
    const uint64_t a = matrix_descriptor(pixels + warpgroup * 64 * kRowBytes, kGroupBytes);
    const uint64_t b = kBackward ? matrix_descriptor(pixels + kPixelBytes, kGroupBytes, kColumnBytes)
                                 : matrix_descriptor(pixels + kPixelBytes, kGroupBytes);
    mbarrier_wait(&shared.ring.full[slot.index], slot.parity);
    wgmma_fence();
    CNNOPS_UNROLL
    for (int i = 0; i < kStepChannels / 16; ++i)
      wgmma<T, kN, false, kBackward>(sum, further<false>(a, i), further<kBackward>(b, i), true);
    wgmma_commit();
    // The step before this one is done with now; this one goes on while the next slot is waited for.
    wgmma_wait<1>();
    if (step > 0) release(&shared.ring.empty[previous], blocks);
    previous = slot.index;
    slot.advance();
  }
  wgmma_wait<0>();
  if (steps > 0) release(&shared.ring.empty[previous], blocks);
}

// Leaves this block's sums of a part of a tile in a slab. The last block to do so has the sums of all parts, added in
// order, and is told so.
template <int kN>
__device__ __forceinline__ bool join(float (&sum)[kN / 2], const Schedule& schedule, const Work& work, const Cut& cut,
                                     const Scratch& scratch, Shared<kN>& shared) {
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(cluster_rank());
  const auto slab_of = [&](int sharer, bool later) {
    const int64_t index = (int64_t{sharer} * 2 + later) * cut.cluster + rank;
    return scratch.slabs + index * kTilePixels * kN + thread;
  };
  // A sharer's parts are the end of a tile, or its middle, and then perhaps the beginning of another.
  float* const mine = slab_of(static_cast<int>(blockIdx.x) / cut.cluster, work.begin == 0);
  CNNOPS_UNROLL
  for (int i = 0; i < kN / 2; ++i) mine[i * kConsumerThreads] = sum[i];
  __threadfence();
  barrier_sync(kConsumersBarrier, kConsumerThreads);
  const auto sharers = schedule.sharers_of(work);
  if (thread == 0) {
    int* const arrived = scratch.arrived + (work.tile - cut.whole_tiles) * cut.cluster + rank;
    shared.last = atomicAdd(arrived, 1) == sharers.end - sharers.first - 1;
    __threadfence();
  }
  barrier_sync(kConsumersBarrier, kConsumerThreads);
  if (!shared.last) return false;

  CNNOPS_UNROLL
  for (int i = 0; i < kN / 2; ++i) sum[i] = 0;
  for (int sharer = sharers.first; sharer < sharers.end; ++sharer) {
    const float* const slab = slab_of(sharer, sharer == sharers.first);
    CNNOPS_UNROLL
    for (int i = 0; i < kN / 2; ++i) sum[i] += slab[i * kConsumerThreads];
  }
  return true;
}

// The tile's epilogue, a warp's 16 pixels and kChunk columns at a time.
template <class T, int kN>
__device__ __forceinline__ void write(const float (&sum)[kN / 2], const ImplicitGemm& gemm, const PixelClass& at,
                                      const Place& place, const Epilogue& epilogue, T* result, float* moments_of_tiles,
                                      Shared<kN>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int pitch = gemm.groups * gemm.columns;
  const int first = place.pixel + warp * kWarpRows, end = gemm.N * at.h.positions * at.w.positions;
  const bool dense = at.h.stride == 1 && at.w.stride == 1;
  const auto row_of = [&](int row) -> int64_t {
    const int pixel = first + row;
    if (pixel >= end) return -1;
    if (dense) return int64_t{pixel} * pitch;
    const int i = pixel / at.w.positions, n = i / at.h.positions;
    const int y = at.h.first + (i - n * at.h.positions) * at.h.stride;
    const int x = at.w.first + (pixel - i * at.w.positions) * at.w.stride;
    return ((int64_t{n} * gemm.H + y) * gemm.W + x) * pitch;
  };
  float* const stage = shared.stage[warp];
  const int64_t k_end = int64_t{place.group + 1} * gemm.columns;
  const bool aligned = pitch % kVector<T> == 0;

  for (int chunk = 0; chunk < kN / kChunk; ++chunk) {
    const int64_t k = int64_t{place.group} * gemm.columns + place.column + chunk * kChunk;
    if (k >= k_end) return;
    CNNOPS_UNROLL
    for (int each = 0; each < kN / kChunk; ++each) {  // registers cannot be indexed
      if (each != chunk) continue;
      CNNOPS_UNROLL
      for (int i = 0; i < kChunk / 2; ++i)
        stage[(lane / 4 + i / 2 % 2 * 8) * kStagePitch + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[each * kChunk / 2 + i];
    }
    __syncwarp();
    Moments moments[kVector<T>] = {};
    if (!epilogue.mean) {
      write_rows<T, kChunk, false>(epilogue, stage, kStagePitch, kWarpRows, row_of, k, k_end, aligned, result, moments);
      __syncwarp();
      continue;
    }
    write_rows<T, kChunk, true>(epilogue, stage, kStagePitch, kWarpRows, row_of, k, k_end, aligned, result, moments);
    merge_lanes<T, kChunk>(moments);
    __syncwarp();
    if (lane < kChunk / kVector<T>) {
      CNNOPS_UNROLL
      for (int i = 0; i < kVector<T>; ++i) {
        float* const column = stage + column_of<T, kChunk>() + i;
        column[0] = moments[i].count, column[kChunk] = moments[i].mean, column[2 * kChunk] = moments[i].m2;
      }
    }
    barrier_sync(kConsumersBarrier, kConsumerThreads);
    const int column = static_cast<int>(threadIdx.x);
    if (column < kChunk && k + column < k_end && place.pixel < end) {
      Moments all;
      for (int i = 0; i < kConsumerWarps; ++i) {
        const float* const from = shared.stage[i] + column;
        all.merge({from[0], from[kChunk], from[2 * kChunk]});
      }
      float* const out = moments_of_tiles + int64_t{place.pixel / kTilePixels} * 3 * pitch + k + column;
      out[0] = all.count, out[pitch] = all.mean, out[int64_t{2} * pitch] = all.m2;
    }
    barrier_sync(kConsumersBarrier, kConsumerThreads);
  }
}

template <class T, int kN, bool kBackward>
__device__ __forceinline__ void consume(const ImplicitGemm& gemm, const Cut& cut, const Epilogue& epilogue, T* result,
                                        const Scratch& scratch, Shared<kN>& shared) {
  Slot<kSlots<kN>> slot;
  Schedule schedule(gemm, cut, static_cast<int>(blockIdx.x) / cut.cluster);
  for (Work work; schedule.next(work);) {
    const PixelClass& at = gemm.classes[work.class_index];
    float sum[kN / 2];
    CNNOPS_UNROLL
    for (int i = 0; i < kN / 2; ++i) sum[i] = 0;
    const int steps = (work.end < at.steps ? work.end : at.steps) - work.begin;
    multiply<T, kN, kBackward>(sum, steps, slot, static_cast<uint32_t>(cut.cluster), shared);
    const bool whole = work.begin == 0 && work.end == cost(at);
    if (!whole && !join<kN>(sum, schedule, work, cut, scratch, shared)) continue;
    write<T, kN>(sum, gemm, at, place_of(gemm, cut, work), epilogue, result, scratch.moments, shared);
  }
}

template <class T, int kN, bool kBackward>
__device__ __forceinline__ void convolve(const Maps& maps, const ImplicitGemm& gemm, const Cut& cut,
                                         const Epilogue& epilogue, T* result, const Scratch& scratch) {
  CNNOPS_DYNAMIC_SHARED(Shared<kN>, shared);
  if (threadIdx.x == 0) {
    shared->ring.init(static_cast<uint32_t>(cut.cluster));
    fence_mbarrier_init();
  }
  if (threadIdx.x == kConsumerThreads) {
    prefetch_tensor_map(&maps.filters);
    for (int i = 0; i < gemm.class_count; ++i)
      if (gemm.classes[i].steps > 0) prefetch_tensor_map(&maps.a[i]);
  }
  cluster_sync();
  if (threadIdx.x < kConsumerThreads) {
    increase_registers<kConsumerRegisters>();
    consume<T, kN, kBackward>(gemm, cut, epilogue, result, scratch, *shared);
  } else {
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumerThreads) produce<kN, kBackward>(maps, gemm, cut, *shared);
    __syncwarp();
  }
  // The others of the cluster may still fill this block's slots and arrive at its barriers.
  cluster_sync();
}

template <class T, int kN>
__global__ void __launch_bounds__(kRingThreads, 1)
    conv2d_forward_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ ImplicitGemm gemm,
                               const __grid_constant__ Cut cut, const __grid_constant__ Epilogue epilogue, T* y,
                               const __grid_constant__ Scratch scratch) {
  convolve<T, kN, false>(maps, gemm, cut, epilogue, y, scratch);
}

template <class T, int kN>
__global__ void __launch_bounds__(kRingThreads, 1)
    conv2d_backward_input_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ ImplicitGemm gemm,
                                      const __grid_constant__ Cut cut, const __grid_constant__ Epilogue epilogue, T* dx,
                                      const __grid_constant__ Scratch scratch) {
  convolve<T, kN, true>(maps, gemm, cut, epilogue, dx, scratch);
}

constexpr int kClearThreads = 256;

__global__ void __launch_bounds__(kClearThreads) clear_counters_kernel(int* counters, int count) {
  const int i = static_cast<int>(blockIdx.x * kClearThreads + threadIdx.x);
  if (i < count) counters[i] = 0;
}

// The parts of the workspace, in bytes, one after another.
struct Workspace {
  int64_t moments, slabs;
  int counters;

  Workspace(const ImplicitGemm& gemm, const Cut& cut, const Epilogue& epilogue)
      : moments(epilogue.mean ? rounded(pixel_tiles(gemm) * 3 * gemm.groups * gemm.columns) : 0),
        slabs(rounded(int64_t{2} * cut.sharers * cut.cluster * kTilePixels * cut.block_n)),
        counters((cut.tiles - cut.whole_tiles) * cut.cluster) {}

  int64_t bytes() const { return moments + slabs + counters * int64_t{sizeof(int)}; }

  Scratch of(void* workspace) const {
    auto* const first = static_cast<char*>(workspace);
    return {reinterpret_cast<float*>(first), reinterpret_cast<float*>(first + moments),
            reinterpret_cast<int*>(first + moments + slabs)};
  }

 private:
  static int64_t rounded(int64_t floats) {
    constexpr int64_t kAlign = 256;
    return ceil_div(floats * int64_t{sizeof(float)}, kAlign) * kAlign;
  }
};

template <bool kBackward>
struct Problem {
  ImplicitGemm gemm;
  Cut cut;
  Workspace workspace;

  Problem(const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue)
      : gemm(kBackward ? backward_input_gemm(p) : forward_gemm(p)),
        cut(cnnops::cuda::cut(gemm, plan.block_n, plan.cluster, device().multiprocessors, plan.splits > 1)),
        workspace(gemm, cut, epilogue) {}
};

template <class T, int kN, bool kBackward>
void launch(const Conv2dProblem& p, const Problem<kBackward>& problem, const Epilogue& epilogue, const void* a,
            const void* weight, void* result, void* workspace, Stream stream) {
  const ImplicitGemm& gemm = problem.gemm;
  const Cut& cut = problem.cut;
  Maps maps{};
  for (int i = 0; i < gemm.class_count; ++i)
    if (gemm.classes[i].steps > 0) maps.a[i] = cached_tensor_map(a_tensor(gemm, gemm.classes[i]), a);
  maps.filters = cached_tensor_map(filter_tensor(p, (kBackward ? kStepChannels : kN) / cut.cluster), weight);
  const Scratch scratch = problem.workspace.of(workspace);
  if (const int counters = problem.workspace.counters)
    CNNOPS_LAUNCH(clear_counters_kernel, blocks(ceil_div(counters, kClearThreads)), kClearThreads, 0, stream,
                  scratch.arrived, counters);
  constexpr auto kernel = [] {
    if constexpr (kBackward)
      return conv2d_backward_input_sm90_kernel<T, kN>;
    else
      return conv2d_forward_sm90_kernel<T, kN>;
  }();
  CNNOPS_LAUNCH_CLUSTERS(kernel, blocks(int64_t{cut.workers} * cut.cluster), kRingThreads,
                         static_cast<unsigned>(cut.cluster), sizeof(Shared<kN>), stream, maps, gemm, cut, epilogue,
                         static_cast<T*>(result), scratch);
  if (epilogue.mean) finish_moments(pixel_tiles(gemm), gemm.groups * gemm.columns, scratch.moments, epilogue, stream);
}

template <bool kBackward>
void run(const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue, const void* a, const void* weight,
         void* result, void* workspace, Stream stream) {
  const Problem<kBackward> problem(p, plan, epilogue);
  const auto with = [&]<class T>(T) {
    switch (plan.block_n) {
      case 64:
        return launch<T, 64, kBackward>(p, problem, epilogue, a, weight, result, workspace, stream);
      case 128:
        return launch<T, 128, kBackward>(p, problem, epilogue, a, weight, result, workspace, stream);
      default:
        return launch<T, 256, kBackward>(p, problem, epilogue, a, weight, result, workspace, stream);
    }
  };
  p.dtype == DType::kHalf ? with(Half{}) : with(BFloat16{});
}

}  // namespace

const Conv2dFamily kWgmmaConv2d = {
    .forward_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan, const Epilogue& epilogue) -> int64_t {
      return Problem<false>(p, plan, epilogue).workspace.bytes();
    },
    .forward = run<false>,
    .backward_input_workspace = [](const Conv2dProblem& p, const Conv2dPlan& plan) -> int64_t {
      return Problem<true>(p, plan, {}).workspace.bytes();
    },
    .backward_input = run<true>,
    .backward_weight_workspace = conv2d_backward_weight_workspace_sm90,
    .backward_weight = conv2d_backward_weight_sm90,
};

}  // namespace cnnops::cuda
