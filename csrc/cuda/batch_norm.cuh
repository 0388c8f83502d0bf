// How batch norm's kernels go over x, what they sum up on the way, and the maps of its numbers.
#pragma once

#include "moments.cuh"
#include "vector.cuh"

namespace cnnops::cuda {

// What normalises a channel: (x - mean) * scale + bias, which has the same bits wherever it is computed.
struct BatchNormMap {
  float mean, scale, bias;
  __device__ float operator()(float x) const { return (x - mean) * scale + bias; }
};

// weight and bias may be null.
__device__ __forceinline__ BatchNormMap batch_norm_map(int64_t c, const float* mean, const float* rstd,
                                                       const float* weight, const float* bias) {
  return {mean[c], weight ? rstd[c] * weight[c] : rstd[c], bias ? bias[c] : 0.0f};
}

// What training subtracts from dz, of which shares[2][C] are finish_batch_norm_gradients's:
// dx = (dz - dz_share - (x - mean) * x_share) * scale. With fixed statistics it is dz * scale.
struct BatchNormShares {
  float dz, x;
  __device__ float dx(const BatchNormMap& map, float dz_here, float x_here) const {
    return (dz_here - dz - (x_here - map.mean) * x) * map.scale;
  }
};

__device__ __forceinline__ BatchNormShares batch_norm_shares(int64_t c, int64_t channels, const float* shares) {
  return {shares[c], shares[channels + c]};
}

// What an activation's gradient is told of z: its output where the gradient is the output's, except that the masks of
// relu and relu6 are the same by z.
__device__ __forceinline__ float saved_for_gradient(Activation activation, float z) {
  return activation == Activation::kSigmoid ? 1 / (1 + expf(-z)) : z;
}

// Sums of dz and of dz * (x - mean).
struct GradientSums {
  float dz = 0, product = 0;
  __device__ void merge(const GradientSums& other) {
    dz += other.dz;
    product += other.product;
  }
};

// A sweep moves x in pieces: `width` elements that follow each other, of as many channels in [N,L,C] and of one channel
// in [N,C,L]. The pieces of the same channels are a unit: runs of `length` pieces, `count` in all. A block owns
// `columns` units that lie side by side, and a slice of the pieces of each; its threads are `rows` rows of one thread
// for each column, of which `lanes` rows are neighbours.
//
// Where planes of [N,C,L] are no whole sectors (`planes`), a run begins with the piece that has the plane's first
// element, and the ends of its pieces that belong to neighbours are left out: see batch_norm_planes.cuh.
constexpr int kSweepThreads = 256;
constexpr int kSummingBlocks = 4;  // for each multiprocessor, of sweeps that sum gradients: two rounds of two

struct Sweep {
  int64_t units, unit_stride;  // in elements
  int64_t count, length, stride, run_stride;
  int64_t skip, skip_in_run;            // from a thread's piece to its next: elements, and pieces within the run
  int64_t tiles, slices, slice_length;  // the last slice may be shorter
  int64_t total;                        // elements of x
  int width, unit_channels, columns, rows, lanes;
  bool planes;
  // Of `planes`: elements that a warp maps; from a thread's piece to its next, channels, and elements within the plane.
  int64_t stretch, stretch_channels, stretch_skip;

  __host__ __device__ int64_t blocks() const { return tiles * slices; }
  __host__ __device__ int64_t pieces(int64_t slice) const {
    return slice + 1 < slices ? slice_length : count - slice * slice_length;
  }
  // Elements of a channel in a slice.
  __host__ __device__ int64_t elements(int64_t slice, int64_t channel) const {
    if (!planes) return pieces(slice) * (width / unit_channels);
    const int64_t first = slice * slice_length;
    return before(first + pieces(slice), channel) - before(first, channel);
  }

 private:
  // Elements of a channel before a piece of its planes.
  __host__ __device__ int64_t before(int64_t piece, int64_t channel) const {
    const Split at = split(piece, length);
    const int64_t begin = channel * unit_stride + at.quotient * run_stride;
    const int64_t in_plane = at.remainder * width - begin % width;
    return at.quotient * unit_stride + (in_plane < 0 ? 0 : in_plane > unit_stride ? unit_stride : in_plane);
  }
};

// By about `blocks` blocks, or fewer, so that each thread of a block has some pieces. The results of sums depend on it.
// A piece has `vector` elements, or one where channels of [N,L,C] do not allow it.
Sweep make_sweep(const NormProblem& p, int64_t blocks, int vector);
inline Sweep make_sweep(const NormProblem& p, int64_t blocks) {
  return make_sweep(p, blocks, p.dtype == DType::kFloat ? kVector<float> : kVector<Half>);
}

// The part of a sweep's block, the calling one unless said otherwise, that the calling thread owns.
struct SweepPart {
  int64_t slice, channel, offset, in_run, left;  // channel and offset of its first piece; pieces left
  int column, row;

