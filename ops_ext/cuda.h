// What the CUDA kernels share: launches on PyTorch's current stream, and class scores. Positions are 64-bit throughout.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <type_traits>

#include "common.h"

namespace ops_ext {

constexpr int BLOCK = 256;
constexpr int STRIP = 8;  // output pixels, one below the other, whose running results a thread holds in registers
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// Makes the tensor's device the current one for as long as this lives; launches go to PyTorch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    const int device = tensor.get_device_index();
    const bool found = aoti_torch_get_current_cuda_stream(device, &current) == 0;
    STD_TORCH_CHECK(found, "no current stream on CUDA device ", device);
    stream = static_cast<cudaStream_t>(current);
  }

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t threads, std::type_identity_t<Parameters>... arguments) const {
    if (threads == 0) return;
    const int64_t blocks = (threads + BLOCK - 1) / BLOCK;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too large for one launch: ", threads, " threads");
    void* pointers[] = {static_cast<void*>(&arguments)...};
    const auto error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(BLOCK), pointers, 0, stream);
    cudaGetLastError();  // which the next launch, PyTorch's own, would else take for its own error
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
  }

 private:
  cudaStream_t stream;
  torch::stable::accelerator::DeviceGuard guard;
};

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

struct Scores {  // (N, C, h, w) logits of any strides
  const float* data;
  int64_t n, classes, h, w;
  int64_t image, layer, row, column;  // strides

  explicit Scores(const Tensor& logits)
      : data(static_cast<const float*>(logits.const_data_ptr())), n(logits.size(0)), classes(logits.size(1)),
        h(logits.size(2)), w(logits.size(3)), image(logits.stride(0)), layer(logits.stride(1)), row(logits.stride(2)),
        column(logits.stride(3)) {}
};

// The four corners of a cell; in the last row or column both sides are the same pixel.
struct Cell {
  const float *top_left, *top_right, *bottom_left, *bottom_right;  // scores of class 0
  int64_t layer;

  __device__ Cell(const Scores& s, int64_t n, int64_t i, int64_t j) : layer(s.layer) {
    const int64_t right = j + 1 < s.w ? s.column : 0, below = i + 1 < s.h ? s.row : 0;
    top_left = s.data + n * s.image + i * s.row + j * s.column;
    top_right = top_left + right;
    bottom_left = top_left + below;
    bottom_right = bottom_left + right;
  }
  __device__ float top(int64_t k, float w0, float w1) const {
    return w0 * top_left[k * layer] + w1 * top_right[k * layer];
  }
  __device__ float bottom(int64_t k, float w0, float w1) const {
    return w0 * bottom_left[k * layer] + w1 * bottom_right[k * layer];
  }
};

}  // namespace ops_ext
