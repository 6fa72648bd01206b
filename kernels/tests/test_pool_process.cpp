// The pool and the system: fork, exit, signals, names, stacks, affinity, refused threads. Linux only.
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../src/error.h"
#include "../src/pool.h"
#include "check.h"

#if UNDER_TSAN
// Threads in the child of a process with threads are the point here.
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

namespace {

using bertrt::Group;
using bertrt::Team;
using namespace std::chrono_literals;

template <typename Function>
void run(Team& team, Function function) {
  team.run([](void* context, Group& group, int rank) { (*static_cast<Function*>(context))(group, rank); }, &function);
}

std::vector<int> affinity() {
  cpu_set_t set;
  CHECK(sched_getaffinity(0, sizeof set, &set) == 0, "sched_getaffinity");
  std::vector<int> processors;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &set)) processors.push_back(i);
  }
  return processors;
}

void set_affinity(const std::vector<int>& processors) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int i : processors) CPU_SET(i, &set);
  CHECK(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

void use_pool(int wanted) {
  Team team(wanted);
  std::atomic<int> ran{0};
  for (int i = 0; i < 10; ++i) {
    run(team, [&](Group& group, int) {
      group.barrier();
      ++ran;
      group.barrier();
    });
  }
  CHECK(ran == 10 * team.size(), "%d members ran", ran.load());
}

// Runs `function` in a child, which must end well by itself and in time.
template <typename Function>
void in_child(Function function, bool with_destructors = false) {
  const pid_t child = fork();
  CHECK(child >= 0, "fork");
  if (child == 0) {
    alarm(30);
    function();
    if (with_destructors) std::exit(0);
    std::_Exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child, "waitpid");
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with wait status %#x", status);
}

void forks_of_an_idle_process() {
  in_child([] { use_pool(4); }, true);  // before the parent has a pool
  use_pool(4);
  for (int i = 0; i < 5; ++i) {
    in_child([] {
      {
        Team team(5);
        CHECK(team.size() == 5, "the child has a pool of its own, but got %d threads", team.size());
        run(team, [](Group&, int) {});
      }
      in_child([] { use_pool(4); });
    });
    use_pool(4);
  }
  in_child([] { use_pool(4); }, true);
}

void forks_while_other_threads_run() {
  // A thread that starts or allocates may hold a lock of AddressSanitizer's allocator, and GCC's has no handler for
  // fork. The C library's has.
  if (UNDER_ASAN) return;
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      while (!done) use_pool(1 + i);
    });
  }
  for (int i = 0; i < (UNDER_TSAN ? 10 : 60); ++i) {
    in_child([] {
      Team team(4);
      CHECK(team.size() == 4, "nothing runs in the child, but it got %d threads", team.size());
      run(team, [](Group& group, int) { group.barrier(); });
    });
  }
  done = true;
  for (auto& thread : threads) thread.join();
}

// The child must not touch what the parent's pool was doing, even with a team of the forking thread at hand.
void a_fork_with_a_team_at_hand() {
  Team team(3);
  run(team, [](Group& group, int) { group.barrier(); });
  in_child([] { use_pool(3); });
  run(team, [](Group& group, int) { group.barrier(); });
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    team.~Team();
    use_pool(3);
    std::_Exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with wait status %#x", status);
}

void exit_right_after_a_run() {
  for (int i = 0; i < 10; ++i) {
    in_child([] { use_pool(4); }, true);
  }
}

void workers_have_names_stacks_and_no_signals() {
  Team team(4);
  run(team, [](Group& group, int rank) {
    if (rank > 0) {
      char name[16];
      CHECK(pthread_getname_np(pthread_self(), name, sizeof name) == 0, "pthread_getname_np");
      CHECK(std::string(name).rfind("bertrt-", 0) == 0, "a worker is named %s", name);
      sigset_t blocked;
      pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
      for (const int signal : {SIGINT, SIGTERM, SIGALRM, SIGCHLD, SIGUSR1, SIGPROF}) {
        CHECK(sigismember(&blocked, signal), "signal %d may come to a worker", signal);
      }
      for (const int signal : {SIGSEGV, SIGILL, SIGFPE, SIGBUS}) {
        CHECK(!sigismember(&blocked, signal), "signal %d of a worker would pass its handler by", signal);
      }
      pthread_attr_t attributes;
      size_t bytes = 0;
      CHECK(pthread_getattr_np(pthread_self(), &attributes) == 0, "pthread_getattr_np");
      pthread_attr_getstacksize(&attributes, &bytes);
      pthread_attr_destroy(&attributes);
      CHECK(bytes >= 512 << 10, "a stack of %zu bytes", bytes);
    }
    group.barrier();
  });
  sigset_t blocked;
  pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
  CHECK(!sigismember(&blocked, SIGINT), "starting workers left the caller with its signals blocked");
}

