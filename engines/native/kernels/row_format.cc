#include "kernels/row_format.h"

namespace dlrm_deploy {

int64_t RowElements(RowFormat format, int64_t width) {
  constexpr int64_t kScaleAndBias = 4;
  switch (format) {
    case RowFormat::kFp32:
    case RowFormat::kFp16:
    case RowFormat::kBf16:
      return width;
    case RowFormat::kInt8:
      return width + kScaleAndBias;
    case RowFormat::kInt4:
      return (width + 1) / 2 + kScaleAndBias;
  }
  return 0;
}

int64_t RowBytes(RowFormat format, int64_t width) {
  const int64_t elements = RowElements(format, width);
  switch (format) {
    case RowFormat::kFp32:
      return 4 * elements;
    case RowFormat::kFp16:
    case RowFormat::kBf16:
      return 2 * elements;
    case RowFormat::kInt8:
    case RowFormat::kInt4:
      return elements;
  }
  return 0;
}

const char* MatrixName(RowFormat format) {
  constexpr const char* kNames[kRowFormats] = {"weights", "weights_fp16", "weights_bf16",
                                               "weights_int8", "weights_int4"};
  return kNames[static_cast<int>(format)];
}

}  // namespace dlrm_deploy
