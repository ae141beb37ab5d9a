// mlp_path.h: a packed MLP, and the loop over its layers that exists once per instruction set.
//
// Like kernel_path.h this header is included by files compiled for one instruction set, so it
// holds no inline function and no standard header that defines some.
#ifndef DLRM_DEPLOY_KERNELS_MLP_PATH_H_
#define DLRM_DEPLOY_KERNELS_MLP_PATH_H_

#include <stdint.h>

namespace dlrm_deploy {

// Weights lie in tiles of 16 columns (outputs) and 32 inputs, 1 KB each: what one AMX tile holds,
// and a run of whole vectors for the other paths.
inline constexpr int64_t kMlpTileColumns = 16;
inline constexpr int64_t kMlpTileInputs = 32;
inline constexpr int64_t kMlpTileRows = 16;     // samples of one AMX tile
inline constexpr int64_t kMlpTileValues = 512;  // bf16 values of a tile

struct MlpLayer {
  int64_t inputs;   // K
  int64_t outputs;  // N
  int64_t k_tiles;  // tiles of inputs
  int64_t n_tiles;  // tiles of columns; even, except for the last layer
  // [n_tiles][k_tiles][16 pairs of inputs][16 columns][2 inputs] bf16, zero beyond K and N; 64-byte
  // aligned.
  const uint16_t* weights;
  const float* bias;  // [n_tiles * 16], zero beyond N; 64-byte aligned
  bool relu;          // never false but in the last layer
};

// Consecutive layers on a few samples. Activations between layers lie in `from` and `to` in turn,
// in a form of the path's own: 4 bytes for every sample (rounded up to 16) and input (rounded up to
// 32) are enough. Both are 64-byte aligned.
struct MlpTask {
  const MlpLayer* layers;
  int64_t count;
  int64_t rows;
  const float* x;  // [rows, inputs of the first layer]; null: an earlier task left them in `from`
  void* from;
  void* to;
  float* y;  // [rows, outputs of the last layer]; null: they are left in `to`, count is 1
  // Tiles of columns of the last layer to compute: all of them, unless count is 1. The first is
  // even.
  int64_t first_tile;
  int64_t end_tile;
};
using RunMlp = void (*)(const MlpTask& task);

void RunMlpScalar(const MlpTask& task);
void RunMlpAvx2(const MlpTask& task);
void RunMlpAvx512(const MlpTask& task);
void RunMlpAmx(const MlpTask& task);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_MLP_PATH_H_
