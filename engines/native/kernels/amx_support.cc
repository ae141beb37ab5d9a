#include "kernels/amx_support.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlrm_deploy {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// By CPUID itself: compilers learnt the names of these features one by one.
bool CpuHasAmx() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // 7.0, EDX
  constexpr unsigned kAvx512Bf16 = 1u << 5;                                          // 7.1, EAX
  // AVX-512 itself by the compiler's way, which asks the operating system too.
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl")) {
    return false;
  }
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned tiles = kAmxBf16 | kAmxTile | kAmxInt8;
  if ((edx & tiles) != tiles || eax < 1) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvx512Bf16) != 0;
}

// Linux grants tile registers, and the memory to save them in, to a process that asks.
bool SystemGrantsTiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool CpuHasAmx() { return false; }
bool SystemGrantsTiles() { return false; }
#endif

}  // namespace

bool SupportsAmx() {
  static const bool supported = CpuHasAmx() && SystemGrantsTiles();
  return supported;
}

}  // namespace dlrm_deploy
