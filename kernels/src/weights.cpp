// The tensors of a weight file. The architecture implies each one's name, type, shape and place, so the records are
// walked in the only order that they can have, and what a record says is compared, never believed.
#include "weights.h"

#include <cstdint>
#include <iterator>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "crc32.h"
#include "error.h"
#include "mapping.h"
#include "weight_header.h"
#include "weight_values.h"

namespace bertrt {

struct Weights::State {
  std::unique_ptr<Mapping> mapping;  // null if the bytes are the caller's
  size_t bytes = 0;
  std::vector<Layer> layers;
  Model model{};
};

namespace {

constexpr uint64_t kAlign = 64;
constexpr uint64_t kRowElements = 64;
constexpr uint64_t kPanelOutputs = 32;
constexpr uint64_t kPieceBytes = 64;  // of a row of x

const char* dtype_name(uint32_t dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "int8", "int32"};
  return dtype < std::size(kNames) ? kNames[dtype] : "unknown";
}

const char* layout_name(uint32_t layout) {
  return layout == kLayoutRows ? "rows" : layout == kLayoutPanels ? "panels" : "unknown";
}

uint64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kInt8 ? 1 : dtype == Dtype::kBfloat16 ? 2 : 4;
}

std::string shape_name(uint64_t rows, uint64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

// Walks the records of a file. Every function throws Error of code kBadFile.
class Reader {
 public:
  Reader(const WeightBytes& file, const WeightHeader& header, bool verify)
      : file_(file), header_(header), verify_(verify), end_(header.bytes) {}

  Matrix matrix(const std::string& name, Dtype dtype, int32_t outputs, int32_t inputs, bool has_bias) {
    Matrix matrix{};
    matrix.dtype = dtype;
    matrix.outputs = outputs;
    matrix.inputs = inputs;
    const uint64_t group = kPieceBytes / element_bytes(dtype);
    matrix.panel_count = static_cast<int32_t>((outputs + kPanelOutputs - 1) / kPanelOutputs);
    matrix.steps = static_cast<int32_t>((inputs + group - 1) / group);
    matrix.panels = tensor(name, dtype, kLayoutPanels, outputs, inputs);
    if (dtype == Dtype::kInt8) {
      matrix.scale = static_cast<const float*>(tensor(name + ".scale", Dtype::kFloat32, kLayoutRows, 1, outputs));
      if (!are_scales(matrix.scale, outputs)) throw problem(name + ".scale", "has a scale that is not above zero");
      matrix.sums = static_cast<const int32_t*>(tensor(name + ".sums", Dtype::kInt32, kLayoutRows, 1, outputs));
      if (verify_) check_int8_values(name, matrix);
    }
    if (verify_ && !are_panels_padded(matrix.panels, element_bytes(dtype), matrix.panel_count, matrix.steps, outputs,
                                      inputs)) {
      throw problem(name, "is not padded with zeros");
    }
    if (has_bias) matrix.bias = vector(name + ".bias", outputs);
    return matrix;
  }

  const float* vector(const std::string& name, int32_t columns) { return rows(name, 1, columns); }

  const float* rows(const std::string& name, int32_t rows, int32_t columns) {
    return static_cast<const float*>(tensor(name, Dtype::kFloat32, kLayoutRows, rows, columns));
  }

  // Call it after the last tensor.
  void finish() const {
    if (index_ != header_.tensors) throw file_.problem("there are records of tensors that nobody reads");
    if (end_ != file_.size) {
      throw file_.problem("the file has " + std::to_string(file_.size) + " bytes, its last tensor ends after " +
                          std::to_string(end_));
    }
  }

 private:
  // The next tensor, checked.
  const void* tensor(const std::string& name, Dtype dtype, uint32_t layout, uint64_t rows, uint64_t columns) {
    if (index_ >= header_.tensors) throw file_.problem("there is no tensor '" + name + "'");
    const WeightRecord record = read_weight_record(file_, index_);
    if (record.name != name) {
      throw file_.problem("tensor " + std::to_string(index_) + " is '" + record.name + "', expected '" + name + "'");
    }
    ++index_;
    if (record.dtype != static_cast<uint32_t>(dtype)) {
      throw problem(name, std::string("is of type ") + dtype_name(record.dtype) + " (" +
                              std::to_string(record.dtype) + "), expected " +
                              dtype_name(static_cast<uint32_t>(dtype)));
    }
    if (record.layout != layout) {
      throw problem(name, std::string("lies in layout ") + layout_name(record.layout) + " (" +
                              std::to_string(record.layout) + "), expected " + layout_name(layout));
    }
    if (record.rows != rows || record.columns != columns) {
      throw problem(name, "has shape " + shape_name(record.rows, record.columns) + ", the architecture implies " +
                              shape_name(rows, columns));
    }
    const uint64_t bytes = size(name, dtype, layout, rows, columns);
    if (record.bytes != bytes) {
      throw problem(name, "has " + std::to_string(record.bytes) + " bytes, its shape implies " + std::to_string(bytes));
    }
    // The header's size and that of every tensor are multiples of 64, so there are no gaps.
    const uint64_t offset = end_;
    if (record.offset != offset) {
      throw problem(name, "begins at byte " + std::to_string(record.offset) + ", expected " + std::to_string(offset));
    }
    if (bytes > file_.size - offset) {
      throw problem(name, "has " + std::to_string(bytes) + " bytes from byte " + std::to_string(offset) +
                              ", beyond the end of the file of " + std::to_string(file_.size));
    }
    end_ = offset + bytes;
    const void* const data = file_.data + offset;
    check_values(name, record, data);
    return data;
  }

  // In bytes, padding included.
  uint64_t size(const std::string& name, Dtype dtype, uint32_t layout, uint64_t rows, uint64_t columns) const {
    const uint64_t element = element_bytes(dtype);
    uint64_t row = 0, padded = rows, result = 0;
    bool overflow = __builtin_mul_overflow(columns, element, &row);
    const uint64_t piece = layout == kLayoutRows ? kRowElements * element : kPieceBytes;
    overflow |= __builtin_add_overflow(row, piece - 1, &row);
    row = row / piece * piece;
    if (layout == kLayoutPanels) {
      overflow |= __builtin_add_overflow(rows, kPanelOutputs - 1, &padded);
      padded = padded / kPanelOutputs * kPanelOutputs;
    }
    overflow |= __builtin_mul_overflow(row, padded, &result);
    if (overflow) throw problem(name, "is larger than any file");
    return result;
  }

  void check_values(const std::string& name, const WeightRecord& record, const void* data) const {
    if (verify_ && crc32(0, data, record.bytes) != record.crc) {
      throw problem(name, "does not match its checksum: the file is corrupt");
    }
    const Dtype dtype = static_cast<Dtype>(record.dtype);
    const bool finite = dtype == Dtype::kFloat32    ? are_finite_float32(data, record.bytes)
                        : dtype == Dtype::kBfloat16 ? are_finite_bfloat16(data, record.bytes)
                                                    : true;
    if (!finite) throw problem(name, "has values that are NaN or infinite");
    if (record.layout == kLayoutRows) {
      const uint64_t padded = (record.columns + kRowElements - 1) / kRowElements * kRowElements;
      if (!is_padded_with_zeros(data, record.rows, record.columns, padded)) {
        throw problem(name, "is not padded with zeros");
      }
    }
  }

  void check_int8_values(const std::string& name, const Matrix& matrix) const {
    switch (check_int8(matrix.panels, matrix.panel_count, matrix.steps, matrix.outputs, matrix.sums)) {
      case Int8Problem::kNone:
        return;
      case Int8Problem::kRange:
        throw problem(name, "has the value -128, expected -127 to 127");
      case Int8Problem::kSums:
        throw problem(name, "has sums other than those in '" + name + ".sums'");
    }
  }

  Error problem(const std::string& name, const std::string& what) const {
    return file_.problem("tensor '" + name + "' " + what);
  }

  const WeightBytes& file_;
  const WeightHeader& header_;
  const bool verify_;
  uint32_t index_ = 0;
  uint64_t end_;  // of the header, then of the last tensor; within the file
};

Layer read_layer(Reader& reader, const Architecture& sizes, int32_t index, Dtype dtype) {
  const std::string name = "layer." + std::to_string(index);
  const int32_t padded = sizes.heads * sizes.padded_head_size;
  Layer layer{};
  layer.qkv = reader.matrix(name + ".qkv", dtype, 3 * padded, sizes.hidden, true);
  layer.attention_out = reader.matrix(name + ".attention_out", dtype, sizes.hidden, padded, true);
  layer.attention_norm_gamma = reader.vector(name + ".attention_norm.gamma", sizes.hidden);
  layer.attention_norm_beta = reader.vector(name + ".attention_norm.beta", sizes.hidden);
  layer.ffn_in = reader.matrix(name + ".ffn_in", dtype, sizes.intermediate, sizes.hidden, true);
  layer.ffn_out = reader.matrix(name + ".ffn_out", dtype, sizes.hidden, sizes.intermediate, true);
  layer.ffn_norm_gamma = reader.vector(name + ".ffn_norm.gamma", sizes.hidden);
  layer.ffn_norm_beta = reader.vector(name + ".ffn_norm.beta", sizes.hidden);
  return layer;
}

void read_model(const WeightBytes& file, bool verify, Model& model, std::vector<Layer>& layers) {
  const WeightHeader header = read_weight_header(file);
  Reader reader(file, header, verify);
  model.architecture = header.architecture;
  const Architecture& sizes = model.architecture;
  const Dtype dtype = sizes.precision == Precision::kInt8       ? Dtype::kInt8
                      : sizes.precision == Precision::kBfloat16 ? Dtype::kBfloat16
                                                                : Dtype::kFloat32;
  const Dtype small = dtype == Dtype::kFloat32 ? Dtype::kFloat32 : Dtype::kBfloat16;
  model.words = reader.matrix("embeddings.words", dtype, sizes.vocab, sizes.hidden, false);
  model.position_table = reader.rows("embeddings.positions", sizes.positions, sizes.hidden);
  model.segment_table = reader.rows("embeddings.segments", sizes.segments, sizes.hidden);
  model.embedding_norm_gamma = reader.vector("embeddings.norm.gamma", sizes.hidden);
  model.embedding_norm_beta = reader.vector("embeddings.norm.beta", sizes.hidden);
  // The file has a dozen records for each, so they take less memory than the file.
  layers.reserve(static_cast<size_t>(sizes.layers));
  for (int32_t i = 0; i < sizes.layers; ++i) layers.push_back(read_layer(reader, sizes, i, dtype));
  model.layers = layers.data();
  if (sizes.has_mlm) {
    model.mlm_dense = reader.matrix("mlm.dense", small, sizes.hidden, sizes.hidden, true);
    model.mlm_norm_gamma = reader.vector("mlm.norm.gamma", sizes.hidden);
    model.mlm_norm_beta = reader.vector("mlm.norm.beta", sizes.hidden);
    model.mlm_decoder =
        sizes.tied_decoder ? model.words : reader.matrix("mlm.decoder", dtype, sizes.vocab, sizes.hidden, false);
    model.mlm_decoder.bias = reader.vector("mlm.decoder.bias", sizes.vocab);
  }
  if (sizes.has_pooler) model.pooler_dense = reader.matrix("pooler.dense", small, sizes.hidden, sizes.hidden, true);
  if (sizes.has_nsp) {
    model.nsp_weight = reader.rows("nsp.weight", 2, sizes.hidden);
    const float* const bias = reader.vector("nsp.bias", 2);
    model.nsp_bias[0] = bias[0];
    model.nsp_bias[1] = bias[1];
  }
  reader.finish();
}

}  // namespace

Weights::Weights() : state_(std::make_unique<State>()) {}
Weights::~Weights() = default;

std::unique_ptr<Weights> Weights::open(const char* path, bool verify, bool huge) {
  try {
    auto mapping = std::make_unique<Mapping>(path, huge);
    std::unique_ptr<Weights> weights = parse(mapping->data(), mapping->size(), path, verify);
    weights->state_->mapping = std::move(mapping);
    return weights;
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kOutOfMemory, "'" + std::string(path) + "' cannot be read: not enough memory");
  }
}

std::unique_ptr<Weights> Weights::parse(const void* data, size_t bytes, const char* name, bool verify) {
  if (reinterpret_cast<uintptr_t>(data) % kAlign != 0) {
    throw Error(ErrorCode::kInvalidArgument, "'" + std::string(name) + "' lies in memory that is not aligned to 64");
  }
  std::unique_ptr<Weights> weights(new Weights());
  State& state = *weights->state_;
  state.bytes = bytes;
  const WeightBytes file{static_cast<const unsigned char*>(data), bytes, name};
  read_model(file, verify, state.model, state.layers);
  return weights;
}

const Model& Weights::model() const { return state_->model; }

size_t Weights::bytes() const { return state_->bytes; }

}  // namespace bertrt
