// upsample_cross_entropy on CUDA. Every result is summed by one thread, without floating-point atomics, so that every
// run gives the same bits.
#include "cuda.h"

#include <cstdio>

namespace ops_ext {
namespace {

constexpr int IGNORED = -1, IMPOSSIBLE = -2;
constexpr unsigned MOST_MESSAGES = 10;  // about impossible labels, by one process
__device__ unsigned messages = 0;

// Labels, and what the loss is made of beside them and the logits.
struct Loss {
  const void* labels;
  bool wide;  // int64, else uint8
  int64_t label_image, label_row, label_column;
  int64_t ignore_index, classes;
  const float* weight;  // per class, or null for 1
  int64_t weight_stride;
  const float* pixel_grad;  // gradient of each pixel's loss (N, H, W), or null for 1

  Loss(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight_,
       const std::optional<Tensor>& pixel_grad_, int64_t ignore_index_)
      : labels(target.const_data_ptr()), wide(target.scalar_type() == ScalarType::Long), label_image(target.stride(0)),
        label_row(target.stride(1)), label_column(target.stride(2)), ignore_index(ignore_index_),
        classes(logits.size(1)),
        weight(weight_ ? static_cast<const float*>(weight_->const_data_ptr()) : nullptr),
        weight_stride(weight_ ? weight_->stride(0) : 0),
        pixel_grad(pixel_grad_ ? static_cast<const float*>(pixel_grad_->const_data_ptr()) : nullptr) {}

  __device__ int64_t stored(int64_t n, int64_t y, int64_t x) const {
    const int64_t at = n * label_image + y * label_row + x * label_column;
    return wide ? static_cast<const int64_t*>(labels)[at] : static_cast<const uint8_t*>(labels)[at];
  }
  __device__ int label(int64_t n, int64_t y, int64_t x) const {
    const int64_t label = stored(n, y, x);
    return label == ignore_index ? IGNORED : label < 0 || label >= classes ? IMPOSSIBLE : static_cast<int>(label);
  }
  __device__ float weight_of(int64_t k) const { return weight ? weight[k * weight_stride] : 1.0f; }

  __device__ void report(int64_t n, int64_t y, int64_t x) const {
    if (atomicAdd(&messages, 1u) >= MOST_MESSAGES) return;
    printf("upsample_cross_entropy: target holds %lld, expected labels from 0 to %lld or %lld (ignore_index)\n",
           static_cast<long long>(stored(n, y, x)), static_cast<long long>(classes - 1),
           static_cast<long long>(ignore_index));
  }
};

// Where results go; each may be null.
struct Results {
  float *log_sums, *map;   // (N, H, W): the logarithm of the softmax's denominator, and the loss of each pixel
  float *losses, *weights;  // sums of one thread
};

// A thread takes one output column of one row of cells.
__global__ void losses(Scores s, Axis rows, Axis columns, Loss loss, Results results) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * columns.out) return;
  const int64_t x = at % columns.out, i = at / columns.out % s.h, n = at / columns.out / s.h;
  const int64_t y1 = rows.first(i + 1), j = columns.lower(x);
  const Cell cell(s, n, i, j);
  const float w1 = columns.upper(x), w0 = 1.0f - w1;
  float sum_of_losses = 0, sum_of_weights = 0;
  for (int64_t y = rows.first(i); y < y1; y += STRIP) {
    float h1[STRIP], most[STRIP], mine[STRIP], sum[STRIP];
    int label[STRIP];
#pragma unroll
    for (int r = 0; r < STRIP; ++r) {
      const bool there = y + r < y1;
      h1[r] = there ? rows.upper(y + r) : 0.0f;
      label[r] = there ? loss.label(n, y + r, x) : IGNORED;
      most[r] = -INFINITE;
      mine[r] = sum[r] = 0;
    }
    for (int64_t k = 0; k < s.classes; ++k) {
      const float top = cell.top(k, w0, w1), bottom = cell.bottom(k, w0, w1);
#pragma unroll
      for (int r = 0; r < STRIP; ++r) {
        const float score = (1.0f - h1[r]) * top + h1[r] * bottom;
        most[r] = score > most[r] ? score : most[r];
        mine[r] = label[r] == k ? score : mine[r];
      }
    }
    for (int64_t k = 0; k < s.classes; ++k) {
      const float top = cell.top(k, w0, w1), bottom = cell.bottom(k, w0, w1);
#pragma unroll
      for (int r = 0; r < STRIP; ++r) sum[r] += __expf((1.0f - h1[r]) * top + h1[r] * bottom - most[r]);
    }
#pragma unroll
    for (int r = 0; r < STRIP; ++r) {
      if (y + r >= y1) continue;
      const int64_t pixel = (n * rows.out + y + r) * columns.out + x;
      float log_sum = logf(sum[r]) + most[r], value = 0;
      if (label[r] >= 0) {
        const float weight = loss.weight_of(label[r]);
        value = weight * (log_sum - mine[r]);
        sum_of_weights += weight;
      } else if (label[r] == IMPOSSIBLE) {
        loss.report(n, y + r, x);
        value = log_sum = NOT_A_NUMBER;
      }
      if (results.log_sums) results.log_sums[pixel] = log_sum;
      if (results.map) results.map[pixel] = value;
      sum_of_losses += value;
    }
  }
  if (results.losses) results.losses[at] = sum_of_losses;
  results.weights[at] = sum_of_weights;
}

