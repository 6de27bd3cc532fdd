// The engine's layers, over rows of features: products of matrices (1x1 convolutions and the first 3x3 one), and 3x3
// depthwise convolutions. Features are T, float or Half (bfloat16); sums are float32.
#pragma once

#include <new>
#include <type_traits>
#include <vector>

#include "tiles.h"

namespace ops_ext {

#if defined(__AVX512F__)
constexpr int64_t PANEL = 4;  // vectors of channels at once, whose sums for PIXELS take 24 of 32 registers
#else
constexpr int64_t PANEL = 2;  // 12 of 16
#endif
constexpr int64_t PIXELS = 6;
constexpr int64_t TILE = 16;   // pixels that are read beyond the last one, whatever is there
constexpr int64_t DEPTH = 32;  // of which channels are a multiple in Half on every machine, and of half of it in float

// A vector in whole cache lines: rows that straddle them take twice the time to load.
template <class T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <class Other>
  Lines(const Lines<Other>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
  bool operator==(const Lines&) const = default;
};
template <class T>
using Rows = std::vector<T, Lines<T>>;

// Matrix products of pixels and weights, plus a bias. A pixel's values lie in PARTS rows, `step` apart from the next
// pixel's; a 1x1 convolution has one row, the first convolution of an image one for each row of its kernel.
template <class T, int PARTS = 1>
struct Product {
  const T* weight;    // (PARTS, in, out) float32, or (PARTS, in / 2, out, 2) bfloat16
  const float* bias;  // (out)
  int64_t in, out;
  bool relu = false;
  float ceiling = NO_CEILING;
  int64_t used = in;  // of `in`: the other weights are 0

  using Pixels = const T* const (&)[PARTS];

  // A 1x1 convolution. from: (count + TILE, in); to: (count, out), of T or float; added: (count, out) or null.
  template <class To>
  void run(const T* from, int64_t count, To* to, const float* added = nullptr) const {
    run({from}, in, count, to, added);
  }

  template <class To>
  void run(Pixels from, int64_t step, int64_t count, To* to, const float* added = nullptr) const {
#ifdef HAS_TILES
    if constexpr (std::is_same_v<T, Half>) {
      if (TileState::usable()) return tiles(from, step, count, to, added);
    }
#endif
    for (int64_t n = 0; n < out;) {
      const int64_t width = std::min(PANEL, (out - n) / LANES);
      if (width == PANEL)
        panel<PANEL>(from, step, count, to, added, n);
      else if (width == 3)
        panel<3>(from, step, count, to, added, n);
      else if (width == 2)
        panel<2>(from, step, count, to, added, n);
      else
        panel<1>(from, step, count, to, added, n);
      n += width * LANES;
    }
  }

 private:
#ifdef HAS_TILES
  template <class To>
  void tiles(Pixels from, int64_t step, int64_t count, To* to, const float* added) const {
    TileSums sums;
    for (int64_t n = 0; n < out; n += 32)
      for (int64_t p = 0; p < count; p += 32) {
        sums.begin(bias + n);
        for (int part = 0; part < PARTS; ++part)
          for (int64_t k = 0; k < in; k += 32)
            sums.add(from[part] + p * step + k, step, weight + (part * in + k) * out + n * 2, out, count - p > 16);
        const int64_t at = p * out + n;
        sums.finish(std::min<int64_t>(32, count - p), to + at, out, added ? added + at : nullptr, relu, ceiling);
      }
  }
#endif

  // W vectors of channels from n on.
  template <int W, class To>
  void panel(Pixels from, int64_t step, int64_t count, To* to, const float* added, int64_t n) const {
    int64_t p = 0;
    for (; p + PIXELS <= count; p += PIXELS) block<W, PIXELS>(from, step, to, added, n, p);
    for (; p + 2 <= count; p += 2) block<W, 2>(from, step, to, added, n, p);
    if (p < count) block<W, 1>(from, step, to, added, n, p);
  }

