// backward_weight on Hopper: a GEMM of filters x (taps, channels) over pixels, fetched by TMA, multiplied by wgmma.
//
//   dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//
// Layout     x [N,H,W,C], dy [N,P,Q,K], dweight [K,R,S,C/groups], of 16-bit numbers. In shared memory a row is the 64
//            filters or 64 channels of a pixel, 128 bytes, swizzled by TMA: both operands are MN-major.
// Ownership  A block owns a tile of the result and one slab of the pixels. Slabs are floats, which add_slabs adds in
//            order: every schedule gives the same bits.
// Pipeline   One thread loads into a ring of stages, warpgroups multiply. A stage's `full` barrier counts TMA's bytes,
//            `empty` the warps that have waited for their products.
//
// There are two kernels.
//
// taps, for 3x3: a block owns all taps of 64 filters x 64 channels, each of three warpgroups one filter row, 64 x 192.
// A stage is a box of dy, 8 columns wide, and for each column tap s the box of x [rows of the halo][8 columns] that
// lies under it. So x is stored three times, and every tap (r, s) starts at a multiple of 8 pixels, 1024 bytes, where
// the swizzle's pattern starts; in one copy for all s they would start inside the pattern, which takes a base offset in
// the descriptor that nobody here has seen work.
//   Traffic through L2: dy once and x 3 * halo rows / rows times, 3.4 with 14 rows; in all 4.4 reads of a tensor
// against the 18 of nine separate products, for 64->64@56 of batch 256 0.46 GB against 1.85. Two blocks of a cluster
// that differ in their filters load x together: 2.7 reads.
//   A product's 16 pixels are two groups of 8: rows p and p + 1 of an image where P is even, else one row of two
// images. What is not in the sum is not multiplied, or is zero on both sides, for 0 * NaN is NaN: rows beyond P are
// left out, images beyond N are zeros in both tensors, and so are columns beyond Q, since each copy of x has a tensor
// map of its own, which ends with the column that dy's last one reads.
//
// columns, for any filter: a block owns 128 or 64 filters x chunks of 64 columns, a column being a tap and a channel.
// Pixels are linear: dy is a matrix, and TMA's im2col mode walks x; only those beyond the last image are padding, zeros
// in both. Traffic through L2: with 128 x 256 dy once for 4 chunks, and x once for each tap and 128 filters.

#include "conv2d_sm90.h"
#include "conv2d_weight_sm90.h"
#include "dtype.h"
#include "pipeline_sm90.cuh"
#include "tensor_maps.h"

namespace cnnops::cuda {
namespace {

using Barriers = Ring<kMostStages>;

// Where a thread is in a ring of as many stages as the plan has it.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// By every thread, before and after whatever blocks of a cluster do to each other's shared memory.
__device__ void meet(int cluster) {
  if (cluster > 1)
    cluster_sync();
  else
    __syncthreads();
}

// By every thread. `cluster` blocks fill each other's stages, and so wait for each other's consumers.
__device__ void start(Barriers& ring, int stages, int consumer_warps, int cluster) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(&ring.full[stage], 1);
      mbarrier_init(&ring.empty[stage], consumer_warps * cluster);
    }
    fence_mbarrier_init();
  }
  meet(cluster);
}

// Calls multiply(i, stage) for i in [0, steps), which commits at least one group of wgmma. A stage is given back when
// the products of the next one have been issued, so that the tensor cores do not idle between stages.
template <class Multiply>
__device__ void consume(Barriers& ring, int stages, int steps, int cluster, const Multiply& multiply) {
  Turn turn;
  int last = 0;
  for (int i = 0; i < steps; ++i, turn.next(stages)) {
    mbarrier_wait(&ring.full[turn.stage], turn.parity);
    multiply(i, turn.stage);
    wgmma_wait<1>();
    if (i > 0) release(&ring.empty[last], cluster);
    last = turn.stage;
  }
  wgmma_wait<0>();
}

