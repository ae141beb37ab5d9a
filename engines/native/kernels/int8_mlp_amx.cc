// int8_mlp_amx.cc: the int8 MLP on AMX tiles. Compiled with the instruction sets it needs; called
// only where amx_support.h says that CPU and operating system have them.
//
// Codes lie in tiles: [row tile][input tile][16 samples][64 inputs]. A block is 32 samples by 32
// columns, or 16 by up to 64: four accumulators. Its sums go to a small buffer and become float32
// outputs between the tile products of the next block, which leave the vector units idle.
#include <immintrin.h>

#include "kernels/amx_multiply.h"
#include "kernels/amx_tiles.h"
#include "kernels/int8_mlp_chain.h"

namespace dlrm_deploy {
namespace {

constexpr int kRows = kInt8TileRows;
constexpr int kSums = kInt8TileRows * kInt8TileColumns;  // of a tile

// Up to four tiles of sums that wait for their epilogue, in units of kUnit samples.
struct Block {
  struct Tile {
    const float* steps;
    const float* scale;
    const float* bias;
    float* y;
    int rows;
    __mmask16 columns;
  };
  alignas(64) int32_t sums[4 * kSums];
  Tile tile[4];
  int64_t y_stride;
  __m512 floor;  // 0 for a ReLU
  int units;     // of all tiles
};
constexpr int kUnitsOfTile = kRows / kUnit;

inline void FinishUnit(const Block& block, int unit) {
  const Block::Tile& tile = block.tile[unit / kUnitsOfTile];
  const int first = unit % kUnitsOfTile * kUnit;
  const int32_t* sums = block.sums + unit / kUnitsOfTile * kSums + first * 16;
  const __m512 scale = _mm512_load_ps(tile.scale);
  const __m512 bias = _mm512_load_ps(tile.bias);
  float* y = tile.y + first * block.y_stride;
  const auto finish = [&](int r) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * r));
    const __m512 step = _mm512_set1_ps(tile.steps[first + r]);
    const __m512 value = _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(sum, step), scale), bias);
    // Of a NaN and a number the maximum is the second: NaN stays NaN.
    _mm512_mask_storeu_ps(y + r * block.y_stride, tile.columns, _mm512_max_ps(block.floor, value));
  };
  if (first + kUnit <= tile.rows) {
#pragma GCC unroll 4
    for (int r = 0; r < kUnit; ++r) finish(r);
  } else {
    for (int r = 0; first + r < tile.rows; ++r) finish(r);
  }
}

// What the blocks of a layer share.
struct Run {
  Int8Layer layer;
  int64_t rows;
  const int8_t* codes;
  const float* steps;
  float* y;
  Block pending;
};

// M row tiles from row tile m, N column tiles from `tile`.
template <int M, int N>
inline void RunBlock(Run* run, int64_t m, int64_t tile) {
  const Int8Layer& layer = run->layer;
  const int64_t panel = layer.k_tiles * kTileBytes;
  Block* const block = &run->pending;
  Multiply<TileType::kInt8, M, N>(run->codes + m * panel, layer.weights + tile * panel,
                                  layer.k_tiles, block);
  StoreSums<M * N>(block->sums);
  for (int t = 0; t < M * N; ++t) {
    const int64_t row = (m + t / N) * kRows;
    const int64_t column = (tile + t % N) * kInt8TileColumns;
    const int64_t left = run->rows - row;
    block->tile[t] = {run->steps + row,
                      layer.scale + column,
                      layer.bias + column,
                      run->y + row * block->y_stride + column,
                      static_cast<int>(left < kRows ? left : kRows),
                      FirstLanes(layer.outputs - column)};
  }
  block->units = M * N * kUnitsOfTile;
  if (layer.k_tiles <= kFewInputTiles) FinishBlock(block);
}

// N column tiles (1 to 4) of all samples.
template <int N>
void RunColumns(Run* run, int64_t tile) {
  constexpr int kTwo = N > 1 ? 2 : 1;
  const int64_t tiles = (run->rows + kRows - 1) / kRows;
  for (int64_t m = 0; m + 2 <= tiles; m += 2) {
    RunBlock<2, kTwo>(run, m, tile);
    if constexpr (N > 2) RunBlock<2, N - 2>(run, m, tile + 2);
  }
  if (tiles % 2 != 0) RunBlock<1, N>(run, tiles - 1, tile);
}

// Sixteen values as codes in 32 bits: to nearest, ties to even. NaN gives some code.
inline __m512i Codes(__m512 values, __m512 inverse) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
}

