// The network's blocks on the CPU: rows of features -> 3x3 depthwise -> 1x1 projection, where the rows are a 1x1 expansion of the
// input, the first convolution of an RGB image, a smaller map resized, or the rows of another such block.
//
// A layer at a time, PyTorch writes such rows to memory and reads them back, and that is most of its time. Here a thread takes a
// tile of columns down its rows, and of each layer only the few rows that the next depthwise kernel needs exist, in the
// second-level cache. The 1x1 convolutions are matrix products of a few pixels with a panel of channels, whose sums stay in registers.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "common.h"

namespace ops_ext {
namespace {

using torch::stable::parallel_for;

#if defined(__AVX512F__)
constexpr int LANES = 16, PANEL = 4;  // of 32 registers 24 hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, PANEL = 2;
#else
constexpr int LANES = 4, PANEL = 2;
#endif
constexpr int PIXELS = 6;    // rows of a register tile
constexpr int MULTIPLE = 16;  // of which channels are, on every machine
typedef float V __attribute__((vector_size(LANES * sizeof(float))));

inline V load(const float* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
inline void store(float* to, const V& v) { std::memcpy(to, &v, sizeof(V)); }
inline V relu_of(const V& v) { return v > 0.0f ? v : V{}; }

#ifdef __AVX512BF16__
constexpr bool HAS_BFLOAT16 = true;  // products of pairs of bfloat16, summed in float32, at twice the rate of float32
using Pair = uint32_t;               // two neighbouring bfloat16
inline void store_half(uint16_t* to, const V& v) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &half, sizeof(half));
}
inline V dot(const V& sum, Pair a, const V& b) {
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}
#else
constexpr bool HAS_BFLOAT16 = false;
using Pair = uint32_t;
inline void store_half(uint16_t*, const V&) {}
inline V dot(const V& sum, Pair, const V&) { return sum; }
#endif

// Sums of a register tile: P pixels, `step` values apart, times W vectors of output channels, whose weights are `out` apart.
// A value is a float, or a pair of bfloat16.
template <int W, int P, class Value>
inline void multiply(V (&sum)[P][W], const Value* a, int64_t step, const Value* b, int64_t out, int64_t count) {
  for (int64_t k = 0; k < count; ++k, b += out) {
    V row[W];
    for (int v = 0; v < W; ++v) std::memcpy(&row[v], b + v * LANES, sizeof(V));
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) {
        if constexpr (std::is_same_v<Value, float>)
          sum[i][v] += a[i * step + k] * row[v];
        else
          sum[i][v] = dot(sum[i][v], a[i * step + k], row[v]);
      }
  }
}

// A 1x1 convolution: weight (in, out) float32, or (in / 2, out, 2) bfloat16; bias (out).
struct Pointwise {
  const void* weight;
  const float* bias;
  int64_t in, out;
  bool half, relu;

  // from: (count, in) float32, or bfloat16 as the weight; to: (count, out); added: (count, out) or null.
  void run(const void* from, int64_t count, float* to, const float* added) const {
    if (half)
      panels(static_cast<const Pair*>(from), static_cast<const Pair*>(weight), in / 2, count, to, added);
    else
      panels(static_cast<const float*>(from), static_cast<const float*>(weight), in, count, to, added);
  }

 private:
  template <class Value>
  void panels(const Value* from, const Value* weights, int64_t depth, int64_t count, float* to, const float* added) const {
    for (int64_t n = 0; n < out;) {
      const int64_t vectors = (out - n) / LANES;
      if (PANEL == 4 && (vectors == 3 || vectors == 5 || vectors == 6)) {  // three and three are faster than four and two
        panel<3>(from, weights, depth, count, to, added, n);
        n += 3 * LANES;
      } else if (vectors >= PANEL) {
        panel<PANEL>(from, weights, depth, count, to, added, n);
        n += PANEL * LANES;
      } else if (vectors >= 2) {
        panel<2>(from, weights, depth, count, to, added, n);
        n += 2 * LANES;
      } else {
        panel<1>(from, weights, depth, count, to, added, n);
        n += LANES;
      }
    }
  }

