// Kernels with one known fault in memory each, and kernels whose traffic is known, so that a test can see both noticed.
#pragma once

#include <string>
#include <vector>

namespace cnnops::simt {

std::vector<std::string> memory_fault_names();

// Runs the kernel that commits the fault, or its sound twin, on tensors guarded as guard_tensors has it. Whether the
// result was right; throws std::runtime_error where the emulator refuses it, std::invalid_argument for an unknown name.
bool run_memory_fault(const std::string& name, bool faulty);

std::vector<std::string> traffic_names();
// Runs one warp of the kernel of this name. Throws std::invalid_argument for an unknown name.
void run_traffic(const std::string& name);

}  // namespace cnnops::simt
