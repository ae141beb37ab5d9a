// mlp_avx2.cc: the MLP's loop on 8 lanes. Compiled with -mavx2 and -mfma; called only where the CPU
// has them.
#include <immintrin.h>

#include "kernels/mlp_loops.h"

namespace dlrm_deploy {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kGroups = 2;  // with 4 samples 8 sums and 4 weights in 16 registers
  using Reg = __m256;

  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg Broadcast(float value) { return _mm256_set1_ps(value); }
  static Reg Load(const float* from) { return _mm256_loadu_ps(from); }
  static Reg LoadFirst(int64_t count, const float* from) {
    return _mm256_maskload_ps(from, FirstLanes(count));
  }
  static void Store(float* to, Reg value) { _mm256_storeu_ps(to, value); }
  static void StoreFirst(int64_t count, float* to, Reg value) {
    _mm256_maskstore_ps(to, FirstLanes(count), value);
  }
  // Zero beyond the first `count` lanes.
  static Reg KeepFirst(int64_t count, Reg value) {
    return _mm256_and_ps(_mm256_castsi256_ps(FirstLanes(count)), value);
  }
  static Reg Add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg Relu(Reg a) {
    return _mm256_max_ps(_mm256_setzero_ps(), a);  // of a NaN and a number the second
  }

  // 8 pairs of bf16, as float32: the first of each and the second of each.
  static void LoadPairs(const uint16_t* from, Reg* even, Reg* odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, HighHalves()));
  }

  // To the nearest bf16, ties to even; NaN stays NaN.
  static Reg RoundToBf16(Reg value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    const __m256 chosen =
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    return _mm256_and_ps(chosen, _mm256_castsi256_ps(HighHalves()));
  }

 private:
  static __m256i HighHalves() { return _mm256_set1_epi32(static_cast<int>(0xffff0000u)); }
  static __m256i FirstLanes(int64_t count) {
    const int lanes = static_cast<int>(count < 0 ? 0 : count > kLanes ? kLanes : count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace

void RunMlpAvx2(const MlpTask& task) { RunMlpSimd<Avx2>(task); }

}  // namespace dlrm_deploy
