#include "c_api/worker_pool.h"

namespace dlrm_deploy {

WorkerPool& WorkerPool::Shared() {
  static WorkerPool* const pool = new WorkerPool;
  return *pool;
}

void WorkerPool::Run(int threads, size_t blocks, void (*run)(void*, size_t), void* context) {
  const std::lock_guard<std::mutex> turn(turn_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (workers_.size() + 1 < static_cast<size_t>(threads)) {
      workers_.emplace_back(&WorkerPool::Work, this, workers_.size(), generation_);
    }
    run_ = run;
    context_ = context;
    blocks_ = blocks;
    next_.store(0, std::memory_order_relaxed);
    helpers_ = static_cast<size_t>(threads) - 1;
    busy_ = helpers_;
    ++generation_;
  }
  wake_.notify_all();
  TakeBlocks();
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return busy_ == 0; });
}

void WorkerPool::TakeBlocks() {
  for (size_t block = next_.fetch_add(1); block < blocks_; block = next_.fetch_add(1)) {
    run_(context_, block);
  }
}

void WorkerPool::Work(size_t worker, uint64_t seen) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return generation_ != seen; });
    seen = generation_;
    if (worker >= helpers_) continue;
    lock.unlock();
    TakeBlocks();
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

void PooledRunner::Run(size_t blocks, RunBlock run, void* context) const {
  if (threads_ > 1) {
    WorkerPool::Shared().Run(threads_, blocks, run, context);
    return;
  }
  for (size_t block = 0; block < blocks; ++block) run(context, block);
}

}  // namespace dlrm_deploy
