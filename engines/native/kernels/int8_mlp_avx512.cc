// int8_mlp_avx512.cc: the int8 MLP's loop on 16 lanes. Compiled with -mavx512f and -mavx512bw;
// called only where the CPU has them.
#include <immintrin.h>

#include "kernels/int8_mlp_loops.h"

namespace dlrm_deploy {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kRows = 4;
  using Reg = __m512;
  using Magnitude = __m512i;

  static Reg Broadcast(float value) { return _mm512_set1_ps(value); }
  static Reg Load(const float* from) { return _mm512_loadu_ps(from); }
  static Reg LoadFirst(int64_t count, const float* from) {
    return _mm512_maskz_loadu_ps(FirstLanes(count), from);
  }
  static Reg Multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }

  // Magnitudes as bits without the sign.
  static Magnitude NoMagnitude() { return _mm512_setzero_si512(); }
  static Magnitude Larger(Magnitude magnitude, Reg x) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epu32(magnitude, bits);
  }
  static uint32_t Largest(Magnitude magnitude) { return _mm512_reduce_max_epu32(magnitude); }

  // Sixteen values as codes: to nearest, ties to even.
  static void StoreCodes(int16_t* to, Reg values) {
    const __m256i codes = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(values));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
  }

  // Four weights of 16 columns, and sums of pairs of their products.
  struct Quads {
    __m512i low, high;
  };
  using Sums = Quads;
  static Sums NoSums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static Quads LoadQuads(const int8_t* from) {
    const __m256i* at = reinterpret_cast<const __m256i*>(from);
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(at)),
            _mm512_cvtepi8_epi16(_mm256_loadu_si256(at + 1))};
  }
  static Sums AddQuad(Sums sums, Quads quads, const int16_t* codes) {
    int64_t four;
    __builtin_memcpy(&four, codes, sizeof four);
    const __m512i x = _mm512_set1_epi64(four);
    return {_mm512_add_epi32(sums.low, _mm512_madd_epi16(quads.low, x)),
            _mm512_add_epi32(sums.high, _mm512_madd_epi16(quads.high, x))};
  }

  static void Finish(Sums sums, Reg step, const float* scale, const float* bias, bool relu,
                     int64_t columns, float* to) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_permutex2var_epi32(sums.low, even, sums.high),
                                         _mm512_permutex2var_epi32(sums.low, odd, sums.high));
    Reg value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), step);
    value = _mm512_add_ps(_mm512_mul_ps(value, _mm512_load_ps(scale)), _mm512_load_ps(bias));
    // Of a NaN and a number the maximum is the second: NaN stays NaN.
    if (relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
    _mm512_mask_storeu_ps(to, FirstLanes(columns), value);
  }

 private:
  static __mmask16 FirstLanes(int64_t count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << count) - 1u);
  }
};

}  // namespace

void RunInt8MlpAvx512(const Int8MlpTask& task) { RunInt8Chain<VectorInt8Mlp<Avx512>>(task); }

}  // namespace dlrm_deploy
