#include "calibrate/calibrate.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "calibrate/measure_rate.h"

namespace dlrm_deploy {
namespace {

// Memory with a value on every page, so that no page is the kernel's shared page of zeros.
std::vector<float> FilledBuffer(int64_t bytes) {
  return std::vector<float>(static_cast<size_t>(bytes) / sizeof(float), 1.0f);
}

uint64_t SumWords(const unsigned char* from, size_t bytes) {
  uint64_t sum[8] = {};
  for (size_t i = 0; i + sizeof sum <= bytes; i += sizeof sum) {
    uint64_t words[8];
    std::memcpy(words, from + i, sizeof words);
    for (int k = 0; k < 8; ++k) sum[k] += words[k];
  }
  uint64_t total = 0;
  for (const uint64_t s : sum) total += s;
  return total;
}

}  // namespace

double MeasureFmaGflops(const KernelPath& path, int threads, double duration_ms) {
  const auto step = [&](int) {
    float values[3] = {1.0f, 0.75f, 0.25f};  // 1 * 0.75 + 0.25 = 1: neither grows nor vanishes
    return path.multiply_add_loop(20000, values);
  };
  return MeasureRate(threads, duration_ms, step) / 1e9;
}

double MeasureReadGbps(int64_t bytes, int threads, double duration_ms) {
  const std::vector<float> buffer = FilledBuffer(bytes);
  const auto* begin = reinterpret_cast<const unsigned char*>(buffer.data());
  constexpr size_t kPiece = 1 << 20;
  const size_t share = buffer.size() * sizeof(float) / static_cast<size_t>(threads);
  const size_t piece = std::min(kPiece, share);
  std::vector<size_t> position(static_cast<size_t>(threads), 0);
  std::atomic<uint64_t> used{0};
  const auto step = [&](int thread) {
    size_t& at = position[static_cast<size_t>(thread)];
    used.fetch_add(SumWords(begin + static_cast<size_t>(thread) * share + at, piece),
                   std::memory_order_relaxed);
    at = at + 2 * piece <= share ? at + piece : 0;
    return static_cast<double>(piece);
  };
  return MeasureRate(threads, duration_ms, step) / 1e9;
}

double MeasureGatherGbps(const KernelPath& path, int64_t row_bytes, int64_t table_bytes,
                         int threads, double duration_ms) {
  const std::vector<float> table = FilledBuffer(table_bytes);
  const int64_t width = row_bytes / static_cast<int64_t>(sizeof(float));
  const uint64_t rows = static_cast<uint64_t>(table_bytes / row_bytes);

  struct State {
    uint64_t random;
    Chunk chunk;
    std::vector<float> out;
  };
  std::vector<std::unique_ptr<State>> states;
  for (int t = 0; t < threads; ++t) {
    auto state = std::make_unique<State>();
    state->random = 0x9e3779b97f4a7c15u * static_cast<uint64_t>(t + 1);
    state->out.resize(static_cast<size_t>(width));
    Chunk& chunk = state->chunk;
    chunk.rows = Chunk::kRows;
    chunk.bags = 1;
    chunk.weighted = false;
    chunk.one_hot = false;
    chunk.bag[0] = {state->out.data(), 1.0f, static_cast<uint16_t>(Chunk::kRows), false};
    std::fill_n(chunk.row, Chunk::kRows + Chunk::kAhead, table.data());
    states.push_back(std::move(state));
  }
  const auto step = [&](int thread) {
    State& state = *states[static_cast<size_t>(thread)];
    Chunk& chunk = state.chunk;
    // What was prefetched by the last step comes first, then new rows.
    std::copy_n(chunk.row + Chunk::kRows, Chunk::kAhead, chunk.row);
    for (int i = Chunk::kAhead; i < Chunk::kRows + Chunk::kAhead; ++i) {
      state.random = state.random * 6364136223846793005u + 1442695040888963407u;
      // The high half of a 64 x 64 bit product: a number in [0, rows) without a division.
      const uint64_t row =
          static_cast<uint64_t>((static_cast<unsigned __int128>(state.random) * rows) >> 64);
      chunk.row[i] = table.data() + row * static_cast<uint64_t>(width);
    }
    path.pool_chunk(chunk, width);
    return static_cast<double>(Chunk::kRows) * static_cast<double>(row_bytes);
  };
  return MeasureRate(threads, duration_ms, step) / 1e9;
}

}  // namespace dlrm_deploy
