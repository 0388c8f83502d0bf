// The emulator's face in Python. It is part of the same library as the emulated ops, or its state would exist twice.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "selftest.h"
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
  return out;
}

using Extents = std::array<unsigned, 3>;

void launch_empty(const Extents& grid, const Extents& block, size_t shared_bytes) {
  simt::launch("empty", dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes, [] {});
}

}  // namespace

PYBIND11_MODULE(CNNOPS_MODULE, m) {
  m.doc() = "The CUDA kernels, run on a CPU by an emulator, and its controls.";
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 0,
        "Run threads and blocks in 'forward', 'reversed' or 'random' order. With 'random', asynchronous copies land at "
        "once or as late as allowed, as the seed has it. Raises ValueError for another order.");
  m.def("set_device", &simt::set_device, py::arg("architecture") = 90, py::arg("multiprocessors") = 3,
        "Claim to be a device of this architecture (80, 86 or 90: its shared memory, and whether it has TMA, wgmma and "
        "clusters) with so many multiprocessors. Raises ValueError for another.");
  m.def(
      "run_blocks",
      [](uint64_t first, std::optional<uint64_t> count) { simt::run_blocks(first, count.value_or(UINT64_MAX)); },
      py::arg("first") = 0, py::arg("count") = py::none(),
      "Run only these blocks of each launch, by linear index; without arguments, all. A launch whose clusters that "
      "would cut apart raises RuntimeError.");
  m.def("sync_wrappers", &simt::sync_wrappers, "The names of everything that kernels synchronise with.");
  m.def("disable_sync", &simt::disable_sync, py::arg("name") = "",
        "From here on the named wrapper does nothing; '' restores it. Raises ValueError for an unknown name.");
  m.def("counters", &counters,
        "What ran since reset_counters(): launches, blocks, switches (of threads), block_barriers and warp_collectives "
        "(arrivals at them), kernels (launches by name) and configurations (the most threads and dynamic shared_bytes "
        "that a block of each kernel had).");
  m.def("reset_counters", &simt::reset_counters, "Set every counter to zero.");
  m.def("fault_names", &simt::fault_names, "The faults that run_fault knows.");
  m.def("run_fault", &simt::run_fault, py::arg("name"), py::arg("faulty") = true,
        "Run a kernel that commits the named fault, or its sound twin. Returns whether its result was right; raises "
        "RuntimeError where the emulator stops it, ValueError for an unknown name.");
  m.def("launch_empty", &launch_empty, py::arg("grid"), py::arg("block"), py::arg("shared_bytes") = 0,
        "Launch a kernel that does nothing. grid, block: (x, y, z). Raises RuntimeError if a device would refuse it.");
}