// Where 64 columns of the block's first filter go, and how many of them there are.
struct Chunk {
  float* to;
  int columns;
};

// Stores the sums of a 64 x kN product whose chunks of columns are chunk_at(0), .. and whose rows are filters, `pitch`
// floats apart, of which the result has `filters` more.
template <int kN, class ChunkAt>
__device__ void store(const float (&sum)[kN / 2], int filters, int64_t pitch, const ChunkAt& chunk_at) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % 32;
  CNNOPS_UNROLL
  for (int i = 0; i < kN / kChunk; ++i) {
    const Chunk chunk = chunk_at(i);
    CNNOPS_UNROLL
    for (int j = 0; j < kChunk / 2; j += 2) {
      const int row = thread / 32 * 16 + lane / 4 + j % 4 / 2 * 8, column = j / 4 * 8 + lane % 4 * 2;
      const float* const pair = sum + i * kChunk / 2 + j;
      if (row < filters && column < chunk.columns)
        *reinterpret_cast<float2*>(chunk.to + row * pitch + column) = make_float2(pair[0], pair[1]);
    }
  }
}

__device__ int least(int a, int b) { return a < b ? a : b; }

// A descriptor of the tile `bytes` further on. Addresses in shared memory stay below 2^18, so nothing is carried over.
__device__ uint64_t advanced(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

// Which tile of the result a block owns, and which slab of it. Blocks in flight together are of the same slab, if they
// can be, and so share their pixels in L2.
struct Place {
  int inner, outer, slab;
};

__device__ Place place_of(int inner, int outer) {
  const int block = static_cast<int>(blockIdx.x);
  return {block % inner, block / inner % outer, block / inner / outer};
}

constexpr int kTapsThreads = (kTaps + 1) * kWarpgroup;
// Of the 128 registers that each of so many threads is born with, the producer's warpgroup leaves to the others what it
// does not need: 128 * 40 + 384 * 152 <= 65536.
constexpr int kTapsProducerRegisters = 40, kTapsConsumerRegisters = 152;

struct Corner {
  int n, p, q;
};

struct TapsMaps {
  TensorMap dy, x[kTaps];
};

template <class T>
__global__ void __launch_bounds__(kTapsThreads, 1)
    conv2d_backward_weight_taps_kernel(const __grid_constant__ TapsMaps maps, Conv2dProblem p, TapsBox box, int stages,
                                       int cluster, int boxes_per_slab, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  CNNOPS_SHARED(Barriers, ring);
  const int channels = p.C / p.groups;
  const Place place = place_of(chunks(p.K), chunks(channels));
  const int k = place.inner * kChunk, c = place.outer * kChunk;
  const TapsBoxes boxes(p, box);
  const int first = place.slab * boxes_per_slab;
  const int steps = least(boxes.count() - first, boxes_per_slab);
  const auto corner_of = [&](int step) -> Corner {
    const int i = first + step, row = i / boxes.columns;
    return {row / boxes.rows * box.images, row % boxes.rows * box.rows, i % boxes.columns * kGroupPixels};
  };
  if (threadIdx.x == kTaps * kWarpgroup) {
    prefetch_tensor_map(&maps.dy);
    for (const TensorMap& map : maps.x) prefetch_tensor_map(&map);
  }
  start(ring, stages, kTaps * kWarpgroup / 32, cluster);
  const int warpgroup = warpgroup_index();

  if (warpgroup == kTaps) {
    decrease_registers<kTapsProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) {
      const int group = k / (p.K / p.groups), rank = static_cast<int>(cluster_rank());
      Turn turn;
      for (int step = 0; step < steps; ++step, turn.next(stages)) {
        const Corner at = corner_of(step);
        unsigned char* const dy = shared + turn.stage * box.bytes();
        uint64_t* const full = &ring.full[turn.stage];
        mbarrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
        mbarrier_expect(full, box.bytes());
        tma_load(dy, &maps.dy, full, {k, at.q, at.p, at.n});
        CNNOPS_UNROLL
        for (int s = 0; s < kTaps; ++s) {
          const int corner[] = {group * channels + c, at.q * p.stride_w - p.pad_w + s * p.dilation_w,
                                at.p * p.stride_h - p.pad_h, at.n};
          unsigned char* const x = dy + (box.dy_groups() + s * box.x_groups()) * kPatternBytes;
          if (cluster == 1)
            tma_load(x, &maps.x[s], full, corner);
          else if (s % cluster == rank)
            tma_multicast(x, &maps.x[s], full, corner, static_cast<uint16_t>((1 << cluster) - 1));
        }
      }
    }
    __syncwarp();
  } else {
    increase_registers<kTapsConsumerRegisters>();
    const int rows_apart = box.pairs_rows ? 2 : 1, images_apart = box.pairs_rows ? 1 : 2;
    const uint64_t dy = matrix_descriptor(shared, (box.pairs_rows ? 1 : box.rows) * kPatternBytes);
    const uint64_t x = matrix_descriptor(shared + (box.dy_groups() + warpgroup * p.dilation_h) * kPatternBytes,
                                         (box.pairs_rows ? p.stride_h : box.halo_rows) * kPatternBytes,
                                         box.x_groups() * kPatternBytes);
    float sum[kTapColumns / 2] = {};
    consume(ring, stages, steps, cluster, [&](int step, int stage) {
      const Corner at = corner_of(step);
      const int rows = least(p.P - at.p, box.rows), images = least(p.N - at.n, box.images);
      const int products = chunks(images, images_apart) * (rows / rows_apart);
      int image = 0, row = 0;
      const auto multiply = [&] {
        wgmma<T, kTapColumns, true, true>(
            sum, advanced(dy, stage * box.bytes() + (image * box.rows + row) * kPatternBytes),
            advanced(x, stage * box.bytes() + (image * box.halo_rows + row * p.stride_h) * kPatternBytes), true);
        row += rows_apart;
        if (row < rows) return;
        row = 0;
        image += images_apart;
      };
      const auto multiply_group = [&](int count) {
        wgmma_fence();
        CNNOPS_UNROLL
        for (int product = 0; product < count; ++product) multiply();
        wgmma_commit();
      };
      // A group whose length the compiler knows is issued in one go: that of a box of 14, 12 or 8 rows. Else each
      // product is a group.
      switch (products) {
        case 7:
          multiply_group(7);
          break;
        case 6:
          multiply_group(6);
          break;
        case 4:
          multiply_group(4);
          break;
        default:
          CNNOPS_NO_UNROLL
          for (int product = 0; product < products; ++product) multiply_group(1);
      }
    });

    const int64_t filter_size = int64_t{kTaps * kTaps} * channels;
    float* const out = slabs + (int64_t{place.slab} * p.K + k) * filter_size + c;
    store<kTapColumns>(sum, p.K - k, filter_size,
                       [&](int s) -> Chunk { return {out + int64_t{warpgroup * kTaps + s} * channels, channels - c}; });
  }
  // A block's shared memory is there until the last arrival from another.
  if (cluster > 1) cluster_sync();
}

