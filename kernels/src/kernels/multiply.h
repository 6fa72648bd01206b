// Products of many rows with a matrix of weights, a block of 32 rows x 32 outputs at a time.
//
// For each block the sums go to a scratch of 4 KB, which an "epilogue" reads: it scales, adds the bias, activates and
// stores. Panels are the outer loop, so that a panel of weights stays in the L1 cache while the rows pass by.
#pragma once

#include "../table.h"
#include "product.h"
#if BERTRT_HAS_AMX
#include "amx.h"
#endif

namespace bertrt::BERTRT_ISA {
namespace {

inline constexpr int kBlockRows = 32;
inline constexpr size_t kBlockStride = 128;                       // bytes of a row of sums
inline constexpr size_t kBlockBytes = kBlockRows * kBlockStride;  // 4 KB

// How each type of weights is multiplied by this instruction set.
#if BERTRT_HAS_AMX
using Int8Product = TilesInt8;
using Bf16Product = TilesBf16;
#else
using Int8Product = DotInt8;
using Bf16Product = DotBf16;
#endif
using FloatProduct = DotFloat;

// Bytes of int8 activations are stored xored with this.
inline constexpr int8_t kFlip = Int8Product::kFlip;

template <class Product>
inline constexpr bool kOnTiles = false;
#if BERTRT_HAS_AMX
template <>
inline constexpr bool kOnTiles<TilesInt8> = true;
template <>
inline constexpr bool kOnTiles<TilesBf16> = true;
#endif

// One block: rows row0 .. row0 + rows (at most 32, row0 a multiple of 16) with one panel.
template <class Product>
inline void product_block(const Rows& a, int64_t row0, int rows, const char* panel, int steps, const int32_t* init,
                          char* c, size_t c_stride, Ahead& ahead) {
#if BERTRT_HAS_AMX
  if constexpr (kOnTiles<Product>) {
    if (rows > 16) {
      tile_product<Product, true>(a.at(row0), a.at(row0 + 16), a.row, a.piece, panel, steps, init, false, c, c_stride,
                                  Nothing{});
    } else {
      tile_product<Product, false>(a.at(row0), nullptr, a.row, a.piece, panel, steps, init, false, c, c_stride,
                                   Nothing{});
    }
    return;
  } else
#endif
  {
    product_tile<Product>(a.at(row0), a.row, a.piece, rows < 16 ? rows : 16, panel, steps, init, c, c_stride,
                          ahead);
    if (rows > 16) {
      product_tile<Product>(a.at(row0 + 16), a.row, a.piece, rows - 16, panel, steps, init, c + 16 * c_stride,
                            c_stride, ahead);
    }
  }
}

// init[n] = offset * sums[n], for the 32 outputs of a panel.
inline const int32_t* initial_sums(const Matrix& w, int panel, int32_t offset, int32_t* memory) {
  if (w.sums == nullptr || offset == 0) return nullptr;
  for (int n = 0; n < 32; n += kWidth) store_int(memory + n, mul_int(load_int(w.sums + panel * 32 + n), offset));
  return memory;
}

// The matrix product a w^T for the blocks of `part`, counted panel by panel. `offset` is what has to be added to the
// stored bytes of a to get whole numbers of which the sums are taken (int8 only). The epilogue is called as
// out(panel, row0, begin, end, sums) for rows row0 + begin .. row0 + end.
template <class Product, class Epilogue>
void multiply(const Rows& a, int64_t rows, const Matrix& w, int32_t offset, Range part, char* scratch,
              const Epilogue& out) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const size_t panel_bytes = static_cast<size_t>(w.steps) * 2048;
  alignas(64) int32_t init_memory[32];
  for (int64_t at = part.begin; at < part.end;) {
    const int panel = static_cast<int>(at / blocks);
    const int64_t first = at % blocks;
    const int64_t last = first + (part.end - at) < blocks ? first + (part.end - at) : blocks;
    const char* b = static_cast<const char*>(w.panels) + static_cast<size_t>(panel) * panel_bytes;
    const int32_t* init = initial_sums(w, panel, offset, init_memory);
    // The next panel is touched while this one is worked on.
    const bool more = at + (last - first) < part.end;
    const int64_t first_row = first * kBlockRows, last_row = last * kBlockRows < rows ? last * kBlockRows : rows;
    const int64_t turns = (last_row - first_row + Product::kRows - 1) / Product::kRows * kPasses;
    Ahead ahead{b + panel_bytes, b + panel_bytes * (more ? 2 : 1), static_cast<int>((32 + turns - 1) / turns)};
    for (int64_t block = first; block < last; ++block) {
      const int64_t row0 = block * kBlockRows;
      const int count = static_cast<int>(rows - row0 < kBlockRows ? rows - row0 : kBlockRows);
      product_block<Product>(a, row0, count, b, w.steps, init, scratch, kBlockStride, ahead);
      out(panel, row0, 0, count, scratch);
    }
    at += last - first;
  }
}

#if BERTRT_HAS_AMX
// Work for the vector units that is done among tile operations: the epilogue of the block before, and touching the
// lines of the next panel, so that they wait in the L2 cache.
template <class Epilogue>
struct Meanwhile {
  const Epilogue& out;
  int panel;
  int64_t row0;
  int rows;          // 0: nothing is pending
  int steps;
  const char* sums;
  const char* ahead; // null: no next panel
  int lines;         // of it to touch in each step