  template <int W, class Value>
  void panel(const Value* from, const Value* weights, int64_t depth, int64_t count, float* to, const float* added, int64_t n) const {
    int64_t p = 0;
    for (; p + PIXELS <= count; p += PIXELS) tile<W, PIXELS>(from, weights, depth, to, added, n, p);
    if (count - p >= 4) tile<W, 4>(from, weights, depth, to, added, n, p), p += 4;
    if (count - p >= 2) tile<W, 2>(from, weights, depth, to, added, n, p), p += 2;
    if (count - p >= 1) tile<W, 1>(from, weights, depth, to, added, n, p);
  }

  template <int W, int P, class Value>
  void tile(const Value* from, const Value* weights, int64_t depth, float* to, const float* added, int64_t n, int64_t p) const {
    V sum[P][W];
#pragma GCC unroll 16  // here and below, so that the sums stay in registers
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) sum[i][v] = load(bias + n + v * LANES);
    multiply(sum, from + p * depth, depth, weights + n, out, depth);
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) {
        const int64_t at = (p + i) * out + n + v * LANES;
        V result = sum[i][v];
        if (added) result += load(added + at);
        store(to + at, relu ? relu_of(result) : result);
      }
  }
};

// A 3x3 depthwise convolution: weight (9, channels), bias (channels).
struct Depthwise {
  const float* weight;
  const float* bias;
  int64_t channels, stride, dilation;
  bool relu;

  // One output row of `count` pixels, to float32 or bfloat16. rows: three input rows of `columns` pixels, null where the image
  // ends; the first tap of the first output pixel is at column `first`, which may lie outside, as may others.
  template <class To>
  void run(const float* const (&rows)[3], int64_t columns, int64_t first, int64_t count, To* to) const {
    const bool inside = rows[0] && rows[1] && rows[2];
    for (int64_t c = 0; c < channels; c += LANES) {
      V w[9];
      for (int tap = 0; tap < 9; ++tap) w[tap] = load(weight + tap * channels + c);
      const V b = load(bias + c);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t column = first + p * stride;
        V sum = b;
        if (inside && column >= 0 && column + 2 * dilation < columns) {
          for (int ky = 0; ky < 3; ++ky)
            for (int kx = 0; kx < 3; ++kx) sum += w[3 * ky + kx] * load(rows[ky] + (column + kx * dilation) * channels + c);
        } else {
          for (int ky = 0; ky < 3; ++ky)
            for (int kx = 0; kx < 3; ++kx) {
              const int64_t at = column + kx * dilation;
              if (rows[ky] && at >= 0 && at < columns) sum += w[3 * ky + kx] * load(rows[ky] + at * channels + c);
            }
        }
        if (relu) sum = relu_of(sum);
        if constexpr (std::is_same_v<To, float>)
          store(to + p * channels + c, sum);
        else
          store_half(to + p * channels + c, sum);
      }
    }
  }
};

// (N, C, H, W) float32 in channels_last.
struct Map {
  const float* data;
  int64_t n, h, w, channels;
  const float* at(int64_t image, int64_t i, int64_t j) const { return data + ((image * h + i) * w + j) * channels; }
};

// ------------------------------------------------------------------------------------------------------------ sources of rows

// A source gives the rows of a map of h() x w() pixels. begin() says which columns [from, to) will be asked for, make() writes
// them for one row, and State is a thread's own memory.

struct Expanded {  // a 1x1 convolution
  Map x;
  Pointwise pointwise;
  struct State {
    int64_t from, to;
    std::vector<uint16_t> half;
  };
  int64_t h() const { return x.h; }
  int64_t w() const { return x.w; }
  void begin(int64_t from, int64_t to, State& state) const {
    state.from = from, state.to = to;
    if (pointwise.half) state.half.resize((to - from) * x.channels);
  }
  void make(int64_t image, int64_t i, float* row, State& state) const {
    const float* source = x.at(image, i, state.from);
    for (size_t at = 0; at < state.half.size(); at += LANES) store_half(&state.half[at], load(source + at));
    pointwise.run(pointwise.half ? static_cast<const void*>(state.half.data()) : source, state.to - state.from, row, nullptr);
  }
};

