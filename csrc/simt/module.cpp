// The emulator's face in Python. It is part of the same library as the emulated ops, or its state would exist twice.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

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
  py::dict traffic;
  for (const auto& [kernel, moved] : now.traffic) traffic[py::str(kernel)] = dict_of(moved);
  out["traffic"] = traffic;
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
  m.def(
      "counters", &counters,
      "What ran since reset_counters(): launches, blocks, switches (of threads), block_barriers and warp_collectives "
      "(arrivals at them), kernels (launches by name) and traffic (by kernel, of launches while accesses were counted; "
      "the fields are explained in csrc/simt/trace.h).");
  m.def(
      "guard_tensors", &guard_tensors, py::arg("where"),
      "Run each op from now on with its tensors flush against a page that faults, at their 'end' or their 'start', or "
      "where they are (''). An access beside one raises RuntimeError. Raises ValueError for another place.");
  m.def("count_accesses", &count_accesses, py::arg("on"),
        "Count what kernels move from now on, or no more. Raises RuntimeError in a sanitized library, which cannot.");
  m.def("reset_counters", &simt::reset_counters, "Set every counter to zero.");
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
        "Launch a kernel that does nothing. grid, block: (x, y, z). Raises RuntimeError if a device would refuse it.");
}
