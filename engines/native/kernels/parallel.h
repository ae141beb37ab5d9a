// parallel.h: how a kernel asks for its blocks to be run, without knowing whose threads run them.
#ifndef DLRM_DEPLOY_KERNELS_PARALLEL_H_
#define DLRM_DEPLOY_KERNELS_PARALLEL_H_

#include <cstddef>

namespace dlrm_deploy {

// Work cut into `blocks` independent pieces. `run(context, i)` is called once for each i in [0,
// blocks), by any thread, and does not throw.
class BlockRunner {
 public:
  virtual ~BlockRunner() = default;

  template <typename Body>
  void ForEachBlock(size_t blocks, Body& body) const {
    const auto run = [](void* context, size_t block) { (*static_cast<Body*>(context))(block); };
    if (blocks > 1) {
      Run(blocks, run, &body);
    } else if (blocks == 1) {
      body(0);  // a single block is not worth waking another thread
    }
  }

 protected:
  using RunBlock = void (*)(void* context, size_t block);
  virtual void Run(size_t blocks, RunBlock run, void* context) const = 0;
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_PARALLEL_H_