struct Stem {  // a 3x3 convolution of stride 2 and ReLU, over uint8 images (N, H, W, 3) less `shift` per channel
  const uint8_t* images;
  int64_t height, width;
  const float* shift;
  const float* weight;  // (27, 32), rows in the order ky, kx, channel
  const float* bias;
  static constexpr int CHANNELS = 32, W = CHANNELS / LANES, P = 24 / W < 12 ? 24 / W : 12;
  struct State {
    int64_t from, to;
    std::vector<float> pixels;  // three rows of the image
  };
  int64_t h() const { return (height - 1) / 2 + 1; }
  int64_t w() const { return (width - 1) / 2 + 1; }
  void begin(int64_t from, int64_t to, State& state) const {
    state.from = from, state.to = to;
    state.pixels.resize(3 * 3 * (2 * (to - from + P) + 1));
  }
  void make(int64_t image, int64_t i, float* row, State& state) const {
    const int64_t count = state.to - state.from, size = static_cast<int64_t>(state.pixels.size()) / 3;
    float* pixels = state.pixels.data();
    for (int64_t ky = 0; ky < 3; ++ky) read(image, 2 * i + ky - 1, 2 * state.from - 1, size / 3, pixels + ky * size);
    // Whole register tiles: columns beyond the last are computed too, from what happens to be there, and not stored.
    for (int64_t p = 0; p < count; p += P) {
      V sum[P][W];
#pragma GCC unroll 16
      for (int k = 0; k < P; ++k)
#pragma GCC unroll 16
        for (int v = 0; v < W; ++v) sum[k][v] = load(bias + v * LANES);
#pragma GCC unroll 16
      for (int64_t ky = 0; ky < 3; ++ky) multiply(sum, pixels + ky * size + 6 * p, 6, weight + 9 * ky * CHANNELS, CHANNELS, 9);
#pragma GCC unroll 16
      for (int k = 0; k < P; ++k)
#pragma GCC unroll 16
        for (int v = 0; v < W; ++v)
          if (k < count - p) store(row + (p + k) * CHANNELS + v * LANES, relu_of(sum[k][v]));
    }
  }

 private:
  // `count` pixels of image row y from column x on; 0, the mean colour, outside the image.
  void read(int64_t image, int64_t y, int64_t x, int64_t count, float* to) const {
    std::fill(to, to + 3 * count, 0.0f);
    if (y < 0 || y >= height) return;
    const int64_t first = std::max<int64_t>(x, 0), last = std::min(x + count, width);
    const uint8_t* from = images + ((image * height + y) * width + first) * 3;
    to += 3 * (first - x);
    for (int64_t at = 0; at < last - first; ++at)
      for (int c = 0; c < 3; ++c) to[3 * at + c] = static_cast<float>(from[3 * at + c]) - shift[c];
  }
};

struct Resized {  // bilinear, to the size of another map
  Map x;
  Axis<float> rows, columns;
  struct State {
    int64_t from, to;
  };
  int64_t h() const { return rows.out; }
  int64_t w() const { return columns.out; }
  void begin(int64_t from, int64_t to, State& state) const { state.from = from, state.to = to; }
  void make(int64_t image, int64_t i, float* row, State& state) const {
    const int64_t top = rows.lower(i), bottom = std::min(top + 1, x.h - 1);
    const float h1 = rows.upper(i), h0 = 1 - h1;
    for (int64_t j = state.from; j < state.to; ++j, row += x.channels) {
      const int64_t left = columns.lower(j), right = std::min(left + 1, x.w - 1);
      const float w1 = columns.upper(j), w0 = 1 - w1;
      const float *a = x.at(image, top, left), *b = x.at(image, top, right);
      const float *c = x.at(image, bottom, left), *d = x.at(image, bottom, right);
      for (int64_t k = 0; k < x.channels; k += LANES)
        store(row + k, h0 * (w0 * load(a + k) + w1 * load(b + k)) + h1 * (w0 * load(c + k) + w1 * load(d + k)));
    }
  }
};

