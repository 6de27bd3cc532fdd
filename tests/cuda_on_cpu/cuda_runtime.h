// Enough of the CUDA runtime to run the .cu files of ops_ext on the CPU, one thread after another, so that the kernels'
// arithmetic and their every access to memory are tested where there is no GPU. It says nothing about speed or about races.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#define __global__
#define __device__
#define __host__

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};
inline dim3 blockIdx{0}, threadIdx{0}, blockDim{0};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }

inline float __expf(float x) { return std::exp(x); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  blockDim = block;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x)
      [&]<size_t... I>(std::index_sequence<I...>) {
        kernel(*static_cast<Parameters*>(arguments[I])...);
      }(std::index_sequence_for<Parameters...>{});
  return cudaSuccess;
}
