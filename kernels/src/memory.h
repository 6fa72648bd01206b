// Memory that an engine's runs work in. A block is kept after a run, for the next one.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>

namespace bertrt {

class Memory {
 public:
  // Blocks that wait for a run, and the size from which on a block is given back to the system instead.
  static constexpr size_t kSlots = 4;
  static constexpr size_t kLargestKept = size_t{64} << 20;

  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // A block of one run; gives itself back. Its contents are undefined.
  class Block {
   public:
    // Throws Error (kOutOfMemory).
    Block(Memory& memory, size_t bytes);
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    void* data() const { return data_; }  // aligned to 64 bytes

   private:
    Memory& memory_;
    void* data_;
    size_t bytes_;
  };

 private:
  // Without locks, so that a child of fork() never waits for a thread that it does not have.
  struct Slot {
    std::atomic<void*> data{nullptr};
  };
  std::array<Slot, kSlots> slots_;
};

}  // namespace bertrt
