// The header of a weight file: what kernels/FORMAT.md says before the first tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "error.h"
#include "model.h"

namespace bertrt {

// A file in memory, and what it is called in messages.
struct WeightBytes {
  const unsigned char* data;  // aligned to 64 bytes
  size_t size;
  std::string name;

  // Of code kBadFile: "'NAME': PROBLEM; export the engine again".
  Error problem(const std::string& what) const {
    return Error(ErrorCode::kBadFile, "'" + name + "': " + what + "; export the engine again");
  }
};

struct WeightRecord {
  std::string name;  // of printable ASCII, none but the format's
  uint32_t dtype;
  uint32_t layout;
  uint64_t rows;
  uint64_t columns;
  uint64_t offset;
  uint64_t bytes;
  uint32_t crc;
};

inline constexpr uint32_t kLayoutRows = 0;
inline constexpr uint32_t kLayoutPanels = 1;

struct WeightHeader {
  Architecture architecture;
  uint32_t tensors;  // as many as the architecture implies
  uint32_t bytes;    // of the header, within the file
};

// Checks all of the header but the records' contents. Throws Error: kBadFile.
WeightHeader read_weight_header(const WeightBytes& file);

// `index` is below the header's number of tensors. Throws Error: kBadFile.
WeightRecord read_weight_record(const WeightBytes& file, uint32_t index);

}  // namespace bertrt
