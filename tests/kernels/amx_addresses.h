// Loads, stores and configurations of Intel AMX, through each form of address. For amx_program.c.
#pragma once

#include <immintrin.h>
#include <sys/mman.h>

#include "amx_scalar.h"

// GCC 12's intrinsics do not say what memory they read, and of a configuration they name the first 8 bytes only.
static void load_config(const Config* config) {
  __asm__ volatile("" : : : "memory");
  _tile_loadconfig(config);
}
static void store_config(Config* config) {
  _tile_storeconfig(config);
  __asm__ volatile("" : : : "memory");
}
#define LOAD_TILE(tile, base, stride)    \
  do {                                   \
    __asm__ volatile("" : : : "memory"); \
    _tile_loadd(tile, base, stride);     \
  } while (0)
#define STREAM_TILE(tile, base, stride)    \
  do {                                     \
    __asm__ volatile("" : : : "memory");   \
    _tile_stream_loadd(tile, base, stride); \
  } while (0)

// At this address, so that one form of address needs no register for the base.
#define MEMORY_ADDRESS 0x20000000
enum { kMemoryBytes = 32768 };

static int check_strides(const uint8_t* from) {
  Config config = {.palette = 1};
  config.rows[3] = 7;
  config.column_bytes[3] = 20;
  load_config(&config);
  for (long stride = -75; stride <= 75; stride += 25) {
    uint8_t stored[7][64];
    memset(stored, 0xee, sizeof stored);
    if (stride % 2 == 0) LOAD_TILE(3, from, stride);
    if (stride % 2 != 0) STREAM_TILE(3, from, stride);
    _tile_stored(3, stored, 64);
    for (long i = 0; i < 7; ++i)
      for (long j = 0; j < 64; ++j) {
        const uint8_t want = j < 20 ? from[i * stride + j] : 0xee;
        EXPECT(stored[i][j] == want, "loaded with stride %ld, at %ld, %ld", stride, i, j);
      }
  }
  for (long stride = 20; stride <= 200; stride += 60) {
    uint8_t stored[8 * 200];
    memset(stored, 0xee, sizeof stored);
    LOAD_TILE(3, from, 20);
    _tile_stored(3, stored, stride);
    for (long at = 0; at < 8 * stride; ++at) {
      const uint8_t want = at / stride < 7 && at % stride < 20 ? from[at / stride * 20 + at % stride] : 0xee;
      EXPECT(stored[at] == want, "stored with stride %ld, at %ld", stride, at);
    }
  }
  uint8_t stored[16][64];
  memset(stored, 0xee, sizeof stored);
  _tile_zero(3);
  _tile_stored(3, stored, 64);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 64; ++j) EXPECT(stored[i][j] == (i < 7 && j < 20 ? 0 : 0xee), "zeroed, at %d, %d", i, j);
  return 0;
}

// A load that was interrupted goes on at start_row, and leaves it zero.
static int check_start_row(const uint8_t* from) {
  Config config = {.palette = 1, .start_row = 3};
  config.rows[3] = 7;
  config.column_bytes[3] = 20;
  load_config(&config);
  for (int start = 3; start >= 0; start -= 3) {
    uint8_t stored[7][64];
    store_config(&config);
    EXPECT(config.start_row == start, "%d, not %d", config.start_row, start);
    LOAD_TILE(3, from, 64);
    _tile_stored(3, stored, 64);
    for (int i = 0; i < 7; ++i)
      for (int j = 0; j < 20; ++j) EXPECT(stored[i][j] == (i < start ? 0 : from[i * 64 + j]), "at %d, %d", i, j);
  }
  return 0;
}

// Loads from a form of address, with `base` in one register and `step` in another, and stores to a plain one.
#define FORM(text, base_register, step_register, displacement, step_value, scale)                     \
  do {                                                                                                \
    memset(stored, 0xee, sizeof stored);                                                              \
    register const uint8_t* base __asm__(base_register) = from - (displacement);                      \
    register long step __asm__(step_register) = (step_value);                                         \
    __asm__ volatile(text "\n\ttilestored %%tmm4, (%2,%3)"                                            \
                     : : "r"(base), "r"(step), "r"(stored), "r"(64L) : "memory");                     \
    for (int i = 0; i < 16; ++i)                                                                      \
      EXPECT(memcmp(stored[i], from + i * (step_value) * (scale), 64) == 0, "%s: row %d", text, i);   \
  } while (0)

