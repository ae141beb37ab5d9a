#include "kernels/int8_mlp.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "kernels/scratch.h"

namespace dlrm_deploy {
namespace {

constexpr int64_t kMostInputs = int64_t{1} << 17;   // of a layer: its sums fit into 32 bits
constexpr int64_t kMostOutputs = int64_t{1} << 24;  // of a layer
constexpr int64_t kMostValues = int64_t{1} << 34;   // weights of a layer

// A batch of up to kSplitRows samples is split by columns, layer by layer, in pieces of about
// kSplitBytes of weights, where the weights have kSplitWeightBytes or more: then reading them takes
// longest, and two threads that each read half of them do it in half of the time.
constexpr int64_t kSplitRows = 64;
constexpr int64_t kSplitBytes = 128 << 10;
constexpr size_t kSplitWeightBytes = 1 << 20;

// Samples of a block: two row tiles, whose activations stay close. More of them use a weight more
// often where weights may not fit into the L2 cache, as long as there are several blocks.
int64_t BlockRows(int64_t batch, size_t weight_bytes) {
  if (weight_bytes < kSplitWeightBytes || batch <= 128) return 32;
  return batch <= 256 ? 64 : 128;
}

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDivide(a, b) * b; }

void PackLayer(const Int8Weights& from, const Int8Layer& layer, int8_t* weights, float* scale,
               float* bias) {
  for (int64_t n = 0; n < layer.outputs; ++n) {
    const int8_t* row = from.weights + n * layer.inputs;
    int8_t* tiles =
        weights + n / kInt8TileColumns * layer.k_tiles * kInt8TileBytes + n % kInt8TileColumns * 4;
    for (int64_t k = 0; k < layer.inputs; ++k) tiles[k / 4 * 64 + k % 4] = row[k];
    scale[n] = from.scale[n];
    bias[n] = from.bias[n];
  }
}

}  // namespace

Error PackedInt8Mlp::Create(int64_t inputs, const std::vector<Int8Weights>& layers, bool relu_last,
                            PackedInt8Mlp* mlp) {
  if (layers.empty()) return std::string("an MlpInt8 needs at least one layer");
  PackedInt8Mlp made;
  size_t floats = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const bool last = l + 1 == layers.size();
    Int8Layer layer = {};
    layer.inputs = l == 0 ? inputs : made.layers_.back().outputs;
    layer.outputs = layers[l].outputs;
    layer.relu = !last || relu_last;
    if (layer.inputs < 1 || layer.outputs < 1 || layer.inputs > kMostInputs ||
        layer.outputs > kMostOutputs || layer.inputs * layer.outputs > kMostValues) {
      return "layer " + std::to_string(l) + " has " + std::to_string(layer.inputs) +
             " inputs and " + std::to_string(layer.outputs) + " outputs, expected 1 to " +
             std::to_string(kMostInputs) + " inputs, 1 to " + std::to_string(kMostOutputs) +
             " outputs and at most " + std::to_string(kMostValues) + " weights";
    }
    layer.k_tiles = CeilDivide(layer.inputs, kInt8TileInputs);
    layer.n_tiles = CeilDivide(layer.outputs, kInt8TileColumns);
    made.weight_bytes_ += static_cast<size_t>(layer.n_tiles * layer.k_tiles * kInt8TileBytes);
    floats += static_cast<size_t>(2 * layer.n_tiles * kInt8TileColumns);
    made.widest_in_ = std::max(made.widest_in_, layer.k_tiles * kInt8TileInputs);
    if (!last) {
      made.widest_hidden_ = std::max(made.widest_hidden_, layer.n_tiles * kInt8TileColumns);
    }
    made.layers_.push_back(layer);
  }
  made.packed_ = std::make_unique<AlignedBuffer>();
  const size_t bytes = made.weight_bytes_ + floats * sizeof(float);
  void* const packed = made.packed_->Reserve(bytes);
  if (packed == nullptr) throw std::bad_alloc();
  std::memset(packed, 0, bytes);
  int8_t* weights = static_cast<int8_t*>(packed);
  float* values = reinterpret_cast<float*>(weights + made.weight_bytes_);
  for (size_t l = 0; l < layers.size(); ++l) {
    Int8Layer& layer = made.layers_[l];
    const int64_t columns = layer.n_tiles * kInt8TileColumns;
    PackLayer(layers[l], layer, weights, values, values + columns);
    layer.weights = weights;
    layer.scale = values;
    layer.bias = values + columns;
    weights += layer.n_tiles * layer.k_tiles * kInt8TileBytes;
    values += 2 * columns;
  }
  *mlp = std::move(made);
  return {};
}

