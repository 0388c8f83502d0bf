// Hopper's PTX: barriers in shared memory, copies by the tensor memory accelerator (TMA), products of warpgroups,
// clusters. Each wrapper has a device body and one for the emulator. Included only by sources that are compiled for
// sm_90a alone.
#pragma once

#include "ptx.cuh"
#include "tensor_map.h"

namespace cnnops::cuda {

// Describes a tile in shared memory to wgmma: rows of 128 bytes, swizzled by 128 bytes as TMA does it. With rows along
// k, `stride` is the distance in bytes between groups of 8 rows (1024) and `leading` is not used. With rows along m or
// n, `stride` is that between groups of 8 rows, which then are 8 steps of k, and `leading` that between the 128-byte
// columns of a tile wider than 64 numbers. Source: PTX manual, "Matrix descriptor format" and "Strides".
__device__ __forceinline__ uint64_t matrix_descriptor(const void* tile, uint32_t stride, uint32_t leading = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 |
         (shared_address(tile) & 0x3ffff) >> 4;
}

#if defined(CNNOPS_SIMT)

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals, simt::Where where = simt::Where::current()) {
  simt::mbarrier_init(barrier, arrivals, where);
}
inline void fence_mbarrier_init(simt::Where where = simt::Where::current()) { simt::fence_mbarrier_init(where); }
inline void mbarrier_arrive(uint64_t* barrier, simt::Where where = simt::Where::current()) {
  simt::mbarrier_arrive(barrier, where);
}
inline void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank, simt::Where where = simt::Where::current()) {
  simt::mbarrier_arrive_remote(barrier, rank, where);
}
inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes, simt::Where where = simt::Where::current()) {
  simt::mbarrier_expect(barrier, bytes, where);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, simt::Where where = simt::Where::current()) {
  simt::mbarrier_wait(barrier, parity, where);
}

inline void prefetch_tensor_map(const TensorMap*) {}
template <int kRank>
void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, const int (&at)[kRank],
              simt::Where where = simt::Where::current()) {
  simt::tma_load_tiled(shared, *map, barrier, at, 0, where);
}
template <int kRank>
void tma_multicast(void* shared, const TensorMap* map, uint64_t* barrier, const int (&at)[kRank], uint16_t blocks,
                   simt::Where where = simt::Where::current()) {
  if (!blocks) simt::fail("a multicast to no block");
  simt::tma_load_tiled(shared, *map, barrier, at, blocks, where);
}
inline void tma_load_im2col(void* shared, const TensorMap* map, uint64_t* barrier, int c, int w, int h, int n,
                            uint16_t offset_w, uint16_t offset_h, simt::Where where = simt::Where::current()) {
  simt::tma_load_im2col(shared, *map, barrier, c, w, h, n, offset_w, offset_h, 0, where);
}

inline void fence_proxy_async(simt::Where where = simt::Where::current()) { simt::fence_proxy_async(where); }
inline void wgmma_fence(simt::Where where = simt::Where::current()) { simt::wgmma_fence(where); }
inline void wgmma_commit(simt::Where where = simt::Where::current()) { simt::wgmma_commit(where); }
template <int kGroupsLeft>
void wgmma_wait(simt::Where where = simt::Where::current()) {
  simt::wgmma_wait(kGroupsLeft, where);
}

namespace emulated {

template <class T>
constexpr simt::Operand kOperand = std::is_same_v<T, Half> ? simt::Operand::kHalf : simt::Operand::kBFloat16;

}  // namespace emulated

template <class T, int kN, bool kAIsMnMajor, bool kBIsMnMajor>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate, simt::Where where = simt::Where::current()) {
  simt::wgmma({d, kN, emulated::kOperand<T>, nullptr, a, b, kAIsMnMajor, kBIsMnMajor, accumulate}, where);
}
template <class T, int kN, bool kBIsMnMajor>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
           simt::Where where = simt::Where::current()) {
  simt::wgmma({d, kN, emulated::kOperand<T>, a, 0, b, false, kBIsMnMajor, accumulate}, where);
}

inline uint32_t cluster_rank() { return simt::cluster_rank(); }
inline uint32_t cluster_size() { return simt::cluster_size(); }
inline void cluster_sync(simt::Where where = simt::Where::current()) { simt::cluster_sync(where); }
template <int kRegisters>
void increase_registers(simt::Where where = simt::Where::current()) {
  simt::set_max_registers(kRegisters, true, where);
}
template <int kRegisters>
void decrease_registers(simt::Where where = simt::Where::current()) {
  simt::set_max_registers(kRegisters, false, where);
}

