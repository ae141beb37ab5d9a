// mlp_amx.cc: the bf16 MLP on AMX tiles. Compiled with the instruction sets it needs; called only
// where amx_support.h says that CPU and operating system have them.
//
// Activations lie in tiles too: [row tile][input tile][16 samples][32 inputs] bf16. The epilogue of
// 32 columns then writes whole cache lines of the next layer's tiles, and every tile is 1 KB in a
// row: no stride, no two rows of a tile on the same set of the cache.
//
// A block is 32 samples by 32 columns, four accumulators. Its sums go to a small buffer and are
// finished (bias, ReLU, bf16) between the tile products of the next block, which leave the vector
// units idle.
#include <immintrin.h>

#include "kernels/amx_multiply.h"
#include "kernels/amx_tiles.h"
#include "kernels/mlp_path.h"

namespace dlrm_deploy {
namespace {

constexpr int64_t kTile = kMlpTileValues;
constexpr int kRows = kMlpTileRows;
constexpr int kSums = kMlpTileRows * kMlpTileColumns;

inline __m512i RoundPair(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// A block of 32 samples by 32 columns, or 16 by up to 64, whose sums wait for their epilogue, in up
// to two groups of 16 samples by 32 columns.
struct Block {
  alignas(64) float sums[4 * kSums];
  const float* bias[2];
  uint16_t* out[2];
  __mmask16 low[2];  // columns of the layer; the others, which only pad, become zero
  __mmask16 high[2];
  int units_of_group;  // of kUnit samples
  int units;           // of all groups
};

// Bias, ReLU and bf16 for one unit, into the next layer's tiles.
inline void FinishUnit(const Block& block, int unit) {
  const int group = unit >= block.units_of_group;
  const int row = (unit - group * block.units_of_group) * kUnit;
  const float* sums = block.sums + group * 2 * kSums + row * 16;
  uint16_t* out = block.out[group] + row * 32;
  const __m512 low_bias = _mm512_load_ps(block.bias[group]);
  const __m512 high_bias = _mm512_load_ps(block.bias[group] + 16);
  const __mmask16 low_mask = block.low[group];
  const __mmask16 high_mask = block.high[group];
  const __m512 zero = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int r = 0; r < kUnit; ++r, sums += 16, out += 32) {
    // Of a NaN and a number the maximum is the second: NaN stays NaN.
    const __m512 low =
        _mm512_maskz_max_ps(low_mask, zero, _mm512_add_ps(low_bias, _mm512_load_ps(sums)));
    const __m512 high = _mm512_maskz_max_ps(high_mask, zero,
                                            _mm512_add_ps(high_bias, _mm512_load_ps(sums + kSums)));
    _mm512_store_si512(out, RoundPair(low, high));
  }
}

// The samples of a task, in tiles.
struct Rows {
  int64_t count;
  int64_t tiles;
  int per_tile;  // 16, or fewer where there is one tile only
};

// Columns of a layer whose output are the next one's inputs.
struct Hidden {
  MlpLayer layer;
  Rows rows;
  const uint16_t* from;  // tiles of the inputs
  uint16_t* to;          // and of the outputs
  Block pending;

