// backward_weight on Hopper, as a GEMM whose operands TMA fetches and warpgroups multiply:
//
//   dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//
// Layout     x [N,H,W,C], dy [N,P,Q,K], dweight [K,R,S,C/groups], of 16-bit numbers. In shared memory a row is a
// pixel's
//            64 filters or 64 channels, 128 bytes, swizzled by TMA; both operands are MN-major, pixels being the sum.
// Ownership  A block owns a tile of filters x (taps, channels) and one slab of the pixels. Slabs are floats, which
//            add_slabs adds in order: every schedule gives the same bits.
// Pipeline   One thread of the last warp loads into a ring of stages, warpgroups multiply. A stage's `full` barrier
//            counts TMA's bytes, `empty` the consumers' warps, each after its products have been waited for.
//
// There are two kernels.
//
// halo, for 3x3: a block owns all taps of 64 filters x 64 channels, one filter row to each of three warpgroups of
// 64 x 192. A stage is a box of dy, 8 columns wide, and for each column tap s the box of x that lies under it, so that
// x [images][halo rows][8 columns][64 channels] is stored three times. A tap (r, s) then starts at a multiple of 8
// pixels, 1024 bytes, where the swizzle's pattern begins; taps that share one copy would start inside the pattern,
// which needs the descriptor's base offset. Through L2 go per 64 x 64 channels: dy once and x 3 * halo rows / rows
// times, 3.4 for 14 rows, 4.4 reads in all against the 18 of nine separate products: 64->64@56 of batch 256, 0.46 GB
// against 1.85.
//   A product's 16 pixels are two groups of 8: rows p and p + 1 of an image where P is even, else the same row of two
// images. Products that are not in the sum are not made, or have zeros on both sides, for 0 * NaN is NaN: rows beyond P
// are not multiplied, images beyond N are zeros in dy and x, and so are columns beyond Q, since each copy of x has a
// tensor map of its own that ends where the last column of dy reads.
//
// columns, for any filter: a block owns 128 or 64 filters x columns, a column being a tap and a channel, in chunks of
// 64 channels. Pixels are linear: dy a matrix, x loaded by TMA's im2col mode, so that only those beyond the last image
// are padding, zeros in both. Each 64 pixels are read once for each chunk.

#include <algorithm>

#include "conv2d_sm90.h"
#include "dtype.h"
#include "ptx_sm90.cuh"

namespace cnnops::cuda {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kChunk = 64;       // filters or channels of a row in shared memory
constexpr int kGroupPixels = 8;  // rows of the swizzle's pattern
constexpr int kGroupBytes = kGroupPixels * kChunk * 2;
constexpr int kMostStages = 6;
constexpr int kBarrierBytes = 1024;  // of static shared memory, its end rounded up

// n / by rounded up, in the 32 bits that pixels, filters and columns fit (see the plan).
__host__ __device__ constexpr int chunks(int n, int by = kChunk) { return (n - 1) / by + 1; }

struct Ring {
  uint64_t full[kMostStages], empty[kMostStages];
};

// Where a thread is in the ring.
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
__device__ void start(Ring& ring, int stages, int consumer_warps, int cluster) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(&ring.full[stage], 1);
      mbarrier_init(&ring.empty[stage], consumer_warps * cluster);
    }
    fence_mbarrier_init();
  }
  meet(cluster);
}

// This warp has read a stage: tells each block that fills it.
__device__ void release(uint64_t* empty, int cluster) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane >= cluster) return;
  if (cluster > 1)
    mbarrier_arrive_remote(empty, lane);
  else
    mbarrier_arrive(empty);
}

// Calls multiply(i, stage) for i in [0, steps), which commits at least one group of wgmma. A stage is given back when
// the products of the next one have been issued, so that the tensor cores do not idle between stages.
template <class Multiply>
__device__ void consume(Ring& ring, int stages, int steps, int cluster, const Multiply& multiply) {
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

// Two sums side by side, written at once.
struct alignas(8) Pair {
  float low, high;
};

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
        *reinterpret_cast<Pair*>(chunk.to + row * pitch + column) = {pair[0], pair[1]};
    }
  }
}

