// Drives a libFuzzer harness where there is no libFuzzer: mutates seeds at random, repeatably.
//   mutate SEEDS... -- SECONDS [NUMBER]
// The inputs depend on NUMBER alone. On a crash the last input lies in crash-input.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

constexpr size_t kHeader = 128, kRecord = 128;

size_t below(Random& random, size_t limit) { return limit == 0 ? 0 : static_cast<size_t>(random() % limit); }

uint64_t interesting(Random& random) {
  constexpr uint64_t kValues[] = {0,          1,          2,          3,          4,           15,         16,
                                  31,         32,         33,         63,         64,          65,         127,
                                  128,        255,        256,        257,        65535,       65536,      65537,
                                  1u << 24,   0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000, 0x7F800000, 0x7FC00000,
                                  UINT64_MAX, 1ull << 63, 1ull << 62, 0x80808080};
  return kValues[below(random, std::size(kValues))];
}

void put(Bytes& bytes, size_t at, uint64_t value, size_t width) {
  for (size_t i = 0; i < width && at + i < bytes.size(); ++i) bytes[at + i] = static_cast<uint8_t>(value >> (8 * i));
}

uint64_t get(const Bytes& bytes, size_t at, size_t width) {
  uint64_t value = 0;
  for (size_t i = 0; i < width && at + i < bytes.size(); ++i) value |= static_cast<uint64_t>(bytes[at + i]) << (8 * i);
  return value;
}

void mutate_once(Bytes& bytes, const Bytes& other, Random& random) {
  if (bytes.empty()) {
    bytes.assign(1 + below(random, 300), static_cast<uint8_t>(random()));
    return;
  }
  const size_t records = bytes.size() > kHeader ? (bytes.size() - kHeader) / kRecord : 0;
  // Mutations of the records go to those that are there.
  const size_t told = static_cast<size_t>(get(bytes, 24, 4));
  const size_t record = kHeader + below(random, told < records ? told : records) * kRecord;
  switch (below(random, 10)) {
    case 0:
      bytes[below(random, bytes.size())] ^= static_cast<uint8_t>(1u << below(random, 8));
      break;
    case 1:  // a field of the header
      put(bytes, 4 * below(random, 32), interesting(random), 4);
      break;
    case 2: {  // a field of the header, by a little
      const size_t at = 4 * below(random, 32);
      put(bytes, at, get(bytes, at, 4) + below(random, 7) - 3, 4);
      break;
    }
    case 3:  // a field of a record
      put(bytes, record + 64 + 8 * below(random, 8), interesting(random), 8);
      break;
    case 4: {  // a field of a record, by a little
      const size_t at = record + 64 + 8 * below(random, 8);
      put(bytes, at, get(bytes, at, 8) + (below(random, 3) - 1) * (below(random, 2) == 0 ? 1 : 64), 8);
      break;
    }
    case 5:  // a character of a name
      put(bytes, record + below(random, 64), random(), 1);
      break;
    case 6:  // another size, at times with as many records as before
      bytes.resize(below(random, 2) == 0 ? below(random, bytes.size()) : bytes.size() + below(random, 256));
      break;
    case 7: {  // a record in another's place
      const size_t from = kHeader + below(random, records) * kRecord;
      if (record + kRecord <= bytes.size() && from + kRecord <= bytes.size()) {
        std::memmove(bytes.data() + record, bytes.data() + from, kRecord);
      }
      break;
    }
    case 8: {  // a piece of another seed
      const size_t at = below(random, bytes.size()) / 4 * 4;
      const size_t length = below(random, 256);
      for (size_t i = at; i < at + length && i < bytes.size() && i < other.size(); ++i) bytes[i] = other[i];
      break;
    }
    default:  // a value
      put(bytes, below(random, bytes.size()) / 4 * 4, interesting(random), 4);
      break;
  }
}

Bytes read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(2);
  }
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<Bytes> seeds;
  int next = 1;
  for (; next < count && std::strcmp(arguments[next], "--") != 0; ++next) seeds.push_back(read_file(arguments[next]));
  if (seeds.empty() || next + 1 >= count) {
    std::fprintf(stderr, "usage: %s SEEDS... -- SECONDS [NUMBER]\n", arguments[0]);
    return 2;
  }
  const double seconds = std::atof(arguments[next + 1]);
  Random random(next + 2 < count ? std::strtoull(arguments[next + 2], nullptr, 10) : 0);
  for (const Bytes& seed : seeds) LLVMFuzzerTestOneInput(seed.data(), seed.size());
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  uint64_t runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    Bytes bytes = seeds[below(random, seeds.size())];
    const Bytes& other = seeds[below(random, seeds.size())];
    for (size_t i = below(random, 3); i < 3; ++i) mutate_once(bytes, other, random);
    std::ofstream("crash-input", std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()),
                                                         static_cast<std::streamsize>(bytes.size()));
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::remove("crash-input");
  std::printf("%llu inputs\n", static_cast<unsigned long long>(runs));
  return 0;
}
