// Products of up to 32 rows with one panel of 32 outputs: c[r][n] = init[n] + sum over k of a[r][k] b[n][k].
//
// a: rows cut into pieces of 64 bytes; b: [steps][2][16][64 bytes], see Matrix. c: 32 int32 or float32 a row.
// The sum of an output takes its terms in the same order whatever the number of rows, so results do not depend on it.
// c may not overlap a or b.
//
// A "dot" says how 4 bytes of a (the same for all outputs) and 4 bytes of b for each output add to the sums.
#pragma once

#include "simd.h"
#include "tiled.h"

#if BERTRT_HAS_AVX512
#include "dot_avx512.h"
#elif BERTRT_HAS_AVX2
#include "dot_avx2.h"
#else
#include "dot_portable.h"
#endif

namespace bertrt::BERTRT_ISA {
namespace {

// Vectors of sums that one row keeps in registers at a time.
inline constexpr int kColumns = kWidth == 16 ? 2 : (kWidth == 8 ? 2 : 4);
inline constexpr int kPasses = 32 / (kColumns * kWidth);

// Rows that are computed together: as many as the registers hold.
template <class Dot>
inline constexpr int kRowsTogether = Dot::kRows;

// Memory that will be read next, touched a few lines at each step, so that it waits in the L2 cache.
struct Ahead {
  const char* next;
  const char* end;
  int lines;  // of 64 bytes in each step

  inline void touch() { touch(lines); }
  inline void touch(int count) {
    for (int i = 0; i < count && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

template <class Dot, int kRows>
inline __attribute__((always_inline)) void product_rows(const char* a, size_t a_row, size_t a_piece, const char* b,
                                                        int steps, const int32_t* init, char* c, size_t c_stride,
                                                        Ahead& ahead) {
  using Sum = typename Dot::Sum;
  Sum sums[kRows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) sums[r][j] = Dot::start(init == nullptr ? nullptr : init + j * kWidth);
  }
  for (int step = 0; step < steps; ++step) {
    ahead.touch();
    for (int k = 0; k < 16; ++k) {
      typename Dot::Weights weights[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        // 64 bytes of b serve 16 outputs; the panel's other 16 lie a tile further on.
        const int byte = j * kWidth * 4;
        weights[j] = Dot::weights(b + (byte / 64) * 1024 + k * 64 + byte % 64);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto x = Dot::broadcast(a + r * a_row + k * 4);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) sums[r][j] = Dot::add(sums[r][j], x, weights[j]);
      }
    }
    a += a_piece;
    b += 2048;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) Dot::store(c + r * c_stride + j * kWidth * 4, sums[r][j]);
  }
}

template <class Dot, int kRows>
__attribute__((noinline)) void product_group(const char* a, size_t a_row, size_t a_piece, const char* b, int steps,
                                             const int32_t* init, char* c, size_t c_stride, Ahead& ahead) {
  for (int pass = 0; pass < kPasses; ++pass) {
    const int byte = pass * kColumns * kWidth * 4;
    product_rows<Dot, kRows>(a, a_row, a_piece, b + (byte / 64) * 1024 + byte % 64, steps,
                             init == nullptr ? nullptr : init + byte / 4, c + byte, c_stride, ahead);
  }
}

// `rows` from 1 to 16, all of one tile.
template <class Dot>
inline void product_tile(const char* a, size_t a_row, size_t a_piece, int rows, const char* b, int steps,
                         const int32_t* init, char* c, size_t c_stride, Ahead& ahead) {
  constexpr int kMost = kRowsTogether<Dot>;
  while (rows >= kMost) {
    product_group<Dot, kMost>(a, a_row, a_piece, b, steps, init, c, c_stride, ahead);
    a += kMost * a_row;
    c += kMost * c_stride;
    rows -= kMost;
  }
  if constexpr (kMost > 4) {
    if (rows >= 4) {
      product_group<Dot, 4>(a, a_row, a_piece, b, steps, init, c, c_stride, ahead);
      a += 4 * a_row;
      c += 4 * c_stride;
      rows -= 4;
    }
  }
  for (; rows > 0; --rows) {
    product_group<Dot, 1>(a, a_row, a_piece, b, steps, init, c, c_stride, ahead);
    a += a_row;
    c += c_stride;
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