__device__ int least(int a, int b) { return a < b ? a : b; }
__device__ int warpgroup() { return static_cast<int>(threadIdx.x) / kWarpgroup; }

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

constexpr int kHaloTaps = 3;                      // along each axis
constexpr int kHaloColumns = kHaloTaps * kChunk;  // of a warpgroup's product
constexpr int kHaloProducts = 7;                  // of a whole box, at best
constexpr int kHaloThreads = (kHaloTaps + 1) * kWarpgroup;
// Of the 128 registers that each of so many threads is born with, the producer's warpgroup leaves to the others what it
// does not need: 128 * 40 + 384 * 152 <= 65536.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 152;

// What a stage holds.
struct HaloTile {
  int images, rows;  // of dy, in 8 columns
  int halo_rows;     // of x, for each image
  bool pairs_rows;   // a product's two groups of pixels are two rows, else two images

  __host__ __device__ int dy_groups() const { return images * rows; }
  __host__ __device__ int x_groups() const { return images * halo_rows; }  // of one copy
  __host__ __device__ int bytes() const { return (dy_groups() + kHaloTaps * x_groups()) * kGroupBytes; }
};

// The pixels of dy cut into boxes of a stage each, columns going fastest.
struct HaloBoxes {
  int columns, rows, images;

  __host__ __device__ HaloBoxes(const Conv2dProblem& p, const HaloTile& tile)
      : columns(chunks(p.Q, kGroupPixels)), rows(chunks(p.P, tile.rows)), images(chunks(p.N, tile.images)) {}
  __host__ __device__ int count() const { return columns * rows * images; }
};

struct Corner {
  int n, p, q;
};

struct HaloMaps {
  TensorMap dy, x[kHaloTaps];
};