// A block is itself a source of rows.
template <class Source>
struct Block {
  Source source;
  Depthwise depthwise;
  Pointwise project;
  const Map* added = nullptr;                // of the results' shape, added before the last ReLU
  const Pointwise* project_added = nullptr;  // through this 1x1 convolution
  const Pointwise* then = nullptr;           // one more 1x1 convolution, of the results

  struct State {
    typename Source::State source;
    int64_t from, to, first, last;  // columns of the results; columns of the source
    std::vector<float> ring, line, sums, before;
    std::vector<uint16_t> half;
    std::vector<int64_t> held;  // which row of the source each slot of the ring holds
  };
  int64_t h() const { return (source.h() - 1) / depthwise.stride + 1; }
  int64_t w() const { return (source.w() - 1) / depthwise.stride + 1; }
  int64_t channels() const { return then ? then->out : project.out; }

  void begin(int64_t from, int64_t to, State& state) const {
    const int64_t s = depthwise.stride, d = depthwise.dilation, count = to - from;
    state.from = from, state.to = to;
    state.first = std::max<int64_t>(from * s - d, 0);
    state.last = std::min((to - 1) * s + d + 1, source.w());
    state.held.assign(2 * d + 1, -1);
    state.ring.resize((2 * d + 1) * (state.last - state.first) * depthwise.channels);
    state.line.resize(count * depthwise.channels);
    state.before.resize(then ? count * project.out : 0);
    state.sums.resize(project_added ? count * project.out : 0);
    state.half.resize(count * std::max(then && then->half ? project.out : 0, added ? added->channels : 0));
    source.begin(state.first, state.last, state.source);
  }

  void make(int64_t image, int64_t y, float* to, State& state) const {
    const int64_t s = depthwise.stride, d = depthwise.dilation, count = state.to - state.from, wide = state.last - state.first;
    const float* rows[3];
    for (int ky = 0; ky < 3; ++ky) {
      const int64_t i = y * s + (ky - 1) * d, slot = i % (2 * d + 1);
      rows[ky] = nullptr;
      if (i < 0 || i >= source.h()) continue;
      float* row = state.ring.data() + slot * wide * depthwise.channels;
      if (state.held[slot] != i) source.make(image, i, row, state.source);
      state.held[slot] = i;
      rows[ky] = row;
    }
    const int64_t left = state.from * s - d - state.first;
    if (project.half)
      depthwise.run(rows, wide, left, count, reinterpret_cast<uint16_t*>(state.line.data()));
    else
      depthwise.run(rows, wide, left, count, state.line.data());
    const float* add = added ? added->at(image, y, state.from) : nullptr;
    if (project_added) {
      convolve(*project_added, add, count, state.sums.data(), state);
      add = state.sums.data();
    }
    project.run(state.line.data(), count, then ? state.before.data() : to, add);
    if (then) convolve(*then, state.before.data(), count, to, state);
  }

 private:
  static void convolve(const Pointwise& pointwise, const float* from, int64_t count, float* to, State& state) {
    const int64_t size = pointwise.half ? count * pointwise.in : 0;
    for (int64_t at = 0; at < size; at += LANES) store_half(&state.half[at], load(from + at));
    pointwise.run(pointwise.half ? static_cast<const void*>(state.half.data()) : from, count, to, nullptr);
  }
};

// All rows of a block to `out`, (images, h, w, channels), in tiles of at most `widest` columns.
template <class Source>
void run(const Block<Source>& block, int64_t images, int64_t widest, float* out) {
  const int64_t threads = torch::stable::get_num_threads(), h = block.h(), w = block.w();
  const int64_t tiles = (w + widest - 1) / widest, tile = (w + tiles - 1) / tiles;
  const int64_t chunks = std::clamp<int64_t>((threads + images * tiles - 1) / (images * tiles), 1, std::max<int64_t>(1, h / 4));
  parallel_for(0, images * chunks * tiles, 1, [&](int64_t begin, int64_t end) {
    typename Block<Source>::State state;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = at % tiles, chunk = at / tiles % chunks, image = at / tiles / chunks;
      const int64_t from = t * tile, to = std::min(from + tile, w);
      if (from >= to) continue;
      block.begin(from, to, state);
      for (int64_t y = h * chunk / chunks; y < h * (chunk + 1) / chunks; ++y)
        block.make(image, y, out + ((image * h + y) * w + from) * block.channels(), state);
    }
  });
}

