// The encoded maps, by description. A map differs between calls in its address alone, and replacing that is a fraction
// of encoding's work.

#include <map>
#include <mutex>

#include "tensor_maps.h"

namespace cnnops::cuda {
namespace {

constexpr size_t kMostMaps = 4096;  // some hundred bytes each; a network has some hundred

// All that tensor_map() depends on beside the address, without a struct's padding.
using Key = std::vector<int64_t>;

Key key_of(const TiledTensor& t) {
  Key key{static_cast<int64_t>(t.dtype), t.rank};
  for (int axis = 0; axis < t.rank; ++axis)
    for (const int64_t value : {t.extent[axis], t.stride[axis], int64_t{t.box[axis]}, int64_t{t.element_stride[axis]}})
      key.push_back(value);
  return key;
}

Key key_of(const Im2colTensor& t) {
  return {static_cast<int64_t>(t.dtype),
          t.C,
          t.W,
          t.H,
          t.N,
          t.pitch,
          t.lower_w,
          t.lower_h,
          t.upper_w,
          t.upper_h,
          t.stride_w,
          t.stride_h,
          t.channels,
          t.pixels};
}

template <class Tensor>
TensorMap cached(const Tensor& tensor, const void* base) {
  static std::mutex mutex;
  static std::map<Key, TensorMap> maps;
  const Key key = key_of(tensor);
  const std::lock_guard lock(mutex);
  auto found = maps.find(key);
  if (found == maps.end()) {
    if (maps.size() >= kMostMaps) maps.clear();
    found = maps.emplace(key, tensor_map(tensor, base)).first;
  }
  TensorMap map = found->second;
  replace_address(map, base);
  return map;
}

}  // namespace

TensorMap cached_tensor_map(const TiledTensor& tensor, const void* base) { return cached(tensor, base); }
TensorMap cached_tensor_map(const Im2colTensor& tensor, const void* base) { return cached(tensor, base); }

}  // namespace cnnops::cuda
