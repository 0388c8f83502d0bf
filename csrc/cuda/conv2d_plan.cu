#include <string>

#include "conv2d_plan.h"
#include "conv2d_sm90.h"

namespace cnnops::cuda {

Conv2dPlan plan_forward(const Conv2dProblem&, const Device&) {
  return {Conv2dKernel::kPortable, 64, 64, 3, 1, 1, "takes any problem"};
}

Conv2dPlan plan_backward_input(const Conv2dProblem&, const Device&) {
  return {Conv2dKernel::kPortable, 64, 64, 3, 1, 1, "takes any problem"};
}

Conv2dPlan plan_backward_weight(const Conv2dProblem& p, const Device& device) {
  if (const auto plan = plan_backward_weight_sm90(p, device)) return *plan;
  return {Conv2dKernel::kPortable, 64, 64, 3, 1, 1, "takes any problem"};
}

}  // namespace cnnops::cuda