constexpr int kColumnThreads = kColumnWarpgroups * kWarpgroup + 32;

// How the warpgroups, each of 64 filters x kN columns, share a block's tile: one above the other, or side by side.
template <int kN>
struct ColumnsTile {
  int filter_chunks;  // 2 or 1

  __host__ __device__ int column_chunks() const { return kN / kChunk * kColumnWarpgroups / filter_chunks; }
  __host__ __device__ int bytes() const { return (filter_chunks + column_chunks()) * kColumnChunkBytes; }
};

struct ColumnsMaps {
  TensorMap dy, x;
};

// What a chunk of columns is: its filter tap and its first channel of the group.
struct TapChannels {
  int r, s, c;
};

__device__ TapChannels tap_channels(const Conv2dProblem& p, int chunk) {
  const int each = chunks(p.C / p.groups), tap = chunk / each;
  return {tap / p.S, tap % p.S, chunk % each * kChunk};
}

template <class T, int kN>
__global__ void __launch_bounds__(kColumnThreads, 1)
    conv2d_backward_weight_columns_kernel(const __grid_constant__ ColumnsMaps maps, Conv2dProblem p,
                                          ColumnsTile<kN> tile, int stages, int steps_per_slab, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  CNNOPS_SHARED(Barriers, ring);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int all_chunks = column_chunks(p), row_tiles = chunks(filters, tile.filter_chunks * kChunk);
  const Place at = place_of(chunks(all_chunks, tile.column_chunks()), row_tiles * p.groups);
  const int group = at.outer / row_tiles, k = at.outer % row_tiles * tile.filter_chunks * kChunk;  // k of the group
  const int chunk = at.inner * tile.column_chunks();
  const int first = at.slab * steps_per_slab;
  const int steps = least(chunks(p.N * p.P * p.Q, kColumnPixels) - first, steps_per_slab);
  if (threadIdx.x == kColumnWarpgroups * kWarpgroup) {
    prefetch_tensor_map(&maps.dy);
    prefetch_tensor_map(&maps.x);
  }
  start(ring, stages, kColumnWarpgroups * kWarpgroup / 32, 1);
  const int warpgroup = warpgroup_index();

  if (warpgroup == kColumnWarpgroups) {
    if (threadIdx.x % 32 > 0) return;
    // Chunks beyond the result are not loaded: what their columns sum up is not stored.
    const int dy_chunks = least(tile.filter_chunks, chunks(filters - k));
    const int x_chunks = least(tile.column_chunks(), all_chunks - chunk);
    TapChannels columns[kMostColumnChunks];
    CNNOPS_UNROLL
    for (int i = 0; i < kMostColumnChunks; ++i) columns[i] = tap_channels(p, chunk + i);
    Turn turn;
    for (int step = 0; step < steps; ++step, turn.next(stages)) {
      const int pixel = (first + step) * kColumnPixels, row = pixel / p.Q;
      const int w = pixel % p.Q * p.stride_w - p.pad_w, h = row % p.P * p.stride_h - p.pad_h, n = row / p.P;
      unsigned char* to = shared + turn.stage * tile.bytes();
      uint64_t* const full = &ring.full[turn.stage];
      mbarrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
      mbarrier_expect(full, (dy_chunks + x_chunks) * kColumnChunkBytes);
      for (int i = 0; i < dy_chunks; ++i)
        tma_load(to + i * kColumnChunkBytes, &maps.dy, full, {group * filters + k + i * kChunk, pixel});
      to += tile.filter_chunks * kColumnChunkBytes;
      CNNOPS_UNROLL
      for (int i = 0; i < kMostColumnChunks; ++i)
        if (i < x_chunks)
          tma_load_im2col(to + i * kColumnChunkBytes, &maps.x, full, group * channels + columns[i].c, w, h, n,
                          static_cast<uint16_t>(columns[i].s * p.dilation_w),
                          static_cast<uint16_t>(columns[i].r * p.dilation_h));
    }
    return;
  }

  const int my_row = tile.filter_chunks > 1 ? warpgroup : 0;
  const int my_chunk = tile.filter_chunks > 1 ? 0 : warpgroup * (kN / kChunk);
  const uint64_t dy = matrix_descriptor(shared + my_row * kColumnChunkBytes, kPatternBytes);
  const uint64_t x =
      matrix_descriptor(shared + (tile.filter_chunks + my_chunk) * kColumnChunkBytes, kPatternBytes, kColumnChunkBytes);
  float sum[kN / 2] = {};
  consume(ring, stages, steps, 1, [&](int, int stage) {
    wgmma_fence();
    CNNOPS_UNROLL
    for (int pixel = 0; pixel < kColumnPixels; pixel += 2 * kGroupPixels) {
      const int at_pixel = stage * tile.bytes() + pixel / kGroupPixels * kPatternBytes;
      wgmma<T, kN, true, true>(sum, advanced(dy, at_pixel), advanced(x, at_pixel), true);
    }
    wgmma_commit();
  });

  const int64_t filter_size = int64_t{p.R} * p.S * channels;
  const int my_k = k + my_row * kChunk;
  float* const out = slabs + (int64_t{at.slab} * p.K + group * filters + my_k) * filter_size;
  store<kN>(sum, filters - my_k, filter_size, [&](int i) -> Chunk {
    const TapChannels at_chunk = tap_channels(p, chunk + my_chunk + i);
    if (at_chunk.r >= p.R) return {out, 0};
    return {out + int64_t{at_chunk.r * p.S + at_chunk.s} * channels + at_chunk.c, channels - at_chunk.c};
  });
}

