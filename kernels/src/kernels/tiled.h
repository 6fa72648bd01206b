// Where the rows of a matrix of activations lie.
#pragma once

#include "simd.h"

namespace bertrt::BERTRT_ISA {
namespace {

// Piece p (64 bytes) of row r lies at data + (r / 16) * tile + (r % 16) * row + p * piece.
struct Rows {
  char* data;
  size_t tile;
  size_t row;
  size_t piece;

  inline char* at(int64_t r) const {
    return data + static_cast<size_t>(r / 16) * tile + static_cast<size_t>(r % 16) * row;
  }
};

// Tiles of 16 rows x 64 bytes, as AMX reads them: consecutive pieces of a row are 1,024 bytes apart.
inline Rows tiled(const void* data, int pieces) {
  return Rows{static_cast<char*>(const_cast<void*>(data)), static_cast<size_t>(pieces) * 1024, 64, 1024};
}

// Rows one after the other.
inline Rows row_major(const void* data, size_t stride) {
  return Rows{static_cast<char*>(const_cast<void*>(data)), 16 * stride, stride, 64};
}

// Pieces of a row of `count` elements of a type.
template <class T>
inline int pieces_of(int count) {
  return (count + kPiece<T> - 1) / kPiece<T>;
}

// A contiguous share of `total` things, one share for each of `size` members.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t total, int size, int rank) {
  return Range{total * rank / size, total * (rank + 1) / size};
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
