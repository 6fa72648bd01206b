// Intel AMX instructions (TILE, INT8, BF16) in software: decoding, and carrying out on tiles that each thread has of
// its own. For amx_emulator.c.
//
// They do what the "Operation" sections and the exception classes AMX-E1 to E6 of Intel's Software Developer's Manual
// (volume 2) say, with one difference: a processor that faults in the middle of a load or a store keeps the row in
// start_row and begins there again; here the fault happens inside the loop, which goes on once the fault is mended.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#ifndef __FMA__
#error "the emulator needs an x86-64 processor with FMA, and to be compiled with -march=native"
#endif

enum { kTiles = 8, kMaxRows = 16, kMaxColumnBytes = 64, kMaxColumns = 16 };

typedef union {
  uint8_t bytes[kMaxColumnBytes];
  uint32_t words[kMaxColumns];
  int32_t ints[kMaxColumns];
  float floats[kMaxColumns];
} Row;

// What LDTILECFG reads.
typedef struct {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved_0[14];
  uint16_t column_bytes[kTiles];
  uint8_t reserved_1[16];
  uint8_t rows[kTiles];
  uint8_t reserved_2[8];
} Config;
_Static_assert(sizeof(Config) == 64, "the layout of LDTILECFG's operand");

typedef struct {
  Config config;  // palette 0: not configured
  _Alignas(64) Row tiles[kTiles][kMaxRows];
} State;

// The model "initial-exec" allocates nothing at the first access, which happens inside a signal handler.
static __thread State state __attribute__((tls_model("initial-exec")));

enum {
  kLdtilecfg, kSttilecfg, kTilerelease, kTilezero, kTileloadd, kTileloaddt1, kTilestored,
  kTdpbssd, kTdpbsud, kTdpbusd, kTdpbuud, kTdpbf16ps, kKinds
};
static const char* const kNames[kKinds] = {
    "LDTILECFG", "STTILECFG", "TILERELEASE", "TILEZERO", "TILELOADD", "TILELOADDT1", "TILESTORED",
    "TDPBSSD", "TDPBSUD", "TDPBUSD", "TDPBUUD", "TDPBF16PS"};
static long executed[kKinds];

typedef struct {
  int kind;
  int reg, rm, vvvv;   // as tile numbers; 8 and more do not exist
  uint8_t* address;    // of a memory operand
  uint64_t stride;     // index << scale
  int length;          // in bytes
} Instruction;