// The gradient of one class at the four corners of one cell, summed over the cell's pixels: parts[cell][corner][class].
// The threads of a warp are neighbouring classes, so that what they read of a pixel is the same.
__global__ void cell_gradients(Scores s, Axis rows, Axis columns, Loss loss, const float* log_sums, float* parts) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * s.w * s.classes) return;
  const int64_t k = at % s.classes, cell_at = at / s.classes;
  const int64_t j = cell_at % s.w, i = cell_at / s.w % s.h, n = cell_at / s.w / s.h;
  const int64_t x0 = columns.first(j), x1 = columns.first(j + 1), y1 = rows.first(i + 1);
  const Cell cell(s, n, i, j);
  float sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;
  for (int64_t x = x0; x < x1; ++x) {
    const float w1 = columns.upper(x), w0 = 1.0f - w1;
    const float top = cell.top(k, w0, w1), bottom = cell.bottom(k, w0, w1);
    float sum_top = 0, sum_bottom = 0;
    for (int64_t y = rows.first(i); y < y1; ++y) {
      const int label = loss.label(n, y, x);
      if (label == IGNORED) continue;
      const int64_t pixel = (n * rows.out + y) * columns.out + x;
      const float h1 = rows.upper(y), h0 = 1.0f - h1;
      const float weight = label >= 0 ? loss.weight_of(label) : 1.0f;
      const float factor = loss.pixel_grad ? weight * loss.pixel_grad[pixel] : weight;
      // A logarithm of a probability, never above 0 but by rounding; NaN where the label is impossible.
      const float log_p = h0 * top + h1 * bottom - log_sums[pixel];
      float each = factor * __expf(log_p > 0.0f ? 0.0f : log_p);
      if (label == k) each -= factor;
      sum_top += h0 * each;
      sum_bottom += h1 * each;
    }
    sum_a += w0 * sum_top;
    sum_b += w1 * sum_top;
    sum_c += w0 * sum_bottom;
    sum_d += w1 * sum_bottom;
  }
  float* part = parts + cell_at * 4 * s.classes + k;
  part[0] = sum_a;
  part[s.classes] = sum_b;
  part[2 * s.classes] = sum_c;
  part[3 * s.classes] = sum_d;
}

struct Gradient {  // (N, C, h, w) of any strides
  float* data;
  int64_t image, layer, row, column;
};

// Every low-resolution pixel gathers the parts of the cells around it. In the last row and column both sides of a cell
// are the same pixel, which takes both parts.
__global__ void gather_gradients(Scores s, const float* parts, Gradient grad) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * s.w * s.classes) return;
  const int64_t k = at % s.classes, pixel = at / s.classes;
  const int64_t j = pixel % s.w, i = pixel / s.w % s.h, n = pixel / s.w / s.h;
  float sum = 0;
  for (int64_t v = i > 0 ? i - 1 : 0; v <= i; ++v) {
    for (int64_t u = j > 0 ? j - 1 : 0; u <= j; ++u) {
      const float* part = parts + ((n * s.h + v) * s.w + u) * 4 * s.classes + k;
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t to_row = v + corner / 2 < s.h ? v + corner / 2 : s.h - 1;
        const int64_t to_column = u + corner % 2 < s.w ? u + corner % 2 : s.w - 1;
        if (to_row == i && to_column == j) sum += part[corner * s.classes];
      }
    }
  }
  grad.data[n * grad.image + k * grad.layer + i * grad.row + j * grad.column] = sum;
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& pixel_grad, int64_t ignore_index,
                                                          bool align_corners, bool per_pixel, bool with_grad) {
  check_cross_entropy(logits, target, weight, pixel_grad);
  const OnDeviceOf device(logits);
  const auto empty = [&](int64_t size) { return torch::stable::new_empty(logits, {size}); };
  const Scores scores(logits);
  const Axis rows(scores.h, target.size(1), align_corners), columns(scores.w, target.size(2), align_corners);
  const Loss terms(logits, target, weight, pixel_grad, ignore_index);
  const int64_t threads = scores.n * scores.h * columns.out, size = logits.numel();

  const Tensor log_sums = empty(with_grad ? target.numel() : 0);
  const Tensor sums = empty(per_pixel ? 0 : threads), weights = empty(threads);
  const Tensor map = per_pixel ? torch::stable::new_empty(logits, target.sizes()) : empty(0);
  const Results results{with_grad ? floats(log_sums) : nullptr, per_pixel ? floats(map) : nullptr,
                        per_pixel ? nullptr : floats(sums), floats(weights)};
  device.launch(losses, threads, scores, rows, columns, terms, results);
  Tensor grad = empty(0);
  if (with_grad) {
    grad = torch::stable::empty_like(logits);
    const Tensor parts = empty(4 * size);
    device.launch(cell_gradients, size, scores, rows, columns, terms, floats(log_sums), floats(parts));
    device.launch(gather_gradients, size, scores, floats(parts),
                  Gradient{floats(grad), grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)});
  }
  return {per_pixel ? map : torch::stable::sum(sums), torch::stable::sum(weights), grad};
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CUDA, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&ops_ext::upsample_cross_entropy));
}
