// prefetch.h: asks the cache for a table row. Internal to each file that includes it: see
// kernel_path.h.
#ifndef DLRM_DEPLOY_KERNELS_PREFETCH_H_
#define DLRM_DEPLOY_KERNELS_PREFETCH_H_

#include <stdint.h>

namespace dlrm_deploy {
namespace {

// Asks for all lines of a row: one every 64 bytes, and the last. Null asks for nothing.
inline void PrefetchRow(const void* row, int64_t bytes) {
  if (row == nullptr) return;
  const char* at = static_cast<const char*>(row);
  __builtin_prefetch(at);
  // A rest of up to four bytes lies on the line of the last byte.
  for (int64_t offset = 64; offset + 4 < bytes; offset += 64) __builtin_prefetch(at + offset);
  if (bytes % 64 != 0) __builtin_prefetch(at + bytes - 1);
}

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_PREFETCH_H_
