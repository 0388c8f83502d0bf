// What Hopper's kernels do asynchronously: barriers in shared memory that count arrivals and bytes, copies by the
// tensor memory accelerator (TMA), products of a warpgroup, clusters of blocks. cuda/ptx.cuh alone calls these, one for
// each instruction; the semantics are those of the PTX manual's section of the same name.
//
// Nothing asynchronous happens before it must, or, in random schedules, at any moment at which it may.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "simt.h"

namespace cnnops::simt {

// What the driver encodes into 128 opaque bytes. Axis 0 is the innermost; the tile in shared memory is swizzled by 128
// bytes. Elements beside the tensor read as zero.
struct TensorMap {
  const void* base;
  DType dtype;
  int rank;
  uint64_t extent[5], stride_bytes[5];  // stride_bytes[0] is the element's size
  uint32_t element_stride[5];
  // Tiled mode: the box. Im2col mode (rank 4: C, W, H, N): channels and pixels of a column, and the corners of the box
  // that a column's first tap walks through, {W, H}, relative to the tensor's first and last pixel.
  uint32_t box[5];
  bool im2col;
  int lower[2], upper[2];
  uint32_t channels, pixels;
};

// mbarrier. `barrier` is a word of the calling block's shared memory.
void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Where where);
void fence_mbarrier_init(Where where);
void mbarrier_arrive(uint64_t* barrier, Where where);
void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank, Where where);  // the same word of another block
void mbarrier_expect(uint64_t* barrier, uint32_t bytes, Where where);        // and arrive
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where where);         // for the phase of this parity to complete

// cp.async.bulk.tensor. destination and barrier are offsets' owners in the calling block; with a mask, the tile goes to
// the same place in each block of the cluster that it names, and each block's own barrier counts its bytes.
void tma_load_tiled(void* destination, const TensorMap& map, uint64_t* barrier, const int* coordinates, uint16_t blocks,
                    Where where);
void tma_load_im2col(void* destination, const TensorMap& map, uint64_t* barrier, int c, int w, int h, int n,
                     uint16_t offset_w, uint16_t offset_h, uint16_t blocks, Where where);

// wgmma: the 128 threads of a warpgroup execute each of these as one. d: this thread's n / 2 sums.
enum class Operand { kHalf, kBFloat16 };
struct WarpgroupProduct {
  float* d;
  int n;
  Operand type;
  const uint32_t* a_registers;  // 4 words, or null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  bool a_is_mn_major, b_is_mn_major, accumulate;
};
void wgmma_fence(Where where);
void wgmma(const WarpgroupProduct& product, Where where);
void wgmma_commit(Where where);
void wgmma_wait(int groups_left, Where where);

// Writes of ordinary instructions to shared memory become visible to TMA and wgmma.
void fence_proxy_async(Where where);

// bar.sync and bar.arrive: barrier `id` (1 to 15) opens when `threads` threads have come to it.
void named_barrier_sync(int id, int threads, Where where);
void named_barrier_arrive(int id, int threads, Where where);

uint32_t cluster_rank();  // of the calling block
uint32_t cluster_size();
void cluster_sync(Where where);  // of all threads of all blocks

// setmaxnreg, of a warpgroup.
void set_max_registers(int registers, bool increase, Where where);

// The offset of an address in the calling block's shared memory window, as matrix descriptors count it.
uint32_t shared_offset(const void* address);

}  // namespace cnnops::simt