// The codes of a tile row, in order: they fit into 8 bits, so that packing saturates none.
inline __m512i PackCodes(__m512i a, __m512i b, __m512i c, __m512i d) {
  // Packing works within each quarter of a register.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  return _mm512_permutexvar_epi32(order, packed);
}

// The largest magnitude of a sample, as bits without the sign.
inline uint32_t LargestMagnitude(const float* x, int64_t inputs) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  __m512i other = most;
  int64_t k = 0;
  for (; k + 32 <= inputs; k += 32) {
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + k), magnitude));
    other = _mm512_max_epu32(other, _mm512_and_si512(_mm512_loadu_si512(x + k + 16), magnitude));
  }
  for (; k < inputs; k += 16) {
    const __m512i rest = _mm512_maskz_loadu_epi32(FirstLanes(inputs - k), x + k);
    most = _mm512_max_epu32(most, _mm512_and_si512(rest, magnitude));
  }
  return _mm512_reduce_max_epu32(_mm512_max_epu32(most, other));
}

struct Amx {
  static void Quantize(const float* x, int64_t stride, int64_t inputs, int64_t rows, void* to,
                       float* steps) {
    const int64_t whole = inputs / kInt8TileInputs;
    const int64_t rest = inputs % kInt8TileInputs;
    const int64_t k_tiles = whole + (rest > 0);
    const __mmask16 lanes[4] = {FirstLanes(rest), FirstLanes(rest - 16), FirstLanes(rest - 32),
                                FirstLanes(rest - 48)};
    for (int64_t row = 0; row < rows; ++row) {
      const float* in = x + row * stride;
      const SampleScale scale = ScaleOf(LargestMagnitude(in, inputs));
      steps[row] = scale.step;
      const __m512 inverse = _mm512_set1_ps(scale.inverse);
      int8_t* codes = static_cast<int8_t*>(to) + row / kRows * k_tiles * kTileBytes +
                      row % kRows * kInt8TileInputs;
      for (int64_t k = 0; k < whole; ++k, in += kInt8TileInputs, codes += kTileBytes) {
        _mm512_store_si512(codes, PackCodes(Codes(_mm512_loadu_ps(in), inverse),
                                            Codes(_mm512_loadu_ps(in + 16), inverse),
                                            Codes(_mm512_loadu_ps(in + 32), inverse),
                                            Codes(_mm512_loadu_ps(in + 48), inverse)));
      }
      if (rest > 0) {
        _mm512_store_si512(codes,
                           PackCodes(Codes(_mm512_maskz_loadu_ps(lanes[0], in), inverse),
                                     Codes(_mm512_maskz_loadu_ps(lanes[1], in + 16), inverse),
                                     Codes(_mm512_maskz_loadu_ps(lanes[2], in + 32), inverse),
                                     Codes(_mm512_maskz_loadu_ps(lanes[3], in + 48), inverse)));
      }
    }
  }

  static void Layer(const Int8Layer& layer, int64_t rows, int64_t first_tile, int64_t end_tile,
                    const void* codes, const float* steps, float* y, int64_t y_stride) {
    Run run;
    run.layer = layer;
    run.rows = rows;
    run.codes = static_cast<const int8_t*>(codes);
    run.steps = steps;
    run.y = y;
    run.pending.y_stride = y_stride;
    run.pending.floor = layer.relu ? _mm512_setzero_ps() : _mm512_set1_ps(-__builtin_inff());
    run.pending.units = 0;
    Publish(codes);
    for (int64_t tile = first_tile; tile < end_tile; tile += 4) {
      switch (end_tile - tile) {
        case 1:
          RunColumns<1>(&run, tile);
          break;
        case 2:
          RunColumns<2>(&run, tile);
          break;
        case 3:
          RunColumns<3>(&run, tile);
          break;
        default:
          RunColumns<4>(&run, tile);
          break;
      }
    }
    FinishBlock(&run.pending);
  }
};

}  // namespace

void RunInt8MlpAmx(const Int8MlpTask& task) {
  // Accumulators 0 to 3 and codes 4 have as many rows as there are samples. 5 holds codes in a
  // block of 32 samples, where all rows are 16, else weights like 6 and 7.
  ConfigureTiles(static_cast<int>(task.rows < kRows ? task.rows : kRows));
  RunInt8Chain<Amx>(task);
  _tile_release();  // else the kernel would save 8 KB of tiles whenever it switches threads
}

}  // namespace dlrm_deploy
