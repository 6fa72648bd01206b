// The most multiply-adds that a core does: products on registers, next to nothing loaded.
#pragma once

#include "multiply.h"

namespace bertrt::BERTRT_ISA {
namespace {

// Enough sums in registers to hide the latency of every instruction used here.
inline constexpr int kPeakSums = kWidth == 4 ? 4 : kWidth == 8 ? 8 : 12;

template <class Dot>
__attribute__((noinline)) int64_t peak_of(int64_t rounds, int per_word) {
  alignas(64) char a[64] = {1, 2, 3, 4}, b[64] = {1, 1, 1, 1}, out[64];
  typename Dot::Sum sums[kPeakSums];
#pragma GCC unroll 12
  for (int i = 0; i < kPeakSums; ++i) sums[i] = Dot::start(nullptr);
  const auto w = Dot::weights(b);
  // Each sum has operands of its own, of which the compiler does not know that they are equal: it would compute equal sums
  // once.
  __asm__ volatile("" : : "r"(a) : "memory");
  decltype(Dot::broadcast(a)) operands[kPeakSums];
#pragma GCC unroll 12
  for (int i = 0; i < kPeakSums; ++i) operands[i] = Dot::broadcast(a + 4 * i);
  for (int64_t round = 0; round < rounds; ++round) {
    // Where there are registers for all. Elsewhere they are loaded each time: where a dot takes several instructions, the
    // compiler would multiply once and only add.
    if constexpr (kWidth != 16) {
      __asm__ volatile("" : : "r"(a) : "memory");
#pragma GCC unroll 12
      for (int i = 0; i < kPeakSums; ++i) operands[i] = Dot::broadcast(a + 4 * i);
    }
#pragma GCC unroll 12
    for (int i = 0; i < kPeakSums; ++i) sums[i] = Dot::add(sums[i], operands[i], w);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kPeakSums; ++i) {
    Dot::store(out, sums[i]);
    __asm__ volatile("" : : "r"(out) : "memory");
  }
  return rounds * kPeakSums * kWidth * per_word;
}

#if BERTRT_HAS_AMX
template <class Tiles>
__attribute__((noinline)) int64_t peak_of_tiles(int64_t rounds, int per_word) {
  for (int64_t round = 0; round < rounds; ++round) Tiles::multiply4();
  return rounds * 4 * 16 * 16 * 16 * per_word;
}
int64_t peak_int8(int64_t rounds) { return peak_of_tiles<TilesInt8>(rounds, 4); }
int64_t peak_float(int64_t rounds) { return peak_of_tiles<TilesBf16>(rounds, 2); }
#else
int64_t peak_int8(int64_t rounds) { return peak_of<DotInt8>(rounds, 4); }
int64_t peak_float(int64_t rounds) {
#if BERTRT_HAS_BF16
  return peak_of<DotBf16>(rounds, 2);
#else
  return peak_of<DotFloat>(rounds, 1);
#endif
}
#endif

}  // namespace
}  // namespace bertrt::BERTRT_ISA
