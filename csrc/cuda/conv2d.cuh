// What the convolution's dense kernels share: where taps lie, the operands that read them, and how a result is cut into
// tiles. The taps (r,s) and the channels or filters that a sum runs over are counted together, in 32 bits.
#pragma once

#include "conv2d_kernels.h"
#include "dtype.h"
#include "tile.cuh"

namespace cnnops::cuda {

// f(T{}) for the type in which this problem's numbers are multiplied.
template <class F>
void for_numbers(const Conv2dProblem& p, F&& f) {
  if (p.dtype == DType::kFloat && p.tf32) return f(Tf32{});
  for_dtype(p.dtype, f);
}

// The tiles, all of 128 threads. Exact floats have no more than 128 x 64: each thread owns 8 x 8 sums.
//
// Instantiations are budgeted. With Half, BFloat16, Tf32 and float, the portable family has 11 kernels forward, 11 of
// backward_input and 14 of backward_weight, the packed one 12, the stem 12, and 10 more add slabs, moments and biases:
// 70. Epilogues are run-time switches.
using SmallTile = Shape<64, 64, 2, 2, 3, false>;  // any alignment
using TallTile = Shape<128, 64, 2, 2, 3, true>;
using LargeTile = Shape<128, 128, 2, 2, 4, true>;
using WideTile = Shape<64, 256, 1, 4, 4, true>;  // backward_weight: dy is read once for 256 taps and channels

// Which elements of a tensor the taps of a position read, along one spatial axis: tap t of position i reads element
// origin + i * move + t * step; beyond the extent there are zeros. step >= 0.
struct Axis {
  int positions, origin, move, taps, step, extent;
};

// Where the forward pass reads x.
__device__ inline Axis taps_of_outputs(int P, int R, int H, int stride, int pad, int dilation) {
  return {P, -pad, stride, R, dilation, H};
}

// The inputs h = first, first + stride, .. are reached by the same taps r = tap, tap - tap_step, ..: those with
// h + pad - r * dilation a multiple of stride. Where the dilation shares a factor with the stride there may be none.
struct Parity {
  int first, tap, tap_step, taps;
};

__device__ inline Parity parity(int first, int R, int stride, int pad, int dilation) {
  Parity found{first, 0, 0, 0};
  for (int r = R - 1; r >= 0; --r) {
    if ((first + pad - r * dilation) % stride) continue;
    if (found.taps == 0) found.tap = r;
    if (found.taps == 1) found.tap_step = found.tap - r;
    ++found.taps;
  }
  return found;
}

// Where the inputs of one parity read dy: output (h + pad - r * dilation) / stride. All divisions are exact.
__device__ inline Axis taps_of_inputs(const Parity& at, int H, int P, int stride, int pad, int dilation) {
  return {static_cast<int>(ceil_div(H - at.first, stride)),
          (at.first + pad - at.tap * dilation) / stride,
          1,
          at.taps,
          at.tap_step * dilation / stride,
          P};
}

// One group's channels of an NHWC tensor, read by taps: element (pixel, (r*S + s)*channels + c), pixel = (n, row,
// column) of the positions. The base of the operands below.
template <class T>
struct Tapped {
  const T* readable;  // the tensor's first element of this group
  Axis h, w;
  int channels;
  int64_t pitch, pixels;  // from pixel to pixel; where the tile or the sum ends
  bool vectorised;

  __device__ Tapped(const T* tensor, int group, int channels, int pitch, const Axis& h, const Axis& w, int64_t pixels)
      : readable(tensor + int64_t{group} * channels),
        h(h),
        w(w),
        channels(channels),
        pitch(pitch),
        pixels(pixels),
        vectorised(channels % kVector<T> == 0) {}

