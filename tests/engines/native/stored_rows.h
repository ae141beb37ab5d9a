// stored_rows.h: rows of every format filled with arbitrary bits, and what they mean: the plain
// reference of the row formats, which shares nothing with the kernels.
#ifndef DLRM_DEPLOY_TESTS_STORED_ROWS_H_
#define DLRM_DEPLOY_TESTS_STORED_ROWS_H_

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "bag_case.h"

namespace dlrm_deploy {

inline float HalfValue(unsigned half) {
  const int exponent = static_cast<int>(half >> 10 & 31);
  const int fraction = static_cast<int>(half & 1023);
  double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
  }
  return static_cast<float>(half >> 15 ? -magnitude : magnitude);
}

inline unsigned Word(const uint8_t* at) { return at[0] + 256u * at[1]; }

// Column d of row r of a matrix of the case.
inline float StoredValue(const BagCase& c, RowFormat format, int64_t r, int64_t d) {
  if (format == RowFormat::kFp32) return c.weights[static_cast<size_t>(r * c.width + d)];
  const int64_t row_bytes = RowBytes(format, c.width);
  const uint8_t* row = c.stored[static_cast<size_t>(format)].bytes.data() + r * row_bytes;
  if (format == RowFormat::kFp16) return HalfValue(Word(row + 2 * d));
  if (format == RowFormat::kBf16) {
    const uint32_t bits = Word(row + 2 * d) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const int code = format == RowFormat::kInt8 ? row[d]
                   : d % 2 == 0               ? row[d / 2] % 16
                                              : row[d / 2] / 16;
  const float scale = HalfValue(Word(row + row_bytes - 4));
  const float bias = HalfValue(Word(row + row_bytes - 2));
  const float product = static_cast<float>(code) * scale;  // exact
  return product + bias;
}

// Moves slot t's table part into a matrix of formats[t], of arbitrary bytes. Every third row's fp16
// and bf16 values, scales and biases are of any bits, NaN and infinity among them; the others are
// moderate, so that sums stay finite. The case has one slot a feature, and row_starts of fp32.
inline BagCase Stored(BagCase c, const std::vector<RowFormat>& formats) {
  std::mt19937 random(static_cast<unsigned>(c.width) + 7u);
  const std::vector<float> weights = std::move(c.weights);
  c.weights.clear();
  c.total_rows = 0;
  c.attributes.width = c.width;
  for (size_t t = 0; t < formats.size(); ++t) {
    const RowFormat format = formats[t];
    const int64_t rows = c.attributes.rows[t];
    const int64_t from = c.attributes.row_starts[t];
    c.name += ", format " + std::to_string(static_cast<int>(format));
    c.attributes.formats.push_back(static_cast<int64_t>(format));
    StoredRows& stored = c.stored[static_cast<size_t>(format)];
    c.attributes.row_starts[t] = format == RowFormat::kFp32 ? c.total_rows : stored.rows;
    if (format == RowFormat::kFp32) {
      c.weights.insert(c.weights.end(), weights.begin() + from * c.width,
                       weights.begin() + (from + rows) * c.width);
      c.total_rows += rows;
      continue;
    }
    stored.rows += rows;
    for (int64_t r = 0; r < rows; ++r) {
      const auto moderate = [&](uint8_t upper) {  // the upper byte of an fp16 or bf16 number near 1
        return r % 3 == 2 ? upper : static_cast<uint8_t>((upper & 0x81) | 0x3a);
      };
      const bool words = format == RowFormat::kFp16 || format == RowFormat::kBf16;
      const int64_t row_bytes = RowBytes(format, c.width);
      for (int64_t k = 0; k < row_bytes; ++k) {
        const uint8_t byte = static_cast<uint8_t>(random());
        const bool upper = words ? k % 2 == 1 : k == row_bytes - 3 || k == row_bytes - 1;
        stored.bytes.push_back(upper ? moderate(byte) : byte);
      }
    }
  }
  return c;
}

// The operator, read off its definition. CSR form, plain slots, index policy error.
inline std::vector<float> PlainPooled(const BagCase& c) {
  const EmbeddingBagAttributes& a = c.attributes;
  const int64_t batch = c.batch();
  std::vector<float> pooled;
  for (int64_t b = 0; b < batch; ++b) {
    for (size_t t = 0; t < a.features.size(); ++t) {
      const size_t bag = static_cast<size_t>(a.features[t] * batch + b);
      for (int64_t d = 0; d < c.width; ++d) {
        float sum = 0.0f;
        for (int64_t p = c.offsets[bag]; p < c.offsets[bag + 1]; ++p) {
          const size_t at = static_cast<size_t>(p);
          const float value = StoredValue(c, static_cast<RowFormat>(a.formats[t]),
                                          a.row_starts[t] + c.indices[at], d);
          const float term =
              c.per_sample_weights.empty() ? value : c.per_sample_weights[at] * value;
          sum = sum + term;
        }
        const int64_t length = c.offsets[bag + 1] - c.offsets[bag];
        pooled.push_back(a.mean[t] == 1 && length > 0 ? sum / static_cast<float>(length) : sum);
      }
    }
  }
  return pooled;
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_TESTS_STORED_ROWS_H_
