// The network's blocks on the CPU: rows of features -> 3x3 depthwise -> 1x1 projection, where the rows are a 1x1 expansion of the
// input, the first convolution of an RGB image, a smaller map resized, or the rows of another such block.
//
// A layer at a time, PyTorch writes such rows to memory and reads them back, and that is most of its time. Here a thread takes a
// tile of columns down its rows, and of each layer only the few rows that the next depthwise kernel needs exist, in the
// second-level cache. The 1x1 convolutions are matrix products of a few pixels with a panel of channels, whose sums stay in registers.
//
// All of it is written for rows of T, float or Half (bfloat16). Sums are float32 throughout, and so are the maps between blocks.

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
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
constexpr int PIXELS = 6;  // rows of a register tile
typedef float V __attribute__((vector_size(LANES * sizeof(float))));
// In memory. A copy by memcpy may be cut into halves, which the next load of the whole then waits for: it doubled all times on Intel.
typedef float Anywhere __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
using Half = uint16_t;  // the bits of a bfloat16

inline V load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
inline void store(float* to, const V& v) { *reinterpret_cast<Anywhere*>(to) = v; }
constexpr float NO_CEILING = std::numeric_limits<float>::infinity();
inline V relu_of(const V& v, float ceiling) {  // ReLU, or ReLU6 with a ceiling of 6
  const V low = v > 0.0f ? v : V{}, high = V{} + ceiling;
  return low < high ? low : high;
}

// The channels that are handled at once: one vector of floats, or two of bfloat16, of which the first holds those in even places.
template <class T>
constexpr int VECTORS = std::is_same_v<T, float> ? 1 : 2;
template <class T>
constexpr int GROUP = VECTORS<T> * LANES;
constexpr int64_t MULTIPLE = 2 * 16;  // of which channels are for Half on every machine, and half of it for float

inline void load(const float* from, V (&to)[1]) { to[0] = load(from); }
inline void store(float* to, const V (&from)[1]) { store(to, from[0]); }

#ifdef __AVX512BF16__
constexpr bool HAS_BFLOAT16 = true;
inline V dot(const V& sum, uint32_t pair, const V& pairs) {  // products of pairs of bfloat16
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)), (__m512bh)pairs);
}
inline void store(Half* to, const V& v) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
inline __m512i rounded(const V& first, const V& second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
inline void load(const Half* from, V (&to)[2]) {
  const __m512i pairs = _mm512_loadu_si512(from);
  to[0] = (V)_mm512_slli_epi32(pairs, 16);
  to[1] = (V)_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}
inline void load(const float* from, V (&to)[2]) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512 a = (__m512)load(from), b = (__m512)load(from + LANES);
  to[0] = (V)_mm512_permutex2var_ps(a, even, b);
  to[1] = (V)_mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}
inline void store(Half* to, const V (&from)[2]) {
  alignas(64) static constexpr Half ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), rounded(from[0], from[1])));
}
#else
constexpr bool HAS_BFLOAT16 = false;  // these are compiled and never called
inline V dot(const V& sum, uint32_t, const V&) { return sum; }
inline void store(Half*, const V&) {}
inline void load(const Half*, V (&)[2]) {}
inline void load(const float*, V (&)[2]) {}
inline void store(Half*, const V (&)[2]) {}
#endif

inline void copy(const float* from, int64_t count, float* to) { std::copy(from, from + count, to); }
inline void copy(const float* from, int64_t count, Half* to) {
  for (int64_t at = 0; at < count; at += LANES) store(to + at, load(from + at));
}

#ifdef HAS_TILES
inline void memory_changes() { asm volatile("" ::: "memory"); }  // GCC 12 does not know that tile loads and stores do

// Intel's AMX: eight registers of 16 rows of 64 bytes. Here 0 to 3 hold sums of 2 x 16 pixels times 2 x 16 channels, 4 and 5 pixels,
// 6 and 7 weights. A thread owns them while a TileState lives, and then gets back what it had.
class TileState {
 public:
  TileState() {
    struct Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration ours;
    if (!usable()) return;
    _tile_storeconfig(before);
    memory_changes();
    _tile_loadconfig(&ours);
  }
  ~TileState() {
    if (!usable()) return;
    memory_changes();
    _tile_loadconfig(before);
  }
  TileState(const TileState&) = delete;

  static bool usable() {  // Linux gives them to a process that asks
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILE_DATA */) == 0;
    return granted;
  }

 private:
  alignas(64) uint8_t before[64];
};

// The sums of up to 32 pixels and of 32 channels.
struct TileSums {
  alignas(64) float memory[4][16][16];

