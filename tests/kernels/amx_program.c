// Runs every AMX instruction that the kernels use, against scalar code, and prints "ok" or what differed.
//
//   amx_program products | moves | configs | modes | handlers | threads | count | die CASE
//
// Runs natively where the processor has AMX, and under amx_emulator.c elsewhere. Also built as a shared library, whose
// `run` and `sees_emulator` a test calls from Python.
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_addresses.h"
#include "amx_scalar.h"

extern __attribute__((weak)) int bertrt_amx_is_emulated(void);
int sees_emulator(void) { return bertrt_amx_is_emulated != NULL && bertrt_amx_is_emulated() == 1; }

static void load_operands(const Tile* a, const Tile* b, const Tile* c) {
  LOAD_TILE(2, a, 64);
  LOAD_TILE(7, b, 64);
  LOAD_TILE(5, c, 64);
}

static int check_bytes(int m, int k, int n, uint64_t* seed) {
  static const char* const kNames[4] = {"ss", "su", "us", "uu"};
  Tile a, b, c;
  fill(&a, sizeof a, seed);
  fill(&b, sizeof b, seed);
  fill(&c, sizeof c, seed);
  const Config config = config_of(m, k, n);
  for (int kind = 0; kind < 4; ++kind) {
    Tile got;
    memset(&got, 0xee, sizeof got);
    load_config(&config);
    load_operands(&a, &b, &c);
    if (kind == 0) _tile_dpbssd(5, 2, 7);
    if (kind == 1) _tile_dpbsud(5, 2, 7);
    if (kind == 2) _tile_dpbusd(5, 2, 7);
    if (kind == 3) _tile_dpbuud(5, 2, 7);
    _tile_stored(5, &got, 64);
    _tile_release();
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        uint32_t want = 0xeeeeeeee;
        if (i < m && j < n) want = bytes_reference(&a, &b, i, j, k, c.words[i][j], kind < 2, kind % 2 == 0);
        EXPECT(got.words[i][j] == want, "%s of %dx%dx%d at %d, %d: %x, not %x", kNames[kind], m, k, n, i, j,
               got.words[i][j], want);
      }
  }
  return 0;
}

// What bf16 values are drawn from.
enum { kOrdinary, kFewSpecial, kManySpecial, kTiny, kMixtures };

static uint16_t any_bf16(int mixture, uint64_t* seed) {
  static const uint16_t kSpecial[] = {0x0000, 0x8000, 0x0001, 0x807f, 0x0080, 0x8080, 0x7f7f, 0xff7f,
                                      0x7f80, 0xff80, 0x7fc0, 0x2000, 0xa000, 0x1f80, 0x5f80, 0x3f80};
  const uint32_t random = next_random(seed);
  const uint32_t odds = mixture == kFewSpecial ? 1 : mixture == kManySpecial ? 4 : 0;
  if (random >> 28 < odds) return kSpecial[random >> 20 & 15];
  // Magnitudes of 2^-4 to 2^4, where each rounding shows; or of 2^-67 to 2^-59, whose products are almost denormal.
  const uint32_t lowest = mixture == kTiny ? 60 : 123;
  return (uint16_t)((random & 0x807f) | ((lowest + (random >> 16) % 9) << 7));
}

static int check_bf16(int m, int k, int n, int mixture, uint64_t* seed, int* told_apart) {
  Tile a, b, c, got;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 32; ++j) {
      a.halves[i][j] = any_bf16(mixture, seed);
      b.halves[i][j] = any_bf16(mixture, seed);
      if (j % 2 == 1) c.words[i][j / 2] = (uint32_t)any_bf16(mixture, seed) << 16 | (next_random(seed) & 0xffff);
      // As small as the products, and some of them denormal.
      if (mixture == kTiny) c.words[i][j / 2] &= 0x81ffffff;
    }
  const Config config = config_of(m, k, n);
  memset(&got, 0xee, sizeof got);
  load_config(&config);
  load_operands(&a, &b, &c);
  _tile_dpbf16ps(5, 2, 7);
  _tile_stored(5, &got, 64);
  _tile_release();
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      if (i >= m || j >= n) {
        EXPECT(got.words[i][j] == 0xeeeeeeee, "bf16 of %dx%dx%d at %d, %d: written", m, k, n, i, j);
        continue;
      }
      const float want = bf16_reference(&a, &b, i, j, k, c.floats[i][j]);
      EXPECT(same(got.floats[i][j], want), "bf16 of %dx%dx%d at %d, %d: %a, not %a", m, k, n, i, j,
             (double)got.floats[i][j], (double)want);
      *told_apart += !same(want, bf16_one_chain(&a, &b, i, j, k, c.floats[i][j]));
    }
  return 0;
}

