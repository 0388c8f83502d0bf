// Batch norm with a residual and an activation.
//
//   y       = activation(z),  z = (x - mean) * rstd * weight + bias + residual
//   mean, var over N and L of each channel when training, else the running ones; rstd = 1 / sqrt(var + eps)
//   dz      = dy * activation'(z), which is dresidual too
//   dbias   = sum of dz over N and L,  dweight = rstd * sum of dz * (x - mean)
//   dx      = rstd * weight * dz; when training, rstd * weight * (dz - dbias / NL - (x - mean) * rstd * dweight / NL)
//
// Layout     x, y, residual and their gradients [N,L,C] or [N,C,L]; everything else [C].
// Tile       sums, [N,L,C]; of [N,C,L] an item has one channel, and a line is its plane of an image.
//                          channels c ->
//                        +- kTile = 512 channels -----------------------+
//            positions | | block: up to kBlock = 16384 elements,        |  an item: a slice; its blocks one by one,
//            (n,l)     v | kRun = 256 lines; sums: cache                |  merged in order, in double
//                        +- split: the next slice, of up to kSlices ----+
//            The elementwise sweeps: kChunk = 32768 elements, of all channels, a vector at a time in registers.
// Ownership  Sums: one index of parallel_for owns one slice of the positions, for a tile of channels; its blocks, and
//            then the slices, are merged in order. All of these are cut by shape alone: any number of threads gives
//            the same bits. The elementwise sweeps own about kChunk elements.
// Traffic    forward: x for the statistics, then x (+ residual) + y; backward: dy, x (+ y or residual) for the sums,
//            then the same + dx (+ dresidual). A sweep that nothing asks for is left out.
#include "batch_norm.h"

#include <memory>

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

template <class T>
void forward(const NormProblem& problem, const BatchNormForward& args) {
  using A = Acc<T>;
  const Lines lines(problem);
  const int64_t C = problem.C;
  const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);

  const std::unique_ptr<A[]> used(new A[static_cast<size_t>(2 * C)]);
  A *mean = used.get(), *rstd = mean + C;
  used_statistics<T>(problem, lines, args, mean, rstd);
  if (!y) return;

  const Affine<A> affine(C, mean, rstd, static_cast<const A*>(args.weight), static_cast<const A*>(args.bias));
  for_activation(problem.activation, [&](auto activation) {
    for_chunks(lines, [&](const Part& part) {
      for_part<T>(lines, part, [&]<class W>(W, int64_t i, const auto& param, int64_t) {
        write<W>(y + i, activate<activation.value>(affine.template z_at<W>(x, residual, i, param)));
      });
    });
  });
}

template <class T, Activation kActivation>
void backward(const NormProblem& problem, const BatchNormBackward& args) {
  const Lines lines(problem);
  const Shifted<T> dy{static_cast<const T*>(args.dy), 0}, x{static_cast<const T*>(args.x), 0};
  batch_norm_backward<T, kActivation>(
      problem, args, lines, [&](const Part& part, const auto& sweep) { sweep(part, dy, x); }, lines,
      [&](const Part& part, const auto& sweep) { sweep(part, dy); });
}

}  // namespace

void batch_norm_act_forward(const NormProblem& problem, const BatchNormForward& args, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) { forward<T>(problem, args); });
}

void fold_batch_norm(DType dtype, int64_t channels, double eps, const BatchNormFold& args, Stream) {
  for_dtype(dtype, [&]<class T>(T) {
    using A = Acc<T>;
    const auto at = [](const void* array, int64_t c, double otherwise) {
      return array ? double{static_cast<const A*>(array)[c]} : otherwise;
    };
    for (int64_t c = 0; c < channels; ++c) {
      const A scale = static_cast<A>(at(args.weight, c, 1) / std::sqrt(at(args.running_var, c, 1) + eps));
      const double mean = at(args.running_mean, c, 0);
      static_cast<A*>(args.scale)[c] = scale;
      static_cast<A*>(args.shift)[c] = static_cast<A>((at(args.conv_bias, c, 0) - mean) * scale + at(args.bias, c, 0));
    }
  });
}

void batch_norm_act_backward(const NormProblem& problem, const BatchNormBackward& args, Stream) {
  for_dtype(problem.dtype, [&]<class T>(T) {
    for_activation(problem.activation, [&](auto activation) { backward<T, activation.value>(problem, args); });
  });
}

}  // namespace cnnops::cpu::CNNOPS_ISA
