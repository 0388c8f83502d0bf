// Hopper's faults. Two kernels multiply matrices and one convolves, of small whole numbers, so that every sum is exact;
// each fault is one line of theirs left out or wrong, chosen by a template argument.

#include <type_traits>
#include <vector>

#include "../cuda/ptx_sm90.cuh"
#include "selftest.h"

namespace cnnops::simt {
namespace {

using cuda::BFloat16;
using cuda::TensorMap;

constexpr int kTile = 64, kTileBytes = kTile * kTile * 2;  // 64 rows of 64 numbers: one swizzled tile

std::vector<BFloat16> numbers(size_t count, int modulus) {
  std::vector<BFloat16> out(count);
  for (size_t i = 0; i < count; ++i)
    cuda::from_float(static_cast<float>(static_cast<int>(i * 7 % static_cast<size_t>(modulus)) - modulus / 2), out[i]);
  return out;
}

float product(BFloat16 a, BFloat16 b) { return cuda::to_float(a) * cuda::to_float(b); }

// The row and the column of a 64-row tile that this thread holds as d[i].
int sum_row(int i) {
  const int t = static_cast<int>(threadIdx.x) % 128;
  return t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8;
}
int sum_column(int i) { return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

// ---- y[128][64] = a[128][256] * b[64][256]^T by a cluster of two blocks, 64 rows each: a ring of two slots, filled by
// one thread, b by halves for both blocks, emptied by a warpgroup.

enum class Ring {
  kSound,
  kMissingFullWait,
  kWrongParity,
  kMissingExpect,
  kMissingProductWait,
  kMissingProductFence,
  kMissingCommit,
  kEarlyRelease,
  kWrongStride,
  kWrongSwizzle,
  kMisalignedTile,
  kTooLittleShared,
  kMissingInit,
  kMissingInitFence,
  kMissingFirstSync,
  kMissingLastSync,
  kWrongMask,
  kMaskBeyondCluster,
  kMissingRelease,
  kExtraArrival,
  kArrivalBeyondCount,
  kDivergentWarpgroup,
  kWrongRegisterCount,
};

constexpr int kSteps = 4, kSlots = 2, kRingRows = 2 * kTile, kRingDepth = kSteps * kTile;
constexpr size_t kRingBytes = kSlots * 2 * kTileBytes + 2 * kSlots * sizeof(uint64_t);

template <Ring kFault>
void ring(const TensorMap& a_map, const TensorMap& b_map, float* y) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  auto* const full = reinterpret_cast<uint64_t*>(shared + kSlots * 2 * kTileBytes);
  uint64_t* const empty = full + kSlots;
  const auto tile = [&](int slot, int operand) { return shared + (slot * 2 + operand) * kTileBytes; };
  const int rank = static_cast<int>(cuda::cluster_rank());

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (kFault != Ring::kMissingInit) cuda::mbarrier_init(full + slot, 1);
      cuda::mbarrier_init(empty + slot, 2);  // both blocks' consumers: the slot of b is filled for both
    }
    if (kFault != Ring::kMissingInitFence) cuda::fence_mbarrier_init();
  }
  if (kFault == Ring::kMissingFirstSync)
    __syncthreads();
  else
    cuda::cluster_sync();

  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128)
      for (int step = 0; step < kSteps; ++step) {
        const int slot = step % kSlots, round = step / kSlots;
        cuda::mbarrier_wait(empty + slot, (round + 1) % 2);
        if (kFault == Ring::kMissingExpect)
          cuda::mbarrier_arrive(full + slot);
        else
          cuda::mbarrier_expect(full + slot, 2 * kTileBytes);
        if (kFault == Ring::kArrivalBeyondCount) cuda::mbarrier_arrive(full + slot);
        constexpr int kShift = kFault == Ring::kMisalignedTile ? 512 : 0;
        cuda::tma_load<2>(tile(slot, 0) + kShift, &a_map, full + slot, {step * kTile, rank * kTile});
        constexpr uint16_t kMask = kFault == Ring::kWrongMask ? 1 : kFault == Ring::kMaskBeyondCluster ? 7 : 3;
        cuda::tma_multicast<2>(tile(slot, 1) + rank * kTileBytes / 2, &b_map, full + slot,
                               {step * kTile, rank * kTile / 2}, kMask);
      }
  } else {
    cuda::increase_registers<kFault == Ring::kWrongRegisterCount ? 100 : 96>();
    float d[kTile / 2];
    for (int step = 0; step < kSteps; ++step) {
      const int slot = step % kSlots, round = step / kSlots;
      const auto release_slot = [&] {
        if (kFault == Ring::kMissingRelease) return;
        if (threadIdx.x < 2) cuda::mbarrier_arrive_remote(empty + slot, threadIdx.x);
        if (kFault == Ring::kExtraArrival && threadIdx.x < 2) cuda::mbarrier_arrive_remote(empty + slot, threadIdx.x);
      };
      if (kFault != Ring::kMissingFullWait)
        cuda::mbarrier_wait(full + slot, (round + (kFault == Ring::kWrongParity ? 1 : 0)) % 2);
      if (kFault != Ring::kMissingProductFence) cuda::wgmma_fence();
      constexpr uint32_t kStride = kFault == Ring::kWrongStride ? 512 : 1024;
      uint64_t a = cuda::matrix_descriptor(tile(slot, 0), kStride), b = cuda::matrix_descriptor(tile(slot, 1), 1024);
      if (kFault == Ring::kWrongSwizzle) a ^= uint64_t{3} << 62;
      for (int k = 0; k < kTile / 16; ++k)
        cuda::wgmma<BFloat16, kTile, false, false>(d, a + static_cast<uint64_t>(k * 2),
                                                   b + static_cast<uint64_t>(k * 2), step || k);
      if (kFault == Ring::kEarlyRelease) release_slot();
      const bool skips = kFault == Ring::kMissingCommit || (kFault == Ring::kDivergentWarpgroup && threadIdx.x >= 96);
      if (!skips) cuda::wgmma_commit();
      if (kFault != Ring::kMissingProductWait) cuda::wgmma_wait<0>();
      if (kFault != Ring::kEarlyRelease) release_slot();
    }
    for (int i = 0; i < kTile / 2; ++i) y[(rank * kTile + sum_row(i)) * kTile + sum_column(i)] = d[i];
  }
  if (kFault != Ring::kMissingLastSync) cuda::cluster_sync();
}

