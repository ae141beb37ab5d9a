// mlp_loops.h: the MLP's loop, written once over a vector type V that a path supplies.
//
// Activations are float32 values of bf16, [rows][inputs rounded up to 32]. Lanes hold columns of
// the output. Each output has one accumulator, which takes its inputs in ascending order with fused
// multiply-adds: all paths but AMX agree bit for bit.
//
// V is declared in an anonymous namespace, which gives all of this internal linkage: see
// kernel_path.h for why that matters.
#ifndef DLRM_DEPLOY_KERNELS_MLP_LOOPS_H_
#define DLRM_DEPLOY_KERNELS_MLP_LOOPS_H_

#include <stdint.h>

#include "kernels/mlp_path.h"

namespace dlrm_deploy {
namespace {

// R samples by G groups of V::kLanes columns. `in` and `out` are the first sample's, `weights` and
// `bias` the first column's.
template <class V, int R, int G>
inline void MlpBlock(const MlpLayer& layer, const uint16_t* weights, const float* bias,
                     const float* in, bool last, int64_t columns, float* out, int64_t out_stride) {
  constexpr int kGroupsOfTile = kMlpTileColumns / V::kLanes;
  const int64_t in_stride = layer.k_tiles * kMlpTileInputs;
  const int64_t tile_stride = layer.k_tiles * kMlpTileValues;
  typename V::Reg sum[R][G];
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) sum[r][g] = V::Zero();
  }
  const int64_t pairs = (layer.inputs + 1) / 2;  // beyond an odd input lie zeros
  for (int64_t p = 0; p < pairs; ++p) {
    typename V::Reg even[G], odd[G];
    for (int g = 0; g < G; ++g) {
      V::LoadPairs(
          weights + g / kGroupsOfTile * tile_stride + p * 32 + g % kGroupsOfTile * V::kLanes * 2,
          &even[g], &odd[g]);
    }
    for (int r = 0; r < R; ++r) {
      const typename V::Reg x0 = V::Broadcast(in[r * in_stride + 2 * p]);
      for (int g = 0; g < G; ++g) sum[r][g] = V::MultiplyAdd(x0, even[g], sum[r][g]);
      const typename V::Reg x1 = V::Broadcast(in[r * in_stride + 2 * p + 1]);
      for (int g = 0; g < G; ++g) sum[r][g] = V::MultiplyAdd(x1, odd[g], sum[r][g]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) {
      typename V::Reg value = V::Add(sum[r][g], V::Load(bias + g * V::kLanes));
      if (layer.relu) value = V::Relu(value);
      float* to = out + r * out_stride + g * V::kLanes;
      if (last) {
        V::StoreFirst(columns - g * V::kLanes, to, value);
      } else {
        V::Store(to, V::KeepFirst(columns - g * V::kLanes, V::RoundToBf16(value)));
      }
    }
  }
}

// G groups of columns from the first column of `tile`, plus `group`, of all samples.
template <class V, int G>
void MlpColumns(const MlpLayer& layer, int64_t rows, int64_t tile, int64_t group, const float* in,
                bool last, float* out) {
  const int64_t column = tile * kMlpTileColumns + group * V::kLanes;
  const uint16_t* weights =
      layer.weights + tile * layer.k_tiles * kMlpTileValues + group * V::kLanes * 2;
  const float* bias = layer.bias + column;
  const int64_t columns = layer.outputs - column;
  const int64_t in_stride = layer.k_tiles * kMlpTileInputs;
  const int64_t out_stride = last ? layer.outputs : layer.n_tiles * kMlpTileColumns;
  out += column;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    MlpBlock<V, 4, G>(layer, weights, bias, in + row * in_stride, last, columns,
                      out + row * out_stride, out_stride);
  }
  for (; row < rows; ++row) {
    MlpBlock<V, 1, G>(layer, weights, bias, in + row * in_stride, last, columns,
                      out + row * out_stride, out_stride);
  }
}

template <class V>
void ConvertMlpInputs(const float* x, int64_t inputs, int64_t rows, int64_t stride, float* to) {
  for (int64_t row = 0; row < rows; ++row, x += inputs, to += stride) {
    int64_t k = 0;
    for (; k + V::kLanes <= inputs; k += V::kLanes) {
      V::Store(to + k, V::RoundToBf16(V::Load(x + k)));
    }
    if (k < inputs) {
      V::Store(to + k, V::RoundToBf16(V::LoadFirst(inputs - k, x + k)));
      k += V::kLanes;
    }
    for (; k < stride; k += V::kLanes) V::Store(to + k, V::Zero());
  }
}

template <class V>
void RunMlpSimd(const MlpTask& task) {
  constexpr int kGroupsOfTile = kMlpTileColumns / V::kLanes;
  constexpr int kTiles = V::kGroups / kGroupsOfTile;  // tiles of columns in the widest block
  float* from = static_cast<float*>(task.from);
  float* to = static_cast<float*>(task.to);
  if (task.x != nullptr) {
    ConvertMlpInputs<V>(task.x, task.layers[0].inputs, task.rows,
                        task.layers[0].k_tiles * kMlpTileInputs, from);
  }
  for (int64_t l = 0; l < task.count; ++l) {
    const MlpLayer& layer = task.layers[l];
    const bool last = l + 1 == task.count;
    const bool final_output = last && task.y != nullptr;
    const int64_t end_tile = last ? task.end_tile : layer.n_tiles;
    float* const out = final_output ? task.y : to;
    int64_t tile = last ? task.first_tile : 0;
    for (; tile + kTiles <= end_tile; tile += kTiles) {
      MlpColumns<V, V::kGroups>(layer, task.rows, tile, 0, from, final_output, out);
    }
    for (; tile < end_tile; ++tile) {
      MlpColumns<V, kGroupsOfTile>(layer, task.rows, tile, 0, from, final_output, out);
    }
    to = from;
    from = out;
  }
}

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_MLP_LOOPS_H_
