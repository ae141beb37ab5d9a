#include "kernels/mlp.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

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

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest bf16, ties to even, found by comparing distances. Infinite where it rounds to 2^128.
float ToBf16(float value) {
  if (!std::isfinite(value)) return value;
  const float down = FromBits(Bits(value) & 0xffff0000u);
  const double up = std::abs(down) >= FromBits(0x7f7f0000u)
                        ? std::copysign(std::ldexp(1.0, 128), value)
                        : FromBits((Bits(value) & 0xffff0000u) + 0x10000u);
  const double to_down = std::abs(double{value} - down), to_up = std::abs(up - value);
  const bool down_is_even = (Bits(down) >> 16) % 2 == 0;
  return to_down < to_up || (to_down == to_up && down_is_even) ? down : static_cast<float>(up);
}

// A chain with weights as the operator gets them.
struct Chain {
  std::vector<int64_t> widths;
  bool relu_last;
  std::vector<std::vector<float>> weights;  // values of bf16
  std::vector<std::vector<float>> biases;

  int64_t inputs() const { return widths.front(); }
  int64_t outputs() const { return widths.back(); }
};

Chain RandomChain(std::vector<int64_t> widths, bool relu_last, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Chain chain{std::move(widths), relu_last, {}, {}};
  for (size_t l = 0; l + 1 < chain.widths.size(); ++l) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(chain.widths[l]));
    std::vector<float> weights(static_cast<size_t>(chain.widths[l] * chain.widths[l + 1]));
    for (float& weight : weights) weight = ToBf16(normal(random) * scale);
    std::vector<float> bias(static_cast<size_t>(chain.widths[l + 1]));
    for (float& b : bias) b = normal(random) * 0.1f;
    chain.weights.push_back(std::move(weights));
    chain.biases.push_back(std::move(bias));
  }
  return chain;
}

PackedMlp Pack(const Chain& chain) {
  std::vector<std::vector<uint16_t>> bits;
  std::vector<MlpWeights> layers;
  for (const std::vector<float>& weights : chain.weights) {
    std::vector<uint16_t> layer;
    for (const float weight : weights) layer.push_back(static_cast<uint16_t>(Bits(weight) >> 16));
    bits.push_back(std::move(layer));
  }
  for (size_t l = 0; l < bits.size(); ++l) {
    layers.push_back({bits[l].data(), chain.biases[l].data(), chain.widths[l + 1]});
  }
  PackedMlp mlp;
  EXPECT_FALSE(PackedMlp::Create(chain.inputs(), layers, chain.relu_last, &mlp));
  return mlp;
}

// What docs/operators.md promises, one sample after the other.
std::vector<float> Reference(const Chain& chain, const std::vector<float>& x, int64_t batch) {
  std::vector<float> y;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<float> in(x.begin() + b * chain.inputs(), x.begin() + (b + 1) * chain.inputs());
    for (size_t l = 0; l < chain.weights.size(); ++l) {
      const bool last = l + 1 == chain.weights.size();
      std::vector<float> out;
      for (size_t n = 0; n < chain.biases[l].size(); ++n) {
        float sum = 0.0f;
        for (size_t k = 0; k < in.size(); ++k) {
          sum = std::fma(ToBf16(in[k]), chain.weights[l][n * in.size() + k], sum);
        }
        sum += chain.biases[l][n];
        if ((!last || chain.relu_last) && sum < 0.0f) sum = 0.0f;
        out.push_back(sum);
      }
      in = std::move(out);
    }
    y.insert(y.end(), in.begin(), in.end());
  }
  return y;
}

bool KeepsOrder(const KernelPath& path) { return std::string(path.name) != "amx"; }