template <Ring kFault>
bool run_ring(const char* name) {
  const auto a = numbers(kRingRows * kRingDepth, 13), b = numbers(kTile * kRingDepth, 11);
  const auto map = [](const std::vector<BFloat16>& matrix, int rows, int box) {
    return cuda::tensor_map(
        cuda::TiledTensor{DType::kBFloat16, 2, {kRingDepth, rows}, {1, kRingDepth}, {kTile, box}, {1, 1}},
        matrix.data());
  };
  const TensorMap a_map = map(a, kRingRows, kTile), b_map = map(b, kTile, kTile / 2);
  std::vector<float> y(kRingRows * kTile, -1);
  // Too little by a slot and more: the barriers fit, the second slot's tiles do not.
  const size_t bytes = kFault == Ring::kTooLittleShared ? kRingBytes - 64 : kRingBytes;
  launch(
      name, dim3(2), dim3(160), bytes, [&, out = y.data()]() CNNOPS_UNTRACED { ring<kFault>(a_map, b_map, out); }, 2);
  for (int m = 0; m < kRingRows; ++m)
    for (int n = 0; n < kTile; ++n) {
      float sum = 0;
      for (int k = 0; k < kRingDepth; ++k)
        sum += product(a[static_cast<size_t>(m * kRingDepth + k)], b[static_cast<size_t>(n * kRingDepth + k)]);
      if (!(y[static_cast<size_t>(m * kTile + n)] == sum)) return false;
    }
  return true;
}

// ---- y[64][128] = a[64][64]^T * b[64][128], both as TMA finds them: along m and along n.

enum class Transposed { kSound, kSwappedStrides, kWrongMajor, kBeyondShared };

