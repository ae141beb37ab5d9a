#include "kernels/bag_interaction.h"

#include <algorithm>
#include <memory>

#include "kernels/aligned_buffer.h"
#include "kernels/prepared_bags.h"
#include "kernels/scratch.h"

namespace dlrm_deploy {
namespace {

// Row bytes that a block reads: long enough to hide handing it out, short enough to balance and to
// keep what is pooled in the second-level cache. From 32 to 256 KiB it makes no difference of 2 %.
//
// Asking for the next rows while samples interact was measured and does not pay: too many requests
// that miss the TLB halt the CPU. It took 1.3 times as long, with huge pages 1.05 times.
constexpr double kBlockBytes = 64 * 1024;
// Samples that each read more than a block are pooled together, this many bytes of their vectors at
// a time: with 32 tables of 500k rows and bags of 80 ids that takes 0.93 of the time in int8, 0.87
// at 512 samples, and 0.97 in fp32. Smaller samples lose more by going through memory.
constexpr int64_t kPooledBytes = int64_t{8} << 20;

// Samples of a block, from 1 to `batch`, so that all blocks are about as long.
int64_t SamplesPerBlock(double sample_bytes, int64_t batch) {
  const double fitting = kBlockBytes / std::max(1.0, sample_bytes);  // at least 1
  if (fitting >= static_cast<double>(batch)) return batch;
  const int64_t most = static_cast<int64_t>(fitting);
  const int64_t blocks = (batch - 1) / most + 1;
  return (batch - 1) / blocks + 1;
}

Error RunLargeSamples(PreparedBags& bags, const InteractionShape& shape, const float* dense,
                      int64_t batch, const KernelPath& path, const BlockRunner& runner,
                      float* interactions, float* pooled) {
  const int64_t pooled_width = (shape.vectors - 1) * shape.width;
  const int64_t sample_bytes = pooled_width * static_cast<int64_t>(sizeof(float));
  const int64_t step =
      std::clamp<int64_t>(kPooledBytes / std::max<int64_t>(1, sample_bytes), 1, batch);
  AlignedBuffer buffer;
  float* own = nullptr;
  if (pooled == nullptr) {
    const size_t bytes = static_cast<size_t>(step * sample_bytes);
    own = static_cast<float*>(buffer.Reserve(bytes));
    if (own == nullptr) return OutOfMemory(bytes);
  }
  for (int64_t b0 = 0; b0 < batch; b0 += step) {
    const int64_t b1 = std::min(batch, b0 + step);
    float* const vectors = own != nullptr ? own : pooled + b0 * pooled_width;
    bags.PoolTogether(runner, b0, b1, vectors);
    if (Error error = RunDotInteraction(shape, dense + b0 * shape.width, vectors, b1 - b0, path,
                                        runner, interactions + b0 * shape.output_width)) {
      return error;
    }
  }
  return bags.BadId();
}

}  // namespace

Error RunBagInteraction(const EmbeddingBag& bag, const EmbeddingBagInputs& inputs,
                        const InteractionShape& shape, const float* dense, int64_t batch,
                        const KernelPath& path, const BlockRunner& runner, float* interactions,
                        float* pooled) {
  std::unique_ptr<PreparedBags> bags;
  if (Error error = PreparedBags::Prepare(bag, inputs, batch, path, runner, &bags)) return error;
  if (batch == 0) return {};
  const int64_t pooled_width = bag.slots() * shape.width;

  if (bags->sample_bytes() > kBlockBytes) {
    return RunLargeSamples(*bags, shape, dense, batch, path, runner, interactions, pooled);
  }
  const int64_t block = SamplesPerBlock(bags->sample_bytes(), batch);
  const int64_t transposed = shape.stride * shape.scratch_width;
  const size_t scratch_bytes =
      static_cast<size_t>(transposed + (pooled == nullptr ? block * pooled_width : 0)) *
      sizeof(float);
  const auto run = [&](size_t index, void* memory) {
    float* const scratch = static_cast<float*>(memory);
    const int64_t b0 = static_cast<int64_t>(index) * block;
    const int64_t b1 = std::min(batch, b0 + block);
    float* vectors = pooled == nullptr ? scratch + transposed : pooled + b0 * pooled_width;
    bags->PoolSamples(b0, b1, vectors);
    path.interact(shape, dense + b0 * shape.width, vectors, b1 - b0, scratch,
                  interactions + b0 * shape.output_width);
  };
  const size_t blocks = static_cast<size_t>((batch - 1) / block + 1);
  if (Error error = ForEachBlockWithScratch(runner, blocks, scratch_bytes, run)) return error;
  return bags->BadId();
}

}  // namespace dlrm_deploy
