// Memory of runs: reused, never shared by two at a time, given back when it is large or when the system has none.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "error.h"
#include "memory.h"

namespace {

using bertrt::Memory;

void a_block_is_reused() {
  Memory memory;
  void* first = nullptr;
  {
    const Memory::Block block(memory, 100'000);
    first = block.data();
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0, "not aligned");
    std::memset(first, 1, 100'000);
  }
  const Memory::Block same(memory, 50'000);
  CHECK(same.data() == first, "another block though the first was free and large enough");
  const Memory::Block other(memory, 50'000);
  CHECK(other.data() != first, "one block for two");
}

void a_larger_block_replaces_a_smaller() {
  Memory memory;
  { const Memory::Block block(memory, 64); }
  const size_t large = Memory::kLargestKept * 2;
  const Memory::Block block(memory, large);
  std::memset(block.data(), 1, large);
}

void what_cannot_be_had_is_an_error() {
  Memory memory;
  for (size_t bytes : {SIZE_MAX, SIZE_MAX - 64, SIZE_MAX / 2}) {
    bool refused = false;
    try {
      const Memory::Block block(memory, bytes);
    } catch (const bertrt::Error& error) {
      refused = error.code() == bertrt::ErrorCode::kOutOfMemory;
    }
    CHECK(refused, "%zu bytes", bytes);
  }
}

void threads_never_share_a_block() {
  Memory memory;
  std::vector<std::thread> threads;
  for (int id = 1; id <= 8; ++id) {
    threads.emplace_back([&memory, id] {
      for (int round = 0; round < 500; ++round) {
        const size_t bytes = 1000 + static_cast<size_t>(round % 7) * 1000;
        const Memory::Block block(memory, bytes);
        auto* data = static_cast<unsigned char*>(block.data());
        std::memset(data, id, bytes);
        std::this_thread::yield();
        CHECK(data[0] == id && data[bytes - 1] == id, "thread %d finds what another wrote", id);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

constexpr Test kTests[] = {
    {"a_block_is_reused", a_block_is_reused},
    {"a_larger_block_replaces_a_smaller", a_larger_block_replaces_a_smaller},
    {"what_cannot_be_had_is_an_error", what_cannot_be_had_is_an_error},
    {"threads_never_share_a_block", threads_never_share_a_block},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc, argv); }
