#include "kernels/mlp.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "kernels/scratch.h"

namespace dlrm_deploy {
namespace {

constexpr int64_t kMostWidth = int64_t{1} << 24;   // of a layer
constexpr int64_t kMostValues = int64_t{1} << 34;  // weights of a layer

// A batch of up to kSplitRows samples is split by columns, layer by layer, in pieces of about
// kSplitBytes of weights, where the weights have kSplitWeightBytes or more: then reading them takes
// longest, and two threads that each read half of them do it in half of the time.
constexpr int64_t kSplitRows = 256;
constexpr int64_t kSplitBytes = 128 << 10;
constexpr size_t kSplitWeightBytes = 1 << 20;

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Samples of a block: enough to use a weight often once it is in the cache, few enough to give
// every thread several blocks. Weights that do not fit into the L2 cache are read again for each
// block.
int64_t BlockRows(int64_t batch, size_t weight_bytes) {
  if (weight_bytes >= kSplitWeightBytes) return 256;
  if (batch <= 128) return 32;
  if (batch <= 256) return 64;
  return 128;
}

void PackLayer(const MlpWeights& from, const MlpLayer& layer, uint16_t* weights, float* bias) {
  for (int64_t n = 0; n < layer.outputs; ++n) {
    const uint16_t* row = from.weights + n * layer.inputs;
    uint16_t* tiles =
        weights + n / kMlpTileColumns * layer.k_tiles * kMlpTileValues + n % kMlpTileColumns * 2;
    for (int64_t k = 0; k < layer.inputs; ++k) tiles[k / 2 * 32 + k % 2] = row[k];
    bias[n] = from.bias[n];
  }
}

}  // namespace

Error PackedMlp::Create(int64_t inputs, const std::vector<MlpWeights>& layers, bool relu_last,
                        PackedMlp* mlp) {
  if (layers.empty()) return std::string("an Mlp needs at least one layer");
  PackedMlp made;
  size_t bias_bytes = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const bool last = l + 1 == layers.size();
    MlpLayer layer = {};
    layer.inputs = l == 0 ? inputs : made.layers_.back().outputs;
    layer.outputs = layers[l].outputs;
    layer.relu = !last || relu_last;
    if (layer.inputs < 1 || layer.outputs < 1 || layer.inputs > kMostWidth ||
        layer.outputs > kMostWidth || layer.inputs * layer.outputs > kMostValues) {
      return "layer " + std::to_string(l) + " has " + std::to_string(layer.inputs) +
             " inputs and " + std::to_string(layer.outputs) + " outputs, expected 1 to " +
             std::to_string(kMostWidth) + " of each and at most " + std::to_string(kMostValues) +
             " weights";
    }
    layer.k_tiles = CeilDivide(layer.inputs, kMlpTileInputs);
    layer.n_tiles = CeilDivide(layer.outputs, kMlpTileColumns);
    if (!last) layer.n_tiles += layer.n_tiles % 2;  // whole tiles of inputs for the next layer
    made.weight_bytes_ += static_cast<size_t>(layer.n_tiles * layer.k_tiles * kMlpTileValues) * 2;
    bias_bytes += static_cast<size_t>(layer.n_tiles * kMlpTileColumns) * sizeof(float);
    made.widest_ = std::max(made.widest_, layer.k_tiles * kMlpTileInputs);
    made.layers_.push_back(layer);
  }
  made.packed_ = std::make_unique<AlignedBuffer>();
  const size_t bytes = made.weight_bytes_ + bias_bytes;
  void* const packed = made.packed_->Reserve(bytes);
  if (packed == nullptr) throw std::bad_alloc();
  std::memset(packed, 0, bytes);
  uint16_t* weights = static_cast<uint16_t*>(packed);
  float* bias = reinterpret_cast<float*>(static_cast<char*>(packed) + made.weight_bytes_);
  for (size_t l = 0; l < layers.size(); ++l) {
    MlpLayer& layer = made.layers_[l];
    PackLayer(layers[l], layer, weights, bias);
    layer.weights = weights;
    layer.bias = bias;
    weights += layer.n_tiles * layer.k_tiles * kMlpTileValues;
    bias += layer.n_tiles * kMlpTileColumns;
  }
  *mlp = std::move(made);
  return {};
}

