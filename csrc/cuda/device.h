// What a choice of kernel asks of a device.
#pragma once

namespace cnnops::cuda {

struct Device {
  int architecture;  // 80, 86, 89, 90, ...: the compute capability
  int multiprocessors;
  int shared_bytes;  // that one block may have
};

}  // namespace cnnops::cuda