template <Transposed kFault>
void transposed(const TensorMap& a_map, const TensorMap& b_map, float* y) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const b_tile = shared + kTileBytes;
  auto* const full = reinterpret_cast<uint64_t*>(shared + 3 * kTileBytes);
  if (threadIdx.x == 0) {
    cuda::mbarrier_init(full, 1);
    cuda::fence_mbarrier_init();
    cuda::mbarrier_expect(full, 3 * kTileBytes);
    cuda::tma_load<2>(shared, &a_map, full, {0, 0});
    for (int half = 0; half < 2; ++half) cuda::tma_load<2>(b_tile + half * kTileBytes, &b_map, full, {half * kTile, 0});
  }
  __syncthreads();
  cuda::mbarrier_wait(full, 0);
  float d[kTile];
  cuda::wgmma_fence();
  for (int k = 0; k < kTile / 16; ++k) {
    constexpr bool kSwapped = kFault == Transposed::kSwappedStrides;
    constexpr uint32_t kLeading = kFault == Transposed::kBeyondShared ? 4 * kTileBytes : kTileBytes;
    const uint64_t b =
        cuda::matrix_descriptor(b_tile + k * 2048, kSwapped ? kLeading : 1024, kSwapped ? 1024 : kLeading);
    cuda::wgmma<BFloat16, 2 * kTile, kFault != Transposed::kWrongMajor, true>(
        d, cuda::matrix_descriptor(shared + k * 2048, 1024, kTileBytes), b, k > 0);
  }
  cuda::wgmma_commit();
  cuda::wgmma_wait<0>();
  for (int i = 0; i < kTile; ++i) y[sum_row(i) * 2 * kTile + sum_column(i)] = d[i];
}

template <Transposed kFault>
bool run_transposed(const char* name) {
  const auto a = numbers(kTile * kTile, 13), b = numbers(kTile * 2 * kTile, 11);
  const auto map = [](const std::vector<BFloat16>& matrix, int columns) {
    return cuda::tensor_map(
        cuda::TiledTensor{DType::kBFloat16, 2, {columns, kTile}, {1, columns}, {kTile, kTile}, {1, 1}}, matrix.data());
  };
  const TensorMap a_map = map(a, kTile), b_map = map(b, 2 * kTile);
  std::vector<float> y(kTile * 2 * kTile, -1);
  launch(name, dim3(1), dim3(128), 3 * kTileBytes + sizeof(uint64_t),
         [&] { transposed<kFault>(a_map, b_map, y.data()); });
  for (int m = 0; m < kTile; ++m)
    for (int n = 0; n < 2 * kTile; ++n) {
      float sum = 0;
      for (int k = 0; k < kTile; ++k)
        sum += product(a[static_cast<size_t>(k * kTile + m)], b[static_cast<size_t>(k * 2 * kTile + n)]);
      if (!(y[static_cast<size_t>(m * 2 * kTile + n)] == sum)) return false;
    }
  return true;
}

// ---- y[64][64] = a[64][64] * b[64][64]^T with a in registers and b written to its tile by the threads themselves.

enum class Registers { kSound, kMissingProxyFence, kMissingBarrier, kSwappedFragment };

template <Registers kFault>
void registers(const BFloat16* a, const BFloat16* b, float* y) {
  CNNOPS_DYNAMIC_SHARED(BFloat16, tile);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += 128) {
    const int row = i / kTile, place = row * kTile + ((i % kTile / 8) ^ row % 8) * 8 + i % 8;
    tile[place] = b[i];
    ordinary_shared_write(tile + place, sizeof(BFloat16));
  }
  if (kFault != Registers::kMissingProxyFence) cuda::fence_proxy_async();
  if (kFault != Registers::kMissingBarrier) cuda::barrier_sync(1, 128);

  const int t = static_cast<int>(threadIdx.x), row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  float d[kTile / 2];
  cuda::wgmma_fence();
  for (int k = 0; k < kTile / 16; ++k) {
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) {
      const int word = kFault == Registers::kSwappedFragment ? i / 2 + i % 2 * 2 : i;
      const BFloat16* const pair = a + (row + word % 2 * 8) * kTile + k * 16 + column + word / 2 * 8;
      fragment[i] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
    }
    cuda::wgmma<BFloat16, kTile, false>(d, fragment, cuda::matrix_descriptor(tile, 1024) + static_cast<uint64_t>(k * 2),
                                        k > 0);
  }
  cuda::wgmma_commit();
  cuda::wgmma_wait<0>();
  for (int i = 0; i < kTile / 2; ++i) y[sum_row(i) * kTile + sum_column(i)] = d[i];
}

