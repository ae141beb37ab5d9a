// mlp_op.cc: Mlp as an ONNX Runtime operator.
//
// Weights that are initializers, as in every bundle, are packed once, when the session is made.
// Weights that some node computes are packed again in every call.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/mlp.h"
#include "ort/operators.h"

namespace dlrm_deploy {
namespace {

// One tensor of weights or biases: the kernel's constructor and its calls find them in different
// ways.
struct Parameter {
  std::string name;  // for messages: weight or bias of which layer
  const void* data;
  std::vector<int64_t> shape;
};

Error ReadParameter(const Ort::ConstValue& value, size_t index, Parameter* parameter) {
  const bool is_weight = index % 2 == 1;
  parameter->name = std::string(is_weight ? "weight " : "bias ") + std::to_string((index - 1) / 2);
  if (!value || !value.IsTensor()) return parameter->name + " is missing or not a tensor";
  const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
  const ONNXTensorElementDataType type = info.GetElementType();
  const ONNXTensorElementDataType expected =
      is_weight ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (type != expected) {
    return parameter->name + " has element type " + std::to_string(type) + ", expected " +
           (is_weight ? "bfloat16" : "float32");
  }
  parameter->shape = info.GetShape();
  const size_t rank = is_weight ? 2 : 1;
  if (parameter->shape.size() != rank) {
    return parameter->name + " has shape " + ShapeText(parameter->shape) + ", expected rank " +
           std::to_string(rank);
  }
  parameter->data = value.GetTensorRawData();
  return {};
}

// parameters: weight 0, bias 0, weight 1, ...
Error Pack(const std::vector<Parameter>& parameters, bool relu_last, PackedMlp* mlp) {
  std::vector<MlpWeights> layers;
  const int64_t inputs = parameters.front().shape[1];
  int64_t expected = inputs;
  for (size_t i = 0; i < parameters.size(); i += 2) {
    const Parameter& weight = parameters[i];
    const Parameter& bias = parameters[i + 1];
    if (weight.shape[1] != expected) {
      return weight.name + " has shape " + ShapeText(weight.shape) + ", expected [N, " +
             std::to_string(expected) + "] to go with the layer before";
    }
    expected = weight.shape[0];
    if (bias.shape[0] != expected) {
      return bias.name + " has shape " + ShapeText(bias.shape) + ", expected [" +
             std::to_string(expected) + "] to go with its weight";
    }
    layers.push_back({static_cast<const uint16_t*>(weight.data),
                      static_cast<const float*>(bias.data), expected});
  }
  return PackedMlp::Create(inputs, layers, relu_last, mlp);
}

Error CheckCount(size_t inputs) {
  if (inputs >= 3 && inputs % 2 == 1) return {};
  return "an Mlp has " + std::to_string(inputs) +
         " inputs, expected x and then a weight and a bias for each layer";
}

class MlpKernel {
 public:
  // `packed` is null where the weights are no initializers.
  MlpKernel(std::unique_ptr<PackedMlp> packed, bool relu_last, const KernelPath& path)
      : packed_(std::move(packed)), relu_last_(relu_last), path_(path) {}

  OrtStatus* ComputeV2(OrtKernelContext* raw) const {
    return Guarded([&] { return Compute(Ort::KernelContext(raw)); });
  }

 private:
  Error Compute(const Ort::KernelContext& context) const {
    if (packed_ != nullptr) return Run(context, *packed_);
    const size_t inputs = context.GetInputCount();
    if (Error error = CheckCount(inputs)) return error;
    std::vector<Parameter> parameters(inputs - 1);
    for (size_t i = 1; i < inputs; ++i) {
      if (Error error = ReadParameter(context.GetInput(i), i, &parameters[i - 1])) return error;
    }
    PackedMlp mlp;
    if (Error error = Pack(parameters, relu_last_, &mlp)) return error;
    return Run(context, mlp);
  }

  Error Run(const Ort::KernelContext& context, const PackedMlp& mlp) const {
    Input x;
    if (Error error = ReadFloats(context, 0, "x", 2, &x)) return error;
    if (x.shape[1] != mlp.inputs()) {
      return "x has shape " + ShapeText(x.shape) + ", expected [B, " +
             std::to_string(mlp.inputs()) + "] to go with weight 0";
    }
    Ort::UnownedValue y = context.GetOutput(0, {x.shape[0], mlp.outputs()});
    return mlp.Run(path_, Floats(x), x.shape[0], OrtRunner(context),
                   y.GetTensorMutableData<float>());
  }

  std::unique_ptr<PackedMlp> packed_;
  bool relu_last_;
  const KernelPath& path_;
};

struct MlpOp : Ort::CustomOpBase<MlpOp, MlpKernel, true> {
  explicit MlpOp(const KernelPath& path) : path_(path) {}

  const char* GetName() const { return "Mlp"; }
  // x, and all weights and biases as one variadic input of several types.
  size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                      : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  }
  int GetVariadicInputMinArity() const { return 2; }
  bool GetVariadicInputHomogeneity() const { return false; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* raw, void** kernel) const {
    return Guarded([&]() -> Error {
      const Ort::ConstKernelInfo info(raw);
      const bool relu_last = FlagOr(info, "relu_last", true);
      const size_t inputs = info.GetInputCount();
      if (Error error = CheckCount(inputs)) return error;
      std::vector<Parameter> parameters(inputs - 1);
      bool all_constant = true;
      for (size_t i = 1; i < inputs && all_constant; ++i) {
        int constant = 0;
        const Ort::ConstValue value = info.GetTensorConstantInput(i, &constant);
        all_constant = constant != 0;
        if (!all_constant) break;
        if (Error error = ReadParameter(value, i, &parameters[i - 1])) return error;
      }
      std::unique_ptr<PackedMlp> packed;
      if (all_constant) {
        packed = std::make_unique<PackedMlp>();
        if (Error error = Pack(parameters, relu_last, packed.get())) return error;
      }
      *kernel = new MlpKernel(std::move(packed), relu_last, path_);
      return {};
    });
  }

 private:
  const KernelPath& path_;
};

}  // namespace

OrtCustomOp* MakeMlpOp(const KernelPath& path) { return new MlpOp(path); }

}  // namespace dlrm_deploy
