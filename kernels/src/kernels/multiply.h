// Products of many rows with a matrix of weights, a block of 32 rows x 32 outputs at a time.
//
// For each block the sums go to a scratch of 4 KB, which an "epilogue" reads: it scales, adds the bias, activates and
// stores (epilogue.h). Panels are the outer loop, so that a panel of weights stays in the L1 cache while the rows pass by.
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
      tile_product<Product, true, true>(a.at(row0), a.at(row0 + 16), a.row, a.piece, panel, steps, init, false, c,
                                        c_stride, Nothing{});
    } else {
      tile_product<Product, false, true>(a.at(row0), nullptr, a.row, a.piece, panel, steps, init, false, c, c_stride,
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

// A stretch of blocks of rows with one panel.
struct Stretch {
  int panel;
  int64_t first, last;
};

// The blocks of a part (counted panel by panel), stretch by stretch. Panels are the outer loop, but where all the rows would not
// stay in the L2 cache while the panels pass by, they are taken in several turns.
class Stretches {
 public:
  Stretches(const Rows& a, int64_t blocks, Range part)
      : blocks_(blocks),
        first_panel_(part.begin / blocks),
        first_block_(part.begin % blocks),
        last_panel_((part.end - 1) / blocks),
        last_block_((part.end - 1) % blocks + 1),
        panel_(first_panel_) {
    const int64_t turns = (blocks * static_cast<int64_t>(2 * a.tile) + kRowsInL2 - 1) / kRowsInL2;
    turn_ = (blocks + turns - 1) / turns;
    if (part.begin >= part.end) start_ = blocks;
  }

  bool next(Stretch& stretch) {
    for (; start_ < blocks_; start_ += turn_, panel_ = first_panel_) {
      while (panel_ <= last_panel_) {
        const int64_t from = panel_ == first_panel_ ? first_block_ : 0, to = panel_ == last_panel_ ? last_block_ : blocks_;
        const int64_t end = start_ + turn_;
        stretch = {static_cast<int>(panel_++), from > start_ ? from : start_, to < end ? to : end};
        if (stretch.first < stretch.last) return true;
      }
    }
    return false;
  }

 private:
  // Bytes of activations: more than half of the 2 MB that processors with AMX have, so that panels of weights find room.
  static constexpr int64_t kRowsInL2 = 1280 * 1024;

  int64_t blocks_, first_panel_, first_block_, last_panel_, last_block_, panel_;
  int64_t turn_ = 1, start_ = 0;
};

// The matrix product a w^T for the blocks of `part`, counted panel by panel. `offset` is what has to be added to the
// stored bytes of a to get whole numbers of which the sums are taken (int8 only). During the last panel `then` is touched.
template <class Product, class Epilogue>
void multiply(const Rows& a, int64_t rows, const Matrix& w, int32_t offset, Range part, char* scratch,
              const Epilogue& out, Ahead& then) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const size_t panel_bytes = static_cast<size_t>(w.steps) * 2048;
  alignas(64) int32_t init_memory[32];
  Stretches stretches(a, blocks, part);
  Stretch now, next;
  bool more = stretches.next(next);
  while (more) {
    now = next;
    more = stretches.next(next);
    const char* b = static_cast<const char*>(w.panels) + static_cast<size_t>(now.panel) * panel_bytes;
    const int32_t* init = initial_sums(w, now.panel, offset, init_memory);
    // The next panel is touched while this one is worked on.
    const char* ahead_of = static_cast<const char*>(w.panels) + static_cast<size_t>(next.panel) * panel_bytes;
    const int64_t last_row = now.last * kBlockRows < rows ? now.last * kBlockRows : rows;
    const int64_t turns = (last_row - now.first * kBlockRows + Product::kRows - 1) / Product::kRows * kPasses;
    Ahead ahead{ahead_of, ahead_of + panel_bytes, static_cast<int>((32 + turns - 1) / turns)};
    if (!more) {
      const bool longer = static_cast<size_t>(then.end - then.next) > panel_bytes;
      ahead = {then.next, longer ? then.next + panel_bytes : then.end, ahead.lines};
      then.next = ahead.end;
    }
    for (int64_t block = now.first; block < now.last; ++block) {
      const int64_t row0 = block * kBlockRows;
      const int count = static_cast<int>(rows - row0 < kBlockRows ? rows - row0 : kBlockRows);
      product_block<Product>(a, row0, count, b, w.steps, init, scratch, kBlockStride, ahead);
      const typename Epilogue::Block finish(out, now.panel, row0);
      finish(0, count, scratch);
    }
  }
}

#if BERTRT_HAS_AMX
// A block whose sums wait for their epilogue.
template <class Epilogue>
struct Pending {
  typename Epilogue::Block block;
  const char* sums;
  int rows = 0;  // 0: none
};

// Work for the vector units that is done among tile operations: the epilogue of an earlier block, and touching the lines
// of the next panel, so that they wait in the L2 cache.
template <class Epilogue>
class Meanwhile {
 public:
  // Rows begin .. end of an epilogue, spread over the steps; `lines` lines from `ahead` on in each step.
  inline Meanwhile(const Pending<Epilogue>& pending, int begin, int end, int steps, const char* ahead, int lines)
      : pending_(pending), done_(begin), end_(end), ahead_(ahead), lines_(lines) {
    // Not in the first of several steps, in which the sums may still be on their way to memory.
    const int lag = steps > 1 ? 1 : 0;
    each_ = (((end - begin) << 16) + steps - lag - 1) / (steps - lag);
    due_ = (begin << 16) + (lag == 0 ? each_ : 0);
  }

  inline __attribute__((always_inline)) void operator()() {
    for (int i = 0; i < lines_; ++i, ahead_ += 64) _mm_prefetch(ahead_, _MM_HINT_T1);
    const int due = due_ >> 16 < end_ ? due_ >> 16 : end_;
    due_ += each_;
    if (done_ < due) {
      pending_.block(done_, due, pending_.sums);
      done_ = due;
    }
  }

 private:
  const Pending<Epilogue>& pending_;
  int done_, end_;
  int due_, each_;  // rows that shall be done after a step, and how many more after the next, in 65536ths
  const char* ahead_;
  int lines_;
};

template <class Product, class Epilogue>
class TileMultiply {
 public:
  TileMultiply(const Rows& a, int64_t rows, const Matrix& w, int32_t offset, char* scratch, const Epilogue& out,
               Ahead& then)
      : a_(a),
        rows_(rows),
        w_(w),
        offset_(offset),
        scratch_(scratch),
        out_(out),
        then_(then),
        panel_bytes_(static_cast<size_t>(w.steps) * 2048),
        parts_((w.steps + Product::kBlockSteps - 1) / Product::kBlockSteps) {}

  void run(Range part) {
    Stretches stretches(a_, (rows_ + kBlockRows - 1) / kBlockRows, part);
    Stretch now, next;
    bool more = stretches.next(next);
    while (more) {
      now = next;
      more = stretches.next(next);
      const char* b = panel(now.panel);
      const int32_t* init = initial_sums(w_, now.panel, offset_, init_memory_);
      // Lines of the next panel spread over this panel's steps.
      const int64_t turns = (now.last - now.first) * w_.steps;
      lines_ = static_cast<int>((static_cast<int64_t>(w_.steps) * 32 + turns - 1) / turns);
      if (more) {
        ahead_ = panel(next.panel);
      } else {
        ahead_ = then_.next;
        if (then_.end - then_.next < turns * lines_ * 64) lines_ = 0;
        then_.next += turns * lines_ * 64;
      }
      // Sums of a panel that is used once need not leave the registers.
      const bool whole = parts_ == 1 || now.last - now.first == 1;
      if (whole != whole_) finish();
      whole_ = whole;
      if (whole) {
        in_one(now, b, init);
      } else {
        in_parts(now, b, init);
      }
    }
    finish();
  }

 private:
  const char* panel(int number) const {
    return static_cast<const char*>(w_.panels) + static_cast<size_t>(number) * panel_bytes_;
  }
  int rows_of(int64_t block) const {
    const int64_t left = rows_ - block * kBlockRows;
    return static_cast<int>(left < kBlockRows ? left : kBlockRows);
  }

  // Sums of a block in part `part` of `parts`; those before are in c already. Meanwhile the same part of an epilogue.
  inline __attribute__((always_inline)) void multiply_block(int64_t block, const char* b, int part, int parts,
                                                            const int32_t* init, char* c,
                                                            const Pending<Epilogue>& pending) {
    const int64_t row0 = block * kBlockRows;
    const int first = part * w_.steps / parts, steps = (part + 1) * w_.steps / parts - first;
    const size_t skip = static_cast<size_t>(first) * a_.piece;
    const char* tiles = b + static_cast<size_t>(first) * 2048;
    Meanwhile<Epilogue> meanwhile(pending, pending.rows * part / parts, pending.rows * (part + 1) / parts, steps,
                                  ahead_, lines_);
    const char* rows = a_.at(row0) + skip;
    if (rows_of(block) > 16) {
      tile_product<Product, true, kRowsReused>(rows, a_.at(row0 + 16) + skip, a_.row, a_.piece, tiles, steps, init,
                                               part != 0, c, kBlockStride, meanwhile);
    } else {
      tile_product<Product, false, kRowsReused>(rows, nullptr, a_.row, a_.piece, tiles, steps, init, part != 0, c,
                                                kBlockStride, meanwhile);
    }
    ahead_ += static_cast<size_t>(steps) * lines_ * 64;
  }

  // Two blocks of scratch in turn: the epilogue of one runs while the other is computed.
  void in_one(const Stretch& now, const char* b, const int32_t* init) {
    for (int64_t block = now.first; block < now.last; ++block) {
      char* c = scratch_ + (half_ ? kBlockBytes : 0);
      multiply_block(block, b, 0, 1, init, c, pending_[0]);
      put(0, now.panel, block, c);
      half_ = !half_;
    }
  }

  // A long row: the panel's parts one after the other, the sums of a group of blocks waiting in memory. The epilogues of the
  // group before are spread over all parts.
  void in_parts(const Stretch& now, const char* b, const int32_t* init) {
    for (int64_t group = now.first; group < now.last; group += kGroup) {
      const int count = static_cast<int>(now.last - group < kGroup ? now.last - group : kGroup);
      char* c = scratch_ + (half_ ? kGroup * kBlockBytes : 0);
      for (int part = 0; part < parts_; ++part) {
        for (int i = 0; i < count; ++i) {
          multiply_block(group + i, b, part, parts_, init, c + static_cast<size_t>(i) * kBlockBytes, pending_[i]);
        }
      }
      for (int i = count; i < kGroup; ++i) finish(i);
      for (int i = 0; i < count; ++i) put(i, now.panel, group + i, c + static_cast<size_t>(i) * kBlockBytes);
      half_ = !half_;
    }
  }

  void put(int place, int panel_number, int64_t block, const char* sums) {
    pending_[place].block = typename Epilogue::Block(out_, panel_number, block * kBlockRows);
    pending_[place].sums = sums;
    pending_[place].rows = rows_of(block);
  }
  void finish(int place) {
    if (pending_[place].rows != 0) pending_[place].block(0, pending_[place].rows, pending_[place].sums);
    pending_[place].rows = 0;
  }
  void finish() {
    for (int i = 0; i < kGroup; ++i) finish(i);
  }

  static constexpr int kGroup = kGroupBlocks / 2;
  // The panel of weights shall have the L1 cache to itself.
  static constexpr bool kRowsReused = false;

  const Rows a_;
  const int64_t rows_;
  const Matrix& w_;
  const int32_t offset_;
  char* const scratch_;
  const Epilogue& out_;
  Ahead& then_;
  const size_t panel_bytes_;
  const int parts_;
  alignas(64) int32_t init_memory_[32];
  Pending<Epilogue> pending_[kGroup];
  const char* ahead_ = nullptr;
  int lines_ = 0;
  bool half_ = false, whole_ = true;
};
#endif

// Some panels of a matrix, of which members of a group take equal shares of all blocks of rows.
struct Panels {
  int first, count;
  int size, rank;

  inline Range part(int64_t blocks) const {
    const Range mine = share(blocks * count, size, rank);
    return {mine.begin + first * blocks, mine.end + first * blocks};
  }
  // The weights of a member's share, from its first panel to its last.
  inline Ahead ahead(const Matrix& w, int64_t rows) const {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    const Range mine = part(blocks);
    const char* panels = static_cast<const char*>(w.panels);
    const int64_t bytes = static_cast<int64_t>(w.steps) * 2048;
    if (mine.begin >= mine.end) return {panels, panels, 0};
    return {panels + mine.begin / blocks * bytes, panels + ((mine.end - 1) / blocks + 1) * bytes, 0};
  }
};

// `multiply` in the way that suits the product.
template <class Product, class Epilogue>
inline void multiply_part(const Rows& a, int64_t rows, const Matrix& w, int32_t offset, const Panels& panels,
                          void* scratch, const Epilogue& out, Ahead& then) {
  const Range part = panels.part((rows + kBlockRows - 1) / kBlockRows);
#if BERTRT_HAS_AMX
  if constexpr (kOnTiles<Product>) {
    TileMultiply<Product, Epilogue>(a, rows, w, offset, static_cast<char*>(scratch), out, then).run(part);
    return;
  } else
#endif
  {
    multiply<Product>(a, rows, w, offset, part, static_cast<char*>(scratch), out, then);
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
