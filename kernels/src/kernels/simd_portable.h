// See simd.h. Vectors of four by the compiler's own vector types (GCC and Clang), so SSE2 on x86-64 and NEON on arm64.
#pragma once

#include <cstdint>
#include <cstring>

namespace bertrt::BERTRT_ISA {
namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
inline constexpr int kWidth = 4;

inline F load(const float* from) {
  F x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, F x) { memcpy(to, &x, sizeof x); }
inline F set(float x) { return F{x, x, x, x}; }
inline F zero() { return F{}; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F fms(F a, F b, F c) { return a * b - c; }
inline F select(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }
inline F min(F a, F b) { return select(a < b, a, b); }
inline F max(F a, F b) { return select(a > b, a, b); }
inline F abs(F x) { return (F)((I)x & 0x7fffffff); }
inline F copy_sign(F from, F to) { return (F)((I)to | ((I)from & INT32_MIN)); }
inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest(F x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}

inline F keep_first(F x, int count) { return (F)((I)x & (I{0, 1, 2, 3} < I{count, count, count, count})); }
inline F load_first(const float* from, int count) {
  F x{};
  memcpy(&x, from, sizeof(float) * static_cast<size_t>(count < 4 ? (count > 0 ? count : 0) : 4));
  return x;
}
inline void store_first(float* to, F x, int count) {
  memcpy(to, &x, sizeof(float) * static_cast<size_t>(count < 4 ? (count > 0 ? count : 0) : 4));
}
inline bool any_greater(F a, F b) {
  const I greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}

// Adding 1.5 * 2^23 leaves no bits below the point; exact for |x| < 2^22, which all our uses keep to.
inline F round_to_whole(F x) {
  const F magic = set(12582912.0f);
  return (x + magic) - magic;
}
inline I to_whole(F x) { return __builtin_convertvector(round_to_whole(x), I); }
inline F scale_by_power(F x, F n) {
  const F bounded = min(max(n, set(-127.0f)), set(127.0f));
  return x * (F)((to_whole(bounded) + 127) << 23);
}

inline I load_int(const int32_t* from) {
  I x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline F to_float(I x) { return __builtin_convertvector(x, F); }
inline I add_int(I a, I b) { return a + b; }
inline I mul_int(I a, int32_t b) { return a * b; }
inline void store_int(int32_t* to, I x) { memcpy(to, &x, sizeof x); }

inline F load_bf16(const uint16_t* from) {
  const U wide{from[0], from[1], from[2], from[3]};
  return (F)(wide << 16);
}
inline void store_bf16(uint16_t* to, F x) {
  const U bits = (U)x;
  const U rounded = (bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16;
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint16_t>(rounded[i]);
}
inline void store_bf16_pair(uint16_t* to, F a, F b) {
  store_bf16(to, a);
  store_bf16(to + kWidth, b);
}
inline F load_int8(const int8_t* from) {
  const I wide{from[0], from[1], from[2], from[3]};
  return to_float(wide);
}
inline void store_int8(int8_t* to, F x, int8_t flip) {
  const I whole = to_whole(min(max(x, set(-128.0f)), set(127.0f)));
  for (int i = 0; i < 4; ++i) to[i] = static_cast<int8_t>(whole[i] ^ flip);
}
inline void store_int8_four(int8_t* to, F a, F b, F c, F d, int8_t flip) {
  store_int8(to, a, flip);
  store_int8(to + kWidth, b, flip);
  store_int8(to + 2 * kWidth, c, flip);
  store_int8(to + 3 * kWidth, d, flip);
}

typedef int16_t H __attribute__((vector_size(16)));
inline constexpr int kHalves = 8;
inline H no_magnitude() { return H{}; }
inline H max_magnitude(H most, const uint16_t* from) {
  H x;
  memcpy(&x, from, sizeof x);
  x &= 0x7fff;
  const H greater = x > most;
  return (x & greater) | (most & ~greater);
}
inline uint16_t largest_magnitude(H x) {
  int16_t most = x[0];
  for (int i = 1; i < kHalves; ++i) most = x[i] > most ? x[i] : most;
  return static_cast<uint16_t>(most);
}
inline void quantize_pieces(const uint16_t* a, const uint16_t* b, F by, F shift, int8_t flip, int8_t* to) {
  for (int i = 0; i < 32; i += kWidth) {
    store_int8(to + i, fma(load_bf16(a + i), by, shift), flip);
    store_int8(to + 32 + i, fma(load_bf16(b + i), by, shift), flip);
  }
}

inline void transpose_words(const char* from, size_t stride, char* to) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) memcpy(to + j * 64 + i * 4, from + i * stride + j * 4, 4);
  }
}

inline void interleave_halves(const uint16_t* a, const uint16_t* b, char* to) {
  for (int i = 0; i < 16; ++i) {
    memcpy(to + i * 4, a + i, 2);
    memcpy(to + i * 4 + 2, b + i, 2);
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
