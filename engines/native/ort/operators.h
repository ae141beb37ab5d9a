// operators.h: the operators of docs/operators.md, each made on one kernel path.
//
// ONNX Runtime keeps pointers to operators as long as sessions live, so they are never destroyed.
#ifndef DLRM_DEPLOY_ORT_OPERATORS_H_
#define DLRM_DEPLOY_ORT_OPERATORS_H_

#include "kernels/dispatch.h"
#include "ort/op_support.h"

namespace dlrm_deploy {

OrtCustomOp* MakeTableBatchedEmbeddingBagOp(const KernelPath& path);
OrtCustomOp* MakeDotInteractionOp(const KernelPath& path);
OrtCustomOp* MakeEmbeddingBagDotInteractionOp(const KernelPath& path);
OrtCustomOp* MakeMlpOp(const KernelPath& path);
OrtCustomOp* MakeMlpInt8Op(const KernelPath& path);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_ORT_OPERATORS_H_
