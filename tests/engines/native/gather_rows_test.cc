#include "dlrm_deploy/gather_rows.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace {

constexpr double kMilliseconds = 0.2;

dlrm_deploy_status Measure(int64_t table_bytes, int64_t row_bytes,
                           const std::vector<uint32_t>& rows, int32_t threads, double* result) {
  const std::vector<unsigned char> table(static_cast<size_t>(table_bytes),
                                         1);  // ends where it says
  return dlrm_deploy_calibrate_gather_rows(table.data(), table_bytes, row_bytes, rows.data(),
                                           static_cast<int64_t>(rows.size()), threads,
                                           kMilliseconds, result);
}

TEST(GatherRows, ReadsRowsOfAnySizeUpToTheEndOfTheTable) {
  for (const int64_t row_bytes : {1, 2, 7, 8, 9, 20, 31, 32, 33, 64, 68, 130}) {
    for (const int32_t threads : {1, 3}) {
      for (const size_t count : {1u, 2u, 40u, 1700u}) {
        std::vector<uint32_t> rows(count);
        for (size_t i = 0; i < count; ++i) rows[i] = static_cast<uint32_t>(4 - i % 5);
        double result = 0.0;
        ASSERT_EQ(Measure(row_bytes * 5 + row_bytes / 2, row_bytes, rows, threads, &result),
                  DLRM_DEPLOY_OK);
        EXPECT_GT(result, 0.0);
      }
    }
  }
}

TEST(GatherRows, RefusesRowsOutsideTheTable) {
  double result = 0.0;
  EXPECT_EQ(Measure(28, 4, {6, 7}, 1, &result), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(std::string(dlrm_deploy_last_error()), "row 7 at position 1 is outside [0, 7)");
  EXPECT_EQ(Measure(27, 4, {6}, 1, &result), DLRM_DEPLOY_BAD_INPUT) << "half a row is no row";
}

TEST(GatherRows, RefusesWhatMakesNoSense) {
  double result = 0.0;
  EXPECT_EQ(Measure(28, 4, {}, 1, &result), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(Measure(28, 0, {0}, 1, &result), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(Measure(28, 29, {0}, 1, &result), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(Measure(28, 4, {0}, 0, &result), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(Measure(28, 4, {0}, 1, nullptr), DLRM_DEPLOY_BAD_INPUT);
}

}  // namespace