template <Registers kFault>
bool run_registers(const char* name) {
  const auto a = numbers(kTile * kTile, 13), b = numbers(kTile * kTile, 11);
  std::vector<float> y(kTile * kTile, -1);
  launch(name, dim3(1), dim3(128), kTileBytes, [&] { registers<kFault>(a.data(), b.data(), y.data()); });
  for (int m = 0; m < kTile; ++m)
    for (int n = 0; n < kTile; ++n) {
      float sum = 0;
      for (int k = 0; k < kTile; ++k)
        sum += product(a[static_cast<size_t>(m * kTile + k)], b[static_cast<size_t>(n * kTile + k)]);
      if (!(y[static_cast<size_t>(m * kTile + n)] == sum)) return false;
    }
  return true;
}

// ---- A 3x3 convolution of stride 2 and padding 1, images of 9 x 7 pixels with 40 channels (of a tile's 64): a column
// of 64 output pixels, tap by tap, by im2col mode, and the filter's taps by boxes that skip all but one.

enum class Conv { kSound, kHaloOffByOne, kUpperOffByOne, kWrongTap, kBasePixelOutside, kMissingStride };

constexpr int kImages = 3, kH = 9, kW = 7, kC = 40, kP = 5, kQ = 4, kPixels = kImages * kP * kQ, kTaps = 9;

template <Conv kFault>
void conv(const TensorMap& x_map, const TensorMap& weight_map, float* y) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  auto* const full = reinterpret_cast<uint64_t*>(shared + 2 * kTileBytes);
  if (threadIdx.x == 0) {
    cuda::mbarrier_init(full, 1);
    cuda::fence_mbarrier_init();
  }
  __syncthreads();
  float d[kTile / 2];
  for (int tap = 0; tap < kTaps; ++tap) {
    if (threadIdx.x == 0) {
      cuda::mbarrier_expect(full, 2 * kTileBytes);
      const int base = kFault == Conv::kBasePixelOutside ? -2 : kFault == Conv::kHaloOffByOne ? 0 : -1;
      const int r = tap / 3, s = kFault == Conv::kWrongTap ? tap / 3 : tap % 3;
      cuda::tma_load_im2col(shared, &x_map, full, 0, base, -1, 0, static_cast<uint16_t>(s), static_cast<uint16_t>(r));
      cuda::tma_load<3>(shared + kTileBytes, &weight_map, full, {0, tap, 0});
    }
    cuda::mbarrier_wait(full, static_cast<uint32_t>(tap % 2));
    cuda::wgmma_fence();
    for (int k = 0; k < kTile / 16; ++k)
      cuda::wgmma<BFloat16, kTile, false, false>(
          d, cuda::matrix_descriptor(shared, 1024) + static_cast<uint64_t>(k * 2),
          cuda::matrix_descriptor(shared + kTileBytes, 1024) + static_cast<uint64_t>(k * 2), tap || k);
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    __syncthreads();
  }
  for (int i = 0; i < kTile / 2; ++i)
    if (sum_row(i) < kPixels) y[sum_row(i) * kTile + sum_column(i)] = d[i];
}

template <Conv kFault>
bool run_conv(const char* name) {
  const auto x = numbers(kImages * kH * kW * kC, 13), weight = numbers(kTile * kTaps * kC, 11);
  const int upper = kFault == Conv::kUpperOffByOne ? 1 : -1, stride = kFault == Conv::kMissingStride ? 1 : 2;
  const TensorMap x_map = cuda::tensor_map(
      cuda::Im2colTensor{DType::kBFloat16, kC, kW, kH, kImages, kC, -1, -1, upper, -1, stride, 2, kTile, kTile},
      x.data());
  const TensorMap weight_map = cuda::tensor_map(
      cuda::TiledTensor{DType::kBFloat16, 3, {kC, kTaps, kTile}, {1, kC, kTaps * kC}, {kTile, 1, kTile}, {1, 1, 1}},
      weight.data());
  std::vector<float> y(kPixels * kTile, -1);
  launch(name, dim3(1), dim3(128), 2 * kTileBytes + sizeof(uint64_t),
         [&] { conv<kFault>(x_map, weight_map, y.data()); });
  for (int pixel = 0; pixel < kPixels; ++pixel)
    for (int k = 0; k < kTile; ++k) {
      float sum = 0;
      for (int tap = 0; tap < kTaps; ++tap) {
        const int n = pixel / (kP * kQ), h = pixel / kQ % kP * 2 - 1 + tap / 3, w = pixel % kQ * 2 - 1 + tap % 3;
        if (h < 0 || h >= kH || w < 0 || w >= kW) continue;
        for (int c = 0; c < kC; ++c)
          sum += product(x[static_cast<size_t>(((n * kH + h) * kW + w) * kC + c)],
                         weight[static_cast<size_t>((k * kTaps + tap) * kC + c)]);
      }
      if (!(y[static_cast<size_t>(pixel * kTile + k)] == sum)) return false;
    }
  return true;
}

