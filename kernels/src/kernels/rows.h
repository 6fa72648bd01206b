// What works on whole rows: embeddings, LayerNorm with its residual, quantisation.
//
// LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450): y = (x - mean) / sqrt(variance + epsilon) * gamma + beta,
// in float32. Rows are padded with zeros to whole pieces; the padding takes no part in the mean and the variance, and
// stays zero because gamma and beta are zero there.
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

// Quantises a row given in pieces of T, `count` elements (a multiple of 16); returns the scale.
template <class T>
inline float quantize_row(const char* from, size_t from_piece, int pieces, char* to, size_t to_piece, int to_pieces,
                          const Steps& steps) {
  F most[2] = {zero(), zero()};
  const bool symmetric = steps.zero == 0;
  for (int p = 0; p < pieces; ++p) {
    const T* x = reinterpret_cast<const T*>(from + static_cast<size_t>(p) * from_piece);
#pragma GCC unroll 8
    for (int j = 0; j < kPiece<T> / kWidth; ++j) {
      const F value = load_as_float(x + j * kWidth);
      most[j % 2] = max(most[j % 2], symmetric ? abs(value) : value);
    }
  }
  float scale = largest(max(most[0], most[1])) / steps.most;
  if (!(scale > steps.least)) scale = steps.least;
  const F inverse = set(1.0f / scale), shift = set(static_cast<float>(-steps.zero));
  constexpr int kRatio = 64 / kPiece<T>;  // pieces of T in a piece of bytes
  for (int q = 0; q < to_pieces; ++q) {
    int8_t* bytes = reinterpret_cast<int8_t*>(to + static_cast<size_t>(q) * to_piece);
#pragma GCC unroll 4
    for (int i = 0; i < kRatio; ++i) {
      const int p = q * kRatio + i;
      const T* x = reinterpret_cast<const T*>(from + static_cast<size_t>(p) * from_piece);
#pragma GCC unroll 8
      for (int j = 0; j < kPiece<T> / kWidth; ++j) {
        const F value = p < pieces ? load_as_float(x + j * kWidth) : zero();
        store_int8(bytes + i * kPiece<T> + j * kWidth, fma(value, inverse, shift), kFlip);
      }
    }
  }
  return scale;
}

// Where element 32 * block + inside of a row lies; `inside` is below 32.
template <class T>
inline T* element(char* row, size_t piece, int block, int inside) {
  return reinterpret_cast<T*>(row + static_cast<size_t>(block * (32 / kPiece<T>) + inside / kPiece<T>)*piece) +
         inside % kPiece<T>;
}

// The second half of LayerNorm: `x` holds floats of which `width` count, padded to a multiple of 32, `total` their sum.
// Writes the normalised row to `to`, to `copy` as Copy where that has data, and quantised to `quantized` where that has.
template <class Out, class Copy>
inline void normalize_row(float* x, float total, int width, float epsilon, const float* gamma, const float* beta,
                          const Rows& to, const Rows& copy, const Rows& quantized, int quantized_pieces,
                          float* row_scale, int64_t row) {
  // As far as the products write and add_rows reads.
  const int padded = static_cast<int>(round_up(width, 32));
  const int whole = width / kWidth * kWidth;
  const F mean = set(total / static_cast<float>(width));
  F squares[2] = {zero(), zero()};
  int i = 0;
  for (; i + 2 * kWidth <= whole; i += 2 * kWidth) {
    const F a = sub(load(x + i), mean), b = sub(load(x + i + kWidth), mean);
    squares[0] = fma(a, a, squares[0]);
    squares[1] = fma(b, b, squares[1]);
  }
  for (; i < width; i += kWidth) {
    const F a = keep_first(sub(load(x + i), mean), width - i);
    squares[0] = fma(a, a, squares[0]);
  }
  const float variance = sum(add(squares[0], squares[1])) / static_cast<float>(width);
  const F factor = set(1.0f / __builtin_sqrtf(variance + epsilon));
  const F offset = mul(mean, factor);
  F most[2] = {zero(), zero()};
  char* out = to.at(row);
  char* second = copy.data == nullptr ? nullptr : copy.at(row);
  for (int block = 0; block < padded / 32; ++block) {
#pragma GCC unroll 8
    for (int j = 0; j < 32; j += kWidth) {
      const int at = block * 32 + j;
      const F y = fma(fms(load(x + at), factor, offset), load(gamma + at), load(beta + at));
      store(x + at, y);
      store_float(element<Out>(out, to.piece, block, j), y);
      if (second != nullptr) store_float(element<Copy>(second, copy.piece, block, j), y);
      most[j / kWidth % 2] = max(most[j / kWidth % 2], abs(y));
    }
  }
  if (quantized.data == nullptr) return;
  float scale = largest(max(most[0], most[1])) / kSymmetric.most;
  if (!(scale > kSymmetric.least)) scale = kSymmetric.least;
  row_scale[row] = scale;
  const F inverse = set(1.0f / scale);
  char* bytes = quantized.at(row);
  for (int q = 0; q < quantized_pieces; ++q) {
    int8_t* piece = reinterpret_cast<int8_t*>(bytes + static_cast<size_t>(q) * quantized.piece);
#pragma GCC unroll 16
    for (int j = 0; j < 64 / kWidth; ++j) {
      const int at = q * 64 + j * kWidth;
      store_int8(piece + j * kWidth, at < padded ? mul(load(x + at), inverse) : zero(), kFlip);
    }
  }
}

// x = a + b of a row of `width` elements, or a alone where b has no data, padded to a multiple of 32; returns the sum.
template <class A, class B>
inline float add_rows(const Rows& a, const Rows& b, int64_t row, int width, float* x) {
  char* from_a = a.at(row);
  char* from_b = b.data == nullptr ? nullptr : b.at(row);
  F totals[2] = {zero(), zero()};
  for (int block = 0; block * 32 < width; ++block) {
#pragma GCC unroll 8
    for (int j = 0; j < 32; j += kWidth) {
      F value = load_as_float(element<A>(from_a, a.piece, block, j));
      if (from_b != nullptr) value = add(value, load_as_float(element<B>(from_b, b.piece, block, j)));
      store(x + block * 32 + j, value);
      totals[j / kWidth % 2] = add(totals[j / kWidth % 2], value);
    }
  }
  return sum(add(totals[0], totals[1]));
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
