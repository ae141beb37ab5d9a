#include "kernels/dot_interaction.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

namespace dlrm_deploy {
namespace {

// Bytes read and written by one block, 5 to 10 us of work.
constexpr int64_t kBlockBytes = 128 * 1024;
constexpr int64_t kStackFloats = 4096;  // holds the scratch of the usual models, e.g. 27 x 64
constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(float* floats) const { ::operator delete(floats, kAlignment); }
};

bool Multiply(int64_t a, int64_t b, int64_t* product) {
  return !__builtin_mul_overflow(a, b, product);
}

}  // namespace

std::optional<std::string> MakeInteractionShape(int64_t slots, int64_t width, bool self_interaction,
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

std::optional<std::string> RunDotInteraction(const InteractionShape& shape, const float* dense,
                                             const float* embeddings, int64_t batch,
                                             const KernelPath& path, const BlockRunner& runner,
                                             float* out) {
  if (batch == 0) return {};
  const double sample_bytes =
      sizeof(float) * (static_cast<double>(shape.vectors) * static_cast<double>(shape.width) +
                       static_cast<double>(shape.output_width));
  const int64_t samples_per_block = std::clamp<int64_t>(
      static_cast<int64_t>(static_cast<double>(kBlockBytes) / std::max(1.0, sample_bytes)), 1,
      batch);
  const int64_t blocks = batch / samples_per_block + (batch % samples_per_block != 0);
  const int64_t scratch_floats = shape.stride * shape.scratch_width;
  const int64_t embeddings_width = (shape.vectors - 1) * shape.width;

  std::atomic<bool> out_of_memory{false};
  auto interact = [&](size_t index) {
    const int64_t first = static_cast<int64_t>(index) * samples_per_block;
    alignas(64) float on_stack[kStackFloats];
    std::unique_ptr<float, AlignedDelete> on_heap;
    float* scratch = on_stack;
    if (scratch_floats > kStackFloats) {
      const size_t bytes = static_cast<size_t>(scratch_floats) * sizeof(float);
      on_heap.reset(static_cast<float*>(::operator new(bytes, kAlignment, std::nothrow)));
      if (on_heap == nullptr) {
        out_of_memory.store(true, std::memory_order_relaxed);
        return;
      }
      scratch = on_heap.get();
    }
    path.interact(shape, dense + first * shape.width, embeddings + first * embeddings_width,
                  std::min(samples_per_block, batch - first), scratch,
                  out + first * shape.output_width);
  };
  runner.ForEachBlock(static_cast<size_t>(blocks), interact);
  if (out_of_memory.load()) {
    return "out of memory for the scratch of " + std::to_string(scratch_floats) + " floats";
  }
  return {};
}

}  // namespace dlrm_deploy
