// The CUDA kernels. Every result is summed by one thread, without floating-point atomics, so that every run gives the same bits.
//
// Positions are 64-bit throughout. Half-precision logits are cast to float32 first: at low resolution that costs next to nothing.

#include <cuda_runtime.h>

#include <cstdio>
#include <limits>
#include <type_traits>

#include "common.h"

namespace ops_ext {
namespace {

constexpr int BLOCK = 256;
constexpr int STRIP = 8;  // output pixels, one below the other, whose running results a thread holds in registers

// ------------------------------------------------------------------------------------------------------------------- launching

void check_cuda(cudaError_t error) { check(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// Makes the tensor's device the current one for as long as this lives; launches go to PyTorch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    const int device = tensor.get_device_index();
    check(aoti_torch_get_current_cuda_stream(device, &current) == 0, "PyTorch has no current stream on CUDA device ", device);
    stream = static_cast<cudaStream_t>(current);
  }

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t threads, std::type_identity_t<Parameters>... arguments) const {
    if (threads == 0) return;
    const int64_t blocks = (threads + BLOCK - 1) / BLOCK;
    check(blocks <= std::numeric_limits<int32_t>::max(), "the tensors are too large for one launch: ", threads, " threads");
    void* pointers[] = {static_cast<void*>(&arguments)...};
    const auto error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(BLOCK), pointers, 0, stream);
    cudaGetLastError();  // which the next launch, PyTorch's own, would else take for its own error
    check_cuda(error);
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard;
};

template <class T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();
template <class T>
constexpr T NOT_A_NUMBER = std::numeric_limits<T>::quiet_NaN();

__device__ int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// ------------------------------------------------------------------------------------------------------------- class scores

template <class T>
struct Scores {  // (N, C, h, w) logits of any strides
  const T* data;
  int64_t n, classes, h, w;
  int64_t image, layer, row, column;  // strides

  explicit Scores(const Tensor& logits)
      : data(static_cast<const T*>(logits.const_data_ptr())), n(logits.size(0)), classes(logits.size(1)), h(logits.size(2)),
        w(logits.size(3)), image(logits.stride(0)), layer(logits.stride(1)), row(logits.stride(2)), column(logits.stride(3)) {}
};

// The four corners of a cell; in the last row or column both sides are the same pixel.
template <class T>
struct Cell {
  const T *top_left, *top_right, *bottom_left, *bottom_right;  // scores of class 0
  int64_t layer;

  __device__ Cell(const Scores<T>& s, int64_t n, int64_t i, int64_t j) : layer(s.layer) {
    const int64_t right = j + 1 < s.w ? s.column : 0, below = i + 1 < s.h ? s.row : 0;
    top_left = s.data + n * s.image + i * s.row + j * s.column;
    top_right = top_left + right;
    bottom_left = top_left + below;
    bottom_right = bottom_left + right;
  }
  __device__ T top(int64_t k, T w0, T w1) const { return w0 * top_left[k * layer] + w1 * top_right[k * layer]; }
  __device__ T bottom(int64_t k, T w0, T w1) const { return w0 * bottom_left[k * layer] + w1 * bottom_right[k * layer]; }
};

// ------------------------------------------------------------------------------------------------------------ upsample_argmax

// Past this a product of bilinear weights could overflow; such scores, infinities and NaN take the slow path.
template <class T>
constexpr T ORDINARY = std::numeric_limits<T>::max() / 8;
constexpr uint16_t ODD = 1 << 15;

// For every low-resolution pixel its best class, marked ODD where not all scores are ordinary.
template <class T>
__global__ void label_corners(Scores<T> s, uint16_t* corners) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * s.w) return;
  const int64_t j = at % s.w, i = at / s.w % s.h, n = at / s.w / s.h;
  const T* score = s.data + n * s.image + i * s.row + j * s.column;
  T best = *score;
  uint16_t winner = 0;
  bool ordinary = true;
  for (int64_t k = 0; k < s.classes; ++k, score += s.layer) {
    if (*score > best) best = *score, winner = static_cast<uint16_t>(k);
    ordinary = ordinary && *score <= ORDINARY<T> && *score >= -ORDINARY<T>;
  }
  corners[at] = ordinary ? winner : ODD;
}

