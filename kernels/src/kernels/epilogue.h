// What becomes of the sums of a product.
#pragma once

#include "math.h"
#include "multiply.h"

namespace bertrt::BERTRT_ISA {
namespace {

// Which function follows the bias.
enum class After { kNothing, kGelu, kGeluNew, kRelu, kTanh };

template <After kAfter, bool kExact>
inline F after(F x) {
  if constexpr (kAfter == After::kGelu) return activate<Activation::kGelu, kExact>(x);
  if constexpr (kAfter == After::kGeluNew) return activate<Activation::kGeluNew, kExact>(x);
  if constexpr (kAfter == After::kRelu) return activate<Activation::kRelu, kExact>(x);
  if constexpr (kAfter == After::kTanh) return tanh(x);
  return x;
}

// int8: sum * row_scale[row] * scale[output]; then + bias[output].
struct Scaling {
  const float* row_scale;  // null: sums are float32 already
  const float* scale;
  const float* bias;       // null: none
};

template <bool kInt8, After kAfter, bool kExact>
struct Finish {
  Scaling by;
  F scale[32 / kWidth];
  F bias[32 / kWidth];

  inline Finish(const Scaling& scaling, int panel) : by(scaling) {
#pragma GCC unroll 8
    for (int j = 0; j < 32 / kWidth; ++j) {
      if constexpr (kInt8) scale[j] = load(by.scale + panel * 32 + j * kWidth);
      bias[j] = by.bias == nullptr ? zero() : load(by.bias + panel * 32 + j * kWidth);
    }
  }
  // Outputs j * kWidth and on of a row whose sums begin at c.
  inline F operator()(const char* c, int64_t row, int j) const {
    if constexpr (kInt8) {
      const F sums = to_float(load_int(reinterpret_cast<const int32_t*>(c) + j * kWidth));
      return after<kAfter, kExact>(fma(mul(sums, set(by.row_scale[row])), scale[j], bias[j]));
    } else {
      return after<kAfter, kExact>(add(load(reinterpret_cast<const float*>(c) + j * kWidth), bias[j]));
    }
  }
};

// Stores whole panels, padding included, in rows of pieces.
template <class Out, bool kInt8, After kAfter, bool kExact>
struct StorePieces {
  Rows to;
  Scaling by;
  int first_panel = 0;  // of `to`

  inline __attribute__((always_inline)) void operator()(int panel, int64_t row0, int begin, int end,
                                                        const char* sums) const {
    constexpr int kPiecesOfPanel = 32 * sizeof(Out) / 64;
    const Finish<kInt8, kAfter, kExact> finish(by, panel);
    for (int r = begin; r < end; ++r) {
      char* row = to.at(row0 + r) + static_cast<size_t>(panel - first_panel) * kPiecesOfPanel * to.piece;
      const char* c = sums + static_cast<size_t>(r) * kBlockStride;
#pragma GCC unroll 8
      for (int j = 0; j < 32 / kWidth; ++j) {
        const int byte = j * kWidth * static_cast<int>(sizeof(Out));
        store_float(reinterpret_cast<Out*>(row + static_cast<size_t>(byte / 64) * to.piece + byte % 64),
                    finish(c, row0 + r, j));
      }
    }
  }
};

// Stores float32 in rows of exactly `outputs` elements.
template <bool kInt8, After kAfter>
struct StoreExactly {
  float* to;
  int64_t stride;
  int outputs;
  Scaling by;

  inline void operator()(int panel, int64_t row0, int begin, int end, const char* sums) const {
    const Finish<kInt8, kAfter, true> finish(by, panel);
    for (int r = begin; r < end; ++r) {
      float* row = to + (row0 + r) * stride + panel * 32;
      for (int j = 0; j < 32 / kWidth; ++j) {
        const int left = outputs - panel * 32 - j * kWidth;
        if (left > 0) {
          store_first(row + j * kWidth, finish(sums + static_cast<size_t>(r) * kBlockStride, row0 + r, j), left);
        }
      }
    }
  }
};

}  // namespace
}  // namespace bertrt::BERTRT_ISA
