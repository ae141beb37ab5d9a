#include "trace/lru_stack.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "dlrm_deploy/trace.h"
#include "trace/rank_bits.h"

namespace dlrm_deploy {
namespace {

using Numbers = std::vector<int64_t>;

// The definition, on a list with the top at its end.
Numbers PlainDistances(const Numbers& lines) {
  Numbers stack, distances;
  for (const int64_t line : lines) {
    const auto place = std::find(stack.begin(), stack.end(), line);
    distances.push_back(place == stack.end() ? 0 : stack.end() - place);
    if (place != stack.end()) stack.erase(place);
    stack.push_back(line);
  }
  return distances;
}

Numbers Distances(const Numbers& lines, int64_t num_lines) {
  Numbers distances(lines.size(), -1);
  const int64_t count = static_cast<int64_t>(lines.size());
  EXPECT_EQ(StackDistances(lines.data(), count, num_lines, distances.data()), Error());
  return distances;
}

Numbers RandomNumbers(size_t count, int64_t limit, unsigned seed) {
  std::mt19937 random(seed);
  // Mostly small ones, as distances of real traffic are.
  std::exponential_distribution<double> draw(8.0 / static_cast<double>(limit));
  Numbers numbers(count);
  for (int64_t& n : numbers) n = std::min(static_cast<int64_t>(draw(random)), limit - 1);
  return numbers;
}

TEST(RankBits, CountsAndFindsLikeASortedList) {
  std::mt19937 random(3);
  for (const size_t size : {size_t{1}, size_t{64}, size_t{511}, size_t{512}, size_t{5000}}) {
    RankBits bits(size);
    std::vector<size_t> members;  // falling
    for (int step = 0; step < 400; ++step) {
      const size_t position = random() % size;
      const auto place =
          std::lower_bound(members.begin(), members.end(), position, std::greater<size_t>());
      if (place != members.end() && *place == position) {
        EXPECT_EQ(bits.CountAbove(position), static_cast<size_t>(place - members.begin()));
        bits.Erase(position);
        members.erase(place);
      } else {
        bits.Insert(position);
        members.insert(place, position);
      }
      ASSERT_EQ(bits.count(), members.size());
      for (size_t k = 0; k < members.size(); k += 1 + members.size() / 7) {
        ASSERT_EQ(bits.FindFromTop(k), members[k]);
      }
    }
    const size_t lowest = bits.NextMember(0);
    EXPECT_EQ(lowest, members.empty() ? size : members.back());
    EXPECT_EQ(bits.NextMember(size), size);
  }
}

TEST(RankBits, ResetFillsTheFirstPositions) {
  for (const size_t members : {0, 1, 63, 64, 512, 1000, 1500}) {
    RankBits bits(1500);
    bits.Insert(1499);
    bits.Reset(members);
    ASSERT_EQ(bits.count(), members);
    for (size_t k = 0; k < members; ++k) ASSERT_EQ(bits.FindFromTop(k), members - 1 - k);
    EXPECT_EQ(bits.NextMember(members), 1500u);
  }
}

TEST(StackDistances, AreThoseOfTheDefinition) {
  EXPECT_EQ(Distances({0, 0, 1, 2, 0, 1, 1}, 3), (Numbers{0, 1, 0, 0, 3, 3, 1}));
  for (const unsigned seed : {1, 2, 3}) {
    const Numbers lines = RandomNumbers(3000, 700, seed);
    EXPECT_EQ(Distances(lines, 700), PlainDistances(lines));
  }
}

TEST(StackDistances, RefuseALineThatIsNotThere) {
  for (const int64_t line : {-1, 2}) {
    const Numbers lines = {0, line};
    Numbers distances(2);
    const Error error = StackDistances(lines.data(), 2, 2, distances.data());
    EXPECT_EQ(error, "line " + std::to_string(line) + " at position 1 is outside [0, 2)");
  }
}

TEST(LruStack, ReplayIsTheInverseOfProfiling) {
  for (const int64_t lines : {1, 2, 700, 30000}) {
    const Numbers distances = RandomNumbers(40000, lines + 2, static_cast<unsigned>(lines));
    LruStack stack(lines, false);
    Numbers accessed(distances.size()), effective(distances.size());
    // In two calls: the trace goes on.
    ASSERT_EQ(stack.Replay(distances.data(), 1000, accessed.data(), effective.data()), Error());
    ASSERT_EQ(stack.Replay(&distances[1000], 39000, &accessed[1000], &effective[1000]), Error());
    EXPECT_EQ(Distances(accessed, lines), effective);
  }
}

TEST(LruStack, AWarmStackHoldsEveryLine) {
  LruStack stack(4, true);
  const Numbers distances = {1, 4, 4, 0, 1, 9};
  Numbers accessed(6), effective(6);
  ASSERT_EQ(stack.Replay(distances.data(), 6, accessed.data(), effective.data()), Error());
  EXPECT_EQ(accessed, (Numbers{3, 0, 1, 2, 2, 3}));
  EXPECT_EQ(effective, (Numbers{1, 4, 4, 4, 1, 4}));
}

TEST(LruStack, ANegativeDistanceLeavesTheStackAsItWas) {
  LruStack stack(3, true);
  const Numbers wrong = {3, -1}, right = {3};
  Numbers accessed(2);
  EXPECT_EQ(stack.Replay(wrong.data(), 2, accessed.data(), nullptr),
            "distance -1 at position 1 is negative");
  EXPECT_EQ(stack.Replay(right.data(), 1, accessed.data(), nullptr), Error());
  EXPECT_EQ(accessed[0], 0);
}

TEST(TraceApi, RefusesWhatCannotBe) {
  dlrm_deploy_stack* stack = nullptr;
  EXPECT_EQ(dlrm_deploy_stack_create(0, 1, &stack), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_STREQ(dlrm_deploy_last_error(), "lines is 0, expected 1 to 2147483648");
  EXPECT_EQ(dlrm_deploy_stack_create(5, 2, &stack), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(dlrm_deploy_stack_create(5, 1, nullptr), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(stack, nullptr);
  int64_t one = 1;
  EXPECT_EQ(dlrm_deploy_stack_replay(nullptr, &one, 1, &one, nullptr), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(dlrm_deploy_stack_distances(nullptr, 1, 1, &one), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(dlrm_deploy_stack_distances(&one, -1, 1, &one), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(dlrm_deploy_stack_distances(&one, 1, INT64_MAX, &one), DLRM_DEPLOY_BAD_INPUT);
  dlrm_deploy_stack_free(stack);
  ASSERT_EQ(dlrm_deploy_stack_create(2, 0, &stack), DLRM_DEPLOY_OK);
  EXPECT_EQ(dlrm_deploy_stack_replay(stack, nullptr, 1, &one, nullptr), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(dlrm_deploy_stack_replay(stack, nullptr, 0, nullptr, nullptr), DLRM_DEPLOY_OK);
  ASSERT_EQ(dlrm_deploy_stack_replay(stack, &one, 1, &one, nullptr), DLRM_DEPLOY_OK);
  EXPECT_EQ(one, 0);
  dlrm_deploy_stack_free(stack);
}

}  // namespace
}  // namespace dlrm_deploy