#else

// An mbarrier's phase completes when its arrivals have come and the bytes that were expected in it have landed.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to TMA and to the cluster, once threads or blocks have synchronised after it.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the same barrier of the block `rank` of this cluster: to say that this one has read what the other will
// write again. It does not release writes to the cluster, which would wait for all of the thread's stores.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Expects `bytes` of TMA in this phase, and arrives.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has completed; a fresh barrier counts its phase -1, of parity 1, as complete.
// What TMA has written, from whichever block, is then visible; acquiring from the cluster would invalidate the L1
// cache.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra wait;\n"
      "done:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Fetches a kernel parameter's map ahead of the first copy that it describes.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box at these coordinates (innermost first; elements beside the tensor are zeros) to shared memory, aligned
// to 1024 bytes, and counts its bytes at the barrier.
template <int kRank>
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* barrier,
                                         const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 4);
  if constexpr (kRank == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1])
        : "memory");
  if constexpr (kRank == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  if constexpr (kRank == 4)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
}

// The same to every block of the cluster whose bit is set, at the same place, counted at each block's own barrier.
template <int kRank>
__device__ __forceinline__ void tma_multicast(void* shared, const TensorMap* map, uint64_t* barrier,
                                              const int (&at)[kRank], uint16_t blocks) {
  static_assert(kRank >= 2 && kRank <= 4);
  if constexpr (kRank == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "h"(blocks)
        : "memory");
  if constexpr (kRank == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "h"(blocks)
        : "memory");
  if constexpr (kRank == 4)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "h"(blocks)
        : "memory");
}

// Copies a column of pixels: from base pixel (w, h, n) on, through the map's bounding box, W fastest, each pixel's
// `channels` at (w + offset_w, h + offset_h).
__device__ __forceinline__ void tma_load_im2col(void* shared, const TensorMap* map, uint64_t* barrier, int c, int w,
                                                int h, int n, uint16_t offset_w, uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w), "h"(offset_h)
      : "memory");
}

// Makes this thread's ordinary writes to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders a warpgroup's ordinary accesses to the registers of wgmma before it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kGroupsLeft groups of this warpgroup are under way.
template <int kGroupsLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}

// The sums d[0] .. d[n - 1] of a wgmma, as placeholders and as operands.
#define CNNOPS_WGMMA_D32                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CNNOPS_WGMMA_D64                                                             \
  CNNOPS_WGMMA_D32                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CNNOPS_WGMMA_D96                                                             \
  CNNOPS_WGMMA_D64                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CNNOPS_WGMMA_D128                                                                        \
  CNNOPS_WGMMA_D96                                                                               \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CNNOPS_WGMMA_SUMS8(i)                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CNNOPS_WGMMA_SUMS32(i) \
  CNNOPS_WGMMA_SUMS8(i), CNNOPS_WGMMA_SUMS8(i + 8), CNNOPS_WGMMA_SUMS8(i + 16), CNNOPS_WGMMA_SUMS8(i + 24)
#define CNNOPS_WGMMA_SUMS64(i) CNNOPS_WGMMA_SUMS32(i), CNNOPS_WGMMA_SUMS32(i + 32)
#define CNNOPS_WGMMA_SUMS96(i) CNNOPS_WGMMA_SUMS64(i), CNNOPS_WGMMA_SUMS32(i + 64)
#define CNNOPS_WGMMA_SUMS128(i) CNNOPS_WGMMA_SUMS64(i), CNNOPS_WGMMA_SUMS64(i + 64)
// wgmma of m64 n `n` and this k and type; d0 .. d6: the numbers of the operands after the sums.
#define CNNOPS_WGMMA(n, sums, shape, d0, d1, d2, d3, d4)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #d2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n shape \
               " {" CNNOPS_WGMMA_D##sums "}, %" #d0 ", %" #d1 ", p, 1, 1, %" #d3 ", %" #d4 ";\n}"          \
               : CNNOPS_WGMMA_SUMS##sums(0)                                                                \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kAIsMnMajor}), "n"(int{kBIsMnMajor}))
