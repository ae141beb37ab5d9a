// mlp.h: a chain of dense layers with bf16 weights, docs/operators.md's Mlp, on any kernel path.
//
// Weights are packed once. A call converts its inputs to bf16, keeps the activations between layers
// in bf16 in a scratch that fits into the L2 cache, and adds in float32.
#ifndef DLRM_DEPLOY_KERNELS_MLP_H_
#define DLRM_DEPLOY_KERNELS_MLP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/aligned_buffer.h"
#include "kernels/dispatch.h"
#include "kernels/error.h"
#include "kernels/mlp_path.h"
#include "kernels/parallel.h"

namespace dlrm_deploy {

// One layer as the operator gets it.
struct MlpWeights {
  const uint16_t* weights;  // [outputs, inputs] bf16
  const float* bias;        // [outputs]
  int64_t outputs;
};

class PackedMlp {
 public:
  // Packs layers that follow one another: the first has `inputs` inputs, each other one as many as
  // the one before has outputs. A ReLU stands behind each layer, behind the last one if
  // `relu_last`. Fails on sizes that are not positive or too large. May throw std::bad_alloc.
  static Error Create(int64_t inputs, const std::vector<MlpWeights>& layers, bool relu_last,
                      PackedMlp* mlp);

  int64_t inputs() const { return layers_.front().inputs; }
  int64_t outputs() const { return layers_.back().outputs; }
  size_t weight_bytes() const { return weight_bytes_; }

  // What RunRows needs for `rows` samples.
  size_t ScratchBytes(int64_t rows) const;

  // y [rows, outputs] from x [rows, inputs], on the calling thread: for kernels that hold a block
  // of samples. `scratch` has ScratchBytes(rows), 64-byte aligned. 32 to 256 rows keep it in the
  // cache.
  void RunRows(const KernelPath& path, const float* x, int64_t rows, float* y, void* scratch) const;

  // The same for a whole batch, in blocks of samples; a small batch of a large chain is split by
  // columns. Fails only when memory for the scratch runs out.
  Error Run(const KernelPath& path, const float* x, int64_t batch, const BlockRunner& runner,
            float* y) const;

 private:
  Error RunBlocks(const KernelPath& path, const float* x, int64_t batch, int64_t rows,
                  const BlockRunner& runner, float* y) const;
  Error RunSplitLayers(const KernelPath& path, const float* x, int64_t batch,
                       const BlockRunner& runner, float* y) const;
  size_t ActivationBytes(int64_t rows) const;

  std::vector<MlpLayer> layers_;
  std::unique_ptr<AlignedBuffer> packed_;
  size_t weight_bytes_ = 0;
  int64_t widest_ = 0;  // values of a sample between two layers, padded
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_MLP_H_