// Holds y, one sample of a path that adds in any order, against double precision. A sum of K
// products and a bias is off by at most (K + 2) 2^-23 of the sum of magnitudes (twice the bound for
// rounding to nearest, since AMX does not say how it rounds inside), and by 2^-126 for each number
// that AMX takes for zero because it is subnormal. An activation lies between the bf16 of both
// ends.
void ExpectWithinBound(const Chain& chain, const float* x, const float* y,
                       const std::string& what) {
  const double kTiny = std::ldexp(1.0, -126);
  std::vector<double> value(x, x + chain.inputs()), error(value.size(), 0.0);
  for (double& v : value) v = ToBf16(static_cast<float>(v));
  for (size_t l = 0; l < chain.weights.size(); ++l) {
    const bool last = l + 1 == chain.weights.size();
    std::vector<double> next, next_error;
    for (size_t n = 0; n < chain.biases[l].size(); ++n) {
      double sum = chain.biases[l][n], spread = 0.0, magnitude = std::abs(sum), flushed = 2 * kTiny;
      for (size_t k = 0; k < value.size(); ++k) {
        const double weight = chain.weights[l][n * value.size() + k];
        sum += weight * value[k];
        spread += std::abs(weight) * error[k];
        magnitude += std::abs(weight) * (std::abs(value[k]) + error[k]);
        flushed += kTiny * (2 + std::abs(weight) + std::abs(value[k]) + error[k]);
      }
      const double off = spread + flushed +
                         static_cast<double>(value.size() + 2) * std::ldexp(1.0, -23) * magnitude;
      const auto finish = [&](double s) {
        if ((!last || chain.relu_last) && s < 0.0) s = 0.0;
        return last ? s : double{ToBf16(static_cast<float>(s))};
      };
      const double middle = finish(sum);
      next.push_back(middle);
      next_error.push_back(last ? off
                                : std::max(finish(sum + off) - middle, middle - finish(sum - off)));
    }
    value = std::move(next);
    error = std::move(next_error);
  }
  for (size_t n = 0; n < value.size(); ++n) {
    ASSERT_NEAR(y[n], value[n], error[n]) << what << " output " << n;
  }
}

void ExpectRight(const Chain& chain, const std::vector<float>& x, int64_t batch,
                 const std::string& name) {
  const PackedMlp mlp = Pack(chain);
  const std::vector<float> expected = Reference(chain, x, batch);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    const std::string what = std::string(path.name) + " on " + name;
    const std::vector<float> seen = OutputsOf(mlp, path, x, batch);
    if (KeepsOrder(path)) {
      ExpectSame(seen, expected, what);
    } else {
      ASSERT_EQ(seen.size(), expected.size());
      for (int64_t b = 0; b < batch; ++b) {
        ExpectWithinBound(chain, x.data() + b * chain.inputs(), seen.data() + b * chain.outputs(),
                          what + " sample " + std::to_string(b));
      }
    }
  }
}

std::string Name(const Chain& chain, int64_t batch) {
  std::string name;
  for (const int64_t width : chain.widths) name += std::to_string(width) + "-";
  return name + " batch " + std::to_string(batch);
}

