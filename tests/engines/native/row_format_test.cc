// Every path on every row format against the plain reference, bit for bit, with the tables between
// pages that may not be touched.
#include "kernels/row_format.h"

#include <gtest/gtest.h>

#include <vector>

#include "stored_rows.h"

namespace dlrm_deploy {
namespace {

constexpr RowFormat kFormats[] = {RowFormat::kFp32, RowFormat::kFp16, RowFormat::kBf16,
                                  RowFormat::kInt8, RowFormat::kInt4};

void ExpectTheReference(const BagCase& c) { ExpectOnAllPaths(c, PlainPooled(c)); }

// Lengths of bags that are empty, one id, longer than a chunk; ids that repeat in one-row tables.
const std::vector<std::vector<int64_t>> kAwkward = {{0, 3, 300, 1, 0}, {1, 0, 2, 257, 1}};

TEST(RowFormat, RowsHaveTheSizesOfTheContract) {
  const int64_t sizes[][2] = {{28, 64}, {14, 32}, {14, 32}, {11, 20}, {8, 12}};
  for (const RowFormat format : kFormats) {
    EXPECT_EQ(RowBytes(format, 7), sizes[static_cast<int>(format)][0]);
    EXPECT_EQ(RowBytes(format, 16), sizes[static_cast<int>(format)][1]);
  }
}

TEST(RowFormat, EveryHalfAndBfloatHasItsValue) {
  for (const RowFormat format : {RowFormat::kFp16, RowFormat::kBf16}) {
    BagCase c = MakeCase("all", {std::vector<int64_t>(65536, 1)}, {65536}, 1);
    c = Stored(c, {format});
    std::vector<uint8_t>& bytes = c.stored[static_cast<size_t>(format)].bytes;
    for (size_t i = 0; i < 65536; ++i) {
      c.indices[i] = static_cast<int64_t>(i);
      bytes[2 * i] = static_cast<uint8_t>(i);
      bytes[2 * i + 1] = static_cast<uint8_t>(i >> 8);
    }
    ExpectTheReference(c);
  }
}

TEST(RowFormat, EveryCodeOfEveryScaleAndBiasHasItsValue) {
  // A row a scale, whose bias is another number; all 256 or 16 codes in each.
  for (const RowFormat format : {RowFormat::kInt8, RowFormat::kInt4}) {
    const int64_t codes = format == RowFormat::kInt8 ? 256 : 16;
    BagCase c = MakeCase("codes", {std::vector<int64_t>(4096, 1)}, {4096}, codes);
    c = Stored(c, {format});
    std::vector<uint8_t>& bytes = c.stored[static_cast<size_t>(format)].bytes;
    const size_t row_bytes = static_cast<size_t>(RowBytes(format, codes));
    for (size_t r = 0; r < 4096; ++r) {
      c.indices[r] = static_cast<int64_t>(r);
      uint8_t* row = bytes.data() + r * row_bytes;
      for (size_t d = 0; d + 4 < row_bytes; ++d) {
        row[d] = static_cast<uint8_t>(format == RowFormat::kInt8 ? d : 2 * d + (2 * d + 1) * 16);
      }
      const unsigned scale = static_cast<unsigned>(r) * 16 + 5;
      const unsigned bias = static_cast<unsigned>(r) * 40503u;
      row[row_bytes - 4] = static_cast<uint8_t>(scale);
      row[row_bytes - 3] = static_cast<uint8_t>(scale >> 8);
      row[row_bytes - 2] = static_cast<uint8_t>(bias);
      row[row_bytes - 1] = static_cast<uint8_t>(bias >> 8);
    }
    EXPECT_EQ(Bits(RunAs<int64_t>(c, Scalar(), 1).pooled), Bits(PlainPooled(c)));
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported()) continue;
      EXPECT_EQ(Bits(RunAs<int64_t>(c, path, 1).pooled), Bits(PlainPooled(c))) << path.name;
    }
  }
}

TEST(RowFormat, EveryWidthIsExactAndReadsNothingOutsideTheTable) {
  const std::vector<std::vector<int64_t>> one_hot(2, std::vector<int64_t>(9, 1));
  for (int64_t width = 1; width <= 130; ++width) {
    for (const RowFormat format : kFormats) {
      for (const Guard guard : {Guard::kBehind, Guard::kBefore}) {
        // Tables of two rows and of one: first and last rows are read everywhere.
        for (const auto& lengths :
             {std::vector<std::vector<int64_t>>{{0, 3, 7}, {1, 2, 4}}, one_hot}) {
          BagCase c = Stored(MakeCase("width", lengths, {2, 1}, width), {format, format});
          c.guard = guard;
          const std::vector<uint32_t> expected = Bits(PlainPooled(c));
          for (const KernelPath& path : AllKernelPaths()) {
            if (!path.supported()) continue;
            EXPECT_EQ(Bits(RunAs<int64_t>(c, path, 1).pooled), expected)
                << path.name << " on " << c.name;
          }
        }
      }
    }
  }
}

