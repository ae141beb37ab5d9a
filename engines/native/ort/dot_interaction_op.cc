// dot_interaction_op.cc: DotInteraction as an ONNX Runtime operator.
#include <string>

#include "kernels/dot_interaction.h"
#include "ort/operators.h"

namespace dlrm_deploy {
namespace {

class DotInteractionKernel {
 public:
  DotInteractionKernel(bool self_interaction, const KernelPath& path)
      : self_interaction_(self_interaction), path_(path) {}

  OrtStatus* ComputeV2(OrtKernelContext* raw) const {
    return Guarded([&] { return Compute(Ort::KernelContext(raw)); });
  }

 private:
  Error Compute(const Ort::KernelContext& context) const {
    Input dense, embeddings;
    if (Error error = ReadFloats(context, 0, "dense", 2, &dense)) return error;
    if (Error error = ReadFloats(context, 1, "embeddings", 3, &embeddings)) return error;
    const int64_t batch = dense.shape[0];
    const int64_t width = dense.shape[1];
    if (embeddings.shape[0] != batch || embeddings.shape[2] != width) {
      return "embeddings has shape " + ShapeText(embeddings.shape) + ", expected [" +
             std::to_string(batch) + ", T, " + std::to_string(width) + "] to go with dense " +
             ShapeText(dense.shape);
    }
    InteractionShape shape;
    if (Error error = MakeInteractionShape(embeddings.shape[1], width, self_interaction_, &shape)) {
      return error;
    }
    Ort::UnownedValue out = context.GetOutput(0, {batch, shape.output_width});
    return RunDotInteraction(shape, Floats(dense), Floats(embeddings), batch, path_,
                             OrtRunner(context), out.GetTensorMutableData<float>());
  }

  bool self_interaction_;
  const KernelPath& path_;
};

struct DotInteractionOp : Ort::CustomOpBase<DotInteractionOp, DotInteractionKernel, true> {
  explicit DotInteractionOp(const KernelPath& path) : path_(path) {}

  const char* GetName() const { return "DotInteraction"; }
  size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* raw, void** kernel) const {
    return Guarded([&]() -> Error {
      const bool self = FlagOr(Ort::ConstKernelInfo(raw), "self_interaction", false);
      *kernel = new DotInteractionKernel(self, path_);
      return {};
    });
  }

 private:
  const KernelPath& path_;
};

}  // namespace

OrtCustomOp* MakeDotInteractionOp(const KernelPath& path) { return new DotInteractionOp(path); }

}  // namespace dlrm_deploy