  static void begin(const float* bias) {
    memory_changes();
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + 16, 0);
    _tile_loadd(2, bias, 0);
    _tile_loadd(3, bias + 16, 0);
  }

  // Adds 32 products to each. from: pixels `step` values apart; weight: (16, out, 2). Reads 16 pixels, 32 with `second`.
  static void add(const Half* from, int64_t step, const Half* weight, int64_t out, bool second) {
    _tile_loadd(4, from, step * 2);
    _tile_loadd(6, weight, out * 4);
    _tile_loadd(7, weight + 32, out * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!second) return;
    _tile_loadd(5, from + 16 * step, step * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // To `count` pixels, `out` values apart.
  template <class To>
  void finish(int64_t count, To* to, int64_t out, const float* added, bool relu, float ceiling) {
    _tile_stored(0, memory[0], 64);
    _tile_stored(1, memory[1], 64);
    if (count > 16) {
      _tile_stored(2, memory[2], 64);
      _tile_stored(3, memory[3], 64);
    }
    memory_changes();
    // Of numbers from 0 on, the larger bfloat16 is the larger whole number of its bits.
    uint32_t bits;
    std::memcpy(&bits, &ceiling, sizeof(bits));
    const __m512i least = _mm512_setzero_si512(), most = _mm512_set1_epi16(static_cast<short>(bits >> 16));
    for (int64_t p = 0; p < count; ++p, to += out) {
      V first = load(memory[p / 16 * 2][p % 16]), second = load(memory[p / 16 * 2 + 1][p % 16]);
      if (added) first += load(added + p * out), second += load(added + p * out + 16);
      if constexpr (std::is_same_v<To, Half>) {
        const __m512i halves = rounded(first, second);
        _mm512_storeu_si512(to, relu ? _mm512_min_epi16(_mm512_max_epi16(halves, least), most) : halves);
      } else {
        store(to, relu ? relu_of(first, ceiling) : first);
        store(to + 16, relu ? relu_of(second, ceiling) : second);
      }
    }
  }
};
#else
struct TileState {
  TileState() {}
  static constexpr bool usable() { return false; }
};
#endif
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

constexpr int64_t TILE = 16;  // pixels that are read beyond the last one, whatever is there

// Sums of a register tile: P pixels, `step` values apart, times W vectors of output channels, whose weights are `out` apart.
// A value is a float, or a pair of bfloat16.
template <int W, int P, class Value>
inline void multiply(V (&sum)[P][W], const Value* a, int64_t step, const Value* b, int64_t out, int64_t count) {
  for (int64_t k = 0; k < count; ++k, b += out) {
    V row[W];
    for (int v = 0; v < W; ++v) row[v] = load(reinterpret_cast<const float*>(b + v * LANES));
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
template <class T>
struct Pointwise {
  const T* weight;
  const float* bias;
  int64_t in, out;
  bool relu;
  float ceiling = NO_CEILING;

  // from: (count + TILE, in); to: (count, out), of T or float; added: (count, out) or null.
  template <class To>
  void run(const T* from, int64_t count, To* to, const float* added) const {
#ifdef HAS_TILES
    if constexpr (std::is_same_v<T, Half>) {
      if (TileState::usable()) return tiles(from, count, to, added);
    }
#endif
    for (int64_t n = 0; n < out;) {
      const int64_t vectors = (out - n) / LANES;
      if (PANEL == 4 && (vectors == 3 || vectors == 5 || vectors == 6)) {  // three and three are faster than four and two
        panel<3>(from, count, to, added, n);
        n += 3 * LANES;
      } else if (vectors >= PANEL) {
        panel<PANEL>(from, count, to, added, n);
        n += PANEL * LANES;
      } else if (vectors >= 2) {
        panel<2>(from, count, to, added, n);
        n += 2 * LANES;
      } else {
        panel<1>(from, count, to, added, n);
        n += LANES;
      }
    }
  }

 private:
#ifdef HAS_TILES
  template <class To>
  void tiles(const Half* from, int64_t count, To* to, const float* added) const {
    TileSums sums;
    for (int64_t n = 0; n < out; n += 32)
      for (int64_t p = 0; p < count; p += 32) {
        sums.begin(bias + n);
        for (int64_t k = 0; k < in; k += 32) sums.add(from + p * in + k, in, weight + k * out + n * 2, out, count - p > 16);
        sums.finish(std::min<int64_t>(32, count - p), to + p * out + n, out, added ? added + p * out + n : nullptr, relu, ceiling);
      }
  }
#endif

  template <int W, class To>
  void panel(const T* from, int64_t count, To* to, const float* added, int64_t n) const {
    int64_t p = 0;
    for (; p + PIXELS <= count; p += PIXELS) tile<W, PIXELS>(from, to, added, n, p);
    if (count - p >= 4) tile<W, 4>(from, to, added, n, p), p += 4;
    if (count - p >= 2) tile<W, 2>(from, to, added, n, p), p += 2;
    if (count - p >= 1) tile<W, 1>(from, to, added, n, p);
  }

  template <int W, int P, class To>
  void tile(const T* from, To* to, const float* added, int64_t n, int64_t p) const {
    using Value = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;
    const int64_t depth = in * sizeof(T) / sizeof(Value);
    V sum[P][W];
#pragma GCC unroll 16  // here and below, so that the sums stay in registers
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) sum[i][v] = load(bias + n + v * LANES);
    multiply(sum, reinterpret_cast<const Value*>(from) + p * depth, depth, reinterpret_cast<const Value*>(weight) + n, out, depth);
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) {
        const int64_t at = (p + i) * out + n + v * LANES;
        V result = sum[i][v];
        if (added) result += load(added + at);
        store(to + at, relu ? relu_of(result, ceiling) : result);
      }
  }
};

// A 3x3 depthwise convolution: weight (9, channels), bias (channels).
template <class T>
struct Depthwise {
  const float* weight;
  const float* bias;
  int64_t channels, stride, dilation;
  bool relu;
  float ceiling = NO_CEILING;

  // One output row of `count` pixels, `step` values apart. rows: three input rows, from the first tap of the first pixel on.
  void run(const T* const (&rows)[3], int64_t count, T* to, int64_t step) const {
    for (int64_t c = 0; c < channels; c += GROUP<T>) {
      const Taps taps(*this, c, rows);
      if (dilation == 1 && stride == 1)
        taps.slide(count, to + c, step);
      else if (dilation == 1 && stride == 2)
        taps.slide_by_2(count, to + c, step);
      else
        taps.apart(count, to + c, step);
    }
  }

 private:
  static constexpr int N = VECTORS<T>;

  struct Taps {  // of one group of channels
    const Depthwise& layer;
    V weight[3][3][N], bias[N];
    const T* rows[3];

    Taps(const Depthwise& depthwise, int64_t c, const T* const (&from)[3]) : layer(depthwise) {
      for (int ky = 0; ky < 3; ++ky) {
        rows[ky] = from[ky] + c;
        for (int kx = 0; kx < 3; ++kx) load(layer.weight + (3 * ky + kx) * layer.channels + c, weight[ky][kx]);
      }
      load(layer.bias + c, bias);
    }

    // Adds what a column of the input gives to three sums through their columns of the kernel, -1 for none.
    void add(int64_t column, int kx, V (&a)[N]) const {
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        V x[N];
        load(rows[ky] + column * layer.channels, x);
        for (int v = 0; v < N; ++v) a[v] += weight[ky][kx][v] * x[v];
      }
    }
    void add(int64_t column, int kx_a, V (&a)[N], int kx_b, V (&b)[N]) const {
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        V x[N];
        load(rows[ky] + column * layer.channels, x);
        for (int v = 0; v < N; ++v) a[v] += weight[ky][kx_a][v] * x[v], b[v] += weight[ky][kx_b][v] * x[v];
      }
    }

    void finish(V (&sum)[N], T* to) const {
      if (layer.relu)
        for (V& each : sum) each = relu_of(each, layer.ceiling);
      store(to, sum);
    }

    void slide(int64_t count, T* to, int64_t step) const {  // each column of the input is loaded once, for three sums
      V first[N], second[N], third[N];
      std::copy(bias, bias + N, first);
      std::copy(bias, bias + N, second);
      add(0, 0, first);
      add(1, 1, first, 0, second);
      for (int64_t p = 0; p < count; ++p, to += step) {
        std::copy(bias, bias + N, third);
#pragma GCC unroll 3
        for (int ky = 0; ky < 3; ++ky) {
          V x[N];
          load(rows[ky] + (p + 2) * layer.channels, x);
          for (int v = 0; v < N; ++v) {
            first[v] += weight[ky][2][v] * x[v];
            second[v] += weight[ky][1][v] * x[v];
            third[v] += weight[ky][0][v] * x[v];
          }
        }
        finish(first, to);
        std::copy(second, second + N, first);
        std::copy(third, third + N, second);
      }
    }

    void slide_by_2(int64_t count, T* to, int64_t step) const {
      V sum[N], next[N];
      std::copy(bias, bias + N, sum);
      add(0, 0, sum);
      for (int64_t p = 0; p < count; ++p, to += step) {
        std::copy(bias, bias + N, next);
        add(2 * p + 1, 1, sum);
        add(2 * p + 2, 2, sum, 0, next);
        finish(sum, to);
        std::copy(next, next + N, sum);
      }
    }

    void apart(int64_t count, T* to, int64_t step) const {
      for (int64_t p = 0; p < count; ++p, to += step) {
        V sum[N];
        std::copy(bias, bias + N, sum);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) add(p * layer.stride + kx * layer.dilation, kx, sum);
        finish(sum, to);
      }
    }
  };
};

