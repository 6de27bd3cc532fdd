// What the kernels of all backends share: tensors of PyTorch's stable ABI, and the arithmetic of bilinear resizing.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace ops_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One axis of a bilinear resize, as F.interpolate defines it: output pixel o lies between the input pixels lower(o) and
// lower(o) + 1, of which the second has the share upper(o). Cell i is what lies between the input pixels i and i + 1;
// beyond the last pixel there is one more cell, whose two sides are both that pixel. The output pixels of cell i are
// first(i) to first(i + 1) - 1, none of them where the image shrinks past it.
struct Axis {
  int64_t in, out;
  float scale;
  bool align_corners;

  Axis(int64_t in_, int64_t out_, bool align) : in(in_), out(out_), align_corners(align) {
    scale = !align ? float(in) / float(out) : out > 1 ? float(in - 1) / float(out - 1) : 0.0f;
  }

  // Rounded once, by fma: wherever this is inlined it gives the same bits, on which first() and upper() have to agree.
  HOST_DEVICE float source(int64_t o) const {
    const float at = align_corners ? scale * float(o) : std::fma(scale, float(o) + 0.5f, -0.5f);
    return at > 0.0f ? at : 0.0f;
  }

  HOST_DEVICE int64_t lower(int64_t o) const {
    const int64_t i = int64_t(source(o));
    return i < in - 1 ? i : in - 1;
  }

  HOST_DEVICE float upper(int64_t o) const {
    const float share = source(o) - float(lower(o));
    return share < 1.0f ? share : 1.0f;
  }

  HOST_DEVICE int64_t first(int64_t i) const {
    if (i <= 0) return 0;
    if (i >= in || !(scale > 0.0f)) return out;
    // The inverse of source(), rounded; then the few steps that rounding may be off.
    const float guess = align_corners ? float(i) / scale : (float(i) + 0.5f) / scale - 0.5f;
    int64_t o = guess < float(out) ? int64_t(guess) : out;
    while (o > 0 && lower(o - 1) >= i) --o;
    while (o < out && lower(o) < i) ++o;
    return o;
  }
};

// The functions in Python say in words what is wrong; these checks keep a raw call inside memory.
inline void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0 && logits.scalar_type() == ScalarType::Float,
                  "logits: expected float32 (N, C, h, w), not empty");
}

inline void check_cross_entropy(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& pixel_grad) {
  check_logits(logits);
  const auto type = target.scalar_type();
  STD_TORCH_CHECK(target.dim() == 3 && target.size(0) == logits.size(0) && target.numel() > 0 &&
                      (type == ScalarType::Byte || type == ScalarType::Long),
                  "target: expected uint8 or int64 (N, H, W), not empty");
  STD_TORCH_CHECK(!weight || (weight->numel() == logits.size(1) && weight->scalar_type() == ScalarType::Float),
                  "weight: expected float32 (C,)");
  STD_TORCH_CHECK(!pixel_grad || (pixel_grad->numel() == target.numel() && pixel_grad->is_contiguous() &&
                                  pixel_grad->scalar_type() == ScalarType::Float),
                  "pixel_grad: expected contiguous float32 (N, H, W)");
}

}  // namespace ops_ext
