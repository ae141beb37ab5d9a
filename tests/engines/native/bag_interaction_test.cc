// The fused operator against its two halves, bit for bit, on every path.
#include "kernels/bag_interaction.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "stored_rows.h"

namespace dlrm_deploy {
namespace {

std::vector<float> Dense(int64_t batch, int64_t width) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> dense(static_cast<size_t>(batch * width));
  for (float& x : dense) x = normal(random);
  return dense;
}

struct FusedResult {
  Error error;
  std::vector<float> interactions, pooled;
};

template <typename Id>
FusedResult RunFused(const BagCase& c, const std::vector<float>& dense, bool self, bool want_pooled,
                     const KernelPath& path, int threads) {
  const GuardedInputs<Id> inputs(c);
  FusedResult result;
  EmbeddingBag bag;
  InteractionShape shape;
  int64_t batch = 0;
  result.error = EmbeddingBag::Create(c.attributes, &bag);
  if (!result.error) result.error = bag.BatchSize(inputs.in, &batch);
  if (!result.error) result.error = MakeInteractionShape(bag.slots(), c.width, self, &shape);
  if (result.error) return result;
  GuardedBuffer<float> guarded_dense(dense);
  result.interactions.assign(static_cast<size_t>(batch * shape.output_width), -7.0f);
  result.pooled.assign(static_cast<size_t>(batch * bag.slots() * c.width), -7.0f);
  GuardedBuffer<float> interactions(result.interactions), pooled(result.pooled);
  result.error = RunBagInteraction(bag, inputs.in, shape, guarded_dense.data(), batch, path,
                                   ThreadRunner(threads), interactions.data(),
                                   want_pooled ? pooled.data() : nullptr);
  std::copy_n(interactions.data(), result.interactions.size(), result.interactions.data());
  std::copy_n(pooled.data(), result.pooled.size(), result.pooled.data());
  return result;
}

// What DotInteraction makes of the pooled bags of the same path.
std::vector<float> Halves(const BagCase& c, const std::vector<float>& dense, bool self,
                          const KernelPath& path) {
  const std::vector<float> pooled = RunAs<int64_t>(c, path, 1).pooled;
  const int64_t slots = static_cast<int64_t>(c.attributes.features.size());
  InteractionShape shape;
  EXPECT_FALSE(MakeInteractionShape(slots, c.width, self, &shape));
  const int64_t batch = static_cast<int64_t>(pooled.size()) / (slots * c.width);
  std::vector<float> interactions(static_cast<size_t>(batch * shape.output_width));
  EXPECT_FALSE(RunDotInteraction(shape, dense.data(), pooled.data(), batch, path, ThreadRunner(1),
                                 interactions.data()));
  return interactions;
}

void ExpectTheHalves(const BagCase& c, int64_t batch) {
  const std::vector<float> dense = Dense(batch, c.width);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    for (const bool self : {false, true}) {
      const std::vector<uint32_t> expected = Bits(Halves(c, dense, self, path));
      const std::vector<uint32_t> pooled = Bits(RunAs<int64_t>(c, path, 1).pooled);
      for (const int threads : {1, 3}) {
        const std::string where = std::string(path.name) + " on " + c.name;
        const FusedResult both = RunFused<int64_t>(c, dense, self, true, path, threads);
        ASSERT_FALSE(both.error) << where << ": " << *both.error;
        EXPECT_EQ(Bits(both.interactions), expected) << where;
        EXPECT_EQ(Bits(both.pooled), pooled) << where;
        const FusedResult narrow = RunFused<int32_t>(c, dense, self, false, path, threads);
        EXPECT_EQ(Bits(narrow.interactions), expected) << where;
        for (const float untouched : narrow.pooled) ASSERT_EQ(untouched, -7.0f) << where;
      }
    }
  }
}

TEST(BagInteraction, EqualsItsHalvesOnAwkwardBags) {
  for (const int64_t width : {1, 5, 16, 64}) {
    ExpectTheHalves(MakeCase("no samples", {{}, {}}, {4, 5}, width), 0);
    ExpectTheHalves(MakeCase("empty bags", {{0, 0}, {0, 0}}, {4, 5}, width), 2);
    ExpectTheHalves(MakeCase("one sample", {{3}, {1}, {0}}, {4, 5, 6}, width), 1);
    ExpectTheHalves(MakeCase("uneven", {{0, 3, 300, 1}, {1, 0, 2, 257}}, {4, 5}, width, true), 4);
    ExpectTheHalves(MakeCase("mean", {{0, 3, 300, 1}, {1, 0, 2, 257}}, {4, 5}, width, false, true),
                    4);
  }
}

TEST(BagInteraction, EqualsItsHalvesOnMoreSamplesThanABlockHolds) {
  for (const int64_t samples : {37, 1000}) {
    const std::vector<std::vector<int64_t>> one_hot(
        26, std::vector<int64_t>(static_cast<size_t>(samples), 1));
    ExpectTheHalves(MakeCase("one-hot", one_hot, std::vector<int64_t>(26, 50), 16), samples);
  }
}

