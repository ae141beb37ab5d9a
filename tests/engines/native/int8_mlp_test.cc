#include "kernels/int8_mlp.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "mlp_case.h"

namespace dlrm_deploy {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A chain as the operator gets it.
struct Chain {
  std::vector<int64_t> widths;
  bool relu_last;
  std::vector<std::vector<int8_t>> weights;
  std::vector<std::vector<float>> scales;
  std::vector<std::vector<float>> biases;

  int64_t inputs() const { return widths.front(); }
  int64_t outputs() const { return widths.back(); }
};

Chain RandomChain(std::vector<int64_t> widths, bool relu_last, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> code(-128, 127);
  std::uniform_real_distribution<float> scale(0.5f, 1.5f);
  std::normal_distribution<float> normal;
  Chain chain{std::move(widths), relu_last, {}, {}, {}};
  for (size_t l = 0; l + 1 < chain.widths.size(); ++l) {
    const auto inputs = static_cast<size_t>(chain.widths[l]);
    const auto outputs = static_cast<size_t>(chain.widths[l + 1]);
    std::vector<int8_t> weights(inputs * outputs);
    for (int8_t& weight : weights) weight = static_cast<int8_t>(code(random));
    std::vector<float> scales(outputs), biases(outputs);
    for (float& s : scales) s = scale(random) / (70.0f * std::sqrt(static_cast<float>(inputs)));
    for (float& b : biases) b = normal(random) * 0.1f;
    chain.weights.push_back(std::move(weights));
    chain.scales.push_back(std::move(scales));
    chain.biases.push_back(std::move(biases));
  }
  return chain;
}

// Weights end at pages that nobody may touch while they are packed.
PackedInt8Mlp Pack(const Chain& chain) {
  std::vector<GuardedBuffer<int8_t>> weights(chain.weights.begin(), chain.weights.end());
  std::vector<Int8Weights> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    layers.push_back(
        {weights[l].data(), chain.scales[l].data(), chain.biases[l].data(), chain.widths[l + 1]});
  }
  PackedInt8Mlp mlp;
  EXPECT_FALSE(PackedInt8Mlp::Create(chain.inputs(), layers, chain.relu_last, &mlp));
  return mlp;
}

// What docs/operators.md promises, one sample after the other, with sums in 64 bits.
std::vector<float> Reference(const Chain& chain, const std::vector<float>& x, int64_t batch) {
  std::vector<float> y;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<float> in(x.begin() + b * chain.inputs(), x.begin() + (b + 1) * chain.inputs());
    for (size_t l = 0; l < chain.weights.size(); ++l) {
      const bool last = l + 1 == chain.weights.size();
      float largest = 0.0f;
      bool finite = true;
      for (const float value : in) {
        finite = finite && std::isfinite(value);
        largest = std::max(largest, std::abs(value));
      }
      const float inverse = finite && largest >= 1e-30f ? 127.0f / largest : 0.0f;
      const float step = finite ? largest / 127.0f : kNan;
      std::vector<float> out;
      for (size_t n = 0; n < chain.biases[l].size(); ++n) {
        int64_t sum = 0;
        for (size_t k = 0; k < in.size() && finite; ++k) {
          sum += std::lrint(in[k] * inverse) * chain.weights[l][n * in.size() + k];
        }
        const float value = static_cast<float>(sum) * step * chain.scales[l][n];
        const float biased = value + chain.biases[l][n];
        out.push_back((!last || chain.relu_last) && biased < 0.0f ? 0.0f : biased);
      }
      in = std::move(out);
    }
    y.insert(y.end(), in.begin(), in.end());
  }
  return y;
}

void ExpectRight(const Chain& chain, const std::vector<float>& x, int64_t batch) {
  std::string name;
  for (const int64_t width : chain.widths) name += std::to_string(width) + "-";
  const PackedInt8Mlp mlp = Pack(chain);
  const std::vector<float> expected = Reference(chain, x, batch);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    ExpectSame(OutputsOf(mlp, path, x, batch), expected,
               std::string(path.name) + " on " + name + " batch " + std::to_string(batch));
  }
}

