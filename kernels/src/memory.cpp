#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "error.h"

namespace bertrt {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;

// Before the memory of a block that is kept: how large it is.
struct Header {
  size_t bytes;
};
static_assert(sizeof(Header) <= kAlignment);

size_t bytes_of(const void* block) { return static_cast<const Header*>(block)->bytes; }

void* allocate(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  const size_t alignment = huge ? kHugePage : kAlignment;
  // Whole pages, or the last one would be a small one's many.
  if (huge && bytes <= SIZE_MAX - kHugePage) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* block = nullptr;
  if (posix_memalign(&block, alignment, bytes) != 0) return nullptr;
#if defined(__linux__)
  // A refusal costs speed only.
  if (huge) (void)madvise(block, bytes, MADV_HUGEPAGE);
#endif
  static_cast<Header*>(block)->bytes = bytes;
  return block;
}

}  // namespace

Memory::~Memory() {
  for (Slot& slot : slots_) std::free(slot.data.load(std::memory_order_acquire));
}

Memory::Block::Block(Memory& memory, size_t bytes) : memory_(memory), data_(nullptr), bytes_(bytes + kAlignment) {
  if (bytes_ < bytes) throw Error(ErrorCode::kOutOfMemory, "the batch needs more memory than can be addressed");
  void* block = nullptr;
  for (Slot& slot : memory_.slots_) {
    block = slot.data.exchange(nullptr, std::memory_order_acquire);
    if (block != nullptr && bytes_of(block) >= bytes_) break;
    // What is too small makes room for something larger.
    std::free(block);
    block = nullptr;
  }
  if (block == nullptr) block = allocate(bytes_);
  if (block == nullptr) {
    throw Error(ErrorCode::kOutOfMemory, "not enough memory: the run needs " + std::to_string((bytes_ >> 20) + 1) +
                                             " MiB to work in; run smaller batches or fewer at once");
  }
  bytes_ = bytes_of(block);
  data_ = static_cast<char*>(block) + kAlignment;
#if BERTRT_POISON
  // NaN as bfloat16 and as float32, also after rounding from one to the other: what reads memory that nobody has written
  // gives itself away.
  std::fill_n(reinterpret_cast<uint16_t*>(data_), bytes / sizeof(uint16_t), uint16_t{0x7fc1});
#endif
}

Memory::Block::~Block() {
  void* block = static_cast<char*>(data_) - kAlignment;
  if (bytes_ <= kLargestKept) {
    for (Slot& slot : memory_.slots_) {
      void* empty = nullptr;
      if (slot.data.compare_exchange_strong(empty, block, std::memory_order_release, std::memory_order_relaxed)) return;
    }
  }
  std::free(block);
}

}  // namespace bertrt
