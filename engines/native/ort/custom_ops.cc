// custom_ops.cc: the operators of docs/operators.md as ONNX Runtime custom operators.
//
// A thin layer: attributes are read and checked once, in the kernel's constructor; types, ranks and
// lengths in every call; the work is in kernels/. Ids and offsets are declared with an undefined
// type, so that one operator takes int32 and int64; hence their type is checked here.
//
// Errors go back as OrtStatus. Ort::Exception is caught before the C boundary, see Guarded().
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dlrm_deploy/ops.h"
#include "kernels/dispatch.h"
#include "kernels/dot_interaction.h"
#include "kernels/embedding_bag.h"

namespace dlrm_deploy {
namespace {

constexpr char kDomain[] = "dlrm_deploy";

OrtStatus* BadArgument(const std::string& message) {
  return Ort::Status(message.c_str(), ORT_INVALID_ARGUMENT).release();
}

// Runs `body`, which returns an Error, and turns it or what was thrown into a status.
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

// One input or output, looked at without copying.
struct Input {
  Ort::ConstValue value;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
};

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

bool Absent(const Ort::KernelContext& context, size_t index) {
  return index >= context.GetInputCount() || !context.GetInput(index);
}

Error ReadInput(const Ort::KernelContext& context, size_t index, const char* name, size_t rank,
                Input* input) {
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

Error ReadFloats(const Ort::KernelContext& context, size_t index, const char* name, size_t rank,
                 Input* input) {
  if (Error error = ReadInput(context, index, name, rank, input)) return error;
  if (input->type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    return std::string(name) + " has element type " + std::to_string(input->type) +
           ", expected float32";
  }
  return {};
}

const float* Floats(const Input& input) { return input.value.GetTensorData<float>(); }

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

template <typename T>
T AttributeOr(const Ort::ConstKernelInfo& info, const char* name, T otherwise) {
  try {
    return info.GetAttribute<T>(name);
  } catch (const Ort::Exception&) {
    return otherwise;
  }
}

// An attribute of several ints; none where it is absent. One of another type reads as empty.
std::vector<int64_t> IntsOrNone(const Ort::ConstKernelInfo& info, const char* name) {
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

class EmbeddingBagKernel {
 public:
  EmbeddingBagKernel(EmbeddingBag bag, const KernelPath& path)
      : bag_(std::move(bag)), path_(path) {}

  OrtStatus* ComputeV2(OrtKernelContext* raw) const {
    return Guarded([&] { return Compute(Ort::KernelContext(raw)); });
  }

 private:
  Error Compute(const Ort::KernelContext& context) const {
    Input weights, indices, offsets, per_sample_weights;
    EmbeddingBagInputs in;
    if (Error error = ReadFloats(context, 0, "weights", 2, &weights)) return error;
    in.weights = Floats(weights);
    in.total_rows = weights.shape[0];
    in.width = weights.shape[1];
    if (Error error = ReadInput(context, 1, "indices", 1, &indices)) return error;
    if (indices.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 &&
        indices.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
      return "indices has element type " + std::to_string(indices.type) +
             ", expected int32 or int64";
    }
    in.id_type =
        indices.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 ? IdType::kInt32 : IdType::kInt64;
    in.indices = indices.value.GetTensorRawData();
    in.num_indices = indices.shape[0];
    if (!Absent(context, 2)) {
      if (Error error = ReadInput(context, 2, "offsets", 1, &offsets)) return error;
      if (offsets.type != indices.type) {
        return "offsets has element type " + std::to_string(offsets.type) +
               ", expected that of indices, " + std::to_string(indices.type);
      }
      in.has_offsets = true;
      in.offsets = offsets.value.GetTensorRawData();
      in.num_offsets = offsets.shape[0];
    }
    if (!Absent(context, 3)) {
      if (Error error = ReadFloats(context, 3, "per_sample_weights", 1, &per_sample_weights)) {
        return error;
      }
      in.has_per_sample_weights = true;
      in.per_sample_weights = Floats(per_sample_weights);
      in.num_per_sample_weights = per_sample_weights.shape[0];
    }

    int64_t batch = 0;
    if (Error error = bag_.BatchSize(in, &batch)) return error;
    Ort::UnownedValue pooled = context.GetOutput(0, {batch, bag_.slots(), in.width});
    return bag_.Run(in, batch, path_, OrtRunner(context), pooled.GetTensorMutableData<float>());
  }

  EmbeddingBag bag_;
  const KernelPath& path_;
};

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

struct EmbeddingBagOp : Ort::CustomOpBase<EmbeddingBagOp, EmbeddingBagKernel, true> {
  explicit EmbeddingBagOp(const KernelPath& path) : path_(path) {}

  const char* GetName() const { return "TableBatchedEmbeddingBag"; }
  size_t GetInputTypeCount() const { return 4; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    const bool ids = index == 1 || index == 2;
    return ids ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index < 2 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* raw, void** kernel) const {
    return Guarded([&]() -> Error {
      const Ort::ConstKernelInfo info(raw);
      EmbeddingBagAttributes attributes;
      const auto read_int = [&](const char* name) { return info.GetAttribute<int64_t>(name); };
      const auto read_ints = [&](const char* name) { return info.GetAttributes<int64_t>(name); };
      attributes.num_features = Required("num_features", read_int);
      attributes.features = Required("features", read_ints);
      attributes.row_starts = Required("row_starts", read_ints);
      attributes.rows = Required("rows", read_ints);
      attributes.mean = Required("mean", read_ints);
      attributes.ids = IntsOrNone(info, "ids");
      attributes.moduli = IntsOrNone(info, "moduli");
      attributes.divisors = IntsOrNone(info, "divisors");
      attributes.divisions = IntsOrNone(info, "divisions");
      attributes.pooling_factors = IntsOrNone(info, "pooling_factors");  // none: the CSR form
      const auto policy = AttributeOr<std::string>(info, "index_policy", "error");
      if (Error error = ParseIndexPolicy(policy, &attributes.index_policy)) return error;
      attributes.feature_names = AttributeOr<std::string>(info, "feature_names", "");
      EmbeddingBag bag;
      if (Error error = EmbeddingBag::Create(std::move(attributes), &bag)) return error;
      *kernel = new EmbeddingBagKernel(std::move(bag), path_);
      return {};
    });
  }

 private:
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
      const auto self = AttributeOr<int64_t>(Ort::ConstKernelInfo(raw), "self_interaction", 0);
      if (self != 0 && self != 1) {
        return "attribute self_interaction is " + std::to_string(self) + ", expected 0 or 1";
      }
      *kernel = new DotInteractionKernel(self == 1, path_);
      return {};
    });
  }

