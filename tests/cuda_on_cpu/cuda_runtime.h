// Enough of the CUDA runtime to run ops_ext/cuda.cu on the CPU, one thread after another, so that the kernels' arithmetic and
// their every access to memory are tested where there is no GPU. It says nothing about speed or about races.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after another

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};
inline thread_local dim3 blockIdx{0}, threadIdx{0}, blockDim{0};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaMemcpyDeviceToHost = 2;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, int, cudaStream_t) {
  return std::memcpy(to, from, size), cudaSuccess;
}
inline int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }

inline float __expf(float x) { return std::exp(x); }
template <class T>
T atomicAdd(T* to, T value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

namespace emulated {
struct NeedsThreads {};
inline std::barrier<>* barrier = nullptr;
}  // namespace emulated

inline void __syncthreads() {
  if (!emulated::barrier) throw emulated::NeedsThreads{};
  emulated::barrier->arrive_and_wait();
}

// A block runs as a loop over its threads; one that synchronises is started anew with real threads, for which what its first
// thread did before the first barrier must be harmless to do twice.
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  const auto thread = [&]<size_t... I>(unsigned b, unsigned t, std::index_sequence<I...>) {
    blockIdx = dim3(b), threadIdx = dim3(t), blockDim = block;
    kernel(*static_cast<Parameters*>(arguments[I])...);
  };
  constexpr auto all = std::index_sequence_for<Parameters...>{};
  for (unsigned b = 0; b < grid.x; ++b) {
    try {
      for (unsigned t = 0; t < block.x; ++t) thread(b, t, all);
    } catch (emulated::NeedsThreads) {
      std::barrier<> barrier(block.x);
      emulated::barrier = &barrier;
      std::vector<std::thread> threads;
      for (unsigned t = 0; t < block.x; ++t) threads.emplace_back([&, t] { thread(b, t, all); });
      for (auto& each : threads) each.join();
      emulated::barrier = nullptr;
    }
  }
  return cudaSuccess;
}
