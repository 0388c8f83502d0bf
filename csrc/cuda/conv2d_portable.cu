// 2-d convolution by implicit GEMM: no matrix is materialised, its elements are fetched from where they lie.
//
//   y[n,p,q,k]       = sum over (r,s,c) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s,c]
//   dx[n,h,w,c]      = sum over (r,s,k) of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s,c],
//                      where stride divides
//   dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]
//
// Layout     x, dx [N,H,W,C]; weight, dweight [K,R,S,C/groups]; y, dy [N,P,Q,K]. Below, C and K of a group are
//            `channels` and `filters`.
// Tile       forward: kM x kN = 64 x 64, 128 x 64 or 128 x 128; kBlockK = 32 in 16 bits, 16 in fp32.
//                          sum over (r,s,c) ->        filters k ->               filters k ->
//                        +------------------------+ +------------------------+ +------------------------+
//            pixels    | | x: kM x kBlockK, a ring|*| weight: kBlockK x kN,  |=| y: kM x kN sums, 4     |
//            (n,p,q)   v | of 3-4 in shared memory| | in the same ring       | | warps' registers       |
//                        +------------------------+ +------------------------+ +------------------------+
//            The sum is split where tiles are few. backward_weight: filters k down, (r,s,c) across, up to 64 x 256
//            too; the sum over pixels is split. Exact fp32: no more than 128 x 64.
// Ownership  One block owns a tile of one group's result: pixels x filters, pixels x channels, and filters x (r,s,c).
//            Long sums over few tiles are cut into slabs of float, which a second kernel adds in order: every schedule
//            gives the same bits.
// Traffic    A tile reads its rows of each operand once for each tap; neighbouring taps and tiles meet in L2.

#include "conv2d.cuh"

namespace cnnops::cuda {

const Conv2dFamily kPortableConv2d = {
    .forward_workspace = portable_forward_workspace,
    .forward = portable_forward,
    .backward_input_workspace = [](const Conv2dProblem&, const Conv2dPlan&) -> int64_t { return 0; },
    .backward_input = portable_backward_input,
    .backward_weight_workspace = portable_backward_weight_workspace,
    .backward_weight = portable_backward_weight,
};

}  // namespace cnnops::cuda