template <class T>
__global__ void __launch_bounds__(kHaloThreads, 1)
    conv2d_backward_weight_halo_kernel(const __grid_constant__ HaloMaps maps, Conv2dProblem p, HaloTile tile,
                                       int stages, int cluster, int boxes_per_slab, float* slabs) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  CNNOPS_SHARED(Ring, ring);
  const int channels = p.C / p.groups;
  const Place at = place_of(chunks(p.K), chunks(channels));
  const int k = at.inner * kChunk, c = at.outer * kChunk;
  const HaloBoxes boxes(p, tile);
  const int first = at.slab * boxes_per_slab;
  const int steps = least(boxes.count() - first, boxes_per_slab);
  const auto corner_of = [&](int step) -> Corner {
    const int box = first + step, row = box / boxes.columns;
    return {row / boxes.rows * tile.images, row % boxes.rows * tile.rows, box % boxes.columns * kGroupPixels};
  };
  start(ring, stages, kHaloTaps * kWarpgroup / 32, cluster);

  if (warpgroup() == kHaloTaps) {
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) {
      const int group = k / (p.K / p.groups), rank = static_cast<int>(cluster_rank());
      Turn turn;
      for (int step = 0; step < steps; ++step, turn.next(stages)) {
        const Corner at_box = corner_of(step);
        unsigned char* const dy = shared + turn.stage * tile.bytes();
        uint64_t* const full = &ring.full[turn.stage];
        mbarrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
        mbarrier_expect(full, tile.bytes());
        tma_load(dy, &maps.dy, full, {k, at_box.q, at_box.p, at_box.n});
        CNNOPS_UNROLL
        for (int s = 0; s < kHaloTaps; ++s) {
          const int corner[] = {group * channels + c, at_box.q * p.stride_w - p.pad_w + s * p.dilation_w,
                                at_box.p * p.stride_h - p.pad_h, at_box.n};
          unsigned char* const x = dy + (tile.dy_groups() + s * tile.x_groups()) * kGroupBytes;
          if (cluster == 1)
            tma_load(x, &maps.x[s], full, corner);
          else if (s % cluster == rank)
            tma_multicast(x, &maps.x[s], full, corner, static_cast<uint16_t>((1 << cluster) - 1));
        }
      }
    }
    __syncwarp();
  } else {
    increase_registers<kConsumerRegisters>();
    const int r = warpgroup();
    const int rows_apart = tile.pairs_rows ? 2 : 1, images_apart = tile.pairs_rows ? 1 : 2;
    const uint64_t dy = matrix_descriptor(shared, (tile.pairs_rows ? 1 : tile.rows) * kGroupBytes);
    const uint64_t x =
        matrix_descriptor(shared + (tile.dy_groups() + r * p.dilation_h) * kGroupBytes,
                          (tile.pairs_rows ? p.stride_h : tile.halo_rows) * kGroupBytes, tile.x_groups() * kGroupBytes);
    float sum[kHaloColumns / 2] = {};
    consume(ring, stages, steps, cluster, [&](int step, int stage) {
      const Corner at_box = corner_of(step);
      const int rows = least(p.P - at_box.p, tile.rows), images = least(p.N - at_box.n, tile.images);
      const int products = chunks(images, images_apart) * (rows / rows_apart);
      int image = 0, row = 0;
      const auto multiply = [&] {
        wgmma<T, kHaloColumns, true, true>(
            sum, advanced(dy, stage * tile.bytes() + (image * tile.rows + row) * kGroupBytes),
            advanced(x, stage * tile.bytes() + (image * tile.halo_rows + row * p.stride_h) * kGroupBytes), true);
        row += rows_apart;
        if (row < rows) return;
        row = 0;
        image += images_apart;
      };
      // In a group of a length that the compiler knows, products follow each other without a word; else each is a
      // group.
      if (products == kHaloProducts) {
        wgmma_fence();
        CNNOPS_UNROLL
        for (int product = 0; product < kHaloProducts; ++product) multiply();
        wgmma_commit();
      } else {
        CNNOPS_NO_UNROLL
        for (int product = 0; product < products; ++product) {
          wgmma_fence();
          multiply();
          wgmma_commit();
        }
      }
    });

    const int64_t filter_size = int64_t{kHaloTaps * kHaloTaps} * channels;
    float* const out = slabs + (int64_t{at.slab} * p.K + k) * filter_size + c;
    store<kHaloColumns>(sum, p.K - k, filter_size,
                        [&](int s) -> Chunk { return {out + int64_t{r * kHaloTaps + s} * channels, channels - c}; });
  }
  // A block's shared memory is there until the last arrival from another.
  if (cluster > 1) cluster_sync();
}

constexpr int kColumnPixels = 64;  // of a stage
constexpr int kColumnChunkBytes = kColumnPixels * kChunk * 2;
constexpr int kColumnWarpgroups = 2;
constexpr int kColumnThreads = kColumnWarpgroups * kWarpgroup + 32;

constexpr int kMostColumnChunks = 4;  // of a block

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

