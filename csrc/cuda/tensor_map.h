// Descriptions of tensors to TMA, made on the host. On a device the driver encodes them; its entry points are asked for
// at run time, so that the library does not need libcuda to load.
#pragma once

#include "launch.h"

#if defined(CNNOPS_SIMT)
#include "../simt/async.h"
#else
#include <cuda.h>
#endif

namespace cnnops::cuda {

#if defined(CNNOPS_SIMT)
using TensorMap = simt::TensorMap;

int64_t tensor_maps_made();  // so far, by tensor_map()
#else
using TensorMap = CUtensorMap;
#endif

// A box of a dense tensor of up to four axes, the innermost first, whose elements are of `dtype` (kFloat is loaded as
// TF32). The box's innermost axis is at most 128 bytes; tiles are swizzled by 128 bytes.
struct TiledTensor {
  DType dtype;
  int rank;
  int64_t extent[4];
  int64_t stride[4];  // in elements; stride[0] is 1
  int box[4];
  int element_stride[4];  // every so many elements of an axis are taken; a box's extent is then in elements taken
};

// The furthest that a load of a column may be from the column's base pixels, along each axis.
constexpr int kMostIm2colOffset = 255;

// A column of pixels of an NHWC tensor: `pixels` of them, `channels` (at most 128 bytes) of each. Base pixels walk from
// (lower_w, lower_h) to (W - 1 + upper_w, H - 1 + upper_h), every stride_w-th and stride_h-th, W fastest, then on to
// the next image.
struct Im2colTensor {
  DType dtype;
  int64_t C, W, H, N;
  int64_t pitch;  // elements from pixel to pixel
  int lower_w, lower_h, upper_w, upper_h;
  int stride_w, stride_h;
  int channels, pixels;
};

// Throw std::runtime_error where TMA cannot do what is asked; fits() says so beforehand.
TensorMap tensor_map(const TiledTensor& tensor, const void* base);
TensorMap tensor_map(const Im2colTensor& tensor, const void* base);

// Makes `map` describe another tensor that differs in its address alone. Throws likewise.
void replace_address(TensorMap& map, const void* base);

bool fits(const TiledTensor& tensor);
bool fits(const Im2colTensor& tensor);

}  // namespace cnnops::cuda
