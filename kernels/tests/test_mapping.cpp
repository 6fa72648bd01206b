// Files in memory: mapped, or copied into huge pages; what cannot be read is an error of the right kind.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "error.h"
#include "mapping.h"

namespace {

using bertrt::ErrorCode;
using bertrt::Mapping;

// A file for one test.
class File {
 public:
  explicit File(const std::vector<unsigned char>& bytes) {
    const int number = mkstemp(path_);
    CHECK(number >= 0, "no temporary file");
    size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t count = write(number, bytes.data() + done, bytes.size() - done);
      CHECK(count > 0, "the temporary file cannot be written");
      done += static_cast<size_t>(count);
    }
    close(number);
  }
  ~File() { unlink(path_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  const char* path() const { return path_; }

 private:
  char path_[32] = "/tmp/bertrt-mapping-XXXXXX";
};

std::vector<unsigned char> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }

bool huge_pages_can_be_had() {
  try {
    bertrt::require_huge_pages();
    return true;
  } catch (const bertrt::Error& error) {
    CHECK(error.code() == ErrorCode::kUnsupported, "%s", error.what());
    return false;
  }
}

template <class Call>
void expect(ErrorCode code, const char* words, const Call& call) {
  try {
    call();
  } catch (const bertrt::Error& error) {
    CHECK(error.code() == code, "code %d: %s", static_cast<int>(error.code()), error.what());
    CHECK(std::strstr(error.what(), words) != nullptr, "'%s' is not in: %s", words, error.what());
    return;
  }
  CHECK(false, "no error, but '%s' was expected", words);
}

void both_ways_give_the_bytes_of_the_file() {
  // Less than a page, pages of both kinds and their neighbours.
  for (size_t size : {size_t{1}, size_t{4096}, size_t{2097151}, size_t{2097152}, size_t{5000001}}) {
    std::vector<unsigned char> bytes(size);
    uint32_t state = 1;
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>((state = state * 1664525u + 1013904223u) >> 24);
    const File file(bytes);
    for (bool huge : {false, true}) {
      if (huge && !huge_pages_can_be_had()) {
        expect(ErrorCode::kUnsupported, "huge pages were asked for", [&] { Mapping(file.path(), true); });
        continue;
      }
      const Mapping mapping(file.path(), huge);
      CHECK(mapping.size() == size, "%zu bytes instead of %zu", mapping.size(), size);
      CHECK(std::memcmp(mapping.data(), bytes.data(), size) == 0, "other bytes, huge %d", huge);
      const size_t alignment = huge ? size_t{2} << 20 : 4096;
      CHECK(reinterpret_cast<uintptr_t>(mapping.data()) % alignment == 0, "not aligned, huge %d", huge);
    }
  }
}

void what_is_no_file_is_an_error() {
  const File empty({});
  for (bool huge : {false, true}) {
    expect(ErrorCode::kNotFound, "No such file", [&] { Mapping("/tmp/bertrt-there-is-no-such-file", huge); });
    expect(ErrorCode::kBadFile, "is a folder", [&] { Mapping("/tmp", huge); });
    expect(ErrorCode::kBadFile, "is no regular file", [&] { Mapping("/dev/null", huge); });
    expect(ErrorCode::kBadFile, "is empty", [&] { Mapping(empty.path(), huge); });
  }
}

void huge_pages_that_cannot_be_had_are_an_error() {
  for (const char* modes : {"always [madvise] never\n", "[always] madvise never\n"}) {
    const File file(bytes_of(modes));
    bertrt::require_huge_pages(file.path());
  }
  const File off(bytes_of("always madvise [never]\n")), empty({});
  expect(ErrorCode::kUnsupported, "has them switched off", [&] { bertrt::require_huge_pages(off.path()); });
  expect(ErrorCode::kUnsupported, "has none", [&] { bertrt::require_huge_pages(empty.path()); });
  expect(ErrorCode::kUnsupported, "has none", [] { bertrt::require_huge_pages("/tmp/bertrt-there-is-no-such-file"); });
}

constexpr Test kTests[] = {
    {"both_ways_give_the_bytes_of_the_file", both_ways_give_the_bytes_of_the_file},
    {"what_is_no_file_is_an_error", what_is_no_file_is_an_error},
    {"huge_pages_that_cannot_be_had_are_an_error", huge_pages_that_cannot_be_had_are_an_error},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc, argv); }