// (N, C, H, W) float32 in channels_last.
struct Map {
  const float* data;
  int64_t n, h, w, channels;
  const float* at(int64_t image, int64_t i, int64_t j) const { return data + ((image * h + i) * w + j) * channels; }
};

// ------------------------------------------------------------------------------------------------------------ sources of rows

// A source gives the rows of a map of h() x w() pixels, of T. begin() says which columns [from, to) will be asked for, make()
// writes them for one row, and State is a thread's own memory.

template <class Type>
struct Expanded {  // a 1x1 convolution
  using T = Type;
  Map x;
  Pointwise<T> pointwise;
  struct State {
    int64_t from, to;
    Rows<T> row;
  };
  int64_t h() const { return x.h; }
  int64_t w() const { return x.w; }
  void begin(int64_t from, int64_t to, State& state) const {
    state.from = from, state.to = to;
    if constexpr (std::is_same_v<T, Half>) state.row.resize((to - from + TILE) * x.channels);
  }
  void make(int64_t image, int64_t i, T* row, State& state) const {
    const float* from = x.at(image, i, state.from);
    const int64_t count = state.to - state.from;
    if constexpr (std::is_same_v<T, Half>) {
      copy(from, count * x.channels, state.row.data());
      pointwise.run(state.row.data(), count, row, nullptr);
    } else {
      pointwise.run(from, count, row, nullptr);
    }
  }
};