// ------------------------------------------------------------------------------------------------------------------- operators

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

void check_vector(const char* name, const Tensor& values, int64_t size) {
  check(values.is_cpu() && values.scalar_type() == ScalarType::Float && values.is_contiguous() && values.dim() == 1 &&
            values.size(0) == size,
        name, " has shape ", shape(values), ", expected contiguous float32 (", size, ",) on the CPU");
}

Map map_of(const char* name, const Tensor& x) {
  check(x.dim() == 4 && x.numel() > 0 && x.is_cpu() && x.scalar_type() == ScalarType::Float && x.size(1) % MULTIPLE == 0, name,
        " has shape ", shape(x), ", expected float32 (N, C, H, W) on the CPU, C a multiple of ", MULTIPLE, ", not empty");
  return {floats(x), x.size(0), x.size(2), x.size(3), x.size(1)};
}

Tensor channels_last(const Tensor& x) {
  return x.dim() == 4 ? torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast) : x;
}

Pointwise pointwise_of(const char* name, const Tensor& weight, const Tensor& bias, int64_t in, bool relu) {
  const bool half = weight.scalar_type() == ScalarType::BFloat16;
  check(!half || HAS_BFLOAT16, name, " is bfloat16, expected float32: this CPU has no AVX512-BF16");
  const int64_t out = bias.dim() == 1 ? bias.size(0) : 0;
  check_vector(name, bias, out);
  const bool fits = half ? weight.dim() == 3 && weight.size(0) == in / 2 && weight.size(1) == out && weight.size(2) == 2
                         : weight.dim() == 2 && weight.size(0) == in && weight.size(1) == out;
  check(fits && weight.is_cpu() && weight.is_contiguous() && (half || weight.scalar_type() == ScalarType::Float) &&
            out > 0 && out % MULTIPLE == 0,
        name, " has shape ", shape(weight), ", expected contiguous float32 (", in, ", ", out, ") or bfloat16 (", in / 2, ", ", out,
        ", 2) on the CPU, channels a multiple of ", MULTIPLE);
  return {weight.const_data_ptr(), floats(bias), in, out, half, relu};
}

Depthwise depthwise_of(const Tensor& weight, const Tensor& bias, int64_t channels, int64_t stride, int64_t dilation, bool relu) {
  check_vector("depthwise bias", bias, channels);
  check(weight.dim() == 2 && weight.size(0) == 9 && weight.size(1) == channels && weight.is_cpu() && weight.is_contiguous() &&
            weight.scalar_type() == ScalarType::Float,
        "depthwise has shape ", shape(weight), ", expected contiguous float32 (9, ", channels, ") on the CPU");
  check(stride >= 1 && dilation >= 1, "stride is ", stride, " and dilation ", dilation, ", expected at least 1");
  return {floats(weight), floats(bias), channels, stride, dilation, relu};
}

// Results go to tensors that the caller keeps: fresh ones of this size cost the operating system more than the computation.
float* result_of(Tensor& out, int64_t n, int64_t channels, int64_t h, int64_t w) {
  check(out.dim() == 4 && out.is_cpu() && out.scalar_type() == ScalarType::Float && out.size(0) == n && out.size(1) == channels &&
            out.size(2) == h && out.size(3) == w && out.stride(1) == 1 && out.stride(3) == channels && out.stride(2) == w * channels &&
            (n == 1 || out.stride(0) == h * w * channels),
        "out has shape ", shape(out), ", expected float32 (", n, ", ", channels, ", ", h, ", ", w, ") in channels_last on the CPU");
  return static_cast<float*>(out.mutable_data_ptr());
}

constexpr int64_t CACHE_BYTES = 640 << 10;  // for the expanded rows of a tile, in a second-level cache of 1 MiB or more

