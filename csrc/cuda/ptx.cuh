// All inline PTX that every architecture has; ptx_sm90.cuh has Hopper's. Each wrapper has a device body and one for the
// emulator.
#pragma once

#include <cstring>
#include <type_traits>

#include "number.cuh"

#if defined(CNNOPS_SIMT)
#include "../simt/async.h"
#endif

namespace cnnops::cuda {

#if defined(CNNOPS_SIMT)

__forceinline__ float to_float(Half v) { return simt::half_value(v.bits); }
__forceinline__ void from_float(float v, Half& out) {
  out.bits = __builtin_bit_cast(uint16_t, static_cast<_Float16>(v));
}
// Round to nearest even; a NaN stays one (the rounding carry would turn some into infinity).
__forceinline__ void from_float(float v, BFloat16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  out.bits = v != v ? uint16_t{0x7fff} : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t shared_address(const void* p) { return simt::shared_offset(p); }

// The empty statement keeps the compiler from reading only what is used, and that piece by piece.
template <class Words>
__forceinline__ Words load_16(const Words* global) {
  Words words = *global;
  asm volatile("" : "+m"(words));
  return words;
}
inline void store_16(void* global, const void* from) {
  *static_cast<uint4*>(global) = *static_cast<const uint4*>(from);
}
inline void copy_async_16(void* shared, const void* global, bool valid) {
  simt::copy_async(shared, global, valid ? 16 : 0);
}
inline void commit_async() { simt::commit_async(); }
template <int kGroupsLeft>
void wait_async() {
  simt::wait_async(kGroupsLeft);
}

namespace emulated {

struct LdMatrix {
  const void* row;
  uint32_t (*result)[4];
};

template <bool kTransposed>
CNNOPS_UNTRACED void ldmatrix_x4(const simt::Lanes& operands) {
  const void* rows[32];
  for (int lane = 0; lane < 32; ++lane) rows[lane] = static_cast<const LdMatrix*>(operands[lane])->row;
  simt::trace::matrix_read(rows);
  const auto element = [&](int matrix, int row, int column) CNNOPS_UNTRACED -> uint32_t {
    return static_cast<const uint16_t*>(rows[matrix * 8 + row])[column];
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = kTransposed ? element(matrix, column, row) : element(matrix, row, column);
      const uint32_t high = kTransposed ? element(matrix, column + 1, row) : element(matrix, row, column + 1);
      (*static_cast<LdMatrix*>(operands[lane])->result)[matrix] = low | high << 16;
    }
}

struct Mma {
  float (*d)[4];
  const uint32_t* a;
  uint32_t b0, b1;
};

// The operands' places are those of the PTX manual's figures for mma.m16n8k16.
template <class T>
CNNOPS_UNTRACED void mma_m16n8k16(const simt::Lanes& operands) {
  simt::trace::product(16, 8, 16);
  const auto number = [](uint32_t pair, int half)
                          CNNOPS_UNTRACED { return to_float(T{static_cast<uint16_t>(pair >> 16 * half)}); };
  float a[16][16], b[16][8], d[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& in = *static_cast<const Mma*>(operands[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][column + i / 2 * 8 + half] = number(in.a[i], half);
      b[column + half][row] = number(in.b0, half);
      b[column + 8 + half][row] = number(in.b1, half);
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      (*static_cast<const Mma*>(operands[lane])->d)[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

// Round to nearest, ties away from zero, to ten bits of fraction (cvt.rna).
inline uint32_t to_tf32(float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

// As above for mma.m16n8k8: one number a register, of which the device reads the upper 19 bits.
CNNOPS_UNTRACED inline void mma_m16n8k8_tf32(const simt::Lanes& operands) {
  simt::trace::product(16, 8, 8);
  const auto number = [](uint32_t word) CNNOPS_UNTRACED { return __builtin_bit_cast(float, word & 0xffffe000u); };
  float a[16][8], b[8][8], d[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& in = *static_cast<const Mma*>(operands[lane]);
    for (int i = 0; i < 4; ++i) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = number(in.a[i]);
    b[lane % 4][lane / 4] = number(in.b0);
    b[lane % 4 + 4][lane / 4] = number(in.b1);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 8; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      (*static_cast<const Mma*>(operands[lane])->d)[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace emulated

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  if (!aligned_to_16(row)) simt::fail("ldmatrix of a row that is not aligned to 16 bytes");
  emulated::LdMatrix mine{row, &result};
  simt::collective("ldmatrix", ~0u, &mine, emulated::ldmatrix_x4<kTransposed>, simt::Where::current());
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Mma mine{&d, a, b0, b1};
  simt::collective("mma", ~0u, &mine, emulated::mma_m16n8k16<T>, simt::Where::current());
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Mma mine{&d, a, b0, b1};
  simt::collective("mma", ~0u, &mine, emulated::mma_m16n8k8_tf32, simt::Where::current());
}
inline uint32_t to_tf32(float v) { return emulated::to_tf32(v); }

inline void barrier_sync(int id, int threads, simt::Where where = simt::Where::current()) {
  simt::named_barrier_sync(id, threads, where);
}
inline void barrier_arrive(int id, int threads, simt::Where where = simt::Where::current()) {
  simt::named_barrier_arrive(id, threads, where);
}

inline void grid_barrier(unsigned* arrived, unsigned due, simt::Where where = simt::Where::current()) {
  simt::grid_barrier(arrived, due, where);
}

#else

__device__ __forceinline__ float to_float(Half v) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
}
__device__ __forceinline__ void from_float(float v, Half& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
}
__device__ __forceinline__ void from_float(float v, BFloat16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class Words>
__device__ __forceinline__ Words load_16(const Words* global) {
  return *global;
}
// One store of 16 bytes: the compiler may take an assignment apart where a branch beside it stores element by element.
__device__ __forceinline__ void store_16(void* global, const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// Copies 16 bytes to shared memory, or writes 16 zeros. `global` must be a readable address even then.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of the copies issued since the last commit.
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroupsLeft of this thread's groups are under way.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane i names row i % 8 of matrix i / 8. Lane i receives elements (i/4, i%4*2)
// and the next of each, or with kTransposed those of the transposed matrices.
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d[16][8] += a[16][16] * b[16][8], T Half or BFloat16, sums in float.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16][8] += a[16][8] * b[8][8] in TF32: each word holds a number rounded by to_tf32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return out;
}

// Barrier `id` (1 to 15; 0 is __syncthreads) opens when `threads` threads of the block have come to it, by either.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Opens when `due` blocks of a cooperative launch have been counted in `arrived`, which was zero when the launch began:
// the n-th such barrier waits for n times the grid's blocks. What any thread of the grid wrote before it, all read
// after it: thread 0 releases what __syncthreads has ordered before its own count, and acquires for its block.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned due) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    } while (seen < due);
  }
  __syncthreads();
}

#endif

}  // namespace cnnops::cuda