// A 3x3 convolution of stride 2 and ReLU, over uint8 images (N, H, W, 3) less `shift` per channel, which outside the image is 0.
// Outside are `padding` rows and columns, 1 or 0, on each side.
template <class Type>
struct Stem {
  using T = Type;
  const uint8_t* images;
  int64_t height, width;
  const float* shift;
  const float* weight;  // (27, 32), rows in the order ky, kx, channel
  const float* bias;
  int64_t padding;
  static constexpr int CHANNELS = 32, W = CHANNELS / LANES, P = 24 / W < 12 ? 24 / W : 12;
  struct State {
    int64_t from, to;
    Rows<float> pixels;  // three rows of the image
  };
  int64_t h() const { return (height + 2 * padding - 3) / 2 + 1; }
  int64_t w() const { return (width + 2 * padding - 3) / 2 + 1; }
  void begin(int64_t from, int64_t to, State& state) const {
    state.from = from, state.to = to;
    state.pixels.resize(3 * 3 * (2 * (to - from + P) + 1));
  }
  void make(int64_t image, int64_t i, T* row, State& state) const {
    const int64_t count = state.to - state.from, size = static_cast<int64_t>(state.pixels.size()) / 3;
    float* pixels = state.pixels.data();
    for (int64_t ky = 0; ky < 3; ++ky) {
      read(image, 2 * i + ky - padding, 2 * state.from - padding, size / 3, pixels + ky * size);
    }
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
          if (k < count - p) store(row + (p + k) * CHANNELS + v * LANES, relu_of(sum[k][v], NO_CEILING));
    }
  }

 private:
  // `count` pixels of image row y from column x on.
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

#ifdef HAS_TILES
// The same as a product of matrices of bfloat16, for tiles: 27 values and 5 that do not count are a pixel's row. Pixels are exact
// in bfloat16, and `shift` is taken off the bias instead; outside the image is the nearest whole number to it.
struct TileStem {
  using T = Half;
  const uint8_t* images;
  int64_t height, width, padding;
  Half outside[3];
  Rows<Half> weight;  // (16, 32, 2)
  Rows<float> bias;
  static constexpr int CHANNELS = 32, DEPTH = 32;
  struct State {
    int64_t from, to, size;
    Rows<Half> pixels, matrix;  // three rows of the image, (count + TILE, 32)
    std::vector<int64_t> held;
  };

  explicit TileStem(const Stem<Half>& stem)
      : images(stem.images), height(stem.height), width(stem.width), padding(stem.padding), weight(DEPTH * CHANNELS), bias(CHANNELS) {
    for (int c = 0; c < 3; ++c) outside[c] = whole(std::nearbyint(stem.shift[c]));
    for (int n = 0; n < CHANNELS; ++n) {
      double sum = stem.bias[n];
      for (int k = 0; k < 27; ++k) {
        Half rounded[LANES];
        store(rounded, V{} + stem.weight[k * CHANNELS + n]);
        weight[(k / 2 * CHANNELS + n) * 2 + k % 2] = rounded[0];
        const uint32_t bits = uint32_t(rounded[0]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        sum -= double(value) * stem.shift[k % 3];
      }
      bias[n] = float(sum);
    }
  }

  int64_t h() const { return (height + 2 * padding - 3) / 2 + 1; }
  int64_t w() const { return (width + 2 * padding - 3) / 2 + 1; }
  void begin(int64_t from, int64_t to, State& state) const {
    state.from = from, state.to = to, state.size = 6 * (to - from) + DEPTH;
    state.pixels.resize(3 * state.size);
    state.matrix.resize((to - from + TILE) * DEPTH);
    state.held.assign(3, -2);
  }
  void make(int64_t image, int64_t i, T* row, State& state) const {
    const int64_t count = state.to - state.from;
    const Half* rows[3];
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t y = 2 * i + ky - padding, slot = (y + 3) % 3;
      Half* pixels = state.pixels.data() + slot * state.size;
      if (state.held[slot] != y) read(image, y, 2 * state.from - padding, 2 * count + 1, pixels);
      state.held[slot] = y;
      rows[ky] = pixels;
    }
    // Sixteen values are one copy, of which nine count: what follows them is overwritten by the next copy, or meets weights of 0.
    for (int64_t p = 0; p < count; ++p)
      for (int ky = 0; ky < 3; ++ky) std::memcpy(&state.matrix[p * DEPTH + 9 * ky], rows[ky] + 6 * p, 16 * sizeof(Half));
    Pointwise<Half>{weight.data(), bias.data(), DEPTH, CHANNELS, true}.run(state.matrix.data(), count, row, nullptr);
  }

 private:
  static Half whole(float value) {  // of a whole number up to 256
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return Half(bits >> 16);
  }
  // `count` pixels of image row y from column x on.
  void read(int64_t image, int64_t y, int64_t x, int64_t count, Half* to) const {
    for (int64_t at = 0; at < count; ++at)
      for (int c = 0; c < 3; ++c) to[3 * at + c] = outside[c];
    if (y < 0 || y >= height) return;
    const int64_t first = std::max<int64_t>(x, 0), last = std::min(x + count, width);
    const uint8_t* from = images + ((image * height + y) * width + first) * 3;
    to += 3 * (first - x);
    for (int64_t at = 0; at < 3 * (last - first); ++at) to[at] = whole(from[at]);
  }
};
#endif

