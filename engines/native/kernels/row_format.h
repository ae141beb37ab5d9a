// row_format.h: sizes and names of the ways a table row may be stored. What the bytes mean is in
// kernel_path.h and docs/operators.md.
#ifndef DLRM_DEPLOY_KERNELS_ROW_FORMAT_H_
#define DLRM_DEPLOY_KERNELS_ROW_FORMAT_H_

#include <cstdint>

#include "kernels/kernel_path.h"

namespace dlrm_deploy {

// Widths above this are refused, so that the bytes of a row fit in 64 bits many times over.
constexpr int64_t kMostWidth = int64_t{1} << 48;

// Bytes of one row of `width` values, at most kMostWidth.
int64_t RowBytes(RowFormat format, int64_t width);

// Elements of one row in the matrix that holds it: values, or bytes for int8 and int4.
int64_t RowElements(RowFormat format, int64_t width);

// The operator's input that holds rows of this format, e.g. "weights_int8".
const char* MatrixName(RowFormat format);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_ROW_FORMAT_H_
