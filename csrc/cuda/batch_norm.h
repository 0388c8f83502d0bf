// What batch norm, and ops that begin or end with it, are made of. Workspaces are aligned to 256 bytes.
#pragma once

#include "../kernels.h"

namespace cnnops::cuda {

// Scratch bytes that batch_norm_statistics wants in b.workspace.
int64_t batch_norm_statistics_workspace(const NormProblem&);
// Fills b.mean and b.rstd: when training from b.x, with b.running_mean and b.running_var brought up to date, else from
// these two. Of b, no more than those and the workspace is looked at.
void batch_norm_statistics(const NormProblem&, const BatchNormForward& b, Stream);

// sums[slab][2][C]: of a part of the positions, the sums of dz and of dz * (x - mean). Added in order they give b.dbias
// and b.dweight where these are asked for, and shares[2][C], of which BatchNormShares in batch_norm.cuh makes dx.
void finish_batch_norm_gradients(const NormProblem&, const BatchNormBackward& b, int64_t slabs, const float* sums,
                                 float* shares, Stream);

// Whether so many tensors like x, read once, are still in L2 when they are read again: half of it is left to what is
// written. However small, they are better off so: a launch costs more than a barrier of the grid.
bool stays_in_l2(const NormProblem&, int tensors, int64_t l2_bytes);

// The forward pass when training, and the backward pass where there are sums to make and dx or dresidual to write, in
// one launch after `arrived` has been cleared. partial and sums are the [slice][2][C] of the separate launches, of
// whose results these have the bits.
void batch_norm_forward_resident(const NormProblem&, const BatchNormForward&, float* partial, unsigned* arrived,
                                 Stream);
void batch_norm_backward_resident(const NormProblem&, const BatchNormBackward&, float* shares, float* sums,
                                  unsigned* arrived, Stream);

}  // namespace cnnops::cuda
