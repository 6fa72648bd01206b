// Waiting for another thread: spinning, then sleeping until a word of memory changes. For pool.cpp.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <sched.h>

#include <climits>

namespace bertrt {

inline void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  asm volatile("yield");
#endif
}

// Sleeps while `word` is `expected`, or returns early. The system compares and goes to sleep in one step, so a
// wake_all that follows a change of the word is never missed.
inline void park(uint32_t& word, uint32_t expected) noexcept {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
  std::atomic_ref(word).wait(expected, std::memory_order_relaxed);
#endif
}

// Takes the address only: the word may be gone already, if its owner saw the change before this call.
inline void wake_all(uint32_t& word) noexcept {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  std::atomic_ref(word).notify_all();
#endif
}

// Polls `ready` until it holds or `limit` has passed; says whether it held. Where there are more threads than
// processors (`crowded`) spinning keeps the thread that is waited for from running, so the processor is offered to it.
template <typename Ready>
bool spin(bool crowded, std::chrono::microseconds limit, Ready ready) noexcept {
  constexpr int kPolls = 64;  // between looks at the clock: about a microsecond
  constexpr int kYields = 4;
  const auto poll = [&] {
    for (int i = 0; i < kPolls; ++i) {
      if (ready()) return true;
      relax();
    }
    return false;
  };
  if (poll()) return true;
  if (crowded) {
    for (int i = 0; i < kYields; ++i) {
      sched_yield();
      if (ready()) return true;
    }
    return false;
  }
  const auto end = std::chrono::steady_clock::now() + limit;
  do {
    if (poll()) return true;
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace bertrt