// A thread labels one output column of one row of cells. Where the corners of its cell agree on an ordinary label there is
// nothing to compute, and where all 32 columns of a warp do, nothing is read: bilinear interpolation is a convex combination.
template <class T>
__global__ void label_cells(Scores<T> s, Axis<T> rows, Axis<T> columns, const uint16_t* corners, uint8_t* out) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * columns.out) return;
  const int64_t x = at % columns.out, i = at / columns.out % s.h, n = at / columns.out / s.h;
  const int64_t y0 = rows.first(i), y1 = rows.first(i + 1);
  if (y0 == y1) return;
  const int64_t j = columns.lower(x);
  const int64_t right = j + 1 < s.w ? j + 1 : j, below = i + 1 < s.h ? i + 1 : i;
  const uint16_t* top_row = corners + (n * s.h + i) * s.w;
  const uint16_t* bottom_row = corners + (n * s.h + below) * s.w;
  const uint16_t a = top_row[j], b = top_row[right], c = bottom_row[j], d = bottom_row[right];
  uint8_t* line = out + (n * rows.out + y0) * columns.out + x;
  if (a == b && a == c && a == d && a != ODD) {
    for (int64_t y = y0; y < y1; ++y, line += columns.out) *line = static_cast<uint8_t>(a);
    return;
  }
  const bool ordinary = a != ODD && b != ODD && c != ODD && d != ODD;
  const Cell<T> cell(s, n, i, j);
  const T w1 = columns.upper(x), w0 = T(1) - w1;
  for (int64_t y = y0; y < y1; y += STRIP) {
    T best[STRIP], h1[STRIP];
    int winner[STRIP];
#pragma unroll
    for (int r = 0; r < STRIP; ++r) {
      h1[r] = y + r < y1 ? rows.upper(y + r) : T(0);
      best[r] = -INFINITE<T>;
      winner[r] = ordinary ? 0 : -1;
    }
    for (int64_t k = 0; k < s.classes; ++k) {
      const T top = cell.top(k, w0, w1), bottom = cell.bottom(k, w0, w1);
#pragma unroll
      for (int r = 0; r < STRIP; ++r) {
        const T score = (T(1) - h1[r]) * top + h1[r] * bottom;
        bool better = score > best[r];
        if (!ordinary) better = winner[r] < 0 || (best[r] == best[r] && (better || score != score));  // the first NaN wins
        best[r] = better ? score : best[r];
        winner[r] = better ? static_cast<int>(k) : winner[r];
      }
    }
#pragma unroll
    for (int r = 0; r < STRIP; ++r, line += columns.out)
      if (y + r < y1) *line = static_cast<uint8_t>(winner[r]);
  }
}

template <class T>
void argmax(const OnDeviceOf& device, const Tensor& logits, Tensor& out, bool align_corners) {
  const Scores<T> scores(logits);
  const Axis<T> rows(scores.h, out.size(1), align_corners), columns(scores.w, out.size(2), align_corners);
  const int64_t corner_count = scores.n * scores.h * scores.w;
  Tensor corners = torch::stable::new_empty(logits, {corner_count}, ScalarType::Short);
  auto* corner = static_cast<uint16_t*>(corners.mutable_data_ptr());
  device.launch(label_corners<T>, corner_count, scores, corner);
  device.launch(label_cells<T>, scores.n * scores.h * columns.out, scores, rows, columns, corner,
                static_cast<uint8_t*>(out.mutable_data_ptr()));
}

Tensor at_least_float(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? logits : torch::stable::to(logits, ScalarType::Float);
}

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  check_argmax(logits, height, width);
  const OnDeviceOf device(logits);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  if (logits.scalar_type() == ScalarType::Double)
    argmax<double>(device, logits, out, align_corners);
  else
    argmax<float>(device, at_least_float(logits), out, align_corners);
  return out;
}

// ----------------------------------------------------------------------------------------------------- upsample_cross_entropy