TEST(Int8Mlp, EveryPathEqualsTheReferenceOnSingleLayersOfAwkwardWidths) {
  unsigned seed = 1;
  for (const int64_t inputs : {1, 2, 15, 31, 63, 64, 65, 130}) {
    for (const int64_t outputs : {1, 2, 15, 16, 17, 33, 48, 65}) {
      for (const int64_t batch : {1, 3, 16, 17, 33}) {
        ++seed;
        const Chain chain = RandomChain({inputs, outputs}, seed % 2 == 0, seed);
        ExpectRight(chain, RandomInputs(batch * inputs, seed), batch);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Int8Mlp, EveryPathEqualsTheReferenceOnChains) {
  const std::vector<std::vector<int64_t>> all_widths = {
      {13, 37, 24, 16}, {13, 64, 32, 7},     {67, 50, 33, 1},
      {1, 1, 1},        {40, 17, 96, 3, 48}, {300, 70, 1},
  };
  for (const std::vector<int64_t>& widths : all_widths) {
    for (int64_t batch = 1; batch <= 70; batch += batch < 4 ? 1 : 7) {
      const Chain chain = RandomChain(widths, batch % 2 == 0, static_cast<unsigned>(batch));
      ExpectRight(chain, RandomInputs(batch * widths[0], 5), batch);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Int8Mlp, SumsDoNotOverflowOnTheLongestLayer) {
  constexpr int64_t kMost = 131072;
  Chain chain = RandomChain({kMost, 2}, false, 3);
  std::fill(chain.weights[0].begin(), chain.weights[0].begin() + kMost, int8_t{-128});
  std::fill(chain.weights[0].begin() + kMost, chain.weights[0].end(), int8_t{127});
  chain.scales[0] = {1.0f, 1.0f};
  chain.biases[0] = {0.0f, 0.0f};
  const std::vector<float> x(kMost, 127.0f);
  ASSERT_EQ(Reference(chain, x, 1)[0], -128.0f * 127.0f * 131072.0f);
  ExpectRight(chain, x, 1);
  PackedInt8Mlp mlp;
  const int8_t weight = 0;
  const float one = 1.0f;
  const Error error = PackedInt8Mlp::Create(kMost + 1, {{&weight, &one, &one, 1}}, true, &mlp);
  ASSERT_TRUE(error);
  EXPECT_NE(error->find("layer 0 has 131073 inputs"), std::string::npos) << *error;
}

TEST(Int8Mlp, ValuesThatLieBetweenTwoCodesGoToTheEvenOne) {
  Chain chain = RandomChain({5, 1}, false, 1);
  chain.weights[0] = {1, 0, 0, 0, 0};
  chain.scales[0] = {1.0f};
  chain.biases[0] = {0.0f};
  const std::vector<float> halves = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f};
  const std::vector<float> codes = {0, 2, 2, 0, -2, -2};
  std::vector<float> x;
  for (const float half : halves) x.insert(x.end(), {half, 127.0f, 0, 0, 0});
  ExpectRight(chain, x, 6);
  const PackedInt8Mlp mlp = Pack(chain);
  ExpectSame(OutputsOf(mlp, AllKernelPaths().back(), x, 6), codes, "scalar");
}

TEST(Int8Mlp, EmptyBatchesWriteNothing) {
  const PackedInt8Mlp mlp = Pack(RandomChain({5, 6}, true, 1));
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    EXPECT_FALSE(mlp.Run(path, nullptr, 0, ThreadRunner(2), nullptr)) << path.name;
  }
}

TEST(Int8Mlp, ASampleIsTheSameInEveryBatchAndWithAnyNumberOfThreads) {
  const std::vector<std::vector<int64_t>> all_widths = {{29, 70, 33, 5}, {100, 1000, 1100, 3}};
  for (const std::vector<int64_t>& widths : all_widths) {  // the second is split by columns
    const Chain chain = RandomChain(widths, false, 9);
    const PackedInt8Mlp mlp = Pack(chain);
    const int64_t batch = 100;
    const std::vector<float> x = RandomInputs(batch * widths[0], 4);
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported() || (widths[1] > 100 && std::string(path.name) == "scalar")) continue;
      const std::vector<float> all = OutputsOf(mlp, path, x, batch);
      ExpectSame(OutputsOf(mlp, path, x, batch, 3), all, path.name);
      for (const int64_t part : {1, 2, 15, 17, 33, 64, 65}) {
        const std::vector<float> some = OutputsOf(
            mlp, path, std::vector<float>(x.begin(), x.begin() + part * widths[0]), part, 2);
        ExpectSame(some, std::vector<float>(all.begin(), all.begin() + part * widths.back()),
                   std::string(path.name) + " in a batch of " + std::to_string(part));
      }
    }
  }
}

TEST(Int8Mlp, ANanOrAnInfinityMakesItsSampleNanAndNoOther) {
  Chain chain = RandomChain({19, 37, 21, 5}, true, 7);
  std::vector<float> x = RandomInputs(40 * 19, 3);
  const std::vector<int64_t> bad = {2, 5, 17, 33, 39};
  x[2 * 19 + 4] = kNan;
  x[5 * 19 + 18] = kInf;
  x[17 * 19] = -kInf;
  x[33 * 19 + 7] = -kNan;
  x[39 * 19 + 18] = kNan;
  ExpectRight(chain, x, 40);
  const std::vector<float> y = OutputsOf(Pack(chain), AllKernelPaths().back(), x, 40);
  for (int64_t i = 0; i < 40 * 5; ++i) {
    const bool is_bad = std::find(bad.begin(), bad.end(), i / 5) != bad.end();
    EXPECT_EQ(std::isnan(y[static_cast<size_t>(i)]), is_bad) << i;
  }
  chain.biases[0][3] = kInf;  // behind the first layer every sample has an infinity
  ExpectRight(chain, x, 40);
}

TEST(Int8Mlp, SamplesOfZerosTinyAndHugeValuesFollowTheReference) {
  const Chain chain = RandomChain({20, 18, 3}, false, 11);
  std::vector<float> x(7 * 20, 0.0f);  // the first sample is all zeros
  for (size_t k = 0; k < 20; ++k) {
    x[1 * 20 + k] = 1e-38f;  // below what codes are made of
    x[2 * 20 + k] = -1e-30f * static_cast<float>(k);
    x[3 * 20 + k] = 1e-45f;
    x[4 * 20 + k] = 3.4e38f * (k % 2 == 0 ? 1.0f : -1.0f);
    x[5 * 20 + k] = k == 7 ? 1e20f : 1.0f;  // one value takes the codes of all others
    x[6 * 20 + k] = -0.0f;
  }
  ExpectRight(chain, x, 7);
}

TEST(Int8Mlp, CodesBeginWhereTheLargestValueIsTenToTheMinusThirty) {
  Chain chain = RandomChain({3, 1}, false, 1);
  chain.weights[0] = {100, 50, 0};
  chain.scales[0] = {1e30f};
  chain.biases[0] = {0.0f};
  const std::vector<float> x = {1e-30f, 0, 0, std::nextafterf(1e-30f, 0.0f), 0, 0, 1e-33f, 0, 0};
  ExpectRight(chain, x, 3);
  const std::vector<float> y = OutputsOf(Pack(chain), AllKernelPaths().back(), x, 3);
  EXPECT_NEAR(y[0], 100.0f, 1e-3f);
  EXPECT_EQ(y[1], 0.0f);
  EXPECT_EQ(y[2], 0.0f);
}

TEST(Int8Mlp, LargeChainsEqualTheReferenceSplitByColumnsOrByRows) {
  const Chain chain = RandomChain({100, 1000, 1100, 3}, false, 9);
  const PackedInt8Mlp mlp = Pack(chain);
  for (const int64_t batch : {3, 65, 140}) {
    const std::vector<float> x = RandomInputs(batch * 100, 4);
    const std::vector<float> expected = Reference(chain, x, batch);
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported() || (batch > 65 && std::string(path.name) == "scalar")) continue;
      ExpectSame(OutputsOf(mlp, path, x, batch, 3), expected, path.name);
    }
  }
}

