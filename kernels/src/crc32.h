// CRC-32 as zlib and PNG compute it: polynomial 0xEDB88320, reflected, all ones before and after.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bertrt {

// Of `bytes` bytes that follow those whose checksum is `before`, at the start 0.
uint32_t crc32(uint32_t before, const void* data, size_t bytes);

}  // namespace bertrt
