// prepared_bags.h: the bags of one call with their offsets checked, to be pooled piece by piece.
//
// What an operator needs that pools embedding bags as a part of its own blocks.
#ifndef DLRM_DEPLOY_KERNELS_PREPARED_BAGS_H_
#define DLRM_DEPLOY_KERNELS_PREPARED_BAGS_H_

#include <cstdint>
#include <memory>

#include "kernels/dispatch.h"
#include "kernels/embedding_bag.h"
#include "kernels/error.h"
#include "kernels/parallel.h"

namespace dlrm_deploy {

class PreparedBags {
 public:
  // Checks the offsets and makes the bags. `batch` is BatchSize() of the same inputs; `bag`,
  // `inputs` and `path` must outlive what is made.
  static Error Prepare(const EmbeddingBag& bag, const EmbeddingBagInputs& inputs, int64_t batch,
                       const KernelPath& path, const BlockRunner& runner,
                       std::unique_ptr<PreparedBags>* made);
  virtual ~PreparedBags() = default;

  // Pools slots [t0, t1) of samples [b0, b1) into `pooled` [b1 - b0, T, D], which begins at sample
  // b0 and keeps its other slots. Any number of threads may pool at the same time. Allocates and
  // throws nothing.
  virtual void Pool(int64_t t0, int64_t t1, int64_t b0, int64_t b1, float* pooled) = 0;
  void PoolSamples(int64_t b0, int64_t b1, float* pooled) { Pool(0, slots_, b0, b1, pooled); }

  // Pools samples [b0, b1) into `pooled` [b1 - b0, T, D] on `runner`'s threads, one table after the
  // other: all threads read the same one, whose lines and address translations they share.
  void PoolTogether(const BlockRunner& runner, int64_t b0, int64_t b1, float* pooled);

  // Once all is pooled: the first id out of range that was met, under IndexPolicy::kError.
  virtual Error BadId() const = 0;

  // An estimate of the row bytes that a sample reads. In floating point: it cannot overflow.
  double sample_bytes() const { return sample_bytes_; }

 protected:
  PreparedBags(int64_t batch, int64_t slots, int64_t width)
      : batch_(batch), slots_(slots), width_(width) {}

  const int64_t batch_;
  const int64_t slots_;
  const int64_t width_;
  double sample_bytes_ = 0.0;
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_PREPARED_BAGS_H_