// ---- A tile of every second row and every third column of a plane that it overlaps on all sides.

enum class Box { kSound, kShifted, kBeyondShared, kMissingWait };

template <Box kFault>
void box(const TensorMap& map, BFloat16* y) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  CNNOPS_SHARED(uint64_t, full);
  if (threadIdx.x == 0) {
    cuda::mbarrier_init(&full, 1);
    cuda::fence_mbarrier_init();
    cuda::mbarrier_expect(&full, 4 * 8 * 64);
    cuda::tma_load<3>(shared, &map, &full, {8, kFault == Box::kShifted ? -1 : -2, -3});
  }
  __syncwarp();
  if (kFault != Box::kMissingWait) cuda::mbarrier_wait(&full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 32 * 32; i += 32) {
    const int row = i / 32, column = i % 32;
    y[i] = reinterpret_cast<BFloat16*>(shared)[row * 64 + ((column / 8) ^ row % 8) * 8 + column % 8];
  }
}

template <Box kFault>
bool run_box(const char* name) {
  constexpr int kPlanes = 5, kRows = 9, kColumns = 24;
  const auto x = numbers(kPlanes * kRows * kColumns, 211);
  const TensorMap map = cuda::tensor_map(
      cuda::TiledTensor{
          DType::kBFloat16, 3, {kColumns, kRows, kPlanes}, {1, kColumns, kRows * kColumns}, {32, 8, 4}, {1, 2, 3}},
      x.data());
  std::vector<BFloat16> y(32 * 32);
  launch(name, dim3(1), dim3(32), kFault == Box::kBeyondShared ? 32 * 128 - 16 : 32 * 128,
         [&] { box<kFault>(map, y.data()); });
  for (int i = 0; i < 32 * 32; ++i) {
    const int column = i % 32 + 8, row = i / 32 % 8 * 2 - 2, plane = i / 256 * 3 - 3;
    const bool inside = column < kColumns && row >= 0 && row < kRows && plane >= 0 && plane < kPlanes;
    const uint16_t expected =
        inside ? x[static_cast<size_t>((plane * kRows + row) * kColumns + column)].bits : uint16_t{0};
    if (y[static_cast<size_t>(i)].bits != expected) return false;
  }
  return true;
}

// ---- One warp hands rows to another through one slot, written by ordinary instructions.

enum class Handover { kSound, kMissingArrival, kMissingWait };

constexpr int kRounds = 4;

template <Handover kFault>
void handover(float* y) {
  CNNOPS_DYNAMIC_SHARED(unsigned char, shared);
  auto* const full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* const empty = full + 1;
  auto* const slot = reinterpret_cast<float*>(full + 2);
  if (threadIdx.x == 0) {
    cuda::mbarrier_init(full, 32);
    cuda::mbarrier_init(empty, 32);
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int round = 0; round < kRounds; ++round) {
    const auto parity = static_cast<uint32_t>(round % 2);
    if (threadIdx.x < 32) {
      if (kFault != Handover::kMissingWait) cuda::mbarrier_wait(empty, parity ^ 1);
      slot[lane] = static_cast<float>(round * 32 + lane);
      if (kFault != Handover::kMissingArrival || lane) cuda::mbarrier_arrive(full);
    } else {
      cuda::mbarrier_wait(full, parity);
      y[round * 32 + lane] = slot[31 - lane];
      cuda::mbarrier_arrive(empty);
    }
  }
}

