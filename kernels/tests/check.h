// What the test programs need: a check that ends the program, and a list of tests to run.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#define UNDER_ASAN 1
#endif
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#if __has_feature(address_sanitizer)
#define UNDER_ASAN 1
#endif
#endif
#ifndef UNDER_TSAN
#define UNDER_TSAN 0
#endif
#ifndef UNDER_ASAN
#define UNDER_ASAN 0
#endif

// Usable on any thread: says what was wrong and ends the process with status 1, without its destructors.
[[noreturn]] [[gnu::format(printf, 4, 5)]] inline void fail(const char* file, int line, const char* condition,
                                                            const char* format, ...) {
  std::fprintf(stderr, "%s:%d: not so: %s: ", file, line, condition);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::fflush(nullptr);
  std::_Exit(1);
}

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) fail(__FILE__, __LINE__, #condition, __VA_ARGS__);   \
  } while (0)

struct Test {
  const char* name;
  void (*run)();
};

// Runs all tests, or those named on the command line.
template <int count>
int run_tests(const Test (&tests)[count], int argc, char** argv) {
  int ran = 0;
  for (const Test& test : tests) {
    bool chosen = argc < 2;
    for (int i = 1; i < argc; ++i) chosen = chosen || std::strcmp(argv[i], test.name) == 0;
    if (!chosen) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.run();
    ++ran;
  }
  CHECK(ran > 0, "no test has such a name");
  return 0;
}