TEST(RowFormat, AwkwardBagsAreExactInEveryFormat) {
  for (const RowFormat format : kFormats) {
    for (const int64_t width : {1, 7, 16, 64, 100}) {
      for (const bool weighted : {false, true}) {
        const auto stored = [&](const std::vector<std::vector<int64_t>>& lengths, bool mean) {
          return Stored(MakeCase("bags", lengths, {6, 1}, width, weighted, mean), {format, format});
        };
        ExpectTheReference(stored(kAwkward, false));
        ExpectTheReference(stored({{}, {}}, false));
        ExpectTheReference(stored({{0}, {0}}, false));
        if (!weighted) ExpectTheReference(stored(kAwkward, true));
      }
    }
  }
}

TEST(RowFormat, ABagOfAHundredThousandIdsIsExactInEveryFormat) {
  for (const RowFormat format : kFormats) {
    ExpectTheReference(Stored(MakeCase("long", {{0, 100000}}, {2}, 17, true), {format}));
  }
}

TEST(RowFormat, SlotsOfDifferentFormatsMixInAnyOrder) {
  const std::vector<std::vector<int64_t>> one_hot(10, std::vector<int64_t>(300, 1));
  std::vector<std::vector<int64_t>> ragged;
  for (int64_t t = 0; t < 10; ++t) ragged.push_back({t, 0, 40 * t, 1});
  const std::vector<RowFormat> order = {
      RowFormat::kInt4, RowFormat::kFp32, RowFormat::kFp32, RowFormat::kInt8, RowFormat::kFp16,
      RowFormat::kInt8, RowFormat::kInt4, RowFormat::kBf16, RowFormat::kBf16, RowFormat::kFp32};
  for (const int64_t width : {3, 16, 64}) {
    for (const bool weighted : {false, true}) {
      const std::vector<int64_t> rows = {9, 8, 7, 6, 5, 4, 3, 2, 1, 10};
      ExpectTheReference(Stored(MakeCase("mixed", one_hot, rows, width, weighted), order));
      ExpectTheReference(Stored(MakeCase("mixed", ragged, rows, width, weighted), order));
    }
  }
}

TEST(RowFormat, ConstantRowsAreTheirBias) {
  for (const RowFormat format : {RowFormat::kInt8, RowFormat::kInt4}) {
    BagCase c = Stored(MakeCase("constant", {{1}}, {1}, 5), {format});
    std::vector<uint8_t>& row = c.stored[static_cast<size_t>(format)].bytes;
    row.assign(row.size(), 0);
    row[row.size() - 3] = 0x3c;  // scale 1
    row[row.size() - 1] = 0xc0;  // bias -2
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported()) continue;
      EXPECT_EQ(RunAs<int64_t>(c, path, 1).pooled, std::vector<float>(5, -2.0f)) << path.name;
    }
  }
}

TEST(RowFormat, IdsOutOfRangeStayInsideTheirMatrix) {
  for (const IndexPolicy policy : {IndexPolicy::kClamp, IndexPolicy::kModulo, IndexPolicy::kZero}) {
    for (const RowFormat format : kFormats) {
      BagCase c = Stored(MakeCase("policy", {{3, 1, 1}}, {4}, 9), {format});
      c.attributes.index_policy = policy;
      c.indices = {-1, 2, 4, std::numeric_limits<int64_t>::max(), -9};
      const std::vector<float> pooled = RunAs<int64_t>(c, Scalar(), 1).pooled;
      for (const KernelPath& path : AllKernelPaths()) {
        if (!path.supported()) continue;
        EXPECT_EQ(Bits(RunAs<int64_t>(c, path, 2).pooled), Bits(pooled)) << path.name;
      }
      if (policy != IndexPolicy::kZero) continue;
      for (int64_t d = 0; d < 9; ++d) EXPECT_EQ(pooled[static_cast<size_t>(9 + d)], 0.0f);
    }
  }
}

TEST(RowFormat, AMatrixThatASlotNeedsMustBeThereAndLongEnough) {
  BagCase c =
      Stored(MakeCase("missing", {{1}, {1}}, {4, 5}, 8), {RowFormat::kInt8, RowFormat::kInt4});
  c.attributes.feature_names = "user\nitem";
  c.stored[3].rows = 3;
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error,
            "slot 0 (feature 'user') reads rows [0, 4), but weights_int8 has 3 rows");
  c.stored[3].rows = 0;
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error,
            "slot 0 (feature 'user') reads rows [0, 4), but weights_int8 is missing");
}

TEST(RowFormat, AttributesThatNameNoFormatOrNoWidthAreRefused) {
  BagCase c = Stored(MakeCase("attributes", {{1}}, {4}, 8), {RowFormat::kInt8});
  c.attributes.formats = {5};
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error,
            "attribute formats of slot 0 is 5, expected 0 to 4");
  c.attributes.formats = {3, 3};
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error,
            "attribute formats has 2 values, expected one per slot: 1");
  c.attributes.formats = {3};
  c.attributes.width = 9;
  EXPECT_EQ(*RunAs<int64_t>(c, Scalar(), 1).error,
            "the rows have width 8, expected that of attribute width, 9");
  for (const int64_t width : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::max()}) {
    c.attributes.width = width;
    c.width = width;
    EmbeddingBag bag;
    EXPECT_TRUE(EmbeddingBag::Create(c.attributes, &bag)) << width;
  }
}

}  // namespace
}  // namespace dlrm_deploy
