// Memory that runs work in, carved out of one allocation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "table.h"

namespace bertrt {

// Bytes for one chunk of up to `rows` rows, for one thread's scratch with sequences of up to `longest` tokens, and
// for the masked-LM head. Throw Error (kOutOfMemory) where a size overflows.
size_t chunk_bytes(const Architecture& sizes, int64_t rows);
size_t thread_bytes(const Architecture& sizes, int64_t longest);
size_t mlm_bytes(const Architecture& sizes, int threads, int64_t top_k);
// Bytes for `rows` gathered rows of the storage type.
size_t gathered_bytes(const Architecture& sizes, int64_t rows);

// Carve; `memory` is aligned to 64 bytes.
ChunkBuffers carve_chunk(const Architecture& sizes, int64_t rows, void* memory);
ThreadBuffers carve_thread(const Architecture& sizes, int64_t longest, void* memory);
MlmBuffers carve_mlm(const Architecture& sizes, int threads, int64_t top_k, void* memory);

}  // namespace bertrt
