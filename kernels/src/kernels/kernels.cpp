// Compiled once per instruction set, with BERTRT_ISA as the namespace's name. Everything but the table is private to
// the file, and nothing of the standard library is instantiated here.
#include "../table.h"
#include "encoder.h"
#include "heads.h"
#include "peak.h"

#define BERTRT_TEXT_OF(name) #name
#define BERTRT_TEXT(name) BERTRT_TEXT_OF(name)

namespace bertrt::BERTRT_ISA {
namespace {

uint32_t enter() {
  uint32_t state = 0;
#if defined(__x86_64__)
  state = __builtin_ia32_stmxcsr();
  // Denormals become zero: they cost hundreds of cycles each and carry nothing that counts.
  __builtin_ia32_ldmxcsr(state | 0x8040);
#endif
#if BERTRT_HAS_AMX
  _tile_loadconfig(&kTileConfig);
#endif
  return state;
}

void leave([[maybe_unused]] uint32_t state) {
#if BERTRT_HAS_AMX
  _tile_release();
#endif
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(state);
#endif
}

}  // namespace

extern const KernelTable kKernels;
const KernelTable kKernels = {BERTRT_TEXT(BERTRT_ISA), enter, leave, encode, mlm, pool, peak_int8, peak_float};

}  // namespace bertrt::BERTRT_ISA
