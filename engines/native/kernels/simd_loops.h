// simd_loops.h: both inner loops, written once over a vector type V that a path supplies.
//
// Pooling: lanes hold columns, so every path adds a bag's rows in the same order and results are
// bit-identical. How rows are read is in simd_rows.h.
//
// Interaction: the vectors of a sample are transposed into L1 (scratch[d][j] = x_j[d]). Lanes then
// hold columns j of the triangle: x_i[d] is broadcast and multiplied into them, so there is no
// horizontal sum and each row of the triangle is stored as it lies in the output.
//
// V is declared in an anonymous namespace, which gives all of this internal linkage: see
// kernel_path.h for why that matters.
#ifndef DLRM_DEPLOY_KERNELS_SIMD_LOOPS_H_
#define DLRM_DEPLOY_KERNELS_SIMD_LOOPS_H_

#include <stdint.h>

#include "kernels/kernel_path.h"
#include "kernels/simd_rows.h"

namespace dlrm_deploy {
namespace {

template <class V, bool kWeighted>
inline typename V::Reg AddRow(typename V::Reg sum, typename V::Reg row, float weight) {
  if constexpr (kWeighted) return V::Add(sum, V::Multiply(V::Broadcast(weight), row));
  (void)weight;
  return V::Add(sum, row);
}

// Columns [column, column + N * lanes) of one bag.
template <class V, RowFormat kFormat, bool kWeighted, int N>
inline void PoolColumns(const Chunk& chunk, const BagPart& bag, int first, int64_t column,
                        int64_t width) {
  typename V::Reg sum[N];
  float* out = bag.out + column;
  for (int k = 0; k < N; ++k) sum[k] = bag.resume ? V::Load(out + k * V::kLanes) : V::Zero();
  for (int i = first; i < first + bag.count; ++i) {
    if (column == 0) PrefetchRow(chunk.row[i + Chunk::kAhead], BytesOfRow<kFormat>(width));
    if (chunk.row[i] == nullptr) continue;
    const Row<V, kFormat> row(chunk.row[i], width);
    for (int k = 0; k < N; ++k) {
      sum[k] = AddRow<V, kWeighted>(sum[k], row.Columns(column + k * V::kLanes),
                                    kWeighted ? chunk.weight[i] : 1.0f);
    }
  }
  if (bag.divisor != 1.0f) {
    for (int k = 0; k < N; ++k) sum[k] = V::Divide(sum[k], V::Broadcast(bag.divisor));
  }
  for (int k = 0; k < N; ++k) V::Store(out + k * V::kLanes, sum[k]);
}

// The last columns of one bag, fewer than there are lanes.
template <class V, RowFormat kFormat, bool kWeighted>
inline void PoolTail(const Chunk& chunk, const BagPart& bag, int first, int64_t column,
                     int64_t width) {
  const typename V::Mask mask = V::FirstLanes(width - column);
  float* out = bag.out + column;
  typename V::Reg sum = bag.resume ? V::LoadMasked(mask, out) : V::Zero();
  for (int i = first; i < first + bag.count; ++i) {
    if (column == 0) PrefetchRow(chunk.row[i + Chunk::kAhead], BytesOfRow<kFormat>(width));
    if (chunk.row[i] == nullptr) continue;
    const Row<V, kFormat> row(chunk.row[i], width);
    sum = AddRow<V, kWeighted>(sum, row.FirstColumns(column, width - column),
                               kWeighted ? chunk.weight[i] : 1.0f);
  }
  if (bag.divisor != 1.0f) sum = V::Divide(sum, V::Broadcast(bag.divisor));
  V::StoreMasked(mask, out, sum);
}

template <class V, RowFormat kFormat, bool kWeighted>
void PoolBags(const Chunk& chunk, int64_t width) {
  constexpr int kLanes = V::kLanes;
  int first = 0;
  for (int b = 0; b < chunk.bags; ++b) {
    const BagPart& bag = chunk.bag[b];
    int64_t d = 0;
    for (; d + 8 * kLanes <= width; d += 8 * kLanes) {
      PoolColumns<V, kFormat, kWeighted, 8>(chunk, bag, first, d, width);
    }
    if (d + 4 * kLanes <= width) {
      PoolColumns<V, kFormat, kWeighted, 4>(chunk, bag, first, d, width);
      d += 4 * kLanes;
    }
    if (d + 2 * kLanes <= width) {
      PoolColumns<V, kFormat, kWeighted, 2>(chunk, bag, first, d, width);
      d += 2 * kLanes;
    }
    if (d + kLanes <= width) {
      PoolColumns<V, kFormat, kWeighted, 1>(chunk, bag, first, d, width);
      d += kLanes;
    }
    if (d < width) PoolTail<V, kFormat, kWeighted>(chunk, bag, first, d, width);
    first += bag.count;
  }
}

// One id in every bag: no sums to keep, row i goes to bag i.
template <class V, RowFormat kFormat, bool kWeighted>
void PoolOneHot(const Chunk& chunk, int64_t width) {
  constexpr int kLanes = V::kLanes;
  const typename V::Mask tail = V::FirstLanes(width % kLanes);
  for (int i = 0; i < chunk.rows; ++i) {
    PrefetchRow(chunk.row[i + Chunk::kAhead], BytesOfRow<kFormat>(width));
    float* out = chunk.bag[i].out;
    const float weight = kWeighted ? chunk.weight[i] : 1.0f;
    int64_t d = 0;
    if (chunk.row[i] == nullptr) {
      for (; d + kLanes <= width; d += kLanes) V::Store(out + d, V::Zero());
      if (d < width) V::StoreMasked(tail, out + d, V::Zero());
      continue;
    }
    const Row<V, kFormat> row(chunk.row[i], width);
    // 0 + row, not row: the sum of a bag is never -0.
    for (; d + kLanes <= width; d += kLanes) {
      V::Store(out + d, AddRow<V, kWeighted>(V::Zero(), row.Columns(d), weight));
    }
    if (d < width) {
      const typename V::Reg last = row.FirstColumns(d, width - d);
      V::StoreMasked(tail, out + d, AddRow<V, kWeighted>(V::Zero(), last, weight));
    }
  }
}

template <class V, RowFormat kFormat>
void PoolFormat(const Chunk& chunk, int64_t width) {
  if (chunk.one_hot) {
    chunk.weighted ? PoolOneHot<V, kFormat, true>(chunk, width)
                   : PoolOneHot<V, kFormat, false>(chunk, width);
  } else {
    chunk.weighted ? PoolBags<V, kFormat, true>(chunk, width)
                   : PoolBags<V, kFormat, false>(chunk, width);
  }
}

template <class V>
void PoolChunkSimd(const Chunk& chunk, int64_t width) {
  switch (chunk.format) {
    case RowFormat::kFp32:
      return PoolFormat<V, RowFormat::kFp32>(chunk, width);
    case RowFormat::kFp16:
      return PoolFormat<V, RowFormat::kFp16>(chunk, width);
    case RowFormat::kBf16:
      return PoolFormat<V, RowFormat::kBf16>(chunk, width);
    case RowFormat::kInt8:
      return PoolFormat<V, RowFormat::kInt8>(chunk, width);
    case RowFormat::kInt4:
      return PoolFormat<V, RowFormat::kInt4>(chunk, width);
  }
}

// scratch[d * stride + j] = x_j[d] for all d below D and all j below V. Lanes beyond V hold copies
// of the dense vector: what is computed from them is never stored.
template <class V>
inline void TransposeSample(const InteractionShape& shape, const float* dense,
                            const float* embeddings, float* scratch) {
  const int64_t width = shape.width;
  const int64_t whole = width / 4 * 4;
  for (int64_t j = 0; j < shape.vectors; j += V::kLanes) {
    const float* x[V::kLanes];
    for (int64_t k = 0; k < V::kLanes; ++k) {
      const int64_t v = j + k;
      x[k] = v >= 1 && v < shape.vectors ? embeddings + (v - 1) * width : dense;
    }
    float* to = scratch + j;
    for (int64_t d = 0; d < whole; d += 4, to += 4 * shape.stride) {
      V::Transpose4(x, d, to, shape.stride);
    }
    if (whole < width) {  // the last one to three columns, without reading past the vectors
      float padded[V::kLanes][4] = {};
      const float* y[V::kLanes];
      for (int k = 0; k < V::kLanes; ++k) {
        for (int64_t d = whole; d < width; ++d) padded[k][d - whole] = x[k][d];
        y[k] = padded[k];
      }
      V::Transpose4(y, 0, to, shape.stride);
    }
  }
}

// Rows [i, i + R) and columns [j, j + C * lanes) of the triangle, as far as they belong to it.
template <class V, int R, int C>
inline void InteractTile(const InteractionShape& shape, const float* scratch, int64_t i, int64_t j,
                         float* triangle) {
  typename V::Reg sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = V::Zero();
  }
  const float* x = scratch;
  for (int64_t d = 0; d < shape.width; ++d, x += shape.stride) {
    typename V::Reg columns[C];
    for (int c = 0; c < C; ++c) columns[c] = V::Load(x + j + c * V::kLanes);
    for (int r = 0; r < R; ++r) {
      const typename V::Reg xi = V::Broadcast(x[i + r]);
      for (int c = 0; c < C; ++c) sum[r][c] = V::MultiplyAdd(xi, columns[c], sum[r][c]);
    }
  }
  // Without a branch a row: a row or a vector that lies outside the triangle stores no lane at all.
  float* out = triangle + i * (i - 1) / 2 + i * shape.self + j;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t row = i + r;
    const int64_t left = row < shape.vectors ? row + shape.self - j : 0;
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      V::StoreFirst(left - c * V::kLanes, out + c * V::kLanes, sum[r][c]);
    }
    out += row + shape.self;
  }
}

