// Copies of a 4-d tensor between any two layouts and dtypes.
//
//   dst[i] = src[i]
//
// Layout     any strides; src may repeat elements (stride 0). Axes are put in the order of dst and merged where both
//            sides are dense, so that every NCHW <-> NHWC copy becomes N transposes of a matrix, and a copy between
//            equal layouts one row.
// Ownership  One index of parallel_for owns about kChunk elements of dst.
// Traffic    src and dst once each. Transposes go through registers, square by square, so that each cache line is read
//            once and written whole, whatever the strides' alignment does to the cache's sets.
#include <algorithm>
#include <utility>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kChunk = 32768;

// A 16-bit number that is only moved: its bits ride in the lanes of a float vector.
struct Bits16 {
  uint16_t bits;
};
inline Vec<float> load(const Bits16* p) {
  typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2)));
  Bits b;
  std::memcpy(&b, p, sizeof b);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(b, Vec<uint32_t>));
}
inline void store(Bits16* p, Vec<float> v) {
  typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2)));
  const Bits b = __builtin_convertvector(reinterpret_cast<Vec<uint32_t>>(v), Bits);
  std::memcpy(p, &b, sizeof b);
}
using cnnops::cpu::CNNOPS_ISA::load;
using cnnops::cpu::CNNOPS_ISA::store;

template <class S, class D>
void convert(S from, D& to) {
  if constexpr (std::is_same_v<S, D>)
    to = from;
  else
    from_acc(static_cast<Acc<D>>(to_acc(from)), to);
}

template <class S, class D>
constexpr bool kSameLanes = kLanes<S> == kLanes<D>;

struct Axis {
  int64_t size, src, dst;  // extent and strides
};

// The copy's axes, outermost first in dst; axes[3] is the innermost. Those that merging freed have size 1.
struct Plan {
  Axis axes[4];
};

Plan plan_of(const CopyProblem& problem) {
  Axis axes[4];
  int count = 0;
  for (int i = 0; i < 4; ++i)
    if (problem.size[i] > 1) axes[count++] = {problem.size[i], problem.src_stride[i], problem.dst_stride[i]};
  for (int i = 1; i < count; ++i)
    for (int j = i; j > 0 && axes[j - 1].dst < axes[j].dst; --j) std::swap(axes[j - 1], axes[j]);

  Plan plan{{{1, 0, 0}, {1, 0, 0}, {1, 0, 0}, {1, 1, 1}}};
  int slot = 4;
  for (int i = count - 1; i >= 0; --i) {
    Axis* inner = slot < 4 ? &plan.axes[slot] : nullptr;
    if (inner && axes[i].dst == inner->dst * inner->size && axes[i].src == inner->src * inner->size)
      inner->size *= axes[i].size;
    else
      plan.axes[--slot] = axes[i];
  }
  return plan;
}

// body(src, dst) for each pair of the first three axes' offsets whose flat index lies in [begin, end).
template <class Body>
void for_rows(const Plan& plan, int64_t begin, int64_t end, const Body& body) {
  const auto& [a, b, c, row] = plan.axes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t k = i % c.size, j = i / c.size % b.size, n = i / c.size / b.size;
    body(n * a.src + j * b.src + k * c.src, n * a.dst + j * b.dst + k * c.dst);
  }
}

template <class S, class D>
void copy_row(const S* src, D* dst, int64_t count) {
  if constexpr (std::is_same_v<S, D>) {
    std::memcpy(dst, src, static_cast<size_t>(count) * sizeof(D));
  } else {
    int64_t i = 0;
    if constexpr (kSameLanes<S, D>)
      for (; i + kLanes<D> <= count; i += kLanes<D>) store(dst + i, load(src + i));
    for (; i < count; ++i) convert(src[i], dst[i]);
  }
}

// Rows that are dense on both sides, cut into chunks.
template <class S, class D>
void copy_dense(const Plan& plan, const S* src, D* dst) {
  const int64_t rows = plan.axes[0].size * plan.axes[1].size * plan.axes[2].size, length = plan.axes[3].size;
  const int64_t cuts = (length + kChunk - 1) / kChunk, group = std::max<int64_t>(1, kChunk / length);
  parallel_for((rows + group - 1) / group * cuts, 2 * group * std::min(length, kChunk), [&](int64_t i) {
    const int64_t first = i / cuts * group, at = i % cuts * kChunk;
    for_rows(plan, first, std::min(rows, first + group), [&](int64_t from, int64_t to) {
      copy_row(src + from + at, dst + to + at, std::min(kChunk, length - at));
    });
  });
}

