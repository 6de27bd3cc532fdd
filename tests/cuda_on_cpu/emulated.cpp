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

STABLE_TORCH_LIBRARY(ops_emulated, m) {
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor");
  m.def("upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
        "bool align_corners, bool per_pixel, bool with_grad) -> (Tensor, Tensor, Tensor)");
  m.def("upsample_cross_entropy_backward(Tensor pixel_grad, Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
        "float label_smoothing, bool align_corners) -> Tensor");
  m.def("confusion_matrix(Tensor prediction, Tensor target, int num_classes, int ignore_index) -> Tensor");
}

_STABLE_TORCH_LIBRARY_IMPL(ops_emulated, CPU, m, 0) { implement(m); }
