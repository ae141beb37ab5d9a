// Every path against the scalar one, bit for bit, with all inputs at the end of a page that may not
// be touched.
#include "kernels/embedding_bag.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "bag_case.h"
#include "c_api/thread_runner.h"

namespace dlrm_deploy {
namespace {

const std::vector<int64_t> kWidths = {1, 3, 15, 16, 17, 64, 100};

TEST(EmbeddingBag, EveryPathMatchesScalarBitwiseOnAwkwardBags) {
  for (const int64_t width : kWidths) {
    for (const bool weighted : {false, true}) {
      ExpectAllPathsAgree(MakeCase("no samples", {{}, {}}, {4, 5}, width, weighted));
      ExpectAllPathsAgree(MakeCase("empty bags", {{0, 0}, {0, 0}}, {4, 5}, width, weighted));
      ExpectAllPathsAgree(MakeCase("one id", {{1}, {1}}, {4, 5}, width, weighted));
      ExpectAllPathsAgree(MakeCase("repeated", {{9, 9}, {7, 0}}, {1, 1}, width, weighted));
      ExpectAllPathsAgree(
          MakeCase("uneven", {{0, 3, 300, 1}, {1, 0, 2, 257}}, {4, 5}, width, weighted));
      ExpectAllPathsAgree(
          MakeCase("one-hot", std::vector<std::vector<int64_t>>(3, std::vector<int64_t>(600, 1)),
                   {40, 50, 60}, width, weighted));
    }
    ExpectAllPathsAgree(
        MakeCase("mean", {{0, 3, 300, 1}, {1, 0, 2, 257}}, {4, 5}, width, false, true));
  }
}

TEST(EmbeddingBag, ABagOfAHundredThousandIds) {
  ExpectAllPathsAgree(MakeCase("long", {{0, 100000}, {2, 1}}, {70, 5}, 17, true));
  ExpectAllPathsAgree(MakeCase("long mean", {{0, 100000}, {2, 1}}, {70, 5}, 17, false, true));
}

TEST(EmbeddingBag, TheScalarPathSumsInIndexOrder) {
  BagCase c = MakeCase("order", {{3, 0, 1}}, {3}, 1);
  c.weights = {1.0f, 1e8f, -1e8f};
  c.indices = {0, 1, 2, 0};
  EXPECT_EQ(RunAs<int64_t>(c, Scalar(), 1).pooled, (std::vector<float>{0.0f, 0.0f, 1.0f}));
  c.indices = {1, 2, 0, 0};
  EXPECT_EQ(RunAs<int64_t>(c, Scalar(), 1).pooled, (std::vector<float>{1.0f, 0.0f, 1.0f}));
}

TEST(EmbeddingBag, FixedPoolingEqualsTheSameBagsWithOffsets) {
  for (const int64_t width : kWidths) {
    BagCase c = MakeCase("fixed", {{2, 2, 2}, {0, 0, 0}, {3, 3, 3}}, {4, 5, 6}, width);
    const Result expected = RunAs<int64_t>(c, Scalar(), 1);
    c.attributes.pooling_factors = {2, 0, 3};
    c.offsets.clear();
    ExpectAllPathsAgree(c);
    EXPECT_EQ(Bits(RunAs<int64_t>(c, Scalar(), 1).pooled), Bits(expected.pooled));
    // Bags of one id and others in one chunk, and more of them than a chunk holds.
    const std::vector<int64_t> ones(300, 1), twos(300, 2);
    for (const bool mean : {false, true}) {
      BagCase mixed = MakeCase("mixed", {ones, twos, ones}, {4, 5, 6}, width, !mean, mean);
      const Result ragged = RunAs<int64_t>(mixed, Scalar(), 1);
      mixed.attributes.pooling_factors = {1, 2, 1};
      mixed.offsets.clear();
      ExpectAllPathsAgree(mixed);
      EXPECT_EQ(Bits(RunAs<int64_t>(mixed, Scalar(), 1).pooled), Bits(ragged.pooled));
    }
  }
}

TEST(EmbeddingBag, NanAndInfinityStayInTheirBag) {
  BagCase c = MakeCase("non-finite", {{2, 1, 2, 1}}, {5}, 19);
  c.indices = {0, 1, 2, 3, 4, 2};
  c.weights[0] = std::numeric_limits<float>::quiet_NaN();
  c.weights[3 * 19 + 5] = std::numeric_limits<float>::infinity();
  c.weights[4 * 19 + 5] = -std::numeric_limits<float>::infinity();
  ExpectAllPathsAgree(c);
  const std::vector<float> pooled = RunAs<int64_t>(c, Scalar(), 1).pooled;
  for (size_t i = 0; i < pooled.size(); ++i) {
    EXPECT_EQ(std::isfinite(pooled[i]), i != 0 && i != 2 * 19 + 5) << i;
  }
}

TEST(EmbeddingBag, PoliciesReadOnlyInsideTheTable) {
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  constexpr int64_t kNear = std::numeric_limits<int64_t>::min();
  struct Expectation {
    IndexPolicy policy;
    std::vector<float> pooled;
  };
  // One table of three rows 1, 10, 100 between two others; one bag an id, then a bag of all.
  const std::vector<int64_t> ids = {-1, 3, 1, kFar, kNear, -1, 3, 1};
  const std::vector<Expectation> expectations = {
      {IndexPolicy::kClamp, {1, 100, 10, 100, 1, 111}},
      {IndexPolicy::kModulo, {100, 1, 10, 10, 10, 111}},  // 2^63 - 1 and -2^63 are both 1 modulo 3
      {IndexPolicy::kZero, {0, 0, 10, 0, 0, 10}},
  };
  for (const Expectation& expected : expectations) {
    BagCase c = MakeCase("policy", {{1, 1, 1, 1, 1, 3}}, {3}, 1);
    c.total_rows = 5;
    c.weights = {7777, 1, 10, 100, 8888};
    c.attributes.row_starts = {1};
    c.attributes.index_policy = expected.policy;
    c.indices = ids;
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported()) continue;
      EXPECT_EQ(RunAs<int64_t>(c, path, 1).pooled, expected.pooled) << path.name;
    }
  }
}

