// A model in memory: plain pointers into the weight file. Included by the files that are compiled once per
// instruction set, so it holds no functions (a linker keeps one copy of an inline function, and it may be the
// AVX-512 one).
#pragma once

#include <cstdint>

namespace bertrt {

enum class Precision : uint32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };
enum class Dtype : uint32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt32 = 3 };
enum class Activation : uint32_t { kGelu = 0, kGeluNew = 1, kRelu = 2 };

struct Architecture {
  Precision precision;
  Activation activation;
  int32_t hidden;            // width of the residual stream
  int32_t layers;
  int32_t heads;
  int32_t head_size;         // hidden / heads
  int32_t padded_head_size;  // head_size rounded up to a multiple of 32
  int32_t intermediate;
  int32_t vocab;
  int32_t positions;
  int32_t segments;
  float norm_epsilon;
  bool has_mlm;
  bool has_nsp;
  bool has_pooler;
  bool tied_decoder;         // the decoder is the table of words
};

// Weights of y = x W^T + b, in panels of 32 outputs.
//
// Element (output n, input k) of a type with g elements in four bytes (int8: 4, bfloat16: 2, float32: 1) lies at
//   panels[n / 32][k / (16 g)][n % 32 / 16][k % (16 g) / g][n % 16][k % g]
// so that each [16][16][g] is a tile of 1,024 bytes, whose 64-byte rows feed 16 outputs. Outputs are padded to a
// multiple of 32 and inputs to a multiple of 16 g with zeros. Every vector is padded with zeros to a multiple of 64.
struct Matrix {
  Dtype dtype;
  int32_t outputs;        // before padding
  int32_t inputs;         // before padding
  int32_t panel_count;    // ceil(outputs / 32)
  int32_t steps;          // ceil(inputs / (16 g)): 64-byte pieces of a row of x
  const void* panels;     // [panel_count][steps][2][16][64 bytes]
  const float* scale;     // int8: of each output; else null
  const int32_t* sums;    // int8: sum over the inputs of each output's weights; else null
  const float* bias;      // of each output, or null
};

struct Layer {
  Matrix qkv;             // outputs [3][heads][padded_head_size]: queries, keys, values
  Matrix attention_out;   // inputs [heads][padded_head_size]
  const float* attention_norm_gamma;
  const float* attention_norm_beta;
  Matrix ffn_in;
  Matrix ffn_out;
  const float* ffn_norm_gamma;
  const float* ffn_norm_beta;
};

struct Model {
  Architecture architecture;
  Matrix words;                  // outputs: vocabulary, inputs: hidden; without bias
  const float* position_table;   // [positions][hidden rounded up to a multiple of 64]
  const float* segment_table;    // [segments][same]
  const float* embedding_norm_gamma;
  const float* embedding_norm_beta;
  const Layer* layers;
  // Where the architecture has the head. The dense layers of the heads are bfloat16 in an int8 model.
  Matrix mlm_dense;
  const float* mlm_norm_gamma;
  const float* mlm_norm_beta;
  Matrix mlm_decoder;            // shares `panels`, `scale` and `sums` with `words` where tied
  Matrix pooler_dense;
  const float* nsp_weight;       // [2][hidden rounded up to a multiple of 64]
  float nsp_bias[2];
};

}  // namespace bertrt