__device__ float exponential(float x) { return __expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float logarithm(float x) { return logf(x); }
__device__ double logarithm(double x) { return log(x); }

constexpr int IGNORED = -1, IMPOSSIBLE = -2;
constexpr unsigned MOST_MESSAGES = 10;  // about impossible labels, by one process
__device__ unsigned messages = 0;

// Labels, and what the loss is made of beside them and the logits.
template <class T>
struct Loss {
  const void* labels;
  bool wide;  // int64, else uint8
  int64_t label_image, label_row, label_column;
  int64_t ignore_index, classes;
  const T* weight;  // per class, or null for 1
  int64_t weight_stride;
  T hard, smoothing;    // 1 - label smoothing, label smoothing over the number of classes
  const T* pixel_grad;  // gradient of each pixel's loss (N, H, W), or null for 1

  __device__ int64_t stored(int64_t n, int64_t y, int64_t x) const {
    const int64_t at = n * label_image + y * label_row + x * label_column;
    return wide ? static_cast<const int64_t*>(labels)[at] : static_cast<const uint8_t*>(labels)[at];
  }
  __device__ int label(int64_t n, int64_t y, int64_t x) const {
    const int64_t label = stored(n, y, x);
    return label == ignore_index ? IGNORED : label < 0 || label >= classes ? IMPOSSIBLE : static_cast<int>(label);
  }
  __device__ T weight_of(int64_t k) const { return weight ? weight[k * weight_stride] : T(1); }
  __device__ T weight_sum() const {
    if (!weight) return T(classes);
    T sum = 0;
    for (int64_t k = 0; k < classes; ++k) sum += weight_of(k);
    return sum;
  }
};

// A thread takes one output column of one row of cells. It writes the logarithm of the softmax's denominator per pixel, if
// the gradient is to follow, and either the losses per pixel or their sum and the sum of the weights over its rows.
template <class T>
__global__ void losses(Scores<T> s, Axis<T> rows, Axis<T> columns, Loss<T> loss, T* log_sums, T* map, T* sums, T* totals) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * columns.out) return;
  const int64_t x = at % columns.out, i = at / columns.out % s.h, n = at / columns.out / s.h;
  const int64_t y1 = rows.first(i + 1), j = columns.lower(x);
  const Cell<T> cell(s, n, i, j);
  const T w1 = columns.upper(x), w0 = T(1) - w1;
  const T weight_sum = loss.smoothing != T(0) ? loss.weight_sum() : T(0);
  T sum_of_losses = 0, sum_of_weights = 0;
  for (int64_t y = rows.first(i); y < y1; y += STRIP) {
    T h1[STRIP], most[STRIP], mine[STRIP], spread[STRIP], sum[STRIP];
    int label[STRIP];
#pragma unroll
    for (int r = 0; r < STRIP; ++r) {
      const bool there = y + r < y1;
      h1[r] = there ? rows.upper(y + r) : T(0);
      label[r] = there ? loss.label(n, y + r, x) : IGNORED;
      most[r] = -INFINITE<T>;
      mine[r] = spread[r] = sum[r] = T(0);
    }
    for (int64_t k = 0; k < s.classes; ++k) {
      const T top = cell.top(k, w0, w1), bottom = cell.bottom(k, w0, w1);
      const T weight = loss.smoothing != T(0) ? loss.weight_of(k) : T(0);
#pragma unroll
      for (int r = 0; r < STRIP; ++r) {
        const T score = (T(1) - h1[r]) * top + h1[r] * bottom;
        most[r] = score > most[r] ? score : most[r];
        mine[r] = label[r] == k ? score : mine[r];
        spread[r] += weight * score;
      }
    }
    for (int64_t k = 0; k < s.classes; ++k) {
      const T top = cell.top(k, w0, w1), bottom = cell.bottom(k, w0, w1);
#pragma unroll
      for (int r = 0; r < STRIP; ++r) sum[r] += exponential((T(1) - h1[r]) * top + h1[r] * bottom - most[r]);
    }
#pragma unroll
    for (int r = 0; r < STRIP; ++r) {
      if (y + r >= y1) continue;
      const int64_t pixel = (n * rows.out + y + r) * columns.out + x;
      T log_sum = logarithm(sum[r]) + most[r], value = 0;
      if (label[r] >= 0) {
        const T weight = loss.weight_of(label[r]);
        value = loss.hard * weight * (log_sum - mine[r]);
        if (loss.smoothing != T(0)) value += loss.smoothing * (weight_sum * log_sum - spread[r]);
        sum_of_weights += weight;
      } else if (label[r] == IMPOSSIBLE) {
        if (atomicAdd(&messages, 1u) < MOST_MESSAGES)
          printf("upsample_cross_entropy: target holds %lld, expected labels from 0 to %lld or %lld (ignore_index)\n",
                 static_cast<long long>(loss.stored(n, y + r, x)), static_cast<long long>(loss.classes - 1),
                 static_cast<long long>(loss.ignore_index));
        value = log_sum = NOT_A_NUMBER<T>;
      }
      if (log_sums) log_sums[pixel] = log_sum;
      if (map) map[pixel] = value;
      sum_of_losses += value;
    }
  }
  if (sums) sums[at] = sum_of_losses;
  if (totals) totals[at] = sum_of_weights;
}

