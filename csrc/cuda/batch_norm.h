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

}  // namespace cnnops::cuda