template <class S, class D>
void copy_strided(const Plan& plan, const S* src, D* dst) {
  const int64_t rows = plan.axes[0].size * plan.axes[1].size * plan.axes[2].size;
  const Axis row = plan.axes[3];
  const int64_t cuts = (row.size + kChunk - 1) / kChunk, group = std::max<int64_t>(1, kChunk / row.size);
  parallel_for((rows + group - 1) / group * cuts, 2 * group * std::min(row.size, kChunk), [&](int64_t i) {
    const int64_t first = i / cuts * group, at = i % cuts * kChunk, stop = std::min(row.size, at + kChunk);
    for_rows(plan, first, std::min(rows, first + group), [&](int64_t from, int64_t to) {
      for (int64_t k = at; k < stop; ++k) convert(src[from + k * row.src], dst[to + k * row.dst]);
    });
  });
}

template <class A>
using Ints = Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;

// Transposes the square v[0..kSide) of lanes: at each step, blocks of kStep lanes change places across the diagonal.
template <class A, int kStep, int kSide>
inline void transpose(Vec<A> (&v)[kSide]) {
  if constexpr (kStep > 0) {
    Ints<A> low, high;
    for (int k = 0; k < kSide; ++k) {
      low[k] = k & kStep ? k - kStep + kSide : k;
      high[k] = k & kStep ? k + kSide : k + kStep;
    }
    for (int i = 0; i < kSide; ++i) {
      if (i & kStep) continue;
      const Vec<A> a = v[i], b = v[i + kStep];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + kStep] = __builtin_shuffle(a, b, high);
    }
    transpose<A, kStep / 2>(v);
  }
}

// Axis `turned` is the one that is dense in src, the last axis the one that is dense in dst.
template <class S, class D>
void copy_transposed(const Plan& plan, int turned, const S* src, D* dst) {
  using A = Acc<D>;
  constexpr int kSide = kLanes<D>;
  Plan outer = plan;
  outer.axes[turned].size = 1;
  const Axis lines = plan.axes[turned], row = plan.axes[3];
  const int64_t matrices = outer.axes[0].size * outer.axes[1].size * outer.axes[2].size;
  const int64_t strip = std::max<int64_t>(1, kChunk / row.size / kSide) * kSide;  // of `lines`, for one index
  const int64_t strips = (lines.size + strip - 1) / strip;
  parallel_for(matrices * strips, 2 * std::min(strip, lines.size) * row.size, [&](int64_t i) {
    const int64_t begin = i % strips * strip, end = std::min(lines.size, begin + strip);
    for_rows(outer, i / strips, i / strips + 1, [&](int64_t src_at, int64_t dst_at) {
      const auto move = [&](int64_t j, int64_t j_end, int64_t k, int64_t k_end) {
        for (; j < j_end; ++j)
          for (int64_t at = k; at < k_end; ++at)
            convert(src[src_at + j + at * row.src], dst[dst_at + j * lines.dst + at]);
      };
      int64_t k = 0;
      for (; k + kSide <= row.size; k += kSide) {
        int64_t j = begin;
        for (; j + kSide <= end; j += kSide) {
          Vec<A> square[kSide];
          for (int u = 0; u < kSide; ++u) square[u] = load(src + src_at + j + (k + u) * row.src);
          transpose<A, kSide / 2>(square);
          for (int u = 0; u < kSide; ++u) store(dst + dst_at + (j + u) * lines.dst + k, square[u]);
        }
        move(j, end, k, k + kSide);
      }
      move(begin, end, k, row.size);
    });
  });
}

template <class S, class D>
void copy_as(const Plan& plan, const void* src, void* dst) {
  const S* from = static_cast<const S*>(src);
  D* to = static_cast<D*>(dst);
  const Axis row = plan.axes[3];
  if (row.src == 1 && row.dst == 1) return copy_dense(plan, from, to);
  if constexpr (kSameLanes<S, D>)
    for (int axis = 0; axis < 3 && row.dst == 1; ++axis)
      if (plan.axes[axis].src == 1 && plan.axes[axis].size > 1) return copy_transposed(plan, axis, from, to);
  copy_strided(plan, from, to);
}

}  // namespace

void copy(const CopyProblem& problem, const void* src, void* dst, Stream) {
  const Plan plan = plan_of(problem);
  for_dtype(problem.src_dtype, [&]<class S>(S) {
    for_dtype(problem.dst_dtype, [&]<class D>(D) {
      if constexpr (std::is_same_v<S, D> && sizeof(S) == 2)
        copy_as<Bits16, Bits16>(plan, src, dst);
      else
        copy_as<S, D>(plan, src, dst);
    });
  });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