// The gradient of one class at the four corners of one cell, summed over the cell's pixels: parts[cell][corner][class]. The
// threads of a warp are neighbouring classes, so that what they read of a pixel is the same.
template <class T>
__global__ void cell_gradients(Scores<T> s, Axis<T> rows, Axis<T> columns, Loss<T> loss, const T* log_sums, T* parts) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * s.w * s.classes) return;
  const int64_t k = at % s.classes, cell_at = at / s.classes;
  const int64_t j = cell_at % s.w, i = cell_at / s.w % s.h, n = cell_at / s.w / s.h;
  const int64_t x0 = columns.first(j), x1 = columns.first(j + 1), y1 = rows.first(i + 1);
  const Cell<T> cell(s, n, i, j);
  const int64_t layer = k * s.layer;
  const T a = cell.top_left[layer], b = cell.top_right[layer], c = cell.bottom_left[layer], d = cell.bottom_right[layer];
  const T weight_sum = loss.smoothing != T(0) ? loss.weight_sum() : T(0);
  T sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;
  for (int64_t x = x0; x < x1; ++x) {
    const T w1 = columns.upper(x), w0 = T(1) - w1;
    const T top = w0 * a + w1 * b, bottom = w0 * c + w1 * d;
    T sum_top = 0, sum_bottom = 0;
    for (int64_t y = rows.first(i); y < y1; ++y) {
      const int label = loss.label(n, y, x);
      if (label == IGNORED) continue;
      const int64_t pixel = (n * rows.out + y) * columns.out + x;
      const T h1 = rows.upper(y), h0 = T(1) - h1;
      const T factor = loss.pixel_grad ? loss.pixel_grad[pixel] : T(1);
      const T hard = label >= 0 ? loss.hard * loss.weight_of(label) * factor : factor;
      const T soft = loss.smoothing * factor;
      // A logarithm of a probability, never above 0 but by rounding; NaN where the label is impossible.
      const T log_p = h0 * top + h1 * bottom - log_sums[pixel];
      T each = (hard + soft * weight_sum) * exponential(log_p > T(0) ? T(0) : log_p);
      if (label == k) each -= hard;
      if (loss.smoothing != T(0)) each -= soft * loss.weight_of(k);
      sum_top += h0 * each;
      sum_bottom += h1 * each;
    }
    sum_a += w0 * sum_top;
    sum_b += w1 * sum_top;
    sum_c += w0 * sum_bottom;
    sum_d += w1 * sum_bottom;
  }
  T* part = parts + cell_at * 4 * s.classes + k;
  part[0] = sum_a;
  part[s.classes] = sum_b;
  part[2 * s.classes] = sum_c;
  part[3 * s.classes] = sum_d;
}

// Every low-resolution pixel gathers the parts of the cells around it. In the last row and column both sides of a cell are the
// same pixel, which takes both parts.
template <class T>
__global__ void gather_gradients(Scores<T> s, const T* parts, T* grad, int64_t image, int64_t layer, int64_t row, int64_t column) {
  const int64_t at = thread_index();
  if (at >= s.n * s.h * s.w * s.classes) return;
  const int64_t k = at % s.classes, pixel = at / s.classes;
  const int64_t j = pixel % s.w, i = pixel / s.w % s.h, n = pixel / s.w / s.h;
  T sum = 0;
  for (int64_t v = i > 0 ? i - 1 : 0; v <= i; ++v) {
    for (int64_t u = j > 0 ? j - 1 : 0; u <= j; ++u) {
      const T* part = parts + ((n * s.h + v) * s.w + u) * 4 * s.classes + k;
      for (int bottom = 0; bottom < 2; ++bottom) {
        const int64_t to_row = v + bottom < s.h ? v + bottom : s.h - 1;
        for (int right = 0; right < 2; ++right) {
          const int64_t to_column = u + right < s.w ? u + right : s.w - 1;
          if (to_row == i && to_column == j) sum += part[(2 * bottom + right) * s.classes];
        }
      }
    }
  }
  grad[n * image + k * layer + i * row + j * column] = sum;
}

template <class T>
Loss<T> loss_terms(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                   double smoothing) {
  return {target.const_data_ptr(),
          target.scalar_type() == ScalarType::Long,
          target.stride(0),
          target.stride(1),
          target.stride(2),
          ignore_index,
          logits.size(1),
          weight ? static_cast<const T*>(weight->const_data_ptr()) : nullptr,
          weight ? weight->stride(0) : 0,
          T(1 - smoothing),
          T(smoothing / double(logits.size(1))),
          nullptr};
}

