// See product.h. AVX-512: vpdpbusd for int8, vdpbf16ps where there is one.
#pragma once

#include <string.h>

#include "simd.h"

namespace bertrt::BERTRT_ISA {
namespace {

inline __m512i broadcast_word(const char* from) {
  int32_t word;
  memcpy(&word, from, 4);
  return _mm512_set1_epi32(word);
}

struct FloatSum {
  using Sum = __m512;
  static inline Sum start(const int32_t*) { return _mm512_setzero_ps(); }
  static inline void store(char* to, Sum sum) { _mm512_storeu_ps(to, sum); }
};

// Activations are stored as unsigned bytes, 128 more than they are: vpdpbusd multiplies unsigned by signed.
struct DotInt8 {
  using Sum = __m512i;
  using Weights = __m512i;
  static constexpr int kRows = 8;
  static constexpr int8_t kFlip = -128;
  static inline Sum start(const int32_t* init) {
    return init == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(init);
  }
  static inline Weights weights(const char* b) { return _mm512_loadu_si512(b); }
  static inline __m512i broadcast(const char* a) { return broadcast_word(a); }
  // As an instruction, because GCC 12 copies every sum around the intrinsic when there are more than 16.
  static inline Sum add(Sum sum, __m512i x, Weights w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
  static inline void store(char* to, Sum sum) { _mm512_storeu_si512(to, sum); }
};

#if BERTRT_HAS_BF16
struct DotBf16 : FloatSum {
  using Weights = __m512bh;
  static constexpr int kRows = 8;
  static inline Weights weights(const char* b) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)); }
  static inline __m512bh broadcast(const char* a) { return reinterpret_cast<__m512bh>(broadcast_word(a)); }
  static inline Sum add(Sum sum, __m512bh x, Weights w) { return _mm512_dpbf16_ps(sum, x, w); }
};
#else
struct DotBf16 : FloatSum {
  struct Pair {
    __m512 even, odd;
  };
  using Weights = Pair;
  static constexpr int kRows = 8;
  static inline Pair split(__m512i pairs) {
    return Pair{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static inline Weights weights(const char* b) { return split(_mm512_loadu_si512(b)); }
  static inline Pair broadcast(const char* a) { return split(broadcast_word(a)); }
  static inline Sum add(Sum sum, Pair x, Weights w) {
    return _mm512_fmadd_ps(x.odd, w.odd, _mm512_fmadd_ps(x.even, w.even, sum));
  }
};
#endif

struct DotFloat : FloatSum {
  using Weights = __m512;
  static constexpr int kRows = 8;
  static inline Weights weights(const char* b) { return _mm512_loadu_ps(b); }
  static inline __m512 broadcast(const char* a) { return _mm512_castsi512_ps(broadcast_word(a)); }
  static inline Sum add(Sum sum, __m512 x, Weights w) { return _mm512_fmadd_ps(x, w, sum); }
};

}  // namespace
}  // namespace bertrt::BERTRT_ISA
