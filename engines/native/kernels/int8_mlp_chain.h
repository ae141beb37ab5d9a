// int8_mlp_chain.h: the order of quantizing and layers and the scale of a sample, the same on every
// path. Internal to each file that includes it: see kernel_path.h.
//
// A path P gives two functions:
//   P::Quantize(x, stride, inputs, rows, codes, steps)
//   P::Layer(layer, rows, first_tile, end_tile, codes, steps, y, y_stride)
#ifndef DLRM_DEPLOY_KERNELS_INT8_MLP_CHAIN_H_
#define DLRM_DEPLOY_KERNELS_INT8_MLP_CHAIN_H_

#include "kernels/int8_mlp_path.h"

namespace dlrm_deploy {
namespace {

// How a sample becomes codes: code = value * inverse, rounded.
struct SampleScale {
  float step;
  float inverse;
};

// From the bits of a sample's largest magnitude: bits without the sign order magnitudes as numbers
// do, and NaN behind infinity. The step of a sample that is not finite is NaN, which makes all of
// its outputs NaN, whatever its codes.
inline SampleScale ScaleOf(uint32_t largest_bits) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  float largest;
  __builtin_memcpy(&largest, &largest_bits, sizeof largest);
  return {largest_bits < kInfinity ? largest / 127.0f : __builtin_nanf(""),
          largest >= kInt8Tiny ? 127.0f / largest : 0.0f};
}

template <class P>
inline void RunInt8Chain(const Int8MlpTask& task) {
  if (task.x != nullptr) {
    P::Quantize(task.x, task.x_stride, task.layers[0].inputs, task.rows, task.codes, task.steps);
  }
  for (int64_t l = 0; l < task.count; ++l) {
    const Int8Layer& layer = task.layers[l];
    if (l + 1 == task.count) {
      P::Layer(layer, task.rows, task.first_tile, task.end_tile, task.codes, task.steps, task.y,
               task.y_stride);
      return;
    }
    const int64_t stride = layer.n_tiles * kInt8TileColumns;
    P::Layer(layer, task.rows, 0, layer.n_tiles, task.codes, task.steps, task.hidden, stride);
    P::Quantize(task.hidden, stride, layer.outputs, task.rows, task.codes, task.steps);
  }
}

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_INT8_MLP_CHAIN_H_
