// What memory holds that nothing was written to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cnnops::simt {

// NaN in double, float, half and bfloat16, and no value that a kernel is likely to write.
constexpr uint16_t kPoison = 0xffa5;

constexpr unsigned char poison_at(size_t offset) { return static_cast<unsigned char>(kPoison >> (offset % 2 ? 8 : 0)); }

inline void poison(unsigned char* begin, size_t bytes) {
  for (size_t i = 0; i + 1 < bytes; i += 2) std::memcpy(begin + i, &kPoison, 2);
  if (bytes % 2) begin[bytes - 1] = poison_at(bytes - 1);
}

}  // namespace cnnops::simt