  // Row tile m, and column tile `tile`, of `from`, `to` and the weights.
  const uint16_t* Inputs(int64_t m) const { return from + m * layer.k_tiles * kTile; }
  const uint16_t* Weights(int64_t tile) const {
    return layer.weights + tile * layer.k_tiles * kTile;
  }
  uint16_t* Outputs(int64_t m, int64_t tile) const {
    return to + (m * layer.n_tiles + tile) / 2 * kTile;
  }
};

// Keeps the sums in the accumulators for their epilogue: M row tiles from m, N column tiles (an
// even number) from `tile`.
template <int M, int N>
inline void KeepBlock(Hidden* hidden, int64_t m, int64_t tile) {
  Block* block = &hidden->pending;
  StoreSums<M * N>(block->sums);
  const int64_t columns = hidden->layer.outputs - tile * kMlpTileColumns;
  block->units_of_group = (hidden->rows.per_tile + kUnit - 1) / kUnit;
  constexpr int kGroups = M * N / 2;
  block->units = kGroups * block->units_of_group;
  for (int g = 0; g < kGroups; ++g) {
    const int row_tile = M == 2 ? g : 0;
    const int column_tile = M == 2 ? 0 : 2 * g;
    block->bias[g] = hidden->layer.bias + (tile + column_tile) * kMlpTileColumns;
    block->out[g] = hidden->Outputs(m + row_tile, tile + column_tile);
    block->low[g] = FirstLanes(columns - column_tile * 16);
    block->high[g] = FirstLanes(columns - column_tile * 16 - 16);
  }
}

template <int M, int N>
inline void HiddenBlock(Hidden* hidden, int64_t m, int64_t tile) {
  const int64_t k_tiles = hidden->layer.k_tiles;
  Multiply<TileType::kBf16, M, N>(hidden->Inputs(m), hidden->Weights(tile), k_tiles,
                                  &hidden->pending);
  KeepBlock<M, N>(hidden, m, tile);
  if (k_tiles <= kFewInputTiles) FinishBlock(&hidden->pending);
}

// N column tiles (2 or 4) of all samples.
template <int N>
void HiddenColumns(Hidden* hidden, int64_t tile) {
  const int64_t tiles = hidden->rows.tiles;
  for (int64_t n = 0; n < N; n += 2) {
    for (int64_t m = 0; m + 2 <= tiles; m += 2) HiddenBlock<2, 2>(hidden, m, tile + n);
  }
  if (tiles % 2 != 0) HiddenBlock<1, N>(hidden, tiles - 1, tile);
}

// A block of the layer that gives y.
template <int M, int N>
inline void LastBlock(const MlpLayer& layer, const Rows& rows, const uint16_t* from,
                      int64_t row_tile, int64_t tile, float* y) {
  alignas(64) float block[M * N * kSums];
  Multiply<TileType::kBf16, M, N>(from + row_tile * layer.k_tiles * kTile,
                                  layer.weights + tile * layer.k_tiles * kTile, layer.k_tiles,
                                  static_cast<Block*>(nullptr));
  StoreSums<M * N>(block);
  const __m512 floor = layer.relu ? _mm512_setzero_ps() : _mm512_set1_ps(-__builtin_inff());
  for (int m = 0; m < M; ++m) {
    const int64_t first = (row_tile + m) * kRows;
    const int64_t left = rows.count - first;
    const int valid = static_cast<int>(left < kRows ? left : kRows);
    for (int n = 0; n < N; ++n) {
      const int64_t column = (tile + n) * kMlpTileColumns;
      const __mmask16 mask = FirstLanes(layer.outputs - column);
      const __m512 bias = _mm512_load_ps(layer.bias + column);
      const float* sums = block + (m * N + n) * kSums;
      float* to = y + first * layer.outputs + column;
      for (int r = 0; r < valid; ++r, sums += 16, to += layer.outputs) {
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums), bias);
        _mm512_mask_storeu_ps(to, mask, _mm512_max_ps(floor, sum));  // NaN stays NaN
      }
    }
  }
}

// N column tiles (1 to 4) of all samples.
template <int N>
void LastColumns(const MlpLayer& layer, const Rows& rows, const uint16_t* from, int64_t tile,
                 float* y) {
  constexpr int kTwo = N > 1 ? 2 : 1;
  int64_t m = 0;
  for (; m + 2 <= rows.tiles; m += 2) {
    LastBlock<2, kTwo>(layer, rows, from, m, tile, y);
    if constexpr (N > 2) LastBlock<2, N - 2>(layer, rows, from, m, tile + 2, y);
  }
  if (m < rows.tiles) LastBlock<1, N>(layer, rows, from, m, tile, y);
}

