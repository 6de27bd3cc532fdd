// The .cu files of ops_ext as a library of CPU operators, torch.ops.ops_emulated.
#include "../../ops_ext/common.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ops_emulated, CPU, m, __COUNTER__)
#include "../../ops_ext/upsample_argmax.cu"
#include "../../ops_ext/upsample_cross_entropy.cu"