std::vector<std::vector<int>> affinities_of(int wanted, bool pin) {
  Team team(wanted, pin);
  CHECK(team.size() == wanted, "alone, asked for %d, got %d", wanted, team.size());
  std::vector<std::vector<int>> masks(wanted);
  run(team, [&](Group& group, int rank) {
    masks[rank] = affinity();
    group.barrier();
  });
  return masks;
}

void pinned_workers_have_processors_of_their_own() {
  const std::vector<int> all = affinity();
  for (int repeat = 0; repeat < 20; ++repeat) {
    const int wanted = static_cast<int>(all.size());
    const auto pinned = affinities_of(wanted, true);
    CHECK(pinned[0] == all, "the caller was bound to %zu processors", pinned[0].size());
    std::set<int> used;
    for (int rank = 1; rank < wanted; ++rank) {
      CHECK(pinned[rank].size() == 1, "rank %d may run on %zu processors", rank, pinned[rank].size());
      CHECK(used.insert(pinned[rank][0]).second, "processor %d has two workers", pinned[rank][0]);
    }
    for (const auto& mask : affinities_of(wanted + 1, false)) CHECK(mask == all, "a worker is still bound");
  }
  for (const auto& mask : affinities_of(static_cast<int>(all.size()) * 2 + 2, true)) CHECK(!mask.empty(), "a mask");
}

void workers_do_not_inherit_the_callers_processor() {
  const std::vector<int> all = affinity();
  in_child([&] {
    std::thread([&] {
      set_affinity({all.back()});
      const auto masks = affinities_of(12, false);
      for (int rank = 1; rank < 12; ++rank) CHECK(masks[rank] == all, "rank %d inherited a mask", rank);
      CHECK(masks[0].size() == 1, "the caller's own mask was changed");
    }).join();
  });
}

void a_narrower_affinity_is_noticed() {
  const std::vector<int> all = affinity();
  in_child([&] {
    use_pool(2);
    set_affinity({all.back()});
    CHECK(bertrt::usable_processors() == 1, "%d usable", bertrt::usable_processors());
    std::this_thread::sleep_for(150ms);
    std::atomic<bool> admitted{false};
    std::thread other;
    {
      const Team team(1);
      other = std::thread([&] {
        const Team waits(1);
        admitted = true;
      });
      std::this_thread::sleep_for(50ms);
      CHECK(!admitted, "two teams at once on one processor");
    }
    other.join();
    const auto masks = affinities_of(3, false);
    for (const auto& mask : masks) CHECK(mask.size() == 1, "a worker may run on %zu processors", mask.size());
  });
}

void refused_threads_are_an_error_and_nothing_is_lost() {
  if (UNDER_TSAN || UNDER_ASAN) return;  // they need address space themselves
  in_child([] {
    size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t bytes = pages * static_cast<size_t>(sysconf(_SC_PAGESIZE)) + (24 << 20);
    const rlimit limit = {bytes, bytes};
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit");
    for (int i = 0; i < 3; ++i) {
      bool refused = false;
      try {
        const Team team(200);
      } catch (const bertrt::Error& error) {
        refused = error.code() == bertrt::ErrorCode::kSystem;
        CHECK(std::string(error.what()).find("fewer threads") != std::string::npos, "%s", error.what());
      }
      CHECK(refused, "200 stacks of a megabyte in 24 MiB");
      Team team(3);
      CHECK(team.size() == 3, "after the failure got %d", team.size());
      run(team, [](Group& group, int) { group.barrier(); });
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  alarm(120);
  const Test tests[] = {
      {"forks_of_an_idle_process", forks_of_an_idle_process},
      {"forks_while_other_threads_run", forks_while_other_threads_run},
      {"a_fork_with_a_team_at_hand", a_fork_with_a_team_at_hand},
      {"exit_right_after_a_run", exit_right_after_a_run},
      {"workers_have_names_stacks_and_no_signals", workers_have_names_stacks_and_no_signals},
      {"pinned_workers_have_processors_of_their_own", pinned_workers_have_processors_of_their_own},
      {"workers_do_not_inherit_the_callers_processor", workers_do_not_inherit_the_callers_processor},
      {"a_narrower_affinity_is_noticed", a_narrower_affinity_is_noticed},
      {"refused_threads_are_an_error_and_nothing_is_lost", refused_threads_are_an_error_and_nothing_is_lost},
  };
  return run_tests(tests, argc, argv);
}
