// What the CPU and the CUDA kernels share: the arithmetic of bilinear resizing, and the checks that keep a call inside memory.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
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
// lower(o) + 1, of which the second has the share upper(o). Cell i is what lies between the input pixels i and i + 1; beyond
// the last pixel there is one more cell, whose two sides are both that pixel. The output pixels of cell i are first(i) to
// first(i + 1) - 1, none of them where the image shrinks past it.
template <class T>
struct Axis {
  int64_t in, out;
  T scale;
  bool align_corners;

  Axis(int64_t in_, int64_t out_, bool align) : in(in_), out(out_), align_corners(align) {
    scale = !align ? T(in) / T(out) : out > 1 ? T(in - 1) / T(out - 1) : T(0);
  }

  // Rounded once, by fma: wherever this is inlined it gives the same bits, on which first() and upper() have to agree.
  HOST_DEVICE T source(int64_t o) const {
    const T at = align_corners ? scale * T(o) : std::fma(scale, T(o) + T(0.5), T(-0.5));
    return at > T(0) ? at : T(0);
  }

  HOST_DEVICE int64_t lower(int64_t o) const {
    const int64_t i = int64_t(source(o));
    return i < in - 1 ? i : in - 1;
  }

  HOST_DEVICE T upper(int64_t o) const {
    const T share = source(o) - T(lower(o));
    return share < T(1) ? share : T(1);
  }

  HOST_DEVICE int64_t first(int64_t i) const {
    if (i <= 0) return 0;
    if (i >= in || !(scale > T(0))) return out;
    // The inverse of source(), rounded; then the few steps that rounding may be off.
    const T guess = align_corners ? T(i) / scale : (T(i) + T(0.5)) / scale - T(0.5);
    int64_t o = guess < T(out) ? int64_t(guess) : out;
    while (o > 0 && lower(o - 1) >= i) --o;
    while (o < out && lower(o) < i) ++o;
    return o;
  }
};

// Errors for users; the public functions in Python have checked shapes and dtypes before, with the same care for words.
template <class... Parts>
inline void check(bool fine, const Parts&... parts) {
  if (fine) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ")";
  return text.str();
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline bool is_label(ScalarType type) { return type == ScalarType::Byte || type == ScalarType::Long; }

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_logits(const Tensor& logits) {
  check(logits.dim() == 4 && logits.numel() > 0 && is_float(logits.scalar_type()), "logits have shape ", shape(logits),
        ", expected float16, bfloat16, float32 or float64 of (N, C, h, w), not empty");
}

inline void check_argmax(const Tensor& logits, int64_t height, int64_t width) {
  check_logits(logits);
  check(logits.size(1) <= 256, "logits have ", logits.size(1), " classes, expected at most 256: labels are uint8");
  check(height >= 1 && width >= 1, "size is (", height, ", ", width, "), expected (height, width) of at least 1 pixel each");
}

inline void check_cross_entropy(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& pixel_grad) {
  check_logits(logits);
  check(is_label(target.scalar_type()), "target has another dtype than expected, uint8 or int64");
  check(target.dim() == 3 && target.size(0) == logits.size(0) && target.numel() > 0, "target has shape ", shape(target),
        ", expected (", logits.size(0), ", H, W) like the logits");
  check(target.size(2) <= INT32_MAX, "target is ", target.size(2), " pixels wide, expected less than 2^31");
  check(same_device(logits, target), "target is on another device than the logits");
  const auto loss_type = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (weight) {
    check(weight->dim() == 1 && weight->size(0) == logits.size(1), "weight has shape ", shape(*weight), ", expected (",
          logits.size(1), ",), one per class");
    check(weight->scalar_type() == loss_type, "weight has another dtype than expected, that of the loss");
    check(same_device(logits, *weight), "weight is on another device than the logits");
  }
  if (pixel_grad) {
    check(pixel_grad->dim() == 3 && pixel_grad->size(0) == target.size(0) && pixel_grad->size(1) == target.size(1) &&
              pixel_grad->size(2) == target.size(2) && pixel_grad->scalar_type() == loss_type &&
              same_device(logits, *pixel_grad),
          "the gradient has shape ", shape(*pixel_grad), ", expected the target's ", shape(target), " and the loss's dtype");
  }
}

// Gradients are accumulated in the loss's dtype, in the logits' memory format.
inline Tensor empty_gradient(const Tensor& logits) {
  const auto size = logits.sizes(), stride = logits.strides();
  bool first = true, last = true;  // contiguous, or channels_last, as torch.Tensor.is_contiguous() answers
  int64_t expected = 1;
  for (int d : {3, 2, 1, 0}) {
    first = first && (size[d] == 1 || stride[d] == expected);
    expected *= size[d];
  }
  expected = 1;
  for (int d : {1, 3, 2, 0}) {
    last = last && (size[d] == 1 || stride[d] == expected);
    expected *= size[d];
  }
  using torch::headeronly::MemoryFormat;
  const auto type = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(size, type, std::nullopt, logits.device(), std::nullopt,
                              !first && last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor");
  // The loss summed or per pixel; the sum of the weights of what is not ignored; the gradient of the sum, empty if not asked for.
  m.def("upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
        "bool align_corners, bool per_pixel, bool with_grad) -> (Tensor, Tensor, Tensor)");
  m.def("upsample_cross_entropy_backward(Tensor pixel_grad, Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
        "float label_smoothing, bool align_corners) -> Tensor");
}

}  // namespace ops_ext
