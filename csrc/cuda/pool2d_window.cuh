// Where a pool's windows lie, the offsets of the taps that it keeps, and how both and the tensors are loaded and
// stored, for all kernels that pool.
#pragma once

#include <cstring>
#include <type_traits>

#include "vector.cuh"

namespace cnnops::cuda {

// A half-open range along one axis; empty where end <= begin.
struct Span {
  int begin, end;
  __device__ int size() const { return end - begin; }
};

__device__ __forceinline__ int lesser(int64_t a, int b) { return a < b ? static_cast<int>(a) : b; }
__device__ __forceinline__ int greater(int64_t a, int b) { return a > b ? static_cast<int>(a) : b; }
// Of numbers that 32 bits hold.
__device__ __forceinline__ int quotient(int64_t n, int by) {
  return static_cast<int>(static_cast<uint32_t>(n) / static_cast<uint32_t>(by));
}

// As split() of launch.h, for numbers from 0 on. Division in 64 bits is a call, for which a kernel would have to save
// its registers; this one is bit by bit, and hardly ever needed.
__device__ __forceinline__ Split divided(int64_t n, int64_t by) {
  const auto number = static_cast<uint64_t>(n), divisor = static_cast<uint64_t>(by);
  if ((number | divisor) >> 32 == 0) {
    const auto low = static_cast<uint32_t>(number), low_by = static_cast<uint32_t>(divisor);
    return {low / low_by, low % low_by};
  }
  uint64_t rest = 0, found = 0;
  CNNOPS_NO_UNROLL
  for (int bit = 63; bit >= 0; --bit) {
    rest = rest << 1 | (number >> bit & 1);
    found = found << 1 | (rest >= divisor ? 1 : 0);
    if (rest >= divisor) rest -= divisor;
  }
  return {static_cast<int64_t>(found), static_cast<int64_t>(rest)};
}

// What one axis has of a window: its taps lie `dilation` apart from `first` on, and those of `inside` in the input.
struct Window {
  int first, taps;
  Span inside;
};

// One axis of a pool. Without a kernel it is adaptive: window p is floor(p*in/out) .. ceil((p+1)*in/out) - 1.
struct PoolAxis {
  int in, out, kernel, stride, pad, dilation;

  __device__ Window window(int p) const {
    if (!kernel) {
      const Span all = covered(p, in, out);
      return {all.begin, all.size(), {0, all.size()}};
    }
    const int first = p * stride - pad, room = in - 1 - first;
    const int begin = first >= 0 ? 0 : quotient(int64_t{dilation} - 1 - first, dilation);
    const int end = room < 0 ? begin : lesser(int64_t{quotient(room, dilation)} + 1, kernel);
    return {first, kernel, {begin, end}};
  }
  // Of a window's taps, the first that lies at `h` or beyond.
  __device__ int tap_from(const Window& window, int h) const {
    const int64_t distance = int64_t{h} - window.first;
    return distance <= 0 ? 0 : quotient(distance + dilation - 1, dilation);
  }

  // The windows that span input h; dilation may make a window skip it.
  __device__ Span windows_over(int h) const {
    if (!kernel) return covered(h, out, in);  // the same rule with in and out exchanged
    const int64_t reach = int64_t{h} + pad, extent = (int64_t{kernel} - 1) * dilation + 1;
    return {reach < extent ? 0 : quotient(reach - extent, stride) + 1,
            lesser(int64_t{quotient(reach, stride)} + 1, out)};
  }
  // The tap by which window p, one of windows_over(h), sees input h; -1 where it skips it.
  __device__ int tap_of(int p, int h) const {
    const int distance = h - (kernel ? p * stride - pad : covered(p, in, out).begin),
              tap = quotient(distance, dilation);
    return tap * dilation == distance ? tap : -1;
  }

  // Of an average, which has no dilation: the inputs of window p, and those and the padding's. A ceil_mode window may
  // reach beyond the padded edge, and torch counts no such tap.
  __device__ int size(int p) const { return window(p).inside.size(); }
  __device__ int padded_size(int p) const {
    return kernel ? lesser(int64_t{in} + pad - (p * stride - pad), kernel) : size(p);
  }

 private:
  // floor(i * of / among) .. ceil((i + 1) * of / among) - 1
  __device__ static Span covered(int64_t i, int of, int among) {
    return {static_cast<int>(divided(i * of, among).quotient),
            static_cast<int>(divided((i + 1) * of + among - 1, among).quotient)};
  }
};

struct Pool {
  PoolAxis rows, cols;
  int64_t N, C;
  int64_t divisor_override;
  bool count_include_pad;