static int products(uint64_t seed) {
  int told_apart = 0;
  for (int round = 0; round < 60; ++round) {
    const uint32_t random = next_random(&seed);
    // The first is full, the second is the smallest.
    const int m = round == 0 ? 16 : round == 1 ? 1 : 1 + (int)(random % 16);
    const int k = round == 0 ? 16 : round == 1 ? 1 : 1 + (int)(random / 16 % 16);
    const int n = round == 0 ? 16 : round == 1 ? 1 : 1 + (int)(random / 256 % 16);
    if (check_bytes(m, k, n, &seed) != 0) return 1;
    if (check_bf16(m, k, n, round % kMixtures, &seed, &told_apart) != 0) return 1;
  }
  EXPECT(told_apart > 1000, "the values tell the order of sums apart only %d times", told_apart);
  return 0;
}

// ---- Surroundings

// The mode of floating-point arithmetic is neither used nor changed.
static int modes(uint64_t seed) {
  const unsigned saved = _mm_getcsr();
  int told_apart = 0, failed = 0;
  // Rounding down, up, to zero and to the nearest, with and without denormals as zero, with a flag that is set already.
  for (unsigned rounding = 0; rounding < 4 && !failed; ++rounding)
    for (unsigned flush_bits = 0; flush_bits < 2 && !failed; ++flush_bits) {
      const unsigned mode = 0x1f80 | 0x20 | rounding << 13 | (flush_bits ? 0x8040 : 0);
      Tile a, b, c, got;
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 32; ++j) {
          a.halves[i][j] = any_bf16(kManySpecial, &seed);
          b.halves[i][j] = any_bf16(kManySpecial, &seed);
          c.halves[i][j] = any_bf16(kManySpecial, &seed);
        }
      const Config config = config_of(16, 16, 16);
      _mm_setcsr(mode);
      load_config(&config);
      load_operands(&a, &b, &c);
      _tile_dpbf16ps(5, 2, 7);
      _tile_stored(5, &got, 64);
      _tile_release();
      const unsigned after = _mm_getcsr();
      _mm_setcsr(saved);
      failed = after != mode;
      if (failed) printf("mode %x became %x\n", mode, after);
      for (int i = 0; i < 256 && !failed; ++i) {
        const float want = bf16_reference(&a, &b, i / 16, i % 16, 16, c.floats[i / 16][i % 16]);
        failed = !same(got.floats[i / 16][i % 16], want);
        if (failed) printf("in mode %x: %a, not %a\n", mode, (double)got.floats[i / 16][i % 16], (double)want);
        told_apart += isfinite(want);
      }
    }
  if (!failed && told_apart == 0) failed = printf("no finite value\n");
  return failed;
}

static sigjmp_buf escape;
static volatile int caught;
static void catch_simple(int number) {
  caught = number;
  siglongjmp(escape, 1);
}
static void catch_info(int number, siginfo_t* info, void* context) {
  (void)context;
  caught = info->si_code > 0 ? number + 1000 : -1;
  siglongjmp(escape, 1);
}

// A program's own handlers of SIGILL get what is not of AMX, and AMX goes on working.
static int handlers(uint64_t seed) {
  int told_apart = 0;
  struct sigaction previous, action = {.sa_sigaction = catch_info, .sa_flags = SA_SIGINFO};
  EXPECT(signal(SIGILL, catch_simple) == SIG_DFL, "an unexpected handler");
  for (int round = 0; round < 4; ++round) {
    if (check_bytes(9, 5, 11, &seed) != 0 || check_bf16(9, 5, 11, kOrdinary, &seed, &told_apart) != 0) return 1;
    if (round == 2) {
      EXPECT(sigaction(SIGILL, &action, &previous) == 0, "sigaction");
      EXPECT(previous.sa_handler == catch_simple, "another handler than the one installed");
    }
    caught = 0;
    if (sigsetjmp(escape, 1) == 0) __asm__ volatile("ud2");
    EXPECT(caught == (round < 2 ? SIGILL : SIGILL + 1000), "caught %d", caught);
  }
  // A load from a page that is not there faults as any load does, and is not the end.
  caught = 0;
  signal(SIGSEGV, catch_simple);
  const Config config = config_of(16, 16, 16);
  uint8_t* pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(pages + 4096, 4096, PROT_NONE);
  load_config(&config);
  if (sigsetjmp(escape, 1) == 0) LOAD_TILE(5, pages + 4096 - 512, 64);
  EXPECT(caught == SIGSEGV, "caught %d", caught);
  return check_bytes(16, 16, 16, &seed);
}

static void* one_thread(void* seed) {
  int told_apart = 0;
  uint64_t state = (uint64_t)(uintptr_t)seed;
  Config before;
  const Config zero = {0};
  store_config(&before);
  if (memcmp(&before, &zero, 64) != 0) return "a new thread's tiles are configured";
  for (int round = 0; round < 40; ++round) {
    const int m = 1 + (int)(next_random(&state) % 16), n = 1 + (int)(next_random(&state) % 16);
    if (check_bytes(m, 16, n, &state) != 0) return "differs in int8";
    if (check_bf16(m, 16, n, kFewSpecial, &state, &told_apart) != 0) return "differs in bf16";
  }
  return NULL;
}

