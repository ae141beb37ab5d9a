// dot_interaction.h: DotInteraction of docs/operators.md, on any kernel path.
#ifndef DLRM_DEPLOY_KERNELS_DOT_INTERACTION_H_
#define DLRM_DEPLOY_KERNELS_DOT_INTERACTION_H_

#include <cstdint>

#include "kernels/dispatch.h"
#include "kernels/error.h"
#include "kernels/parallel.h"

namespace dlrm_deploy {

// Sets `shape` for T slots of width D, or says why the output [B, D + P] would be too large.
Error MakeInteractionShape(int64_t slots, int64_t width, bool self_interaction,
                           InteractionShape* shape);

// Writes out [batch, shape.output_width] from dense [batch, D] and embeddings [batch, T, D].
// Fails only when memory for the scratch (V * D floats a thread) runs out.
Error RunDotInteraction(const InteractionShape& shape, const float* dense, const float* embeddings,
                        int64_t batch, const KernelPath& path, const BlockRunner& runner,
                        float* out);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_DOT_INTERACTION_H_
