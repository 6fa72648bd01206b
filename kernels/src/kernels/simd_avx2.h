// See simd.h. AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace bertrt::BERTRT_ISA {
namespace {

using F = __m256;
using I = __m256i;
inline constexpr int kWidth = 8;

inline F load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, F x) { _mm256_storeu_ps(to, x); }
inline F set(float x) { return _mm256_set1_ps(x); }
inline F zero() { return _mm256_setzero_ps(); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline F copy_sign(F from, F to) { return _mm256_or_ps(to, _mm256_and_ps(from, _mm256_set1_ps(-0.0f))); }
inline float sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F keep_first(F x, int count) { return _mm256_and_ps(x, _mm256_castsi256_ps(first_lanes(count))); }
inline F load_first(const float* from, int count) { return _mm256_maskload_ps(from, first_lanes(count)); }
inline void store_first(float* to, F x, int count) { _mm256_maskstore_ps(to, first_lanes(count), x); }
inline bool any_greater(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }

inline F round_to_whole(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale_by_power(F x, F n) {
  // Below 2^-126 the exponent field is zero, and so is the factor.
  const F bounded = min(max(n, set(-127.0f)), set(127.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(bounded), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

inline I load_int(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
inline I mul_int(I a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
inline void store_int(int32_t* to, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }

inline F load_bf16(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store_bf16(uint16_t* to, F x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}
inline void store_bf16_pair(uint16_t* to, F a, F b) {
  store_bf16(to, a);
  store_bf16(to + kWidth, b);
}
inline F load_int8(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline void store_int8(int8_t* to, F x, int8_t flip) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(flip));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
}
inline void store_int8_four(int8_t* to, F a, F b, F c, F d, int8_t flip) {
  const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
  // Packing goes by lanes of 128 bits: words of four bytes a0 b0 c0 d0 a1 b1 c1 d1.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(bytes, _mm256_set1_epi8(flip)));
}

using H = __m256i;
inline constexpr int kHalves = 16;
inline H no_magnitude() { return _mm256_setzero_si256(); }
inline H max_magnitude(H most, const uint16_t* from) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_max_epu16(most, _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)));
}
inline uint16_t largest_magnitude(H x) {
  const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
}
inline void quantize_pieces(const uint16_t* a, const uint16_t* b, F by, F shift, int8_t flip, int8_t* to) {
  const uint16_t* from[2] = {a, b};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    F x[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) x[j] = fma(load_bf16(from[i] + j * kWidth), by, shift);
    store_int8_four(to + i * 32, x[0], x[1], x[2], x[3], flip);
  }
}

// Transposes 8 x 8 words of 32 bits; strides in bytes.
inline void transpose_8x8(const char* from, size_t from_stride, char* to, size_t to_stride) {
  __m256 v[8], w[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * from_stride));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    w[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    v[4 * i] = _mm256_shuffle_ps(w[4 * i], w[4 * i + 2], 0x44);
    v[4 * i + 1] = _mm256_shuffle_ps(w[4 * i], w[4 * i + 2], 0xee);
    v[4 * i + 2] = _mm256_shuffle_ps(w[4 * i + 1], w[4 * i + 3], 0x44);
    v[4 * i + 3] = _mm256_shuffle_ps(w[4 * i + 1], w[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to + i * to_stride), _mm256_permute2f128_ps(v[i], v[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * to_stride), _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
  }
}

inline void transpose_words(const char* from, size_t stride, char* to) {
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) transpose_8x8(from + 8 * i * stride + 32 * j, stride, to + 8 * j * 64 + 32 * i, 64);
  }
}

inline void interleave_halves(const uint16_t* a, const uint16_t* b, char* to) {
  for (int i = 0; i < 2; ++i) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 8 * i));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 8 * i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32 * i), _mm_unpacklo_epi16(low, high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32 * i + 16), _mm_unpackhi_epi16(low, high));
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
