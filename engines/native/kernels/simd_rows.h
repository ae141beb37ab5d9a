// simd_rows.h: the float32 values of a stored row, a register of columns at a time, written once
// over a vector type V that a path supplies. Nothing outside the row is read, whatever its width.
//
// Like simd_loops.h, internal to the file that includes it: see kernel_path.h.
#ifndef DLRM_DEPLOY_KERNELS_SIMD_ROWS_H_
#define DLRM_DEPLOY_KERNELS_SIMD_ROWS_H_

#include <stdint.h>

#include "kernels/kernel_path.h"
#include "kernels/prefetch.h"

namespace dlrm_deploy {
namespace {

// A row of D values. Columns(d) gives columns [d, d + lanes), which all exist; FirstColumns(d, n)
// the n that exist from d on, and anything in the other lanes.
template <class V, RowFormat kFormat>
class Row;

template <class V>
class Row<V, RowFormat::kFp32> {
 public:
  Row(const void* row, int64_t /*width*/) : values_(static_cast<const float*>(row)) {}
  typename V::Reg Columns(int64_t d) const { return V::Load(values_ + d); }
  typename V::Reg FirstColumns(int64_t d, int64_t n) const {
    return V::LoadMasked(V::FirstLanes(n), values_ + d);
  }

 private:
  const float* values_;
};

template <class V>
class Row<V, RowFormat::kFp16> {
 public:
  Row(const void* row, int64_t /*width*/) : values_(static_cast<const char*>(row)) {}
  typename V::Reg Columns(int64_t d) const { return V::FromHalf(V::Load16(values_ + 2 * d)); }
  typename V::Reg FirstColumns(int64_t d, int64_t n) const {
    return V::FromHalf(V::LoadFirst16(values_ + 2 * d, n));
  }

 private:
  const char* values_;
};

template <class V>
class Row<V, RowFormat::kBf16> {
 public:
  Row(const void* row, int64_t /*width*/) : values_(static_cast<const char*>(row)) {}
  typename V::Reg Columns(int64_t d) const { return V::FromBfloat(V::Load16(values_ + 2 * d)); }
  typename V::Reg FirstColumns(int64_t d, int64_t n) const {
    return V::FromBfloat(V::LoadFirst16(values_ + 2 * d, n));
  }

 private:
  const char* values_;
};

template <class V>
class Row<V, RowFormat::kInt8> {
 public:
  Row(const void* row, int64_t width)
      : codes_(static_cast<const char*>(row)), line_(codes_ + width) {}
  typename V::Reg Columns(int64_t d) const { return line_.Value(V::Load8(codes_ + d)); }
  typename V::Reg FirstColumns(int64_t d, int64_t n) const {
    return line_.Value(V::LoadFirst8(codes_ + d, n));
  }

 private:
  const char* codes_;
  typename V::ByteLine line_;  // scale and bias
};

template <class V>
class Row<V, RowFormat::kInt4> {
 public:
  Row(const void* row, int64_t width)
      : codes_(static_cast<const char*>(row)), line_(codes_ + (width + 1) / 2) {}
  typename V::Reg Columns(int64_t d) const { return line_.Value(V::Load4(codes_ + d / 2)); }
  typename V::Reg FirstColumns(int64_t d, int64_t n) const {
    return line_.Value(V::LoadFirst4(codes_ + d / 2, n));
  }

 private:
  const char* codes_;
  typename V::NibbleLine line_;
};

// Bytes from one row to the next.
template <RowFormat kFormat>
constexpr int64_t BytesOfRow(int64_t width) {
  switch (kFormat) {
    case RowFormat::kFp32:
      return 4 * width;
    case RowFormat::kFp16:
    case RowFormat::kBf16:
      return 2 * width;
    case RowFormat::kInt8:
      return width + 4;
    case RowFormat::kInt4:
      return (width + 1) / 2 + 4;
  }
}

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_SIMD_ROWS_H_