template <class V>
inline void CopyVector(const float* from, int64_t width, float* to) {
  int64_t d = 0;
  for (; d + V::kLanes <= width; d += V::kLanes) V::Store(to + d, V::Load(from + d));
  if (d < width) {
    const typename V::Mask mask = V::FirstLanes(width - d);
    V::StoreMasked(mask, to + d, V::LoadMasked(mask, from + d));
  }
}

template <class V>
void InteractSimd(const InteractionShape& shape, const float* dense, const float* embeddings,
                  int64_t samples, float* scratch, float* out) {
  constexpr int kLanes = V::kLanes;
  const int64_t vectors = shape.vectors;
  for (int64_t s = 0; s < samples; ++s) {
    TransposeSample<V>(shape, dense, embeddings, scratch);
    CopyVector<V>(dense, shape.width, out);
    float* triangle = out + shape.width;
    int64_t i = 0;
    for (; i + 8 <= vectors && i + 7 + shape.self <= kLanes; i += 8) {
      InteractTile<V, 8, 1>(shape, scratch, i, 0, triangle);
    }
    for (; i < vectors; i += 4) {
      const int64_t length = (i + 3 < vectors ? i + 3 : vectors - 1) + shape.self;
      int64_t j = 0;
      for (; j + kLanes < length; j += 2 * kLanes) {
        InteractTile<V, 4, 2>(shape, scratch, i, j, triangle);
      }
      if (j < length) InteractTile<V, 4, 1>(shape, scratch, i, j, triangle);
    }
    dense += shape.width;
    embeddings += (vectors - 1) * shape.width;
    out += shape.output_width;
  }
}

template <class V>
double MultiplyAddLoopSimd(int64_t iterations, float* values) {
  constexpr int kChains = 12;  // latency times ports, with some to spare
  typename V::Reg sum[kChains];
  for (auto& s : sum) s = V::Broadcast(values[0]);
  const typename V::Reg factor = V::Broadcast(values[1]);
  const typename V::Reg addend = V::Broadcast(values[2]);
  for (int64_t i = 0; i < iterations; ++i) {
    for (auto& s : sum) s = V::MultiplyAdd(s, factor, addend);
  }
  for (int k = 1; k < kChains; ++k) sum[0] = V::Add(sum[0], sum[k]);
  float last[V::kLanes];
  V::Store(last, sum[0]);
  values[0] = last[0];  // the result is used, so the loop cannot be dropped
  return 2.0 * kChains * V::kLanes * static_cast<double>(iterations);
}

}  // namespace
}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_SIMD_LOOPS_H_
