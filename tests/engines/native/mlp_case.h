// mlp_case.h: what the tests of both MLPs share.
#ifndef DLRM_DEPLOY_TESTS_MLP_CASE_H_
#define DLRM_DEPLOY_TESTS_MLP_CASE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "c_api/thread_runner.h"
#include "guarded_buffer.h"
#include "kernels/dispatch.h"

namespace dlrm_deploy {

inline uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline std::vector<float> RandomInputs(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// x and y end at pages that nobody may touch.
template <class Mlp>
std::vector<float> OutputsOf(const Mlp& mlp, const KernelPath& path, const std::vector<float>& x,
                             int64_t batch, int threads = 1) {
  GuardedBuffer<float> in(x);
  const auto size = static_cast<size_t>(batch * mlp.outputs());
  GuardedBuffer<float> out(std::vector<float>(size, -7.0f));
  EXPECT_FALSE(mlp.Run(path, in.data(), batch, ThreadRunner(threads), out.data()));
  return std::vector<float>(out.data(), out.data() + size);
}

// Equal in every bit but the payload of NaN.
inline void ExpectSame(const std::vector<float>& seen, const std::vector<float>& expected,
                       const std::string& what) {
  ASSERT_EQ(seen.size(), expected.size()) << what;
  for (size_t i = 0; i < seen.size(); ++i) {
    if (std::isnan(expected[i])) {
      ASSERT_TRUE(std::isnan(seen[i])) << what << " at " << i << ": " << seen[i];
    } else {
      ASSERT_EQ(Bits(seen[i]), Bits(expected[i]))
          << what << " at " << i << ": " << seen[i] << " instead of " << expected[i];
    }
  }
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_TESTS_MLP_CASE_H_
