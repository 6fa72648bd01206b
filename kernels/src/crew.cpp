#include "crew.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <string>
#include <system_error>

#include "cpus.h"
#include "error.h"
#include "wait.h"

namespace bertrt {
namespace {

using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using Atomic = std::atomic_ref<uint32_t>;

constexpr std::chrono::microseconds kBarrierSpin{40};
constexpr std::chrono::microseconds kIdleSpin{150};
constexpr size_t kStackBytes = 1 << 20;
constexpr int kFanOut = 4;  // workers that one member of a crew starts, so that waking many takes few steps

// Of a word that threads wait on: its lowest bit says that one may sleep.
constexpr uint32_t kSleeping = 1;

// A worker's mail; kSleeping while it sleeps without any.
constexpr uint32_t kNoMail = 0;
constexpr uint32_t kMail = 2;

}  // namespace

Load thread_load;
constinit thread_local bool is_member = false;

Group::Group(int size) : size_(size) {}

int Group::size() const { return size_; }

void Group::barrier() noexcept {
  if (size_ == 1) return;
  const Atomic arrived(arrived_), phase(phase_);
  // Not out of date: this member saw the present phase when it left the last barrier, and the next one waits for it.
  const uint32_t now = phase.load(memory_order_relaxed) & ~kSleeping;
  // Every arrival releases, the last acquires them all and releases them to the others through the phase.
  if (arrived.fetch_add(1, memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    arrived.store(0, memory_order_relaxed);  // nobody arrives again before the phase changes
    if (phase.exchange(now + 2, memory_order_acq_rel) & kSleeping) wake_all(phase_);
    return;
  }
  const auto passed = [&] { return (phase.load(memory_order_acquire) & ~kSleeping) != now; };
  const bool crowded =
      thread_load.crowded.load(memory_order_relaxed) || size_ > thread_load.processors.load(memory_order_relaxed);
  if (spin(crowded, kBarrierSpin, passed)) return;
  // The bit and the phase are one word: either the exchange above sees the bit, or this does not set it.
  for (uint32_t seen = now; !passed(); seen = now) {
    if (phase.compare_exchange_strong(seen, now | kSleeping, memory_order_acquire) || seen == (now | kSleeping)) {
      park(phase_, now | kSleeping);
    }
  }
}

namespace {

void wait_for_mail(Worker& worker) noexcept {
  const Atomic mail(worker.mail);
  const auto arrived = [&] { return mail.load(memory_order_acquire) == kMail; };
  if (!spin(thread_load.crowded.load(memory_order_relaxed), kIdleSpin, arrived)) {
    uint32_t seen = kNoMail;
    mail.compare_exchange_strong(seen, kSleeping, memory_order_acquire);
    while (!arrived()) park(worker.mail, kSleeping);
  }
  // The next mail comes after the crew's owner has seen this one's work finished, so it is not overwritten here.
  mail.store(kNoMail, memory_order_relaxed);
}

void send_mail(Worker& worker) noexcept {
  if (Atomic(worker.mail).exchange(kMail, memory_order_acq_rel) == kSleeping) wake_all(worker.mail);
}

void move_to_its_processor(Worker& worker) noexcept {
  if (worker.processor == worker.bound_processor && worker.affinity == worker.bound_affinity) return;
  worker.bound_processor = worker.processor;
  worker.bound_affinity = worker.affinity;
  // A refusal (a processor that has gone offline) costs speed only.
  if (worker.processor < 0 || !bind_this_thread(&worker.processor, 1)) {
    bind_this_thread(worker.affinity->data(), worker.affinity->size());
  }
}

void* work(void* argument) noexcept {
  Worker& worker = *static_cast<Worker*>(argument);
#ifdef __linux__
  char name[16];
  std::snprintf(name, sizeof name, "bertrt-%d", worker.number);
  pthread_setname_np(pthread_self(), name);
#endif
  is_member = true;
  for (;;) {
    wait_for_mail(worker);
    Crew& crew = *worker.crew;
    crew.start_workers_of(worker.rank);
    move_to_its_processor(worker);
    crew.body(crew.context, crew.group, worker.rank);
    crew.finish();
  }
}

}  // namespace

void Crew::start() noexcept {
  Atomic(unfinished).store(static_cast<uint32_t>(workers.size()) * 2, memory_order_relaxed);
  start_workers_of(0);
}

void Crew::start_workers_of(int rank) noexcept {
  const int end = std::min(rank * kFanOut + kFanOut, static_cast<int>(workers.size()));
  for (int i = rank * kFanOut; i < end; ++i) send_mail(*workers[i]);
}

void Crew::finish() noexcept {
  // The crew may serve another team as soon as its owner has seen the last one: not touched after that. The last
  // one leaves kSleeping alone, and wakes nobody if the owner has not set it.
  if (Atomic(unfinished).fetch_sub(2, memory_order_acq_rel) == (2 | kSleeping)) wake_all(unfinished);
}

void Crew::wait_for_workers() noexcept {
  const Atomic left(unfinished);
  const auto finished = [&] { return left.load(memory_order_acquire) <= kSleeping; };
  if (spin(thread_load.crowded.load(memory_order_relaxed), kBarrierSpin, finished)) return;
  left.fetch_or(kSleeping, memory_order_relaxed);
  for (uint32_t seen; (seen = left.load(memory_order_acquire)) > kSleeping;) park(unfinished, seen);
}

void start_thread(Worker& worker) {
  // Signals are for the program's own threads, save those that an instruction of the worker itself raises: blocked,
  // they would end the process past any handler.
  sigset_t blocked, before;
  sigfillset(&blocked);
  for (const int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS}) sigdelset(&blocked, fault);
  pthread_attr_t attributes;
  int problem = pthread_attr_init(&attributes);
  if (problem == 0) {
    pthread_t thread;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, kStackBytes);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    problem = pthread_create(&thread, &attributes, work, &worker);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
  }
  if (problem != 0) {
    throw Error(ErrorCode::kSystem, "cannot start worker thread " + std::to_string(worker.number) + ": " +
                                        std::system_category().message(problem) +
                                        "; ask for fewer threads, or raise the limit on processes (ulimit -u)");
  }
}

}  // namespace bertrt
