#include "kernels/dispatch.h"

#include <cstdlib>
#include <cstring>

#include "kernels/amx_support.h"

namespace dlrm_deploy {
namespace {

#if defined(__x86_64__)
bool SupportsAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool SupportsAvx512() {
  return SupportsAvx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#if defined(DLRM_DEPLOY_HAS_AMX)
bool SupportsAmxPath() { return SupportsAvx512() && SupportsAmx(); }
#endif
#endif

}  // namespace

const std::vector<KernelPath>& AllKernelPaths() {
  static const std::vector<KernelPath> paths = {
#if defined(DLRM_DEPLOY_HAS_AMX)
      {"amx", SupportsAmxPath, PoolChunkAvx512, InteractAvx512, MultiplyAddLoopAvx512, RunMlpAmx,
       RunInt8MlpAmx},
#endif
#if defined(__x86_64__)
      {"avx512", SupportsAvx512, PoolChunkAvx512, InteractAvx512, MultiplyAddLoopAvx512,
       RunMlpAvx512, RunInt8MlpAvx512},
      {"avx2", SupportsAvx2, PoolChunkAvx2, InteractAvx2, MultiplyAddLoopAvx2, RunMlpAvx2,
       RunInt8MlpAvx2},
#endif
      {"scalar", [] { return true; }, PoolChunkScalar, InteractScalar, MultiplyAddLoopScalar,
       RunMlpScalar, RunInt8MlpScalar},
  };
  return paths;
}

const KernelPath* ChooseKernelPath(const char* name, std::string* error) {
  const bool any = name == nullptr || *name == '\0';
  std::string reason = "is not one that this library has";
  for (const KernelPath& path : AllKernelPaths()) {
    if (!any && std::strcmp(name, path.name) != 0) continue;
    // No other path is asked: "amx" would request tile registers for the whole process.
    if (path.supported()) return &path;
    reason = "is not supported by this CPU and its operating system";
  }
  std::string supported;
  for (const KernelPath& path : AllKernelPaths()) {
    if (path.supported())
      supported += supported.empty() ? path.name : std::string(", ") + path.name;
  }
  *error = std::string("kernel path \"") + name + "\" " + reason + "; choose from: " + supported;
  return nullptr;
}

const KernelPath* ChooseKernelPathFromEnvironment(std::string* error) {
  const KernelPath* path = ChooseKernelPath(std::getenv("DLRM_DEPLOY_KERNEL"), error);
  if (path == nullptr) *error = "DLRM_DEPLOY_KERNEL: " + *error + ", or unset the variable";
  return path;
}

}  // namespace dlrm_deploy
