// Lifetimes: the pool, its workers and its crews are never freed. Threads may so be parked on them, or about to wake
// one another, when the process ends; and a child of fork() leaves its parent's pool behind and makes a new one.
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "cpus.h"
#include "crew.h"
#include "error.h"

namespace bertrt {
namespace {

using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kAffinityAge{100};  // until it is read again

}  // namespace

class Pool {
 public:
  Pool() : quota_(processor_quota()) {}
  // The process's pool. Made without a lock: a fork may happen at any point of another thread's way through here.
  static Pool& current();
  static void leave_behind() noexcept;
  static bool is_current(const Pool* pool) noexcept { return current_.load(memory_order_acquire) == pool; }

  Crew* acquire(int wanted, bool pin);
  void release(Crew* crew) noexcept;

 private:
  struct Waiter {
    int wanted;
    int granted = 0;
    std::condition_variable ready;
  };

  void read_affinity();
  int admit(std::unique_lock<std::mutex>& lock, int wanted);
  void count(int threads) noexcept;
  void discharge(Crew* crew) noexcept;
  void hire(Crew* crew, int size);
  void start_worker();
  void place(Crew* crew, bool pin);

  static std::atomic<Pool*> current_;
  static Pool* left_behind_;

  Pool* older_ = nullptr;  // left behind by a parent process; known so that it is no leak
  std::mutex mutex_;       // guards all that follows
  const std::optional<double> quota_;
  std::vector<std::unique_ptr<const std::vector<int>>> affinities_;  // every one that there ever was
  const std::vector<int>* affinity_ = nullptr;
  Clock::time_point affinity_read_;
  int capacity_ = 1;
  int busy_ = 0;  // threads of teams; above the capacity if one asked for more when it was alone
  std::deque<Waiter*> waiters_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::unique_ptr<Crew>> crews_;
  std::vector<Worker*> idle_workers_;  // with room for all, so that giving one back cannot fail
  std::vector<Crew*> idle_crews_;      // same
  std::vector<char> taken_;            // by processor; scratch of place()
};

std::atomic<Pool*> Pool::current_{nullptr};
Pool* Pool::left_behind_ = nullptr;

namespace {

// Before main, not when the pool is made: else a fork could come in between.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { Pool::leave_behind(); });

}  // namespace

Pool& Pool::current() {
  Pool* pool = current_.load(memory_order_acquire);
  if (pool == nullptr) {
    auto made = std::make_unique<Pool>();
    if (current_.compare_exchange_strong(pool, made.get(), memory_order_acq_rel, memory_order_acquire)) {
      pool = made.release();
    }
  }
  return *pool;
}

// In the child of a fork: of the parent's threads there is only this one, whatever the others held stays held.
void Pool::leave_behind() noexcept {
  if (Pool* pool = current_.exchange(nullptr, memory_order_acq_rel)) {
    pool->older_ = left_behind_;
    left_behind_ = pool;
  }
  thread_load.crowded.store(false, memory_order_relaxed);
  is_member = false;
}

Crew* Pool::acquire(int wanted, bool pin) {
  std::unique_lock lock(mutex_);
  read_affinity();
  if (idle_crews_.empty()) {
    crews_.reserve(crews_.size() + 1);
    idle_crews_.reserve(crews_.size() + 1);
    crews_.push_back(std::make_unique<Crew>());
    crews_.back()->pool = this;
    idle_crews_.push_back(crews_.back().get());
  }
  Crew* crew = idle_crews_.back();
  idle_crews_.pop_back();
  crew->counted = 0;
  int size = 1;
  try {
    if (!is_member) size = crew->counted = admit(lock, wanted);
    hire(crew, size);
    place(crew, pin);
  } catch (...) {
    discharge(crew);
    throw;
  }
  crew->set_size(size);
  if (crew->counted) is_member = true;
  return crew;
}

void Pool::release(Crew* crew) noexcept {
  const std::lock_guard lock(mutex_);
  if (crew->counted) is_member = false;
  discharge(crew);
}

// Gives back what a crew has, and grants it to those who wait.
void Pool::discharge(Crew* crew) noexcept {
  // The last first, so that the next crew gets the same workers in the same order, with their caches.
  while (!crew->workers.empty()) {
    crew->workers.back()->crew = nullptr;
    idle_workers_.push_back(crew->workers.back());
    crew->workers.pop_back();
  }
  count(-crew->counted);
  crew->counted = 0;
  idle_crews_.push_back(crew);
  while (!waiters_.empty() && busy_ < capacity_) {
    Waiter* first = waiters_.front();
    waiters_.pop_front();
    first->granted = std::min(first->wanted, capacity_ - busy_);
    count(first->granted);
    first->ready.notify_one();  // under the lock: the waiter cannot be gone yet
  }
}

// How many threads a team gets: all that it wants if it is alone, else what is free. Waits until that is one at least.
int Pool::admit(std::unique_lock<std::mutex>& lock, int wanted) {
  if (busy_ > 0 && (busy_ >= capacity_ || !waiters_.empty())) {
    Waiter self{wanted, 0, {}};
    waiters_.push_back(&self);
    self.ready.wait(lock, [&] { return self.granted > 0; });
    return self.granted;
  }
  const int granted = busy_ == 0 ? wanted : std::min(wanted, capacity_ - busy_);
  count(granted);
  return granted;
}

void Pool::count(int threads) noexcept {
  busy_ += threads;
  thread_load.crowded.store(busy_ > capacity_, memory_order_relaxed);
}

void Pool::read_affinity() {
  const auto now = Clock::now();
  if (affinity_ != nullptr && now - affinity_read_ < kAffinityAge) return;
  affinity_read_ = now;
  std::vector<int> processors = process_affinity();
  if (affinity_ != nullptr && processors == *affinity_) return;
  auto known = std::find_if(affinities_.begin(), affinities_.end(), [&](auto& old) { return *old == processors; });
  if (known == affinities_.end()) {
    affinities_.push_back(std::make_unique<const std::vector<int>>(std::move(processors)));
    known = affinities_.end() - 1;
  }
  affinity_ = known->get();
  capacity_ = cut_by_quota(static_cast<int>(affinity_->size()), quota_);
  thread_load.processors.store(capacity_, memory_order_relaxed);
  count(0);
}

void Pool::hire(Crew* crew, int size) {
  crew->workers.reserve(size - 1);
  for (int rank = 1; rank < size; ++rank) {
    if (idle_workers_.empty()) start_worker();
    Worker* worker = idle_workers_.back();
    idle_workers_.pop_back();
    worker->crew = crew;
    worker->rank = rank;
    crew->workers.push_back(worker);
  }
}

void Pool::start_worker() {
  workers_.reserve(workers_.size() + 1);
  idle_workers_.reserve(workers_.size() + 1);
  auto worker = std::make_unique<Worker>();
  worker->number = static_cast<int>(workers_.size()) + 1;
  start_thread(*worker);
  idle_workers_.push_back(worker.get());
  workers_.push_back(std::move(worker));
}

// Decides where the workers of a crew run.
void Pool::place(Crew* crew, bool pin) {
  for (Worker* worker : crew->workers) worker->affinity = affinity_;
  if (!pin) {
    for (Worker* worker : crew->workers) worker->processor = -1;
    return;
  }
  // Not where workers of other crews are bound, nor where the caller is: it would have to share that processor until
  // the system moves it.
  taken_.assign(affinity_->back() + 1, true);
  for (const int processor : *affinity_) taken_[processor] = false;
  const auto take = [&](int processor) {
    const bool free = processor >= 0 && processor < static_cast<int>(taken_.size()) && !taken_[processor];
    if (free) taken_[processor] = true;
    return free;
  };
  take(current_processor());
  for (const auto& worker : workers_) {
    if (worker->crew != nullptr && worker->crew != crew) take(worker->processor);
  }
  std::vector<Worker*> homeless;
  for (Worker* worker : crew->workers) {
    if (!take(worker->processor)) homeless.push_back(worker);
  }
  size_t next = 0;
  for (Worker* worker : homeless) {
    while (next < affinity_->size() && !take((*affinity_)[next])) ++next;
    // More workers than processors are left: spread over all of them.
    worker->processor = (*affinity_)[next < affinity_->size() ? next : worker->rank % affinity_->size()];
  }
}

Team::Team(int wanted, bool pin) {
  if (wanted < 1) {
    throw Error(ErrorCode::kInvalidArgument, "a team of " + std::to_string(wanted) + " threads; expected 1 or more");
  }
  try {
    crew_ = Pool::current().acquire(wanted, pin);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kOutOfMemory, "no memory for a team of " + std::to_string(wanted) + " threads");
  }
}

Team::~Team() {
  // Else in a child of fork(), whose pool does not know the team.
  if (Pool::is_current(crew_->pool)) crew_->pool->release(crew_);
}

int Team::size() const { return crew_->group.size(); }

void Team::run(Body body, void* context) noexcept {
  Crew& crew = *crew_;
  if (!crew.workers.empty()) {
    crew.body = body;
    crew.context = context;
    crew.start();
  }
  body(context, crew.group, 0);
  if (!crew.workers.empty()) crew.wait_for_workers();
}

}  // namespace bertrt
