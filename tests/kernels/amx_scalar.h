// What the products of Intel AMX give, in scalar code that follows the manual's pseudocode. For amx_program.c.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct {
  uint8_t palette, start_row, reserved_0[14];
  uint16_t column_bytes[8];
  uint8_t reserved_1[16], rows[8], reserved_2[8];
} Config;

typedef union {
  uint8_t bytes[16][64];
  uint16_t halves[16][32];
  uint32_t words[16][16];
  float floats[16][16];
} Tile;

#define EXPECT(condition, ...)                                      \
  do {                                                              \
    if (!(condition)) {                                             \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);        \
      printf(__VA_ARGS__);                                          \
      printf("\n");                                                 \
      return 1;                                                     \
    }                                                               \
  } while (0)

static uint32_t next_random(uint64_t* seed) {
  *seed = *seed * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(*seed >> 32);
}

static void fill(void* data, size_t bytes, uint64_t* seed) {
  for (size_t i = 0; i < bytes; ++i) ((uint8_t*)data)[i] = (uint8_t)next_random(seed);
}

// Tile 5 is [m][n], tile 2 is [m][k], tile 7 is [k][n], in elements of four bytes.
static Config config_of(int m, int k, int n) {
  Config config = {.palette = 1};
  config.rows[5] = config.rows[2] = (uint8_t)m;
  config.rows[7] = (uint8_t)k;
  config.column_bytes[5] = config.column_bytes[7] = (uint16_t)(4 * n);
  config.column_bytes[2] = (uint16_t)(4 * k);
  return config;
}

static int32_t extend(uint8_t byte, int is_signed) { return is_signed ? (int8_t)byte : byte; }

static uint32_t bytes_reference(const Tile* a, const Tile* b, int m, int n, int k, uint32_t sum, int a_sign,
                                int b_sign) {
  for (int i = 0; i < 4 * k; ++i)
    sum += (uint32_t)(extend(a->bytes[m][i], a_sign) * extend(b->bytes[i / 4][4 * n + i % 4], b_sign));
  return sum;
}

// Denormals are zero on the way in and out.
static float flush(float value) { return fpclassify(value) == FP_SUBNORMAL ? copysignf(0.0f, value) : value; }
static float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return flush(value);
}
static float multiply_add(float a, float b, float c) { return flush(fmaf(a, b, c)); }

static float bf16_reference(const Tile* a, const Tile* b, int m, int n, int k, float sum) {
  float even = 0, odd = 0;
  for (int i = 0; i < k; ++i) {
    even = multiply_add(from_bf16(a->halves[m][2 * i]), from_bf16(b->halves[i][2 * n]), even);
    odd = multiply_add(from_bf16(a->halves[m][2 * i + 1]), from_bf16(b->halves[i][2 * n + 1]), odd);
  }
  return flush(flush(sum) + flush(even + odd));
}

// What a plausible mistake gives: one chain through all products.
static float bf16_one_chain(const Tile* a, const Tile* b, int m, int n, int k, float sum) {
  for (int i = 0; i < 2 * k; ++i)
    sum = multiply_add(from_bf16(a->halves[m][i]), from_bf16(b->halves[i / 2][2 * n + i % 2]), sum);
  return flush(sum);
}

static int same(float a, float b) { return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b)); }
