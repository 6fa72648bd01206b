// See product.h. AVX2: vpdpbusd with AVX-VNNI, else vpmaddubsw on magnitudes and signs, which cannot saturate.
#pragma once

#include <string.h>

#include "simd.h"

namespace bertrt::BERTRT_ISA {
namespace {

inline __m256i broadcast_word(const char* from) {
  int32_t word;
  memcpy(&word, from, 4);
  return _mm256_set1_epi32(word);
}

struct FloatSum {
  using Sum = __m256;
  static inline Sum start(const int32_t*) { return _mm256_setzero_ps(); }
  static inline void store(char* to, Sum sum) { _mm256_storeu_ps(reinterpret_cast<float*>(to), sum); }
};

struct IntSum {
  using Sum = __m256i;
  static inline Sum start(const int32_t* init) {
    return init == nullptr ? _mm256_setzero_si256() : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(init));
  }
  static inline __m256i broadcast(const char* a) { return broadcast_word(a); }
  static inline void store(char* to, Sum sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum); }
};

#if BERTRT_HAS_VNNI
// Activations are stored as unsigned bytes, 128 more than they are: vpdpbusd multiplies unsigned by signed.
struct DotInt8 : IntSum {
  using Weights = __m256i;
  static constexpr int kRows = 6;
  static constexpr int8_t kFlip = -128;
  static inline Weights weights(const char* b) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)); }
  // As an instruction: see dot_avx512.h.
  static inline Sum add(Sum sum, __m256i x, Weights w) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
    return sum;
  }
};
#else
// |w| times x with w's sign: with both in -127..127 a pair of products is at most 32,258 and fits 16 bits.
struct DotInt8 : IntSum {
  struct Pair {
    __m256i signs, magnitudes;
  };
  using Weights = Pair;
  static constexpr int kRows = 4;
  static constexpr int8_t kFlip = 0;
  static inline Weights weights(const char* b) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    return Pair{w, _mm256_abs_epi8(w)};
  }
  static inline Sum add(Sum sum, __m256i x, Weights w) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitudes, _mm256_sign_epi8(x, w.signs));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#endif

struct DotBf16 : FloatSum {
  struct Pair {
    __m256 even, odd;
  };
  using Weights = Pair;
  static constexpr int kRows = 4;
  static inline Pair split(__m256i pairs) {
    return Pair{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static inline Weights weights(const char* b) {
    return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
  static inline Pair broadcast(const char* a) { return split(broadcast_word(a)); }
  static inline Sum add(Sum sum, Pair x, Weights w) {
    return _mm256_fmadd_ps(x.odd, w.odd, _mm256_fmadd_ps(x.even, w.even, sum));
  }
};

struct DotFloat : FloatSum {
  using Weights = __m256;
  static constexpr int kRows = 6;
  static inline Weights weights(const char* b) { return _mm256_loadu_ps(reinterpret_cast<const float*>(b)); }
  static inline __m256 broadcast(const char* a) { return _mm256_castsi256_ps(broadcast_word(a)); }
  static inline Sum add(Sum sum, __m256 x, Weights w) { return _mm256_fmadd_ps(x, w, sum); }
};

}  // namespace
}  // namespace bertrt::BERTRT_ISA