  // Of x, whose channels may belong to this group.
  __device__ Tapped(const Conv2dProblem& p, const T* x, int group, int64_t pixels)
      : Tapped(x, group, p.C / p.groups, p.C, taps_of_outputs(p.P, p.R, p.H, p.stride_h, p.pad_h, p.dilation_h),
               taps_of_outputs(p.Q, p.S, p.W, p.stride_w, p.pad_w, p.dilation_w), pixels) {}

  // Of coordinates that wrapped around below zero.
  __device__ bool inside(unsigned row, unsigned column) const {
    return (row < static_cast<unsigned>(h.extent)) & (column < static_cast<unsigned>(w.extent));
  }
};

// A row that no tap moves into the tensor, since steps are not negative.
constexpr int kNowhere = INT32_MIN;

// k along the taps.
template <class T>
struct TappedRows : Tapped<T> {
  struct Fixed {
    int64_t first;  // offset of the element that the pixel's taps count from
    int h, w;
  };
  struct Walk {
    int r, s, c;
  };
  using Tapped<T>::Tapped, Tapped<T>::h, Tapped<T>::w, Tapped<T>::channels, Tapped<T>::pitch;

  __device__ Fixed fixed(int64_t pixel) const {
    if (pixel >= this->pixels) return {0, kNowhere, 0};
    const Split column = split(pixel, w.positions), row = split(column.quotient, h.positions);
    const int at_h = h.origin + static_cast<int>(row.remainder) * h.move;
    const int at_w = w.origin + static_cast<int>(column.remainder) * w.move;
    return {((row.quotient * h.extent + at_h) * w.extent + at_w) * pitch, at_h, at_w};
  }
  __device__ Walk walk(int64_t k) const {
    const int tap = static_cast<int>(k) / channels, r = w.taps ? tap / w.taps : h.taps;
    return {r, tap - r * w.taps, static_cast<int>(k) - tap * channels};
  }
  __device__ void advance(Walk& walk, int by) const {
    for (walk.c += by; walk.c >= channels; walk.c -= channels)
      if (++walk.s == w.taps) walk.s = 0, ++walk.r;
  }
  __device__ const T* at(const Fixed& pixel, const Walk& walk) const {
    // Without branches, and without overflow where the walk is beyond the last tap.
    const unsigned row = static_cast<unsigned>(walk.r) * static_cast<unsigned>(h.step);
    const unsigned column = static_cast<unsigned>(walk.s) * static_cast<unsigned>(w.step);
    const bool valid = (walk.r < h.taps) & this->inside(pixel.h + row, pixel.w + column);
    const int64_t offset = pixel.first + (int64_t{row} * w.extent + column) * pitch + walk.c;
    return valid ? this->readable + offset : nullptr;
  }
};

// k along the pixels.
template <class T>
struct TappedColumns : Tapped<T> {
  struct Fixed {
    int h, w, c;
  };
  struct Walk {
    int64_t pixel, image;  // image: its first element's offset
    int row, column;
  };
  using Tapped<T>::Tapped, Tapped<T>::h, Tapped<T>::w, Tapped<T>::channels, Tapped<T>::pitch;

  __device__ Fixed fixed(int64_t i) const {
    if (i >= int64_t{h.taps} * w.taps * channels) return {kNowhere, 0, 0};
    const int tap = static_cast<int>(i) / channels, r = tap / w.taps;
    return {h.origin + r * h.step, w.origin + (tap - r * w.taps) * w.step, static_cast<int>(i) - tap * channels};
  }
  __device__ Walk walk(int64_t pixel) const {
    const Split column = split(pixel, w.positions), row = split(column.quotient, h.positions);
    return {pixel, row.quotient * h.extent * w.extent * pitch, static_cast<int>(row.remainder),
            static_cast<int>(column.remainder)};
  }
  __device__ void advance(Walk& walk, int by) const {
    walk.pixel += by;
    for (walk.column += by; walk.column >= w.positions; walk.column -= w.positions)
      if (++walk.row == h.positions) walk.row = 0, walk.image += int64_t{h.extent} * w.extent * pitch;
  }
  __device__ const T* at(const Fixed& tap, const Walk& walk) const {
    const int row = tap.h + walk.row * h.move, column = tap.w + walk.column * w.move;
    const bool valid = (walk.pixel < this->pixels) & this->inside(row, column);
    const int64_t offset = walk.image + (int64_t{row} * w.extent + column) * pitch + tap.c;
    return valid ? this->readable + offset : nullptr;
  }
};

// A dense matrix of `rows` x `columns`, rows `pitch` elements apart, k along the columns.
template <class T>
struct MatrixRows {
  using Fixed = const T*;
  using Walk = int64_t;