void bottleneck_block(const Tensor& input, const Tensor& expand, const Tensor& expand_bias, const Tensor& depthwise,
                      const Tensor& depthwise_bias, const Tensor& project, const Tensor& project_bias, int64_t stride,
                      bool residual, Tensor out) {
  const Tensor kept = channels_last(input);
  const Map x = map_of("x", kept);
  const Pointwise first = pointwise_of("expand", expand, expand_bias, x.channels, true);
  const Pointwise last = pointwise_of("project", project, project_bias, first.out, false);
  check(!residual || (stride == 1 && x.channels == last.out), "x has ", x.channels, " channels and stride is ", stride,
        ", expected the output's ", last.out, " and 1 where x is added to it");
  const Depthwise middle = depthwise_of(depthwise, depthwise_bias, first.out, stride, 1, true);
  const Block<Expanded> block{{x, first}, middle, last, residual ? &x : nullptr};
  const int64_t widest = CACHE_BYTES / (3 * first.out * int64_t(sizeof(float)) * stride);
  run(block, x.n, std::max<int64_t>(16, widest), result_of(out, x.n, last.out, block.h(), block.w()));
}

// Learning to downsample: the first convolution and two depthwise separable ones, all of stride 2.
void stem_block(const Tensor& images, const Tensor& shift, const Tensor& conv, const Tensor& conv_bias, const Tensor& depthwise1,
                const Tensor& depthwise1_bias, const Tensor& project1, const Tensor& project1_bias, const Tensor& depthwise2,
                const Tensor& depthwise2_bias, const Tensor& project2, const Tensor& project2_bias, Tensor out) {
  check(images.dim() == 4 && images.numel() > 0 && images.is_cpu() && images.scalar_type() == ScalarType::Byte &&
            images.size(3) == 3,
        "images have shape ", shape(images), ", expected uint8 (N, H, W, 3) on the CPU, not empty");
  check_vector("shift", shift, 3);
  check_vector("conv bias", conv_bias, Stem::CHANNELS);
  check(conv.dim() == 2 && conv.size(0) == 27 && conv.size(1) == Stem::CHANNELS && conv.is_cpu() && conv.is_contiguous() &&
            conv.scalar_type() == ScalarType::Float,
        "conv has shape ", shape(conv), ", expected contiguous float32 (27, ", Stem::CHANNELS, ") on the CPU");
  const Tensor kept = torch::stable::contiguous(images);
  const Stem stem{static_cast<const uint8_t*>(kept.const_data_ptr()), images.size(1), images.size(2), floats(shift), floats(conv),
                  floats(conv_bias)};
  const Pointwise first = pointwise_of("project1", project1, project1_bias, Stem::CHANNELS, true);
  const Pointwise second = pointwise_of("project2", project2, project2_bias, first.out, true);
  const Block<Stem> inner{stem, depthwise_of(depthwise1, depthwise1_bias, Stem::CHANNELS, 2, 1, false), first};
  const Block<Block<Stem>> block{inner, depthwise_of(depthwise2, depthwise2_bias, first.out, 2, 1, false), second};
  run(block, images.size(0), 128, result_of(out, images.size(0), second.out, block.h(), block.w()));
}

