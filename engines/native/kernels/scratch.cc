#include "kernels/scratch.h"

#include <string>

namespace dlrm_deploy {

Scratch::Scratch(size_t bytes) noexcept {
  thread_local AlignedBuffer kept;
  data_ = (bytes <= kMostKept ? kept : own_).Reserve(bytes);
}

Error OutOfMemory(size_t bytes) {
  return "out of memory for a scratch of " + std::to_string(bytes) + " bytes";
}

}  // namespace dlrm_deploy