TEST(EmbeddingBag, AnIdUnderPolicyZeroIgnoresItsWeightButCountsInTheMean) {
  BagCase c = MakeCase("zero", {{2}}, {3}, 1);
  c.weights = {8, 8, 8};
  c.indices = {1, 9};
  c.attributes.index_policy = IndexPolicy::kZero;
  c.attributes.mean = {1};
  EXPECT_EQ(RunAs<int64_t>(c, Scalar(), 1).pooled, std::vector<float>{4});
  c.attributes.mean = {0};
  c.per_sample_weights = {0.5f, std::numeric_limits<float>::quiet_NaN()};
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    EXPECT_EQ(RunAs<int64_t>(c, path, 1).pooled, std::vector<float>{4}) << path.name;
  }
}

TEST(EmbeddingBag, UnderPolicyErrorTheFirstBadIdByPositionIsNamedOnAnyNumberOfThreads) {
  const std::vector<int64_t> ones(4000, 1);
  BagCase c = MakeCase("error", {ones, ones, ones}, {50, 60, 70}, 16);
  c.attributes.feature_names = "user\nitem\ngenre";
  c.indices[11999] = 70;
  c.indices[5234] = -3;
  c.indices[5235] = std::numeric_limits<int64_t>::max();
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    for (const int threads : {1, 2, 4}) {
      const Result result = RunAs<int64_t>(c, path, threads);
      ASSERT_TRUE(result.error);
      EXPECT_EQ(result.error->find(
                    "feature 'item', sample 1234, position 0 of its bag: id -3 is outside [0, 60)"),
                0u)
          << *result.error;
    }
  }
}