void HiddenLayer(const MlpLayer& layer, const Rows& rows, int64_t first_tile, int64_t end_tile,
                 const uint16_t* from, uint16_t* to) {
  Hidden hidden;
  hidden.layer = layer;
  hidden.rows = rows;
  hidden.from = from;
  hidden.to = to;
  hidden.pending.units = 0;
  Publish(from);
  int64_t tile = first_tile;
  for (; tile + 4 <= end_tile; tile += 4) HiddenColumns<4>(&hidden, tile);
  if (tile < end_tile) HiddenColumns<2>(&hidden, tile);
  FinishBlock(&hidden.pending);
}

void LastLayer(const MlpLayer& layer, const Rows& rows, int64_t first_tile, int64_t end_tile,
               const uint16_t* from, float* y) {
  Publish(from);
  for (int64_t tile = first_tile; tile < end_tile; tile += 4) {
    switch (end_tile - tile) {
      case 1:
        LastColumns<1>(layer, rows, from, tile, y);
        break;
      case 2:
        LastColumns<2>(layer, rows, from, tile, y);
        break;
      case 3:
        LastColumns<3>(layer, rows, from, tile, y);
        break;
      default:
        LastColumns<4>(layer, rows, from, tile, y);
        break;
    }
  }
}

// x to bf16, in tiles; zero beyond its columns and rows.
void ConvertInputs(const float* x, int64_t inputs, const Rows& rows, int64_t k_tiles,
                   uint16_t* to) {
  const int64_t whole = inputs / kMlpTileInputs;
  const int64_t left = inputs % kMlpTileInputs;
  const __mmask16 low = FirstLanes(left);
  const __mmask16 high = FirstLanes(left - 16);
  for (int64_t row = 0; row < rows.tiles * rows.per_tile; ++row) {
    uint16_t* out = to + row / kRows * k_tiles * kTile + row % kRows * 32;
    if (row >= rows.count) {
      for (int64_t k = 0; k < k_tiles; ++k, out += kTile) {
        _mm512_store_si512(out, _mm512_setzero_si512());
      }
      continue;
    }
    const float* in = x + row * inputs;
    for (int64_t k = 0; k < whole; ++k, in += 32, out += kTile) {
      _mm512_store_si512(out, RoundPair(_mm512_loadu_ps(in), _mm512_loadu_ps(in + 16)));
    }
    if (left > 0) {
      _mm512_store_si512(
          out, RoundPair(_mm512_maskz_loadu_ps(low, in), _mm512_maskz_loadu_ps(high, in + 16)));
    }
  }
}

}  // namespace

void RunMlpAmx(const MlpTask& task) {
  Rows rows;
  rows.count = task.rows;
  rows.tiles = (task.rows + kRows - 1) / kRows;
  rows.per_tile = static_cast<int>(task.rows < kRows ? task.rows : kRows);
  uint16_t* from = static_cast<uint16_t*>(task.from);
  uint16_t* to = static_cast<uint16_t*>(task.to);
  if (task.x != nullptr) {
    ConvertInputs(task.x, task.layers[0].inputs, rows, task.layers[0].k_tiles, from);
  }
  // Accumulators 0 to 3 and activations 4 have as many rows as there are samples. 5 holds
  // activations in a block of 32 samples, where all rows are 16, else weights like 6 and 7.
  ConfigureTiles(rows.per_tile);
  for (int64_t l = 0; l < task.count; ++l) {
    const MlpLayer& layer = task.layers[l];
    const bool last = l + 1 == task.count;
    const int64_t first_tile = last ? task.first_tile : 0;
    const int64_t end_tile = last ? task.end_tile : layer.n_tiles;
    if (last && task.y != nullptr) {
      LastLayer(layer, rows, first_tile, end_tile, from, task.y);
    } else {
      HiddenLayer(layer, rows, first_tile, end_tile, from, to);
      uint16_t* const next = from;
      from = to;
      to = next;
    }
  }
  _tile_release();  // else the kernel would save 8 KB of tiles whenever it switches threads
}

}  // namespace dlrm_deploy