// Feature fusion, then the classifier's two depthwise separable convolutions and its last 1x1 one.
void head_block(const Tensor& detail, const Tensor& context, const Tensor& depthwise, const Tensor& depthwise_bias,
                const Tensor& project, const Tensor& project_bias, const Tensor& detail_weight, const Tensor& detail_bias,
                int64_t dilation, const Tensor& depthwise1, const Tensor& depthwise1_bias, const Tensor& project1,
                const Tensor& project1_bias, const Tensor& depthwise2, const Tensor& depthwise2_bias, const Tensor& project2,
                const Tensor& project2_bias, const Tensor& scores, const Tensor& scores_bias, Tensor out) {
  const Tensor kept_detail = channels_last(detail), kept_context = channels_last(context);
  const Map fine = map_of("detail", kept_detail), coarse = map_of("context", kept_context);
  check(fine.n == coarse.n, "context has ", coarse.n, " images, expected the detail's ", fine.n);
  const Resized resized{coarse, Axis<float>(coarse.h, fine.h, false), Axis<float>(coarse.w, fine.w, false)};
  const Pointwise added = pointwise_of("detail", detail_weight, detail_bias, fine.channels, false);
  const Pointwise fused = pointwise_of("project", project, project_bias, coarse.channels, true);
  check(fused.out == added.out, "detail gives ", added.out, " channels, expected ", fused.out);
  const Pointwise first = pointwise_of("project1", project1, project1_bias, fused.out, true);
  const Pointwise second = pointwise_of("project2", project2, project2_bias, first.out, true);
  const Pointwise last = pointwise_of("scores", scores, scores_bias, second.out, false);
  const Depthwise spread = depthwise_of(depthwise, depthwise_bias, coarse.channels, 1, dilation, true);
  const Block<Resized> fusion{resized, spread, fused, &fine, &added};
  using One = Block<Block<Resized>>;
  const One one{fusion, depthwise_of(depthwise1, depthwise1_bias, fused.out, 1, 1, false), first};
  const Depthwise middle = depthwise_of(depthwise2, depthwise2_bias, first.out, 1, 1, false);
  const Block<One> block{one, middle, second, nullptr, nullptr, &last};
  run(block, fine.n, 64, result_of(out, fine.n, last.out, fine.h, fine.w));
}

