// What a choice of kernel asks of a device.
#pragma once

namespace cnnops::cuda {

struct Device {
  int architecture;  // 80, 86, 89, 90, ...: the compute capability
  int multiprocessors;
  int shared_bytes;  // that one block may have
  int l2_bytes = 0;  // of the cache that all multiprocessors share; 0 where nothing is known of it
};

}  // namespace cnnops::cuda
