// The emulator's face in Python. It is part of the same library as the emulated ops, or its state would exist twice.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>

#include "../cuda/tensor_map.h"
#include "guard.h"
#include "selftest.h"
#include "selftest_memory.h"
#include "simt.h"

// The file name that Python imports the library by; sanitized builds have their own.
#if !defined(CNNOPS_MODULE)
#define CNNOPS_MODULE _native_simt
#endif

namespace py = pybind11;
namespace simt = cnnops::simt;

namespace {

void set_schedule(const std::string& order, uint64_t seed) {
  if (order == "forward") return simt::set_schedule(simt::Order::kForward, seed);
  if (order == "reversed") return simt::set_schedule(simt::Order::kReversed, seed);
  if (order == "random") return simt::set_schedule(simt::Order::kRandom, seed);
  throw py::value_error("set_schedule: order must be forward, reversed or random, but got order='" + order + "'");
}

void guard_tensors(const std::string& where) {
  if (where == "") return simt::guard_tensors(simt::Guard::kNone);
  if (where == "end") return simt::guard_tensors(simt::Guard::kEnd);
  if (where == "start") return simt::guard_tensors(simt::Guard::kStart);
  throw py::value_error("guard_tensors: where must be 'end', 'start' or '', but got where='" + where + "'");
}

void count_accesses(bool on) {
  if (!simt::trace::available())
    throw std::runtime_error("count_accesses: a sanitized library does not report the accesses of its kernels");
  simt::count_accesses(on);
}

py::dict dict_of(const simt::Traffic& moved) {
  py::dict out;
  out["global_read_bytes"] = moved.global_read_bytes;
  out["global_read_sectors"] = moved.global_read_sectors;
  out["global_write_bytes"] = moved.global_write_bytes;
  out["global_write_sectors"] = moved.global_write_sectors;
  out["dram_read_bytes"] = moved.dram_read_bytes;
  out["dram_write_bytes"] = moved.dram_write_bytes;
  out["shared_bytes"] = moved.shared_bytes;
  out["bank_conflicts"] = moved.bank_conflicts;
  out["flops"] = moved.flops;
  return out;
}

py::dict counters() {
  const simt::Counters now = simt::counters();
  py::dict out;
  out["launches"] = now.launches;
  out["blocks"] = now.blocks;
  out["switches"] = now.switches;
  out["block_barriers"] = now.block_barriers;
  out["warp_collectives"] = now.warp_collectives;
  out["kernels"] = now.kernels;
  std::map<std::string, std::map<std::string, size_t>> configurations;
  for (const auto& [kernel, most] : now.configurations)
    configurations[kernel] = {{"threads", most.threads}, {"shared_bytes", most.shared_bytes}};
  out["configurations"] = configurations;
  py::dict traffic;
  for (const auto& [kernel, moved] : now.traffic) traffic[py::str(kernel)] = dict_of(moved);
  out["traffic"] = traffic;
  return out;
}

using Extents = std::array<unsigned, 3>;

void launch_empty(const Extents& grid, const Extents& block, size_t shared_bytes, bool cooperative) {
  simt::launch(
      "empty", dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes, [] {}, 1,
      cooperative);
}

using cnnops::DType;
namespace cuda = cnnops::cuda;

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat;
  if (name == "float64") return DType::kDouble;
  if (name == "float16") return DType::kHalf;
  if (name == "bfloat16") return DType::kBFloat16;
  throw py::value_error("dtype must be float16, bfloat16, float32 or float64, but is '" + name + "'");
}

// Whether it fits is known without the base, and a misaligned one is refused all the same.
template <class Tensor>
bool check_map(const Tensor& tensor, uintptr_t base) {
  const bool fits = cuda::fits(tensor);
  cuda::tensor_map(tensor, reinterpret_cast<const void*>(base));
  return fits;
}

bool check_tiled_map(const std::string& dtype, const std::vector<int64_t>& extent, const std::vector<int64_t>& stride,
                     const std::vector<int>& box, const std::vector<int>& element_stride, uintptr_t base) {
  cuda::TiledTensor tensor{dtype_of(dtype), static_cast<int>(extent.size()), {}, {}, {}, {}};
  const size_t rank = extent.size();
  if (stride.size() != rank || box.size() != rank || element_stride.size() != rank)
    throw py::value_error("extent, stride, box and element_stride must be of one length");
  for (size_t axis = 0; axis < std::min<size_t>(rank, 4); ++axis) {
    tensor.extent[axis] = extent[axis];
    tensor.stride[axis] = stride[axis];
    tensor.box[axis] = box[axis];
    tensor.element_stride[axis] = element_stride[axis];
  }
  return check_map(tensor, base);
}

