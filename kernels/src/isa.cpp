#include "isa.h"

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "error.h"
#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// Tests link an emulator of the AMX instructions into a process that has none; it answers 1.
extern "C" __attribute__((weak)) int bertrt_amx_is_emulated(void);

namespace bertrt {

namespace portable {
extern const KernelTable kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx2_vnni {
extern const KernelTable kKernels;
}
namespace avx512_vnni {
extern const KernelTable kKernels;
}
namespace avx512_bf16 {
extern const KernelTable kKernels;
}
namespace amx {
extern const KernelTable kKernels;
}
#endif

namespace {

constexpr std::array<const char*, kIsaCount> kNames = {"portable",    "avx2",        "avx2-vnni",
                                                       "avx512-vnni", "avx512-bf16", "amx"};

#if defined(__x86_64__)

// Bits of the state that the operating system saves for a thread (register XCR0).
constexpr uint64_t kAvxState = 0x6;
constexpr uint64_t kAvx512State = 0xe6;
constexpr uint64_t kAmxState = 0x60000;

struct Features {
  bool fma, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, amx;
  uint64_t saved;  // XCR0
};

bool bit(uint32_t word, int index) { return (word >> index & 1) != 0; }

Features read_features() {
  Features features{};
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return features;
  features.fma = bit(c, 12);
  if (bit(c, 27)) {  // OSXSAVE: xgetbv may be executed
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    features.saved = (static_cast<uint64_t>(high) << 32) | low;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return features;
  const uint32_t subleaves = a;
  features.avx2 = bit(b, 5);
  features.avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  features.avx512_vnni = bit(c, 11);
  features.amx = bit(d, 22) && bit(d, 24) && bit(d, 25);  // BF16, TILE, INT8
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    features.avx_vnni = bit(a, 4);
    features.avx512_bf16 = bit(a, 5);
  }
  return features;
}

bool saves(const Features& features, uint64_t state) { return (features.saved & state) == state; }

// Linux hands out the 8 KB of tile registers to processes that ask for them.
std::string ask_for_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("the operating system refuses the use of AMX: ") + std::strerror(errno);
#else
  return "AMX is used on Linux only";
#endif
}

std::string find_problem(Isa isa, const Features& features) {
  const std::string lacks = "this processor lacks ";
  const std::string unsaved = "the operating system does not enable the registers of ";
  if (isa == Isa::kPortable) return "";
  if (!features.avx2 || !features.fma) return lacks + "AVX2 with FMA";
  if (!saves(features, kAvxState)) return unsaved + "AVX";
  if (isa == Isa::kAvx2) return "";
  if (isa == Isa::kAvx2Vnni) return features.avx_vnni ? "" : lacks + "AVX-VNNI";
  if (!features.avx512) return lacks + "AVX-512 (F, BW, DQ and VL)";
  if (!saves(features, kAvx512State)) return unsaved + "AVX-512";
  if (!features.avx512_vnni) return lacks + "AVX-512 VNNI";
  if (isa == Isa::kAvx512Vnni) return "";
  if (!features.avx512_bf16) return lacks + "AVX-512 BF16";
  if (isa == Isa::kAvx512Bf16) return "";
  if (bertrt_amx_is_emulated != nullptr && bertrt_amx_is_emulated() == 1) return "";
  if (!features.amx) return lacks + "AMX (TILE, INT8 and BF16)";
  if (!saves(features, kAmxState)) return unsaved + "AMX";
  return ask_for_amx();
}

#endif

std::array<std::string, kIsaCount> find_problems() {
  std::array<std::string, kIsaCount> problems;
#if defined(__x86_64__)
  const Features features = read_features();
  for (int i = 0; i < kIsaCount; ++i) problems[static_cast<size_t>(i)] = find_problem(static_cast<Isa>(i), features);
#else
  for (size_t i = 1; i < kIsaCount; ++i) problems[i] = "it is for x86-64 processors";
#endif
  return problems;
}

// "amx, avx2 and so on": those that match, best first.
std::string list_names(bool usable_only) {
  std::string list;
  for (int i = kIsaCount - 1; i >= 0; --i) {
    if (usable_only && *isa_problem(static_cast<Isa>(i)) != '\0') continue;
    list += (list.empty() ? "" : ", ") + std::string(isa_name(static_cast<Isa>(i)));
  }
  return list;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<size_t>(isa)]; }

const char* isa_problem(Isa isa) {
  static const std::array<std::string, kIsaCount> problems = find_problems();
  return problems[static_cast<size_t>(isa)].c_str();
}

const KernelTable* kernels_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return &portable::kKernels;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return &avx2::kKernels;
    case Isa::kAvx2Vnni:
      return &avx2_vnni::kKernels;
    case Isa::kAvx512Vnni:
      return &avx512_vnni::kKernels;
    case Isa::kAvx512Bf16:
      return &avx512_bf16::kKernels;
    case Isa::kAmx:
      return &amx::kKernels;
#else
    default:
      break;
#endif
  }
  return nullptr;
}

const KernelTable& select_kernels() {
  const char* asked = std::getenv("BERTRT_ISA");
  const bool named = asked != nullptr && *asked != '\0';
  for (int i = kIsaCount - 1; i >= 0; --i) {
    const Isa isa = static_cast<Isa>(i);
    if (named && std::strcmp(asked, isa_name(isa)) != 0) continue;
    const char* problem = isa_problem(isa);
    if (*problem == '\0') return *kernels_of(isa);
    if (named) {
      throw Error(ErrorCode::kUnsupported, std::string("BERTRT_ISA=") + asked + " cannot be used here: " + problem +
                                               "; what can be used here: " + list_names(true));
    }
  }
  throw Error(ErrorCode::kUnsupported, std::string("BERTRT_ISA=") + std::string(asked).substr(0, 40) +
                                           " is not the name of an instruction set; the names: " + list_names(false) +
                                           "; what can be used here: " + list_names(true));
}

}  // namespace bertrt