static int check_addresses(const uint8_t* from) {
  Config config = {.palette = 1};
  config.rows[4] = 16;
  config.column_bytes[4] = 64;
  load_config(&config);
  uint8_t stored[16][64];
  FORM("tileloadd (%0,%1,1), %%tmm4", "rbx", "rsi", 0, 64, 1);
  FORM("tileloadd (%0,%1,2), %%tmm4", "r12", "r10", 0, 40, 2);
  FORM("tileloadd (%0,%1,4), %%tmm4", "r13", "r12", 0, 17, 4);
  FORM("tileloadd 64(%0,%1,8), %%tmm4", "r12", "rbx", 64, 16, 8);
  FORM("tileloadd -64(%0,%1,1), %%tmm4", "rdi", "r15", -64, 100, 1);
  FORM("tileloaddt1 4096(%0,%1,1), %%tmm4", "r8", "rdx", 4096, 64, 1);
  FORM("tileloaddt1 -4096(%0,%1,1), %%tmm4", "r13", "r14", -4096, -64, 1);
  // No index is a stride of zero; no base is an address of 32 bits.
  FORM("tileloadd 8(%0), %%tmm4", "r9", "rbx", 8, 0, 1);
  FORM("tileloadd 0x20002000(,%1,1), %%tmm4", "r9", "rbx", 0, 64, 1);
  uint64_t there = 0;
  __asm__ volatile("tileloadd 16(%%rsp), %%tmm4\n\ttilestored %%tmm4, (%1,%2)\n\tmovq 16(%%rsp), %0"
                   : "=&r"(there) : "r"(stored), "r"(64L) : "memory");
  EXPECT(memcmp(stored[9], &there, 8) == 0, "an address on the stack");
  return 0;
}

static int moves(uint64_t seed) {
  uint8_t* memory = mmap((void*)MEMORY_ADDRESS, kMemoryBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  EXPECT(memory == (uint8_t*)MEMORY_ADDRESS, "cannot map memory there");
  fill(memory, kMemoryBytes, &seed);
  const uint8_t* from = memory + 0x2000;
  const int failed = check_strides(from) != 0 || check_start_row(from) != 0 || check_addresses(from) != 0;
  _tile_release();
  munmap(memory, kMemoryBytes);
  return failed;
}

// ---- Configurations

static const Config kFixed = {.palette = 1, .column_bytes = {4, 8, 12, 16}, .rows = {1, 2, 3, 4}};
static Config seen;

static int configs(uint64_t seed) {
  (void)seed;
  Config table[40];
  memset(table, 0, sizeof table);
  for (int i = 0; i < 40; ++i) {
    table[i].palette = 1;
    table[i].rows[i % 8] = (uint8_t)(1 + i % 16);
    table[i].column_bytes[i % 8] = (uint16_t)(1 + i);
  }
  // A multiple of 4 bytes is asked for by products, loads and stores, not by the configuration.
  const Config zero = {0};
  store_config(&seen);
  EXPECT(memcmp(&seen, &zero, 64) == 0, "a configuration before the first");

#define CONFIG_FORM(text, want, base_register, step_register, base_value, step_value)                       \
  do {                                                                                                      \
    memset(&seen, 0xee, sizeof seen);                                                                       \
    register const void* base __asm__(base_register) = (base_value);                                        \
    register long step __asm__(step_register) = (step_value);                                               \
    __asm__ volatile("ldtilecfg " text "\n\tsttilecfg %2" : : "r"(base), "r"(step), "m"(seen) : "memory");  \
    EXPECT(memcmp(&seen, (want), 64) == 0, "%s", text);                                                     \
  } while (0)
  CONFIG_FORM("(%0)", &table[1], "rcx", "rbx", &table[1], 0);
  CONFIG_FORM("(%0)", &table[2], "r12", "rbx", &table[2], 0);
  CONFIG_FORM("(%0)", &table[3], "r13", "rbx", &table[3], 0);
  CONFIG_FORM("-64(%0)", &table[4], "rdx", "rbx", &table[5], 0);
  CONFIG_FORM("1280(%0)", &table[25], "r11", "rbx", &table[5], 0);
  CONFIG_FORM("(%0,%1,8)", &table[6], "rsi", "r9", &table[0], 48);
  CONFIG_FORM("64(%0,%1,2)", &table[8], "r13", "r12", &table[0], 224);
  // Static data is addressed relative to the instruction.
  __asm__ volatile("ldtilecfg %1\n\tsttilecfg %0" : "=m"(seen) : "m"(kFixed));
  EXPECT(memcmp(&seen, &kFixed, 64) == 0, "static data");
  _tile_release();
  store_config(&seen);
  EXPECT(memcmp(&seen, &zero, 64) == 0, "a configuration after its release");
  return 0;
}
