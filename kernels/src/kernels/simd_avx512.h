// See simd.h. AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bertrt::BERTRT_ISA {
namespace {

using F = __m512;
using I = __m512i;
inline constexpr int kWidth = 16;

inline F load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, F x) { _mm512_storeu_ps(to, x); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F zero() { return _mm512_setzero_ps(); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
// a * b + c, rounded once where the instruction set can.
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// a * b - c
inline F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F x) { return _mm512_abs_ps(x); }
// The magnitude of `to`, which is not negative, with the sign of `from`.
inline F copy_sign(F from, F to) {
  return _mm512_or_ps(to, _mm512_and_ps(from, _mm512_set1_ps(-0.0f)));
}
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
inline float largest(F x) { return _mm512_reduce_max_ps(x); }

// Elements `from` and beyond replaced by zero.
inline F keep_first(F x, int count) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1), x);
}
inline F load_first(const float* from, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1), from);
}
inline void store_first(float* to, F x, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1), x);
}
// Whether any element of a is greater than b's.
inline bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

inline F round_to_whole(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for whole n; zero where that is too small for a normal number.
inline F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }

inline I load_int(const int32_t* from) { return _mm512_loadu_si512(from); }
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline I mul_int(I a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
inline void store_int(int32_t* to, I x) { _mm512_storeu_si512(to, x); }

inline F load_bf16(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_bf16(uint16_t* to, F x) {
#if BERTRT_HAS_BF16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
// a and b, one after the other.
inline void store_bf16_pair(uint16_t* to, F a, F b) {
#if BERTRT_HAS_BF16
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
#else
  store_bf16(to, a);
  store_bf16(to + kWidth, b);
#endif
}
inline F load_int8(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
// Rounds to whole numbers and saturates; `flip` is xored on the bytes.
inline void store_int8(int8_t* to, F x, int8_t flip) {
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_xor_si128(bytes, _mm_set1_epi8(flip)));
}
// Four vectors, one after the other.
inline void store_int8_four(int8_t* to, F a, F b, F c, F d, int8_t flip) {
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
  // Packing goes by lanes of 128 bits: words of four bytes a0 b0 c0 d0 a1 b1 ...
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  _mm512_storeu_si512(to, _mm512_xor_si512(bytes, _mm512_set1_epi8(flip)));
}

// Bits of bfloat16, whose magnitudes order as whole numbers do, with NaN above all others.
using H = __m512i;
inline constexpr int kHalves = 32;
inline H no_magnitude() { return _mm512_setzero_si512(); }
inline H max_magnitude(H most, const uint16_t* from) {
  return _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi16(0x7fff)));
}
inline uint16_t largest_magnitude(H x) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // There is an instruction for the least of eight, none for the largest.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
}
#if BERTRT_HAS_BF16
inline H to_bf16(F a, F b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }
inline void store_halves(void* to, H x) { _mm512_storeu_si512(to, x); }
// total + the bfloat16 numbers of x, two of them in each place.
inline F add_halves(F total, H x) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  return _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(ones));
}
#endif
// Two pieces of bfloat16 to one of bytes: round(x * by + shift), for products within 16 bits.
inline void quantize_pieces(const uint16_t* a, const uint16_t* b, F by, F shift, int8_t flip, int8_t* to) {
  const uint16_t* from[2] = {a, b};
  __m512i words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    // Even elements are the lower halves of 32 bits, odd ones the upper.
    const __m512i x = _mm512_loadu_si512(from[i]);
    const F even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    const F odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
    words[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_cvtps_epi32(fma(even, by, shift)),
                                       _mm512_slli_epi32(_mm512_cvtps_epi32(fma(odd, by, shift)), 16));
  }
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i bytes = _mm512_permutexvar_epi64(order, _mm512_packs_epi16(words[0], words[1]));
  _mm512_storeu_si512(to, _mm512_xor_si512(bytes, _mm512_set1_epi8(flip)));
}

// Transposes 16 x 16 words of 32 bits: to[j][i] = from[i][j]; rows of `from` are `stride` bytes apart, those of `to` 64.
inline void transpose_words(const char* from, size_t stride, char* to) {
  __m512i v[16], w[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    w[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    w[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(w[4 * i], w[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(w[4 * i], w[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(w[4 * i + 1], w[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(w[4 * i + 1], w[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 64, v[i]);
}

// Two rows of 16 16-bit numbers become one row of 16 pairs (a, b).
inline void interleave_halves(const uint16_t* a, const uint16_t* b, char* to) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