TEST(EmbeddingBag, ASlotThatPoolsAFeatureWithFewerRowsIsTheOneQuoted) {
  BagCase c = MakeCase("two slots", {{2}}, {9}, 2);
  c.attributes.features = {0, 0};
  c.attributes.row_starts = {0, 4};
  c.attributes.rows = {9, 5};
  c.attributes.mean = {0, 0};
  c.indices = {4, 5};
  const Result result = RunAs<int64_t>(c, Scalar(), 1);
  ASSERT_TRUE(result.error);
  EXPECT_NE(result.error->find("position 1 of its bag: id 5 is outside [0, 5)"), std::string::npos)
      << *result.error;
}

TEST(EmbeddingBag, OffsetsThatFallAreNamedAndNothingIsRead) {
  BagCase c = MakeCase("offsets", {{2, 1}, {1, 2}}, {4, 5}, 3);
  c.offsets = {0, 2, 1, 4, 6};
  const Result fall = RunAs<int32_t>(c, Scalar(), 2);
  ASSERT_TRUE(fall.error);
  EXPECT_EQ(*fall.error, "offsets must not fall: offsets[2] is 1 after 2 (feature 0, sample 1)");
  c.offsets = {0, 2, 3, 4, 1 << 30};
  EXPECT_EQ(*RunAs<int32_t>(c, Scalar(), 1).error,
            "offsets must end with the number of ids, 6, got 1073741824");
  c.offsets = {-1, 2, 3, 4, 6};
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error, "offsets must begin with 0, got -1");
  c.offsets = {0, 2, 3, 6};
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error,
            "offsets has 4 values, expected num_features * batch + 1 with num_features = 2");
}

TEST(EmbeddingBag, HugeAttributesAreRefusedWithoutOverflow) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  BagCase c = MakeCase("huge", {{1}}, {4}, 1);
  c.attributes.row_starts = {kHuge};
  EXPECT_TRUE(RunAs<int64_t>(c, Scalar(), 1).error);
  c.attributes.row_starts = {0};
  c.attributes.rows = {kHuge};
  EXPECT_TRUE(RunAs<int64_t>(c, Scalar(), 1).error);
  c.attributes.rows = {4};
  c.attributes.num_features = kHuge;
  EXPECT_TRUE(RunAs<int64_t>(c, Scalar(), 1).error);
  c.attributes.num_features = 2;
  c.offsets.clear();
  c.attributes.pooling_factors = {kHuge, kHuge};
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error,
            "pooling factor 9223372036854775807 is out of range");
}

// Attributes and ids of any size, on every path: the same rows, all of them inside the slot.
TEST(EmbeddingBag, ComputedRowsStayInsideTheirTablePartWhateverTheAttributes) {
  std::mt19937_64 random(11);
  const auto any = [&](int64_t least, int64_t most) {  // of every magnitude
    const uint64_t value = random() >> (random() % 64);
    return least + static_cast<int64_t>(value % (static_cast<uint64_t>(most - least) + 1));
  };
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (int round = 0; round < 300; ++round) {
    const std::vector<int64_t> ones(40, 1);
    BagCase c = MakeCase("computed", {ones, ones}, {1 + any(0, 8), 1 + any(0, 8)}, 3);
    constexpr IndexPolicy kPolicies[] = {IndexPolicy::kClamp, IndexPolicy::kModulo,
                                         IndexPolicy::kZero};
    c.attributes.index_policy = kPolicies[round % 3];
    for (int t = 0; t < 2; ++t) {
      c.attributes.ids.push_back(any(1, int64_t{1} << 62));
      c.attributes.moduli.push_back(random() % 2 == 0 ? 0 : any(0, kMost));
      c.attributes.divisors.push_back(any(1, kMost));
      c.attributes.divisions.push_back(static_cast<int64_t>(random() % 3));
    }
    for (int64_t& id : c.indices) {
      id = static_cast<int64_t>(random() % 2 == 0 ? random() : random() >> (random() % 64));
    }
    const Result expected = RunAs<int64_t>(c, Scalar(), 1);
    ASSERT_FALSE(expected.error) << *expected.error;
    for (size_t i = 0; i < expected.pooled.size(); i += 3) {
      const size_t t = i / 3 % 2;
      bool inside = expected.pooled[i] == 0.0f && c.attributes.index_policy == IndexPolicy::kZero;
      for (int64_t r = 0; r < c.attributes.rows[t]; ++r) {
        const size_t row = static_cast<size_t>((c.attributes.row_starts[t] + r) * 3);
        inside |= std::memcmp(&c.weights[row], &expected.pooled[i], 3 * sizeof(float)) == 0;
      }
      ASSERT_TRUE(inside) << "round " << round << ", bag " << i / 3;
    }
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported()) continue;
      EXPECT_EQ(Bits(RunAs<int64_t>(c, path, 2).pooled), Bits(expected.pooled)) << path.name;
    }
  }
}

