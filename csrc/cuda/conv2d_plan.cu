#include <string>

#include "conv2d_plan.h"
#include "conv2d_sm90.h"

namespace cnnops::cuda {

Conv2dPlan plan_forward(const Conv2dProblem& p, const Device& device) {
  const char* refusal = nullptr;
  if (const auto plan = plan_forward_sm90(p, device, refusal)) return *plan;
  return {Conv2dKernel::kPortable, 64, 64, 3, 1, 1, refusal};
}

Conv2dPlan plan_backward_input(const Conv2dProblem& p, const Device& device) {
  const char* refusal = nullptr;
  if (const auto plan = plan_backward_input_sm90(p, device, refusal)) return *plan;
  return {Conv2dKernel::kPortable, 64, 64, 3, 1, 1, refusal};
}

Conv2dPlan plan_backward_weight(const Conv2dProblem& p, const Device& device) {
  const char* refusal = nullptr;
  if (const auto plan = plan_backward_weight_sm90(p, device, refusal)) return *plan;
  return {Conv2dKernel::kPortable, 64, 64, 3, 1, 1, refusal};
}

std::string describe(const Conv2dPlan& plan) {
  constexpr const char* kNames[] = {"portable", "packed", "stem", "wgmma", "halo"};
  return std::string(kNames[static_cast<int>(plan.kernel)]) + " " + std::to_string(plan.block_m) + "x" +
         std::to_string(plan.block_n) + ", " + std::to_string(plan.stages) + " stages, cluster " +
         std::to_string(plan.cluster) + ", splits " + std::to_string(plan.splits) + ": " + plan.reason;
}

}  // namespace cnnops::cuda
