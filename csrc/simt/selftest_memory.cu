// Faulty kernels: each doubles a row of 37 halves, y[t] = 2 * x[t], and with kFaulty also does what it is named for. No
// fault may go unnoticed. 37 halves end 6 bytes before a multiple of 16, so that there is slack beyond them.
//
// Measured kernels: one warp each, and little enough that its traffic can be counted by hand.

#include <stdexcept>

#include "../cuda/ptx_sm90.cuh"
#include "guard.h"
#include "selftest_memory.h"

namespace cnnops::simt {
namespace {

using cuda::Half;

constexpr int kCount = 37, kThreads = 64;

int thread() { return static_cast<int>(threadIdx.x); }

void twice(const Half* x, Half* y) {
  if (thread() >= kCount) return;
  cuda::from_float(2 * cuda::to_float(x[thread()]), y[thread()]);
}

// The value of x[at] gets into y without changing it, so that the access is not left out.
void touch(const Half* x, Half* y, int at) {
  if (thread() == 0 && x[at].bits == 1) y[0].bits = 1;
}

template <bool kFaulty>
__global__ void read_beyond_the_end(const Half* x, Half* y) {
  twice(x, y);
  touch(x, y, kFaulty ? kCount : 0);
}

template <bool kFaulty>
__global__ void read_before_the_start(const Half* x, Half* y) {
  twice(x, y);
  touch(x, y, kFaulty ? -1 : 0);
}

template <bool kFaulty>
__global__ void read_far_beyond_the_end(const Half* x, Half* y) {
  twice(x, y);
  touch(x, y, kFaulty ? 1 << 20 : 0);
}

template <bool kFaulty>
__global__ void write_beyond_the_end(const Half* x, Half* y) {
  twice(x, y);
  if (kFaulty && thread() == 0) y[kCount].bits = 0;
}

template <bool kFaulty>
__global__ void write_before_the_start(const Half* x, Half* y) {
  twice(x, y);
  if (kFaulty && thread() == 0) y[-1].bits = 0;
}

template <bool kFaulty>
__global__ void write_to_an_input(const Half* x, Half* y) {
  twice(x, y);
  if (kFaulty && thread() == 0) const_cast<Half*>(x)[0].bits = 0;
}

// Four vectors of eight halves lie in the row, a fifth one only in part.
template <bool kFaulty>
__global__ void vector_read_across_the_end(const Half* x, Half* y) {
  twice(x, y);
  if (thread() >= kCount / 8 + (kFaulty ? 1 : 0)) return;
  const uint4 eight = reinterpret_cast<const uint4*>(x)[thread()];
  if (eight.x == 1) y[0].bits = 1;
}

template <bool kFaulty>
__global__ void async_copy_across_the_end(const Half* x, Half* y) {
  CNNOPS_DYNAMIC_SHARED(Half, row);
  twice(x, y);
  if (thread() < kCount / 8 + (kFaulty ? 1 : 0)) cuda::copy_async_16(row + thread() * 8, x + thread() * 8, true);
  cuda::commit_async();
  cuda::wait_async<0>();
}

template <bool kFaulty>
__global__ void async_copy_beyond_shared_memory(const Half* x, Half* y) {
  CNNOPS_DYNAMIC_SHARED(Half, row);
  twice(x, y);
  if (thread() == 0) cuda::copy_async_16(row + (kFaulty ? 2 * kThreads : 0), x, true);
  cuda::commit_async();
  cuda::wait_async<0>();
}

template <bool kFaulty>
__global__ void shared_read_before_the_start(const Half* x, Half* y) {
  CNNOPS_DYNAMIC_SHARED(Half, row);
  twice(x, y);
  touch(row, y, kFaulty ? -1 : 0);
}

template <bool kFaulty>
__global__ void shared_read_beyond_the_end(const Half* x, Half* y) {
  CNNOPS_DYNAMIC_SHARED(Half, row);
  twice(x, y);
  touch(row, y, kFaulty ? 2 * kThreads : 0);
}

template <bool kFaulty>
__global__ void read_beyond_a_shared_variable(const Half* x, Half* y) {
  using Row = Half[kThreads];
  CNNOPS_SHARED(Row, row);
  twice(x, y);
  touch(row, y, kFaulty ? kThreads : 0);
}

template <bool kFaulty>
__global__ void ldmatrix_beyond_shared_memory(const Half* x, Half* y) {
  CNNOPS_DYNAMIC_SHARED(Half, tile);
  twice(x, y);
  uint32_t words[4];
  cuda::ldmatrix_x4<false>(words, tile + (kFaulty && thread() == 31 ? 2 * kThreads : 0));
}

// The tensor map counts one half more than the row has. A device would not make it, but be given it.
template <bool kFaulty>
__global__ void tma_load_beyond_the_end(const Half* x, Half* y) {
  CNNOPS_DYNAMIC_SHARED(Half, tile);
  CNNOPS_SHARED(uint64_t, barrier);
  twice(x, y);
  if (thread() != 0) return;
  const cuda::TensorMap map =
      cuda::tensor_map(cuda::TiledTensor{DType::kHalf, 1, {kCount + (kFaulty ? 1 : 0)}, {1}, {40}, {1}}, x);
  cuda::mbarrier_init(&barrier, 1);
  cuda::fence_mbarrier_init();
  cuda::mbarrier_expect(&barrier, 40 * sizeof(Half));
  cuda::tma_load<1>(tile, &map, &barrier, {0});
  cuda::mbarrier_wait(&barrier, 0);
}

const Half* first_blocks_memory;
CNNOPS_UNTRACED void publish(const Half* memory) { first_blocks_memory = memory; }
CNNOPS_UNTRACED const Half* published() { return first_blocks_memory; }

template <bool kFaulty>
__global__ void read_of_another_blocks_memory(const Half* x, Half* y) {
  CNNOPS_DYNAMIC_SHARED(Half, row);
  if (cuda::cluster_rank() == 0) {
    twice(x, y);
    if (thread() == 0) publish(row);
  }
  cuda::cluster_sync();
  if (cuda::cluster_rank() == 1) touch(kFaulty ? published() : row, y, 0);
  cuda::cluster_sync();
}

// These stand for accesses that nothing reports before they happen.
template <bool kFaulty>
__global__ CNNOPS_UNTRACED void unseen_write_beyond_the_end(const Half* x, Half* y) {
  twice(x, y);
  if (kFaulty && thread() == 0) y[kCount].bits = 0;
}

template <bool kFaulty>
__global__ CNNOPS_UNTRACED void unseen_write_before_the_start(const Half* x, Half* y) {
  twice(x, y);
  if (kFaulty && thread() == 0) y[-1].bits = 0;
}

template <bool kFaulty>
__global__ void element_left_out(const Half* x, Half* y) {
  if (!kFaulty || thread() != kCount - 1) twice(x, y);
}

struct Fault {
  const char* name;
  void (*sound)(const Half* x, Half* y);
  void (*faulty)(const Half* x, Half* y);
  unsigned cluster = 1;
};

#define CNNOPS_FAULT(name) {#name, name<false>, name<true>}
constexpr Fault kFaults[] = {
    CNNOPS_FAULT(read_beyond_the_end),
    CNNOPS_FAULT(read_before_the_start),
    CNNOPS_FAULT(read_far_beyond_the_end),
    CNNOPS_FAULT(write_beyond_the_end),
    CNNOPS_FAULT(write_before_the_start),
    CNNOPS_FAULT(write_to_an_input),
    CNNOPS_FAULT(vector_read_across_the_end),
    CNNOPS_FAULT(async_copy_across_the_end),
    CNNOPS_FAULT(async_copy_beyond_shared_memory),
    CNNOPS_FAULT(shared_read_before_the_start),
    CNNOPS_FAULT(shared_read_beyond_the_end),
    CNNOPS_FAULT(read_beyond_a_shared_variable),
    CNNOPS_FAULT(ldmatrix_beyond_shared_memory),
    CNNOPS_FAULT(unseen_write_beyond_the_end),
    CNNOPS_FAULT(unseen_write_before_the_start),
    CNNOPS_FAULT(element_left_out),
    CNNOPS_FAULT(tma_load_beyond_the_end),
    {"read_of_another_blocks_memory", read_of_another_blocks_memory<false>, read_of_another_blocks_memory<true>, 2},
};
#undef CNNOPS_FAULT

constexpr int kWarp = 32;

__global__ void float4_row(const float* x, float* y) {
  reinterpret_cast<float4*>(y)[thread()] = reinterpret_cast<const float4*>(x)[thread()];
}
__global__ void float_row(const float* x, float* y) { y[thread()] = x[thread()]; }
__global__ void every_second_float(const float* x, float* y) { y[thread()] = x[2 * thread()]; }
__global__ void one_float_for_all(const float* x, float* y) { y[thread()] = x[0]; }
__global__ void row_across_a_sector(const float* x, float* y) { y[thread()] = x[thread() + 1]; }

// The second time around, the same sectors come from L2.
__global__ void row_twice(const float* x, float* y) {
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    sum += x[thread()];
    __syncthreads();
  }
  y[thread()] = sum;
}

// Lane t reads t + 1 rows: request i has the lanes from i on.
__global__ void triangle(const float* x, float* y) {
  float sum = 0;
  for (int i = 0; i <= thread(); ++i) sum += x[i * kWarp + thread()];
  y[thread()] = sum;
}

// Written by rows and read by columns; pitch 33 puts the elements of a column into different banks.
template <int kPitch>
void transpose(const float* x, float* y) {
  CNNOPS_DYNAMIC_SHARED(float, tile);
  for (int row = 0; row < kWarp; ++row) tile[row * kPitch + thread()] = x[row * kWarp + thread()];
  __syncwarp();
  for (int row = 0; row < kWarp; ++row) y[row * kWarp + thread()] = tile[thread() * kPitch + row];
}
__global__ void column_of_pitch_32(const float* x, float* y) { transpose<32>(x, y); }
__global__ void column_of_pitch_33(const float* x, float* y) { transpose<33>(x, y); }

__global__ void shared_float4_row(const float*, float*) {
  CNNOPS_DYNAMIC_SHARED(float4, row);
  row[thread()] = float4{0, 0, 0, 0};
}
// Rows of 16 bytes, 128 apart: eight lanes of a pass want the same four banks.
__global__ void shared_float4_column(const float*, float*) {
  CNNOPS_DYNAMIC_SHARED(float4, row);
  row[8 * thread()] = float4{0, 0, 0, 0};
}

__global__ void async_row(const float* x, float*) {
  CNNOPS_DYNAMIC_SHARED(float, row);
  cuda::copy_async_16(row + 4 * thread(), x + 4 * thread(), thread() < kWarp / 2);
  cuda::commit_async();
  cuda::wait_async<0>();
}

template <int kPitchBytes>
void load_matrices() {
  CNNOPS_DYNAMIC_SHARED(char, tile);
  uint32_t words[4];
  cuda::ldmatrix_x4<false>(words, tile + thread() * kPitchBytes);
}
__global__ void ldmatrix_of_pitch_16(const float*, float*) { load_matrices<16>(); }
__global__ void ldmatrix_of_pitch_128(const float*, float*) { load_matrices<128>(); }
__global__ void ldmatrix_of_pitch_144(const float*, float*) { load_matrices<144>(); }

__global__ void one_mma(const float*, float*) {
  float sum[4] = {};
  const uint32_t a[4] = {};
  cuda::mma_m16n8k16<Half>(sum, a, 0, 0);
}
__global__ void one_mma_tf32(const float*, float*) {
  float sum[4] = {};
  const uint32_t a[4] = {};
  cuda::mma_m16n8k8_tf32(sum, a, 0, 0);
}

struct Measured {
  const char* name;
  void (*kernel)(const float* x, float* y);
};

#define CNNOPS_MEASURED(name) \
  Measured { #name, name }
constexpr Measured kMeasured[] = {
    CNNOPS_MEASURED(float4_row),
    CNNOPS_MEASURED(float_row),
    CNNOPS_MEASURED(every_second_float),
    CNNOPS_MEASURED(one_float_for_all),
    CNNOPS_MEASURED(row_across_a_sector),
    CNNOPS_MEASURED(row_twice),
    CNNOPS_MEASURED(triangle),
    CNNOPS_MEASURED(column_of_pitch_32),
    CNNOPS_MEASURED(column_of_pitch_33),
    CNNOPS_MEASURED(shared_float4_row),
    CNNOPS_MEASURED(shared_float4_column),
    CNNOPS_MEASURED(async_row),
    CNNOPS_MEASURED(ldmatrix_of_pitch_16),
    CNNOPS_MEASURED(ldmatrix_of_pitch_128),
    CNNOPS_MEASURED(ldmatrix_of_pitch_144),
    CNNOPS_MEASURED(one_mma),
    CNNOPS_MEASURED(one_mma_tf32),
};
#undef CNNOPS_MEASURED

}  // namespace

std::vector<std::string> memory_fault_names() {
  std::vector<std::string> names;
  for (const Fault& fault : kFaults) names.push_back(fault.name);
  return names;
}

bool run_memory_fault(const std::string& name, bool faulty) {
  for (const Fault& fault : kFaults) {
    if (name != fault.name) continue;
    alignas(16) Half x[kCount], y[kCount];
    for (int t = 0; t < kCount; ++t) cuda::from_float(static_cast<float>(t), x[t]);
    GuardedCall call(fault.name);
    const auto* const from = static_cast<const Half*>(call.in("x", x, sizeof x));
    auto* const to = static_cast<Half*>(call.out("y", y, sizeof y));
    const auto kernel = faulty ? fault.faulty : fault.sound;
    launch(
        fault.name, dim3(fault.cluster), dim3(kThreads), 2 * kThreads * sizeof(Half),
        [=]() CNNOPS_UNTRACED { kernel(from, to); }, fault.cluster);
    call.finish();
    for (int t = 0; t < kCount; ++t)
      if (!(cuda::to_float(y[t]) == 2 * static_cast<float>(t))) return false;
    return true;
  }
  throw std::invalid_argument("no such fault: " + name);
}

std::vector<std::string> traffic_names() {
  std::vector<std::string> names;
  for (const Measured& each : kMeasured) names.push_back(each.name);
  return names;
}

void run_traffic(const std::string& name) {
  for (const Measured& each : kMeasured) {
    if (name != each.name) continue;
    constexpr size_t kFloats = 2 * kWarp * kWarp, kSharedBytes = kWarp * 144;
    alignas(128) static float x[kFloats], y[kFloats];
    const auto kernel = each.kernel;
    launch(each.name, dim3(1), dim3(kWarp), kSharedBytes, [=]() CNNOPS_UNTRACED { kernel(x, y); });
    return;
  }
  throw std::invalid_argument("no such kernel: " + name);
}

}  // namespace cnnops::simt
