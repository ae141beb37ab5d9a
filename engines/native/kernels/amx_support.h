// amx_support.h: whether the AMX path may run here.
#ifndef DLRM_DEPLOY_KERNELS_AMX_SUPPORT_H_
#define DLRM_DEPLOY_KERNELS_AMX_SUPPORT_H_

namespace dlrm_deploy {

// All that the files compiled for AMX use: the CPU has AMX with bf16 and int8, AVX-512 and its
// conversions to bf16, and the operating system lets this process use tiles. It is asked for that
// once: tile registers have to be requested, and a process that has them needs larger signal
// stacks.
bool SupportsAmx();

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_AMX_SUPPORT_H_
