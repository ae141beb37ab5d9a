// bag_interaction_op.cc: EmbeddingBagDotInteraction as an ONNX Runtime operator.
#include <utility>

#include "kernels/bag_interaction.h"
#include "ort/bag_call.h"
#include "ort/operators.h"

namespace dlrm_deploy {
namespace {

class BagInteractionKernel {
 public:
  BagInteractionKernel(EmbeddingBag bag, bool self_interaction, const KernelPath& path)
      : bag_(std::move(bag)), self_interaction_(self_interaction), path_(path) {}

  OrtStatus* ComputeV2(OrtKernelContext* raw) const {
    return Guarded([&] { return Compute(Ort::KernelContext(raw)); });
  }

 private:
  Error Compute(const Ort::KernelContext& context) const {
    Input dense;
    EmbeddingBagInputs in;
    int64_t batch = 0;
    if (Error error = ReadFloats(context, 0, "dense", 2, &dense)) return error;
    if (Error error = ReadBagInputs(context, 1, bag_, &in)) return error;
    if (Error error = bag_.BatchSize(in, &batch)) return error;
    if (dense.shape[0] != batch || dense.shape[1] != in.width) {
      return "dense has shape " + ShapeText(dense.shape) + ", expected " +
             ShapeText({batch, in.width}) + " to go with the embedding bags";
    }
    InteractionShape shape;
    if (Error error = MakeInteractionShape(bag_.slots(), in.width, self_interaction_, &shape)) {
      return error;
    }
    Ort::UnownedValue out = context.GetOutput(0, {batch, shape.output_width});
    float* pooled = nullptr;
    if (context.GetOutputCount() > 1) {
      const Ort::UnownedValue second = context.GetOutput(1, {batch, bag_.slots(), in.width});
      if (second) pooled = Ort::UnownedValue(second).GetTensorMutableData<float>();
    }
    return RunBagInteraction(bag_, in, shape, Floats(dense), batch, path_, OrtRunner(context),
                             out.GetTensorMutableData<float>(), pooled);
  }

  EmbeddingBag bag_;
  bool self_interaction_;
  const KernelPath& path_;
};

struct BagInteractionOp : Ort::CustomOpBase<BagInteractionOp, BagInteractionKernel, true> {
  explicit BagInteractionOp(const KernelPath& path) : path_(path) {}

  const char* GetName() const { return "EmbeddingBagDotInteraction"; }
  size_t GetInputTypeCount() const { return 1 + kBagInputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : BagInputType(index - 1);
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : BagInputCharacteristic(index - 1);
  }
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }

  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return Guarded([&]() -> Error {
      EmbeddingBag bag;
      if (Error error = ReadBagAttributes(info, &bag)) return error;
      const bool self = FlagOr(Ort::ConstKernelInfo(info), "self_interaction", false);
      *kernel = new BagInteractionKernel(std::move(bag), self, path_);
      return {};
    });
  }

 private:
  const KernelPath& path_;
};

}  // namespace

OrtCustomOp* MakeEmbeddingBagDotInteractionOp(const KernelPath& path) {
  return new BagInteractionOp(path);
}

}  // namespace dlrm_deploy
