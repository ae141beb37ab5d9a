// amx_multiply.h: the product of two panels of tiles, in bf16 or int8. Internal to each file that
// includes it, which is compiled for AMX: see kernel_path.h.
#ifndef DLRM_DEPLOY_KERNELS_AMX_MULTIPLY_H_
#define DLRM_DEPLOY_KERNELS_AMX_MULTIPLY_H_

#include <immintrin.h>
#include <stdint.h>

namespace dlrm_deploy {
namespace {

enum class TileType { kBf16, kInt8 };

constexpr int64_t kTileBytes = 1024;
// Samples of a unit, the piece of a block's epilogue that is done between two steps.
constexpr int kUnit = 4;
// With this few products in a block there is nothing to hide the epilogue of the block before in.
constexpr int64_t kFewInputTiles = 1;

// The first `count` lanes: none when it is negative, all when there are more.
inline __mmask16 FirstLanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
}

// Finishes what is left of a block: all of its `units`, by FinishUnit(*due, unit).
template <class Due>
inline void FinishBlock(Due* due) {
  for (int unit = 0; unit < due->units; ++unit) FinishUnit(*due, unit);
  due->units = 0;
}

// The intrinsics want tiles as literals.
#define DLRM_DEPLOY_PRODUCT(sums, a, b)       \
  do {                                        \
    if constexpr (kType == TileType::kInt8) { \
      _tile_dpbssd(sums, a, b);               \
    } else {                                  \
      _tile_dpbf16ps(sums, a, b);             \
    }                                         \
  } while (false)

// Sums over all input tiles of a[m] * b[n], M x N of 2 x 2, 2 x 1, or 1 x 1 to 1 x 4, into tiles 0
// to M * N - 1. Panels of `k_tiles` tiles lie one after the other. Meanwhile the `units` of `due`
// are finished, by FinishUnit(*due, unit), if it is not null.
template <TileType kType, int M, int N, class Due>
inline void Multiply(const void* a_panel, const void* b_panel, int64_t k_tiles, Due* due) {
  const char* a = static_cast<const char*>(a_panel);
  const char* b = static_cast<const char*>(b_panel);
  const int64_t panel = k_tiles * kTileBytes;
  _tile_zero(0);
  if constexpr (M * N > 1) _tile_zero(1);
  if constexpr (M * N > 2) _tile_zero(2);
  if constexpr (M * N > 3) _tile_zero(3);
  const int units = due != nullptr ? due->units : 0;
  const int per_step = static_cast<int>((units + k_tiles - 1) / k_tiles);
  int unit = 0;
  for (int64_t k = 0; k < k_tiles; ++k, a += kTileBytes, b += kTileBytes) {
    // All loads first: measured the same on a core alone, and 10 % faster than between the products
    // where the core's other hardware thread is busy.
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    if constexpr (N > 1) _tile_loadd(7, b + panel, 64);
    if constexpr (M == 2) {
      _tile_loadd(5, a + panel, 64);
      DLRM_DEPLOY_PRODUCT(0, 4, 6);
      if constexpr (N == 1) {
        DLRM_DEPLOY_PRODUCT(1, 5, 6);
      } else {
        DLRM_DEPLOY_PRODUCT(1, 4, 7);
        DLRM_DEPLOY_PRODUCT(2, 5, 6);
        DLRM_DEPLOY_PRODUCT(3, 5, 7);
      }
    } else {
      if constexpr (N > 2) _tile_loadd(5, b + 2 * panel, 64);
      DLRM_DEPLOY_PRODUCT(0, 4, 6);
      if constexpr (N > 3) _tile_loadd(6, b + 3 * panel, 64);
      if constexpr (N > 1) DLRM_DEPLOY_PRODUCT(1, 4, 7);
      if constexpr (N > 2) DLRM_DEPLOY_PRODUCT(2, 4, 5);
      if constexpr (N > 3) DLRM_DEPLOY_PRODUCT(3, 4, 6);
    }
    for (int u = 0; u < per_step && unit < units; ++u, ++unit) FinishUnit(*due, unit);
  }
  if (due != nullptr) due->units = 0;
}

#undef DLRM_DEPLOY_PRODUCT

// Tiles 0 to Tiles - 1, 1 KB each.
template <int Tiles>
inline void StoreSums(void* to) {
  char* const sums = static_cast<char*>(to);
  _tile_stored(0, sums, 64);
  if constexpr (Tiles > 1) _tile_stored(1, sums + kTileBytes, 64);
  if constexpr (Tiles > 2) _tile_stored(2, sums + 2 * kTileBytes, 64);
  if constexpr (Tiles > 3) _tile_stored(3, sums + 3 * kTileBytes, 64);
}

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_AMX_MULTIPLY_H_
