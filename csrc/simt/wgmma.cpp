// Products of a warpgroup. A product runs when a wait needs it (in random schedules, some at once); until that wait its
// sums hold NaN. Each lane goes through the same steps, and only a wait makes it wait for the others.

#include <algorithm>
#include <bit>
#include <cstring>

#include "device.h"
#include "trace.h"

namespace cnnops::simt {
namespace {

constexpr int kRows = 64, kDepth = 16, kMaxColumns = 256;
constexpr uint32_t kPoisonBits = 0xffa5ffa5u;
constexpr size_t kGroup = 1024, kRow = 128, kChunk = 16;  // eight rows; one; eight numbers

// A matrix descriptor's fields, in bytes.
struct Operand2D {
  size_t start, leading, stride;
  bool is_mn_major;
  int rows;  // along m or n
};

Operand2D decode(uint64_t descriptor, bool is_mn_major, int rows) {
  return {(descriptor & 0x3fff) << 4, (descriptor >> 16 & 0x3fff) << 4, (descriptor >> 32 & 0x3fff) << 4, is_mn_major,
          rows};
}

// Calls visit(begin of a group in the window) for each group of 8 rows of 128 bytes that the operand reads of.
template <class Visit>
void for_each_group(const Operand2D& operand, const Visit& visit) {
  const size_t start = operand.start / kRow * kRow;
  if (!operand.is_mn_major) {
    for (int row = 0; row < operand.rows; row += 8) visit(start + static_cast<size_t>(row / 8) * operand.stride);
    return;
  }
  for (int mn = 0; mn < operand.rows; mn += 64)
    for (size_t k = 0; k < kDepth / 8; ++k)
      visit(start + static_cast<size_t>(mn / 64) * operand.leading + k * operand.stride);
}

template <class Visit>
void for_each_group(const Product& product, const Visit& visit) {
  const WarpgroupProduct& in = product.operands;
  if (!product.from_registers) for_each_group(decode(in.a_descriptor, in.a_is_mn_major, kRows), visit);
  for_each_group(decode(in.b_descriptor, in.b_is_mn_major, in.n), visit);
}

float number(Operand type, uint16_t bits) { return type == Operand::kHalf ? half_value(bits) : bfloat16_value(bits); }

// Calls visit(offset in the window, row along m or n, k) for each eight numbers that lie together in the operand: along
// k, or along m or n.
template <class Visit>
void for_each_chunk(const Operand2D& operand, const Visit& visit) {
  const auto place = [&](size_t outer, int row, int number) {
    const size_t offset = operand.start + outer + static_cast<size_t>(row % 8) * kRow + static_cast<size_t>(number) * 2;
    return offset ^ ((offset >> 7 & 7) << 4);
  };
  if (!operand.is_mn_major) {
    for (int row = 0; row < operand.rows; ++row)
      for (int k = 0; k < kDepth; k += 8) visit(place(static_cast<size_t>(row / 8) * operand.stride, row, k), row, k);
    return;
  }
  for (int k = 0; k < kDepth; ++k)
    for (int mn = 0; mn < operand.rows; mn += 8)
      visit(place(static_cast<size_t>(mn / 64) * operand.leading + static_cast<size_t>(k / 8) * operand.stride, k,
                  mn % 64),
            mn, k);
}

void check_visible(const Product& product, const Block& block, size_t place) {
  const Chunk& chunk = block.chunks[(place - kWindowBase) / kChunk];
  if (!chunk.writer) return;
  const std::string writer = "thread " + std::to_string(chunk.writer - 1) + " has written an operand, and ";
  if (!chunk.fenced) fail_at("wgmma", product.where, writer + "executed no fence_proxy_async since");
  if (chunk.fenced_at == block.epoch)
    fail_at("wgmma", product.where, writer + "passed no barrier after its fence_proxy_async");
}

// Calls store(row along m or n, k, number).
template <class Store>
void read_operand(const Product& product, const Block& block, const Operand2D& operand, const Store& store) {
  for_each_chunk(operand, [&](size_t place, int row, int k) {
    if (block.any_chunk) check_visible(product, block, place);
    uint16_t bits[8];
    std::memcpy(bits, block.memory.at(place), sizeof bits);
    for (int i = 0; i < 8; ++i) {
      const float v = number(product.operands.type, bits[i]);
      operand.is_mn_major ? store(row + i, k, v) : store(row, k + i, v);
    }
  });
}

using Vector = float __attribute__((vector_size(16), may_alias));

// sums[64][n] (+)= a[64][16] * b[16][n]: each product's sum along k in order, added to what was there.
void multiply(const float* a, const float* b, float* sums, int n, bool accumulate) {
  constexpr int kVectors = 4, kWidth = 4 * kVectors;
  for (int column = 0; column < n; column += kWidth)
    for (int row = 0; row < kRows; row += 2) {
      Vector sum[2][kVectors] = {};
      for (int k = 0; k < kDepth; ++k) {
        const auto* const from = reinterpret_cast<const Vector*>(b + k * n + column);
        const float a0 = a[row * kDepth + k], a1 = a[(row + 1) * kDepth + k];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          sum[0][i] += a0 * from[i];
          sum[1][i] += a1 * from[i];
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        auto* const to = reinterpret_cast<Vector*>(sums + (row + r) * n + column);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) to[i] = accumulate ? to[i] + sum[r][i] : sum[r][i];
      }
    }
}

void run(Product& product, const Block& block) {
  alignas(16) static float a[kRows * kDepth], b[kDepth * kMaxColumns];
  const WarpgroupProduct& in = product.operands;
  product.done = true;
  if (!product.from_registers)
    read_operand(product, block, decode(in.a_descriptor, in.a_is_mn_major, kRows),
                 [&](int row, int k, float v) { a[row * kDepth + k] = v; });
  read_operand(product, block, decode(in.b_descriptor, in.b_is_mn_major, in.n),
               [&](int column, int k, float v) { b[k * in.n + column] = v; });
  trace::product(kRows, in.n, kDepth);
  const int shared_columns = in.n + (product.from_registers ? 0 : kRows);
  trace::bulk_shared(static_cast<size_t>(shared_columns * kDepth) * sizeof(uint16_t));
  multiply(product.from_registers ? product.a : a, b, product.accumulator->sums.get(), in.n, in.accumulate);
}

// The sum that lane t of a warpgroup holds as d[i], in a tile of n columns.
int place_of(int t, int i, int n) {
  const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
  return row * n + column;
}

Warpgroup& my_warpgroup() {
  const Thread& me = *device.current;
  return me.block->warpgroups[me.index / kWarpgroup];
}

// This lane's next step. Others of the warpgroup that have made it must have made the same.
Step& take_step(const char* name, uint64_t argument, Where where) {
  const Thread& me = *device.current;
  Warpgroup& group = my_warpgroup();
  require_sm90(name, where);
  if ((me.index / kWarpgroup + 1) * kWarpgroup > device.thread_count)
    fail_at(name, where, "the block has no whole warpgroup of 128 threads here");
  unsigned& next = group.next_step[me.index % kWarpgroup];
  if (next == group.steps.size()) group.steps.push_back({name, argument, where, 0, nullptr});
  Step& step = group.steps[next++];
  if (step.name != name && std::strcmp(step.name, name))
    fail_at(name, where, std::string("others of its warpgroup execute ") + step.name + " at " + text(step.where));
  if (step.argument != argument || step.where.line() != where.line())
    fail_at(name, where, "others of its warpgroup execute it at " + text(step.where) + " or with other operands");
  ++step.arrived;
  release(&group.syncs[group.waits % 2]);
  return step;
}

void check_operands(const Product& product) {
  const Block& block = *device.current->block;
  const WarpgroupProduct& in = product.operands;
  const auto check_swizzle = [&](uint64_t descriptor) {
    if (descriptor >> 62 != 1) fail_at("wgmma", product.where, "the descriptor's swizzle is not 128 bytes");
  };
  check_swizzle(in.b_descriptor);
  if (!product.from_registers) check_swizzle(in.a_descriptor);
  for_each_group(product, [&](size_t begin) {
    if (begin < kWindowBase || begin + kGroup > block.memory.window_end())
      fail_at("wgmma", product.where,
              "an operand reaches beyond dynamic shared memory: rows at offset " +
                  std::to_string(static_cast<int64_t>(begin - kWindowBase)));
    for (const Landing& each : block.landings)
      if (begin < each.end && each.begin < begin + kGroup)
        fail_at("wgmma", product.where,
                "an operand is the destination of the copy issued at " + text(each.where) +
                    ", which no thread of the block has waited for");
  });
  if (!block.any_chunk) return;
  const auto check = [&](size_t place, int, int) { check_visible(product, block, place); };
  if (!product.from_registers) for_each_chunk(decode(in.a_descriptor, in.a_is_mn_major, kRows), check);
  for_each_chunk(decode(in.b_descriptor, in.b_is_mn_major, in.n), check);
}

Accumulator* find_accumulator(Warpgroup& group, const float* d, int n, unsigned lane) {
  for (const auto& each : group.accumulators)
    if (each->d[lane] == d && each->n == n) return each.get();
  if (group.spare.empty()) group.spare.push_back(std::make_unique<Accumulator>());
  group.accumulators.push_back(std::move(group.spare.back()));
  group.spare.pop_back();
  Accumulator& fresh = *group.accumulators.back();
  std::fill(std::begin(fresh.d), std::end(fresh.d), nullptr);
  fresh.n = n;
  fresh.products = 0;
  if (!fresh.sums) fresh.sums.reset(new float[kRows * kMaxColumns]);
  return &fresh;
}

Product& first_of_product(const WarpgroupProduct& in, Where where) {
  Warpgroup& group = my_warpgroup();
  if (!group.fenced) fail_at("wgmma", where, "no wgmma_fence since the warpgroup's last wait");
  Product& product = group.products.emplace_back();
  product.operands = in;
  product.group = group.committed;
  product.from_registers = in.a_registers != nullptr;
  product.done = false;
  product.lanes = 0;
  product.where = where;
  product.accumulator = find_accumulator(group, in.d, in.n, device.current->index % kWarpgroup);
  ++product.accumulator->products;
  check_operands(product);
  return product;
}

// The lane's part: its sums move to the tile and its fragment of a is kept.
void hand_in(Product& product, const WarpgroupProduct& in) {
  const int lane = static_cast<int>(device.current->index % kWarpgroup);
  Accumulator& accumulator = *product.accumulator;
  ++product.lanes;
  if (!accumulator.d[lane]) {
    accumulator.d[lane] = in.d;
    for (int i = 0; i < in.n / 2; ++i) {
      accumulator.sums[static_cast<size_t>(place_of(lane, i, in.n))] = in.d[i];
      in.d[i] = std::bit_cast<float>(kPoisonBits);
    }
  } else if (accumulator.d[lane] != in.d) {
    fail_at("wgmma", product.where, "the warpgroup's lanes do not agree on the sums");
  }
  if (!in.a_registers) return;
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 32 * 16 + lane % 32 / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8 + half;
      product.a[row * kDepth + k] = number(in.type, static_cast<uint16_t>(in.a_registers[i] >> 16 * half));
    }
}

