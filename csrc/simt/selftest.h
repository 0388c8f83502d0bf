// Kernels with one known fault each, so that a test can see the emulator notice it.
#pragma once

#include <string>
#include <vector>

namespace cnnops::simt {

// Runs its kernel under this name; whether the result was right.
struct Fault {
  const char* name;
  bool (*run)(const char* name, bool faulty);
};
std::vector<Fault> sm90_faults();

std::vector<std::string> fault_names();

// Runs the kernel that commits the fault, or its sound twin. Whether the result was right; throws std::runtime_error
// where the emulator refuses to go on, std::invalid_argument for an unknown name.
bool run_fault(const std::string& name, bool faulty);

}  // namespace cnnops::simt
