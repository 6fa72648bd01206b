// Processors: which ones the process may use, how much of their time, and binding threads to them.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace bertrt {

// Processors that the process may run on, in rising order; never empty. It is the mask of the process's first
// thread, so that it does not matter which thread asks: one that its owner has bound somewhere says nothing about
// the process.
std::vector<int> process_affinity();

// Processors' worth of time that the control groups (version 1 or 2, every ancestor too) allow, such as 1.5;
// nothing where there is no limit. `root` is where `proc` and `sys` are looked for.
std::optional<double> processor_quota(const std::string& root = "/");

// Threads that can run at once, at least 1: `processors`, cut by the quota rounded up.
int cut_by_quota(int processors, std::optional<double> quota);

// Binds the calling thread to `count` processors. False where the system cannot or will not.
bool bind_this_thread(const int* processors, size_t count) noexcept;

// The processor that the calling thread is on, -1 where that cannot be known.
int current_processor() noexcept;

}  // namespace bertrt