template <class Type>
struct Resized {  // bilinear, to the size of another map
  using T = Type;
  Map x;
  Axis<float> rows, columns;
  struct State {
    int64_t from, to;
  };
  int64_t h() const { return rows.out; }
  int64_t w() const { return columns.out; }
  void begin(int64_t from, int64_t to, State& state) const { state.from = from, state.to = to; }
  void make(int64_t image, int64_t i, T* row, State& state) const {
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
  using T = typename Source::T;
  Source source;
  Depthwise<T> depthwise;
  Pointwise<T> project;
  const Map* beside = nullptr;          // more channels for `project`, after the depthwise convolution's
  const Map* added = nullptr;           // of the results' shape
  const Pointwise<T>* then = nullptr;  // one more 1x1 convolution, of the results

  struct State {
    typename Source::State source;
    int64_t from, to, first, last;  // columns of the results; columns of the source, of which some may lie outside
    Rows<T> ring, line, before;
    std::vector<int64_t> held;  // which row of the source each slot of the ring holds
  };
  int64_t h() const { return (source.h() - 1) / depthwise.stride + 1; }
  int64_t w() const { return (source.w() - 1) / depthwise.stride + 1; }
  int64_t channels() const { return then ? then->out : project.out; }

  void begin(int64_t from, int64_t to, State& state) const {
    const int64_t s = depthwise.stride, d = depthwise.dilation, slots = 2 * d + 1;
    state.from = from, state.to = to;
    state.first = from * s - d;
    state.last = (to - 1) * s + d + 1;
    state.held.assign(slots, -1);
    state.ring.assign((slots + 1) * (state.last - state.first) * depthwise.channels, T{});  // the last is of zeros
    state.line.resize((to - from + TILE) * project.in);
    state.before.resize(then ? (to - from + TILE) * then->in : 0);
    source.begin(std::max<int64_t>(state.first, 0), std::min(state.last, source.w()), state.source);
  }

  template <class To>
  void make(int64_t image, int64_t y, To* to, State& state) const {
    const int64_t s = depthwise.stride, d = depthwise.dilation, slots = 2 * d + 1, count = state.to - state.from;
    const int64_t size = (state.last - state.first) * depthwise.channels;
    const T* rows[3];
    for (int ky = 0; ky < 3; ++ky) {
      const int64_t i = y * s + (ky - 1) * d, slot = i < 0 || i >= source.h() ? slots : i % slots;
      T* row = state.ring.data() + slot * size;
      rows[ky] = row;
      if (slot == slots || state.held[slot] == i) continue;
      source.make(image, i, row + std::max<int64_t>(-state.first, 0) * depthwise.channels, state.source);
      state.held[slot] = i;
    }
    T* line = state.line.data();
    depthwise.run(rows, count, line, project.in);
    if (beside)
      for (int64_t p = 0; p < count; ++p)
        copy(beside->at(image, y, state.from + p), beside->channels, line + p * project.in + depthwise.channels);
    const float* add = added ? added->at(image, y, state.from) : nullptr;
    if (then) {
      project.run(line, count, state.before.data(), add);
      then->run(state.before.data(), count, to, nullptr);
    } else {
      project.run(line, count, to, add);
    }
  }
};

// All rows of a block to `out`, (images, h, w, channels), in tiles of at most `widest` columns.
template <class Source>
void run(const Block<Source>& block, int64_t images, int64_t widest, float* out) {
  const int64_t threads = torch::stable::get_num_threads(), h = block.h(), w = block.w();
  const int64_t tiles = (w + widest - 1) / widest, tile = (w + tiles - 1) / tiles;
  const int64_t chunks = std::clamp<int64_t>((threads + images * tiles - 1) / (images * tiles), 1, std::max<int64_t>(1, h / 4));
  parallel_for(0, images * chunks * tiles, 1, [&](int64_t begin, int64_t end) {
    const TileState tile_state;
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
  check(x.dim() == 4 && x.numel() > 0 && x.is_cpu() && x.scalar_type() == ScalarType::Float, name, " has shape ", shape(x),
        ", expected float32 (N, C, H, W) on the CPU, not empty");
  return {floats(x), x.size(0), x.size(2), x.size(3), x.size(1)};
}

Tensor channels_last(const Tensor& x) {
  return x.dim() == 4 ? torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast) : x;
}

// The operators are written for both types of rows; that of the weights says which is meant.
template <class Operator>
void of_type(const Tensor& weight, const Operator& operation) {
  if (weight.scalar_type() != ScalarType::BFloat16) return operation(float{});
  check(HAS_BFLOAT16, "weights are bfloat16, expected float32: this CPU has no AVX512-BF16");
  operation(Half{});
}

template <class T>
Pointwise<T> pointwise_of(const char* name, const Tensor& weight, const Tensor& bias, int64_t in, bool relu,
                          float ceiling = NO_CEILING) {
  constexpr bool half = std::is_same_v<T, Half>;
  constexpr int64_t multiple = half ? MULTIPLE : MULTIPLE / 2;
  const int64_t out = bias.dim() == 1 ? bias.size(0) : 0;
  check_vector(name, bias, out);
  const bool fits = half ? weight.dim() == 3 && weight.size(0) == in / 2 && weight.size(1) == out && weight.size(2) == 2
                         : weight.dim() == 2 && weight.size(0) == in && weight.size(1) == out;
  check(fits && weight.is_cpu() && weight.is_contiguous() &&
            weight.scalar_type() == (half ? ScalarType::BFloat16 : ScalarType::Float) && in % multiple == 0 && out > 0 &&
            out % multiple == 0,
        name, " has shape ", shape(weight), ", expected contiguous float32 (", in, ", ", out, ") or bfloat16 (", in / 2, ", ", out,
        ", 2) on the CPU, all alike, channels a multiple of ", multiple);
  return {static_cast<const T*>(weight.const_data_ptr()), floats(bias), in, out, relu, ceiling};
}

template <class T>
Depthwise<T> depthwise_of(const Tensor& weight, const Tensor& bias, int64_t channels, int64_t stride, int64_t dilation, bool relu,
                          float ceiling = NO_CEILING) {
  check_vector("depthwise bias", bias, channels);
  check(weight.dim() == 2 && weight.size(0) == 9 && weight.size(1) == channels && weight.is_cpu() && weight.is_contiguous() &&
            weight.scalar_type() == ScalarType::Float && channels % GROUP<T> == 0,
        "depthwise has shape ", shape(weight), ", expected contiguous float32 (9, ", channels, ") on the CPU");
  check(stride >= 1 && stride <= 2 && dilation >= 1 && dilation <= 64, "stride is ", stride, " and dilation ", dilation,
        ", expected at most 2 and 64, at least 1");
  return {floats(weight), floats(bias), channels, stride, dilation, relu, ceiling};
}

// Results go to tensors that the caller keeps: fresh ones of this size cost the operating system more than the computation.
float* result_of(Tensor& out, int64_t n, int64_t channels, int64_t h, int64_t w) {
  check(out.dim() == 4 && out.is_cpu() && out.scalar_type() == ScalarType::Float && out.size(0) == n && out.size(1) == channels &&
            out.size(2) == h && out.size(3) == w && out.stride(1) == 1 && (w == 1 || out.stride(3) == channels) &&
            (h == 1 || out.stride(2) == w * channels) && (n == 1 || out.stride(0) == h * w * channels),
        "out has shape ", shape(out), ", expected float32 (", n, ", ", channels, ", ", h, ", ", w, ") in channels_last on the CPU");
  return static_cast<float*>(out.mutable_data_ptr());
}

constexpr int64_t CACHE_BYTES = 640 << 10;  // for the expanded rows of a tile, in a second-level cache of 1 MiB or more

void bottleneck_block(const Tensor& input, const Tensor& expand, const Tensor& expand_bias, const Tensor& depthwise,
                      const Tensor& depthwise_bias, const Tensor& project, const Tensor& project_bias, int64_t stride,
                      bool residual, bool relu6, Tensor out) {
  of_type(expand, [&](auto value) {
    using T = decltype(value);
    const Tensor kept = channels_last(input);
    const Map x = map_of("x", kept);
    const float ceiling = relu6 ? 6.0f : NO_CEILING;
    const auto first = pointwise_of<T>("expand", expand, expand_bias, x.channels, true, ceiling);
    const auto last = pointwise_of<T>("project", project, project_bias, first.out, false);
    check(!residual || (stride == 1 && x.channels == last.out), "x has ", x.channels, " channels and stride is ", stride,
          ", expected the output's ", last.out, " and 1 where x is added to it");
    const auto middle = depthwise_of<T>(depthwise, depthwise_bias, first.out, stride, 1, true, ceiling);
    const Block<Expanded<T>> block{{x, first}, middle, last, nullptr, residual ? &x : nullptr};
    const int64_t widest = CACHE_BYTES / (3 * first.out * int64_t(sizeof(T)) * stride);
    run(block, x.n, std::max<int64_t>(16, widest), result_of(out, x.n, last.out, block.h(), block.w()));
  });
}

// Learning to downsample: the first convolution and two depthwise separable ones, all of stride 2.
void stem_block(const Tensor& images, const Tensor& shift, const Tensor& conv, const Tensor& conv_bias, const Tensor& depthwise1,
                const Tensor& depthwise1_bias, const Tensor& project1, const Tensor& project1_bias, const Tensor& depthwise2,
                const Tensor& depthwise2_bias, const Tensor& project2, const Tensor& project2_bias, int64_t padding,
                bool depthwise_relu, Tensor out) {
  of_type(project1, [&](auto value) {
    using T = decltype(value);
    using Conv = Stem<T>;
    check(images.dim() == 4 && images.numel() > 0 && images.is_cpu() && images.scalar_type() == ScalarType::Byte &&
              images.size(3) == 3 && images.size(1) >= 3 && images.size(2) >= 3,
          "images have shape ", shape(images), ", expected uint8 (N, H, W, 3) on the CPU, of 3 pixels a side or more");
    check(padding == 0 || padding == 1, "padding is ", padding, ", expected 0 or 1");
    check_vector("shift", shift, 3);
    check_vector("conv bias", conv_bias, Conv::CHANNELS);
    check(conv.dim() == 2 && conv.size(0) == 27 && conv.size(1) == Conv::CHANNELS && conv.is_cpu() && conv.is_contiguous() &&
              conv.scalar_type() == ScalarType::Float,
          "conv has shape ", shape(conv), ", expected contiguous float32 (27, ", Conv::CHANNELS, ") on the CPU");
    const Tensor kept = torch::stable::contiguous(images);
    const Conv stem{static_cast<const uint8_t*>(kept.const_data_ptr()), images.size(1), images.size(2), floats(shift), floats(conv),
                    floats(conv_bias), padding};
    const auto first = pointwise_of<T>("project1", project1, project1_bias, Conv::CHANNELS, true);
    const auto second = pointwise_of<T>("project2", project2, project2_bias, first.out, true);
    const auto middle1 = depthwise_of<T>(depthwise1, depthwise1_bias, Conv::CHANNELS, 2, 1, depthwise_relu);
    const auto middle2 = depthwise_of<T>(depthwise2, depthwise2_bias, first.out, 2, 1, depthwise_relu);
    const auto from = [&](const auto& source) {
      using Source = std::decay_t<decltype(source)>;
      const Block<Block<Source>> block{{source, middle1, first}, middle2, second};
      run(block, images.size(0), 128, result_of(out, images.size(0), second.out, block.h(), block.w()));
    };
#ifdef HAS_TILES
    if constexpr (std::is_same_v<T, Half>) {
      if (TileState::usable()) return from(TileStem(stem));
    }
#endif
    from(stem);
  });
}

// Feature fusion, whose two 1x1 convolutions are one of both inputs side by side (`project`, the context's channels first), then
// the classifier's two depthwise separable convolutions and its last 1x1 one.
void head_block(const Tensor& detail, const Tensor& context, const Tensor& depthwise, const Tensor& depthwise_bias,
                const Tensor& project, const Tensor& project_bias, int64_t dilation, const Tensor& depthwise1,
                const Tensor& depthwise1_bias, const Tensor& project1, const Tensor& project1_bias, const Tensor& depthwise2,
                const Tensor& depthwise2_bias, const Tensor& project2, const Tensor& project2_bias, const Tensor& scores,
                const Tensor& scores_bias, bool depthwise_relu, bool align_corners, Tensor out) {
  of_type(project, [&](auto value) {
    using T = decltype(value);
    const Tensor kept_detail = channels_last(detail), kept_context = channels_last(context);
    const Map fine = map_of("detail", kept_detail), coarse = map_of("context", kept_context);
    check(fine.n == coarse.n, "context has ", coarse.n, " images, expected the detail's ", fine.n);
    const Resized<T> resized{coarse, Axis<float>(coarse.h, fine.h, align_corners),
                             Axis<float>(coarse.w, fine.w, align_corners)};
    const auto fused = pointwise_of<T>("project", project, project_bias, coarse.channels + fine.channels, true);
    const auto first = pointwise_of<T>("project1", project1, project1_bias, fused.out, true);
    const auto second = pointwise_of<T>("project2", project2, project2_bias, first.out, true);
    const auto last = pointwise_of<T>("scores", scores, scores_bias, second.out, false);
    const Block<Resized<T>> fusion{resized, depthwise_of<T>(depthwise, depthwise_bias, coarse.channels, 1, dilation, true), fused,
                                   &fine};
    using One = Block<Block<Resized<T>>>;
    const One one{fusion, depthwise_of<T>(depthwise1, depthwise1_bias, fused.out, 1, 1, depthwise_relu), first};
    const auto middle = depthwise_of<T>(depthwise2, depthwise2_bias, first.out, 1, 1, depthwise_relu);
    const Block<One> block{one, middle, second, nullptr, nullptr, &last};
    run(block, fine.n, 64, result_of(out, fine.n, last.out, fine.h, fine.w));
  });
}

// Pyramid pooling: the averages of x over 1, 2, 3 and 6 bins a side, each through its own 1x1 convolution and ReLU (`reduce`,
// one after the other: (4 * C, C / 4)), resized back, beside x through a last 1x1 convolution and ReLU. What comes from a level
// is convolved before it is resized, where it is a few pixels; the two commute.
void pyramid_block(const Tensor& input, const Tensor& reduce, const Tensor& reduce_bias, const Tensor& project_levels,
                   const Tensor& project, const Tensor& project_bias, bool align_corners, Tensor out) {
  of_type(project, [&](auto value) {
    using T = decltype(value);
    constexpr int LEVELS = 4;
    constexpr int64_t BINS[LEVELS] = {1, 2, 3, 6};
    const Tensor kept = channels_last(input);
    const Map x = map_of("x", kept);
    const int64_t c = x.channels, part = c / LEVELS, out_c = project_bias.size(0);
    check(c % (LEVELS * MULTIPLE / 2) == 0, "x has ", c, " channels, expected a multiple of ", LEVELS * MULTIPLE / 2);
    const auto last = pointwise_of<T>("project", project, project_bias, c, true);
    check_vector("reduce bias", reduce_bias, c);
    for (const Tensor* weight : {&reduce, &project_levels})
      check(weight->is_cpu() && weight->is_contiguous() && weight->scalar_type() == ScalarType::Float && weight->dim() == 2 &&
                weight->size(0) == (weight == &reduce ? LEVELS * c : c) && weight->size(1) == (weight == &reduce ? part : out_c),
            weight == &reduce ? "reduce" : "project_levels", " has shape ", shape(*weight),
            ", expected contiguous float32 (4 C, C / 4) or (C, out) on the CPU");
    float* to = result_of(out, x.n, out_c, x.h, x.w);
    const std::vector<float> zeros(out_c);
    for (int64_t image = 0; image < x.n; ++image) {
      Rows<float> levels[LEVELS];
      std::vector<Resized<float>> resized;
      parallel_for(0, LEVELS, 1, [&](int64_t begin, int64_t end) {
        for (int64_t level = begin; level < end; ++level) {
          const int64_t bins = BINS[level];
          Rows<float> mean(bins * bins * c), reduced(bins * bins * part);
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
          const Pointwise<float> narrow{floats(reduce) + level * c * part, floats(reduce_bias) + level * part, c, part, true};
          narrow.run(mean.data(), bins * bins, reduced.data(), nullptr);
          const Pointwise<float> wide{floats(project_levels) + level * part * out_c, zeros.data(), part, out_c, false};
          levels[level].resize(bins * bins * out_c);
          wide.run(reduced.data(), bins * bins, levels[level].data(), nullptr);
        }
      });
      for (int level = 0; level < LEVELS; ++level) {
        const int64_t bins = BINS[level];
        const Map map{levels[level].data(), 1, bins, bins, out_c};
        resized.push_back({map, Axis<float>(bins, x.h, align_corners), Axis<float>(bins, x.w, align_corners)});
      }
      parallel_for(0, x.h, 1, [&](int64_t begin, int64_t end) {
        const TileState tile_state;
        Rows<float> sum(x.w * out_c), each(x.w * out_c);
        Rows<T> row((x.w + TILE) * c);
        for (int64_t y = begin; y < end; ++y) {
          Resized<float>::State whole{0, x.w};
          resized[0].make(0, y, sum.data(), whole);
          for (int level = 1; level < LEVELS; ++level) {
            resized[level].make(0, y, each.data(), whole);
            for (size_t at = 0; at < sum.size(); ++at) sum[at] += each[at];
          }
          copy(x.at(image, y, 0), x.w * c, row.data());
          last.run(row.data(), x.w, to + (image * x.h + y) * x.w * out_c, sum.data());
        }
      });
    }
  });
}

}  // namespace
}  // namespace ops_ext

