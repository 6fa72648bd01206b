// Emulates Intel AMX (TILE, INT8, BF16) in software, so that kernels for it can be proven on processors without it.
//
//   cc -O3 -march=native -ffp-contract=off -shared -fPIC -o libamx_emulator.so amx_emulator.c
//   LD_PRELOAD=./libamx_emulator.so program
//
// A processor without AMX raises SIGILL at each of its instructions. The handler here carries the instruction out,
// goes on for as long as AMX instructions follow (a trap costs more than a product), and returns behind them. What the
// manual forbids is refused: a line on stderr, then SIGILL (#UD), or SIGSEGV for a bad configuration (#GP). On a
// processor with AMX the library does nothing.
//
// Other handlers of SIGILL (Python's faulthandler, which pytest enables) would replace this one. sigaction and signal
// are therefore interposed: what a program installs for SIGILL gets only the signals that are not AMX's. What stays
// fatal: a thread that blocks SIGILL, a handler installed by the bare system call, and a library that is neither
// preloaded nor linked before libc.
//
// Exports:
//   int bertrt_amx_is_emulated(void)          1 on a processor without AMX, else 0
//   long bertrt_amx_executed(const char*)     how often the instruction of this name, such as "TDPBSSD", was emulated
// With AMX_EMULATOR_REPORT=file, a process that ran any appends a line to it when it exits: each instruction's name and
// count.
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <immintrin.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "amx_instructions.h"

typedef int Sigaction(int, const struct sigaction*, struct sigaction*);
static Sigaction* libc_sigaction;
static bool emulating;
static struct sigaction next;  // what the program wants for SIGILL

// For a signal that is not of AMX: what would have happened without the emulator.
static void pass_on(int number, siginfo_t* info, void* context) {
  const bool sent = info->si_code <= 0;  // by kill or raise
  if ((next.sa_flags & SA_SIGINFO) != 0) {
    next.sa_sigaction(number, info, context);
  } else if (next.sa_handler == SIG_IGN && sent) {
    return;
  } else if (next.sa_handler == SIG_DFL || next.sa_handler == SIG_IGN) {
    // The default action; a fault is met again when the handler returns, a signal that was sent is not.
    const struct sigaction fatal = {.sa_handler = SIG_DFL};
    libc_sigaction(SIGILL, &fatal, NULL);
    if (sent) raise(SIGILL);
  } else {
    next.sa_handler(number);
  }
}

static void handle(int number, siginfo_t* info, void* context) {
  greg_t* const registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const char* problem = NULL;
  Instruction in;
  if (info->si_code > 0) {
    // Denormals are zero, results round to the nearest even, nothing traps. The return from a signal restores the mode.
    _mm_setcsr(0x9fc0);
    int count = 0;
    for (; decode((const uint8_t*)registers[REG_RIP], registers, &in); ++count) {
      problem = execute(&in);
      if (problem != NULL) break;
      __atomic_fetch_add(&executed[in.kind], 1, __ATOMIC_RELAXED);
      registers[REG_RIP] += in.length;
    }
    _mm_setcsr(0x1f80);
    if (problem == NULL && count > 0) return;
  }
  if (problem != NULL) {
    char line[200];
    const int length = snprintf(line, sizeof line, "amx emulator: %s at %#llx: %s\n", kNames[in.kind],
                                (unsigned long long)registers[REG_RIP], problem);
    (void)!write(STDERR_FILENO, line, (size_t)length);
    if (strncmp(problem, "#GP", 3) == 0) {
      raise(SIGSEGV);
      return;
    }
  }
  pass_on(number, info, context);
}

int sigaction(int number, const struct sigaction* action, struct sigaction* previous) {
  if (libc_sigaction == NULL) libc_sigaction = (Sigaction*)dlsym(RTLD_NEXT, "sigaction");
  if (number != SIGILL || !emulating) return libc_sigaction(number, action, previous);
  const struct sigaction before = next;
  if (action != NULL) next = *action;
  if (previous != NULL) *previous = before;
  return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
  const struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
  struct sigaction previous;
  return sigaction(number, &action, &previous) == 0 ? previous.sa_handler : SIG_ERR;
}

static bool processor_has_amx(void) {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 1) != 0;
}

int bertrt_amx_is_emulated(void) { return emulating ? 1 : 0; }

long bertrt_amx_executed(const char* name) {
  for (int i = 0; i < kKinds; ++i)
    if (strcmp(name, kNames[i]) == 0) return __atomic_load_n(&executed[i], __ATOMIC_RELAXED);
  return -1;
}

__attribute__((constructor)) static void install(void) {
  if (processor_has_amx()) return;
  struct sigaction action = {.sa_sigaction = handle};
  // NODEFER: a handler of SIGSEGV may jump out of a faulting load. RESTART: nothing else should notice.
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
  sigemptyset(&action.sa_mask);
  if (libc_sigaction == NULL) libc_sigaction = (Sigaction*)dlsym(RTLD_NEXT, "sigaction");
  if (libc_sigaction(SIGILL, &action, &next) == 0) emulating = true;
}

__attribute__((destructor)) static void report(void) {
  const char* path = getenv("AMX_EMULATOR_REPORT");
  if (path == NULL || *path == '\0' || !emulating) return;
  char line[1024];
  int length = 0;
  long total = 0;
  for (int i = 0; i < kKinds; ++i) total += executed[i];
  if (total == 0) return;
  for (int i = 0; i < kKinds; ++i)
    length += snprintf(line + length, sizeof line - (size_t)length, "%s %ld ", kNames[i], executed[i]);
  line[length - 1] = '\n';
  const int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0) return;
  (void)!write(file, line, (size_t)length);
  close(file);
}
