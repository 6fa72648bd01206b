// What works on whole rows: embeddings, LayerNorm with its residual, quantisation.
//
// LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450): y = (x - mean) / sqrt(variance + epsilon) * gamma + beta,
// in float32. Rows are padded with zeros to whole pieces; the padding takes no part in the mean and the variance, and
// stays zero because gamma and beta are zero there.
//
// Several rows are computed together, so that one need not wait for another's sums and divisions; what comes of a row
// does not depend on its company. A scale is NaN or infinite if a value of its row is, and so is then what is computed with it.
#pragma once

#include "../table.h"
#include "multiply.h"

namespace bertrt::BERTRT_ISA {
namespace {

// int8 values of a row: round(x / scale) - zero, as signed bytes in -127..127, xored with kFlip.
struct Steps {
  float most;      // steps for the largest value
  float least;     // the scale is not finer than this
  int32_t zero;
};
// Symmetric around zero.
inline constexpr Steps kSymmetric{127.0f, 1e-30f, 0};
// A GELU gives nothing below -0.1701, so 15 steps do for what is below zero and 239 remain for what is above.
inline constexpr Steps kAfterGelu{239.0f, 0.1701f / 15.0f, 112};
inline constexpr Steps kAfterRelu{254.0f, 1e-30f, 127};

inline Steps steps_after(Activation activation) {
  return activation == Activation::kRelu ? kAfterRelu : kAfterGelu;
}

// What has to be added to the stored bytes to get x / scale.
inline int32_t offset_of(const Steps& steps) { return (kFlip == 0 ? 0 : -128) + steps.zero; }

// For rows whose largest magnitude is `most`: negative values of a GELU are too small to count, see `least`.
inline float scale_of(float most, const Steps& steps) {
  const float scale = most / steps.most;
  return scale < steps.least ? steps.least : scale;
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls work(row, Count<n>) for all rows of a range, n = kMost or 1 of one tile at a time.
template <int kMost, class Work>
inline void by_rows(const Range& range, const Work& work) {
  for (int64_t row = range.begin; row < range.end;) {
    if (range.end - row >= kMost && row % 16 <= 16 - kMost) {
      work(row, Count<kMost>{});
      row += kMost;
    } else {
      work(row, Count<1>{});
      ++row;
    }
  }
}

// Quantises kRows rows of one tile, given in pieces of bfloat16.
template <int kRows>
inline void quantize_rows(const Rows& from, int pieces, const Rows& to, int to_pieces, const Steps& steps,
                          float* row_scale, int64_t row) {
  H most[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) most[r] = no_magnitude();
  const char* x = from.at(row);
  for (int p = 0; p < pieces; ++p, x += from.piece) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 32; j += kHalves) {
        most[r] = max_magnitude(most[r], reinterpret_cast<const uint16_t*>(x + r * from.row) + j);
      }
    }
  }
  float inverse[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const uint32_t bits = static_cast<uint32_t>(largest_magnitude(most[r])) << 16;
    float largest_value;
    __builtin_memcpy(&largest_value, &bits, sizeof bits);
    const float scale = scale_of(largest_value, steps);
    row_scale[row + r] = scale;
    inverse[r] = 1.0f / scale;
  }
  alignas(64) static const uint16_t kZeros[32] = {};
  const F shift = set(static_cast<float>(-steps.zero));
  x = from.at(row);
  char* bytes = to.at(row);
  for (int q = 0; q < to_pieces; ++q, x += 2 * from.piece, bytes += to.piece) {
    for (int r = 0; r < kRows; ++r) {
      const auto* a = reinterpret_cast<const uint16_t*>(x + r * from.row);
      const auto* b = reinterpret_cast<const uint16_t*>(x + r * from.row + from.piece);
      quantize_pieces(2 * q < pieces ? a : kZeros, 2 * q + 1 < pieces ? b : kZeros, set(inverse[r]), shift, kFlip,
                      reinterpret_cast<int8_t*>(bytes + r * to.row));
    }
  }
}

// What a LayerNorm has besides its rows.
struct Norm {
  int width;
  float epsilon;
  const float* gamma;
  const float* beta;
};

