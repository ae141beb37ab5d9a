// amx_tiles.h: how tiles are set up. Internal to each file that includes it, which is compiled for
// AMX: see kernel_path.h.
#ifndef DLRM_DEPLOY_KERNELS_AMX_TILES_H_
#define DLRM_DEPLOY_KERNELS_AMX_TILES_H_

#include <immintrin.h>
#include <stdint.h>

namespace dlrm_deploy {
namespace {

// As LDTILECFG reads it.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// What the compiler may not move or drop stores across: GCC's tile intrinsics do not tell it which
// memory they read.
inline void Publish(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Eight tiles of 64-byte rows: 0 to 4 have `rows` rows, the others 16.
inline void ConfigureTiles(int rows) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile <= 4 ? rows : 16);
  }
  Publish(&config);
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_AMX_TILES_H_
