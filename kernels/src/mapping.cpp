#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
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

}  // namespace

Mapping::Mapping(const char* path) {
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
  if (static_cast<uint64_t>(status.st_size) > SIZE_MAX) fail(path, "mapped into memory", ENOMEM);
  size_ = static_cast<size_t>(status.st_size);
  void* const memory = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.number(), 0);
  if (memory == MAP_FAILED) fail(path, "mapped into memory", errno);
  // Read ahead what is not in memory yet. Advice only: its failure is none.
  madvise(memory, size_, MADV_WILLNEED);
  data_ = static_cast<const unsigned char*>(memory);
}

Mapping::~Mapping() { munmap(const_cast<unsigned char*>(data_), size_); }

}  // namespace bertrt
