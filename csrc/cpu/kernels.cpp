// The kernel table of one ISA level.
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {

#define CNNOPS_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
CNNOPS_KERNELS(CNNOPS_DECLARE)
#undef CNNOPS_DECLARE

extern const Kernels table;
#define CNNOPS_FIELD(name) .name = name,
const Kernels table = {CNNOPS_KERNELS(CNNOPS_FIELD).conv2d_in_float = true};
#undef CNNOPS_FIELD

}  // namespace cnnops::cpu::CNNOPS_ISA