  const T* readable;
  int64_t rows, columns, pitch;
  bool vectorised;

  __device__ MatrixRows(const T* first, int64_t rows, int64_t columns, int64_t pitch)
      : readable(first), rows(rows), columns(columns), pitch(pitch), vectorised(columns % kVector<T> == 0) {}

  __device__ Fixed fixed(int64_t row) const { return row < rows ? readable + row * pitch : nullptr; }
  __device__ Walk walk(int64_t column) const { return column; }
  __device__ void advance(Walk& column, int by) const { column += by; }
  __device__ const T* at(Fixed row, Walk column) const { return row && column < columns ? row + column : nullptr; }
};

// The same with k along the rows.
template <class T>
struct MatrixColumns {
  using Fixed = int64_t;
  using Walk = int64_t;

  const T* readable;
  int64_t rows, columns, pitch;
  bool vectorised;

  __device__ MatrixColumns(const T* first, int64_t rows, int64_t columns, int64_t pitch)
      : readable(first), rows(rows), columns(columns), pitch(pitch), vectorised(columns % kVector<T> == 0) {}

  __device__ Fixed fixed(int64_t column) const { return column; }
  __device__ Walk walk(int64_t row) const { return row; }
  __device__ void advance(Walk& row, int by) const { row += by; }
  __device__ const T* at(Fixed column, Walk row) const {
    return column < columns && row < rows ? readable + row * pitch + column : nullptr;
  }
};

// The filters as backward_input sums over them: element ((i*taps + j)*filters + k, c) is weight[k,r,s,c] at the i-th
// and j-th tap of the parities.
template <class T>
struct FilterColumns {
  using Fixed = int;
  struct Walk {
    int r, s, k;
  };

  const T* readable;  // the group's first filter
  Parity h, w;
  int S, channels, filters, filter_size;
  bool vectorised;

  __device__ FilterColumns(const Conv2dProblem& p, const T* weight, int group, const Parity& h, const Parity& w)
      : readable(weight + int64_t{group} * (p.K / p.groups) * p.R * p.S * (p.C / p.groups)),
        h(h),
        w(w),
        S(p.S),
        channels(p.C / p.groups),
        filters(p.K / p.groups),
        filter_size(p.R * p.S * channels),
        vectorised(channels % kVector<T> == 0) {}

