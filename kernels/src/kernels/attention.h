// Scaled dot-product attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) of one sequence and one head:
// softmax(Q K^T / sqrt(head size)) V, over exactly the sequence's tokens.
//
// Keys and values are packed as panels of weights, so that both products are those of product.h: keys with the tokens as
// outputs, values with the head's channels as outputs. 32 queries at a time; probabilities are left
// unnormalised and the result is divided by their sum.
#pragma once

#include "math.h"
#include "multiply.h"

namespace bertrt::BERTRT_ISA {
namespace {

// The type of queries, keys, values and probabilities: bfloat16 where it is multiplied natively, else float32.
#if BERTRT_HAS_BF16
template <class Storage>
using Operand = Storage;
#else
template <class Storage>
using Operand = float;
#endif

template <class T>
struct ProductOf;
template <>
struct ProductOf<float> {
  using type = FloatProduct;
};
template <>
struct ProductOf<Bf16> {
  using type = Bf16Product;
};

// Elements of T in four bytes.
template <class T>
inline constexpr int kGroup = 4 / static_cast<int>(sizeof(T));

// keys[length][depth] -> panels with `length` outputs and `depth` inputs.
template <class T>
inline void pack_keys(const char* keys, size_t stride, int length, int depth, char* panels) {
  const int steps = depth / kPiece<T>;
  alignas(64) char last[16 * 64];
  for (int tile = 0; tile * 16 < static_cast<int>(round_up(length, 32)); ++tile) {
    char* to = panels + static_cast<size_t>(tile / 2) * steps * 2048 + static_cast<size_t>(tile % 2) * 1024;
    const int rows = length - tile * 16;
    for (int step = 0; step < steps; ++step, to += 2048) {
      if (rows <= 0) {
        __builtin_memset(to, 0, 1024);
        continue;
      }
      const char* from = keys + static_cast<size_t>(tile) * 16 * stride + static_cast<size_t>(step) * 64;
      if (rows >= 16) {
        transpose_words(from, stride, to);
      } else {
        __builtin_memset(last, 0, sizeof last);
        for (int r = 0; r < rows; ++r) __builtin_memcpy(last + r * 64, from + static_cast<size_t>(r) * stride, 64);
        transpose_words(last, 64, to);
      }
    }
  }
}

// values[length][depth] -> panels with `depth` outputs and `length` inputs.
template <class T>
inline void pack_values(const char* values, size_t stride, int length, int depth, char* panels) {
  alignas(64) static const char kZeros[64] = {};
  constexpr int kRowsOfStep = kPiece<T>;
  const int steps = (length + kRowsOfStep - 1) / kRowsOfStep;
  for (int step = 0; step < steps; ++step) {
    for (int k = 0; k < 16; ++k) {
      const int row = step * kRowsOfStep + k * kGroup<T>;
      const char* a = row < length ? values + static_cast<size_t>(row) * stride : nullptr;
      const char* b = row + 1 < length ? values + static_cast<size_t>(row + 1) * stride : nullptr;
      for (int tile = 0; tile * 16 < depth; ++tile) {
        char* to = panels + (static_cast<size_t>(tile / 2) * steps + step) * 2048 + static_cast<size_t>(tile % 2) * 1024 +
                   static_cast<size_t>(k) * 64;
        const size_t skip = static_cast<size_t>(tile) * 16 * sizeof(T);
        const char* from_a = a == nullptr ? kZeros : a + skip;
        const char* from_b = b == nullptr ? kZeros : b + skip;
        if constexpr (sizeof(T) == 4) {
          __builtin_memcpy(to, from_a, 64);
        } else {
          interleave_halves(reinterpret_cast<const uint16_t*>(from_a), reinterpret_cast<const uint16_t*>(from_b), to);
        }
      }
    }
  }
}

// Largest of the first `length` scores of a row.
inline float largest_score(const float* row, int length) {
  if (length < kWidth) {
    float most = row[0];
    for (int i = 1; i < length; ++i) most = row[i] > most ? row[i] : most;
    return most;
  }
  // The last whole vector of the row is the other chain's first.
  F most = load(row), others = load(row + length - kWidth);
  int i = kWidth;
  for (; i + 2 * kWidth <= length; i += 2 * kWidth) {
    most = max(most, load(row + i));
    others = max(others, load(row + i + kWidth));
  }
  if (i + kWidth <= length) most = max(most, load(row + i));
  return largest(max(most, others));
}

// Puts a piece of a row's probabilities down and adds them to sums[0] and sums[1], as they are after rounding: so that what
// they weight is not scaled by the sum of their errors.
template <class T>
inline void put_probabilities(char* to, const F* p, F* sums) {
  constexpr int kVectors = kPiece<T> / kWidth;
#if BERTRT_HAS_BF16
  if constexpr (sizeof(T) == 2) {
    const H rounded = to_bf16(p[0], p[1]);
    store_halves(to, rounded);
    sums[0] = add_halves(sums[0], rounded);
    return;
  }
#endif
  
  store_piece<T>(to, p);
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) sums[j % 2] = add(sums[j % 2], p[j]);
}

// Rows of scores become rows of unnormalised probabilities, tiled; totals[r] is their sum. All rows pass by three times, so
// that none waits for what is found across its vectors.
template <class T>
inline void soften(const float* scores, size_t stride, int rows, int length, float factor, char* probabilities,
                   int pieces, float* totals) {
  constexpr bool kExact = sizeof(T) == 4;
  constexpr int kVectors = kPiece<T> / kWidth;
  const int whole = length / kPiece<T>;
  const float scale = factor * kLog2E;
  const F by = set(scale);
  alignas(64) float sums[32 * kWidth];
  float shifts[32];
  for (int r = 0; r < rows; ++r) shifts[r] = largest_score(scores + static_cast<size_t>(r) * stride, length) * scale;
  for (int r = 0; r < rows; ++r) {
    const float* row = scores + static_cast<size_t>(r) * stride;
    const F shift = set(shifts[r]);
    char* to = probabilities + static_cast<size_t>(r / 16) * pieces * 1024 + static_cast<size_t>(r % 16) * 64;
    F total[2] = {zero(), zero()};
    F p[kVectors];
    for (int piece = 0; piece < whole; ++piece, row += kPiece<T>, to += 1024) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) p[j] = exp2<kExact>(fms(load(row + j * kWidth), by, shift));
      put_probabilities<T>(to, p, total);
    }
    if (whole < pieces) {
      const int left = length - whole * kPiece<T>;
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        const int count = left - j * kWidth;
        p[j] = count > 0 ? keep_first(exp2<kExact>(fms(load_first(row + j * kWidth, count), by, shift)), count) : zero();
      }
      put_probabilities<T>(to, p, total);
    }
    store(sums + r * kWidth, add(total[0], total[1]));
  }
  for (int r = 0; r < rows; ++r) totals[r] = sum(load(sums + r * kWidth));
}