 private:
  const KernelPath& path_;
};

// The operators on one kernel path, for every session that is opened while it is the one in use.
struct Registration {
  explicit Registration(const KernelPath& path)
      : embedding_bag(path), dot_interaction(path), domain(kDomain) {
    domain.Add(&embedding_bag);
    domain.Add(&dot_interaction);
  }
  EmbeddingBagOp embedding_bag;
  DotInteractionOp dot_interaction;
  Ort::CustomOpDomain domain;
};

// ONNX Runtime keeps pointers to the registrations, so they are never destroyed.
const Registration& RegistrationOn(const KernelPath& path) {
  static const auto* const registrations = [] {
    auto* made = new std::map<const KernelPath*, Registration>;
    for (const KernelPath& each : AllKernelPaths()) made->try_emplace(&each, each);
    return made;
  }();
  return registrations->at(&path);
}

}  // namespace
}  // namespace dlrm_deploy

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace dlrm_deploy;
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    // The C API only grows, so its first version can tell what is wrong.
    const std::string message = std::string("libdlrm_deploy_ops was built for ONNX Runtime 1.") +
                                std::to_string(ORT_API_VERSION) + " or newer, this one is " +
                                base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
  }
  Ort::InitApi(api);
  return Guarded([&]() -> Error {
    std::string error;
    const KernelPath* path = ChooseKernelPathFromEnvironment(&error);
    if (path == nullptr) return error;
    Ort::UnownedSessionOptions(options).Add(RegistrationOn(*path).domain);
    return {};
  });
}