  // P pixels from p on, whose sums stay in registers, for which the loops have to be unrolled.
  template <int W, int P, class To>
  void block(Pixels from, int64_t step, To* to, const float* added, int64_t n, int64_t p) const {
    using Value = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;  // one, or a pair of bfloat16
    constexpr int64_t PER_VALUE = sizeof(Value) / sizeof(T);
    Floats sum[P][W];
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) sum[i][v] = load(bias + n + v * LANES);
#pragma GCC unroll 16
    for (int part = 0; part < PARTS; ++part) {
      const Value* a = reinterpret_cast<const Value*>(from[part] + p * step);
      const Value* b = reinterpret_cast<const Value*>(weight + part * in * out) + n;
      for (int64_t k = 0; k < used / PER_VALUE; ++k, b += out) {
        Floats row[W];
        for (int v = 0; v < W; ++v) row[v] = load(reinterpret_cast<const float*>(b + v * LANES));
#pragma GCC unroll 16
        for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
          for (int v = 0; v < W; ++v) sum[i][v] = multiply_add(a[i * (step / PER_VALUE) + k], row[v], sum[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) {
        const int64_t at = (p + i) * out + n + v * LANES;
        Floats result = sum[i][v];
        if (added) result += load(added + at);
        store(to + at, relu ? relu_of(result, ceiling) : result);
      }
  }
};

// A 3x3 depthwise convolution: weight (9, channels), bias (channels), each in the order of Group<T>'s vectors.
template <class T>
struct Depthwise {
  const float *weight, *bias;
  int64_t channels, stride, dilation;  // one of the last two is 1
  bool relu;
  float ceiling = NO_CEILING;

  // One output row of `count` pixels, `step` values apart. rows: three input rows, from the first tap of the first
  // pixel on.
  void run(const T* const (&rows)[3], int64_t count, T* to, int64_t step) const {
    for (int64_t c = 0; c < channels; c += Group<T>::CHANNELS) {
      const Taps taps(*this, c, rows);
      if (stride == 2)
        taps.slide_by_2(count, to + c, step);
      else
        for (int64_t first = 0; first < std::min(dilation, count); ++first) taps.slide(first, count, to + c, step);
    }
  }

 private:
  static constexpr int N = Group<T>::VECTORS;

  struct Taps {  // of one group of channels
    const Depthwise& layer;
    Floats weight[3][3][N];
    Group<T> bias;
    const T* rows[3];

    Taps(const Depthwise& depthwise, int64_t c, const T* const (&from)[3]) : layer(depthwise) {
      for (int v = 0; v < N; ++v) {
        const int64_t at = c + v * LANES;
        for (int tap = 0; tap < 9; ++tap) weight[tap / 3][tap % 3][v] = load(layer.weight + tap * layer.channels + at);
        bias.v[v] = load(layer.bias + at);
      }
      for (int ky = 0; ky < 3; ++ky) rows[ky] = from[ky] + c;
    }

    // Adds a column of the input to sums, to each through its own column KX of the kernel.
    template <int... KX, class... Sums>
    void add(int64_t column, Sums&... sums) const {
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        Group<T> x;
        load(rows[ky] + column * layer.channels, x);
        for (int v = 0; v < N; ++v) ((sums.v[v] += weight[ky][KX][v] * x.v[v]), ...);
      }
    }

    void finish(Group<T>& sum, T* to) const {
      if (layer.relu)
        for (Floats& each : sum.v) each = relu_of(each, layer.ceiling);
      store(to, sum);
    }

    // Every `dilation`-th output from `p` on: each column of the input is loaded once, for three sums.
    void slide(int64_t p, int64_t count, T* to, int64_t step) const {
      const int64_t d = layer.dilation;
      Group<T> first = bias, second = bias;
      add<0>(p, first);
      add<1, 0>(p + d, first, second);
      for (; p < count; p += d) {
        Group<T> third = bias;
        add<2, 1, 0>(p + 2 * d, first, second, third);
        finish(first, to + p * step);
        first = second;
        second = third;
      }
    }

    void slide_by_2(int64_t count, T* to, int64_t step) const {
      Group<T> sum = bias;
      add<0>(0, sum);
      for (int64_t p = 0; p < count; ++p, to += step) {
        Group<T> next = bias;
        add<1>(2 * p + 1, sum);
        add<2, 0>(2 * p + 2, sum, next);
        finish(sum, to);
        sum = next;
      }
    }
  };
};

}  // namespace ops_ext
