// Any bytes at all given to the reader of weight files: it accepts them or throws Error of code kBadFile, and touches
// nothing outside them. With clang:
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Ikernels/src -o fuzz_weights
//     kernels/fuzz/fuzz_weights.cpp kernels/src/{crc32,mapping,weight_header,weight_values,weights}.cpp
//   ./fuzz_weights corpus kernels/fuzz/seeds
// Without: the same with g++, -fsanitize=address,undefined and kernels/fuzz/mutate.cpp, which has a main of its own.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "crc32.h"
#include "error.h"
#include "weights.h"

namespace {

// A copy that ends where its memory ends, so that a sanitizer sees every step beyond.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Copy = std::unique_ptr<unsigned char, Free>;

Copy make_copy(const uint8_t* data, size_t size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size == 0 ? 1 : size) != 0) std::abort();
  if (size > 0) std::memcpy(memory, data, size);
  return Copy(static_cast<unsigned char*>(memory));
}

volatile unsigned char sink;

void touch(const void* data, size_t bytes) {
  const unsigned char* const from = static_cast<const unsigned char*>(data);
  unsigned char seen = 0;
  for (size_t i = 0; i < bytes; ++i) seen = static_cast<unsigned char>(seen ^ from[i]);
  sink = seen;
}

size_t padded(int32_t columns) { return (static_cast<size_t>(columns) + 63) / 64 * 64; }

void touch_vector(const float* data, int32_t rows, int32_t columns) {
  touch(data, static_cast<size_t>(rows) * padded(columns) * sizeof(float));
}

void touch_matrix(const bertrt::Matrix& matrix) {
  touch(matrix.panels, static_cast<size_t>(matrix.panel_count) * static_cast<size_t>(matrix.steps) * 2048);
  if (matrix.scale != nullptr) touch_vector(matrix.scale, 1, matrix.outputs);
  if (matrix.sums != nullptr) touch(matrix.sums, padded(matrix.outputs) * sizeof(int32_t));
  if (matrix.bias != nullptr) touch_vector(matrix.bias, 1, matrix.outputs);
}

// All that the kernels will read.
void touch_model(const bertrt::Model& model) {
  const bertrt::Architecture& sizes = model.architecture;
  touch_matrix(model.words);
  touch_vector(model.position_table, sizes.positions, sizes.hidden);
  touch_vector(model.segment_table, sizes.segments, sizes.hidden);
  touch_vector(model.embedding_norm_gamma, 1, sizes.hidden);
  touch_vector(model.embedding_norm_beta, 1, sizes.hidden);
  for (int32_t i = 0; i < sizes.layers; ++i) {
    const bertrt::Layer& layer = model.layers[i];
    for (const bertrt::Matrix* matrix : {&layer.qkv, &layer.attention_out, &layer.ffn_in, &layer.ffn_out}) {
      touch_matrix(*matrix);
    }
    for (const float* vector : {layer.attention_norm_gamma, layer.attention_norm_beta, layer.ffn_norm_gamma,
                                layer.ffn_norm_beta}) {
      touch_vector(vector, 1, sizes.hidden);
    }
  }
  if (sizes.has_mlm) {
    touch_matrix(model.mlm_dense);
    touch_vector(model.mlm_norm_gamma, 1, sizes.hidden);
    touch_vector(model.mlm_norm_beta, 1, sizes.hidden);
    touch_matrix(model.mlm_decoder);
  }
  if (sizes.has_pooler) touch_matrix(model.pooler_dense);
  if (sizes.has_nsp) touch_vector(model.nsp_weight, 2, sizes.hidden);
}

void parse(const unsigned char* data, size_t size, bool verify) {
  try {
    touch_model(bertrt::Weights::parse(data, size, "fuzz", verify)->model());
  } catch (const bertrt::Error& error) {
    if (error.code() != bertrt::ErrorCode::kBadFile) std::abort();
  }
}

template <class T>
void put(unsigned char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

template <class T>
T get(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// What hides everything else from a mutation: the size of the file, and the checksums.
void mend(unsigned char* data, size_t size) {
  if (size < 128) return;
  put(data + 16, static_cast<uint64_t>(size));
  const uint32_t header = get<uint32_t>(data + 12);
  if (header < 128 || header > size) return;
  for (unsigned char* record = data + 128; record + 128 <= data + header; record += 128) {
    const uint64_t offset = get<uint64_t>(record + 88), bytes = get<uint64_t>(record + 96);
    if (offset <= size && bytes <= size - offset) put(record + 104, bertrt::crc32(0, data + offset, bytes));
  }
  put(data + 28, uint32_t{0});
  put(data + 28, bertrt::crc32(0, data, header));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const Copy copy = make_copy(data, size);
  parse(copy.get(), size, true);
  mend(copy.get(), size);
  parse(copy.get(), size, false);
  parse(copy.get(), size, true);
  return 0;
}
