// Intel's AMX: eight registers of 16 rows of 64 bytes, of which a product of bfloat16 matrices takes three.
//
// Here 0 to 3 hold sums of 2 x 16 pixels times 2 x 16 channels, 4 and 5 pixels, 6 and 7 weights.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "../simd.h"

#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ops_ext {

constexpr float NO_CEILING = std::numeric_limits<float>::infinity();
inline Floats relu_of(const Floats& v, float ceiling) {  // ReLU, or ReLU6 with a ceiling of 6
  const Floats low = v > 0.0f ? v : Floats{}, high = Floats{} + ceiling;
  return low < high ? low : high;
}

#ifdef HAS_TILES
inline void memory_changes() { asm volatile("" ::: "memory"); }  // GCC 12 does not know that tile loads and stores do

// A thread owns the tiles while a TileState lives, and then gets back what it had.
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
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0;
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

  // Adds 32 products to each. from: pixels `step` values apart; weight: (16, out, 2). Reads 16 pixels, 32 with
  // `second`.
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
      Floats first = load(memory[p / 16 * 2][p % 16]), second = load(memory[p / 16 * 2 + 1][p % 16]);
      if (added) first += load(added + p * out), second += load(added + p * out + 16);
      if constexpr (sizeof(To) == sizeof(Half)) {
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

}  // namespace ops_ext