bool check_im2col_map(const std::string& dtype, const std::array<int64_t, 4>& cwhn, int64_t pitch,
                      const std::array<int, 2>& lower, const std::array<int, 2>& upper,
                      const std::array<int, 2>& stride, int channels, int pixels, uintptr_t base) {
  return check_map(cuda::Im2colTensor{dtype_of(dtype), cwhn[0], cwhn[1], cwhn[2], cwhn[3], pitch, lower[0], lower[1],
                                      upper[0], upper[1], stride[0], stride[1], channels, pixels},
                   base);
}

}  // namespace

PYBIND11_MODULE(CNNOPS_MODULE, m) {
  m.doc() = "The CUDA kernels, run on a CPU by an emulator, and its controls.";
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 0,
        "Run threads and blocks in 'forward', 'reversed' or 'random' order. With 'random', asynchronous copies land at "
        "once or as late as allowed, as the seed has it. Raises ValueError for another order.");
  m.def("set_device", &simt::set_device, py::arg("architecture") = 90, py::arg("multiprocessors") = 3,
        py::arg("l2_bytes") = 256 << 10,
        "Claim to be a device of this architecture (80, 86 or 90: its shared memory, and whether it has TMA, wgmma and "
        "clusters) with so many multiprocessors and so much L2. Raises ValueError for another.");
  m.def(
      "run_blocks",
      [](uint64_t first, std::optional<uint64_t> count) { simt::run_blocks(first, count.value_or(UINT64_MAX)); },
      py::arg("first") = 0, py::arg("count") = py::none(),
      "Run only these blocks of each launch, by linear index; without arguments, all. A launch whose clusters that "
      "would cut apart raises RuntimeError.");
  m.def("sync_wrappers", &simt::sync_wrappers, "The names of everything that kernels synchronise with.");
  m.def("disable_sync", &simt::disable_sync, py::arg("name") = "",
        "From here on the named wrapper does nothing; '' restores it. Raises ValueError for an unknown name.");
  m.def(
      "counters", &counters,
      "What ran since reset_counters(): launches, blocks, switches (of threads), block_barriers and warp_collectives "
      "(arrivals at them), kernels (launches by name), configurations (the most threads and dynamic shared_bytes that "
      "a block of each kernel had) and traffic (by kernel, of launches while accesses were counted; the fields are "
      "explained in csrc/simt/trace.h).");
  m.def(
      "guard_tensors", &guard_tensors, py::arg("where"),
      "Run each op from now on with its tensors flush against a page that faults, at their 'end' or their 'start', or "
      "where they are (''). An access beside one raises RuntimeError. Raises ValueError for another place.");
  m.def("count_accesses", &count_accesses, py::arg("on"),
        "Count what kernels move from now on, or no more. Raises RuntimeError in a sanitized library, which cannot.");
  m.def("reset_counters", &simt::reset_counters, "Set every counter to zero.");
  m.def("check_tiled_map", &check_tiled_map, py::arg("dtype"), py::arg("extent"), py::arg("stride"), py::arg("box"),
        py::arg("element_stride"), py::arg("base") = 0,
        "Describe this tensor (axes innermost first, strides in elements) to TMA. Returns True; raises RuntimeError "
        "with what a driver would refuse.");
  m.def("check_im2col_map", &check_im2col_map, py::arg("dtype"), py::arg("cwhn"), py::arg("pitch"), py::arg("lower"),
        py::arg("upper"), py::arg("stride"), py::arg("channels"), py::arg("pixels"), py::arg("base") = 0,
        "The same for columns of an NHWC tensor's pixels; corners and strides are (w, h).");
  m.def("tensor_maps_made", &cuda::tensor_maps_made,
        "How many descriptions of tensors to TMA were made so far: a device's driver would have encoded each.");
  m.def("fault_names", &simt::fault_names, "The faults that run_fault knows.");
  m.def("run_fault", &simt::run_fault, py::arg("name"), py::arg("faulty") = true,
        "Run a kernel that commits the named fault, or its sound twin. Returns whether its result was right; raises "
        "RuntimeError where the emulator stops it, ValueError for an unknown name.");
  m.def("memory_fault_names", &simt::memory_fault_names, "The faults that run_memory_fault knows.");
  m.def("run_memory_fault", &simt::run_memory_fault, py::arg("name"), py::arg("faulty") = true,
        "As run_fault, for faults of access to memory, on tensors guarded as guard_tensors has it.");
  m.def("traffic_names", &simt::traffic_names, "The kernels that run_traffic knows.");
  m.def("run_traffic", &simt::run_traffic, py::arg("name"),
        "Run a kernel of one warp whose traffic is known. Raises ValueError for an unknown name.");
  m.def("launch_empty", &launch_empty, py::arg("grid"), py::arg("block"), py::arg("shared_bytes") = 0,
        py::arg("cooperative") = false,
        "Launch a kernel that does nothing. grid, block: (x, y, z). Raises RuntimeError if a device would refuse it.");
}
