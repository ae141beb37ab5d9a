// mlp_scalar.cc: the plain reference of the MLP's loop, and the only one off x86-64. Keep it plain.
// Activations are float32 values of bf16, [rows][inputs rounded up to 32].
#include <string.h>

#include "kernels/mlp_path.h"

namespace dlrm_deploy {
namespace {

float FromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest bf16, ties to even; NaN stays NaN.
float RoundToBf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return FromBits((bits | 0x00400000u) & 0xffff0000u);
  return FromBits((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// sums[16] += x * weights of one input. The other paths use a fused multiply-add: with bf16 factors
// the product and, where it matters for the rounding, the sum are exact in double precision (16 and
// 24 bits that overlap or lie next to each other), so this gives the same bits.
void AddInput(float x, const uint16_t* weights, float* sums) {
  for (int64_t c = 0; c < kMlpTileColumns; ++c) {
    const float weight = FromBits(static_cast<uint32_t>(weights[c * 2]) << 16);
    sums[c] = static_cast<float>(static_cast<double>(x) * static_cast<double>(weight) +
                                 static_cast<double>(sums[c]));
  }
}

// One sample, columns [tile * 16, tile * 16 + 16).
void RunTile(const MlpLayer& layer, const float* in, int64_t tile, bool last, float* out) {
  const uint16_t* weights = layer.weights + tile * layer.k_tiles * kMlpTileValues;
  float sums[kMlpTileColumns] = {};
  const int64_t inputs = (layer.inputs + 1) / 2 * 2;  // whole pairs, as the vectors read them
  for (int64_t k = 0; k < inputs; ++k) AddInput(in[k], weights + k / 2 * 32 + k % 2, sums);
  for (int64_t c = 0; c < kMlpTileColumns; ++c) {
    const int64_t column = tile * kMlpTileColumns + c;
    if (column >= layer.outputs) {  // only pads
      if (!last) out[column] = 0.0f;
      continue;
    }
    float value = sums[c] + layer.bias[column];
    if (layer.relu && value < 0.0f) value = 0.0f;
    out[column] = last ? value : RoundToBf16(value);
  }
}

}  // namespace

void RunMlpScalar(const MlpTask& task) {
  float* from = static_cast<float*>(task.from);
  float* to = static_cast<float*>(task.to);
  if (task.x != nullptr) {
    const MlpLayer& first = task.layers[0];
    const int64_t stride = first.k_tiles * kMlpTileInputs;
    for (int64_t row = 0; row < task.rows; ++row) {
      for (int64_t k = 0; k < stride; ++k) {
        from[row * stride + k] =
            k < first.inputs ? RoundToBf16(task.x[row * first.inputs + k]) : 0.0f;
      }
    }
  }
  for (int64_t l = 0; l < task.count; ++l) {
    const MlpLayer& layer = task.layers[l];
    const bool last = l + 1 == task.count;
    const bool final_output = last && task.y != nullptr;
    const int64_t from_stride = layer.k_tiles * kMlpTileInputs;
    const int64_t to_stride = final_output ? layer.outputs : layer.n_tiles * kMlpTileColumns;
    float* const out = final_output ? task.y : to;
    for (int64_t row = 0; row < task.rows; ++row) {
      for (int64_t tile = last ? task.first_tile : 0; tile < (last ? task.end_tile : layer.n_tiles);
           ++tile) {
        RunTile(layer, from + row * from_stride, tile, final_output, out + row * to_stride);
      }
    }
    to = from;
    from = out;
  }
}

}  // namespace dlrm_deploy