bool same(const WarpgroupProduct& one, const WarpgroupProduct& other) {
  return one.n == other.n && one.type == other.type && !one.a_registers == !other.a_registers &&
         one.a_descriptor == other.a_descriptor && one.b_descriptor == other.b_descriptor &&
         one.a_is_mn_major == other.a_is_mn_major && one.b_is_mn_major == other.b_is_mn_major &&
         one.accumulate == other.accumulate;
}

void run_all(Warpgroup& group, int groups) {
  acquire(&group.syncs[group.waits % 2]);
  for (Product& product : group.products) {
    if (product.group >= groups || product.lanes < kWarpgroup) break;
    if (product.done) continue;
    const Block& block = *device.current->block;
    for_each_group(product, [&](size_t begin) {
      const Shown shown;
      note_read(block.memory.at(begin), kGroup);
    });
    run(product, block);
  }
}

// Sums that nothing under way adds to go back to their registers.
void hand_back(Warpgroup& group) {
  std::erase_if(group.accumulators, [&](std::unique_ptr<Accumulator>& each) {
    if (each->products) return false;
    for (int lane = 0; lane < static_cast<int>(kWarpgroup); ++lane)
      for (int i = 0; i < each->n / 2; ++i)
        each->d[lane][i] = each->sums[static_cast<size_t>(place_of(lane, i, each->n))];
    group.spare.push_back(std::move(each));
    return true;
  });
}

}  // namespace

