// kernel_path.h: the inner loops that exist once per instruction set.
//
// Everything that is the same on every CPU (checks, blocks, ids to rows) lives in embedding_bag.cc
// and dot_interaction.cc; a path only pools rows that were already found and multiplies vectors.
//
// This header is included by files compiled with -mavx2 or -mavx512f. It must stay free of inline
// functions and of standard headers that define some: the linker keeps one copy of each, and if it
// kept the AVX-512 one the scalar path would crash on an older CPU. The test no_shared_code
// holds this for all such files.
#ifndef DLRM_DEPLOY_KERNELS_KERNEL_PATH_H_
#define DLRM_DEPLOY_KERNELS_KERNEL_PATH_H_

#include <stdint.h>

namespace dlrm_deploy {

// How a row of D values is stored; the number is the value of the operator's attribute `formats`.
// int8 and int4 rows hold D unsigned codes (int4: two a byte, the even column in the low nibble),
// then scale and bias in fp16: a value is code * scale + bias in float32, rounded once. The product
// is exact (8 and 11 bits), so a fused multiply-add gives the same bits as two operations.
enum class RowFormat : uint8_t { kFp32 = 0, kFp16 = 1, kBf16 = 2, kInt8 = 3, kInt4 = 4 };
inline constexpr int kRowFormats = 5;

// A bag, or the part of it that fits into one Chunk.
struct BagPart {
  float* out;      // [width]
  float divisor;   // 1, or the bag's length in its last part when the slot takes the mean
  uint16_t count;  // rows of this part
  bool resume;     // out already holds the sum of the bag's earlier parts
};

// Rows to pool, in order, all of one format. Every pointer was made from a checked id, so a path
// checks nothing; it reads no byte outside of a row.
struct Chunk {
  static constexpr int kRows = 256;
  static constexpr int kBags = 256;
  static constexpr int kAhead = 24;  // rows between a prefetch and its use

  RowFormat format = RowFormat::kFp32;
  int rows;
  int bags;
  bool weighted;  // weight[i] multiplies row[i]
  bool one_hot;   // bag i owns row i and nothing else
  // row[rows .. rows + kAhead) comes next and is only prefetched. A null row contributes nothing.
  const void* row[kRows + kAhead];
  float weight[kRows];
  BagPart bag[kBags];
};

// Pools the bags of a chunk: out = (out or 0) + weight * row + ..., in order, then / divisor. One
// rounding per multiplication and one per addition, so that all paths agree bit for bit. `row` is
// the row's float32 value.
using PoolChunk = void (*)(const Chunk& chunk, int64_t width);

struct InteractionShape {
  int64_t vectors;        // V = T + 1
  int64_t width;          // D
  int64_t self;           // 1: each vector's product with itself is part of the output, else 0
  int64_t output_width;   // D + P
  int64_t stride;         // V rounded up to kScratchMultiple: row stride of the scratch
  int64_t scratch_width;  // D rounded up to a multiple of 4: rows of the scratch
};
inline constexpr int64_t kScratchMultiple = 16;

// Interacts consecutive samples. `scratch` holds stride * scratch_width floats, 64-byte aligned.
using Interact = void (*)(const InteractionShape& shape, const float* dense,
                          const float* embeddings, int64_t samples, float* scratch, float* out);

// Runs `iterations` steps of independent multiply-adds and returns how many floating-point
// operations they were. For calibration: `values` [3] holds the start, the factor and the addend.
using MultiplyAddLoop = double (*)(int64_t iterations, float* values);

void PoolChunkScalar(const Chunk& chunk, int64_t width);
void InteractScalar(const InteractionShape& shape, const float* dense, const float* embeddings,
                    int64_t samples, float* scratch, float* out);
double MultiplyAddLoopScalar(int64_t iterations, float* values);
void PoolChunkAvx2(const Chunk& chunk, int64_t width);
void InteractAvx2(const InteractionShape& shape, const float* dense, const float* embeddings,
                  int64_t samples, float* scratch, float* out);
double MultiplyAddLoopAvx2(int64_t iterations, float* values);
void PoolChunkAvx512(const Chunk& chunk, int64_t width);
void InteractAvx512(const InteractionShape& shape, const float* dense, const float* embeddings,
                    int64_t samples, float* scratch, float* out);
double MultiplyAddLoopAvx512(int64_t iterations, float* values);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_KERNEL_PATH_H_
