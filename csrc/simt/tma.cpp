// Copies by the tensor memory accelerator. A tile lies in rows of 128 bytes; of an inner axis shorter than that, the
// rest of the row is left as it is. The 16-byte chunk at bits 4 to 6 of an offset in the window is exchanged by bits 7
// to 9.

#include <algorithm>
#include <cstring>

#include "device.h"
#include "trace.h"

namespace cnnops::simt {
namespace {

constexpr size_t kRow = 128, kChunk = 16, kTileAlignment = 1024;

size_t row_count(const TensorMap& map) {
  if (map.im2col) return map.pixels;
  size_t rows = 1;
  for (int axis = 1; axis < map.rank; ++axis) rows *= map.box[axis];
  return rows;
}

uint32_t row_elements(const TensorMap& map) { return map.im2col ? map.channels : map.box[0]; }
size_t tile_bytes(const TensorMap& map) { return row_count(map) * row_elements(map) * map.stride_bytes[0]; }

// The row of elements from `at` on along axis 0, and zeros beside the tensor.
void read_row(const TmaCopy& copy, const int64_t* at, unsigned char* row) {
  const TensorMap& map = copy.map;
  std::memset(row, 0, kRow);
  const auto* source = static_cast<const unsigned char*>(map.base);
  for (int axis = 1; axis < map.rank; ++axis) {
    if (at[axis] < 0 || at[axis] >= static_cast<int64_t>(map.extent[axis])) return;
    source += static_cast<uint64_t>(at[axis]) * map.stride_bytes[axis];
  }
  const int64_t begin = std::max<int64_t>(at[0], 0);
  const int64_t end = std::min<int64_t>(at[0] + row_elements(map), static_cast<int64_t>(map.extent[0]));
  if (begin >= end) return;
  const uint64_t size = map.stride_bytes[0];
  if (copy.reads)
    trace::bulk_global_read(source + static_cast<uint64_t>(begin) * size, static_cast<uint64_t>(end - begin) * size);
  std::memcpy(row + static_cast<uint64_t>(begin - at[0]) * size, source + static_cast<uint64_t>(begin) * size,
              static_cast<uint64_t>(end - begin) * size);
}

void write_row(Block& target, size_t offset, const unsigned char* row, size_t bytes) {
  for (size_t chunk = 0; chunk < bytes; chunk += kChunk) {
    const size_t place = (offset + chunk) ^ ((offset >> 7 & 7) << 4);
    std::memcpy(target.memory.at(place), row + chunk, kChunk);
  }
}

void read_tiled(const TmaCopy& copy) {
  const TensorMap& map = copy.map;
  const size_t rows = row_count(map), bytes = row_elements(map) * map.stride_bytes[0];
  unsigned char row[kRow];
  for (size_t i = 0; i < rows; ++i) {
    int64_t at[5] = {copy.at[0]};
    size_t rest = i;
    for (int axis = 1; axis < map.rank; ++axis) {
      at[axis] = copy.at[axis] + static_cast<int64_t>(rest % map.box[axis]) * map.element_stride[axis];
      rest /= map.box[axis];
    }
    read_row(copy, at, row);
    write_row(*copy.target, copy.destination + i * kRow, row, bytes);
  }
}

// Base pixels walk through the bounding box, W fastest, then H, then on to the next image.
void read_im2col(const TmaCopy& copy) {
  const TensorMap& map = copy.map;
  const int64_t last_w = static_cast<int64_t>(map.extent[1]) - 1 + map.upper[0];
  const int64_t last_h = static_cast<int64_t>(map.extent[2]) - 1 + map.upper[1];
  const size_t bytes = row_elements(map) * map.stride_bytes[0];
  int64_t w = copy.at[1], h = copy.at[2], n = copy.at[3];
  unsigned char row[kRow];
  for (size_t i = 0; i < map.pixels; ++i) {
    const int64_t at[] = {copy.at[0], w + copy.offset_w, h + copy.offset_h, n};
    read_row(copy, at, row);
    write_row(*copy.target, copy.destination + i * kRow, row, bytes);
    w += map.element_stride[1];
    if (w <= last_w) continue;
    w = map.lower[0];
    h += map.element_stride[2];
    if (h <= last_h) continue;
    h = map.lower[1];
    ++n;
  }
}

void land(TmaCopy& copy) {
  Block& target = *copy.target;
  const size_t rows_bytes = row_count(copy.map) * kRow;
  trace::bulk_shared(tile_bytes(copy.map));
  copy.map.im2col ? read_im2col(copy) : read_tiled(copy);
  const size_t first = (copy.destination - kWindowBase) / kChunk;
  std::fill_n(target.chunks.begin() + static_cast<std::ptrdiff_t>(first), rows_bytes / kChunk, Chunk{});
  complete_bytes(copy, target.memory.at(copy.destination), rows_bytes, tile_bytes(copy.map));
}

void check_place(const char* name, const Block& target, size_t begin, size_t end, Where where) {
  const std::string whose = &target == device.current->block ? "" : " of block " + std::to_string(target.rank);
  for (const Landing& each : target.landings)
    if (begin < each.end && each.begin < end)
      fail_at(
          name, where,
          "the copy issued at " + text(each.where) + " to the same shared memory" + whose + " has not been waited for");
  if (const Product* const reader = reader_of(target, begin, end))
    fail_at(
        name, where,
        "the wgmma at " + text(reader->where) + " still reads the shared memory" + whose + " that this copy writes");
}

void issue(const char* name, TmaCopy copy, void* destination, uint16_t blocks) {
  const Where where = copy.where;
  Block& mine = *device.current->block;
  uint64_t* const barrier = copy.barrier;
  require_sm90(name, where);
  const size_t bytes = row_count(copy.map) * kRow;
  if (!mine.memory.dynamic_holds(destination, 1))
    fail_at(name, where, "the destination is not in dynamic shared memory");
  copy.destination = mine.memory.offset(destination);
  if (copy.destination % kTileAlignment) fail_at(name, where, "the destination is not aligned to 1024 bytes");
  if (copy.destination + bytes > mine.memory.window_end())
    fail_at(name, where,
            "a tile of " + std::to_string(bytes) + " bytes at offset " +
                std::to_string(copy.destination - kWindowBase) + " reaches beyond the " +
                std::to_string(mine.memory.dynamic_bytes()) + " bytes of dynamic shared memory");
  const unsigned mask = blocks ? blocks : 1u << mine.rank;
  if (mask >> device.cluster)
    fail_at(name, where, "the mask names blocks beyond the cluster's " + std::to_string(device.cluster));
  for (unsigned rank = 0; rank < device.cluster; ++rank) {
    if (!(mask >> rank & 1)) continue;
    Block& target = device.blocks[rank];
    Mbarrier& counted = find_for_async(name, target, barrier, where);
    check_place(name, target, copy.destination, copy.destination + bytes, where);
    copy.target = &target;
    copy.barrier = counted.word;
    copy.foreign = &target != &mine;
    copy.sync = reinterpret_cast<char*>(counted.word) + 1;
    release(copy.sync);
    copy.reads = &target == &device.blocks[__builtin_ctz(mask)];
    target.landings.push_back({copy.destination, copy.destination + bytes, counted.word, false, 0, where});
    device.tma_copies.push_back(copy);
  }
  while (coin() && land_one()) {
  }
}

}  // namespace

bool land_one() {
  const Hidden hidden;
  if (device.tma_copies.empty()) return false;
  const size_t count = device.tma_copies.size();
  const size_t which = device.order == Order::kForward    ? 0
                       : device.order == Order::kReversed ? count - 1
                                                          : next_random() % count;
  TmaCopy copy = device.tma_copies[which];
  device.tma_copies.erase(device.tma_copies.begin() + static_cast<std::ptrdiff_t>(which));
  land(copy);
  return true;
}

void tma_load_tiled(void* destination, const TensorMap& map, uint64_t* barrier, const int* coordinates, uint16_t blocks,
                    Where where) {
  const Hidden hidden;
  constexpr const char* kName = "tma_load";
  if (map.im2col) fail_at(kName, where, "the tensor map is one for columns of pixels");
  TmaCopy copy{map, {}, 0, 0, nullptr, 0, barrier, false, where, nullptr, true};
  std::copy_n(coordinates, map.rank, copy.at);
  issue(kName, copy, destination, blocks);
}

void tma_load_im2col(void* destination, const TensorMap& map, uint64_t* barrier, int c, int w, int h, int n,
                     uint16_t offset_w, uint16_t offset_h, uint16_t blocks, Where where) {
  const Hidden hidden;
  constexpr const char* kName = "tma_load_im2col";
  if (!map.im2col) fail_at(kName, where, "the tensor map is one for boxes");
  if (offset_w > 255 || offset_h > 255) fail_at(kName, where, "an offset exceeds 255");
  if (w < map.lower[0] || w > static_cast<int64_t>(map.extent[1]) - 1 + map.upper[0] || h < map.lower[1] ||
      h > static_cast<int64_t>(map.extent[2]) - 1 + map.upper[1])
    fail_at(kName, where,
            "the base pixel (" + std::to_string(w) + ", " + std::to_string(h) + ") is beside the map's bounding box");
  issue(kName, {map, {c, w, h, n}, offset_w, offset_h, nullptr, 0, barrier, false, where, nullptr, true}, destination,
        blocks);
}

}  // namespace cnnops::simt