static int threads(uint64_t seed) {
  pthread_t ids[4];
  int failed = 0;
  const Config config = config_of(3, 4, 5);
  load_config(&config);
  for (size_t i = 0; i < 4; ++i)
    EXPECT(pthread_create(&ids[i], NULL, one_thread, (void*)(uintptr_t)(seed + i)) == 0, "no thread");
  for (size_t i = 0; i < 4; ++i) {
    void* problem = NULL;
    pthread_join(ids[i], &problem);
    if (problem != NULL) failed = printf("thread %zu: %s\n", i, (const char*)problem);
  }
  Config after;
  store_config(&after);
  EXPECT(memcmp(&after, &config, 64) == 0, "another thread changed this one's configuration");
  return failed;
}

// A known number of each instruction, some next to each other and some not.
static int count(uint64_t seed) {
  Tile tile;
  fill(&tile, sizeof tile, &seed);
  const Config config = config_of(16, 16, 16);
  load_config(&config);
  store_config(&seen);
  _tile_zero(5);
  for (int i = 0; i < 3; ++i) {
    LOAD_TILE(2, &tile, 64);
    STREAM_TILE(7, &tile, 64);
    for (int j = 0; j < 2; ++j) _tile_dpbssd(5, 2, 7);
    _tile_dpbsud(5, 2, 7);
    for (volatile int j = 0; j < 4; ++j) _tile_dpbusd(5, 2, 7);
    for (volatile int j = 0; j < 5; ++j) _tile_dpbuud(5, 2, 7);
    for (volatile int j = 0; j < 6; ++j) _tile_dpbf16ps(5, 2, 7);
  }
  _tile_stored(5, &tile, 64);
  _tile_release();
  return 0;
}

// ---- What is forbidden: each case ends the process.

int die(const char* name) {
  static Tile tile;
  Config config = config_of(16, 16, 16);
#define CASE(text) if (strcmp(name, text) == 0)
  CASE("unconfigured-zero") _tile_zero(0);
  CASE("unconfigured-load") LOAD_TILE(0, &tile, 64);
  CASE("unconfigured-product") _tile_dpbssd(5, 2, 7);
  CASE("released") {
    load_config(&config);
    _tile_release();
    _tile_zero(5);
  }
  CASE("palette-0") {
    load_config(&config);
    config.palette = 0;
    load_config(&config);
    _tile_zero(5);
  }
  CASE("palette-2") config.palette = 2;
  CASE("reserved-bytes-2") config.reserved_0[13] = 1;
  CASE("reserved-bytes-32") config.reserved_1[0] = 1;
  CASE("reserved-bytes-56") config.reserved_2[7] = 1;
  CASE("17-rows") config.rows[7] = 17;
  CASE("68-bytes") config.column_bytes[7] = 68;
  CASE("rows-without-columns") config.rows[0] = 1;
  CASE("columns-without-rows") config.column_bytes[0] = 4;
  CASE("odd-columns") config.column_bytes[7] = 62;
  CASE("other-rows") config.rows[2] = 15;
  CASE("other-columns") config.column_bytes[5] = 60;
  CASE("other-inner") config.column_bytes[2] = 60;
  CASE("start-row") config.start_row = 16;
  load_config(&config);
  CASE("tile-left-out") _tile_zero(0);
  CASE("tile-left-out-of-product") _tile_dpbuud(5, 0, 7);
  // The assembler refuses tdpbf16ps of 5, 7 and 7, and tdpbusd of 5, 5 and 7.
  CASE("same-tile-twice") __asm__ volatile(".byte 0xc4, 0xe2, 0x42, 0x5c, 0xef");
  CASE("own-source") __asm__ volatile(".byte 0xc4, 0xe2, 0x41, 0x5e, 0xed");
  CASE("bad-address") LOAD_TILE(5, (void*)64, 64);
  CASE("other-instruction") __asm__ volatile("ud2");
  CASE("sent") raise(SIGILL);
  CASE("odd-columns") LOAD_TILE(7, &tile, 64);
  CASE("start-row") LOAD_TILE(5, &tile, 64);
  _tile_dpbssd(5, 2, 7);
  return 0;
}

// Linux lends the tiles' registers to a process that asks.
static void ask_for_tiles(void) { syscall(SYS_arch_prctl, 0x1023, 18); }

int run(const char* what) {
  static const struct {
    const char* name;
    int (*run)(uint64_t seed);
  } kCases[] = {{"products", products}, {"moves", moves},     {"configs", configs}, {"modes", modes},
                {"handlers", handlers}, {"threads", threads}, {"count", count}};
  ask_for_tiles();
  for (size_t i = 0; i < sizeof kCases / sizeof kCases[0]; ++i)
    if (strcmp(what, kCases[i].name) == 0) return kCases[i].run(0x9e3779b97f4a7c15);
  return 2;
}

int main(int count_of_arguments, char** arguments) {
  if (count_of_arguments < 2) return 2;
  ask_for_tiles();
  const int failed = count_of_arguments == 3 ? die(arguments[2]) : run(arguments[1]);
  if (!failed) puts("ok");
  return failed;
}
