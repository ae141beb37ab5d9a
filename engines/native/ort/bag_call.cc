#include "ort/bag_call.h"

#include <string>
#include <utility>

namespace dlrm_deploy {
namespace {

struct MatrixInput {
  RowFormat format;
  size_t index;
  ONNXTensorElementDataType type;
  const char* type_name;
};

constexpr MatrixInput kMatrixInputs[kRowFormats] = {
    {RowFormat::kFp32, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32"},
    {RowFormat::kFp16, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16"},
    {RowFormat::kBf16, 5, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, "bfloat16"},
    {RowFormat::kInt8, 6, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "uint8"},
    {RowFormat::kInt4, 7, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "uint8"},
};

Error ReadMatrices(const Ort::KernelContext& context, size_t first, const EmbeddingBag& bag,
                   EmbeddingBagInputs* inputs) {
  inputs->width = bag.attributes().width;
  for (const MatrixInput& matrix : kMatrixInputs) {
    const bool required = matrix.format == RowFormat::kFp32 && inputs->width == 0;
    if (Absent(context, first + matrix.index) && !required) continue;
    const char* name = MatrixName(matrix.format);
    Input input;
    if (Error error = ReadTyped(context, first + matrix.index, name, 2, matrix.type,
                                matrix.type_name, &input)) {
      return error;
    }
    if (required) inputs->width = input.shape[1];
    const int64_t elements = RowElements(matrix.format, inputs->width);
    if (input.shape[1] != elements) {
      return std::string(name) + " has shape " + ShapeText(input.shape) + ", expected rows of " +
             std::to_string(elements) + " values for width " + std::to_string(inputs->width);
    }
    inputs->matrix(matrix.format) = {true, input.value.GetTensorRawData(), input.shape[0]};
  }
  return {};
}

}  // namespace

Error ReadBagAttributes(const OrtKernelInfo* raw, EmbeddingBag* bag) {
  const Ort::ConstKernelInfo info(raw);
  EmbeddingBagAttributes attributes;
  const auto read_int = [&](const char* name) { return info.GetAttribute<int64_t>(name); };
  const auto read_ints = [&](const char* name) { return info.GetAttributes<int64_t>(name); };
  attributes.num_features = Required("num_features", read_int);
  attributes.features = Required("features", read_ints);
  attributes.row_starts = Required("row_starts", read_ints);
  attributes.rows = Required("rows", read_ints);
  attributes.mean = Required("mean", read_ints);
  attributes.formats = IntsOrNone(info, "formats");
  attributes.width = AttributeOr<int64_t>(info, "width", 0);
  attributes.ids = IntsOrNone(info, "ids");
  attributes.moduli = IntsOrNone(info, "moduli");
  attributes.divisors = IntsOrNone(info, "divisors");
  attributes.divisions = IntsOrNone(info, "divisions");
  attributes.pooling_factors = IntsOrNone(info, "pooling_factors");  // none: the CSR form
  const auto policy = AttributeOr<std::string>(info, "index_policy", "error");
  if (Error error = ParseIndexPolicy(policy, &attributes.index_policy)) return error;
  attributes.feature_names = AttributeOr<std::string>(info, "feature_names", "");
  return EmbeddingBag::Create(std::move(attributes), bag);
}

Error ReadBagInputs(const Ort::KernelContext& context, size_t first, const EmbeddingBag& bag,
                    EmbeddingBagInputs* in) {
  Input indices, offsets, per_sample_weights;
  if (Error error = ReadMatrices(context, first, bag, in)) return error;
  if (Error error = ReadInput(context, first + 1, "indices", 1, &indices)) return error;
  if (indices.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 &&
      indices.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
    return "indices has element type " + std::to_string(indices.type) + ", expected int32 or int64";
  }
  in->id_type =
      indices.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 ? IdType::kInt32 : IdType::kInt64;
  in->indices = indices.value.GetTensorRawData();
  in->num_indices = indices.shape[0];
  if (!Absent(context, first + 2)) {
    if (Error error = ReadInput(context, first + 2, "offsets", 1, &offsets)) return error;
    if (offsets.type != indices.type) {
      return "offsets has element type " + std::to_string(offsets.type) +
             ", expected that of indices, " + std::to_string(indices.type);
    }
    in->has_offsets = true;
    in->offsets = offsets.value.GetTensorRawData();
    in->num_offsets = offsets.shape[0];
  }
  if (!Absent(context, first + 3)) {
    if (Error error =
            ReadFloats(context, first + 3, "per_sample_weights", 1, &per_sample_weights)) {
      return error;
    }
    in->has_per_sample_weights = true;
    in->per_sample_weights = Floats(per_sample_weights);
    in->num_per_sample_weights = per_sample_weights.shape[0];
  }
  return {};
}

ONNXTensorElementDataType BagInputType(size_t index) {
  // Ids of either size share one operator. ONNX Runtime checks the others against what is declared.
  if (index == 1 || index == 2) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  for (const MatrixInput& matrix : kMatrixInputs) {
    if (matrix.index == index) return matrix.type;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

OrtCustomOpInputOutputCharacteristic BagInputCharacteristic(size_t index) {
  return index == 1 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

}  // namespace dlrm_deploy
