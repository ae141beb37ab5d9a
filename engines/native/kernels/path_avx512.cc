// path_avx512.cc: the inner loops on 16 lanes. Compiled with -mavx512f; called only where the CPU
// has it.
#include <immintrin.h>

#include "kernels/simd_loops.h"

namespace dlrm_deploy {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using Reg = __m512;
  using Mask = __mmask16;

  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg Broadcast(float value) { return _mm512_set1_ps(value); }
  static Reg Load(const float* from) { return _mm512_loadu_ps(from); }
  static Reg LoadMasked(Mask mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
  static void Store(float* to, Reg value) { _mm512_storeu_ps(to, value); }
  static void StoreMasked(Mask mask, float* to, Reg value) {
    _mm512_mask_storeu_ps(to, mask, value);
  }
  static Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg Multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg Divide(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

  static Mask FirstLanes(int64_t count) { return static_cast<Mask>((1u << count) - 1u); }

  // Stores the first `count` lanes: none when it is negative, all when there are more.
  static void StoreFirst(int64_t count, float* to, Reg value) {
    const int64_t lanes = count < 0 ? 0 : count > kLanes ? kLanes : count;
    _mm512_mask_storeu_ps(to, FirstLanes(lanes), value);
  }

  // to[c * stride + k] = x[k][first + c] for four columns c of sixteen vectors k.
  static void Transpose4(const float* const* x, int64_t first, float* to, int64_t stride) {
    const Reg a = Quads(x, first), b = Quads(x + 1, first);
    const Reg c = Quads(x + 2, first), d = Quads(x + 3, first);
    const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    Store(to, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low)));
    Store(to + stride, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low)));
    Store(to + 2 * stride, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)));
    Store(to + 3 * stride, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)));
  }

 private:
  // Four floats each of x[0], x[4], x[8] and x[12]; the merges run beside the loads.
  static Reg Quads(const float* const* x, int64_t first) {
    Reg quads = _mm512_castps128_ps512(_mm_loadu_ps(x[0] + first));
    quads = _mm512_mask_broadcast_f32x4(quads, 0x00f0, _mm_loadu_ps(x[4] + first));
    quads = _mm512_mask_broadcast_f32x4(quads, 0x0f00, _mm_loadu_ps(x[8] + first));
    return _mm512_mask_broadcast_f32x4(quads, 0xf000, _mm_loadu_ps(x[12] + first));
  }
};

}  // namespace

void PoolChunkAvx512(const Chunk& chunk, int64_t width) { PoolChunkSimd<Avx512>(chunk, width); }

void InteractAvx512(const InteractionShape& shape, const float* dense, const float* embeddings,
                    int64_t samples, float* scratch, float* out) {
  InteractSimd<Avx512>(shape, dense, embeddings, samples, scratch, out);
}

double MultiplyAddLoopAvx512(int64_t iterations, float* values) {
  return MultiplyAddLoopSimd<Avx512>(iterations, values);
}

}  // namespace dlrm_deploy
