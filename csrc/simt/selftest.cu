// Every kernel here reverses a row, out[t] = kThreads - 1 - t, by some means of the device, and with kFaulty commits
// the fault that it is named for; selftest_sm90.cu has those of Hopper. A fault must not go unnoticed: the launch
// throws or the row comes out wrong.

#include <numeric>
#include <stdexcept>

#include "../cuda/ptx.cuh"
#include "selftest.h"

namespace cnnops::simt {
namespace {

constexpr int kThreads = 128, kLast = kThreads - 1;
using Row = float[kThreads];

int thread() { return static_cast<int>(threadIdx.x); }
float value(int t) { return static_cast<float>(t); }

bool reversed(const Row& row) {
  for (int t = 0; t < kThreads; ++t)
    if (!(row[t] == value(kLast - t))) return false;
  return true;
}

template <bool kFaulty>
__global__ void missing_barrier(const float*, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  row[thread()] = value(thread());
  if (!kFaulty) __syncthreads();
  out[thread()] = row[kLast - thread()];
}

// The row is used twice, and refilled while others may still read it.
template <bool kFaulty>
__global__ void early_refill(const float*, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    row[thread()] = round ? -value(thread()) : 2 * value(thread());
    __syncthreads();
    sum += row[kLast - thread()];
    if (!kFaulty) __syncthreads();
  }
  out[thread()] = sum;
}

template <bool kFaulty>
__global__ void missing_async_wait(const float* source, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  if (thread() < kThreads / 4) cuda::copy_async_16(row + thread() * 4, source + thread() * 4, true);
  cuda::commit_async();
  if (!kFaulty) cuda::wait_async<0>();
  __syncthreads();
  out[thread()] = row[kLast - thread()];
}

template <bool kFaulty>
__global__ void misaligned_async_copy(const float* source, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  if (thread() < kThreads / 4) cuda::copy_async_16(row + thread() * 4 + (kFaulty ? 1 : 0), source + thread() * 4, true);
  cuda::commit_async();
  cuda::wait_async<0>();
  __syncthreads();
  out[thread()] = row[kLast - thread()];
}

template <bool kFaulty>
__global__ void dynamic_shared_overrun(const float*, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  constexpr int kShift = kFaulty ? 1 : 0;
  row[thread() + kShift] = value(thread());
  __syncthreads();
  out[thread()] = row[kLast - thread() + kShift];
}

template <bool kFaulty>
__global__ void shared_variable_overrun(const float*, float* out) {
  CNNOPS_SHARED(Row, variable);
  float* const row = variable + (kFaulty ? 1 : 0);
  row[thread()] = value(thread());
  __syncthreads();
  out[thread()] = row[kLast - thread()];
}

template <bool kFaulty>
__global__ void uninitialised_read(const float*, float* out) {
  CNNOPS_SHARED(Row, row);
  if (!kFaulty || thread() != kLast) row[thread()] = value(thread());
  __syncthreads();
  out[thread()] = row[kLast - thread()];
}

template <bool kFaulty>
__global__ void divergent_barrier(const float*, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  row[thread()] = value(thread());
  if (kFaulty && thread() < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
  out[thread()] = row[kLast - thread()];
}

template <bool kFaulty>
__global__ void exit_before_barrier(const float*, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  row[thread()] = value(thread());
  out[thread()] = value(kLast - thread());
  if (kFaulty && thread() == kLast) return;
  __syncthreads();
  out[thread()] = row[kLast - thread()];
}

template <bool kFaulty>
__global__ void lane_outside_mask(const float*, float* out) {
  out[thread()] = __shfl_xor_sync(kFaulty ? 0x0000ffffu : ~0u, value(kLast - (thread() ^ 15)), 15);
}

template <bool kFaulty>
__global__ void shuffle_from_outside_mask(const float*, float* out) {
  const unsigned half = lane() < 16 ? 0x0000ffffu : 0xffff0000u;
  const int across = kFaulty ? 31 : 15;
  out[thread()] = __shfl_xor_sync(half, value(kLast - (thread() ^ across)), across);
}

template <bool kFaulty>
__global__ void lane_missing_from_collective(const float*, float* out) {
  out[thread()] = value(kLast - thread());
  if (kFaulty && lane() == 3) return;
  out[thread()] = __shfl_xor_sync(~0u, value(kLast - (thread() ^ 31)), 31);
}

enum class Named { kSound, kMissing, kWrongCount, kWrongNumber };

// Two warps write half of the row each; each tells the other by a barrier of its own, and waits for the other's.
template <Named kFault>
__global__ void named(const float*, float* out) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  const int warp = thread() / 32;
  if (warp >= 2) return;
  const int first = warp * kThreads / 2 + thread() % 32, other = 1 - warp;
  for (int i = first; i < first + kThreads / 2; i += 32) row[i] = value(i);
  cuda::barrier_arrive(kFault == Named::kWrongNumber ? 16 + warp : 1 + warp, 64);
  if (kFault != Named::kMissing) cuda::barrier_sync(1 + other, kFault == Named::kWrongCount ? 96 : 64);
  for (int i = first; i < first + kThreads / 2; i += 32) out[i] = row[kLast - i];
}

template <Named kFault>
bool run_named(const char* name) {
  Row out = {};
  launch(name, dim3(1), dim3(kThreads), sizeof(Row), [&] { named<kFault>(nullptr, out); });
  return reversed(out);
}

// Four blocks write a quarter of the row each, and the one that counts last reverses it.
constexpr int kBlocks = 4, kQuarter = kThreads / kBlocks;

template <bool kFaulty>
__global__ void last_block(float* row, unsigned* finished, float* out) {
  CNNOPS_SHARED(unsigned, before);
  const int i = static_cast<int>(blockIdx.x) * kQuarter + thread();
  row[i] = value(i);
  if (!kFaulty) __threadfence();
  __syncthreads();
  if (thread() == 0) before = atomicAdd(finished, 1u);
  __syncthreads();
  if (before != kBlocks - 1) return;
  __threadfence();
  for (int k = thread(); k < kThreads; k += kQuarter) out[k] = row[kLast - k];
}

template <bool kFaulty>
bool run_last_block(const char* name) {
  Row row = {}, out = {};
  unsigned finished = 0;
  launch(name, dim3(kBlocks), dim3(kQuarter), 0, [&] { last_block<kFaulty>(row, &finished, out); });
  return reversed(out);
}

// Four blocks write a quarter of the row each, twice, and each reverses a quarter of all.
enum class Grid { kSound, kMissing, kMissingSecond, kEarlyExit, kUncleared, kPlainLaunch };

template <Grid kFault>
__global__ void grid(float* row, unsigned* arrived, float* out) {
  if (kFault == Grid::kEarlyExit && blockIdx.x == 2) return;
  const int i = static_cast<int>(blockIdx.x) * kQuarter + thread();
  float sum = 0;
  for (unsigned round = 0; round < 2; ++round) {
    row[i] = round ? -value(i) : 2 * value(i);
    if (kFault != Grid::kMissing) cuda::grid_barrier(arrived, (2 * round + 1) * kBlocks);
    sum += row[kLast - i];
    if (kFault != Grid::kMissing && kFault != Grid::kMissingSecond)
      cuda::grid_barrier(arrived, (2 * round + 2) * kBlocks);
  }
  out[i] = sum;
}

template <Grid kFault>
bool run_grid(const char* name) {
  Row row = {}, out = {};
  unsigned arrived = kFault == Grid::kUncleared ? 4 * kBlocks : 0;
  launch(
      name, dim3(kBlocks), dim3(kQuarter), 0, [&] { grid<kFault>(row, &arrived, out); }, 1,
      kFault != Grid::kPlainLaunch);
  return reversed(out);
}

template <void (*kKernel)(const float* source, float* out)>
bool run_row(const char* name) {
  alignas(16) Row source;
  Row out = {};
  std::iota(source, source + kThreads, 0.0f);
  launch(name, dim3(1), dim3(kThreads), sizeof(Row), [&] { kKernel(source, out); });
  return reversed(out);
}

template <auto kSound, auto kFaulty>
constexpr Fault fault(const char* name) {
  return {name, [](const char* called, bool faulty) { return faulty ? kFaulty(called) : kSound(called); }};
}

#define CNNOPS_FAULT(name) fault<run_row<name<false>>, run_row<name<true>>>(#name)
const std::vector<Fault>& faults() {
  static const std::vector<Fault> all = [] {
    std::vector<Fault> out = {
        CNNOPS_FAULT(missing_barrier),
        CNNOPS_FAULT(early_refill),
        CNNOPS_FAULT(missing_async_wait),
        CNNOPS_FAULT(misaligned_async_copy),
        CNNOPS_FAULT(dynamic_shared_overrun),
        CNNOPS_FAULT(shared_variable_overrun),
        CNNOPS_FAULT(uninitialised_read),
        CNNOPS_FAULT(divergent_barrier),
        CNNOPS_FAULT(exit_before_barrier),
        CNNOPS_FAULT(lane_outside_mask),
        CNNOPS_FAULT(shuffle_from_outside_mask),
        CNNOPS_FAULT(lane_missing_from_collective),
        fault<run_named<Named::kSound>, run_named<Named::kMissing>>("missing_barrier_sync"),
        fault<run_named<Named::kSound>, run_named<Named::kWrongCount>>("barrier_count_mismatch"),
        fault<run_named<Named::kSound>, run_named<Named::kWrongNumber>>("barrier_number_too_large"),
        fault<run_last_block<false>, run_last_block<true>>("missing_threadfence"),
        fault<run_grid<Grid::kSound>, run_grid<Grid::kMissing>>("missing_grid_barrier"),
        fault<run_grid<Grid::kSound>, run_grid<Grid::kMissingSecond>>("missing_second_grid_barrier"),
        fault<run_grid<Grid::kSound>, run_grid<Grid::kEarlyExit>>("exit_before_grid_barrier"),
        fault<run_grid<Grid::kSound>, run_grid<Grid::kUncleared>>("uncleared_grid_barrier"),
        fault<run_grid<Grid::kSound>, run_grid<Grid::kPlainLaunch>>("grid_barrier_in_plain_launch"),
    };
    const std::vector<Fault> more = sm90_faults();
    out.insert(out.end(), more.begin(), more.end());
    return out;
  }();
  return all;
}
#undef CNNOPS_FAULT

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const Fault& fault : faults()) names.push_back(fault.name);
  return names;
}

bool run_fault(const std::string& name, bool faulty) {
  for (const Fault& fault : faults())
    if (name == fault.name) return fault.run(fault.name, faulty);
  throw std::invalid_argument("no such fault: " + name);
}

}  // namespace cnnops::simt
