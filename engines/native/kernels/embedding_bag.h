// embedding_bag.h: TableBatchedEmbeddingBag of docs/operators.md, on any kernel path.
//
// Everything about the inputs is checked here, and each id before its row's address is made: the
// inner loops of a path see only rows that exist. Errors are returned as text, null means success;
// nothing throws except std::bad_alloc.
#ifndef DLRM_DEPLOY_KERNELS_EMBEDDING_BAG_H_
#define DLRM_DEPLOY_KERNELS_EMBEDDING_BAG_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/error.h"
#include "kernels/parallel.h"
#include "kernels/row_format.h"

namespace dlrm_deploy {

enum class IndexPolicy { kError, kClamp, kModulo, kZero };
Error ParseIndexPolicy(const std::string& name, IndexPolicy* policy);

// The attributes of the operator. F features, T slots.
struct EmbeddingBagAttributes {
  int64_t num_features = 0;
  std::vector<int64_t> features;         // [T]
  std::vector<int64_t> formats;          // [T] of RowFormat, or empty: fp32
  int64_t width = 0;                     // D; 0 where formats is empty
  std::vector<int64_t> row_starts;       // [T], in the matrix of the slot's format
  std::vector<int64_t> rows;             // [T]
  std::vector<int64_t> ids;              // [T], or empty: rows
  std::vector<int64_t> moduli;           // [T], or empty: 0
  std::vector<int64_t> divisors;         // [T], or empty: 1
  std::vector<int64_t> divisions;        // [T], or empty: 0
  std::vector<int64_t> mean;             // [T]
  std::vector<int64_t> pooling_factors;  // [F], or empty for the CSR form
  IndexPolicy index_policy = IndexPolicy::kError;
  std::string feature_names;  // F names joined by newlines, or empty

  bool Fixed() const { return !pooling_factors.empty(); }
};

enum class IdType { kInt32, kInt64 };

// The table parts of one format, one after the other.
struct RowMatrix {
  bool given = false;
  const void* data = nullptr;  // [rows, RowBytes(format, width)]
  int64_t rows = 0;
};

// The inputs of one call. Nothing is owned or kept.
struct EmbeddingBagInputs {
  std::array<RowMatrix, kRowFormats> matrices;  // by RowFormat
  int64_t width = 0;
  IdType id_type = IdType::kInt64;  // of indices and offsets
  const void* indices = nullptr;    // [num_indices]
  int64_t num_indices = 0;
  bool has_offsets = false;
  const void* offsets = nullptr;  // [num_offsets]
  int64_t num_offsets = 0;
  bool has_per_sample_weights = false;
  const float* per_sample_weights = nullptr;  // [num_per_sample_weights]
  int64_t num_per_sample_weights = 0;

  RowMatrix& matrix(RowFormat format) { return matrices[static_cast<size_t>(format)]; }
  const RowMatrix& matrix(RowFormat format) const { return matrices[static_cast<size_t>(format)]; }
};

class EmbeddingBag {
 public:
  // Checks the attributes against each other. `bag` is usable after success.
  static Error Create(EmbeddingBagAttributes attributes, EmbeddingBag* bag);

  // Checks lengths, widths and row ranges, and sets the number of samples B. Reads no ids and no
  // offsets.
  Error BatchSize(const EmbeddingBagInputs& inputs, int64_t* batch) const;

  // Pools into `pooled` [B, T, width], where B came from BatchSize() of the same inputs. Fails when
  // offsets do not rise from 0 to N, or on an id out of range under IndexPolicy::kError; `pooled`
  // then holds nothing of use.
  Error Run(const EmbeddingBagInputs& inputs, int64_t batch, const KernelPath& path,
            const BlockRunner& runner, float* pooled) const;

  const EmbeddingBagAttributes& attributes() const { return attributes_; }
  int64_t slots() const { return static_cast<int64_t>(attributes_.features.size()); }
  RowFormat format(size_t slot) const { return static_cast<RowFormat>(attributes_.formats[slot]); }
  // Ids that a sample has in the features before `feature`, fixed form only.
  int64_t PoolingFactorStart(size_t feature) const { return pooling_factor_starts_[feature]; }
  std::string FeatureName(int64_t feature) const;

 private:
  EmbeddingBagAttributes attributes_;           // all vectors filled, except pooling_factors
  std::vector<std::string> names_;              // [F], or empty
  std::vector<int64_t> pooling_factor_starts_;  // [F + 1] running sum, fixed form only
};

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_KERNELS_EMBEDDING_BAG_H_
