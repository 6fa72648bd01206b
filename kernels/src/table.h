// What is compiled once per instruction set, as a table of functions. See CONTRIBUTING.md.
// No functions in this header: see model.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "model.h"

namespace bertrt {

class Group;

// Rows of x cut into pieces of 64 bytes (64 int8, 32 bfloat16, 16 float32), 16 rows to a tile of 1,024 bytes:
// piece p of row r lies at data + (r / 16) * block + p * 1024 + (r % 16) * 64, where block = pieces * 1024.
// Rows are allocated in whole tiles.

// One sequence of a chunk: where its tokens begin in the batch, and its first row in the chunk.
struct Sequence {
  int64_t begin;
  int32_t length;
  int32_t row;
};

// A row of the chunk that a head needs, and its place among that head's gathered rows.
struct Pick {
  int32_t row;
  int64_t target;
};

// Some sequences of a batch that go through the encoder together.
struct Chunk {
  const int32_t* ids;            // of the whole batch
  const int32_t* segments;       // of the whole batch
  const Sequence* sequences;
  int32_t sequence_count;
  int32_t rows;                  // tokens in the chunk
  int32_t longest;               // of the sequences
  float* hidden;                 // null, or last hidden states of the whole batch [tokens][hidden]
  float* layers;                 // null, or states after embeddings and each layer [layers + 1][tokens][hidden]
  int64_t tokens;                // of the whole batch: rows of one of `layers`
  const Pick* mlm;               // rows copied to `mlm_rows`
  int64_t mlm_count;
  void* mlm_rows;                // storage type, tiled; see MlmBlock::rows
  const Pick* pooled;            // rows copied to `pooled_rows`
  int64_t pooled_count;
  void* pooled_rows;
};

// Buffers of one chunk, and of one block of a head. The "storage type" is float32 in a float32 model, else bfloat16; the
// residual stream is float32, but bfloat16 in an int8 model.
struct ChunkBuffers {
  void* hidden;         // residual, tiled
  void* quantized;      // int8, tiled: inputs of qkv, attention_out and ffn_in; bfloat16 model: `hidden` in bfloat16
  float* row_scale;     // of `quantized` and `wide_quantized`
  void* qkv;            // row-major, a row padded to 64 bytes and 64 bytes more
  void* context;        // storage type, tiled: output of attention
  void* result;         // residual, tiled: output of attention_out and ffn_out
  void* wide;           // storage type, tiled: output of ffn_in
  void* wide_quantized; // int8, tiled
};

// Scratch of one thread.
struct ThreadBuffers {
  void* keys;           // packed as Matrix panels
  void* values;
  float* scores;
  void* probabilities;
  void* block;          // kGroupBlocks blocks [32][32] of int32 or float32
  float* rows;          // two rows in float32, each padded
  float* logits;        // [kHeadRows][kLogitStride]
};

// Blocks of sums in a thread's scratch: half of them wait for their epilogue while the others are computed.
inline constexpr int kGroupBlocks = 8;

// Rows of the masked-LM head that are computed together.
inline constexpr int kHeadRows = 64;
// Columns of the vocabulary in one task of the decoder; fixed, so that sums do not depend on the number of threads.
inline constexpr int kDecodeColumns = 512;
// From row to row of a task's logits; a multiple of 2 KB would put all rows into the same cache sets.
inline constexpr int kLogitStride = kDecodeColumns + 16;

struct MlmBlock {
  const void* rows;              // storage type, tiled, `count` rows from a multiple of 16
  int32_t count;                 // 1 .. kHeadRows
  // Each null if not wanted; of the block's rows, in order.
  float* logits;                 // [count][vocab]
  int64_t* top_ids;              // [count][top_k]; best first, equals by rising id
  float* top_log_probs;          // [count][top_k]
  int64_t top_k;
  const int64_t* candidates;     // [count][candidate_count]
  float* candidate_log_probs;    // [count][candidate_count]
  int64_t candidate_count;
};

// Shared by the threads that compute an MlmBlock.
struct MlmBuffers {
  ChunkBuffers chunk;            // for kHeadRows rows
  void* transformed;             // float32, tiled: what the head's LayerNorm reads
  float* maximum;                // [kHeadRows][chunks of the vocabulary]
  float* sum;                    // same
  void* heaps;                   // [threads][kHeadRows][top_k] of 8 bytes
  int32_t* heap_sizes;           // [threads][kHeadRows]
};

struct PoolBlock {
  const void* rows;              // storage type, tiled
  int32_t count;
  float* pooled;                 // [count][hidden], never null
  float* nsp;                    // [count][2] or null
};

struct KernelTable {
  const char* name;
  // At the beginning and end of a thread's part in a run: floating-point mode, tile configuration. Returns
  // what `leave` needs to restore.
  uint32_t (*enter)();
  void (*leave)(uint32_t state);
  // The encoder on one chunk. All members of `group` call it with the same chunk and their own scratch.
  void (*encode)(const Model& model, const Chunk& chunk, const ChunkBuffers& buffers, const ThreadBuffers& scratch,
                 Group& group, int rank);
  void (*mlm)(const Model& model, const MlmBlock& block, const MlmBuffers& buffers, const ThreadBuffers& scratch,
              Group& group, int rank);
  void (*pool)(const Model& model, const PoolBlock& block, const ChunkBuffers& buffers,
               const ThreadBuffers& scratch, Group& group, int rank);
  // int8 and bfloat16 (or float32) multiply-adds per call of a loop on registers: the peak that a machine reaches.
  int64_t (*peak_int8)(int64_t rounds);
  int64_t (*peak_float)(int64_t rounds);
};

}  // namespace bertrt