// Where a LayerNorm's rows go: as Out; as Copy where that has data; as int8 where that has.
struct NormOutputs {
  Rows to;
  Rows copy;
  Rows quantized;
  int quantized_pieces;
  float* row_scale;
};

// From one to the next of the rows in float32 that are computed together: not a multiple of a page.
inline int64_t float_stride(int width) { return round_up(width, 64) + 64; }

// The second half of LayerNorm: kRows rows of x in float32, of which `width` numbers count, padded to a multiple of 32; the
// sum of each.
template <int kRows, class Out, class Copy>
inline void normalize_rows(float* x, const float* totals, const Norm& norm, const NormOutputs& outputs, int64_t row) {
  const int width = norm.width;
  const int64_t stride = float_stride(width);
  // As far as the products write and add_rows reads.
  const int padded = static_cast<int>(round_up(width, 32));
  const int whole = width / kWidth * kWidth;
  F factor[kRows], offset[kRows], sums[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    offset[r] = set(totals[r] / static_cast<float>(width));
    sums[r][0] = sums[r][1] = zero();
  }
  int i = 0;
  for (; i + 2 * kWidth <= whole; i += 2 * kWidth) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F a = sub(load(x + r * stride + i), offset[r]), b = sub(load(x + r * stride + i + kWidth), offset[r]);
      sums[r][0] = fma(a, a, sums[r][0]);
      sums[r][1] = fma(b, b, sums[r][1]);
    }
  }
  for (; i < width; i += kWidth) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F a = keep_first(sub(load(x + r * stride + i), offset[r]), width - i);
      sums[r][0] = fma(a, a, sums[r][0]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const float variance = sum(add(sums[r][0], sums[r][1])) / static_cast<float>(width);
    factor[r] = set(1.0f / __builtin_sqrtf(variance + norm.epsilon));
    offset[r] = mul(offset[r], factor[r]);
    sums[r][0] = sums[r][1] = zero();
  }
  const bool quantized = outputs.quantized.data != nullptr;
  char* out = outputs.to.at(row);
  char* copy = outputs.copy.data == nullptr ? nullptr : outputs.copy.at(row);
  for (int block = 0; block < padded / 32; ++block) {
    const float* gamma = norm.gamma + block * 32;
    const float* beta = norm.beta + block * 32;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* from = x + r * stride + block * 32;
      F y[32 / kWidth];
#pragma GCC unroll 8
      for (int j = 0; j < 32 / kWidth; ++j) {
        y[j] = fma(fms(load(from + j * kWidth), factor[r], offset[r]), load(gamma + j * kWidth), load(beta + j * kWidth));
      }
      store_32<Out>(out + static_cast<size_t>(block * (32 / kPiece<Out>)) * outputs.to.piece + r * outputs.to.row,
                    outputs.to.piece, y);
      if (copy != nullptr) {
        store_32<Copy>(copy + static_cast<size_t>(block * (32 / kPiece<Copy>)) * outputs.copy.piece +
                           r * outputs.copy.row,
                       outputs.copy.piece, y);
      }
      if (quantized) {
#pragma GCC unroll 8
        for (int j = 0; j < 32 / kWidth; ++j) {
          store(from + j * kWidth, y[j]);
          sums[r][j % 2] = max(sums[r][j % 2], abs(y[j]));
        }
      }
    }
  }
  if (!quantized) return;
  F inverse[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    // One number that is not finite makes the mean so, hence all of them: none is lost in the maximum.
    const float scale = scale_of(largest(max(sums[r][0], sums[r][1])), kSymmetric);
    outputs.row_scale[row + r] = scale;
    inverse[r] = set(1.0f / scale);
    // Pieces of bytes may reach beyond the padding.
    for (int j = padded; j < outputs.quantized_pieces * 64; j += kWidth) store(x + r * stride + j, zero());
  }
  char* bytes = outputs.quantized.at(row);
  for (int q = 0; q < outputs.quantized_pieces; ++q, bytes += outputs.quantized.piece) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float* from = x + r * stride + q * 64;