size_t PackedMlp::ActivationBytes(int64_t rows) const {
  return static_cast<size_t>(CeilDivide(rows, kMlpTileRows) * kMlpTileRows * widest_) *
         sizeof(float);
}

size_t PackedMlp::ScratchBytes(int64_t rows) const { return 2 * ActivationBytes(rows); }

void PackedMlp::RunRows(const KernelPath& path, const float* x, int64_t rows, float* y,
                        void* scratch) const {
  if (rows <= 0) return;
  MlpTask task = {};
  task.layers = layers_.data();
  task.count = static_cast<int64_t>(layers_.size());
  task.rows = rows;
  task.x = x;
  task.from = scratch;
  task.to = static_cast<char*>(scratch) + ActivationBytes(rows);
  task.y = y;
  task.end_tile = layers_.back().n_tiles;
  path.run_mlp(task);
}

Error PackedMlp::RunBlocks(const KernelPath& path, const float* x, int64_t batch, int64_t rows,
                           const BlockRunner& runner, float* y) const {
  const size_t bytes = ScratchBytes(rows);
  const auto run = [&](size_t block, void* scratch) {
    const int64_t first = static_cast<int64_t>(block) * rows;
    RunRows(path, x + first * inputs(), std::min(rows, batch - first), y + first * outputs(),
            scratch);
  };
  return ForEachBlockWithScratch(runner, static_cast<size_t>(CeilDivide(batch, rows)), bytes, run);
}

Error PackedMlp::RunSplitLayers(const KernelPath& path, const float* x, int64_t batch,
                                const BlockRunner& runner, float* y) const {
  const size_t bytes = ActivationBytes(batch);
  AlignedBuffer shared;
  char* from = static_cast<char*>(shared.Reserve(2 * bytes));
  if (from == nullptr) return OutOfMemory(2 * bytes);
  char* to = from + bytes;
  for (size_t l = 0; l < layers_.size(); ++l) {
    const MlpLayer& layer = layers_[l];
    const bool last = l + 1 == layers_.size();
    const int64_t tile_bytes = layer.k_tiles * kMlpTileValues * 2;
    const int64_t tiles = std::max<int64_t>(4, CeilDivide(kSplitBytes, tile_bytes) / 4 * 4);
    const auto run = [&](size_t block, void* scratch) {
      MlpTask task = {};
      task.layers = &layer;
      task.count = 1;
      task.rows = batch;
      task.x = l == 0 ? x : nullptr;  // each thread converts the inputs for itself: they are few
      task.from = l == 0 ? scratch : from;
      task.to = to;
      task.y = last ? y : nullptr;
      task.first_tile = static_cast<int64_t>(block) * tiles;
      task.end_tile = std::min(layer.n_tiles, task.first_tile + tiles);
      path.run_mlp(task);
    };
    const size_t blocks = static_cast<size_t>(CeilDivide(layer.n_tiles, tiles));
    if (Error error = ForEachBlockWithScratch(runner, blocks, l == 0 ? bytes : 0, run)) {
      return error;
    }
    std::swap(from, to);
  }
  return {};
}

Error PackedMlp::Run(const KernelPath& path, const float* x, int64_t batch,
                     const BlockRunner& runner, float* y) const {
  if (batch <= 0) return {};
  if (batch <= kSplitRows && weight_bytes_ >= kSplitWeightBytes) {
    return RunSplitLayers(path, x, batch, runner, y);
  }
  return RunBlocks(path, x, batch, std::min(batch, BlockRows(batch, weight_bytes_)), runner, y);
}

}  // namespace dlrm_deploy