// One head of one sequence, queries begin .. end. `qkv` is the sequence's first row of the head's queries; keys
// and values lie `next` and twice `next` bytes further on. Writes panels of the context from `to_piece` on.
template <class T, class Storage>
void attend(const char* qkv, size_t stride, size_t next, int length, int begin, int end, int head_size, int depth,
            const Rows& to, int64_t to_row, int to_piece, const ThreadBuffers& scratch) {
  using Product = typename ProductOf<T>::type;
  char* keys = static_cast<char*>(scratch.keys);
  char* values = static_cast<char*>(scratch.values);
  char* probabilities = static_cast<char*>(scratch.probabilities);
  char* block = static_cast<char*>(scratch.block);
  pack_keys<T>(qkv + next, stride, length, depth, keys);
  pack_values<T>(qkv + 2 * next, stride, length, depth, values);
  const int key_panels = (length + 31) / 32, depth_steps = depth / kPiece<T>;
  const int length_steps = pieces_of<T>(length);
  const size_t score_stride = static_cast<size_t>(key_panels) * 32 + 16;
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(head_size));
  alignas(64) float totals[32] = {};
  const Rows queries = row_major(qkv, stride);
  const Rows weights = tiled(probabilities, length_steps);
  Ahead nothing{};
  for (int first = begin; first < end; first += 32) {
    const int rows = end - first < 32 ? end - first : 32;
    for (int panel = 0; panel < key_panels; ++panel) {
      product_block<Product>(queries, first, rows, keys + static_cast<size_t>(panel) * depth_steps * 2048, depth_steps,
                             nullptr, reinterpret_cast<char*>(scratch.scores + panel * 32),
                             score_stride * sizeof(float), nothing);
    }
    soften<T>(scratch.scores, score_stride, rows, length, factor, probabilities, length_steps, totals);
    for (int i = 0; i < 32; i += kWidth) store(totals + i, div(set(1.0f), load(totals + i)));
    // A block of sums for each panel: all products first, so that none is waited for.
    for (int panel = 0; panel < depth / 32; ++panel) {
      product_block<Product>(weights, 0, rows, values + static_cast<size_t>(panel) * length_steps * 2048, length_steps,
                             nullptr, block + static_cast<size_t>(panel) * kBlockBytes, kBlockStride, nothing);
    }
    for (int panel = 0; panel < depth / 32; ++panel) {
      const char* c = block + static_cast<size_t>(panel) * kBlockBytes;
      const size_t piece = static_cast<size_t>(to_piece + panel * (32 / kPiece<Storage>)) * to.piece;
      // The sequence's rows need not begin with a tile.
      for (int r = 0; r < rows;) {
        const int64_t row = to_row + first + r;
        char* out = to.at(row) + piece;
        const int in_tile = 16 - static_cast<int>(row % 16), stop = r + in_tile < rows ? r + in_tile : rows;
        for (; r < stop; ++r, out += to.row, c += kBlockStride) {
          F x[32 / kWidth];
#pragma GCC unroll 8
          for (int j = 0; j < 32 / kWidth; ++j) {
            x[j] = mul(load(reinterpret_cast<const float*>(c) + j * kWidth), set(totals[r]));
          }
          store_32<Storage>(out, to.piece, x);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
