// Teams, their barrier, and how the pool shares processors out. A test that hangs is ended by an alarm.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../src/error.h"
#include "../src/pool.h"
#include "check.h"

namespace {

using bertrt::Group;
using bertrt::Team;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

const int capacity = bertrt::usable_processors();

// Runs a callable with (group, rank) on a team.
template <typename Function>
void run(Team& team, Function function) {
  team.run([](void* context, Group& group, int rank) { (*static_cast<Function*>(context))(group, rank); }, &function);
}

double processor_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Processor time that the whole process uses while this thread sleeps.
double seconds_used_in(std::chrono::milliseconds span) {
  const double before = processor_seconds();
  std::this_thread::sleep_for(span);
  return processor_seconds() - before;
}

// Keeps what the pool has busy on another thread, until it is destroyed.
class Holder {
 public:
  explicit Holder(int wanted)
      : thread_([this, wanted] {
          const Team team(wanted);
          size = team.size();
          while (!done_) std::this_thread::sleep_for(1ms);
        }) {
    while (size == 0) std::this_thread::yield();
  }
  ~Holder() {
    done_ = true;
    thread_.join();
  }
  std::atomic<int> size{0};

 private:
  std::atomic<bool> done_{false};
  std::thread thread_;
};

void each_rank_runs_once_in_every_run() {
  for (int wanted = 1; wanted <= 8; ++wanted) {
    Team team(wanted);
    CHECK(team.size() == wanted, "alone, asked for %d, got %d", wanted, team.size());
    std::vector<int> times(wanted);
    std::vector<std::thread::id> ids(wanted);
    constexpr int kRuns = 300;
    for (int i = 0; i < kRuns; ++i) {
      run(team, [&](Group& group, int rank) {
        CHECK(group.size() == wanted, "the group has %d members", group.size());
        CHECK(rank >= 0 && rank < wanted, "rank %d", rank);
        ++times[rank];
        ids[rank] = std::this_thread::get_id();
      });
      for (int rank = 0; rank < wanted; ++rank) CHECK(times[rank] == i + 1, "rank %d ran %d times", rank, times[rank]);
    }
    CHECK(ids[0] == std::this_thread::get_id(), "rank 0 is the caller");
    std::sort(ids.begin(), ids.end());
    CHECK(std::unique(ids.begin(), ids.end()) == ids.end(), "every rank has a thread of its own");
  }
}

// Every member writes, all read what every other wrote; without a sanitizer stale values show, with one races too.
void check_rounds(Group& group, int rank, int rounds, std::vector<int>& cells, int sleeper) {
  for (int round = 0; round < rounds; ++round) {
    if (round % 100 == 0 && rank == sleeper) std::this_thread::sleep_for(1ms);  // the others go to sleep
    cells[rank * 16] = round;
    group.barrier();
    for (int other = 0; other < group.size(); ++other) {
      CHECK(cells[other * 16] == round, "rank %d reads round %d of rank %d", rank, cells[other * 16], other);
    }
    group.barrier();
  }
}

void barriers_order_writes() {
  for (int wanted = 1; wanted <= 8; ++wanted) {
    Team team(wanted);
    std::vector<int> cells(wanted * 16);
    const int rounds = wanted <= capacity && !UNDER_TSAN ? 20000 : 1500;
    for (int sleeper : {0, wanted - 1}) {
      run(team, [&](Group& group, int rank) { check_rounds(group, rank, rounds, cells, sleeper); });
    }
  }
}

void groups_inside_a_team() {
  Team team(4);
  Group left(2), right(2);
  std::vector<int> left_cells(32), right_cells(32);
  run(team, [&](Group& group, int rank) {
    check_rounds(rank < 2 ? left : right, rank % 2, 1000, rank < 2 ? left_cells : right_cells, 0);
    group.barrier();
  });
}

void groups_of_other_threads() {
  for (int size : {2, 5, 8}) {
    Group group(size);
    std::vector<int> cells(size * 16);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] { check_rounds(group, rank, 500, cells, 1); });
    }
    for (auto& thread : threads) thread.join();
  }
}

// Threads that make teams of random sizes; `most` members at once, `least` and `greatest` runs of one thread.
struct Crowd {
  int most = 0;
  long least = 0;
  long greatest = 0;
};

Crowd crowd(int threads, int largest, std::chrono::milliseconds span) {
  std::atomic<int> at_work{0}, most{0};
  std::vector<long> runs(threads);
  const auto end = Clock::now() + span;
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      uint32_t random = 12345 + i;
      while (Clock::now() < end) {
        random = random * 1664525 + 1013904223;
        const int wanted = 1 + static_cast<int>(random >> 16) % largest;
        Team team(wanted, random >> 31);
        CHECK(team.size() >= 1 && team.size() <= wanted, "asked for %d, got %d", wanted, team.size());
        for (int repeat = 0; repeat < 2; ++repeat) {
          std::atomic<int> ran{0};
          run(team, [&](Group& group, int) {
            const int now = ++at_work;
            for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
            }
            group.barrier();
            Team inner(3);  // waits for nobody: its caller has a processor already
            CHECK(inner.size() == 1, "a team inside a team has %d members", inner.size());
            run(inner, [&](Group&, int) { ++ran; });
            group.barrier();
            --at_work;
          });
          CHECK(ran == team.size(), "%d of %d members ran", ran.load(), team.size());
        }
        ++runs[i];
      }
    });
  }
  for (auto& thread : all) thread.join();
  return {most, *std::min_element(runs.begin(), runs.end()), *std::max_element(runs.begin(), runs.end())};
}

