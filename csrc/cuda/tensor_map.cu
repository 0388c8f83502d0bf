// Tensor maps: the limits of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col as cuda.h states them, checked here so
// that an error names what was refused; then the driver's encoding, or the emulator's plain description.

#include <algorithm>
#include <atomic>

#include "tensor_map.h"

namespace cnnops::cuda {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 32, kMaxStrideBytes = int64_t{1} << 40;
constexpr int64_t kAlignment = 16, kMaxBox = 256, kMaxInnerBytes = 128, kMaxElementStride = 8;
constexpr int64_t kMaxChannels = 256, kMaxPixels = 1024, kMinCorner = -128, kMaxCorner = 127;

int64_t size_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

bool within(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

std::string of(const char* what, int axis, int64_t value) {
  return std::string(what) + "[" + std::to_string(axis) + "]=" + std::to_string(value);
}

// What the driver would refuse; empty if nothing.
std::string refusal(DType dtype, int rank, const int64_t* extent, const int64_t* stride, const int* element_stride) {
  if (dtype == DType::kDouble) return "float64 is not loaded by TMA";
  for (int axis = 0; axis < rank; ++axis) {
    if (!within(extent[axis], 1, kMaxExtent)) return of("extent", axis, extent[axis]) + " is not from 1 to 2^32";
    if (!within(element_stride[axis], 1, kMaxElementStride))
      return of("element_stride", axis, element_stride[axis]) + " is not from 1 to 8";
    if (axis == 0) continue;
    if (!within(stride[axis], 1, kMaxStrideBytes / size_of(dtype) - 1))
      return of("stride", axis, stride[axis]) + " elements are not from 1 to less than 2^40 bytes";
    if (stride[axis] * size_of(dtype) % kAlignment)
      return of("stride", axis, stride[axis]) + " elements are no multiple of 16 bytes";
  }
  if (stride[0] != 1) return of("stride", 0, stride[0]) + " is not 1";
  if (element_stride[0] != 1) return of("element_stride", 0, element_stride[0]) + ": TMA takes every element of axis 0";
  return "";
}

std::string inner_refusal(DType dtype, int64_t elements) {
  const int64_t bytes = elements * size_of(dtype);
  if (bytes % kAlignment) return std::to_string(bytes) + " bytes along axis 0 are no multiple of 16";
  if (bytes > kMaxInnerBytes) return std::to_string(bytes) + " bytes along axis 0 exceed the swizzle's 128";
  return "";
}

std::string refusal(const TiledTensor& t) {
  if (!within(t.rank, 1, 4)) return "rank " + std::to_string(t.rank) + " is not from 1 to 4";
  if (const auto why = refusal(t.dtype, t.rank, t.extent, t.stride, t.element_stride); !why.empty()) return why;
  for (int axis = 0; axis < t.rank; ++axis)
    if (t.box[axis] < 1 || int64_t{t.box[axis]} * t.element_stride[axis] > kMaxBox)
      return of("box", axis, t.box[axis]) + " elements, " + of("element_stride", axis, t.element_stride[axis]) +
             " apart, are not from 1 to 256";
  return inner_refusal(t.dtype, t.box[0]);
}

// An im2col tensor's axes as the driver counts them: C, W, H, N.
struct Axes {
  explicit Axes(const Im2colTensor& t)
      : extent{t.C, t.W, t.H, t.N},
        stride{1, t.pitch, t.pitch * t.W, t.pitch * t.W * t.H},
        element_stride{1, t.stride_w, t.stride_h, 1} {}
  int64_t extent[4], stride[4];
  int element_stride[4];
};

std::string refusal(const Im2colTensor& t) {
  const int64_t extents[] = {t.C, t.W, t.H, t.N, t.pitch};
  for (const int64_t each : extents)  // these first, so that products of them stay within 64 bits
    if (!within(each, 1, kMaxExtent)) return "an extent of " + std::to_string(each) + " is not from 1 to 2^32";
  if (t.pitch < t.C) return "a pitch of " + std::to_string(t.pitch) + " elements is less than C";
  if (t.W > kMaxStrideBytes / t.pitch || t.H > kMaxStrideBytes / (t.pitch * t.W)) return "an image exceeds 2^40 bytes";
  const Axes axes(t);
  if (const auto why = refusal(t.dtype, 4, axes.extent, axes.stride, axes.element_stride); !why.empty()) return why;
  const int corners[] = {t.lower_w, t.lower_h, t.upper_w, t.upper_h};
  for (const int corner : corners)
    if (!within(corner, kMinCorner, kMaxCorner))
      return "a corner of " + std::to_string(corner) + " is not from -128 to 127";
  if (t.W - 1 + t.upper_w < t.lower_w || t.H - 1 + t.upper_h < t.lower_h) return "the bounding box is empty";
  if (!within(t.channels, 1, kMaxChannels)) return std::to_string(t.channels) + " channels are not from 1 to 256";
  if (!within(t.pixels, 1, kMaxPixels)) return std::to_string(t.pixels) + " pixels are not from 1 to 1024";
  return inner_refusal(t.dtype, t.channels);
}

void require_aligned(const void* base) {
  if (reinterpret_cast<uintptr_t>(base) % kAlignment)
    throw std::runtime_error("tensor map: the base is not aligned to 16 bytes");
}

#if defined(CNNOPS_SIMT)

std::atomic<int> made{0};

TensorMap describe(DType dtype, int rank, const int64_t* extent, const int64_t* stride, const int* element_stride,
                   const void* base) {
  ++made;
  TensorMap map{};
  map.base = base;
  map.dtype = dtype;
  map.rank = rank;
  for (int axis = 0; axis < rank; ++axis) {
    map.extent[axis] = static_cast<uint64_t>(extent[axis]);
    map.stride_bytes[axis] = static_cast<uint64_t>(stride[axis] * size_of(dtype));
    map.element_stride[axis] = static_cast<uint32_t>(element_stride[axis]);
  }
  return map;
}

TensorMap encode(const TiledTensor& t, const void* base) {
  TensorMap map = describe(t.dtype, t.rank, t.extent, t.stride, t.element_stride, base);
  for (int axis = 0; axis < t.rank; ++axis) map.box[axis] = static_cast<uint32_t>(t.box[axis]);
  return map;
}

TensorMap encode(const Im2colTensor& t, const void* base) {
  const Axes axes(t);
  TensorMap map = describe(t.dtype, 4, axes.extent, axes.stride, axes.element_stride, base);
  map.im2col = true;
  map.lower[0] = t.lower_w;
  map.lower[1] = t.lower_h;
  map.upper[0] = t.upper_w;
  map.upper[1] = t.upper_h;
  map.channels = static_cast<uint32_t>(t.channels);
  map.pixels = static_cast<uint32_t>(t.pixels);
  return map;
}

void encode_address(TensorMap& map, const void* base) { map.base = base; }

#else

// A function of the driver, as of CUDA 12.0.
template <class Function>
Function* driver_function(const char* name) {
  constexpr unsigned kVersion = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string("the driver has no ") + name);
  return reinterpret_cast<Function*>(function);
}

CUtensorMapDataType data_type(DType dtype) {
  if (dtype == DType::kFloat) return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  return dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

struct DriverAxes {
  DriverAxes(DType dtype, int rank, const int64_t* extents, const int64_t* strides, const int* element_strides) {
    for (int axis = 0; axis < rank; ++axis) {
      extent[axis] = static_cast<cuuint64_t>(extents[axis]);
      element_stride[axis] = static_cast<cuuint32_t>(element_strides[axis]);
      if (axis) stride_bytes[axis - 1] = static_cast<cuuint64_t>(strides[axis] * size_of(dtype));
    }
  }
  cuuint64_t extent[4], stride_bytes[3];
  cuuint32_t element_stride[4];
};

void check_encoded(CUresult status, const char* name) {
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string("tensor map: ") + name + " fails with error " + std::to_string(status));
}

TensorMap encode(const TiledTensor& t, const void* base) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  static auto* const encode_tiled = driver_function<decltype(cuTensorMapEncodeTiled)>(kName);
  const DriverAxes axes(t.dtype, t.rank, t.extent, t.stride, t.element_stride);
  cuuint32_t box[4];  // the driver counts the elements that are skipped, too
  for (int axis = 0; axis < t.rank; ++axis) box[axis] = static_cast<cuuint32_t>(t.box[axis] * t.element_stride[axis]);
  TensorMap map{};
  check_encoded(
      encode_tiled(&map, data_type(t.dtype), static_cast<cuuint32_t>(t.rank), const_cast<void*>(base), axes.extent,
                   axes.stride_bytes, box, axes.element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      kName);
  return map;
}

TensorMap encode(const Im2colTensor& t, const void* base) {
  constexpr const char* kName = "cuTensorMapEncodeIm2col";
  static auto* const encode_im2col = driver_function<decltype(cuTensorMapEncodeIm2col)>(kName);
  const Axes all(t);
  const DriverAxes axes(t.dtype, 4, all.extent, all.stride, all.element_stride);
  // Innermost first, like all its arrays and as CUTLASS passes them, though cuda.h writes {D, H, W}.
  const int lower[] = {t.lower_w, t.lower_h}, upper[] = {t.upper_w, t.upper_h};
  TensorMap map{};
  check_encoded(encode_im2col(&map, data_type(t.dtype), 4, const_cast<void*>(base), axes.extent, axes.stride_bytes,
                              lower, upper, static_cast<cuuint32_t>(t.channels), static_cast<cuuint32_t>(t.pixels),
                              axes.element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                kName);
  return map;
}

void encode_address(TensorMap& map, const void* base) {
  constexpr const char* kName = "cuTensorMapReplaceAddress";
  static auto* const replace = driver_function<decltype(cuTensorMapReplaceAddress)>(kName);
  check_encoded(replace(&map, const_cast<void*>(base)), kName);
}

#endif

template <class Tensor>
TensorMap make(const Tensor& tensor, const void* base) {
  if (const std::string why = refusal(tensor); !why.empty()) throw std::runtime_error("tensor map: " + why);
  require_aligned(base);
  return encode(tensor, base);
}

}  // namespace

TensorMap tensor_map(const TiledTensor& tensor, const void* base) { return make(tensor, base); }
TensorMap tensor_map(const Im2colTensor& tensor, const void* base) { return make(tensor, base); }

void replace_address(TensorMap& map, const void* base) {
  require_aligned(base);
  encode_address(map, base);
}

#if defined(CNNOPS_SIMT)
int64_t tensor_maps_made() { return made; }
#endif

bool fits(const TiledTensor& tensor) { return refusal(tensor).empty(); }
bool fits(const Im2colTensor& tensor) { return refusal(tensor).empty(); }

}  // namespace cnnops::cuda