template <Handover kFault>
bool run_handover(const char* name) {
  float y[kRounds * 32] = {};
  launch(name, dim3(1), dim3(64), 2 * sizeof(uint64_t) + 32 * sizeof(float), [&] { handover<kFault>(y); });
  for (int i = 0; i < kRounds * 32; ++i)
    if (!(y[i] == static_cast<float>(i / 32 * 32 + 31 - i % 32))) return false;
  return true;
}

template <auto kFault>
bool run(const char* name) {
  using Kind = decltype(kFault);
  if constexpr (std::is_same_v<Kind, Ring>) return run_ring<kFault>(name);
  if constexpr (std::is_same_v<Kind, Transposed>) return run_transposed<kFault>(name);
  if constexpr (std::is_same_v<Kind, Registers>) return run_registers<kFault>(name);
  if constexpr (std::is_same_v<Kind, Conv>) return run_conv<kFault>(name);
  if constexpr (std::is_same_v<Kind, Box>) return run_box<kFault>(name);
  if constexpr (std::is_same_v<Kind, Handover>) return run_handover<kFault>(name);
}

template <auto kFault>
constexpr Fault fault(const char* name) {
  return {name, [](const char* called, bool faulty) {
            return faulty ? run<kFault>(called) : run<decltype(kFault)::kSound>(called);
          }};
}

}  // namespace

std::vector<Fault> sm90_faults() {
  return {
      fault<Ring::kMissingFullWait>("missing_full_wait"),
      fault<Ring::kWrongParity>("wrong_parity"),
      fault<Ring::kMissingExpect>("missing_expect"),
      fault<Ring::kMissingProductWait>("missing_product_wait"),
      fault<Ring::kMissingProductFence>("missing_product_fence"),
      fault<Ring::kMissingCommit>("missing_commit"),
      fault<Ring::kEarlyRelease>("early_release"),
      fault<Ring::kWrongStride>("wrong_descriptor_stride"),
      fault<Ring::kWrongSwizzle>("wrong_descriptor_swizzle"),
      fault<Ring::kMisalignedTile>("misaligned_tile"),
      fault<Ring::kTooLittleShared>("too_little_shared"),
      fault<Ring::kMissingInit>("missing_mbarrier_init"),
      fault<Ring::kMissingInitFence>("missing_init_fence"),
      fault<Ring::kMissingFirstSync>("missing_first_cluster_sync"),
      fault<Ring::kMissingLastSync>("missing_last_cluster_sync"),
      fault<Ring::kWrongMask>("wrong_multicast_mask"),
      fault<Ring::kMaskBeyondCluster>("mask_beyond_cluster"),
      fault<Ring::kMissingRelease>("missing_release"),
      fault<Ring::kExtraArrival>("extra_arrival"),
      fault<Ring::kArrivalBeyondCount>("arrival_beyond_count"),
      fault<Ring::kDivergentWarpgroup>("divergent_warpgroup"),
      fault<Ring::kWrongRegisterCount>("wrong_register_count"),
      fault<Transposed::kSwappedStrides>("swapped_strides"),
      fault<Transposed::kWrongMajor>("wrong_major"),
      fault<Transposed::kBeyondShared>("operand_beyond_shared"),
      fault<Registers::kMissingProxyFence>("missing_proxy_fence"),
      fault<Registers::kMissingBarrier>("missing_named_barrier"),
      fault<Registers::kSwappedFragment>("swapped_fragment"),
      fault<Conv::kHaloOffByOne>("halo_off_by_one"),
      fault<Conv::kUpperOffByOne>("corner_off_by_one"),
      fault<Conv::kWrongTap>("wrong_tap"),
      fault<Conv::kBasePixelOutside>("base_pixel_outside"),
      fault<Conv::kMissingStride>("missing_element_stride"),
      fault<Box::kShifted>("shifted_box"),
      fault<Box::kBeyondShared>("box_beyond_shared"),
      fault<Box::kMissingWait>("missing_tile_wait"),
      fault<Handover::kMissingArrival>("missing_arrival"),
      fault<Handover::kMissingWait>("missing_handover_wait"),
  };
}

}  // namespace cnnops::simt
