#include "kernels/dot_interaction.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "c_api/thread_runner.h"
#include "guarded_buffer.h"

namespace dlrm_deploy {
namespace {

struct Sample {
  int64_t batch, slots, width;
  bool self;
};

std::vector<float> Random(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<float> Interact(const Sample& s, const KernelPath& path, int threads,
                            const std::vector<float>& dense, const std::vector<float>& embeddings) {
  InteractionShape shape;
  EXPECT_FALSE(MakeInteractionShape(s.slots, s.width, s.self, &shape));
  GuardedBuffer<float> x(dense), y(embeddings);
  const size_t size = static_cast<size_t>(s.batch * shape.output_width);
  GuardedBuffer<float> out(std::vector<float>(size, -7.0f));
  EXPECT_FALSE(RunDotInteraction(shape, x.data(), y.data(), s.batch, path, ThreadRunner(threads),
                                 out.data()));
  return std::vector<float>(out.data(), out.data() + size);
}

TEST(DotInteraction, EveryPathIsWithinTheErrorBoundOfDoublePrecision) {
  for (const int64_t width : {1, 3, 4, 15, 16, 17, 64, 100}) {
    for (const int64_t slots : {0, 1, 2, 7, 8, 15, 16, 26, 31, 40}) {
      for (const bool self : {false, true}) {
        const Sample s{3, slots, width, self};
        const auto dense = Random(static_cast<size_t>(s.batch * width), 1);
        const auto embeddings = Random(static_cast<size_t>(s.batch * slots * width), 2);
        for (const KernelPath& path : AllKernelPaths()) {
          if (!path.supported()) continue;
          const std::vector<float> seen = Interact(s, path, 1, dense, embeddings);
          size_t at = 0;
          for (int64_t b = 0; b < s.batch; ++b) {
            const auto x = [&](int64_t i, int64_t d) -> double {
              return i == 0 ? dense[static_cast<size_t>(b * width + d)]
                            : embeddings[static_cast<size_t>((b * slots + i - 1) * width + d)];
            };
            for (int64_t d = 0; d < width; ++d) ASSERT_EQ(seen[at++], static_cast<float>(x(0, d)));
            for (int64_t i = 0; i <= slots; ++i) {
              for (int64_t j = 0; j < i + (self ? 1 : 0); ++j, ++at) {
                double sum = 0.0, magnitude = 0.0;
                for (int64_t d = 0; d < width; ++d) {
                  sum += x(i, d) * x(j, d);
                  magnitude += std::fabs(x(i, d) * x(j, d));
                }
                const double bound = static_cast<double>(width) * std::ldexp(1.0, -23) * magnitude;
                ASSERT_NEAR(seen[at], sum, bound) << path.name << " width " << width << " slots "
                                                  << slots << " pair " << i << ", " << j;
              }
            }
          }
          ASSERT_EQ(at, seen.size());
        }
      }
    }
  }
}

TEST(DotInteraction, ScratchThatIsTooLargeForTheStackAndManyBlocksGiveTheSame) {
  const Sample s{37, 90, 130, true};
  const auto dense = Random(static_cast<size_t>(s.batch * s.width), 3);
  const auto embeddings = Random(static_cast<size_t>(s.batch * s.slots * s.width), 4);
  for (const KernelPath& path : AllKernelPaths()) {
    if (!path.supported()) continue;
    const std::vector<float> one = Interact(s, path, 1, dense, embeddings);
    EXPECT_EQ(Interact(s, path, 2, dense, embeddings), one) << path.name;
    const Sample last{1, s.slots, s.width, s.self};
    const std::vector<float> alone =
        Interact(last, path, 1, std::vector<float>(dense.end() - s.width, dense.end()),
                 std::vector<float>(embeddings.end() - s.slots * s.width, embeddings.end()));
    EXPECT_EQ(std::vector<float>(one.end() - static_cast<int64_t>(alone.size()), one.end()), alone)
        << path.name;
  }
}

TEST(DotInteraction, ShapesTooLargeToAddressAreRefused) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  InteractionShape shape;
  EXPECT_TRUE(MakeInteractionShape(kHuge, 4, false, &shape));
  EXPECT_TRUE(MakeInteractionShape(4, kHuge, false, &shape));
  EXPECT_TRUE(MakeInteractionShape(int64_t{1} << 30, int64_t{1} << 40, false, &shape));
  EXPECT_TRUE(MakeInteractionShape(-1, 4, false, &shape));
}

}  // namespace
}  // namespace dlrm_deploy