  explicit Pool(const Pool2dProblem& p)
      : rows{p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h},
        cols{p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w},
        N(p.N),
        C(p.C),
        divisor_override(p.divisor_override),
        count_include_pad(p.count_include_pad) {}

  __host__ __device__ int64_t inputs() const { return N * C * rows.in * cols.in; }
  __host__ __device__ int64_t outputs() const { return N * C * rows.out * cols.out; }
};

// The first tap of window (p, q), which an output keeps if nothing is greater; 0 for a window without one.
__device__ __forceinline__ int first_tap(const Window& rows, const Window& cols) {
  return rows.inside.size() > 0 && cols.inside.size() > 0 ? rows.inside.begin * cols.taps + cols.inside.begin : 0;
}

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

// kWidth neighbouring channels in memory and in registers: 16 bytes, 8 of a 16-bit type, or one element.
template <class T, int kWidth>
using Raw = std::conditional_t<kWidth == 1, T, std::conditional_t<kWidth == kVector<T>, Vector<T>, Quad<T>>>;

template <int kWidth, class T>
__device__ __forceinline__ Raw<T, kWidth> fetch(const T* from) {
  if constexpr (kWidth == 1) {
    return *from;
  } else if constexpr (kWidth == kVector<T>) {
    return load(from, kVector<T>);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    Quad<T> raw;
    const unsigned both[] = {words.x, words.y};
    std::memcpy(&raw, both, sizeof raw);
    return raw;
  }
}
template <int kWidth, class T>
__device__ __forceinline__ float number(const Raw<T, kWidth>& raw, int i) {
  if constexpr (kWidth == 1)
    return to_float(raw);
  else
    return to_float(raw.at[i]);
}
template <int kWidth, class T>
__device__ __forceinline__ void write_numbers(const float (&values)[kWidth], T* to) {
  if constexpr (kWidth == 1) {
    from_float(values[0], *to);
  } else {
    Raw<T, kWidth> packed;
    CNNOPS_UNROLL
    for (int i = 0; i < kWidth; ++i) from_float(values[i], packed.at[i]);
    if constexpr (kWidth == kVector<T>) {
      store(packed, to, kVector<T>);
    } else {
      unsigned words[2];
      std::memcpy(words, &packed, sizeof words);
      *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
    }
  }
}

// As numbers of kWidth neighbours lie in registers, and in memory 4 to 16 bytes at a time.
template <int kWidth, class O>
__device__ __forceinline__ void store_taps(const int (&taps)[kWidth], O* to) {
  if constexpr (kWidth == 1) {
    *to = static_cast<O>(taps[0]);
  } else if constexpr (sizeof(O) == 4) {
    CNNOPS_UNROLL
    for (int i = 0; i < kWidth; i += 4) {
      const uint4 four{static_cast<unsigned>(taps[i]), static_cast<unsigned>(taps[i + 1]),
                       static_cast<unsigned>(taps[i + 2]), static_cast<unsigned>(taps[i + 3])};
      store_16(to + i, &four);
    }
  } else {
    const auto word = [&](int i) {
      return static_cast<unsigned>(taps[i] | taps[i + 1] << 8 | taps[i + 2] << 16 | taps[i + 3] << 24);
    };
    if constexpr (kWidth == 4)
      *reinterpret_cast<unsigned*>(to) = word(0);
    else
      *reinterpret_cast<uint2*>(to) = uint2{word(0), word(4)};
  }
}

template <int kWidth, class O>
__device__ __forceinline__ void load_taps(const O* from, int (&taps)[kWidth]) {
  if constexpr (kWidth == 1) {
    taps[0] = static_cast<int>(*from);
  } else if constexpr (sizeof(O) == 4) {
    CNNOPS_UNROLL
    for (int i = 0; i < kWidth; i += 4) {
      const uint4 four = load_16(reinterpret_cast<const uint4*>(from + i));
      taps[i] = static_cast<int>(four.x), taps[i + 1] = static_cast<int>(four.y);
      taps[i + 2] = static_cast<int>(four.z), taps[i + 3] = static_cast<int>(four.w);
    }
  } else {
    uint2 words{};
    if constexpr (kWidth == 4)
      words.x = *reinterpret_cast<const unsigned*>(from);
    else
      words = *reinterpret_cast<const uint2*>(from);
    CNNOPS_UNROLL
    for (int i = 0; i < kWidth; ++i) taps[i] = static_cast<int>((i < 4 ? words.x : words.y) >> 8 * (i % 4) & 0xff);
  }
}

// f(O{}) for the type of a pool's offsets.
template <class F>
void for_offset(const Pool2dProblem& p, F&& f) {
  if (int64_t{p.R} * p.S <= 256)
    f(uint8_t{});
  else
    f(int32_t{});
}

}  // namespace cnnops::cuda
