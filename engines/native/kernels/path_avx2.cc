// path_avx2.cc: the inner loops on 8 lanes. Compiled with -mavx2 -mfma; called only where the CPU
// has both.
#include <immintrin.h>

#include "kernels/simd_loops.h"

namespace dlrm_deploy {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  using Reg = __m256;
  using Mask = __m256i;

  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg Broadcast(float value) { return _mm256_set1_ps(value); }
  static Reg Load(const float* from) { return _mm256_loadu_ps(from); }
  static Reg LoadMasked(Mask mask, const float* from) { return _mm256_maskload_ps(from, mask); }
  static void Store(float* to, Reg value) { _mm256_storeu_ps(to, value); }
  static void StoreMasked(Mask mask, float* to, Reg value) { _mm256_maskstore_ps(to, mask, value); }
  static Reg Add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg Multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg Divide(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }

  static Mask FirstLanes(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }

  // Stores the first `count` lanes: none when it is negative, all when there are more.
  static void StoreFirst(int64_t count, float* to, Reg value) {
    if (count >= kLanes) {
      Store(to, value);  // many CPUs store with a mask more slowly
    } else {
      StoreMasked(FirstLanes(count), to, value);
    }
  }

  // to[c * stride + k] = x[k][first + c] for four columns c of eight vectors k.
  static void Transpose4(const float* const* x, int64_t first, float* to, int64_t stride) {
    const Reg a = Quads(x[0] + first, x[4] + first), b = Quads(x[1] + first, x[5] + first);
    const Reg c = Quads(x[2] + first, x[6] + first), d = Quads(x[3] + first, x[7] + first);
    const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    Store(to, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)));
    Store(to + stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)));
    Store(to + 2 * stride, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)));
    Store(to + 3 * stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)));
  }

 private:
  static Reg Quads(const float* low, const float* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }
};

}  // namespace

void PoolChunkAvx2(const Chunk& chunk, int64_t width) { PoolChunkSimd<Avx2>(chunk, width); }

void InteractAvx2(const InteractionShape& shape, const float* dense, const float* embeddings,
                  int64_t samples, float* scratch, float* out) {
  InteractSimd<Avx2>(shape, dense, embeddings, samples, scratch, out);
}

double MultiplyAddLoopAvx2(int64_t iterations, float* values) {
  return MultiplyAddLoopSimd<Avx2>(iterations, values);
}

}  // namespace dlrm_deploy
