#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <system_error>

#include "error.h"

namespace bertrt {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() {
    if (number_ >= 0) close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

[[noreturn]] void fail(const char* path, const char* what, int error) {
  const bool missing = error == ENOENT || error == ENOTDIR;
  const ErrorCode code = missing           ? ErrorCode::kNotFound
                         : error == ENOMEM ? ErrorCode::kOutOfMemory
                                           : ErrorCode::kSystem;
  throw Error(code, "'" + std::string(path) + "' cannot be " + what + ": " + std::generic_category().message(error));
}

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

// Whoever asks for huge pages shall not get small ones without a word.
void require_huge_pages(const char* path) {
  char modes[128] = {};
  const Descriptor file(open(path, O_RDONLY | O_CLOEXEC));
  if (file.number() >= 0 && read(file.number(), modes, sizeof modes - 1) > 0 &&
      std::strstr(modes, "[never]") == nullptr) {
    return;
  }
  throw Error(ErrorCode::kUnsupported,
              std::string("huge pages were asked for, but this system ") +
                  (modes[0] == '\0' ? "has none" : "has them switched off") + " (" + path +
                  "); write madvise there as root, or leave the option out");
}

Mapping::Mapping(const char* path, bool huge) {
  // O_NONBLOCK: to open a pipe that nobody writes to would wait forever. It means nothing to a regular file.
  int number;
  do {
    number = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (number < 0 && errno == EINTR);
  const Descriptor file(number);
  if (file.number() < 0) fail(path, "opened", errno);
  struct stat status;
  if (fstat(file.number(), &status) != 0) fail(path, "examined", errno);
  if (!S_ISREG(status.st_mode)) {
    throw Error(ErrorCode::kBadFile, "'" + std::string(path) + "' is " +
                                         (S_ISDIR(status.st_mode) ? "a folder" : "no regular file") +
                                         "; a weight file (model.bertrt) was expected");
  }
  if (status.st_size <= 0) {
    throw Error(ErrorCode::kBadFile, "'" + std::string(path) + "' is empty; export the engine again");
  }
  if (static_cast<uint64_t>(status.st_size) > SIZE_MAX - 2 * kHugePage) fail(path, "mapped into memory", ENOMEM);
  size_ = static_cast<size_t>(status.st_size);
  if (huge) {
    copy(file.number(), path);
  } else {
    map(file.number(), path);
  }
}

void Mapping::map(int file, const char* path) {
  memory_bytes_ = size_;
  memory_ = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
  if (memory_ == MAP_FAILED) fail(path, "mapped into memory", errno);
  // Read ahead what is not in memory yet. Advice only: its failure is none.
  madvise(memory_, size_, MADV_WILLNEED);
  data_ = static_cast<const unsigned char*>(memory_);
}

void Mapping::copy(int file, const char* path) {
  require_huge_pages();
  const size_t whole = (size_ + kHugePage - 1) / kHugePage * kHugePage;
  memory_bytes_ = whole + kHugePage;
  memory_ = mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory_ == MAP_FAILED) fail(path, "copied into memory", errno);
  auto* const data = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory_) + kHugePage - 1) /
                                                      kHugePage * kHugePage);
  const auto give_up = [&](const char* what, int error) {
    munmap(memory_, memory_bytes_);
    fail(path, what, error);
  };
  if (madvise(data, whole, MADV_HUGEPAGE) != 0) give_up("copied into huge pages", errno);
  for (size_t done = 0; done < size_;) {
    const ssize_t count = pread(file, data + done, size_ - done, static_cast<off_t>(done));
    if (count > 0) {
      done += static_cast<size_t>(count);
    } else if (count == 0) {
      munmap(memory_, memory_bytes_);
      throw Error(ErrorCode::kBadFile, std::string("'") + path + "' became shorter while it was read; load it again");
    } else if (errno != EINTR) {
      give_up("read", errno);
    }
  }
  if (mprotect(data, whole, PROT_READ) != 0) give_up("copied into memory", errno);
  data_ = data;
}

Mapping::~Mapping() { munmap(memory_, memory_bytes_); }

}  // namespace bertrt
