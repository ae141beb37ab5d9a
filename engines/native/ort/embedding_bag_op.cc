// embedding_bag_op.cc: TableBatchedEmbeddingBag as an ONNX Runtime operator.
#include <utility>

#include "ort/bag_call.h"
#include "ort/operators.h"

namespace dlrm_deploy {
namespace {

class EmbeddingBagKernel {
 public:
  EmbeddingBagKernel(EmbeddingBag bag, const KernelPath& path)
      : bag_(std::move(bag)), path_(path) {}

  OrtStatus* ComputeV2(OrtKernelContext* raw) const {
    return Guarded([&] { return Compute(Ort::KernelContext(raw)); });
  }

 private:
  Error Compute(const Ort::KernelContext& context) const {
    EmbeddingBagInputs in;
    int64_t batch = 0;
    if (Error error = ReadBagInputs(context, 0, bag_, &in)) return error;
    if (Error error = bag_.BatchSize(in, &batch)) return error;
    Ort::UnownedValue pooled = context.GetOutput(0, {batch, bag_.slots(), in.width});
    return bag_.Run(in, batch, path_, OrtRunner(context), pooled.GetTensorMutableData<float>());
  }

  EmbeddingBag bag_;
  const KernelPath& path_;
};

struct EmbeddingBagOp : Ort::CustomOpBase<EmbeddingBagOp, EmbeddingBagKernel, true> {
  explicit EmbeddingBagOp(const KernelPath& path) : path_(path) {}

  const char* GetName() const { return "TableBatchedEmbeddingBag"; }
  size_t GetInputTypeCount() const { return kBagInputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const { return BagInputType(index); }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return BagInputCharacteristic(index);
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return Guarded([&]() -> Error {
      EmbeddingBag bag;
      if (Error error = ReadBagAttributes(info, &bag)) return error;
      *kernel = new EmbeddingBagKernel(std::move(bag), path_);
      return {};
    });
  }

 private:
  const KernelPath& path_;
};

}  // namespace

OrtCustomOp* MakeTableBatchedEmbeddingBagOp(const KernelPath& path) {
  return new EmbeddingBagOp(path);
}

}  // namespace dlrm_deploy