TEST(Mlp, EveryPathEqualsTheReferenceOnSingleLayersOfAwkwardWidths) {
  unsigned seed = 1;
  for (const int64_t inputs : {1, 2, 15, 31, 32, 33, 65, 130}) {
    for (const int64_t outputs : {1, 2, 15, 16, 17, 33, 48, 65}) {
      for (const int64_t batch : {1, 3, 16, 17, 33}) {
        ++seed;
        const Chain chain = RandomChain({inputs, outputs}, seed % 2 == 0, seed);
        ExpectRight(chain, RandomInputs(batch * inputs, seed), batch, Name(chain, batch));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Mlp, EveryPathEqualsTheReferenceOnChains) {
  const std::vector<std::vector<int64_t>> all_widths = {
      {13, 37, 24, 16}, {13, 64, 32, 7},     {67, 50, 33, 1},
      {1, 1, 1},        {40, 17, 96, 3, 48}, {300, 70, 1},
  };
  for (const std::vector<int64_t>& widths : all_widths) {
    for (int64_t batch = 1; batch <= 70; batch += batch < 4 ? 1 : 7) {
      const Chain chain = RandomChain(widths, batch % 2 == 0, static_cast<unsigned>(batch));
      ExpectRight(chain, RandomInputs(batch * widths[0], 5), batch, Name(chain, batch));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Mlp, EveryPathEqualsTheReferenceOnLongSums) {
  const Chain chain = RandomChain({1100, 40, 5}, true, 3);
  for (const int64_t batch : {1, 47}) {
    ExpectRight(chain, RandomInputs(batch * 1100, 6), batch, Name(chain, batch));
    if (HasFatalFailure()) return;
  }
}

TEST(Mlp, EmptyBatchesWriteNothing) {
  const PackedMlp mlp = Pack(RandomChain({5, 6}, true, 1));
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    EXPECT_FALSE(mlp.Run(path, nullptr, 0, ThreadRunner(2), nullptr)) << path.name;
  }
}

TEST(Mlp, ASampleIsTheSameInEveryBatchAndWithAnyNumberOfThreads) {
  const std::vector<std::vector<int64_t>> all_widths = {{29, 70, 33, 5}, {100, 1000, 600, 3}};
  for (const std::vector<int64_t>& widths : all_widths) {  // the second is split by columns
    const Chain chain = RandomChain(widths, false, 9);
    const PackedMlp mlp = Pack(chain);
    const int64_t batch = 300;
    const std::vector<float> x = RandomInputs(batch * widths[0], 4);
    for (const KernelPath& path : AllKernelPaths()) {
      if (!path.supported() || (widths[1] > 100 && std::string(path.name) == "scalar")) continue;
      const std::vector<float> all = OutputsOf(mlp, path, x, batch);
      for (const int threads : {2, 7})
        ExpectSame(OutputsOf(mlp, path, x, batch, threads), all, path.name);
      for (const int64_t part : {1, 2, 15, 31, 64, 65, 129}) {
        const std::vector<float> some = OutputsOf(
            mlp, path, std::vector<float>(x.begin(), x.begin() + part * widths[0]), part, 2);
        ExpectSame(some, std::vector<float>(all.begin(), all.begin() + part * widths.back()),
                   std::string(path.name) + " in a batch of " + std::to_string(part));
      }
    }
  }
}

TEST(Mlp, RowsOfABlockEqualARunOfTheBatch) {
  const Chain chain = RandomChain({21, 40, 9}, true, 2);
  const PackedMlp mlp = Pack(chain);
  const std::vector<float> x = RandomInputs(37 * 21, 8);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    AlignedBuffer scratch;
    std::vector<float> y(37 * 9);
    mlp.RunRows(path, x.data(), 37, y.data(), scratch.Reserve(mlp.ScratchBytes(37)));
    ExpectSame(y, OutputsOf(mlp, path, x, 37), path.name);
  }
}

TEST(Mlp, NanAndInfinityGoWhereTheReferenceHasThemAndNoFurther) {
  // Widths between tiles: what only pads must not meet an infinity.
  Chain chain = RandomChain({19, 37, 21, 5}, false, 7);
  for (std::vector<float>& weights : chain.weights) {
    for (float& weight : weights) weight = std::abs(weight) + 0.5f;  // no sum cancels
    for (float& weight : weights) weight = ToBf16(weight);
  }
  std::vector<float> x = RandomInputs(40 * 19, 3);
  for (float& value : x) value = std::abs(value);
  x[2 * 19 + 4] = kNan;
  x[5 * 19 + 18] = kInf;
  x[17 * 19] = -kInf;
  x[20 * 19 + 1] = kInf;
  x[20 * 19 + 2] = -kInf;
  x[33 * 19 + 7] = -kNan;
  x[34 * 19 + 7] = 3.4e38f;  // rounds to infinity
  const PackedMlp mlp = Pack(chain);
  const std::vector<float> expected = Reference(chain, x, 40);
  ASSERT_TRUE(std::isnan(expected[2 * 5]) && expected[5 * 5] == kInf && expected[34 * 5] == kInf);
  ASSERT_TRUE(std::isfinite(expected[17 * 5]) && std::isnan(expected[20 * 5]));
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    const std::vector<float> seen = OutputsOf(mlp, path, x, 40);
    if (KeepsOrder(path)) ExpectSame(seen, expected, path.name);
    for (size_t i = 0; i < seen.size(); ++i) {
      EXPECT_EQ(std::isnan(seen[i]), std::isnan(expected[i])) << path.name << " at " << i;
      EXPECT_EQ(std::isinf(seen[i]), std::isinf(expected[i])) << path.name << " at " << i;
    }
  }
}

TEST(Mlp, SubnormalNumbersAreKeptOrAsAmxDoesTakenForZero) {
  Chain chain = RandomChain({40, 20}, false, 11);
  for (size_t i = 0; i < chain.weights[0].size(); i += 3) chain.weights[0][i] = ToBf16(3e-39f);
  for (size_t i = 0; i < chain.biases[0].size(); i += 2) chain.biases[0][i] = 1e-40f;
  std::vector<float> x = RandomInputs(20 * 40, 12);
  for (size_t i = 0; i < x.size(); i += 2) x[i] = i % 4 == 0 ? 2e-39f : -1e-38f;
  ExpectRight(chain, x, 20, "subnormal numbers");
  for (float& value : x) value = 1e-20f;
  for (float& weight : chain.weights[0]) weight = ToBf16(1e-20f);
  ExpectRight(chain, x, 20, "subnormal products");
}

TEST(Mlp, BehindAReluANegativeZeroIsAZeroOfEitherSign) {
  Chain chain = RandomChain({2, 3, 3}, true, 1);
  for (std::vector<float>& weights : chain.weights) {
    for (float& weight : weights) weight = ToBf16(1e-30f);
  }
  for (std::vector<float>& bias : chain.biases) bias = {-0.0f, -1e-30f, -1.0f};
  const PackedMlp mlp = Pack(chain);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    // Products that underflow to -0 are the only sums that are -0.
    EXPECT_EQ(OutputsOf(mlp, path, {-1e-30f, -1e-30f}, 1), std::vector<float>(3, 0.0f))
        << path.name;
  }
}

TEST(Mlp, AForkedChildRunsOnEveryPath) {
  const Chain chain = RandomChain({40, 33, 5}, true, 2);
  const PackedMlp mlp = Pack(chain);
  const std::vector<float> x = RandomInputs(20 * 40, 4);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    const std::vector<float> expected = OutputsOf(mlp, path, x, 20);
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) _exit(OutputsOf(mlp, path, x, 20) == expected ? 0 : 1);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << path.name << " " << status;
  }
}

TEST(Mlp, SizesThatMakeNoLayerAreRefused) {
  PackedMlp mlp;
  const uint16_t weight = 0;
  const float bias = 0.0f;
  EXPECT_TRUE(PackedMlp::Create(1, {}, true, &mlp));
  EXPECT_TRUE(PackedMlp::Create(0, {{&weight, &bias, 1}}, true, &mlp));
  EXPECT_TRUE(PackedMlp::Create(1, {{&weight, &bias, 0}}, true, &mlp));
  EXPECT_TRUE(PackedMlp::Create(-3, {{&weight, &bias, 1}}, true, &mlp));
  const Error error = PackedMlp::Create(1, {{&weight, &bias, int64_t{1} << 40}}, true, &mlp);
  ASSERT_TRUE(error);
  EXPECT_NE(error->find("layer 0 has 1 inputs and 1099511627776 outputs"), std::string::npos)
      << *error;
}

}  // namespace
}  // namespace dlrm_deploy