// Chunks of 64 columns in a filter: a tap's channels do not share one with the next tap's.
__host__ __device__ constexpr int column_chunks(const Conv2dProblem& p) { return p.R * p.S * chunks(p.C / p.groups); }

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
  CNNOPS_SHARED(Ring, ring);
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  const int all_chunks = column_chunks(p), row_tiles = chunks(filters, tile.filter_chunks * kChunk);
  const Place at = place_of(chunks(all_chunks, tile.column_chunks()), row_tiles * p.groups);
  const int group = at.outer / row_tiles, k = at.outer % row_tiles * tile.filter_chunks * kChunk;  // k of the group
  const int chunk = at.inner * tile.column_chunks();
  const int first = at.slab * steps_per_slab;
  const int steps = least(chunks(p.N * p.P * p.Q, kColumnPixels) - first, steps_per_slab);
  start(ring, stages, kColumnWarpgroups * kWarpgroup / 32, 1);

  if (warpgroup() == kColumnWarpgroups) {
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

  const int my_row = tile.filter_chunks > 1 ? warpgroup() : 0;
  const int my_chunk = tile.filter_chunks > 1 ? 0 : warpgroup() * (kN / kChunk);
  const uint64_t dy = matrix_descriptor(shared + my_row * kColumnChunkBytes, kGroupBytes);
  const uint64_t x =
      matrix_descriptor(shared + (tile.filter_chunks + my_chunk) * kColumnChunkBytes, kGroupBytes, kColumnChunkBytes);
  float sum[kN / 2] = {};
  consume(ring, stages, steps, 1, [&](int, int stage) {
    wgmma_fence();
    CNNOPS_UNROLL
    for (int pixel = 0; pixel < kColumnPixels; pixel += 2 * kGroupPixels) {
      const int at_pixel = stage * tile.bytes() + pixel / kGroupPixels * kGroupBytes;
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

// A box of an NHWC tensor, 64 channels deep, of every `stride_w`-th column.
TiledTensor boxes_of(DType dtype, int64_t C, int64_t columns, int64_t W, int64_t H, int64_t N, int rows, int images,
                     int stride_w) {
  return {dtype,
          4,
          {C, columns, H, N},
          {1, C, C * W, C * W * H},
          {kChunk, kGroupPixels, rows, images},
          {1, stride_w, 1, 1}};
}

TiledTensor halo_dy(const Conv2dProblem& p, const HaloTile& tile) {
  return boxes_of(p.dtype, p.K, p.Q, p.Q, p.P, p.N, tile.rows, tile.images, 1);
}

// Ends with the column that dy's last column reads by tap s.
TiledTensor halo_x(const Conv2dProblem& p, const HaloTile& tile, int s) {
  const int64_t last = int64_t{p.Q - 1} * p.stride_w - p.pad_w + int64_t{s} * p.dilation_w;
  return boxes_of(p.dtype, p.C, std::min<int64_t>(last + 1, p.W), p.W, p.H, p.N, tile.halo_rows, tile.images,
                  p.stride_w);
}

TiledTensor columns_dy(const Conv2dProblem& p) {
  return {p.dtype, 2, {p.K, int64_t{p.N} * p.P * p.Q}, {1, p.K}, {kChunk, kColumnPixels}, {1, 1}};
}

Im2colTensor columns_x(const Conv2dProblem& p) {
  return {.dtype = p.dtype,
          .C = p.C,
          .W = p.W,
          .H = p.H,
          .N = p.N,
          .pitch = p.C,
          .lower_w = -p.pad_w,
          .lower_h = -p.pad_h,
          .upper_w = p.pad_w - (p.S - 1) * p.dilation_w,
          .upper_h = p.pad_h - (p.R - 1) * p.dilation_h,
          .stride_w = p.stride_w,
          .stride_h = p.stride_h,
          .channels = kChunk,
          .pixels = kColumnPixels};
}

// How the pixels are cut: `count` slabs of `steps` stages.
struct Slabs {
  int64_t count, steps;
};

// Of all counts the one that ends first, in waves of blocks; a further slab costs what `overhead` steps do: filling the
// ring, and a tile of floats written and read.
Slabs cut(int64_t steps, int64_t tiles, int64_t overhead, const Device& device) {
  constexpr int64_t kMostWaves = 4;
  const int64_t most = std::min(steps, ceil_div(kMostWaves * device.multiprocessors, tiles));
  Slabs best{1, steps};
  int64_t least = INT64_MAX;
  for (int64_t count = 1; count <= most; ++count) {
    const int64_t each = ceil_div(steps, count);
    const int64_t cost = ceil_div(tiles * count, device.multiprocessors) * (each + overhead);
    if (cost < least) best = {ceil_div(steps, each), each}, least = cost;
  }
  return best;
}

// Steps that writing and reading a block's floats takes, by arithmetic: a block's share of 4 TB/s against its products.
constexpr int64_t kHaloOverhead = 8, kColumnsOverhead = 12;

int64_t ring_bytes(const Device& device) { return device.shared_bytes - kBarrierBytes; }
int stages_of(int bytes, const Device& device) {
  return static_cast<int>(std::min<int64_t>(ring_bytes(device) / bytes, kMostStages));
}

// The tallest box of which three fit, so that the least of x is loaded twice; of several images where maps are small.
std::optional<HaloTile> halo_tile(const Conv2dProblem& p, const Device& device) {
  constexpr int kLeastStages = 3, kMostGroups = 14;  // 14: seven products to a stage, 56 and 28 rows in whole boxes
  const bool pairs_rows = p.P % 2 == 0;
  const int step = pairs_rows ? 2 : 1, least_images = pairs_rows ? 1 : 2;
  for (int rows = std::min(p.P, kMostGroups); rows >= step; rows -= step) {
    // Boxes of the same number, as equal as they can be.
    const int64_t even = ceil_div(ceil_div(p.P, ceil_div(p.P, rows)), step) * step;
    const int64_t halo_rows = (even - 1) * p.stride_h + int64_t{kHaloTaps - 1} * p.dilation_h + 1;
    const int64_t wanted = std::max<int64_t>(kMostGroups / even, least_images);
    for (int64_t images = wanted - wanted % least_images; images > 0; images -= least_images)
      if (images * (even + kHaloTaps * halo_rows) * kGroupBytes * kLeastStages <= ring_bytes(device))
        return HaloTile{static_cast<int>(images), static_cast<int>(even), static_cast<int>(halo_rows), pairs_rows};
  }
  return std::nullopt;
}

std::optional<Conv2dPlan> plan_halo(const Conv2dProblem& p, const Device& device) {
  if (p.R != kHaloTaps || p.S != kHaloTaps) return std::nullopt;
  if (int64_t{p.Q - 1} * p.stride_w < p.pad_w) return std::nullopt;  // a tap would read nothing but padding
  const std::optional<HaloTile> tile = halo_tile(p, device);
  if (!tile || !fits(halo_dy(p, *tile))) return std::nullopt;
  for (int s = 0; s < kHaloTaps; ++s)
    if (!fits(halo_x(p, *tile, s))) return std::nullopt;
  const HaloBoxes boxes(p, *tile);
  const int64_t images = tile->pairs_rows ? p.N : ceil_div(p.N, 2) * 2;
  const bool wasteful = 4 * images * boxes.columns * kGroupPixels > 7 * int64_t{p.N} * p.Q;
  if (wasteful) return std::nullopt;
  const int64_t tiles = int64_t{chunks(p.K)} * chunks(p.C / p.groups);
  const bool pairs = chunks(p.K / p.groups) % 2 == 0;
  return Conv2dPlan{Conv2dKernel::kWgmma,
                    kChunk,
                    kHaloTaps * kHaloColumns,
                    stages_of(tile->bytes(), device),
                    pairs ? 2 : 1,
                    cut(boxes.count(), tiles, kHaloOverhead, device).count,
                    pairs ? "all taps from one read of dy and three of x, which two tiles of filters share"
                          : "all taps from one read of dy and three of x"};
}

bool is_halo(const Conv2dPlan& plan) { return plan.block_n == kHaloTaps * kHaloColumns; }

int columns_steps(const Conv2dProblem& p) { return chunks(p.N * p.P * p.Q, kColumnPixels); }

int64_t columns_tiles(const Conv2dProblem& p, int block_m, int block_n) {
  return int64_t{p.groups} * chunks(p.K / p.groups, block_m) * chunks(column_chunks(p), block_n / kChunk);
}

Conv2dPlan plan_columns(const Conv2dProblem& p, const Device& device) {
  const int filters = p.K / p.groups;
  const int block_m = filters > kChunk ? 2 * kChunk : kChunk;
  const int block_n = filters > kChunk && column_chunks(p) <= 2 ? 2 * kChunk : 4 * kChunk;
  const char* const reason = block_m == kChunk   ? "few filters: warpgroups side by side share them"
                             : block_n == kChunk ? "few columns"
                                                 : "the most products for each byte through L2";
  return {Conv2dKernel::kWgmma,
          block_m,
          block_n,
          stages_of((block_m + block_n) / kChunk * kColumnChunkBytes, device),
          1,
          cut(columns_steps(p), columns_tiles(p, block_m, block_n), kColumnsOverhead, device).count,
          reason};
}

template <class T>
void launch_halo(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, float* slabs,
                 Stream stream) {
  const HaloTile tile = *halo_tile(p, device());
  HaloMaps maps{tensor_map(halo_dy(p, tile), dy), {}};
  for (int s = 0; s < kHaloTaps; ++s) maps.x[s] = tensor_map(halo_x(p, tile, s), x);
  const int64_t tiles = int64_t{chunks(p.K)} * chunks(p.C / p.groups);
  const auto boxes_per_slab = static_cast<int>(ceil_div(HaloBoxes(p, tile).count(), plan.splits));
  CNNOPS_LAUNCH_CLUSTERS(conv2d_backward_weight_halo_kernel<T>, blocks(tiles * plan.splits), kHaloThreads, plan.cluster,
                         plan.stages * tile.bytes(), stream, maps, p, tile, plan.stages, plan.cluster, boxes_per_slab,
                         slabs);
}

template <class T, int kN>
void launch_columns(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, float* slabs,
                    Stream stream) {
  const ColumnsTile<kN> tile{plan.block_m / kChunk};
  const ColumnsMaps maps{tensor_map(columns_dy(p), dy), tensor_map(columns_x(p), x)};
  const int64_t tiles = columns_tiles(p, plan.block_m, plan.block_n);
  const auto steps_per_slab = static_cast<int>(ceil_div(columns_steps(p), plan.splits));
  CNNOPS_LAUNCH((conv2d_backward_weight_columns_kernel<T, kN>), blocks(tiles * plan.splits), kColumnThreads,
                plan.stages * tile.bytes(), stream, maps, p, tile, plan.stages, steps_per_slab, slabs);
}

template <class T>
void launch_backward_weight(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, float* slabs,
                            Stream stream) {
  if (is_halo(plan)) return launch_halo<T>(p, plan, dy, x, slabs, stream);
  if (plan.block_m > kChunk && plan.block_n > 2 * kChunk) return launch_columns<T, 256>(p, plan, dy, x, slabs, stream);
  launch_columns<T, 128>(p, plan, dy, x, slabs, stream);
}

int64_t slab_size(const Conv2dProblem& p) { return int64_t{p.K} * p.R * p.S * (p.C / p.groups); }

}  // namespace

std::optional<Conv2dPlan> plan_backward_weight_sm90(const Conv2dProblem& p, const Device& device) {
  constexpr int64_t kLeastShare = 8;
  const int64_t pixels = int64_t{p.N} * p.P * p.Q;
  const int channels = p.C / p.groups, filters = p.K / p.groups;
  if (device.architecture != 90 || (p.dtype != DType::kHalf && p.dtype != DType::kBFloat16)) return std::nullopt;
  if (p.pad_mode != PadMode::kZeros || p.C % 8 || p.K % 8) return std::nullopt;
  if (p.groups > 1 && (channels % kChunk || filters % kChunk)) return std::nullopt;
  if (pixels == 0 || pixels > INT32_MAX) return std::nullopt;
  // Below this share of a tile, mma.sync's smaller ones waste less.
  if (kLeastShare * channels * filters < kChunk * kChunk) return std::nullopt;
  if (const std::optional<Conv2dPlan> plan = plan_halo(p, device)) return plan;
  if (!fits(columns_dy(p)) || !fits(columns_x(p))) return std::nullopt;
  return plan_columns(p, device);
}

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
