// int8_mlp.h: a chain of dense layers with int8 weights, docs/operators.md's MlpInt8, on any kernel
// path.
//
// Weights are packed once. Between layers the activations are float32; each layer quantizes its
// inputs, with one step for each sample, and adds exactly, in 32 bits. All paths agree bit for bit.
#ifndef DLRM_DEPLOY_KERNELS_INT8_MLP_H_
#define DLRM_DEPLOY_KERNELS_INT8_MLP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/aligned_buffer.h"
#include "kernels/dispatch.h"
#include "kernels/error.h"
#include "kernels/int8_mlp_path.h"
#include "kernels/parallel.h"

namespace dlrm_deploy {

// One layer as the operator gets it.
struct Int8Weights {
  const int8_t* weights;  // [outputs, inputs]
  const float* scale;     // [outputs]
  const float* bias;      // [outputs]
  int64_t outputs;
};

class PackedInt8Mlp {
 public:
  // Packs layers that follow one another: the first has `inputs` inputs, each other one as many as
  // the one before has outputs. A ReLU stands behind each layer, behind the last one if
  // `relu_last`. Fails on sizes that are not positive or too large. May throw std::bad_alloc.
  static Error Create(int64_t inputs, const std::vector<Int8Weights>& layers, bool relu_last,
                      PackedInt8Mlp* mlp);

  int64_t inputs() const { return layers_.front().inputs; }
  int64_t outputs() const { return layers_.back().outputs; }

  // y [batch, outputs] from x [batch, inputs], in blocks of samples; a small batch of a large chain
  // is split by columns. Fails only when memory for the scratch runs out.
  Error Run(const KernelPath& path, const float* x, int64_t batch, const BlockRunner& runner,
            float* y) const;

 private:
  Error RunBlocks(const KernelPath& path, const float* x, int64_t batch, const BlockRunner& runner,
                  float* y) const;
  Error RunSplitLayers(const KernelPath& path, const float* x, int64_t batch,
                       const BlockRunner& runner, float* y) const;
  // Points a task's scratch into memory of ScratchBytes(rows), 64-byte aligned.
  void Place(int64_t rows, void* memory, Int8MlpTask* task) const;
  size_t ScratchBytes(int64_t rows) const;

  std::vector<Int8Layer> layers_;
  std::unique_ptr<AlignedBuffer> packed_;
  size_t weight_bytes_ = 0;
  int64_t widest_in_ = 0;      // inputs of a layer, in whole tiles
  int64_t widest_hidden_ = 0;  // outputs of a layer but the last, in whole tiles
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_INT8_MLP_H_