#define CNNOPS_WGMMA_REGISTERS(n, sums, shape, d0, d1, d2, d3, d4, d5, d6)                                     \
  asm volatile(                                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #d5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n shape              \
      " {" CNNOPS_WGMMA_D##sums "}, {%" #d0 ", %" #d1 ", %" #d2 ", %" #d3 "}, %" #d4 ", p, 1, 1, %" #d6 ";\n}" \
      : CNNOPS_WGMMA_SUMS##sums(0)                                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kBIsMnMajor}))

// d[64][kN] = a[64][16] * b[16][kN] + (accumulate ? d : 0), T Half or BFloat16, executed by the 128 threads of a
// warpgroup. a and b are matrix descriptors. An operand's rows lie along k in memory, or along m or n if it is
// MN-major. Thread t holds of row t/32*16 + t%32/4 + i%4/2*8 and column i/4*8 + t%4*2 + i%2 the sum d[i].
template <class T, int kN, bool kAIsMnMajor, bool kBIsMnMajor>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 192 || kN == 256);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 64) CNNOPS_WGMMA(64, 32, "k16.f32.bf16.bf16", 32, 33, 34, 35, 36);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 128)
    CNNOPS_WGMMA(128, 64, "k16.f32.bf16.bf16", 64, 65, 66, 67, 68);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 192)
    CNNOPS_WGMMA(192, 96, "k16.f32.bf16.bf16", 96, 97, 98, 99, 100);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 256)
    CNNOPS_WGMMA(256, 128, "k16.f32.bf16.bf16", 128, 129, 130, 131, 132);
  if constexpr (std::is_same_v<T, Half> && kN == 64) CNNOPS_WGMMA(64, 32, "k16.f32.f16.f16", 32, 33, 34, 35, 36);
  if constexpr (std::is_same_v<T, Half> && kN == 128) CNNOPS_WGMMA(128, 64, "k16.f32.f16.f16", 64, 65, 66, 67, 68);
  if constexpr (std::is_same_v<T, Half> && kN == 192) CNNOPS_WGMMA(192, 96, "k16.f32.f16.f16", 96, 97, 98, 99, 100);
  if constexpr (std::is_same_v<T, Half> && kN == 256)
    CNNOPS_WGMMA(256, 128, "k16.f32.f16.f16", 128, 129, 130, 131, 132);
}
// The same with a in registers: the words of mma_m16n8k16's fragment, warp w of the warpgroup holding rows 16 w to
// 16 w + 15.
template <class T, int kN, bool kBIsMnMajor>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 192 || kN == 256);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 64)
    CNNOPS_WGMMA_REGISTERS(64, 32, "k16.f32.bf16.bf16", 32, 33, 34, 35, 36, 37, 38);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 128)
    CNNOPS_WGMMA_REGISTERS(128, 64, "k16.f32.bf16.bf16", 64, 65, 66, 67, 68, 69, 70);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 192)
    CNNOPS_WGMMA_REGISTERS(192, 96, "k16.f32.bf16.bf16", 96, 97, 98, 99, 100, 101, 102);
  if constexpr (std::is_same_v<T, BFloat16> && kN == 256)
    CNNOPS_WGMMA_REGISTERS(256, 128, "k16.f32.bf16.bf16", 128, 129, 130, 131, 132, 133, 134);
  if constexpr (std::is_same_v<T, Half> && kN == 64)
    CNNOPS_WGMMA_REGISTERS(64, 32, "k16.f32.f16.f16", 32, 33, 34, 35, 36, 37, 38);
  if constexpr (std::is_same_v<T, Half> && kN == 128)
    CNNOPS_WGMMA_REGISTERS(128, 64, "k16.f32.f16.f16", 64, 65, 66, 67, 68, 69, 70);
  if constexpr (std::is_same_v<T, Half> && kN == 192)
    CNNOPS_WGMMA_REGISTERS(192, 96, "k16.f32.f16.f16", 96, 97, 98, 99, 100, 101, 102);
  if constexpr (std::is_same_v<T, Half> && kN == 256)
    CNNOPS_WGMMA_REGISTERS(256, 128, "k16.f32.f16.f16", 128, 129, 130, 131, 132, 133, 134);
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Waits for all threads of all blocks of the cluster. What they wrote before it is visible after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Each warp of a warpgroup takes registers from the block's pool, or gives them back to it.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace cnnops::cuda
