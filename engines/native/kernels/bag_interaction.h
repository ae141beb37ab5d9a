// bag_interaction.h: EmbeddingBagDotInteraction of docs/operators.md, on any kernel path.
//
// One pass: samples are pooled into memory that stays in the cache, and interact from there.
#ifndef DLRM_DEPLOY_KERNELS_BAG_INTERACTION_H_
#define DLRM_DEPLOY_KERNELS_BAG_INTERACTION_H_

#include <cstdint>

#include "kernels/dot_interaction.h"
#include "kernels/embedding_bag.h"

namespace dlrm_deploy {

// Writes interactions [batch, shape.output_width] from dense [batch, D] and the pooled bags, and
// the pooled bags [batch, T, D] too unless `pooled` is null. `batch` is bag.BatchSize() of these
// inputs, and `shape` was made from bag.slots() and inputs.width. Bit for bit the same as pooling
// and RunDotInteraction one after the other. Fails as EmbeddingBag::Run does, or where memory for
// the scratch of a block runs out.
Error RunBagInteraction(const EmbeddingBag& bag, const EmbeddingBagInputs& inputs,
                        const InteractionShape& shape, const float* dense, int64_t batch,
                        const KernelPath& path, const BlockRunner& runner, float* interactions,
                        float* pooled);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_BAG_INTERACTION_H_
