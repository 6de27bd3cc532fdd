// ops_ext/cuda.cu as a library of CPU operators, torch.ops.ops_emulated.
#include "../../ops_ext/common.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) static void implement(torch::stable::detail::StableLibrary& m)
#include "../../ops_ext/cuda.cu"

STABLE_TORCH_LIBRARY(ops_emulated, m) { ops_ext::define_operators(m); }

_STABLE_TORCH_LIBRARY_IMPL(ops_emulated, CPU, m, 0) { implement(m); }
