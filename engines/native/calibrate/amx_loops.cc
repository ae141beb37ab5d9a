// amx_loops.cc: tile products from registers. Compiled with AMX; called only where amx_support.h
// says that CPU and operating system have it.
#include "calibrate/amx_loops.h"

#include <immintrin.h>

#include "kernels/amx_tiles.h"

namespace dlrm_deploy {
namespace {

// Tiles 4 to 7 from 1 KB at `values`, tiles 0 to 3 zero.
void LoadTiles(const void* values) {
  ConfigureTiles(16);
  Publish(values);
  _tile_loadd(4, values, 64);
  _tile_loadd(5, values, 64);
  _tile_loadd(6, values, 64);
  _tile_loadd(7, values, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

}  // namespace

double Bf16TileLoop(int64_t iterations) {
  alignas(64) uint16_t ones[512];
  for (uint16_t& one : ones) one = 0x3f80;
  LoadTiles(ones);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2.0 * 16 * 16 * 32 * static_cast<double>(iterations);
}

double Int8TileLoop(int64_t iterations) {
  alignas(64) uint8_t ones[1024];
  for (uint8_t& one : ones) one = 1;
  LoadTiles(ones);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2.0 * 16 * 16 * 64 * static_cast<double>(iterations);
}

}  // namespace dlrm_deploy
