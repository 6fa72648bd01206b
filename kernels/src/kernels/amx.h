// Products on AMX: 2 x 2 tiles of sums, so that each tile that is loaded is used twice.
//
// Tiles 0, 1: rows 0-15 and 16-31 of a; 2, 3: outputs 0-15 and 16-31 of b; 4-7: the sums. All are 16 rows x 64 bytes, so
// one configuration serves the whole run; rows beyond the last are computed and not used, and memory for
// them is allocated.
#pragma once

#include <immintrin.h>

#include "simd.h"
#include "tiled.h"

namespace bertrt::BERTRT_ISA {
namespace {

// In static memory: GCC 12 tells the optimiser that the instruction reads 8 bytes only, and stores of the rest would go.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// Activations are signed bytes.
struct TilesInt8 {
  static constexpr int8_t kFlip = 0;
  // Steps of the inner loop after which sums go to memory: the panel's part, 24 to 32 KB, stays in the L1 cache.
  static constexpr int kBlockSteps = 16;
  static inline void multiply4() {
    _tile_dpbssd(4, 0, 2);
    _tile_dpbssd(5, 0, 3);
    _tile_dpbssd(6, 1, 2);
    _tile_dpbssd(7, 1, 3);
  }
  static inline void multiply2() {
    _tile_dpbssd(4, 0, 2);
    _tile_dpbssd(5, 0, 3);
  }
};

struct TilesBf16 {
  static constexpr int kBlockSteps = 12;
  static inline void multiply4() {
    _tile_dpbf16ps(4, 0, 2);
    _tile_dpbf16ps(5, 0, 3);
    _tile_dpbf16ps(6, 1, 2);
    _tile_dpbf16ps(7, 1, 3);
  }
  static inline void multiply2() {
    _tile_dpbf16ps(4, 0, 2);
    _tile_dpbf16ps(5, 0, 3);
  }
};

// What a product does besides: nothing.
struct Nothing {
  inline void operator()() const {}
};

// Sums of 32 rows (16 if not kBoth) and 32 outputs. `init`: 32 int32 for each row to start from, or null; `resume`: start
// from c instead. `between()` is called in each step, among the tile operations, so that vector work overlaps them.
// kReused: a is read again soon, and shall come into the L1 cache.
template <class Tiles, bool kBoth, bool kReused, class Between>
inline __attribute__((always_inline)) void tile_product(const char* a0, const char* a1, size_t a_row, size_t a_piece,
                                                        const char* b, int steps, const int32_t* init, bool resume,
                                                        char* c, size_t c_stride, Between&& between) {
  // GCC 12 does not know that loads of tiles read memory: what they read is stored before here.
  __asm__ volatile("" : : : "memory");
  if (resume) {
    _tile_loadd(4, c, c_stride);
    _tile_loadd(5, c + 64, c_stride);
    if constexpr (kBoth) {
      _tile_loadd(6, c + 16 * c_stride, c_stride);
      _tile_loadd(7, c + 16 * c_stride + 64, c_stride);
    }
  } else if (init != nullptr) {
    // A stride of zero repeats the row.
    _tile_loadd(4, init, 0);
    _tile_loadd(5, init + 16, 0);
    if constexpr (kBoth) {
      _tile_loadd(6, init, 0);
      _tile_loadd(7, init + 16, 0);
    }
  } else {
    _tile_zero(4);
    _tile_zero(5);
    if constexpr (kBoth) {
      _tile_zero(6);
      _tile_zero(7);
    }
  }
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(2, b, 64);
    if constexpr (kReused) {
      _tile_loadd(0, a0, a_row);
    } else {
      _tile_stream_loadd(0, a0, a_row);
    }
    _tile_loadd(3, b + 1024, 64);
    if constexpr (kBoth) {
      if constexpr (kReused) {
        _tile_loadd(1, a1, a_row);
      } else {
        _tile_stream_loadd(1, a1, a_row);
      }
      Tiles::multiply4();
      a1 += a_piece;
    } else {
      Tiles::multiply2();
    }
    between();
    a0 += a_piece;
    b += 2048;
  }
  _tile_stored(4, c, c_stride);
  _tile_stored(5, c + 64, c_stride);
  if constexpr (kBoth) {
    _tile_stored(6, c + 16 * c_stride, c_stride);
    _tile_stored(7, c + 16 * c_stride + 64, c_stride);
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
