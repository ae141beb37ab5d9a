#include "kernels/dot_interaction.h"

#include <algorithm>

#include "kernels/scratch.h"

namespace dlrm_deploy {
namespace {

// Bytes read and written by one block, 5 to 10 us of work.
constexpr int64_t kBlockBytes = 128 * 1024;

bool Multiply(int64_t a, int64_t b, int64_t* product) {
  return !__builtin_mul_overflow(a, b, product);
}

}  // namespace

Error MakeInteractionShape(int64_t slots, int64_t width, bool self_interaction,
                           InteractionShape* shape) {
  constexpr int64_t kMostVectors = int64_t{1} << 31;  // keeps V * (V + 1) inside 64 bits
  const auto too_large = [&] {
    return std::to_string(slots) + " embeddings of width " + std::to_string(width) +
           " make an output that is too large to address";
  };
  if (slots < 0 || width < 0 || slots >= kMostVectors || width > INT64_MAX / 16) return too_large();
  const int64_t v = slots + 1;
  shape->vectors = v;
  shape->width = width;
  shape->self = self_interaction ? 1 : 0;
  shape->output_width = width + (self_interaction ? v * (v + 1) / 2 : v * (v - 1) / 2);
  shape->stride = (v + kScratchMultiple - 1) / kScratchMultiple * kScratchMultiple;
  shape->scratch_width = (width + 3) / 4 * 4;
  int64_t floats;
  if (!Multiply(shape->stride, shape->scratch_width, &floats) || floats > INT64_MAX / 16 ||
      shape->output_width > INT64_MAX / 16) {
    return too_large();
  }
  return {};
}

Error RunDotInteraction(const InteractionShape& shape, const float* dense, const float* embeddings,
                        int64_t batch, const KernelPath& path, const BlockRunner& runner,
                        float* out) {
  if (batch == 0) return {};
  const double sample_bytes =
      sizeof(float) * (static_cast<double>(shape.vectors) * static_cast<double>(shape.width) +
                       static_cast<double>(shape.output_width));
  const int64_t samples_per_block = std::clamp<int64_t>(
      static_cast<int64_t>(static_cast<double>(kBlockBytes) / std::max(1.0, sample_bytes)), 1,
      batch);
  const int64_t blocks = batch / samples_per_block + (batch % samples_per_block != 0);
  const size_t scratch_bytes =
      static_cast<size_t>(shape.stride * shape.scratch_width) * sizeof(float);
  const int64_t embeddings_width = (shape.vectors - 1) * shape.width;

  const auto interact = [&](size_t index, void* scratch) {
    const int64_t first = static_cast<int64_t>(index) * samples_per_block;
    path.interact(shape, dense + first * shape.width, embeddings + first * embeddings_width,
                  std::min(samples_per_block, batch - first), static_cast<float*>(scratch),
                  out + first * shape.output_width);
  };
  return ForEachBlockWithScratch(runner, static_cast<size_t>(blocks), scratch_bytes, interact);
}

}  // namespace dlrm_deploy
