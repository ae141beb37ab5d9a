// op_support.h: what every ONNX Runtime operator here needs: errors, threads, inputs, attributes.
//
// Operators are a thin layer: attributes are read and checked once, in the kernel's constructor;
// types, ranks and lengths in every call; the work is in kernels/. Inputs that may have one of
// several types are declared with an undefined one; hence every type is checked here.
#ifndef DLRM_DEPLOY_ORT_OP_SUPPORT_H_
#define DLRM_DEPLOY_ORT_OP_SUPPORT_H_

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/error.h"
#include "kernels/parallel.h"

namespace dlrm_deploy {

inline OrtStatus* BadArgument(const std::string& message) {
  return Ort::Status(message.c_str(), ORT_INVALID_ARGUMENT).release();
}

// Runs `body`, which returns an Error, and turns it or what was thrown into a status: nothing
// throws past the C boundary.
template <typename Body>
OrtStatus* Guarded(const Body& body) {
  try {
    const Error error = body();
    return error ? BadArgument(*error) : nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::Status(error.what(), error.GetOrtErrorCode()).release();
  } catch (const std::exception& error) {
    return Ort::Status(error.what(), ORT_FAIL).release();
  } catch (...) {
    return Ort::Status("unknown failure", ORT_FAIL).release();
  }
}

// ONNX Runtime's own threads. As many batches as blocks: then they are handed out one by one, and
// a thread that is interrupted does not hold up a fixed share of the work.
class OrtRunner : public BlockRunner {
 public:
  explicit OrtRunner(const Ort::KernelContext& context) : context_(context) {}

 protected:
  void Run(size_t blocks, RunBlock run, void* context) const override {
    context_.ParallelFor(run, blocks, blocks, context);
  }

 private:
  const Ort::KernelContext& context_;
};

// One input, looked at without copying.
struct Input {
  Ort::ConstValue value;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
};

inline std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline bool Absent(const Ort::KernelContext& context, size_t index) {
  return index >= context.GetInputCount() || !context.GetInput(index);
}

// Any element type.
inline Error ReadInput(const Ort::KernelContext& context, size_t index, const char* name,
                       size_t rank, Input* input) {
  if (Absent(context, index)) return std::string(name) + " is missing";
  input->value = context.GetInput(index);
  if (!input->value.IsTensor()) return std::string(name) + " is not a tensor";
  const Ort::TensorTypeAndShapeInfo info = input->value.GetTensorTypeAndShapeInfo();
  input->type = info.GetElementType();
  input->shape = info.GetShape();
  if (input->shape.size() != rank) {
    return std::string(name) + " has shape " + ShapeText(input->shape) + ", expected rank " +
           std::to_string(rank);
  }
  return {};
}

// `type_name` is that of `type`, for the message.
inline Error ReadTyped(const Ort::KernelContext& context, size_t index, const char* name,
                       size_t rank, ONNXTensorElementDataType type, const char* type_name,
                       Input* input) {
  if (Error error = ReadInput(context, index, name, rank, input)) return error;
  if (input->type != type) {
    return std::string(name) + " has element type " + std::to_string(input->type) + ", expected " +
           type_name;
  }
  return {};
}

inline Error ReadFloats(const Ort::KernelContext& context, size_t index, const char* name,
                        size_t rank, Input* input) {
  return ReadTyped(context, index, name, rank, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32",
                   input);
}

inline const float* Floats(const Input& input) { return input.value.GetTensorData<float>(); }

// Runs `read`, and if it throws says which attribute it was: ONNX Runtime does not.
template <typename Read>
auto Required(const char* name, const Read& read) {
  try {
    return read(name);
  } catch (const Ort::Exception&) {
    throw Ort::Exception(
        std::string("attribute ") + name + " is missing or of another type than int",
        ORT_INVALID_ARGUMENT);
  }
}

// Whether a node has the attribute, of whatever type: read as ints, one of another type is empty.
inline bool Present(const Ort::ConstKernelInfo& info, const char* name) {
  try {
    info.GetAttributes<int64_t>(name);
    return true;
  } catch (const Ort::Exception&) {
    return false;
  }
}

// Throws where the attribute is there and of another type: what its author meant would be ignored.
template <typename T>
T AttributeOr(const Ort::ConstKernelInfo& info, const char* name, T otherwise) {
  try {
    return info.GetAttribute<T>(name);
  } catch (const Ort::Exception&) {
    if (!Present(info, name)) return otherwise;
    throw Ort::Exception(std::string("attribute ") + name + " is of another type than " +
                             (std::is_same_v<T, std::string> ? "string" : "int"),
                         ORT_INVALID_ARGUMENT);
  }
}

// An attribute that is 0 or 1. Throws where it is another number.
inline bool FlagOr(const Ort::ConstKernelInfo& info, const char* name, bool otherwise) {
  const auto flag = AttributeOr<int64_t>(info, name, otherwise);
  if (flag != 0 && flag != 1) {
    throw Ort::Exception(
        std::string("attribute ") + name + " is " + std::to_string(flag) + ", expected 0 or 1",
        ORT_INVALID_ARGUMENT);
  }
  return flag == 1;
}

// An attribute of several ints; none where it is absent. One of another type reads as empty.
inline std::vector<int64_t> IntsOrNone(const Ort::ConstKernelInfo& info, const char* name) {
  std::vector<int64_t> ints;
  try {
    ints = info.GetAttributes<int64_t>(name);
  } catch (const Ort::Exception&) {
    return ints;
  }
  if (ints.empty()) {
    throw Ort::Exception(
        std::string("attribute ") + name + " is empty or of another type than ints",
        ORT_INVALID_ARGUMENT);
  }
  return ints;
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_ORT_OP_SUPPORT_H_
