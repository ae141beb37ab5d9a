// path_scalar.cc: the plain reference of both inner loops, and the only path off x86-64. Keep it
// plain.
#include "kernels/kernel_path.h"

namespace dlrm_deploy {
namespace {

float FloatOfBits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Two bytes, the lower one first, wherever they lie.
uint32_t Bits16(const unsigned char* at) { return at[0] | static_cast<uint32_t>(at[1]) << 8; }

// One sign bit, five of exponent, ten of fraction.
float FromHalf(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31u;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 31) return FloatOfBits(sign | 0x7f800000u | fraction << 13);
  if (exponent > 0) return FloatOfBits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24f;  // subnormal, exact in float32
  return sign ? -small : small;
}

// out += value(d), or weight * value(d), for each column d.
template <typename Value>
void AddColumns(int64_t width, const float* weight, float* out, const Value& value) {
  if (weight == nullptr) {
    for (int64_t d = 0; d < width; ++d) out[d] += value(d);
  } else {
    for (int64_t d = 0; d < width; ++d) out[d] += *weight * value(d);
  }
}

void AddRow(RowFormat format, const void* row, int64_t width, const float* weight, float* out) {
  const float* floats = static_cast<const float*>(row);
  const unsigned char* bytes = static_cast<const unsigned char*>(row);
  const unsigned char* end = bytes + (format == RowFormat::kInt8 ? width : (width + 1) / 2);
  switch (format) {
    case RowFormat::kFp32:
      return AddColumns(width, weight, out, [=](int64_t d) { return floats[d]; });
    case RowFormat::kFp16:
      return AddColumns(width, weight, out,
                        [=](int64_t d) { return FromHalf(Bits16(bytes + 2 * d)); });
    case RowFormat::kBf16:
      return AddColumns(width, weight, out,
                        [=](int64_t d) { return FloatOfBits(Bits16(bytes + 2 * d) << 16); });
    case RowFormat::kInt8:
    case RowFormat::kInt4: {
      const float scale = FromHalf(Bits16(end));  // behind the codes
      const float bias = FromHalf(Bits16(end + 2));
      if (format == RowFormat::kInt8) {
        return AddColumns(width, weight, out,
                          [=](int64_t d) { return static_cast<float>(bytes[d]) * scale + bias; });
      }
      return AddColumns(width, weight, out, [=](int64_t d) {
        return static_cast<float>(bytes[d / 2] >> (d % 2 * 4) & 15) * scale + bias;
      });
    }
  }
}

}  // namespace

void PoolChunkScalar(const Chunk& chunk, int64_t width) {
  int first = 0;
  for (int b = 0; b < chunk.bags; ++b) {
    const BagPart& bag = chunk.bag[b];
    if (!bag.resume) {
      for (int64_t d = 0; d < width; ++d) bag.out[d] = 0.0f;
    }
    for (int i = first; i < first + bag.count; ++i) {
      if (chunk.row[i] == nullptr) continue;
      const float* weight = chunk.weighted ? &chunk.weight[i] : nullptr;
      AddRow(chunk.format, chunk.row[i], width, weight, bag.out);
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
