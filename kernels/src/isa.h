// Which instruction sets there are, which of them this machine has, and which one is used.
#pragma once

namespace bertrt {

struct KernelTable;

// In rising order of preference.
enum class Isa : int { kPortable = 0, kAvx2, kAvx2Vnni, kAvx512Vnni, kAvx512Bf16, kAmx };
inline constexpr int kIsaCount = 6;

// "portable", "avx2", "avx2-vnni", "avx512-vnni", "avx512-bf16", "amx"
const char* isa_name(Isa isa);

// Why an instruction set cannot be used here (not compiled in, the processor lacks it, the operating system
// refuses it); an empty string if it can be. Static storage. Asks the operating system for AMX once.
const char* isa_problem(Isa isa);

// The kernels of the one that BERTRT_ISA names, or of the best one. Throws Error (kUnsupported) for a
// name that does not exist or that cannot be used here. The environment is read at each call.
const KernelTable& select_kernels();

// The kernels of one instruction set, null where they are not compiled in. For tests.
const KernelTable* kernels_of(Isa isa);

}  // namespace bertrt
