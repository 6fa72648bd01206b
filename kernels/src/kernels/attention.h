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

// Rows of scores become rows of unnormalised probabilities, tiled; totals[r] is their sum.
template <class T>
inline void soften(const float* scores, size_t stride, int rows, int length, float factor, char* probabilities,
                   int pieces, float* totals) {
  constexpr bool kExact = sizeof(T) == 4;
  const int whole = length / kWidth * kWidth;
  const int padded = pieces * kPiece<T>;
  const F by = set(factor * kLog2E);
  for (int r = 0; r < rows; ++r) {
    const float* row = scores + static_cast<size_t>(r) * stride;
    F most = load_first(row, length);
    if (length < kWidth) {
      // Lanes beyond the length hold zero, which may be more than any score: let them repeat the first.
      float lowest = row[0];
      for (int i = 1; i < length; ++i) lowest = row[i] > lowest ? row[i] : lowest;
      most = set(lowest);
    } else {
      F others = load(row + whole - kWidth);
      int i = kWidth;
      for (; i + 2 * kWidth <= whole; i += 2 * kWidth) {
        most = max(most, load(row + i));
        others = max(others, load(row + i + kWidth));
      }
      for (; i < whole; i += kWidth) most = max(most, load(row + i));
      most = max(most, others);
      if (whole < length) most = max(most, load(row + length - kWidth));
    }
    const F shift = mul(set(largest(most)), by);
    char* to = probabilities + static_cast<size_t>(r / 16) * pieces * 1024 + static_cast<size_t>(r % 16) * 64;
    F sums[2] = {zero(), zero()};
    for (int i = 0; i < padded; i += kWidth) {
      F p = zero();
      if (i + kWidth <= length) {
        p = exp2<kExact>(fms(load(row + i), by, shift));
      } else if (i < length) {
        p = keep_first(exp2<kExact>(fms(load_first(row + i, length - i), by, shift)), length - i);
      }
      sums[i / kWidth % 2] = add(sums[i / kWidth % 2], p);
      const int piece = i / kPiece<T>, inside = i % kPiece<T>;
      store_float(reinterpret_cast<T*>(to + static_cast<size_t>(piece) * 1024) + inside, p);
    }
    totals[r] = sum(add(sums[0], sums[1]));
  }
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
  alignas(64) float totals[32];
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
    for (int panel = 0; panel < depth / 32; ++panel) {
      product_block<Product>(weights, 0, rows, values + static_cast<size_t>(panel) * length_steps * 2048, length_steps,
                             nullptr, block, kBlockStride, nothing);
      for (int r = 0; r < rows; ++r) {
        const F by = set(1.0f / totals[r]);
        char* row = to.at(to_row + first + r);
        const float* c = reinterpret_cast<const float*>(block + static_cast<size_t>(r) * kBlockStride);
#pragma GCC unroll 8
        for (int j = 0; j < 32 / kWidth; ++j) {
          const int byte = panel * 32 * static_cast<int>(sizeof(Storage)) + j * kWidth * static_cast<int>(sizeof(Storage));
          char* piece = row + static_cast<size_t>(to_piece + byte / 64) * to.piece + byte % 64;
          store_float(reinterpret_cast<Storage*>(piece), mul(load(c + j * kWidth), by));
        }
      }
    }
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