TEST(EmbeddingBag, SlotsOfOneFeatureReadTheDigitsOfItsIds) {
  BagCase c = MakeCase("digits", {{2, 1}}, {5}, 1);
  c.weights = {10, 20, 1, 2, 3};
  c.attributes.features = {0, 0};
  c.attributes.row_starts = {0, 2};
  c.attributes.rows = {2, 3};
  c.attributes.ids = {6, 6};
  c.attributes.divisors = {3, 1};
  c.attributes.mean = {0, 0};
  c.indices = {0, 5, 4};
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    EXPECT_EQ(RunAs<int64_t>(c, path, 1).pooled, (std::vector<float>{30, 4, 20, 2})) << path.name;
    EXPECT_EQ(RunAs<int32_t>(c, path, 1).pooled, (std::vector<float>{30, 4, 20, 2})) << path.name;
  }
  c.indices[1] = 6;
  EXPECT_NE(RunAs<int64_t>(c, Scalar(), 1).error->find("id 6 is outside [0, 6)"),
            std::string::npos);
}

// Rows beyond 2^31 elements and beyond 2^32 bytes: reserved address space of which two rows are
// real.
TEST(EmbeddingBag, RowsAreAddressedInSixtyFourBits) {
  constexpr int64_t kWidth = 64;
  constexpr int64_t kRows = (int64_t{12} << 30) / (kWidth * static_cast<int64_t>(sizeof(float)));
  constexpr size_t kBytes = static_cast<size_t>(kRows * kWidth) * sizeof(float);
  void* mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) GTEST_SKIP() << "cannot reserve 12 GiB of address space here";
  float* table = static_cast<float*>(mapped);
  const int64_t far = kRows - 1;
  static_assert(far * kWidth > (int64_t{1} << 31), "beyond 32-bit elements");
  for (int64_t d = 0; d < kWidth; ++d) {
    table[d] = 1.0f;
    table[far * kWidth + d] = static_cast<float>(d);
  }
  BagCase c = MakeCase("far", {{2}}, {1}, kWidth);
  c.attributes.rows = {kRows};
  EmbeddingBag bag;
  ASSERT_FALSE(EmbeddingBag::Create(c.attributes, &bag));
  const std::vector<int64_t> ids = {0, far};
  EmbeddingBagInputs in;
  in.matrix(RowFormat::kFp32) = {true, table, kRows};
  in.width = kWidth;
  in.indices = ids.data();
  in.num_indices = 2;
  in.has_offsets = true;
  const std::vector<int64_t> offsets = {0, 2};
  in.offsets = offsets.data();
  in.num_offsets = 2;
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    std::vector<float> pooled(kWidth);
    ASSERT_FALSE(bag.Run(in, 1, path, ThreadRunner(1), pooled.data()));
    for (int64_t d = 0; d < kWidth; ++d)
      EXPECT_EQ(pooled[static_cast<size_t>(d)], 1.0f + static_cast<float>(d));
  }
  munmap(mapped, kBytes);
}

}  // namespace
}  // namespace dlrm_deploy
