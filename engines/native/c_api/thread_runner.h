// thread_runner.h: threads for the plain C functions, which run without ONNX Runtime and its pool.
#ifndef DLRM_DEPLOY_C_API_THREAD_RUNNER_H_
#define DLRM_DEPLOY_C_API_THREAD_RUNNER_H_

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "kernels/parallel.h"

namespace dlrm_deploy {

// Starts threads for each call and joins them before it returns: nothing idles between calls, and a
// forked child has all that it needs. May throw std::system_error when a thread cannot be started.
class ThreadRunner : public BlockRunner {
 public:
  explicit ThreadRunner(int threads) : threads_(static_cast<size_t>(threads)) {}

 protected:
  void Run(size_t blocks, RunBlock run, void* context) const override {
    std::atomic<size_t> next{0};
    const auto take_blocks = [&] {
      for (size_t block = next++; block < blocks; block = next++) run(context, block);
    };
    std::vector<std::thread> others;
    const auto join = [&] {
      for (std::thread& other : others) other.join();
    };
    try {
      while (others.size() + 1 < std::min(threads_, blocks)) others.emplace_back(take_blocks);
    } catch (...) {
      next = blocks;  // no further block is begun
      join();
      throw;
    }
    take_blocks();
    join();
  }

 private:
  size_t threads_;
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_C_API_THREAD_RUNNER_H_
