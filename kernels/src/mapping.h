// A file mapped into memory, for reading.
#pragma once

#include <cstddef>

namespace bertrt {

// Its pages are shared with every process that maps the file. Nobody may shorten the file or write into it while it is
// mapped: pages that are cut off raise SIGBUS when they are read, which no library can turn into an error. To replace
// a file is harmless (write another one, then rename it), and is how the exporter does it.
class Mapping {
 public:
  // Throws Error: kNotFound; kBadFile if it is empty or no regular file, such as a folder or a pipe; kOutOfMemory;
  // kSystem.
  explicit Mapping(const char* path);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bertrt
