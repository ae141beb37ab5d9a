#include "kernels/scratch.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>

namespace dlrm_deploy {
namespace {

TEST(Scratch, OfAnySizeLiesOnCacheLinesAndCanBeWritten) {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{100}, Scratch::kMostKept,
                             Scratch::kMostKept + 1, 3 * Scratch::kMostKept}) {
    const Scratch scratch(bytes);
    ASSERT_NE(scratch.data(), nullptr) << bytes;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(scratch.data()) % 64, 0u) << bytes;
    std::memset(scratch.data(), 1, bytes);
  }
}

TEST(Scratch, OfUsualSizeIsLentAgainAndALargerOneIsNotKept) {
  const auto place = [](size_t bytes) { return Scratch(bytes).data(); };
  const void* const kept = place(Scratch::kMostKept);
  EXPECT_EQ(place(100), kept);
  EXPECT_NE(place(Scratch::kMostKept + 1), kept);
  EXPECT_EQ(place(Scratch::kMostKept), kept);
}

}  // namespace
}  // namespace dlrm_deploy
