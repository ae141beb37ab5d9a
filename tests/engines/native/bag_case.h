// bag_case.h: embedding bags for tests: made, stored in any row format, and run with all inputs at
// the end of a page that may not be touched.
#ifndef DLRM_DEPLOY_TESTS_BAG_CASE_H_
#define DLRM_DEPLOY_TESTS_BAG_CASE_H_

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "c_api/thread_runner.h"
#include "guarded_buffer.h"
#include "kernels/embedding_bag.h"

namespace dlrm_deploy {

// The bytes of the table parts of one format other than fp32.
struct StoredRows {
  std::vector<uint8_t> bytes;
  int64_t rows = 0;
};

struct BagCase {
  std::string name;
  int64_t width = 4;
  int64_t total_rows = 0;
  EmbeddingBagAttributes attributes;
  std::vector<int64_t> indices;
  std::vector<int64_t> offsets;  // empty: the fixed form
  std::vector<float> per_sample_weights;
  std::vector<float> weights;                       // [total_rows, width]
  std::array<StoredRows, kRowFormats> stored = {};  // by RowFormat, empty for fp32
  Guard guard = Guard::kBehind;                     // where the forbidden page lies

  int64_t batch() const {
    return (static_cast<int64_t>(offsets.size()) - 1) / attributes.num_features;
  }
};

// Bags of lengths[f][b], feature f in its own table of rows[f] rows.
inline BagCase MakeCase(const std::string& name, const std::vector<std::vector<int64_t>>& lengths,
                        const std::vector<int64_t>& rows, int64_t width, bool weighted = false,
                        bool mean = false) {
  std::mt19937 random(static_cast<unsigned>(width));
  std::normal_distribution<float> normal;
  BagCase c;
  c.name = name + ", width " + std::to_string(width);
  c.width = width;
  c.attributes.num_features = static_cast<int64_t>(lengths.size());
  c.offsets.push_back(0);
  for (size_t f = 0; f < lengths.size(); ++f) {
    c.attributes.features.push_back(static_cast<int64_t>(f));
    c.attributes.row_starts.push_back(c.total_rows);
    c.attributes.rows.push_back(rows[f]);
    c.attributes.mean.push_back(mean);
    c.total_rows += rows[f];
    for (const int64_t length : lengths[f]) {
      for (int64_t i = 0; i < length; ++i) {
        c.indices.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(rows[f])));
        if (weighted) c.per_sample_weights.push_back(normal(random));
      }
      c.offsets.push_back(static_cast<int64_t>(c.indices.size()));
    }
  }
  c.weights.resize(static_cast<size_t>(c.total_rows * width));
  for (float& w : c.weights) w = normal(random);
  return c;
}

// The inputs of a call, each in memory of its own that is guarded.
template <typename Id>
class GuardedInputs {
 public:
  explicit GuardedInputs(const BagCase& c)
      : weights_(c.weights, c.guard),
        per_sample_weights_(c.per_sample_weights),
        indices_(std::vector<Id>(c.indices.begin(), c.indices.end())),
        offsets_(std::vector<Id>(c.offsets.begin(), c.offsets.end())) {
    in.width = c.width;
    const bool fp32 = c.attributes.formats.empty() || !c.weights.empty();
    in.matrix(RowFormat::kFp32) = {fp32, weights_.data(), c.total_rows};
    for (size_t f = 1; f < c.stored.size(); ++f) {
      stored_.push_back(std::make_unique<GuardedBuffer<uint8_t>>(c.stored[f].bytes, c.guard));
      in.matrices[f] = {c.stored[f].rows > 0, stored_.back()->data(), c.stored[f].rows};
    }
    in.id_type = sizeof(Id) == 4 ? IdType::kInt32 : IdType::kInt64;
    in.indices = indices_.data();
    in.num_indices = static_cast<int64_t>(c.indices.size());
    in.has_offsets = !c.offsets.empty();
    in.offsets = offsets_.data();
    in.num_offsets = static_cast<int64_t>(c.offsets.size());
    in.has_per_sample_weights = !c.per_sample_weights.empty();
    in.per_sample_weights = per_sample_weights_.data();
    in.num_per_sample_weights = static_cast<int64_t>(c.per_sample_weights.size());
  }

  EmbeddingBagInputs in;

 private:
  GuardedBuffer<float> weights_, per_sample_weights_;
  GuardedBuffer<Id> indices_, offsets_;
  std::vector<std::unique_ptr<GuardedBuffer<uint8_t>>> stored_;
};

struct Result {
  Error error;
  std::vector<float> pooled;
};

template <typename Id>
Result RunAs(const BagCase& c, const KernelPath& path, int threads) {
  const GuardedInputs<Id> inputs(c);
  Result result;
  EmbeddingBag bag;
  int64_t batch = 0;
  result.error = EmbeddingBag::Create(c.attributes, &bag);
  if (!result.error) result.error = bag.BatchSize(inputs.in, &batch);
  if (result.error) return result;
  GuardedBuffer<float> pooled(
      std::vector<float>(static_cast<size_t>(batch * bag.slots() * c.width), -7.0f));
  result.error = bag.Run(inputs.in, batch, path, ThreadRunner(threads), pooled.data());
  result.pooled.assign(pooled.data(), pooled.data() + batch * bag.slots() * c.width);
  return result;
}

// NaNs of all kinds compare equal; everything else by its bits.
inline std::vector<uint32_t> Bits(const std::vector<float>& values) {
  std::vector<uint32_t> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const float value = std::isnan(values[i]) ? std::numeric_limits<float>::quiet_NaN() : values[i];
    std::memcpy(&bits[i], &value, sizeof value);
  }
  return bits;
}

inline const KernelPath& Scalar() { return AllKernelPaths().back(); }

// Every path, on one thread and on two, with ids of both sizes.
inline void ExpectOnAllPaths(const BagCase& c, const std::vector<float>& expected) {
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    for (const int threads : {1, 2}) {
      const Result wide = RunAs<int64_t>(c, path, threads);
      EXPECT_EQ(Bits(wide.pooled), Bits(expected)) << path.name << " on " << c.name;
      const Result narrow = RunAs<int32_t>(c, path, threads);
      EXPECT_EQ(Bits(narrow.pooled), Bits(expected)) << path.name << " int32 on " << c.name;
    }
  }
}

inline void ExpectAllPathsAgree(const BagCase& c) {
  const Result expected = RunAs<int64_t>(c, Scalar(), 1);
  ASSERT_FALSE(expected.error) << c.name << ": " << *expected.error;
  ExpectOnAllPaths(c, expected.pooled);
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_TESTS_BAG_CASE_H_