size_t PackedInt8Mlp::ScratchBytes(int64_t rows) const {
  const int64_t padded = RoundUp(rows, kInt8TileRows);
  const int64_t floats = padded * (1 + widest_hidden_);
  return static_cast<size_t>(padded * widest_in_ * 2) + static_cast<size_t>(floats) * sizeof(float);
}

void PackedInt8Mlp::Place(int64_t rows, void* memory, Int8MlpTask* task) const {
  const int64_t padded = RoundUp(rows, kInt8TileRows);
  task->codes = memory;
  task->steps = reinterpret_cast<float*>(static_cast<char*>(memory) + padded * widest_in_ * 2);
  task->hidden = task->steps + padded;
}

Error PackedInt8Mlp::RunBlocks(const KernelPath& path, const float* x, int64_t batch,
                               const BlockRunner& runner, float* y) const {
  const int64_t rows = std::min(batch, BlockRows(batch, weight_bytes_));
  const auto run = [&](size_t block, void* scratch) {
    const int64_t first = static_cast<int64_t>(block) * rows;
    Int8MlpTask task = {};
    Place(rows, scratch, &task);
    task.layers = layers_.data();
    task.count = static_cast<int64_t>(layers_.size());
    task.rows = std::min(rows, batch - first);
    task.x = x + first * inputs();
    task.x_stride = inputs();
    task.y = y + first * outputs();
    task.y_stride = outputs();
    task.end_tile = layers_.back().n_tiles;
    path.run_int8_mlp(task);
  };
  return ForEachBlockWithScratch(runner, static_cast<size_t>(CeilDivide(batch, rows)),
                                 ScratchBytes(rows), run);
}

Error PackedInt8Mlp::RunSplitLayers(const KernelPath& path, const float* x, int64_t batch,
                                    const BlockRunner& runner, float* y) const {
  AlignedBuffer shared;
  const size_t bytes = ScratchBytes(batch);
  void* const memory = shared.Reserve(bytes);
  if (memory == nullptr) return OutOfMemory(bytes);
  Int8MlpTask task = {};
  Place(batch, memory, &task);
  task.rows = batch;
  task.x = x;
  task.x_stride = inputs();
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Int8Layer& layer = layers_[l];
    const bool last = l + 1 == layers_.size();
    task.layers = &layer;
    task.count = 0;  // quantizes the inputs, which are few
    path.run_int8_mlp(task);
    task.x = nullptr;
    task.count = 1;
    task.y = last ? y : task.hidden;
    task.y_stride = last ? outputs() : layer.n_tiles * kInt8TileColumns;
    const int64_t tile_bytes = layer.k_tiles * kInt8TileBytes;
    const int64_t tiles = RoundUp(CeilDivide(kSplitBytes, tile_bytes), 4);
    auto run = [&](size_t block) {
      Int8MlpTask piece = task;
      piece.first_tile = static_cast<int64_t>(block) * tiles;
      piece.end_tile = std::min(layer.n_tiles, piece.first_tile + tiles);
      path.run_int8_mlp(piece);
    };
    runner.ForEachBlock(static_cast<size_t>(CeilDivide(layer.n_tiles, tiles)), run);
    task.x = task.hidden;
    task.x_stride = task.y_stride;
  }
  return {};
}

Error PackedInt8Mlp::Run(const KernelPath& path, const float* x, int64_t batch,
                         const BlockRunner& runner, float* y) const {
  if (batch <= 0) return {};
  if (batch <= kSplitRows && weight_bytes_ >= kSplitWeightBytes) {
    return RunSplitLayers(path, x, batch, runner, y);
  }
  return RunBlocks(path, x, batch, runner, y);
}

}  // namespace dlrm_deploy
