// A file in memory, for reading: mapped, or copied into pages of 2 MB.
#pragma once

#include <cstddef>

namespace bertrt {

// A mapped file's pages are shared with every process that maps it. Nobody may shorten the file or write into it while it is
// mapped: pages that are cut off raise SIGBUS when they are read, which no library can turn into an error. To replace
// a file is harmless (write another one, then rename it), and is how the exporter does it.
//
// With `huge` the file is copied instead, into transparent huge pages, which no file system gives for a mapped file:
// fewer misses of the TLB where weights are read once for few tokens. The copy is this process's own.
// Throws Error (kUnsupported) unless transparent huge pages can be had. `path`: the system's switch, or its like for
// tests.
void require_huge_pages(const char* path = "/sys/kernel/mm/transparent_hugepage/enabled");

class Mapping {
 public:
  // Throws Error: kNotFound; kBadFile if it is empty or no regular file, such as a folder or a pipe; kUnsupported if
  // huge pages are wanted where the system has them switched off; kOutOfMemory; kSystem.
  explicit Mapping(const char* path, bool huge = false);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void map(int file, const char* path);
  void copy(int file, const char* path);

  const unsigned char* data_ = nullptr;
  size_t size_ = 0;
  void* memory_ = nullptr;  // what has to be given back
  size_t memory_bytes_ = 0;
};

}  // namespace bertrt