  __device__ explicit SweepPart(const Sweep& s) : SweepPart(s, blockIdx.x) {}
  __device__ SweepPart(const Sweep& s, int64_t number) {
    const Split block = split(number, s.tiles);
    const int thread = static_cast<int>(threadIdx.x);
    column = thread / s.lanes % s.columns;
    row = thread / (s.lanes * s.columns) * s.lanes + thread % s.lanes;
    slice = block.quotient;
    const int64_t unit = block.remainder * s.columns + column, pieces = s.pieces(slice);
    const Split first = split(slice * s.slice_length + row, s.length);
    channel = unit * s.unit_channels;
    in_run = first.remainder;
    offset = unit * s.unit_stride + first.quotient * s.run_stride + in_run * s.stride;
    left = unit < s.units && row < s.rows && row < pieces ? (pieces - row - 1) / s.rows + 1 : 0;
  }

  // The offset of the next piece.
  __device__ int64_t next(const Sweep& s) {
    const int64_t here = offset;
    offset += s.skip;
    in_run += s.skip_in_run;
    if (in_run >= s.length) {
      in_run -= s.length;
      offset += s.run_stride - s.length * s.stride;
    }
    --left;
    return here;
  }
};

// What an array [C] has for each of a thread's elements: all the same where they are of one channel. A null one: what
// stands for it.
template <int kWidth>
__device__ __forceinline__ void load_channels(const Sweep& s, const SweepPart& part, const float* array,
                                              float otherwise, float (&values)[kWidth]) {
  constexpr int kEach = kWidth < kVector<float> ? 1 : kVector<float>;
  const bool whole = array && s.unit_channels == kWidth;
  const float one = array && !whole ? array[part.channel] : otherwise;
  CNNOPS_UNROLL
  for (int i = 0; i < kWidth; i += kEach) {
    Vector<float> some = {};
    if (whole) some = load(array + part.channel + i, kEach);
    CNNOPS_UNROLL
    for (int k = 0; k < kEach; ++k) values[i + k] = whole ? some.at[k] : one;
  }
}

// f(offsets) for all pieces of the part, kAhead at a time, so that as many loads are under way.
template <int kAhead, class F>
__device__ __forceinline__ void for_pieces(const Sweep& s, SweepPart part, F&& f) {
  while (part.left >= kAhead) {
    int64_t offsets[kAhead];
    CNNOPS_UNROLL
    for (int64_t& each : offsets) each = part.next(s);
    f(offsets);
  }
  while (part.left > 0) {
    const int64_t offsets[1] = {part.next(s)};
    f(offsets);
  }
}

// The block's parts of its channels, merged in pairs: write(channel, merged) is called once for each of them, by
// threads of which neighbours have neighbouring channels. mine[i] is of the calling thread's i-th element. A barrier
// goes before another call.
template <class Part, int kWidth, class Write>
__device__ __forceinline__ void merge_block(const Sweep& s, const SweepPart& part, Part (&mine)[kWidth],
                                            Write&& write) {
  using Parts = Part[kWidth][kSweepThreads / 2];
  CNNOPS_SHARED(Parts, parts);
  if (s.unit_channels < kWidth) {
    CNNOPS_UNROLL
    for (int i = 1; i < kWidth; ++i) mine[0].merge(mine[i]);
  }
  for (int rows = s.rows, half; rows > 1; rows = half) {
    half = (rows + 1) / 2;
    if (part.row >= half && part.row < rows) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i)
        if (i < s.unit_channels) parts[i][(part.row - half) * s.columns + part.column] = mine[i];
    }
    __syncthreads();
    if (part.row < rows - half) {
      CNNOPS_UNROLL
      for (int i = 0; i < kWidth; ++i)
        if (i < s.unit_channels) mine[i].merge(parts[i][part.row * s.columns + part.column]);
    }
    __syncthreads();
  }
  if (part.row == 0) {
    CNNOPS_UNROLL
    for (int i = 0; i < kWidth; ++i)
      if (i < s.unit_channels) parts[i][part.column] = mine[i];
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), first = thread / s.unit_channels;
  if (first >= s.columns) return;
  const int64_t channel = part.channel + int64_t{first - part.column} * s.unit_channels + thread % s.unit_channels;
  if (channel < s.units * s.unit_channels) write(channel, parts[thread % s.unit_channels][first]);
}

// Merges the parts that blocks have left, one thread for each of kMergeChannels channels by kMergeShares of its slices:
// as many channels as a sector holds. All threads of the block call it; those of share 0 have the result. A barrier
// goes before another call.
constexpr int kMergeChannels = 8, kMergeShares = 32;

template <class Part, class Read>
__device__ __forceinline__ Part merge_slices(int64_t slices, bool there, Read&& read) {
  using Parts = Part[kMergeShares][kMergeChannels];
  CNNOPS_SHARED(Parts, parts);
  const int share = static_cast<int>(threadIdx.x) / kMergeChannels;
  const int column = static_cast<int>(threadIdx.x) % kMergeChannels;
  Part all;
  if (there)
    for (int64_t slice = share; slice < slices; slice += kMergeShares) all.merge(read(slice));
  parts[share][column] = all;
  for (int half = kMergeShares / 2; half > 0; half /= 2) {
    __syncthreads();
    if (share < half) parts[share][column].merge(parts[share + half][column]);
  }
  return parts[share][column];
}

}  // namespace cnnops::cuda
