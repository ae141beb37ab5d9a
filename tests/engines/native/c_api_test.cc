#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "c_api/thread_runner.h"
#include "dlrm_deploy/ops.h"

namespace {

dlrm_deploy_embedding_bag OneBag(std::vector<float>& pooled) {
  static const float weights[] = {1, 2, 3, 4};
  static const int64_t indices[] = {1}, offsets[] = {0, 1}, zero[] = {0}, two[] = {2};
  dlrm_deploy_embedding_bag bag = {};
  bag.struct_size = sizeof bag;
  bag.id_bytes = 8;
  bag.weights = weights;
  bag.total_rows = 2;
  bag.width = 2;
  bag.indices = indices;
  bag.num_indices = 1;
  bag.offsets = offsets;
  bag.num_offsets = 2;
  bag.num_features = 1;
  bag.num_slots = 1;
  bag.features = zero;
  bag.row_starts = zero;
  bag.rows = two;
  bag.mean = zero;
  bag.pooled = pooled.data();
  bag.pooled_floats = static_cast<int64_t>(pooled.size());
  return bag;
}

TEST(CApi, PoolsOneBag) {
  std::vector<float> pooled(2);
  const dlrm_deploy_embedding_bag bag = OneBag(pooled);
  ASSERT_EQ(dlrm_deploy_run_embedding_bag(&bag, nullptr, 1), DLRM_DEPLOY_OK)
      << dlrm_deploy_last_error();
  EXPECT_EQ(pooled, (std::vector<float>{3, 4}));
}

TEST(CApi, ACallerOfTheFirstVersionHasNoAttributesThatCameLater) {
  static const int64_t four[] = {4}, two[] = {2}, garbage[] = {-1};
  std::vector<float> pooled(2);
  dlrm_deploy_embedding_bag bag = OneBag(pooled);
  bag.ids = four;
  bag.divisors = two;
  static const int64_t last[] = {3};
  bag.indices = last;
  ASSERT_EQ(dlrm_deploy_run_embedding_bag(&bag, nullptr, 1), DLRM_DEPLOY_OK)
      << dlrm_deploy_last_error();
  EXPECT_EQ(pooled, (std::vector<float>{3, 4}));
  bag = OneBag(pooled);
  bag.struct_size = offsetof(dlrm_deploy_embedding_bag, ids);
  bag.ids = bag.moduli = bag.divisors = bag.divisions = garbage;
  ASSERT_EQ(dlrm_deploy_run_embedding_bag(&bag, nullptr, 1), DLRM_DEPLOY_OK)
      << dlrm_deploy_last_error();
  bag.struct_size -= 1;
  EXPECT_EQ(dlrm_deploy_run_embedding_bag(&bag, nullptr, 1), DLRM_DEPLOY_BAD_INPUT);
}

TEST(CApi, EachWrongArgumentIsItsOwnError) {
  std::vector<float> pooled(2);
  const auto message = [&](auto change) {
    dlrm_deploy_embedding_bag bag = OneBag(pooled);
    change(bag);
    EXPECT_EQ(dlrm_deploy_run_embedding_bag(&bag, nullptr, 1), DLRM_DEPLOY_BAD_INPUT);
    return std::string(dlrm_deploy_last_error());
  };
  using Bag = dlrm_deploy_embedding_bag;
  EXPECT_NE(message([](Bag& b) { b.struct_size = 8; }).find("struct_size"), std::string::npos);
  EXPECT_EQ(message([](Bag& b) { b.id_bytes = 2; }), "id_bytes is 2, expected 4 or 8");
  EXPECT_NE(message([](Bag& b) { b.total_rows = INT64_MAX; }).find("too large"), std::string::npos);
  EXPECT_NE(message([](Bag& b) { b.num_indices = -1; }).find("negative"), std::string::npos);
  EXPECT_EQ(message([](Bag& b) { b.weights = nullptr; }), "weights, indices or pooled is NULL");
  EXPECT_EQ(message([](Bag& b) { b.pooled_floats = 1; }),
            "pooled holds 1 floats, expected at least 1 x 1 x 2");
  EXPECT_NE(message([](Bag& b) { b.features = nullptr; }).find("features"), std::string::npos);
  const Bag bag = OneBag(pooled);
  EXPECT_EQ(dlrm_deploy_run_embedding_bag(&bag, "mmx", 1), DLRM_DEPLOY_NO_PATH);
  EXPECT_EQ(dlrm_deploy_run_embedding_bag(&bag, nullptr, 0), DLRM_DEPLOY_BAD_INPUT);
  EXPECT_EQ(dlrm_deploy_run_embedding_bag(nullptr, nullptr, 1), DLRM_DEPLOY_BAD_INPUT);
}

TEST(CApi, TheInteractionChecksItsSizes) {
  const std::vector<float> dense = {1, 2}, embeddings = {3, 4};
  std::vector<float> out(3);
  dlrm_deploy_dot_interaction c = {};
  c.struct_size = sizeof c;
  c.dense = dense.data();
  c.embeddings = embeddings.data();
  c.batch = 1;
  c.num_slots = 1;
  c.width = 2;
  c.interactions = out.data();
  c.interactions_floats = 3;
  ASSERT_EQ(dlrm_deploy_run_dot_interaction(&c, nullptr, 1), DLRM_DEPLOY_OK)
      << dlrm_deploy_last_error();
  EXPECT_EQ(out, (std::vector<float>{1, 2, 11}));
  c.interactions_floats = 2;
  EXPECT_EQ(dlrm_deploy_run_dot_interaction(&c, nullptr, 1), DLRM_DEPLOY_BAD_INPUT);
  c.interactions_floats = 3;
  c.batch = INT64_MAX;
  EXPECT_EQ(dlrm_deploy_run_dot_interaction(&c, nullptr, 1), DLRM_DEPLOY_BAD_INPUT);
}

TEST(CApi, CalibrationMeasuresSomethingOnOneAndTwoThreads) {
  for (const int threads : {1, 2}) {
    double rate = 0;
    ASSERT_EQ(dlrm_deploy_calibrate_fma(threads, 2, &rate), DLRM_DEPLOY_OK);
    EXPECT_GT(rate, 0);
    ASSERT_EQ(dlrm_deploy_calibrate_read(1 << 22, threads, 2, &rate), DLRM_DEPLOY_OK);
    EXPECT_GT(rate, 0);
    ASSERT_EQ(dlrm_deploy_calibrate_gather(20, 1 << 22, threads, 2, &rate), DLRM_DEPLOY_OK);
    EXPECT_GT(rate, 0);
  }
  EXPECT_EQ(dlrm_deploy_calibrate_gather(6, 1 << 22, 1, 2, nullptr), DLRM_DEPLOY_BAD_INPUT);
}

TEST(ThreadRunner, RunsEachBlockOnceForManyCallersAndThreadCounts) {
  const auto caller = [] {
    for (const int threads : {1, 2, 4, 2, 3}) {
      std::vector<std::atomic<int>> runs(100);
      auto body = [&](size_t block) { runs[block].fetch_add(1); };
      dlrm_deploy::ThreadRunner(threads).ForEachBlock(runs.size(), body);
      for (const auto& count : runs) ASSERT_EQ(count.load(), 1);
    }
  };
  std::thread other(caller);
  caller();
  other.join();
}

TEST(ThreadRunner, AForkedChildRunsOnThreadsOfItsOwn) {
  const auto run = [] {
    std::atomic<int> runs{0};
    auto body = [&](size_t) { runs.fetch_add(1); };
    dlrm_deploy::ThreadRunner(2).ForEachBlock(100, body);
    return runs.load();
  };
  ASSERT_EQ(run(), 100);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // a child that waits for threads it does not have ends here
    _exit(run() == 100 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
