// See product.h. By the compiler's vector types alone.
#pragma once

#include <string.h>

#include "simd.h"

namespace bertrt::BERTRT_ISA {
namespace {

struct FloatSum {
  using Sum = F;
  static inline Sum start(const int32_t*) { return zero(); }
  static inline void store(char* to, Sum sum) { memcpy(to, &sum, sizeof sum); }
};

// Bytes 0 and 2, and 1 and 3, of four outputs, each widened to 16 bits. With both factors in -127..127 the sum of two
// products is at most 32,258 and fits 16 bits.
struct DotInt8 {
  typedef int16_t H __attribute__((vector_size(16)));
  using Sum = I;
  struct Weights {
    H even, odd;
  };
  static constexpr int kRows = 2;
  static constexpr int8_t kFlip = 0;
  static inline Sum start(const int32_t* init) { return init == nullptr ? I{} : load_int(init); }
  static inline Weights split(H halves) { return Weights{(halves << 8) >> 8, halves >> 8}; }
  static inline Weights weights(const char* b) {
    H halves;
    memcpy(&halves, b, sizeof halves);
    return split(halves);
  }
  static inline Weights broadcast(const char* a) {
    int32_t word;
    memcpy(&word, a, 4);
    return split((H)(I{word, word, word, word}));
  }
  static inline Sum add(Sum sum, const Weights& x, const Weights& w) {
    const I pairs = (I)(H)(x.even * w.even + x.odd * w.odd);
    return sum + ((pairs << 16) >> 16) + (pairs >> 16);
  }
  static inline void store(char* to, Sum sum) { memcpy(to, &sum, sizeof sum); }
};

struct DotBf16 : FloatSum {
  struct Weights {
    F even, odd;
  };
  static constexpr int kRows = 2;
  static inline Weights split(U pairs) { return Weights{(F)(pairs << 16), (F)(pairs & 0xffff0000u)}; }
  static inline Weights weights(const char* b) {
    U pairs;
    memcpy(&pairs, b, sizeof pairs);
    return split(pairs);
  }
  static inline Weights broadcast(const char* a) {
    uint32_t pair;
    memcpy(&pair, a, 4);
    return split(U{pair, pair, pair, pair});
  }
  static inline Sum add(Sum sum, Weights x, const Weights& w) {
    return fma(x.odd, w.odd, fma(x.even, w.even, sum));
  }
};

struct DotFloat : FloatSum {
  using Weights = F;
  static constexpr int kRows = 2;
  static inline Weights weights(const char* b) { return load(reinterpret_cast<const float*>(b)); }
  static inline F broadcast(const char* a) {
    float x;
    memcpy(&x, a, 4);
    return set(x);
  }
  static inline Sum add(Sum sum, F x, Weights w) { return fma(x, w, sum); }
};

}  // namespace
}  // namespace bertrt::BERTRT_ISA
