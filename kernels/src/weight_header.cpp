#include "weight_header.h"

#include <bit>
#include <cstring>

#include "crc32.h"

static_assert(std::endian::native == std::endian::little, "a weight file is little-endian");

namespace bertrt {
namespace {

constexpr char kMagic[8] = {'B', 'E', 'R', 'T', 'R', 'T', 'W', '\0'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 128;  // before the records
constexpr size_t kRecordBytes = 128;
constexpr size_t kNameBytes = 64;
constexpr size_t kCrcOffset = 28;

constexpr uint32_t kLargestDimension = 1u << 24;
constexpr uint32_t kLargestWidth = 1u << 16;  // an int32 holds this many products of an unsigned and a signed byte
constexpr uint32_t kHeadSizeStep = 32;
constexpr uint32_t kLargestHeadSize = 256;

constexpr uint32_t kFlagMlm = 1, kFlagNsp = 2, kFlagPooler = 4, kFlagTied = 8;
constexpr uint32_t kAllFlags = kFlagMlm | kFlagNsp | kFlagPooler | kFlagTied;

template <class T>
T read(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

bool is_zero(const unsigned char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    if (from[i] != 0) return false;
  }
  return true;
}

std::string number(uint64_t value) { return std::to_string(value); }

void check_start(const WeightBytes& file) {
  if (file.size < sizeof kMagic || std::memcmp(file.data, kMagic, sizeof kMagic) != 0) {
    throw file.problem("this is no weight file: it does not begin with 'BERTRTW'");
  }
  if (file.size < kHeaderBytes) {
    throw file.problem("the file ends within its header, after " + number(file.size) + " bytes");
  }
  const uint32_t version = read<uint32_t>(file.data + 8);
  if (version != kVersion) {
    throw Error(ErrorCode::kBadFile, "'" + file.name + "': the file has format version " + number(version) +
                                         ", this release reads " + number(kVersion) + "; " +
                                         (version > kVersion ? "update bertrt" : "export the engine again"));
  }
  const uint64_t size = read<uint64_t>(file.data + 16);
  if (size != file.size) {
    throw file.problem("the file has " + number(file.size) + " bytes, its header says " + number(size) +
                       ": it is truncated or was replaced");
  }
}

// The header's size in bytes, which lies within the file.
uint32_t check_extent(const WeightBytes& file) {
  const uint64_t bytes = read<uint32_t>(file.data + 12);
  const uint64_t tensors = read<uint32_t>(file.data + 24);
  const uint64_t implied = kHeaderBytes + tensors * kRecordBytes;  // below 2^40
  if (bytes != implied) {
    throw file.problem("the header is said to have " + number(bytes) + " bytes; with " + number(tensors) +
                       " tensors it has " + number(implied));
  }
  if (bytes > file.size) {
    throw file.problem("the header of " + number(bytes) + " bytes does not fit into the file of " + number(file.size));
  }
  const unsigned char zeros[4] = {0, 0, 0, 0};
  uint32_t crc = crc32(0, file.data, kCrcOffset);
  crc = crc32(crc, zeros, sizeof zeros);
  crc = crc32(crc, file.data + kCrcOffset + 4, static_cast<size_t>(bytes) - kCrcOffset - 4);
  if (crc != read<uint32_t>(file.data + kCrcOffset)) {
    throw file.problem("the checksum of the header is wrong: it is corrupt");
  }
  if (!is_zero(file.data + 32, 32) || !is_zero(file.data + 116, 12)) {
    throw file.problem("reserved bytes of the header are not zero");
  }
  return static_cast<uint32_t>(bytes);
}

int32_t read_dimension(const WeightBytes& file, const char* name, size_t offset, uint32_t largest) {
  const uint32_t value = read<uint32_t>(file.data + offset);
  if (value < 1 || value > largest) {
    throw file.problem(std::string(name) + " is " + number(value) + ", expected 1 to " + number(largest));
  }
  return static_cast<int32_t>(value);
}

uint32_t read_choice(const WeightBytes& file, const char* name, size_t offset, uint32_t largest) {
  const uint32_t value = read<uint32_t>(file.data + offset);
  if (value > largest) {
    throw file.problem(std::string("unknown ") + name + " " + number(value) + ", expected 0 to " + number(largest));
  }
  return value;
}

Architecture read_architecture(const WeightBytes& file) {
  Architecture sizes{};
  sizes.precision = static_cast<Precision>(read_choice(file, "precision", 64, 2));
  sizes.activation = static_cast<Activation>(read_choice(file, "activation", 68, 2));
  sizes.hidden = read_dimension(file, "the hidden size", 72, kLargestWidth);
  sizes.layers = read_dimension(file, "the number of layers", 76, kLargestDimension);
  sizes.heads = read_dimension(file, "the number of heads", 80, kLargestDimension);
  sizes.head_size = read_dimension(file, "the head size", 84, kLargestHeadSize);
  sizes.padded_head_size = read_dimension(file, "the padded head size", 88, kLargestHeadSize);
  sizes.intermediate = read_dimension(file, "the intermediate size", 92, kLargestWidth);
  sizes.vocab = read_dimension(file, "the size of the vocabulary", 96, kLargestDimension);
  sizes.positions = read_dimension(file, "the number of positions", 100, kLargestDimension);
  sizes.segments = read_dimension(file, "the number of segments", 104, kLargestDimension);
  if (static_cast<int64_t>(sizes.heads) * sizes.head_size != sizes.hidden) {
    throw file.problem(std::to_string(sizes.heads) + " heads of " + std::to_string(sizes.head_size) +
                       " do not make up the hidden size " + std::to_string(sizes.hidden));
  }
  const int32_t step = kHeadSizeStep;
  const int32_t padded = (sizes.head_size + step - 1) / step * step;
  if (sizes.padded_head_size != padded) {
    throw file.problem("the padded head size is " + std::to_string(sizes.padded_head_size) + ", expected " +
                       std::to_string(padded));
  }
  sizes.norm_epsilon = read<float>(file.data + 112);
  if (!(sizes.norm_epsilon >= 0.0f && sizes.norm_epsilon <= 1.0f)) {
    throw file.problem("the epsilon of LayerNorm is " + std::to_string(sizes.norm_epsilon) + ", expected 0 to 1");
  }
  const uint32_t flags = read<uint32_t>(file.data + 108);
  if ((flags & ~kAllFlags) != 0) throw file.problem("unknown flags " + number(flags & ~kAllFlags));
  sizes.has_mlm = (flags & kFlagMlm) != 0;
  sizes.has_nsp = (flags & kFlagNsp) != 0;
  sizes.has_pooler = (flags & kFlagPooler) != 0;
  sizes.tied_decoder = (flags & kFlagTied) != 0;
  if (sizes.has_nsp && !sizes.has_pooler) throw file.problem("there is a next-sentence head without a pooler");
  if (sizes.tied_decoder && !sizes.has_mlm) throw file.problem("there is a tied decoder without a masked-LM head");
  return sizes;
}

uint64_t count_tensors(const Architecture& sizes) {
  // A matrix of the precision's type has a scale and sums beside it in int8.
  const uint64_t matrix = sizes.precision == Precision::kInt8 ? 3 : 1;
  uint64_t count = matrix + 4;  // words; two tables; LayerNorm
  // Four matrices with biases, and two LayerNorms.
  count += static_cast<uint64_t>(sizes.layers) * (4 * (matrix + 1) + 2 * 2);
  if (sizes.has_mlm) count += 2 + 2 + (sizes.tied_decoder ? 0 : matrix) + 1;
  if (sizes.has_pooler) count += 2;
  if (sizes.has_nsp) count += 2;
  return count;
}

}  // namespace

WeightHeader read_weight_header(const WeightBytes& file) {
  check_start(file);
  WeightHeader header{};
  header.bytes = check_extent(file);
  header.tensors = read<uint32_t>(file.data + 24);
  header.architecture = read_architecture(file);
  const uint64_t implied = count_tensors(header.architecture);
  if (header.tensors != implied) {
    throw file.problem("there are " + number(header.tensors) + " tensors, the architecture implies " + number(implied));
  }
  return header;
}

WeightRecord read_weight_record(const WeightBytes& file, uint32_t index) {
  const unsigned char* const record = file.data + kHeaderBytes + static_cast<size_t>(index) * kRecordBytes;
  size_t length = 0;
  for (; length < kNameBytes && record[length] != 0; ++length) {
    // Such a name would reach a terminal in a message.
    if (record[length] < 0x21 || record[length] > 0x7E) {
      throw file.problem("the name of tensor " + number(index) + " has a character that is not printable ASCII");
    }
  }
  if (length == kNameBytes || !is_zero(record + length, kNameBytes - length)) {
    throw file.problem("the name of tensor " + number(index) + " is not filled up with zeros");
  }
  if (!is_zero(record + 108, 20)) throw file.problem("reserved bytes of tensor " + number(index) + " are not zero");
  WeightRecord result;
  result.name.assign(reinterpret_cast<const char*>(record), length);
  result.dtype = read<uint32_t>(record + 64);
  result.layout = read<uint32_t>(record + 68);
  result.rows = read<uint64_t>(record + 72);
  result.columns = read<uint64_t>(record + 80);
  result.offset = read<uint64_t>(record + 88);
  result.bytes = read<uint64_t>(record + 96);
  result.crc = read<uint32_t>(record + 104);
  return result;
}

}  // namespace bertrt
