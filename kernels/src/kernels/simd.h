// Vectors of float32 and int32, as wide as the instruction set has them: one set of names, three implementations.
//
// F and I hold kWidth elements. A row of any type is cut into pieces of 64 bytes, so every loop over a row runs
// over whole vectors. Rounding is to nearest even.
#pragma once

#include <cstddef>
#include <cstdint>

#if BERTRT_HAS_AVX512
#include "simd_avx512.h"
#elif BERTRT_HAS_AVX2
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace bertrt::BERTRT_ISA {
namespace {

// bfloat16: the upper half of a float32.
struct Bf16 {
  uint16_t bits;
};
static_assert(sizeof(Bf16) == 2);

// Elements of a type in a piece of 64 bytes.
template <class T>
constexpr int kPiece = 64 / static_cast<int>(sizeof(T));

inline F load_as_float(const float* from) { return load(from); }
inline F load_as_float(const Bf16* from) { return load_bf16(&from->bits); }
inline void store_float(float* to, F x) { store(to, x); }
inline void store_float(Bf16* to, F x) { store_bf16(&to->bits, x); }

// kPiece<T> numbers as one piece.
template <class T>
inline void store_piece(char* to, const F* x) {
  if constexpr (sizeof(T) == 2) {
#pragma GCC unroll 8
    for (int j = 0; j < kPiece<T> / kWidth; j += 2) {
      store_bf16_pair(reinterpret_cast<uint16_t*>(to) + j * kWidth, x[j], x[j + 1]);
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < kPiece<T> / kWidth; ++j) store(reinterpret_cast<float*>(to) + j * kWidth, x[j]);
  }
}

// 32 numbers, as one piece or two that lie `piece` bytes apart.
template <class T>
inline void store_32(char* to, size_t piece, const F* x) {
#pragma GCC unroll 2
  for (int p = 0; p < 32 / kPiece<T>; ++p) {
    store_piece<T>(to + static_cast<size_t>(p) * piece, x + p * (kPiece<T> / kWidth));
  }
}

inline constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace
}  // namespace bertrt::BERTRT_ISA
