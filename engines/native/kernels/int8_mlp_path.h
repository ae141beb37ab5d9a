// int8_mlp_path.h: a packed MLP of int8 weights, and the loop over its layers that exists once per
// instruction set.
//
// Like kernel_path.h this header is included by files compiled for one instruction set, so it
// holds no inline function and no standard header that defines some.
#ifndef DLRM_DEPLOY_KERNELS_INT8_MLP_PATH_H_
#define DLRM_DEPLOY_KERNELS_INT8_MLP_PATH_H_

#include <stdint.h>

namespace dlrm_deploy {

// Weights lie in tiles of 16 columns (outputs) and 64 inputs, 1 KB each.
inline constexpr int64_t kInt8TileColumns = 16;
inline constexpr int64_t kInt8TileInputs = 64;
inline constexpr int64_t kInt8TileBytes = 1024;
inline constexpr int64_t kInt8TileRows = 16;  // samples of one AMX tile

// The largest value of a sample below this: all of its codes are zero, because 127 / it is infinite
// or nearly so.
inline constexpr float kInt8Tiny = 1e-30f;

struct Int8Layer {
  int64_t inputs;   // K
  int64_t outputs;  // N
  int64_t k_tiles;  // tiles of inputs
  int64_t n_tiles;  // tiles of columns
  // [n_tiles][k_tiles][16 quads of inputs][16 columns][4 inputs], zero beyond K and N; 64-byte
  // aligned, as are the next two, [n_tiles * 16], zero beyond N.
  const int8_t* weights;
  const float* scale;
  const float* bias;
  bool relu;
};

// Consecutive layers on a few samples. A layer's inputs are quantized row by row into `codes` and
// `steps`, and its outputs are float32.
struct Int8MlpTask {
  const Int8Layer* layers;
  int64_t count;  // 0: the inputs of `layers[0]` are quantized and no layer runs
  int64_t rows;
  const float* x;    // [rows, x_stride]; null: an earlier task left codes and steps, count is 1
  int64_t x_stride;  // floats
  // Codes in a form of the path's own: 2 bytes for every sample (rounded up to 16) and input
  // (rounded up to 64) are enough. What belongs to no sample may stay unwritten. 64-byte aligned,
  // as is steps [rows rounded up to 16].
  void* codes;
  float* steps;
  float* hidden;  // between layers: [rows, widest n_tiles * 16]; 64-byte aligned
  float* y;       // [rows, y_stride], of the last layer
  int64_t y_stride;
  // Tiles of columns of the last layer to compute: all of them, unless count is 1.
  int64_t first_tile;
  int64_t end_tile;
};
using RunInt8Mlp = void (*)(const Int8MlpTask& task);

void RunInt8MlpScalar(const Int8MlpTask& task);
void RunInt8MlpAvx2(const Int8MlpTask& task);
void RunInt8MlpAvx512(const Int8MlpTask& task);
void RunInt8MlpAmx(const Int8MlpTask& task);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_INT8_MLP_PATH_H_
