// The process's threads: teams that run one body together, and the barrier between their members.
#pragma once

#include <cstdint>

namespace bertrt {

struct Crew;  // pool.cpp

// The members of a team that compute something together. A group of one has a barrier that does nothing.
class Group {
 public:
  explicit Group(int size);
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int size() const;
  // Waits until every member has come here: spins briefly, then sleeps. Every member must call it equally often.
  // What a member wrote before is seen by all after. Nobody touches the group once every member has returned.
  void barrier() noexcept;

 private:
  friend struct Crew;
  int size_;
  // Accessed with std::atomic_ref in pool.cpp.
  alignas(64) uint32_t arrived_ = 0;  // members that have come
  alignas(64) uint32_t phase_ = 0;    // twice the barriers passed, plus one if a member may sleep
};

// Threads for one run: the caller (rank 0) and workers. Acquired from the process-wide pool, which never hands
// out more threads at a time than the process has processors, unless one run alone asks for more: a team may have
// fewer members than asked for, and waits, first come first served, when there is no processor left at all.
// A thread that is a member of a team already gets itself alone: waiting for itself would never end. Constructed,
// run and destroyed by one thread; a child of fork() makes its own.
class Team {
 public:
  using Body = void (*)(void* context, Group& group, int rank);

  // `wanted` >= 1, else Error (kInvalidArgument). With `pin` each worker is bound to a processor of its own, not the
  // caller. Throws Error (kOutOfMemory, kSystem) when threads cannot be started.
  explicit Team(int wanted, bool pin = false);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const;
  // Runs `body` once on every member, returns when all have returned. `body` must not throw. May be called again.
  void run(Body body, void* context) noexcept;

 private:
  Crew* crew_;
};

// Processors that this process may really use at once: its affinity, cut by the control groups' quota rounded up.
int usable_processors();

}  // namespace bertrt
