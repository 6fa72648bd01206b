// The weight file: opened, checked, mapped. The format is described in kernels/FORMAT.md.
#pragma once

#include <cstddef>
#include <memory>

#include "model.h"

namespace bertrt {

class Weights {
 public:
  // Maps a file, or copies it into huge pages (see mapping.h), and checks it: header, table, every tensor's place, type and shape against the architecture, scales
  // finite and positive, no NaN or infinity in floating-point tensors; with `verify` also every checksum, and the
  // sums beside int8 weights. Nobody may shorten the file while it is open (see mapping.h).
  // Throws Error: kNotFound, kBadFile, kUnsupported, kOutOfMemory, kSystem.
  static std::unique_ptr<Weights> open(const char* path, bool verify, bool huge = false);
  // The same of a file in memory, which stays the caller's, outlives the result and is aligned to 64 bytes; `name` is
  // for messages. Throws Error: kInvalidArgument, kBadFile; std::bad_alloc.
  static std::unique_ptr<Weights> parse(const void* data, size_t bytes, const char* name, bool verify);
  ~Weights();
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  const Model& model() const;
  size_t bytes() const;  // of the file

 private:
  Weights();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bertrt