template <class T>
Tensor gradient(const OnDeviceOf& device, const Tensor& like, const Scores<T>& scores, const Axis<T>& rows,
                const Axis<T>& columns, const Loss<T>& loss, const T* log_sums) {
  constexpr auto type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t size = scores.n * scores.h * scores.w * scores.classes;
  Tensor parts = torch::stable::new_empty(like, {4 * size}, type);
  Tensor grad = empty_gradient(like);
  T* part = static_cast<T*>(parts.mutable_data_ptr());
  device.launch(cell_gradients<T>, size, scores, rows, columns, loss, log_sums, part);
  device.launch(gather_gradients<T>, size, scores, part, static_cast<T*>(grad.mutable_data_ptr()), grad.stride(0),
                grad.stride(1), grad.stride(2), grad.stride(3));
  return grad;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const OnDeviceOf& device, const Tensor& logits, const Tensor& like,
                                                 const Tensor& target, const Loss<T>& loss, bool align_corners, bool per_pixel,
                                                 bool with_grad) {
  constexpr auto type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Scores<T> scores(logits);
  const Axis<T> rows(scores.h, target.size(1), align_corners), columns(scores.w, target.size(2), align_corners);
  const int64_t threads = scores.n * scores.h * columns.out;
  Tensor log_sums = torch::stable::new_empty(logits, {with_grad ? target.numel() : 0}, type);
  Tensor map = torch::stable::new_empty(logits, per_pixel ? target.sizes() : torch::headeronly::IntHeaderOnlyArrayRef({0}), type);
  Tensor sums = torch::stable::new_empty(logits, {per_pixel ? 0 : threads}, type);
  Tensor totals = torch::stable::new_empty(logits, {threads}, type);
  const auto pointer = [](const Tensor& tensor, bool wanted) {
    return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
  };
  device.launch(losses<T>, threads, scores, rows, columns, loss, pointer(log_sums, with_grad), pointer(map, per_pixel),
                pointer(sums, !per_pixel), pointer(totals, true));
  Tensor grad = with_grad ? gradient(device, like, scores, rows, columns, loss, pointer(log_sums, true))
                          : torch::stable::new_empty(logits, {0}, type);
  return {per_pixel ? map : torch::stable::sum(sums), torch::stable::sum(totals), grad};
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                                                          const std::optional<Tensor>& weight, int64_t ignore_index,
                                                          double label_smoothing, bool align_corners, bool per_pixel,
                                                          bool with_grad) {
  check_cross_entropy(logits, target, weight, std::nullopt);
  const OnDeviceOf device(logits);
  const Tensor wide = at_least_float(logits);
  if (logits.scalar_type() == ScalarType::Double)
    return cross_entropy<double>(device, wide, logits, target,
                                 loss_terms<double>(logits, target, weight, ignore_index, label_smoothing), align_corners,
                                 per_pixel, with_grad);
  return cross_entropy<float>(device, wide, logits, target,
                              loss_terms<float>(logits, target, weight, ignore_index, label_smoothing), align_corners, per_pixel,
                              with_grad);
}

template <class T>
Tensor cross_entropy_backward(const OnDeviceOf& device, const Tensor& pixel_grad, const Tensor& logits, const Tensor& like,
                              const Tensor& target, Loss<T> loss, bool align_corners) {
  constexpr auto type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Scores<T> scores(logits);
  const Axis<T> rows(scores.h, target.size(1), align_corners), columns(scores.w, target.size(2), align_corners);
  Tensor log_sums = torch::stable::new_empty(logits, {target.numel()}, type);
  T* const log_sum = static_cast<T*>(log_sums.mutable_data_ptr());
  device.launch(losses<T>, scores.n * scores.h * columns.out, scores, rows, columns, loss, log_sum, nullptr, nullptr, nullptr);
  loss.pixel_grad = static_cast<const T*>(pixel_grad.const_data_ptr());
  return gradient(device, like, scores, rows, columns, loss, log_sum);
}

Tensor upsample_cross_entropy_backward(const Tensor& pixel_grad, const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing,
                                       bool align_corners) {
  check_cross_entropy(logits, target, weight, pixel_grad);
  const OnDeviceOf device(logits);
  const Tensor wide = at_least_float(logits), factors = torch::stable::contiguous(pixel_grad);
  if (logits.scalar_type() == ScalarType::Double)
    return cross_entropy_backward<double>(device, factors, wide, logits, target,
                                          loss_terms<double>(logits, target, weight, ignore_index, label_smoothing),
                                          align_corners);
  return cross_entropy_backward<float>(device, factors, wide, logits, target,
                                       loss_terms<float>(logits, target, weight, ignore_index, label_smoothing), align_corners);
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CUDA, m) {
  m.impl("upsample_argmax", TORCH_BOX(&ops_ext::upsample_argmax));
  m.impl("upsample_cross_entropy", TORCH_BOX(&ops_ext::upsample_cross_entropy));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&ops_ext::upsample_cross_entropy_backward));
}
