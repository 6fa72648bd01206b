// What becomes of the sums of a product.
//
// An epilogue has a `Block`: what the rows of one block of sums have in common, loaded once. It is called with a range of the
// block's rows, which may come in several portions, among the tile operations of the next block.
#pragma once

#include "math.h"
#include "multiply.h"

namespace bertrt::BERTRT_ISA {
namespace {

// Which function follows the bias.
enum class After { kNothing, kGelu, kGeluNew, kRelu, kTanh };

template <After kAfter, Next kNext>
inline F after(F x) {
  if constexpr (kAfter == After::kGelu) return activate<Activation::kGelu, kNext>(x);
  if constexpr (kAfter == After::kGeluNew) return activate<Activation::kGeluNew, kNext>(x);
  if constexpr (kAfter == After::kRelu) return activate<Activation::kRelu, kNext>(x);
  if constexpr (kAfter == After::kTanh) return tanh(x);
  return x;
}

// int8: sum * row_scale[row] * scale[output]; then + bias[output].
struct Scaling {
  const float* row_scale;  // null: sums are float32 already
  const float* scale;
  const float* bias;       // null: none
};

template <bool kInt8, After kAfter, Next kNext>
struct Finish {
  const float* row_scale;  // of the block's first row
  F scale[32 / kWidth];
  F bias[32 / kWidth];

  Finish() = default;
  inline Finish(const Scaling& by, int panel, int64_t row0) : row_scale(kInt8 ? by.row_scale + row0 : nullptr) {
#pragma GCC unroll 8
    for (int j = 0; j < 32 / kWidth; ++j) {
      if constexpr (kInt8) scale[j] = load(by.scale + panel * 32 + j * kWidth);
      bias[j] = by.bias == nullptr ? zero() : load(by.bias + panel * 32 + j * kWidth);
    }
  }
  // Outputs j * kWidth and on of a row of the block whose sums begin at c.
  inline F operator()(const char* c, int row, int j) const {
    if constexpr (kInt8) {
      const F sums = to_float(load_int(reinterpret_cast<const int32_t*>(c) + j * kWidth));
      return after<kAfter, kNext>(fma(mul(sums, set(row_scale[row])), scale[j], bias[j]));
    } else {
      return after<kAfter, kNext>(add(load(reinterpret_cast<const float*>(c) + j * kWidth), bias[j]));
    }
  }
};

// Stores whole panels, padding included, in rows of pieces.
template <class Out, bool kInt8, After kAfter, Next kNext>
struct StorePieces {
  Rows to;
  Scaling by;
  int first_panel = 0;  // of `to`

  class Block {
   public:
    Block() = default;
    // row0 is a multiple of 32.
    inline Block(const StorePieces& out, int panel, int64_t row0)
        : finish_(out.by, panel, row0),
          base_(out.to.at(row0) + static_cast<size_t>(panel - out.first_panel) * (32 / kPiece<Out>)*out.to.piece),
          row_(out.to.row),
          jump_(out.to.tile - 16 * out.to.row),
          piece_(out.to.piece) {}

    inline __attribute__((always_inline)) void operator()(int begin, int end, const char* sums) const {
      const char* c = sums + static_cast<size_t>(begin) * kBlockStride;
      char* row = base_ + static_cast<size_t>(begin) * row_ + (begin >= 16 ? jump_ : 0);
      for (int r = begin; r < end; row += jump_) {
        // The second tile need not follow the first.
        const int stop = r < 16 && end > 16 ? 16 : end;
        for (; r < stop; ++r, row += row_, c += kBlockStride) {
          F x[32 / kWidth];
#pragma GCC unroll 8
          for (int j = 0; j < 32 / kWidth; ++j) x[j] = finish_(c, r, j);
          store_32<Out>(row, piece_, x);
        }
      }
    }

   private:
    Finish<kInt8, kAfter, kNext> finish_;
    char* base_;
    size_t row_, jump_, piece_;
  };
};

// Stores float32 in rows of exactly `outputs` elements.
template <bool kInt8, After kAfter>
struct StoreExactly {
  float* to;
  int64_t stride;
  int outputs;
  Scaling by;

  class Block {
   public:
    Block() = default;
    inline Block(const StoreExactly& out, int panel, int64_t row0)
        : finish_(out.by, panel, row0),
          base_(out.to + row0 * out.stride + panel * 32),
          stride_(out.stride),
          left_(out.outputs - panel * 32) {}

    inline void operator()(int begin, int end, const char* sums) const {
      for (int r = begin; r < end; ++r) {
        for (int j = 0; j < 32 / kWidth; ++j) {
          const int left = left_ - j * kWidth;
          if (left <= 0) break;
          store_first(base_ + r * stride_ + j * kWidth, finish_(sums + static_cast<size_t>(r) * kBlockStride, r, j), left);
        }
      }
    }

   private:
    Finish<kInt8, kAfter, Next::kFloat32> finish_;
    float* base_;
    int64_t stride_;
    int left_;
  };
};

}  // namespace
}  // namespace bertrt::BERTRT_ISA
