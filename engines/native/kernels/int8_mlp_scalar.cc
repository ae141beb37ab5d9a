// int8_mlp_scalar.cc: the plain reference of the int8 MLP's loop, and the only one off x86-64. Keep
// it plain. Codes are int8, [rows][inputs rounded up to 64].
#include <math.h>
#include <string.h>

#include "kernels/int8_mlp_chain.h"

namespace dlrm_deploy {
namespace {

struct Scalar {
  static void Quantize(const float* x, int64_t stride, int64_t inputs, int64_t rows, void* to,
                       float* steps) {
    const int64_t padded = (inputs + kInt8TileInputs - 1) / kInt8TileInputs * kInt8TileInputs;
    int8_t* codes = static_cast<int8_t*>(to);
    for (int64_t row = 0; row < rows; ++row, x += stride, codes += padded) {
      float largest = 0.0f;
      bool finite = true;
      for (int64_t k = 0; k < inputs; ++k) {
        finite &= isfinite(x[k]) != 0;
        if (fabsf(x[k]) > largest) largest = fabsf(x[k]);
      }
      const float inverse = finite && largest >= kInt8Tiny ? 127.0f / largest : 0.0f;
      steps[row] = finite ? largest / 127.0f : NAN;
      for (int64_t k = 0; k < padded; ++k) {
        codes[k] = k < inputs && inverse > 0.0f
                       ? static_cast<int8_t>(nearbyintf(x[k] * inverse))  // ties to even
                       : int8_t{0};
      }
    }
  }

  static void Layer(const Int8Layer& layer, int64_t rows, int64_t first_tile, int64_t end_tile,
                    const void* from, const float* steps, float* y, int64_t y_stride) {
    const int64_t padded = layer.k_tiles * kInt8TileInputs;
    const int8_t* codes = static_cast<const int8_t*>(from);
    for (int64_t row = 0; row < rows; ++row, codes += padded, y += y_stride) {
      for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        int32_t sums[kInt8TileColumns] = {};
        const int8_t* weights = layer.weights + tile * layer.k_tiles * kInt8TileBytes;
        for (int64_t k = 0; k < layer.inputs; ++k) {
          for (int64_t c = 0; c < kInt8TileColumns; ++c) {
            sums[c] += codes[k] * weights[k / 4 * 64 + c * 4 + k % 4];
          }
        }
        const int64_t left = layer.outputs - tile * kInt8TileColumns;
        for (int64_t c = 0; c < kInt8TileColumns && c < left; ++c) {
          const int64_t n = tile * kInt8TileColumns + c;
          const float value = static_cast<float>(sums[c]) * steps[row] * layer.scale[n];
          const float sum = value + layer.bias[n];
          y[n] = layer.relu && sum < 0.0f ? 0.0f : sum;
        }
      }
    }
  }
};

}  // namespace

void RunInt8MlpScalar(const Int8MlpTask& task) { RunInt8Chain<Scalar>(task); }

}  // namespace dlrm_deploy
