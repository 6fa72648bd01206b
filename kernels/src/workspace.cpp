#include "workspace.h"

#include <limits>

#include "error.h"

namespace bertrt {
namespace {

constexpr size_t kAlignment = 64;

// Cuts one allocation into aligned parts, or only counts its bytes where there is no memory yet.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take(size_t count, size_t size) {
    if (count != 0 && size > std::numeric_limits<size_t>::max() / 4 / count) {
      throw Error(ErrorCode::kOutOfMemory, "the batch needs more memory than can be addressed; run smaller batches");
    }
    const size_t bytes = (count * size + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > std::numeric_limits<size_t>::max() / 4 - used_) {
      throw Error(ErrorCode::kOutOfMemory, "the batch needs more memory than can be addressed; run smaller batches");
    }
    void* part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += bytes;
    return part;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

size_t up(int64_t value, int64_t to) { return static_cast<size_t>((value + to - 1) / to * to); }

size_t storage_size(const Architecture& sizes) { return sizes.precision == Precision::kFloat32 ? 4 : 2; }
size_t residual_size(const Architecture& sizes) { return sizes.precision == Precision::kInt8 ? 2 : 4; }

// Rows in whole blocks of 32: products on tiles write none, but read the rows of a block that are not there.
size_t whole_rows(int64_t rows) { return up(rows, 32); }

int64_t inner(const Architecture& sizes) { return static_cast<int64_t>(sizes.heads) * sizes.padded_head_size; }

ChunkBuffers carve_chunk(const Architecture& sizes, int64_t rows, Carver& carver) {
  const size_t height = whole_rows(rows), storage = storage_size(sizes);
  const bool int8 = sizes.precision == Precision::kInt8;
  const int64_t widest_input = sizes.hidden > inner(sizes) ? sizes.hidden : inner(sizes);
  ChunkBuffers buffers{};
  buffers.hidden = carver.take(height, up(sizes.hidden, 32) * residual_size(sizes));
  switch (sizes.precision) {
    case Precision::kFloat32:
      break;
    case Precision::kBfloat16:
      buffers.quantized = carver.take(height, up(sizes.hidden, 32) * storage);
      break;
    case Precision::kInt8:
      buffers.quantized = carver.take(height, up(widest_input, 64));
      break;
  }
  buffers.row_scale = static_cast<float*>(carver.take(height, sizeof(float)));
  // Of float32 where the instruction set has no products of bfloat16. Tiles read up to 31 rows beyond the last.
  buffers.qkv = carver.take(height + 32, up(3 * inner(sizes), 16) * sizeof(float) + 64);
  buffers.context = carver.take(height, up(inner(sizes), 32) * storage);
  buffers.result = carver.take(height, up(sizes.hidden, 32) * residual_size(sizes));
  buffers.wide = carver.take(height, up(sizes.intermediate, 32) * storage);
  buffers.wide_quantized = int8 ? carver.take(height, up(sizes.intermediate, 64)) : nullptr;
  return buffers;
}

ThreadBuffers carve_thread(const Architecture& sizes, int64_t longest, Carver& carver) {
  const size_t length = up(longest, 32), depth = static_cast<size_t>(sizes.padded_head_size);
  ThreadBuffers buffers{};
  buffers.keys = carver.take(length, depth * sizeof(float));
  buffers.values = carver.take(length, depth * sizeof(float));
  buffers.scores = static_cast<float*>(carver.take(32 * (length + 16), sizeof(float)));
  buffers.probabilities = carver.take(32 * length, sizeof(float));
  buffers.block = carver.take(kGroupBlocks, 32 * 32 * sizeof(float));
  buffers.rows = static_cast<float*>(carver.take(2 * (up(sizes.hidden, 64) + 64), sizeof(float)));
  buffers.logits = static_cast<float*>(carver.take(kHeadRows, kLogitStride * sizeof(float)));
  return buffers;
}

MlmBuffers carve_mlm(const Architecture& sizes, int threads, int64_t top_k, Carver& carver) {
  const size_t tasks = up(sizes.vocab, kDecodeColumns) / kDecodeColumns;
  MlmBuffers buffers{};
  buffers.chunk = carve_chunk(sizes, kHeadRows, carver);
  buffers.transformed = carver.take(kHeadRows, up(sizes.hidden, 32) * sizeof(float));
  buffers.maximum = static_cast<float*>(carver.take(kHeadRows * tasks, sizeof(float)));
  buffers.sum = static_cast<float*>(carver.take(kHeadRows * tasks, sizeof(float)));
  buffers.heaps = carver.take(static_cast<size_t>(threads) * kHeadRows, static_cast<size_t>(top_k) * 8);
  buffers.heap_sizes = static_cast<int32_t*>(carver.take(static_cast<size_t>(threads) * kHeadRows, sizeof(int32_t)));
  return buffers;
}

}  // namespace

size_t chunk_bytes(const Architecture& sizes, int64_t rows) {
  Carver carver(nullptr);
  carve_chunk(sizes, rows, carver);
  return carver.used();
}

size_t thread_bytes(const Architecture& sizes, int64_t longest) {
  Carver carver(nullptr);
  carve_thread(sizes, longest, carver);
  return carver.used();
}

size_t mlm_bytes(const Architecture& sizes, int threads, int64_t top_k) {
  Carver carver(nullptr);
  carve_mlm(sizes, threads, top_k, carver);
  return carver.used();
}

size_t gathered_bytes(const Architecture& sizes, int64_t rows) {
  Carver carver(nullptr);
  carver.take(whole_rows(rows), up(sizes.hidden, 32) * storage_size(sizes));
  return carver.used();
}

ChunkBuffers carve_chunk(const Architecture& sizes, int64_t rows, void* memory) {
  Carver carver(memory);
  return carve_chunk(sizes, rows, carver);
}

ThreadBuffers carve_thread(const Architecture& sizes, int64_t longest, void* memory) {
  Carver carver(memory);
  return carve_thread(sizes, longest, carver);
}

MlmBuffers carve_mlm(const Architecture& sizes, int threads, int64_t top_k, void* memory) {
  Carver carver(memory);
  return carve_mlm(sizes, threads, top_k, carver);
}

}  // namespace bertrt