void wgmma_fence(Where where) {
  if (disabled(Sync::kWgmmaFence)) return;
  const Hidden hidden;
  take_step("wgmma_fence", 0, where);
  my_warpgroup().fenced = true;
}

void wgmma(const WarpgroupProduct& in, Where where) {
  const Hidden hidden;
  Step& step = take_step("wgmma", static_cast<uint64_t>(in.n), where);
  if (!step.product)
    step.product = &first_of_product(in, where);
  else if (!same(step.product->operands, in))
    fail_at("wgmma", where, "the warpgroup's lanes do not agree on the operands");
  hand_in(*step.product, in);
  if (step.arrived == kWarpgroup && coin()) run_all(my_warpgroup(), INT32_MAX);
}

void wgmma_commit(Where where) {
  if (disabled(Sync::kWgmmaCommit)) return;
  const Hidden hidden;
  if (take_step("wgmma_commit", 0, where).arrived == 1) ++my_warpgroup().committed;
}

void wgmma_wait(int groups_left, Where where) {
  if (disabled(Sync::kWgmmaWait)) return;
  const Hidden hidden;
  Thread& me = *device.current;
  Warpgroup& group = my_warpgroup();
  void* const sync = &group.syncs[group.waits % 2];
  if (take_step("wgmma_wait", static_cast<uint64_t>(groups_left), where).arrived < kWarpgroup) {
    me.state = State::kInStep;
    me.waits_in = "wgmma_wait";
    me.where = where;
    group.waiting.add(me);
    suspend();
    acquire(sync);
    return;
  }
  const int complete = group.committed - groups_left;
  run_all(group, complete);
  while (!group.products.empty() && group.products.front().group < complete) {
    --group.products.front().accumulator->products;
    group.products.pop_front();
  }
  hand_back(group);
  release(sync);
  group.steps.clear();
  std::fill(std::begin(group.next_step), std::end(group.next_step), 0u);
  group.fenced = false;
  ++group.waits;
  group.waiting.wake_all();
}

void set_max_registers(int registers, bool increase, Where where) {
  const Hidden hidden;
  const char* const name = increase ? "increase_registers" : "decrease_registers";
  if (registers < 24 || registers > 256 || registers % 8)
    fail_at(name, where, std::to_string(registers) + " is no multiple of 8 from 24 to 256");
  take_step(name, static_cast<uint64_t>(registers), where);
}

const Product* reader_of(const Block& block, size_t begin, size_t end) {
  for (const Warpgroup& group : block.warpgroups)
    for (const Product& product : group.products) {
      bool reads = false;
      for_each_group(product, [&](size_t rows) { reads |= rows < end && begin < rows + kGroup; });
      if (reads) return &product;
    }
  return nullptr;
}

void check_warpgroup_exit(Block& block) {
  for (const Warpgroup& group : block.warpgroups) {
    if (!group.products.empty())
      fail_at("wgmma", group.products.front().where, "the block exits, and its warpgroup has not waited for this");
    for (const Step& step : group.steps)
      if (step.arrived != kWarpgroup)
        fail_at(step.name, step.where, "only " + std::to_string(step.arrived) + " of a warpgroup's 128 threads came");
  }
}

}  // namespace cnnops::simt
