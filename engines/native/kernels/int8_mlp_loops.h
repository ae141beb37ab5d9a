// int8_mlp_loops.h: the int8 MLP's loop of the vector paths without AMX, written once over a vector
// type V that a path supplies.
//
// Codes are int16, [rows][inputs rounded up to 64]: products of pairs are added in 32 bits,
// exactly.
//
// V is declared in an anonymous namespace, which gives all of this internal linkage: see
// kernel_path.h for why that matters.
#ifndef DLRM_DEPLOY_KERNELS_INT8_MLP_LOOPS_H_
#define DLRM_DEPLOY_KERNELS_INT8_MLP_LOOPS_H_

#include "kernels/int8_mlp_chain.h"

namespace dlrm_deploy {
namespace {

template <class V>
struct VectorInt8Mlp {
  static void Quantize(const float* x, int64_t stride, int64_t inputs, int64_t rows, void* to,
                       float* steps) {
    const int64_t padded = (inputs + kInt8TileInputs - 1) / kInt8TileInputs * kInt8TileInputs;
    int16_t* codes = static_cast<int16_t*>(to);
    for (int64_t row = 0; row < rows; ++row, x += stride, codes += padded) {
      typename V::Magnitude magnitude = V::NoMagnitude();
      int64_t k = 0;
      for (; k + V::kLanes <= inputs; k += V::kLanes) {
        magnitude = V::Larger(magnitude, V::Load(x + k));
      }
      if (k < inputs) magnitude = V::Larger(magnitude, V::LoadFirst(inputs - k, x + k));
      const SampleScale scale = ScaleOf(V::Largest(magnitude));
      steps[row] = scale.step;
      const typename V::Reg inverse = V::Broadcast(scale.inverse);
      for (k = 0; k + V::kLanes <= inputs; k += V::kLanes) {
        V::StoreCodes(codes + k, V::Multiply(V::Load(x + k), inverse));
      }
      if (k < inputs) {
        V::StoreCodes(codes + k, V::Multiply(V::LoadFirst(inputs - k, x + k), inverse));
        k += V::kLanes;
      }
      for (; k < padded; k += V::kLanes) V::StoreCodes(codes + k, V::Broadcast(0.0f));
    }
  }

  static void Layer(const Int8Layer& layer, int64_t rows, int64_t first_tile, int64_t end_tile,
                    const void* from, const float* steps, float* y, int64_t y_stride) {
    const int16_t* codes = static_cast<const int16_t*>(from);
    const int64_t padded = layer.k_tiles * kInt8TileInputs;
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      int64_t row = 0;
      for (; row + V::kRows <= rows; row += V::kRows) {
        Rows<V::kRows>(layer, tile, codes + row * padded, steps + row, y + row * y_stride,
                       y_stride);
      }
      for (; row < rows; ++row) {
        Rows<1>(layer, tile, codes + row * padded, steps + row, y + row * y_stride, y_stride);
      }
    }
  }

  // R samples by the 16 columns of a tile.
  template <int R>
  static void Rows(const Int8Layer& layer, int64_t tile, const int16_t* codes, const float* steps,
                   float* y, int64_t y_stride) {
    const int8_t* weights = layer.weights + tile * layer.k_tiles * kInt8TileBytes;
    const int64_t padded = layer.k_tiles * kInt8TileInputs;
    typename V::Sums sums[R];
    for (int r = 0; r < R; ++r) sums[r] = V::NoSums();
    for (int64_t k = 0; k < layer.inputs; k += 4, weights += 64) {
      const typename V::Quads quads = V::LoadQuads(weights);
      for (int r = 0; r < R; ++r) sums[r] = V::AddQuad(sums[r], quads, codes + r * padded + k);
    }
    const int64_t column = tile * kInt8TileColumns;
    for (int r = 0; r < R; ++r) {
      V::Finish(sums[r], V::Broadcast(steps[r]), layer.scale + column, layer.bias + column,
                layer.relu, layer.outputs - column, y + r * y_stride + column);
    }
  }
};

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_INT8_MLP_LOOPS_H_
