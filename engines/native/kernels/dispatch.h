// dispatch.h: which inner loops this library has, and which one runs here.
#ifndef DLRM_DEPLOY_KERNELS_DISPATCH_H_
#define DLRM_DEPLOY_KERNELS_DISPATCH_H_

#include <string>
#include <vector>

#include "kernels/int8_mlp_path.h"
#include "kernels/kernel_path.h"
#include "kernels/mlp_path.h"

namespace dlrm_deploy {

struct KernelPath {
  const char* name;
  bool (*supported)();
  PoolChunk pool_chunk;
  Interact interact;
  MultiplyAddLoop multiply_add_loop;
  RunMlp run_mlp;
  RunInt8Mlp run_int8_mlp;
};

// Every path in this build, fastest first. "scalar" is always there and always supported.
const std::vector<KernelPath>& AllKernelPaths();

// Chooses the path called `name`, or the fastest one that this CPU supports when `name` is null or
// empty. Returns null and sets `error` when the name is unknown or the CPU lacks the path.
const KernelPath* ChooseKernelPath(const char* name, std::string* error);

// ChooseKernelPath of the environment variable DLRM_DEPLOY_KERNEL.
const KernelPath* ChooseKernelPathFromEnvironment(std::string* error);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_DISPATCH_H_