template <class T>
void launch_taps(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, float* slabs,
                 Stream stream) {
  const TapsBox box = *taps_box(p, device());
  TapsMaps maps{cached_tensor_map(taps_dy(p, box), dy), {}};
  for (int s = 0; s < kTaps; ++s) maps.x[s] = cached_tensor_map(taps_x(p, box, s), x);
  const auto boxes_per_slab = static_cast<int>(ceil_div(TapsBoxes(p, box).count(), plan.splits));
  CNNOPS_LAUNCH_CLUSTERS(conv2d_backward_weight_taps_kernel<T>, blocks(taps_tiles(p) * plan.splits), kTapsThreads,
                         plan.cluster, plan.stages * box.bytes(), stream, maps, p, box, plan.stages, plan.cluster,
                         boxes_per_slab, slabs);
}

template <class T, int kN>
void launch_columns(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, float* slabs,
                    Stream stream) {
  const ColumnsTile<kN> tile{plan.block_m / kChunk};
  const ColumnsMaps maps{cached_tensor_map(columns_dy(p), dy), cached_tensor_map(columns_x(p), x)};
  const int64_t tiles = columns_tiles(p, plan.block_m, plan.block_n);
  const auto steps_per_slab = static_cast<int>(ceil_div(columns_steps(p), plan.splits));
  CNNOPS_LAUNCH((conv2d_backward_weight_columns_kernel<T, kN>), blocks(tiles * plan.splits), kColumnThreads,
                plan.stages * tile.bytes(), stream, maps, p, tile, plan.stages, steps_per_slab, slabs);
}

template <class T>
void launch_backward_weight(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, float* slabs,
                            Stream stream) {
  if (keeps_all_taps(plan)) return launch_taps<T>(p, plan, dy, x, slabs, stream);
  if (plan.block_m > kChunk && plan.block_n > 2 * kChunk) return launch_columns<T, 256>(p, plan, dy, x, slabs, stream);
  launch_columns<T, 128>(p, plan, dy, x, slabs, stream);
}

}  // namespace

int64_t conv2d_backward_weight_workspace_sm90(const Conv2dProblem& p, const Conv2dPlan& plan) {
  return plan.splits * slab_size(p) * int64_t{sizeof(float)};
}

void conv2d_backward_weight_sm90(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x,
                                 void* dweight, void* workspace, Stream stream) {
  auto* const slabs = static_cast<float*>(workspace);
  if (p.dtype == DType::kHalf)
    launch_backward_weight<Half>(p, plan, dy, x, slabs, stream);
  else
    launch_backward_weight<BFloat16>(p, plan, dy, x, slabs, stream);
  add_slabs(p.dtype, plan.splits, slab_size(p), slabs, dweight, stream);
}

}  // namespace cnnops::cuda
