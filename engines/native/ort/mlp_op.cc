// mlp_op.cc: Mlp and MlpInt8 as ONNX Runtime operators.
//
// Weights that are initializers, as in every bundle, are packed once, when the session is made.
// Weights that some node computes are packed again in every call.
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/int8_mlp.h"
#include "kernels/mlp.h"
#include "ort/operators.h"

namespace dlrm_deploy {
namespace {

// One kind of parameter that every layer has.
struct Role {
  const char* name;
  ONNXTensorElementDataType type;
  const char* type_name;
  size_t rank;
};

// One parameter: the kernel's constructor and its calls find them in different ways.
struct Parameter {
  std::string name;  // for messages: weight, scale or bias of which layer
  const void* data;
  std::vector<int64_t> shape;
};

// Mlp: weight and bias of each layer.
struct Bf16 {
  using Packed = PackedMlp;
  using Layer = MlpWeights;
  static constexpr const char* kName = "Mlp";
  static constexpr const char* kInputs = "a weight and a bias";
  static constexpr Role kRoles[] = {
      {"weight", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, "bfloat16", 2},
      {"bias", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32", 1},
  };

  static Layer MakeLayer(const Parameter* p) {
    return {static_cast<const uint16_t*>(p[0].data), static_cast<const float*>(p[1].data),
            p[0].shape[0]};
  }
};

// MlpInt8: weight, scale and bias of each layer.
struct Int8 {
  using Packed = PackedInt8Mlp;
  using Layer = Int8Weights;
  static constexpr const char* kName = "MlpInt8";
  static constexpr const char* kInputs = "a weight, a scale and a bias";
  static constexpr Role kRoles[] = {
      {"weight", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, "int8", 2},
      {"scale", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32", 1},
      {"bias", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32", 1},
  };

  static Layer MakeLayer(const Parameter* p) {
    return {static_cast<const int8_t*>(p[0].data), static_cast<const float*>(p[1].data),
            static_cast<const float*>(p[2].data), p[0].shape[0]};
  }
};

template <class Kind>
constexpr size_t kRoleCount = std::size(Kind::kRoles);

// `index` of the operator's inputs, from 1 on.
template <class Kind>
Error ReadParameter(const Ort::ConstValue& value, size_t index, Parameter* parameter) {
  const Role& role = Kind::kRoles[(index - 1) % kRoleCount<Kind>];
  parameter->name = role.name + (" " + std::to_string((index - 1) / kRoleCount<Kind>));
  if (!value || !value.IsTensor()) return parameter->name + " is missing or not a tensor";
  const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
  const ONNXTensorElementDataType type = info.GetElementType();
  if (type != role.type) {
    return parameter->name + " has element type " + std::to_string(type) + ", expected " +
           role.type_name;
  }
  parameter->shape = info.GetShape();
  if (parameter->shape.size() != role.rank) {
    return parameter->name + " has shape " + ShapeText(parameter->shape) + ", expected rank " +
           std::to_string(role.rank);
  }
  parameter->data = value.GetTensorRawData();
  return {};
}

template <class Kind>
Error Pack(const std::vector<Parameter>& parameters, bool relu_last, typename Kind::Packed* mlp) {
  std::vector<typename Kind::Layer> layers;
  const int64_t inputs = parameters.front().shape[1];
  int64_t expected = inputs;
  for (size_t i = 0; i < parameters.size(); i += kRoleCount<Kind>) {
    const Parameter& weight = parameters[i];
    if (weight.shape[1] != expected) {
      return weight.name + " has shape " + ShapeText(weight.shape) + ", expected [N, " +
             std::to_string(expected) + "] to go with the layer before";
    }
    expected = weight.shape[0];
    for (size_t role = 1; role < kRoleCount<Kind>; ++role) {
      const Parameter& other = parameters[i + role];
      if (other.shape[0] != expected) {
        return other.name + " has shape " + ShapeText(other.shape) + ", expected [" +
               std::to_string(expected) + "] to go with its weight";
      }
    }
    layers.push_back(Kind::MakeLayer(&parameters[i]));
  }
  return Kind::Packed::Create(inputs, layers, relu_last, mlp);
}

template <class Kind>
Error CheckCount(size_t inputs) {
  if (inputs > 1 && (inputs - 1) % kRoleCount<Kind> == 0) return {};
  return std::string("an ") + Kind::kName + " has " + std::to_string(inputs) +
         " inputs, expected x and then " + Kind::kInputs + " for each layer";
}

template <class Kind>
class MlpKernel {
 public:
  using Packed = typename Kind::Packed;

  // `packed` is null where the weights are no initializers.
  MlpKernel(std::unique_ptr<Packed> packed, bool relu_last, const KernelPath& path)
      : packed_(std::move(packed)), relu_last_(relu_last), path_(path) {}

  OrtStatus* ComputeV2(OrtKernelContext* raw) const {
    return Guarded([&] { return Compute(Ort::KernelContext(raw)); });
  }

 private:
  Error Compute(const Ort::KernelContext& context) const {
    if (packed_ != nullptr) return Run(context, *packed_);
    const size_t inputs = context.GetInputCount();
    if (Error error = CheckCount<Kind>(inputs)) return error;
    std::vector<Parameter> parameters(inputs - 1);
    for (size_t i = 1; i < inputs; ++i) {
      if (Error error = ReadParameter<Kind>(context.GetInput(i), i, &parameters[i - 1])) {
        return error;
      }
    }
    Packed mlp;
    if (Error error = Pack<Kind>(parameters, relu_last_, &mlp)) return error;
    return Run(context, mlp);
  }

  Error Run(const Ort::KernelContext& context, const Packed& mlp) const {
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

  std::unique_ptr<Packed> packed_;
  bool relu_last_;
  const KernelPath& path_;
};

template <class Kind>
struct MlpOp : Ort::CustomOpBase<MlpOp<Kind>, MlpKernel<Kind>, true> {
  explicit MlpOp(const KernelPath& path) : path_(path) {}

  const char* GetName() const { return Kind::kName; }
  // x, and all parameters as one variadic input of several types.
  size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                      : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  }
  int GetVariadicInputMinArity() const { return static_cast<int>(kRoleCount<Kind>); }
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
      if (Error error = CheckCount<Kind>(inputs)) return error;
      std::vector<Parameter> parameters(inputs - 1);
      bool all_constant = true;
      for (size_t i = 1; i < inputs && all_constant; ++i) {
        int constant = 0;
        const Ort::ConstValue value = info.GetTensorConstantInput(i, &constant);
        all_constant = constant != 0;
        if (!all_constant) break;
        if (Error error = ReadParameter<Kind>(value, i, &parameters[i - 1])) return error;
      }
      std::unique_ptr<typename Kind::Packed> packed;
      if (all_constant) {
        packed = std::make_unique<typename Kind::Packed>();
        if (Error error = Pack<Kind>(parameters, relu_last, packed.get())) return error;
      }
      *kernel = new MlpKernel<Kind>(std::move(packed), relu_last, path_);
      return {};
    });
  }

 private:
  const KernelPath& path_;
};

}  // namespace

OrtCustomOp* MakeMlpOp(const KernelPath& path) { return new MlpOp<Bf16>(path); }

OrtCustomOp* MakeMlpInt8Op(const KernelPath& path) { return new MlpOp<Int8>(path); }

}  // namespace dlrm_deploy
