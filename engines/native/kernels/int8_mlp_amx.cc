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

// The first `count` lanes: none when it is negative, all when there are more.
inline __mmask16 FirstLanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
}

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
  int units_of_tile;
  int units;  // of all tiles
};
constexpr int kUnit = 4;
// With this few products in a block there is nothing to hide the epilogue of the block before in.
constexpr int64_t kFewInputTiles = 1;

inline void FinishUnit(const Block& block, int unit) {
  const Block::Tile& tile = block.tile[unit / block.units_of_tile];
  const int first = unit % block.units_of_tile * kUnit;
  const int32_t* sums = block.sums + unit / block.units_of_tile * kSums + first * 16;
  const __m512 scale = _mm512_load_ps(tile.scale);
  const __m512 bias = _mm512_load_ps(tile.bias);
  float* y = tile.y + first * block.y_stride;
  for (int r = first; r < first + kUnit && r < tile.rows; ++r, sums += 16, y += block.y_stride) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(tile.steps[r])), scale);
    // Of a NaN and a number the maximum is the second: NaN stays NaN.
    _mm512_mask_storeu_ps(y, tile.columns, _mm512_max_ps(block.floor, _mm512_add_ps(scaled, bias)));
  }
}

inline void FinishBlock(Block* block) {
  for (int unit = 0; unit < block->units; ++unit) FinishUnit(*block, unit);
  block->units = 0;
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
  block->units = M * N * block->units_of_tile;
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

struct Amx {
  static void Quantize(const float* x, int64_t stride, int64_t inputs, int64_t rows, void* to,
                       float* steps) {
    constexpr uint32_t kInfinity = 0x7f800000u;
    const int64_t k_tiles = (inputs + kInt8TileInputs - 1) / kInt8TileInputs;
    const int64_t whole = inputs / 16;
    const __mmask16 rest = FirstLanes(inputs % 16);
    for (int64_t row = 0; row < rows; ++row, x += stride) {
      // Bits without the sign order magnitudes as numbers do, and NaN behind infinity.
      const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
      __m512i most = _mm512_setzero_si512();
      for (int64_t v = 0; v < whole; ++v) {
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + 16 * v), magnitude));
      }
      most = _mm512_max_epu32(
          most, _mm512_and_si512(_mm512_maskz_loadu_epi32(rest, x + 16 * whole), magnitude));
      const uint32_t bits = _mm512_reduce_max_epu32(most);
      float largest;
      __builtin_memcpy(&largest, &bits, sizeof largest);
      const bool finite = bits < kInfinity;
      steps[row] = finite ? largest / 127.0f : __builtin_nanf("");
      const bool zero = !finite || largest < kInt8Tiny;
      const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 127.0f / largest);
      int8_t* codes = static_cast<int8_t*>(to) + row / kRows * k_tiles * kTileBytes +
                      row % kRows * kInt8TileInputs;
      const int64_t valid = zero ? 0 : whole;
      for (int64_t v = 0; v < 4 * k_tiles; ++v) {
        const __mmask16 lanes = v < valid             ? __mmask16{0xffff}
                                : v == valid && !zero ? rest
                                                      : __mmask16{0};
        const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + 16 * v), inverse);
        _mm_store_si128(reinterpret_cast<__m128i*>(codes + v / 4 * kTileBytes + v % 4 * 16),
                        _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(values)));
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
    run.pending.units_of_tile =
        rows < kRows ? static_cast<int>((rows + kUnit - 1) / kUnit) : kRows / kUnit;
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
