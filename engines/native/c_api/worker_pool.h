// worker_pool.h: threads for the plain C functions, which run without ONNX Runtime and its pool.
#ifndef DLRM_DEPLOY_C_API_WORKER_POOL_H_
#define DLRM_DEPLOY_C_API_WORKER_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/parallel.h"

namespace dlrm_deploy {

// Idle workers sleep: spinning ones would disturb whatever else is being measured.
class WorkerPool {
 public:
  // The pool of this process. It is never destroyed, so that no thread outlives what it uses.
  static WorkerPool& Shared();

  // Calls run(context, i) for each i in [0, blocks) on the calling thread and `threads` - 1
  // workers. Callers take turns. May throw std::system_error when the workers cannot be started.
  void Run(int threads, size_t blocks, void (*run)(void*, size_t), void* context);

 private:
  void Work(size_t worker, uint64_t seen);
  void TakeBlocks();

  std::mutex turn_;   // one Run() at a time
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::condition_variable done_;
  uint64_t generation_ = 0;  // counts Run() calls
  size_t helpers_ = 0;       // workers asked for by this Run()
  size_t busy_ = 0;
  std::vector<std::thread> workers_;

  void (*run_)(void*, size_t) = nullptr;
  void* context_ = nullptr;
  size_t blocks_ = 0;
  std::atomic<size_t> next_{0};
};

class PooledRunner : public BlockRunner {
 public:
  explicit PooledRunner(int threads) : threads_(threads) {}

 protected:
  void Run(size_t blocks, RunBlock run, void* context) const override;

 private:
  int threads_;
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_C_API_WORKER_POOL_H_
