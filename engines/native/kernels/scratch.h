// scratch.h: working memory of one block.
#ifndef DLRM_DEPLOY_KERNELS_SCRATCH_H_
#define DLRM_DEPLOY_KERNELS_SCRATCH_H_

#include <atomic>
#include <cstddef>

#include "kernels/aligned_buffer.h"
#include "kernels/error.h"
#include "kernels/parallel.h"

namespace dlrm_deploy {

// Memory on cache lines for as long as it lives, one at a time on a thread. Usual sizes are lent
// from a buffer that the thread keeps, whatever the number of sessions; larger ones are given back,
// so that no thread of a pool holds on to what one odd model once needed.
class Scratch {
 public:
  static constexpr size_t kMostKept = size_t{4} << 20;

  explicit Scratch(size_t bytes) noexcept;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Null when memory ran out.
  void* data() const { return data_; }

 private:
  AlignedBuffer own_;
  void* data_;
};

// What to say when memory ran out.
Error OutOfMemory(size_t bytes);

// `body(block, scratch)` for each block, with `bytes` of scratch that are the block's own, 64-byte
// aligned. Fails only when memory runs out; some blocks have then not run.
template <class Body>
Error ForEachBlockWithScratch(const BlockRunner& runner, size_t blocks, size_t bytes,
                              const Body& body) {
  std::atomic<bool> out_of_memory{false};
  auto run = [&](size_t block) {
    const Scratch scratch(bytes);
    if (scratch.data() == nullptr) {
      out_of_memory.store(true, std::memory_order_relaxed);
    } else {
      body(block, scratch.data());
    }
  };
  runner.ForEachBlock(blocks, run);
  return out_of_memory.load() ? OutOfMemory(bytes) : Error();
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_SCRATCH_H_
