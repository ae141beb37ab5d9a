#include "kernels/dispatch.h"

#include <cstdlib>
#include <cstring>

namespace dlrm_deploy {

const std::vector<KernelPath>& AllKernelPaths() {
  static const std::vector<KernelPath> paths = {
#if defined(__x86_64__)
      {"avx512", [] { return bool(__builtin_cpu_supports("avx512f")); }, PoolChunkAvx512,
       InteractAvx512, MultiplyAddLoopAvx512},
      {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
       PoolChunkAvx2, InteractAvx2, MultiplyAddLoopAvx2},
#endif
      {"scalar", [] { return true; }, PoolChunkScalar, InteractScalar, MultiplyAddLoopScalar},
  };
  return paths;
}

const KernelPath* ChooseKernelPath(const char* name, std::string* error) {
  const bool any = name == nullptr || *name == '\0';
  std::string reason = "is not one that this library has";
  std::string supported;
  for (const KernelPath& path : AllKernelPaths()) {
    const bool wanted = any || std::strcmp(name, path.name) == 0;
    if (path.supported()) {
      if (wanted) return &path;
      supported += supported.empty() ? path.name : std::string(", ") + path.name;
    } else if (wanted && !any) {
      reason = "is not supported by this CPU";
    }
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
