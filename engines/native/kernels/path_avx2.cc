// path_avx2.cc: the inner loops on 8 lanes. Compiled with -mavx2 -mfma -mf16c; called only where
// the CPU has all of them.
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

  // Eight elements of 16, 8 or 4 bits, or the first `count` of them and nothing behind.
  static __m128i Load16(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static __m128i LoadFirst16(const void* from, int64_t count) {
    const char* bytes = static_cast<const char*>(from);
    if (count < 4) return Low(FirstBytes(bytes, 2 * count));
    uint64_t low;
    __builtin_memcpy(&low, bytes, sizeof low);
    return _mm_unpacklo_epi64(Low(low), Low(FirstBytes(bytes + 8, 2 * count - 8)));
  }
  static __m128i Load8(const void* from) {
    return _mm_loadl_epi64(static_cast<const __m128i*>(from));
  }
  static __m128i LoadFirst8(const void* from, int64_t count) {
    return Low(FirstBytes(static_cast<const char*>(from), count));
  }
  static __m128i Load4(const void* from) { return Nibbles(Load32(from)); }
  static __m128i LoadFirst4(const void* from, int64_t count) {
    return Nibbles(Low(FirstBytes(static_cast<const char*>(from), (count + 1) / 2)));
  }

  static Reg FromHalf(__m128i halves) { return _mm256_cvtph_ps(halves); }
  static Reg FromBfloat(__m128i bfloats) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloats), 16));
  }

  // code * scale + bias of codes of 8 bits. Codes of 4 bits were spread to 8 when they were loaded.
  class ByteLine {
   public:
    explicit ByteLine(const void* scale_and_bias) {
      const __m128 both = _mm_cvtph_ps(Load32(scale_and_bias));
      scale_ = _mm256_broadcastss_ps(both);
      bias_ = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
    }
    Reg Value(__m128i codes) const {
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), scale_, bias_);
    }

   private:
    Reg scale_, bias_;
  };
  using NibbleLine = ByteLine;

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
  // Not _mm_loadu_si32, which GCC 11.1 and 11.2 get wrong (its bug 99754).
  static __m128i Load32(const void* from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return _mm_cvtsi32_si128(bits);
  }

  static __m128i Low(uint64_t bits) { return _mm_cvtsi64_si128(static_cast<int64_t>(bits)); }

  // The first `count` bytes, 0 to 7, by loads that overlap instead of reading on.
  static uint64_t FirstBytes(const char* from, int64_t count) {
    if (count >= 4) {
      uint32_t first, last;
      __builtin_memcpy(&first, from, sizeof first);
      __builtin_memcpy(&last, from + count - 4, sizeof last);
      return first | static_cast<uint64_t>(last) << (8 * (count - 4));
    }
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
      bits |= static_cast<uint64_t>(static_cast<unsigned char>(from[i])) << (8 * i);
    }
    return bits;
  }

  // The eight codes in the first four bytes, a byte each; the lower half of a byte comes first.
  static __m128i Nibbles(__m128i bytes) {
    const __m128i words = _mm_cvtepu8_epi16(bytes);
    return _mm_and_si128(_mm_or_si128(words, _mm_slli_epi16(words, 4)), _mm_set1_epi8(15));
  }

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