TEST(BagInteraction, EqualsItsHalvesOnSamplesLargerThanABlock) {
  for (const int64_t samples : {1, 5, 40}) {
    const std::vector<std::vector<int64_t>> long_bags(
        3, std::vector<int64_t>(static_cast<size_t>(samples), 120));
    ExpectTheHalves(MakeCase("long bags", long_bags, {9, 8, 7}, 64), samples);
  }
  // More than 8 MiB of vectors: pooled in two steps.
  const std::vector<std::vector<int64_t>> wide(2, std::vector<int64_t>(300, 3));
  ExpectTheHalves(MakeCase("wide", wide, {4, 5}, 4096), 300);
}

TEST(BagInteraction, EqualsItsHalvesInMixedFormatsAndTheFixedForm) {
  const std::vector<std::vector<int64_t>> lengths(5, std::vector<int64_t>(70, 3));
  BagCase c = Stored(
      MakeCase("mixed", lengths, {9, 8, 7, 6, 5}, 20),
      {RowFormat::kInt8, RowFormat::kFp32, RowFormat::kInt4, RowFormat::kBf16, RowFormat::kFp16});
  ExpectTheHalves(c, 70);
  c.offsets.clear();
  c.attributes.pooling_factors = {3, 3, 3, 3, 3};
  ExpectTheHalves(c, 70);
}

TEST(BagInteraction, RowsThatAreComputedFromIdsAndIdsOutOfRangeFollowTheirRules) {
  std::mt19937_64 random(3);
  const std::vector<std::vector<int64_t>> ones(4, std::vector<int64_t>(200, 1));
  for (const IndexPolicy policy : {IndexPolicy::kClamp, IndexPolicy::kModulo, IndexPolicy::kZero}) {
    BagCase c = MakeCase("computed", ones, {5, 6, 7, 8}, 16);
    c.attributes.index_policy = policy;
    c.attributes.ids = {5, 60, 7, 800};
    c.attributes.moduli = {0, 0, 3, 1000};
    c.attributes.divisors = {1, 10, 1, 100};
    c.attributes.divisions = {0, 0, 0, 2};
    for (int64_t& id : c.indices) id = static_cast<int64_t>(random() % 100) - 20;
    // As int32 the ids keep their values; whatever they are, the next rows to come are asked for.
    ExpectTheHalves(c, 200);
  }
}

TEST(BagInteraction, ABadIdIsNamedAsByTheBagsAlone) {
  const std::vector<std::vector<int64_t>> ones(3, std::vector<int64_t>(500, 1));
  BagCase c = MakeCase("error", ones, {50, 60, 70}, 16);
  c.indices[777] = 60;
  c.indices[1400] = -1;
  const std::vector<float> dense = Dense(500, 16);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    const FusedResult result = RunFused<int64_t>(c, dense, false, false, path, 2);
    ASSERT_TRUE(result.error);
    EXPECT_EQ(*result.error, *RunAs<int64_t>(c, path, 1).error);
    EXPECT_NE(result.error->find("sample 277"), std::string::npos) << *result.error;
  }
}

TEST(BagInteraction, ABadIdOfALargeSampleIsNamedWhereverItIsPooled) {
  const std::vector<std::vector<int64_t>> wide(2, std::vector<int64_t>(300, 3));
  for (const size_t position : {size_t{4}, size_t{899}, size_t{1799}}) {  // the last: second step
    BagCase c = MakeCase("error", wide, {4, 5}, 4096);
    c.indices[position] = 5;
    const std::vector<float> dense = Dense(300, 4096);
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported()) continue;
      const FusedResult result = RunFused<int64_t>(c, dense, false, false, path, 2);
      ASSERT_TRUE(result.error) << path.name;
      EXPECT_EQ(*result.error, *RunAs<int64_t>(c, path, 1).error);
    }
  }
}

TEST(BagInteraction, VectorsOfNoColumnsHaveProductsOfZero) {
  const BagCase c = MakeCase("no columns", {{1, 2, 0}, {0, 1, 1}}, {4, 5}, 0);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    const FusedResult result = RunFused<int64_t>(c, {}, false, false, path, 1);
    EXPECT_FALSE(result.error) << path.name << ": " << *result.error;
    EXPECT_EQ(result.interactions, std::vector<float>(9, 0.0f)) << path.name;
  }
}

TEST(BagInteraction, NanStaysInItsSample) {
  const std::vector<std::vector<int64_t>> ones(3, std::vector<int64_t>(90, 1));
  BagCase c = MakeCase("nan", ones, {90, 5, 5}, 16);
  for (int64_t b = 0; b < 90; ++b) c.indices[static_cast<size_t>(b)] = b;
  c.weights[41 * 16 + 3] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> dense = Dense(90, 16);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    const std::vector<float> out = RunFused<int64_t>(c, dense, false, false, path, 1).interactions;
    const size_t width = out.size() / 90;
    for (size_t i = 0; i < out.size(); ++i) {
      if (i / width == 41) continue;
      ASSERT_FALSE(std::isnan(out[i])) << path.name << " " << i;
    }
    EXPECT_TRUE(std::isnan(out[41 * width + 16])) << path.name;
  }
}

}  // namespace
}  // namespace dlrm_deploy
