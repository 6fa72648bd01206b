// The parts of the pool: workers, and crews of them that serve one team. For pool.cpp and crew.cpp.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace bertrt {

class Pool;

// A thread that waits for mail from the crew that has hired it.
struct Worker {
  alignas(64) uint32_t mail = 0;  // see crew.cpp
  // Set by the crew's owner before it mails.
  Crew* crew = nullptr;
  int rank = 0;
  int processor = -1;                          // bound to it; -1: to all of `affinity`
  const std::vector<int>* affinity = nullptr;  // of the process
  // Of the worker's own.
  int bound_processor = -1;
  const std::vector<int>* bound_affinity = nullptr;
  int number = 0;
};

// The workers of a team, and what they are to run.
struct Crew {
  Pool* pool = nullptr;
  int counted = 0;               // threads that it takes from the pool's capacity
  std::vector<Worker*> workers;  // of ranks 1 and up
  Team::Body body = nullptr;
  void* context = nullptr;
  alignas(64) uint32_t unfinished = 0;  // twice the workers that have not finished, plus kSleeping
  Group group{1};

  void set_size(int size) { group.size_ = size; }
  // Has the workers run `body`. What the caller wrote before is released to them with the mail.
  void start() noexcept;
  void start_workers_of(int rank) noexcept;
  void finish() noexcept;
  void wait_for_workers() noexcept;
};

// Threads at work, for those who must decide how long to spin. A hint: nothing depends on when it is seen.
struct Load {
  std::atomic<bool> crowded{false};      // more threads than processors
  std::atomic<int> processors{1 << 30};  // known when there is a pool
};
extern Load thread_load;

// Whether the calling thread is a member of a team.
extern constinit thread_local bool is_member;

// Starts the thread of a worker. Throws Error (kSystem).
void start_thread(Worker& worker);

}  // namespace bertrt