  inline __attribute__((always_inline)) void operator()(int step) const {
    if (ahead != nullptr) {
      for (int i = 0; i < lines; ++i) _mm_prefetch(ahead + (static_cast<size_t>(step) * lines + i) * 64, _MM_HINT_T1);
    }
    if (rows != 0) {
      const int begin = rows * step / steps, end = rows * (step + 1) / steps;
      if (begin < end) out(panel, row0, begin, end, sums);
    }
  }
};

template <class Product, class Epilogue>
void multiply_tiles(const Rows& a, int64_t rows, const Matrix& w, int32_t offset, Range part, char* scratch,
                    const Epilogue& out) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const size_t panel_bytes = static_cast<size_t>(w.steps) * 2048;
  const int parts = (w.steps + Product::kBlockSteps - 1) / Product::kBlockSteps;
  alignas(64) int32_t init_memory[32];
  Meanwhile<Epilogue> meanwhile{out, 0, 0, 0, 1, nullptr, nullptr, 0};
  int current = 0;
  for (int64_t at = part.begin; at < part.end;) {
    const int panel = static_cast<int>(at / blocks);
    const int64_t first = at % blocks;
    const int64_t last = first + (part.end - at) < blocks ? first + (part.end - at) : blocks;
    const char* b = static_cast<const char*>(w.panels) + static_cast<size_t>(panel) * panel_bytes;
    const int32_t* init = initial_sums(w, panel, offset, init_memory);
    const bool more = at + (last - first) < part.end;
    // Lines of the next panel spread over this panel's steps.
    const int64_t turns = (last - first) * w.steps;
    meanwhile.lines = static_cast<int>((static_cast<int64_t>(w.steps) * 32 + turns - 1) / turns);
    // A panel that is used once need not stay in the cache.
    if (parts == 1 || last - first == 1) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t row0 = block * kBlockRows;
        const int count = static_cast<int>(rows - row0 < kBlockRows ? rows - row0 : kBlockRows);
        char* c = scratch + current * kBlockBytes;
        meanwhile.steps = w.steps;
        meanwhile.ahead =
            more ? b + panel_bytes + static_cast<size_t>(block - first) * w.steps * meanwhile.lines * 64 : nullptr;
        if (count > 16) {
          tile_product<Product, true>(a.at(row0), a.at(row0 + 16), a.row, a.piece, b, w.steps, init, false, c,
                                      kBlockStride, meanwhile);
        } else {
          tile_product<Product, false>(a.at(row0), nullptr, a.row, a.piece, b, w.steps, init, false, c, kBlockStride,
                                       meanwhile);
        }
        meanwhile.panel = panel;
        meanwhile.row0 = row0;
        meanwhile.rows = count;
        meanwhile.sums = c;
        current ^= 1;
      }
    } else {
      // A long row: the panel's parts one after the other, the sums of up to kGroupBlocks blocks waiting in memory.
      if (meanwhile.rows != 0) out(meanwhile.panel, meanwhile.row0, 0, meanwhile.rows, meanwhile.sums);
      meanwhile.rows = 0;
      for (int64_t group = first; group < last; group += kGroupBlocks) {
        const int64_t group_end = group + kGroupBlocks < last ? group + kGroupBlocks : last;
        for (int piece = 0; piece < parts; ++piece) {
          const int begin = piece * w.steps / parts, end = (piece + 1) * w.steps / parts;
          for (int64_t block = group; block < group_end; ++block) {
            const int64_t row0 = block * kBlockRows;
            const int count = static_cast<int>(rows - row0 < kBlockRows ? rows - row0 : kBlockRows);
            char* c = scratch + static_cast<size_t>(block - group) * kBlockBytes;
            const char* tile = b + static_cast<size_t>(begin) * 2048;
            const size_t skip = static_cast<size_t>(begin) * a.piece;
            meanwhile.steps = end - begin;
            const size_t done = static_cast<size_t>((block - first) * w.steps + begin);
            meanwhile.ahead = more ? b + panel_bytes + done * meanwhile.lines * 64 : nullptr;
            // In the last part the epilogue of the block before runs among this block's tile operations.
            if (count > 16) {
              tile_product<Product, true>(a.at(row0) + skip, a.at(row0 + 16) + skip, a.row, a.piece, tile, end - begin,
                                          init, piece != 0, c, kBlockStride, meanwhile);
            } else {
              tile_product<Product, false>(a.at(row0) + skip, nullptr, a.row, a.piece, tile, end - begin, init,
                                           piece != 0, c, kBlockStride, meanwhile);
            }
            if (piece == parts - 1) {
              meanwhile.panel = panel;
              meanwhile.row0 = row0;
              meanwhile.rows = count;
              meanwhile.sums = c;
            }
          }
        }
        // The next group's sums go to the same memory.
        out(meanwhile.panel, meanwhile.row0, 0, meanwhile.rows, meanwhile.sums);
        meanwhile.rows = 0;
      }
    }
    at += last - first;
  }
  if (meanwhile.rows != 0) out(meanwhile.panel, meanwhile.row0, 0, meanwhile.rows, meanwhile.sums);
}
#endif

// `multiply` in the way that suits the product; members of a group take equal shares of all blocks.
template <class Product, class Epilogue>
inline void multiply_part(const Rows& a, int64_t rows, const Matrix& w, int32_t offset, int first_panel, int panels,
                          int size, int rank, void* scratch, const Epilogue& out) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  Range part = share(blocks * panels, size, rank);
  part.begin += first_panel * blocks;
  part.end += first_panel * blocks;
#if BERTRT_HAS_AMX
  if constexpr (kOnTiles<Product>) {
    multiply_tiles<Product>(a, rows, w, offset, part, static_cast<char*>(scratch), out);
    return;
  } else
#endif
  {
    multiply<Product>(a, rows, w, offset, part, static_cast<char*>(scratch), out);
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