void many_threads_share_the_capacity() {
  const Crowd seen = crowd(8, capacity, 2000ms);
  CHECK(seen.most <= capacity, "%d threads at work on %d processors", seen.most, capacity);
  CHECK(seen.least * 10 >= seen.greatest, "one thread had %ld runs, another %ld", seen.least, seen.greatest);
  std::printf("  runs of a thread: %ld to %ld, at most %d at work\n", seen.least, seen.greatest, seen.most);
}

void many_threads_ask_for_too_much() {
  const Crowd seen = crowd(8, 6, 2000ms);
  CHECK(seen.least * 10 >= seen.greatest, "one thread had %ld runs, another %ld", seen.least, seen.greatest);
  std::printf("  runs of a thread: %ld to %ld, at most %d at work\n", seen.least, seen.greatest, seen.most);
}

void a_second_team_gets_what_is_left() {
  if (capacity < 2) return;
  const Holder holder(1);
  const Team team(capacity + 6);
  CHECK(team.size() == capacity - 1, "%d of %d processors are free, got %d", capacity - 1, capacity, team.size());
}

void waiting_is_first_come_first_served_and_idle() {
  std::vector<int> order;
  std::vector<int> sizes;
  std::mutex mutex;
  std::vector<std::thread> threads;
  {
    // More than the capacity: alone, it may.
    const Holder holder(capacity + 2);
    CHECK(holder.size == capacity + 2, "alone, asked for %d, got %d", capacity + 2, holder.size.load());
    for (int i = 0; i < 6; ++i) {
      threads.emplace_back([&, i] {
        const Team team(capacity + 1);
        const std::lock_guard lock(mutex);
        order.push_back(i);
        sizes.push_back(team.size());
      });
      std::this_thread::sleep_for(30ms);
    }
    const double used = seconds_used_in(200ms);
    CHECK(used < 0.02, "six that wait used %.1f ms of 200", used * 1e3);  // the holder's thread wakes 200 times
    CHECK(order.empty(), "a team was given out with nothing free");
  }
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < 6; ++i) CHECK(order[i] == i, "thread %d came %d.", order[i], i);
  for (const int size : sizes) CHECK(size <= capacity, "%d threads to one that had waited", size);
}

void all_is_free_again_after_use() {
  for (int i = 0; i < 50; ++i) {
    { const Holder holder(capacity); }
    const Team team(capacity + 3);
    CHECK(team.size() == capacity + 3, "asked for %d, got %d", capacity + 3, team.size());
  }
}

void no_processor_is_busy_when_nothing_runs() {
  for (int wanted : {capacity, 8}) {
    Team team(wanted);
    for (int i = 0; i < 20; ++i) run(team, [](Group& group, int) { group.barrier(); });
    std::this_thread::sleep_for(2ms);
    const double used = seconds_used_in(200ms);
    CHECK(used < 0.005, "%d idle members used %.2f ms of 200", wanted, used * 1e3);
    // One member is late for the barrier; then one returns late.
    for (const bool at_barrier : {true, false}) {
      const double before = processor_seconds();
      run(team, [&](Group& group, int rank) {
        if (rank == group.size() - 1) std::this_thread::sleep_for(200ms);
        if (at_barrier) group.barrier();
      });
      const double waited = processor_seconds() - before;
      CHECK(waited < 0.01, "%d members used %.2f ms waiting for one", wanted, waited * 1e3);
    }
  }
}

void measure(const char* what, int wanted, int count) {
  Team team(wanted);
  run(team, [](Group& group, int) { group.barrier(); });
  std::vector<double> barriers, runs;
  for (int repeat = 0; repeat < 9; ++repeat) {
    auto begin = Clock::now();
    run(team, [&](Group& group, int) {
      for (int i = 0; i < count; ++i) group.barrier();
    });
    barriers.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / count);
    begin = Clock::now();
    for (int i = 0; i < count / 10; ++i) run(team, [](Group&, int) {});
    runs.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / (count / 10));
  }
  const auto median = [](std::vector<double>& values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  };
  std::printf("  %s: barrier %.3f us, empty run %.3f us (medians)\n", what, median(barriers), median(runs));
}

void costs() {
  measure("2 threads", 2, 20000);
  measure("8 threads", 8, 2000);
  const int count = 20000;
  const auto begin = Clock::now();
  for (int i = 0; i < count; ++i) {
    const Team team(2);
    CHECK(team.size() >= 1, "a team");
  }
  std::printf("  team of 2 made and given back: %.3f us\n",
              std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / count);
}

void a_team_of_none_is_refused() {
  for (const int wanted : {0, -1}) {
    bool refused = false;
    try {
      const Team team(wanted);
    } catch (const bertrt::Error& error) {
      refused = error.code() == bertrt::ErrorCode::kInvalidArgument;
    }
    CHECK(refused, "a team of %d was made", wanted);
  }
}

}  // namespace

int main(int argc, char** argv) {
  alarm(120);
  const Test tests[] = {
      {"each_rank_runs_once_in_every_run", each_rank_runs_once_in_every_run},
      {"barriers_order_writes", barriers_order_writes},
      {"groups_inside_a_team", groups_inside_a_team},
      {"groups_of_other_threads", groups_of_other_threads},
      {"many_threads_share_the_capacity", many_threads_share_the_capacity},
      {"many_threads_ask_for_too_much", many_threads_ask_for_too_much},
      {"a_second_team_gets_what_is_left", a_second_team_gets_what_is_left},
      {"waiting_is_first_come_first_served_and_idle", waiting_is_first_come_first_served_and_idle},
      {"all_is_free_again_after_use", all_is_free_again_after_use},
      {"no_processor_is_busy_when_nothing_runs", no_processor_is_busy_when_nothing_runs},
      {"a_team_of_none_is_refused", a_team_of_none_is_refused},
      {"costs", costs},
  };
  return run_tests(tests, argc, argv);
}
