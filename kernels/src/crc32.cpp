// Slicing by 16 (Kounavis and Berry, "Novel Table Lookup-Based Algorithms for High-Performance CRC Generation", 2008):
// tables[i][b] is the checksum of the byte b with i bytes of zeros behind it, so that 16 bytes are looked up at once.
#include "crc32.h"

#include <array>
#include <bit>
#include <cstring>

static_assert(std::endian::native == std::endian::little);

namespace bertrt {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;
constexpr int kSlices = 16;

using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (int slice = 1; slice < kSlices; ++slice) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[slice - 1][byte];
      tables[slice][byte] = (crc >> 8) ^ tables[0][crc & 255];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// Of the eight bytes of `word`, with `behind` bytes after them.
inline uint32_t look_up(uint64_t word, int behind) {
  uint32_t crc = 0;
  for (int i = 0; i < 8; ++i) crc ^= kTables[behind + 7 - i][(word >> (8 * i)) & 255];
  return crc;
}

}  // namespace

uint32_t crc32(uint32_t before, const void* data, size_t bytes) {
  const unsigned char* next = static_cast<const unsigned char*>(data);
  uint32_t crc = ~before;
  for (; bytes >= kSlices; bytes -= kSlices, next += kSlices) {
    uint64_t words[2];
    std::memcpy(words, next, sizeof words);
    crc = look_up(words[0] ^ crc, 8) ^ look_up(words[1], 0);
  }
  for (; bytes > 0; --bytes, ++next) crc = (crc >> 8) ^ kTables[0][(crc ^ *next) & 255];
  return ~crc;
}

}  // namespace bertrt