// Places of rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15 in a signal's context.
static const int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static int32_t read32(const uint8_t* bytes) {
  int32_t value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

// Kind by opcode, mandatory prefix (0: none, 1: 66, 2: F3, 3: F2) and form of ModRM; -1 if it is not of AMX.
static int kind_of(uint8_t opcode, int prefix, uint8_t modrm) {
  const bool memory = modrm >> 6 != 3;
  const int reg = modrm >> 3 & 7, rm = modrm & 7;
  static const int kLoads[4] = {-1, kTileloaddt1, kTilestored, kTileloadd};
  static const int kFloats[4] = {-1, -1, kTdpbf16ps, -1};
  static const int kBytes[4] = {kTdpbuud, kTdpbusd, kTdpbsud, kTdpbssd};
  switch (opcode) {
    case 0x49:
      if (memory && reg == 0 && prefix == 0) return kLdtilecfg;
      if (memory && reg == 0 && prefix == 1) return kSttilecfg;
      if (modrm == 0xc0 && prefix == 0) return kTilerelease;
      if (!memory && rm == 0 && prefix == 3) return kTilezero;
      return -1;
    case 0x4b:
      return memory && rm == 4 ? kLoads[prefix] : -1;
    case 0x5c:
      return memory ? -1 : kFloats[prefix];
    case 0x5e:
      return memory ? -1 : kBytes[prefix];
    default:
      return -1;
  }
}

static bool decode(const uint8_t* code, const greg_t* registers, Instruction* out) {
  // VEX: C4, [not R, not X, not B, map], [W, not vvvv, L, prefix]. All are of map 0F38, 128 bits, W0.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
  const uint8_t modrm = code[4];
  out->kind = kind_of(code[3], code[2] & 3, modrm);
  if (out->kind < 0) return false;
  const int extensions = ~code[1];
  const int reg_high = (extensions >> 7 & 1) * 8, index_high = (extensions >> 6 & 1) * 8;
  const int base_high = (extensions >> 5 & 1) * 8;
  const int mod = modrm >> 6, rm = modrm & 7;
  out->reg = (modrm >> 3 & 7) + reg_high;
  out->rm = rm + base_high;
  out->vvvv = ~code[2] >> 3 & 15;
  out->length = 5;
  if (mod == 3) return true;

  uint64_t address = 0;
  out->stride = 0;
  bool relative = false;
  int displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  if (rm == 4) {
    const uint8_t sib = code[out->length++];
    const int index = (sib >> 3 & 7) + index_high;
    if (index != 4) out->stride = (uint64_t)registers[kRegisters[index]] << (sib >> 6);
    if (mod == 0 && (sib & 7) == 5) {
      displacement_bytes = 4;  // and no base
    } else {
      address = (uint64_t)registers[kRegisters[(sib & 7) + base_high]];
    }
  } else if (mod == 0 && rm == 5) {
    displacement_bytes = 4;
    relative = true;
  } else {
    address = (uint64_t)registers[kRegisters[rm + base_high]];
  }
  if (displacement_bytes == 1) address += (uint64_t)(int64_t)(int8_t)code[out->length];
  if (displacement_bytes == 4) address += (uint64_t)(int64_t)read32(code + out->length);
  out->length += displacement_bytes;
  if (relative) address += (uint64_t)(uintptr_t)(code + out->length);
  // Only loads and stores of tiles take the index for a stride.
  if (out->kind == kLdtilecfg || out->kind == kSttilecfg) address += out->stride;
  out->address = (uint8_t*)address;
  return true;
}

// From here on a function returns what is wrong, or null.

static const char* load_config(const Instruction* in) {
  if (in->vvvv != 0) return "#UD: VEX.vvvv is in use";
  Config config;
  memcpy(&config, in->address, sizeof config);
  if (config.palette > 1) return "#GP: the palette is not 0 or 1";
  if (config.palette == 0) {
    memset(&state, 0, sizeof state);
    return NULL;
  }
  for (size_t i = 0; i < sizeof config.reserved_0; ++i)
    if (config.reserved_0[i] != 0) return "#GP: bytes 2 to 15 are not zero";
  for (size_t i = 0; i < sizeof config.reserved_1; ++i)
    if (config.reserved_1[i] != 0) return "#GP: bytes 32 to 47 are not zero";
  for (size_t i = 0; i < sizeof config.reserved_2; ++i)
    if (config.reserved_2[i] != 0) return "#GP: bytes 56 to 63 are not zero";
  for (int i = 0; i < kTiles; ++i) {
    if (config.column_bytes[i] > kMaxColumnBytes) return "#GP: a tile has more than 64 bytes in a row";
    if (config.rows[i] > kMaxRows) return "#GP: a tile has more than 16 rows";
    if ((config.rows[i] == 0) != (config.column_bytes[i] == 0)) return "#GP: a tile has only rows or only columns";
  }
  memset(&state, 0, sizeof state);
  state.config = config;
  return NULL;
}

static const char* check_tile(int tile) {
  if (state.config.palette == 0) return "#UD: the tiles are not configured";
  if (tile >= kTiles) return "#UD: there is no such tile";
  if (state.config.rows[tile] == 0) return "#UD: the configuration leaves this tile out";
  return NULL;
}

static const char* move_tile(const Instruction* in) {
  if (in->vvvv != 0) return "#UD: VEX.vvvv is in use";
  const char* problem = check_tile(in->reg);
  if (problem != NULL) return problem;
  const size_t bytes = state.config.column_bytes[in->reg];
  const int rows = state.config.rows[in->reg], start = state.config.start_row;
  if (bytes % 4 != 0) return "#UD: the tile's rows are not a multiple of 4 bytes";
  if (start >= rows) return "#UD: start_row is beyond the tile's rows";
  Row* tile = state.tiles[in->reg];
  if (in->kind == kTilestored) {
    for (int i = start; i < rows; ++i) memcpy(in->address + (uint64_t)i * in->stride, tile[i].bytes, bytes);
  } else {
    // What lies beyond the tile's rows and columns is zero since the configuration was loaded.
    for (int i = start; i < rows; ++i) memcpy(tile[i].bytes, in->address + (uint64_t)i * in->stride, bytes);
  }
  state.config.start_row = 0;
  return NULL;
}

// dst [m][n] += a [m][k] * b [k][n], where an element of a or b is four bytes or a pair of 16 bits.
static const char* check_product(const Instruction* in) {
  const int tiles[3] = {in->reg, in->rm, in->vvvv};
  for (int i = 0; i < 3; ++i) {
    const char* problem = check_tile(tiles[i]);
    if (problem != NULL) return problem;
    if (state.config.column_bytes[tiles[i]] % 4 != 0) return "#UD: a tile's rows are not a multiple of 4 bytes";
  }
  const int c = in->reg, a = in->rm, b = in->vvvv;
  const Config* config = &state.config;
  if (c == a || a == b || c == b) return "#UD: a tile is used twice";
  if (config->rows[c] != config->rows[a]) return "#UD: destination and first source differ in rows";
  if (config->column_bytes[c] != config->column_bytes[b]) return "#UD: destination and second source differ in columns";
  if (config->column_bytes[a] / 4 != config->rows[b]) return "#UD: the sources differ in their inner dimension";
  return NULL;
}

// Tiles are zero beyond their rows and columns, so all loops over columns run to 16, which the compiler unrolls.
static inline __attribute__((always_inline)) void multiply_bytes(const Instruction* in, bool a_signed, bool b_signed) {
  const Row *a = state.tiles[in->rm], *b = state.tiles[in->vvvv];
  Row* c = state.tiles[in->reg];
  const int rows = state.config.rows[in->reg], inner = state.config.rows[in->vvvv];
  int32_t b_parts[kMaxRows][4][kMaxColumns];
  for (int k = 0; k < inner; ++k)
    for (int part = 0; part < 4; ++part)
      for (int n = 0; n < kMaxColumns; ++n) {
        const uint8_t byte = (uint8_t)(b[k].words[n] >> (8 * part));
        b_parts[k][part][n] = b_signed ? (int8_t)byte : byte;
      }
  for (int m = 0; m < rows; ++m) {
    uint32_t sums[kMaxColumns];  // unsigned: it wraps, as the instruction does
    memcpy(sums, c[m].words, sizeof sums);
    for (int k = 0; k < inner; ++k)
      for (int part = 0; part < 4; ++part) {
        const uint8_t byte = a[m].bytes[4 * k + part];
        const int32_t factor = a_signed ? (int8_t)byte : byte;
        for (int n = 0; n < kMaxColumns; ++n) sums[n] += (uint32_t)(factor * b_parts[k][part][n]);
      }
    memcpy(c[m].words, sums, sizeof sums);
  }
}

static __attribute__((noinline)) void multiply_ss(const Instruction* in) { multiply_bytes(in, true, true); }
static __attribute__((noinline)) void multiply_su(const Instruction* in) { multiply_bytes(in, true, false); }
static __attribute__((noinline)) void multiply_us(const Instruction* in) { multiply_bytes(in, false, true); }
static __attribute__((noinline)) void multiply_uu(const Instruction* in) { multiply_bytes(in, false, false); }

static float widen(uint32_t high_half) {
  float value;
  memcpy(&value, &high_half, sizeof value);
  return value;
}

// Sums of the even and of the odd products, each a chain of fused multiply-adds from zero in the order of k; the two
// are added, and their sum is added to the destination. The caller sets the floating-point mode.
static __attribute__((noinline)) void multiply_bf16(const Instruction* in) {
  const Row *a = state.tiles[in->rm], *b = state.tiles[in->vvvv];
  Row* c = state.tiles[in->reg];
  const int rows = state.config.rows[in->reg], inner = state.config.rows[in->vvvv];
  const int columns = state.config.column_bytes[in->reg] / 4;
  for (int m = 0; m < rows; ++m) {
    float even[kMaxColumns] = {0}, odd[kMaxColumns] = {0};
    for (int k = 0; k < inner; ++k) {
      const float a_even = widen(a[m].words[k] << 16), a_odd = widen(a[m].words[k] & 0xffff0000u);
      for (int n = 0; n < kMaxColumns; ++n) {
        even[n] = __builtin_fmaf(a_even, widen(b[k].words[n] << 16), even[n]);
        odd[n] = __builtin_fmaf(a_odd, widen(b[k].words[n] & 0xffff0000u), odd[n]);
      }
    }
    // Columns beyond the tile's stay zero, where an infinity in a would have made them not-a-number.
    for (int n = 0; n < columns; ++n) c[m].floats[n] += even[n] + odd[n];
  }
}

static const char* execute(const Instruction* in) {
  static void (*const kProducts[])(const Instruction*) = {multiply_ss, multiply_su, multiply_us, multiply_uu,
                                                          multiply_bf16};
  const char* problem = NULL;
  switch (in->kind) {
    case kLdtilecfg:
      return load_config(in);
    case kSttilecfg:
      if (in->vvvv != 0) return "#UD: VEX.vvvv is in use";
      memcpy(in->address, &state.config, sizeof state.config);
      return NULL;
    case kTilerelease:
      if (in->vvvv != 0) return "#UD: VEX.vvvv is in use";
      memset(&state, 0, sizeof state);
      return NULL;
    case kTilezero:
      if (in->vvvv != 0) return "#UD: VEX.vvvv is in use";
      problem = check_tile(in->reg);
      if (problem == NULL) memset(state.tiles[in->reg], 0, sizeof state.tiles[in->reg]);
      break;
    case kTileloadd:
    case kTileloaddt1:
    case kTilestored:
      return move_tile(in);
    default:
      problem = check_product(in);
      if (problem == NULL) kProducts[in->kind - kTdpbssd](in);
      break;
  }
  if (problem == NULL) state.config.start_row = 0;
  return problem;
}
