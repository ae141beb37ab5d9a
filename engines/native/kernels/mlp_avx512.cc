// mlp_avx512.cc: the MLP's loop on 16 lanes. Compiled with -mavx512f; called only where the CPU has
// it.
#include <immintrin.h>

#include "kernels/mlp_loops.h"

namespace dlrm_deploy {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kGroups = 4;  // with 4 samples 16 sums and 8 weights in 32 registers
  using Reg = __m512;

  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg Broadcast(float value) { return _mm512_set1_ps(value); }
  static Reg Load(const float* from) { return _mm512_loadu_ps(from); }
  static Reg LoadFirst(int64_t count, const float* from) {
    return _mm512_maskz_loadu_ps(FirstLanes(count), from);
  }
  static void Store(float* to, Reg value) { _mm512_storeu_ps(to, value); }
  static void StoreFirst(int64_t count, float* to, Reg value) {
    _mm512_mask_storeu_ps(to, FirstLanes(count), value);
  }
  // Zero beyond the first `count` lanes.
  static Reg KeepFirst(int64_t count, Reg value) {
    return _mm512_maskz_mov_ps(FirstLanes(count), value);
  }
  static Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg Relu(Reg a) {
    return _mm512_max_ps(_mm512_setzero_ps(), a);  // of a NaN and a number the second
  }

  // 16 pairs of bf16, as float32: the first of each and the second of each.
  static void LoadPairs(const uint16_t* from, Reg* even, Reg* odd) {
    const __m512i pairs = _mm512_loadu_si512(from);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, HighHalves()));
  }

  // To the nearest bf16, ties to even; NaN stays NaN.
  static Reg RoundToBf16(Reg value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, HighHalves()));
  }

 private:
  static __m512i HighHalves() { return _mm512_set1_epi32(static_cast<int>(0xffff0000u)); }
  static __mmask16 FirstLanes(int64_t count) {
    const int64_t lanes = count < 0 ? 0 : count > kLanes ? kLanes : count;
    return static_cast<__mmask16>((1u << lanes) - 1u);
  }
};

}  // namespace

void RunMlpAvx512(const MlpTask& task) { RunMlpSimd<Avx512>(task); }

}  // namespace dlrm_deploy