  __device__ Fixed fixed(int64_t c) const { return static_cast<int>(c); }
  __device__ Walk walk(int64_t i) const {
    const int tap = static_cast<int>(i) / filters, r = w.taps ? tap / w.taps : h.taps;
    return {r, tap - r * w.taps, static_cast<int>(i) - tap * filters};
  }
  __device__ void advance(Walk& walk, int by) const {
    for (walk.k += by; walk.k >= filters; walk.k -= filters)
      if (++walk.s == w.taps) walk.s = 0, ++walk.r;
  }
  __device__ const T* at(Fixed c, const Walk& walk) const {
    const bool valid = (c < channels) & (walk.r < h.taps);
    const int row = h.tap - walk.r * h.tap_step, column = w.tap - walk.s * w.tap_step;
    const int64_t offset = int64_t{walk.k} * filter_size + (row * S + column) * channels + c;
    return valid ? readable + offset : nullptr;
  }
};

// The tile that a block owns: n goes fastest, so that blocks in flight together share the rows of A in L2.
struct Place {
  int64_t m, n;
  int group;
  int64_t part;  // of the sum, or of the pixels
};

template <class Shape>
__device__ Place place_of(int64_t block, int64_t gemm_m, int64_t gemm_n, int groups) {
  const Split n = split(block, ceil_div(gemm_n, Shape::kN)), group = split(n.quotient, groups),
              m = split(group.quotient, ceil_div(gemm_m, Shape::kM));
  return {m.remainder * Shape::kM, n.remainder * Shape::kN, static_cast<int>(group.remainder), m.quotient};
}

inline int64_t tiles(int64_t gemm_m, int64_t gemm_n, int groups, int block_m, int block_n) {
  return ceil_div(gemm_m, block_m) * ceil_div(gemm_n, block_n) * groups;
}

// backward_input's classes of pixels: residues modulo the stride along each axis, and the most pixels that one has.
__host__ __device__ inline int64_t classes(int H, int stride) { return H < stride ? H : stride; }
__host__ __device__ inline int64_t largest_class(const Conv2dProblem& p) {
  return p.N * ceil_div(p.H, p.stride_h) * ceil_div(p.W, p.stride_w);
}

// One class of backward_input's pixels: of one parity along each axis, so that all of them have the same taps.
struct InputClass {
  Parity parity_h, parity_w;
  Axis h, w;
  int64_t pixels;

  __device__ InputClass(const Conv2dProblem& p, int64_t index) {
    const Split residue = split(index, classes(p.W, p.stride_w));
    parity_h = parity(static_cast<int>(residue.quotient), p.R, p.stride_h, p.pad_h, p.dilation_h);
    parity_w = parity(static_cast<int>(residue.remainder), p.S, p.stride_w, p.pad_w, p.dilation_w);
    h = taps_of_inputs(parity_h, p.H, p.P, p.stride_h, p.pad_h, p.dilation_h);
    w = taps_of_inputs(parity_w, p.W, p.Q, p.stride_w, p.pad_w, p.dilation_w);
    pixels = int64_t{p.N} * h.positions * w.positions;
  }

  // The offset of a pixel of the class in dx, or -1 beyond the last.
  __device__ int64_t row_of(const Conv2dProblem& p, int64_t pixel) const {
    if (pixel >= pixels) return -1;
    const Split column = split(pixel, w.positions), row = split(column.quotient, h.positions);
    const int64_t in_image =
        (parity_h.first + row.remainder * p.stride_h) * p.W + parity_w.first + column.remainder * p.stride_w;
    return (row.quotient * p.H * p.W + in_image) * p.C;
  }
};

// The portable family's passes, each in a file of its own.
int64_t portable_forward_workspace(const Conv2dProblem&, const Conv2dPlan&, const Epilogue&);
void portable_forward(const Conv2dProblem&, const Conv2dPlan&, const Epilogue&, const void* x, const void* weight,
                      void* y, void* workspace, Stream);
void portable_backward_input(const Conv2dProblem&, const Conv2dPlan&, const Epilogue&, const void* dy,
                             const void* weight, void* dx, void* workspace, Stream);
int64_t portable_backward_weight_workspace(const Conv2dProblem&, const Conv2dPlan&);
void portable_backward_weight(const Conv2dProblem&, const Conv2dPlan&, const void* dy, const void* x, void* dweight,
                              void* workspace, Stream);

// The most that a pass of the stem family, whose halo is of the problem's size, wants for a block.
size_t stem_shared_bytes(const Conv2dProblem&);

// f(Shape{}) for the one of these tiles that the plan names.
template <class... Shapes, class F>
void with_tile(const Conv2dPlan& plan, F&& f) {
  const bool found = ((plan.block_m == Shapes::kM && plan.block_n == Shapes::kN && (f(Shapes{}), true)) || ...);
  if (!found) throw std::runtime_error("conv2d: a plan with a tile that no kernel has");
}

}  // namespace cnnops::cuda