// Counts the blocks of each call, and runs them.
class CountingRunner : public BlockRunner {
 public:
  mutable std::vector<size_t> calls;

 protected:
  void Run(size_t blocks, RunBlock run, void* context) const override {
    calls.push_back(blocks);
    for (size_t block = 0; block < blocks; ++block) run(context, block);
  }
};

TEST(Int8Mlp, EveryBatchOfALargeChainIsSeveralBlocks) {
  const Chain chain = RandomChain({100, 1024, 1024, 1}, false, 2);
  const PackedInt8Mlp mlp = Pack(chain);
  std::vector<float> y(600);
  for (const int64_t batch : {1, 33, 64, 65, 96, 128, 129, 200, 256, 257, 600}) {
    const CountingRunner runner;
    const std::vector<float> x = RandomInputs(batch * 100, 1);
    ASSERT_FALSE(mlp.Run(
        AllKernelPaths().front().supported() ? AllKernelPaths().front() : AllKernelPaths().back(),
        x.data(), batch, runner, y.data()));
    ASSERT_FALSE(runner.calls.empty()) << batch;
    for (const size_t blocks : runner.calls) EXPECT_GE(blocks, 3u) << batch;
  }
}

TEST(Int8Mlp, SizesThatMakeNoLayerAreRefused) {
  PackedInt8Mlp mlp;
  const int8_t weight = 0;
  const float one = 1.0f;
  EXPECT_TRUE(PackedInt8Mlp::Create(1, {}, true, &mlp));
  EXPECT_TRUE(PackedInt8Mlp::Create(0, {{&weight, &one, &one, 1}}, true, &mlp));
  EXPECT_TRUE(PackedInt8Mlp::Create(1, {{&weight, &one, &one, 0}}, true, &mlp));
  EXPECT_TRUE(PackedInt8Mlp::Create(-3, {{&weight, &one, &one, 1}}, true, &mlp));
  EXPECT_TRUE(PackedInt8Mlp::Create(1, {{&weight, &one, &one, int64_t{1} << 40}}, true, &mlp));
}

}  // namespace
}  // namespace dlrm_deploy