// Pyramid pooling: the averages of x over 1, 2, 3 and 6 bins a side, each through its own 1x1 convolution and ReLU (`reduce`,
// one after the other: (4 * C, C / 4)), resized back, beside x through a last 1x1 convolution and ReLU. What comes from a level
// is convolved before it is resized, where it is a few pixels; the two commute.
void pyramid_block(const Tensor& input, const Tensor& reduce, const Tensor& reduce_bias, const Tensor& project_levels,
                   const Tensor& project, const Tensor& project_bias, Tensor out) {
  constexpr int LEVELS = 4;
  constexpr int64_t BINS[LEVELS] = {1, 2, 3, 6};
  const Tensor kept = channels_last(input);
  const Map x = map_of("x", kept);
  const int64_t c = x.channels, part = c / LEVELS, out_c = project_bias.size(0);
  check(part % MULTIPLE == 0, "x has ", c, " channels, expected a multiple of ", LEVELS * MULTIPLE);
  const Pointwise last = pointwise_of("project", project, project_bias, c, true);
  check_vector("reduce bias", reduce_bias, c);
  for (const Tensor* weight : {&reduce, &project_levels})
    check(weight->is_cpu() && weight->is_contiguous() && weight->scalar_type() == ScalarType::Float && weight->dim() == 2 &&
              weight->size(0) == (weight == &reduce ? LEVELS * c : c) && weight->size(1) == (weight == &reduce ? part : out_c),
          weight == &reduce ? "reduce" : "project_levels", " has shape ", shape(*weight),
          ", expected contiguous float32 (4 C, C / 4) or (C, out) on the CPU");
  float* to = result_of(out, x.n, out_c, x.h, x.w);
  const std::vector<float> zeros(out_c);
  for (int64_t image = 0; image < x.n; ++image) {
    std::vector<float> levels[LEVELS];
    std::vector<Resized> resized;
    parallel_for(0, LEVELS, 1, [&](int64_t begin, int64_t end) {
      for (int64_t level = begin; level < end; ++level) {
        const int64_t bins = BINS[level];
        std::vector<float> mean(bins * bins * c), reduced(bins * bins * part);
        for (int64_t bin = 0; bin < bins * bins; ++bin) {
          const int64_t by = bin / bins, bx = bin % bins;  // as F.adaptive_avg_pool2d divides: bins may overlap by a pixel
          const int64_t y0 = by * x.h / bins, y1 = ((by + 1) * x.h + bins - 1) / bins;
          const int64_t x0 = bx * x.w / bins, x1 = ((bx + 1) * x.w + bins - 1) / bins;
          float* sum = &mean[bin * c];
          for (int64_t y = y0; y < y1; ++y) {
            for (int64_t k = 0; k < c; k += LANES) {
              V row = {};
              for (int64_t column = x0; column < x1; ++column) row += load(x.at(image, y, column) + k);
              store(sum + k, load(sum + k) + row);
            }
          }
          for (int64_t k = 0; k < c; ++k) sum[k] /= float((y1 - y0) * (x1 - x0));
        }
        const Pointwise narrow{floats(reduce) + level * c * part, floats(reduce_bias) + level * part, c, part, false, true};
        narrow.run(mean.data(), bins * bins, reduced.data(), nullptr);
        const Pointwise wide{floats(project_levels) + level * part * out_c, zeros.data(), part, out_c, false, false};
        levels[level].resize(bins * bins * out_c);
        wide.run(reduced.data(), bins * bins, levels[level].data(), nullptr);
      }
    });
    for (int level = 0; level < LEVELS; ++level) {
      const int64_t bins = BINS[level];
      resized.push_back({{levels[level].data(), 1, bins, bins, out_c}, Axis<float>(bins, x.h, false), Axis<float>(bins, x.w, false)});
    }
    parallel_for(0, x.h, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(x.w * out_c), each(x.w * out_c);
      std::vector<uint16_t> half(last.half ? x.w * c : 0);
      for (int64_t y = begin; y < end; ++y) {
        Resized::State whole{0, x.w};
        resized[0].make(0, y, sum.data(), whole);
        for (int level = 1; level < LEVELS; ++level) {
          resized[level].make(0, y, each.data(), whole);
          for (size_t at = 0; at < sum.size(); ++at) sum[at] += each[at];
        }
        const float* row = x.at(image, y, 0);
        for (size_t at = 0; at < half.size(); at += LANES) store_half(&half[at], load(row + at));
        const void* from = last.half ? static_cast<const void*>(half.data()) : row;
        last.run(from, x.w, to + (image * x.h + y) * x.w * out_c, sum.data());
      }
    });
  }
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_FRAGMENT(ops_ext, m) {
  m.def("stem_block(Tensor images, Tensor shift, Tensor conv, Tensor conv_bias, Tensor depthwise1, Tensor depthwise1_bias, "
        "Tensor project1, Tensor project1_bias, Tensor depthwise2, Tensor depthwise2_bias, Tensor project2, "
        "Tensor project2_bias, Tensor(a!) out) -> ()");
  m.def("bottleneck_block(Tensor x, Tensor expand, Tensor expand_bias, Tensor depthwise, Tensor depthwise_bias, Tensor project, "
        "Tensor project_bias, int stride, bool residual, Tensor(a!) out) -> ()");
  m.def("pyramid_block(Tensor x, Tensor reduce, Tensor reduce_bias, Tensor project_levels, Tensor project, Tensor project_bias, "
        "Tensor(a!) out) -> ()");
  m.def("head_block(Tensor detail, Tensor context, Tensor depthwise, Tensor depthwise_bias, Tensor project, Tensor project_bias, "
        "Tensor detail_weight, Tensor detail_bias, int dilation, Tensor depthwise1, Tensor depthwise1_bias, Tensor project1, "
        "Tensor project1_bias, Tensor depthwise2, Tensor depthwise2_bias, Tensor project2, Tensor project2_bias, Tensor scores, "
        "Tensor scores_bias, Tensor(a!) out) -> ()");
  m.def("has_bfloat16() -> bool");
}

bool ops_ext_has_bfloat16() { return ops_ext::HAS_BFLOAT16; }

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CPU, m) {
  m.impl("stem_block", TORCH_BOX(&ops_ext::stem_block));
  m.impl("bottleneck_block", TORCH_BOX(&ops_ext::bottleneck_block));
  m.impl("pyramid_block", TORCH_BOX(&ops_ext::pyramid_block));
  m.impl("head_block", TORCH_BOX(&ops_ext::head_block));
}

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CompositeExplicitAutograd, m) { m.impl("has_bfloat16", TORCH_BOX(&ops_ext_has_bfloat16)); }
