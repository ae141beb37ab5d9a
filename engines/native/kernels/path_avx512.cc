// path_avx512.cc: the inner loops on 16 lanes. Compiled with -mavx512f -mavx512bw -mavx512vl
// -mf16c; called only where the CPU has all of them.
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

  // Sixteen elements of 16, 8 or 4 bits, or the first `count` of them and nothing behind.
  static __m256i Load16(const void* from) { return _mm256_loadu_epi16(from); }
  static __m256i LoadFirst16(const void* from, int64_t count) {
    return _mm256_maskz_loadu_epi16(FirstLanes(count), from);
  }
  static __m128i Load8(const void* from) { return _mm_loadu_epi8(from); }
  static __m128i LoadFirst8(const void* from, int64_t count) {
    return _mm_maskz_loadu_epi8(FirstLanes(count), from);
  }
  static __m128i Load4(const void* from) {
    return _mm_loadl_epi64(static_cast<const __m128i*>(from));
  }
  static __m128i LoadFirst4(const void* from, int64_t count) {
    return _mm_maskz_loadu_epi8(FirstLanes((count + 1) / 2), from);
  }

  static Reg FromHalf(__m256i halves) { return _mm512_cvtph_ps(halves); }
  static Reg FromBfloat(__m256i bfloats) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16));
  }

  // code * scale + bias of codes of 8 bits.
  class ByteLine {
   public:
    explicit ByteLine(const void* scale_and_bias) {
      const __m128 both = ScaleAndBias(scale_and_bias);
      scale_ = _mm512_broadcastss_ps(both);
      bias_ = _mm512_broadcastss_ps(_mm_movehdup_ps(both));
    }
    Reg Value(__m128i codes) const {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), scale_, bias_);
    }

   private:
    Reg scale_, bias_;
  };

  // code * scale + bias of codes of 4 bits: a row has sixteen values, looked up by code.
  class NibbleLine {
   public:
    explicit NibbleLine(const void* scale_and_bias) {
      const __m128 both = ScaleAndBias(scale_and_bias);
      const Reg codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      values_ = _mm512_fmadd_ps(codes, _mm512_broadcastss_ps(both),
                                _mm512_broadcastss_ps(_mm_movehdup_ps(both)));
    }
    // Only the low four bits of a lane count: the even lanes have the byte, the odd ones its upper
    // half.
    Reg Value(__m128i codes) const {
      const __m512i bytes = _mm512_cvtepu8_epi64(codes);
      return _mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), values_);
    }

   private:
    Reg values_;
  };

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
  // Not _mm_loadu_si32, which GCC 11.1 and 11.2 get wrong (its bug 99754).
  static __m128i Load32(const void* from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return _mm_cvtsi32_si128(bits);
  }

  static __m128 ScaleAndBias(const void* from) { return _mm_cvtph_ps(Load32(from)); }

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
