#include "calibrate/gather_rows.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <vector>

#include "calibrate/measure_rate.h"

namespace dlrm_deploy {
namespace {

// Rows ahead of the one that is read; 16 to 32 are equally good.
constexpr int64_t kAhead = 24;
constexpr int64_t kStepRows = 512;
constexpr int64_t kLineBytes = 64;

uint64_t Word(const unsigned char* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Touches every word; the last one overlaps the one before it.
uint64_t SumBytes(const unsigned char* from, int64_t bytes) {
  if (bytes < 8) return from[0] + from[bytes / 2] + from[bytes - 1];
  uint64_t sum[4] = {};
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    for (int k = 0; k < 4; ++k) sum[k] += Word(from + i + 8 * k);
  }
  for (; i + 8 <= bytes; i += 8) sum[0] += Word(from + i);
  return sum[0] + sum[1] + sum[2] + sum[3] + Word(from + bytes - 8);
}

}  // namespace

double MeasureGatherRowsGbps(const void* table, int64_t row_bytes, const uint32_t* rows,
                             int64_t count, int threads, double duration_ms) {
  const auto* begin = static_cast<const unsigned char*>(table);
  const int64_t share = std::max<int64_t>(count / threads, 1);
  std::vector<int64_t> position(static_cast<size_t>(threads), 0);
  std::atomic<uint64_t> used{0};
  const auto step = [&](int thread) {
    // Each thread walks its own share, round and round; the last ones of too few rows share a row.
    const uint32_t* mine = rows + std::min<int64_t>(thread * share, count - share);
    int64_t& at = position[static_cast<size_t>(thread)];
    const int64_t end = std::min(at + kStepRows, share);
    uint64_t sum = 0;
    for (int64_t i = at; i < end; ++i) {
      const unsigned char* ahead =
          begin + int64_t{mine[std::min(i + kAhead, share - 1)]} * row_bytes;
      for (int64_t b = 0; b < row_bytes; b += kLineBytes) __builtin_prefetch(ahead + b);
      // A row that begins inside a line ends in one more.
      __builtin_prefetch(ahead + row_bytes - 1);
      sum += SumBytes(begin + int64_t{mine[i]} * row_bytes, row_bytes);
    }
    used.fetch_add(sum, std::memory_order_relaxed);
    const auto read = static_cast<double>((end - at) * row_bytes);
    at = end < share ? end : 0;
    return read;
  };
  return MeasureRate(threads, duration_ms, step) / 1e9;
}

}  // namespace dlrm_deploy
