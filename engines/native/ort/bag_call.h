// bag_call.h: attributes and inputs of the operators that pool embedding bags.
#ifndef DLRM_DEPLOY_ORT_BAG_CALL_H_
#define DLRM_DEPLOY_ORT_BAG_CALL_H_

#include "kernels/embedding_bag.h"
#include "ort/op_support.h"

namespace dlrm_deploy {

// Reads and checks the attributes of a node. May throw Ort::Exception.
Error ReadBagAttributes(const OrtKernelInfo* info, EmbeddingBag* bag);

// The bag inputs of TableBatchedEmbeddingBag in order: weights, indices, offsets,
// per_sample_weights, weights_fp16, weights_bf16, weights_int8, weights_int4.
constexpr size_t kBagInputs = 8;

// Reads them from input `first` on, and checks types, ranks and row sizes. What they point to lives
// as long as the context.
Error ReadBagInputs(const Ort::KernelContext& context, size_t first, const EmbeddingBag& bag,
                    EmbeddingBagInputs* inputs);

// How bag input `index` is declared.
ONNXTensorElementDataType BagInputType(size_t index);
OrtCustomOpInputOutputCharacteristic BagInputCharacteristic(size_t index);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_ORT_BAG_CALL_H_
