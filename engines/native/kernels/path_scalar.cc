// path_scalar.cc: the plain reference of both inner loops, and the only path off x86-64. Keep it
// plain.
#include "kernels/kernel_path.h"

namespace dlrm_deploy {

void PoolChunkScalar(const Chunk& chunk, int64_t width) {
  int first = 0;
  for (int b = 0; b < chunk.bags; ++b) {
    const BagPart& bag = chunk.bag[b];
    if (!bag.resume) {
      for (int64_t d = 0; d < width; ++d) bag.out[d] = 0.0f;
    }
    for (int i = first; i < first + bag.count; ++i) {
      const float* row = chunk.row[i];
      if (row == nullptr) continue;
      for (int64_t d = 0; d < width; ++d) {
        bag.out[d] += chunk.weighted ? chunk.weight[i] * row[d] : row[d];
      }
    }
    if (bag.divisor != 1.0f) {
      for (int64_t d = 0; d < width; ++d) bag.out[d] /= bag.divisor;
    }
    first += bag.count;
  }
}

void InteractScalar(const InteractionShape& shape, const float* dense, const float* embeddings,
                    int64_t samples, float* /*scratch*/, float* out) {
  const int64_t width = shape.width;
  for (int64_t s = 0; s < samples; ++s) {
    const float* x0 = dense + s * width;
    const float* rest = embeddings + s * (shape.vectors - 1) * width;  // x_1, x_2, ...
    for (int64_t d = 0; d < width; ++d) *out++ = x0[d];
    for (int64_t i = 0; i < shape.vectors; ++i) {
      const float* xi = i == 0 ? x0 : rest + (i - 1) * width;
      for (int64_t j = 0; j < i + shape.self; ++j) {
        const float* xj = j == 0 ? x0 : rest + (j - 1) * width;
        float sum = 0.0f;
        for (int64_t d = 0; d < width; ++d) sum += xi[d] * xj[d];
        *out++ = sum;
      }
    }
  }
}

double MultiplyAddLoopScalar(int64_t iterations, float* values) {
  constexpr int kChains = 16;
  float sum[kChains];
  for (float& s : sum) s = values[0];
  for (int64_t i = 0; i < iterations; ++i) {
    for (float& s : sum) s = s * values[1] + values[2];
  }
  for (int k = 1; k < kChains; ++k) sum[0] += sum[k];
  values[0] = sum[0];
  return 2.0 * kChains * static_cast<double>(iterations);
}

}  // namespace dlrm_deploy