#pragma GCC unroll 4
      for (int j = 0; j < 64; j += 4 * kWidth) {
        store_int8_four(reinterpret_cast<int8_t*>(bytes + r * outputs.quantized.row) + j,
                        mul(load(from + j), inverse[r]), mul(load(from + j + kWidth), inverse[r]),
                        mul(load(from + j + 2 * kWidth), inverse[r]), mul(load(from + j + 3 * kWidth), inverse[r]),
                        kFlip);
      }
    }
  }
}

// Where element 32 * block + inside of a row lies; `inside` is below 32.
template <class T>
inline T* element(char* row, size_t piece, int block, int inside) {
  return reinterpret_cast<T*>(row + static_cast<size_t>(block * (32 / kPiece<T>) + inside / kPiece<T>)*piece) +
         inside % kPiece<T>;
}

// x = a + b for kRows rows of `width` elements, or a alone where b has no data, padded to a multiple of 32; and their sums.
template <int kRows, class A, class B>
inline void add_rows(const Rows& a, const Rows& b, int64_t row, int width, float* x, float* totals) {
  char* from_a = a.at(row);
  char* from_b = b.data == nullptr ? nullptr : b.at(row);
  const int64_t stride = float_stride(width);
  F sums[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = zero();
  for (int block = 0; block * 32 < width; ++block) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < 32; j += kWidth) {
        F value = load_as_float(element<A>(from_a + r * a.row, a.piece, block, j));
        if (from_b != nullptr) value = add(value, load_as_float(element<B>(from_b + r * b.row, b.piece, block, j)));
        store(x + r * stride + block * 32 + j, value);
        sums[r][j / kWidth % 2] = add(sums[r][j / kWidth % 2], value);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) totals[r] = sum(add(sums[r][0], sums[r][1]));
}
// The row of a word in float32, from the panels in which the decoder has it: word n is output n.
inline void word_row(const Matrix& words, int32_t id, float* x) {
  const char* column = static_cast<const char*>(words.panels) +
                       static_cast<size_t>(id / 32) * words.steps * 2048 + static_cast<size_t>(id % 32 / 16) * 1024 +
                       static_cast<size_t>(id % 16) * 4;
  // Four bytes lie together; the next four are 64 further on.
  uint32_t* words_of_row = reinterpret_cast<uint32_t*>(x);
  const int groups = words.dtype == Dtype::kInt8 ? 4 : words.dtype == Dtype::kBfloat16 ? 2 : 1;
  // Unpacked from the end, so that the four-byte words can lie at the end of the row that they become.
  const int count = words.steps * 16;
  uint32_t* raw = words_of_row + static_cast<size_t>(count) * (groups - 1);
  for (int step = 0; step < words.steps; ++step) {
    const char* tile = column + static_cast<size_t>(step) * 2048;
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) __builtin_memcpy(raw + step * 16 + k, tile + k * 64, 4);
  }
  if (words.dtype == Dtype::kInt8) {
    const F scale = set(words.scale[id]);
    const int8_t* bytes = reinterpret_cast<const int8_t*>(raw);
    for (int i = 0; i < count * 4; i += kWidth) store(x + i, mul(load_int8(bytes + i), scale));
  } else if (words.dtype == Dtype::kBfloat16) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(raw);
    for (int i = 0; i < count * 2; i += kWidth) store(x + i, load_bf16(halves + i));
  }
}

// A row of a head's or a layer's states as float32, `width` elements.
template <class Storage>
inline void copy_out(const Rows& from, int64_t row, int width, float* to) {
  const char* at = from.at(row);
  for (int p = 0; p * kPiece<Storage> < width; ++p) {
    const Storage* x = reinterpret_cast<const Storage*>(at + static_cast<size_t>(p) * from.piece);
    for (int j = 0; j < kPiece<Storage>; j += kWidth) {
      const int left = width - p * kPiece<Storage> - j;
      if (left > 0) store_first(to + p * kPiece<Storage> + j, load_as_float(x + j), left);
    }
  }
}

inline void copy_row(const Rows& from, int64_t row, const Rows& to, int64_t target, int pieces) {
  const char* source = from.at(row);
  char* destination = to.at(target);
  for (int p = 0; p < pieces; ++p) {
    __builtin_memcpy(destination + static_cast<size_t>(p) * to.piece, source + static_cast<size_t>(p) * from.piece, 64);
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
