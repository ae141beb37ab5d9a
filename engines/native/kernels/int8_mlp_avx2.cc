// int8_mlp_avx2.cc: the int8 MLP's loop on 8 lanes. Compiled with -mavx2; called only where the CPU
// has it.
#include <immintrin.h>

#include "kernels/int8_mlp_loops.h"

namespace dlrm_deploy {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;
  using Reg = __m256;
  using Magnitude = __m256i;

  static Reg Broadcast(float value) { return _mm256_set1_ps(value); }
  static Reg Load(const float* from) { return _mm256_loadu_ps(from); }
  static Reg LoadFirst(int64_t count, const float* from) {
    return _mm256_maskload_ps(from, FirstLanes(count));
  }
  static Reg Multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }

  // Magnitudes as bits without the sign.
  static Magnitude NoMagnitude() { return _mm256_setzero_si256(); }
  static Magnitude Larger(Magnitude magnitude, Reg x) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epu32(magnitude, bits);
  }
  static uint32_t Largest(Magnitude magnitude) {
    alignas(32) uint32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), magnitude);
    uint32_t largest = 0;
    for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
  }

  // Eight values as codes: to nearest, ties to even.
  static void StoreCodes(int16_t* to, Reg values) {
    const __m256i codes = _mm256_cvtps_epi32(values);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
  }

  // Four weights of 16 columns, and sums of pairs of their products.
  struct Quads {
    __m256i of[4];
  };
  using Sums = Quads;
  static Sums NoSums() {
    const __m256i zero = _mm256_setzero_si256();
    return {{zero, zero, zero, zero}};
  }
  static Quads LoadQuads(const int8_t* from) {
    const __m128i* at = reinterpret_cast<const __m128i*>(from);
    return {{_mm256_cvtepi8_epi16(_mm_loadu_si128(at)),
             _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1)),
             _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 2)),
             _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 3))}};
  }
  static Sums AddQuad(Sums sums, const Quads& quads, const int16_t* codes) {
    long long four;
    __builtin_memcpy(&four, codes, sizeof four);
    const __m256i x = _mm256_set1_epi64x(four);
    for (int i = 0; i < 4; ++i) {
      sums.of[i] = _mm256_add_epi32(sums.of[i], _mm256_madd_epi16(quads.of[i], x));
    }
    return sums;
  }

  static void Finish(const Sums& sums, Reg step, const float* scale, const float* bias, bool relu,
                     int64_t columns, float* to) {
    for (int half = 0; half < 2; ++half) {
      const __m256i pairs = _mm256_hadd_epi32(sums.of[2 * half], sums.of[2 * half + 1]);
      const __m256i sum = _mm256_permute4x64_epi64(pairs, 0xd8);  // columns in their order
      Reg value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), step);
      value = _mm256_add_ps(_mm256_mul_ps(value, _mm256_load_ps(scale + 8 * half)),
                            _mm256_load_ps(bias + 8 * half));
      // Of a NaN and a number the maximum is the second: NaN stays NaN.
      if (relu) value = _mm256_max_ps(_mm256_setzero_ps(), value);
      _mm256_maskstore_ps(to + 8 * half, FirstLanes(columns - 8 * half), value);
    }
  }

 private:
  static __m256i FirstLanes(int64_t count) {
    const int lanes = static_cast<int>(count < 0 ? 0 : count > kLanes ? kLanes : count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace

void RunInt8MlpAvx2(const Int8MlpTask& task) { RunInt8Chain<VectorInt8Mlp<Avx2>>(task); }

}  // namespace dlrm_deploy
