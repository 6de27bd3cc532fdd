// Vectors of the CPU, as wide as its registers, and the one way to load, store and convert them.
//
// GCC's and Clang's vector types: arithmetic and comparisons work lane by lane, and `mask ? a : b` selects.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace ops_ext {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T in_memory __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N = LANES>
using Vector = typename VectorOf<T, N>::type;
using Floats = Vector<float>;
using Ints = Vector<int32_t>;

// From and to any address. Not by memcpy: tuning for Intel, GCC copies a vector in two halves, and the next load of all
// of it has to wait for both. That doubled all times.
template <int N = LANES, class T>
inline Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T, N>::in_memory*>(from);
}
inline void store(float* to, const Floats& v) { *reinterpret_cast<VectorOf<float, LANES>::in_memory*>(to) = v; }

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The channels that the engine takes at once: one vector of float32, or two of bfloat16, of which the first holds those
// in even places.
using Half = uint16_t;  // the bits of a bfloat16
template <class T>
struct Group {
  static constexpr int VECTORS = sizeof(float) / sizeof(T), CHANNELS = VECTORS * LANES;
  Floats v[VECTORS];
};

inline void load(const float* from, Group<float>& to) { to.v[0] = load(from); }
inline void store(float* to, const Group<float>& from) { store(to, from.v[0]); }

inline void copy(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }

#ifdef __AVX512BF16__
constexpr bool HAS_BFLOAT16 = true;

inline __m512i rounded(const Floats& first, const Floats& second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
inline void store(Half* to, const Floats& v) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
inline void load(const Half* from, Group<Half>& to) {
  const Ints pairs = load(reinterpret_cast<const int32_t*>(from));
  to.v[0] = (Floats)(pairs << 16);
  to.v[1] = (Floats)(pairs & ~0xffff);
}
inline void store(Half* to, const Group<Half>& from) {
  alignas(64) static constexpr Half ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), rounded(from.v[0], from.v[1])));
}
inline void copy(const float* from, int64_t count, Half* to) {
  for (int64_t at = 0; at < count; at += LANES) store(to + at, load(from + at));
}
// Adds the products of pairs of bfloat16.
inline Floats multiply_add(uint32_t pair, const Floats& pairs, const Floats& sum) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)), (__m512bh)pairs);
}
#else
constexpr bool HAS_BFLOAT16 = false;
#endif
inline Floats multiply_add(float value, const Floats& values, const Floats& sum) { return value * values + sum; }

}  // namespace ops_ext