STABLE_TORCH_LIBRARY_FRAGMENT(ops_ext, m) {
  m.def("stem_block(Tensor images, Tensor shift, Tensor conv, Tensor conv_bias, Tensor depthwise1, Tensor depthwise1_bias, "
        "Tensor project1, Tensor project1_bias, Tensor depthwise2, Tensor depthwise2_bias, Tensor project2, "
        "Tensor project2_bias, int padding, bool depthwise_relu, Tensor(a!) out) -> ()");
  m.def("bottleneck_block(Tensor x, Tensor expand, Tensor expand_bias, Tensor depthwise, Tensor depthwise_bias, Tensor project, "
        "Tensor project_bias, int stride, bool residual, bool relu6, Tensor(a!) out) -> ()");
  m.def("pyramid_block(Tensor x, Tensor reduce, Tensor reduce_bias, Tensor project_levels, Tensor project, Tensor project_bias, "
        "bool align_corners, Tensor(a!) out) -> ()");
  m.def("head_block(Tensor detail, Tensor context, Tensor depthwise, Tensor depthwise_bias, Tensor project, Tensor project_bias, "
        "int dilation, Tensor depthwise1, Tensor depthwise1_bias, Tensor project1, "
        "Tensor project1_bias, Tensor depthwise2, Tensor depthwise2_bias, Tensor project2, Tensor project2_bias, Tensor scores, "
        "Tensor scores_bias, bool depthwise_relu, bool align_corners, Tensor(a!) out) -> ()");
  m.def("has_bfloat16() -> bool");
  m.def("has_fast_bfloat16() -> bool");
}

bool ops_ext_has_bfloat16() { return ops_ext::HAS_BFLOAT16; }

// Faster than float32, that is. Intel's CPUs multiply pairs of bfloat16 at half the rate of float32 outside their tiles.
bool ops_ext_has_fast_bfloat16() {
#ifdef __AVX512BF16__
  return ops_ext::TileState::usable() || !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CPU, m) {
  m.impl("stem_block", TORCH_BOX(&ops_ext::stem_block));
  m.impl("bottleneck_block", TORCH_BOX(&ops_ext::bottleneck_block));
  m.impl("pyramid_block", TORCH_BOX(&ops_ext::pyramid_block));
  m.impl("head_block", TORCH_BOX(&ops_ext::head_block));
}

STABLE_TORCH_LIBRARY_IMPL(ops_ext, CompositeExplicitAutograd, m) { 
  m.impl("has_bfloat16", TORCH_BOX(&ops_ext_has_bfloat16));
  m.impl("has_fast_bfloat16", TORCH_BOX(&ops_ext_has_fast_bfloat16));
}
