// ops.cc: the plain C functions of dlrm_deploy/ops.h. Nothing throws past this file.
#include "dlrm_deploy/ops.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "c_api/checks.h"
#include "c_api/status.h"
#include "c_api/thread_runner.h"
#include "calibrate/calibrate.h"
#include "kernels/bag_interaction.h"
#include "kernels/dispatch.h"
#include "kernels/dot_interaction.h"
#include "kernels/embedding_bag.h"

namespace dlrm_deploy {
namespace {

dlrm_deploy_status ChoosePath(const char* name, const KernelPath** path) {
  std::string error;
  *path =
      name != nullptr ? ChooseKernelPath(name, &error) : ChooseKernelPathFromEnvironment(&error);
  return *path != nullptr ? DLRM_DEPLOY_OK : Fail(DLRM_DEPLOY_NO_PATH, error);
}

std::vector<int64_t> Values(const int64_t* from, int64_t count) {
  return from == nullptr ? std::vector<int64_t>() : std::vector<int64_t>(from, from + count);
}

// The caller's struct with NULL for what callers of earlier versions do not have.
Error CopyBag(const dlrm_deploy_embedding_bag* from, dlrm_deploy_embedding_bag* bag) {
  constexpr size_t kFirstVersion = offsetof(dlrm_deploy_embedding_bag, ids);
  if (from == nullptr || from->struct_size < kFirstVersion) {
    return std::string("struct_size is smaller than any version of dlrm_deploy_embedding_bag");
  }
  *bag = {};
  std::memcpy(bag, from, std::min<size_t>(from->struct_size, sizeof *bag));
  return {};
}

Error CheckBag(const dlrm_deploy_embedding_bag& bag) {
  if (bag.id_bytes != 4 && bag.id_bytes != 8) {
    return "id_bytes is " + std::to_string(bag.id_bytes) + ", expected 4 or 8";
  }
  if (bag.num_slots < 0 || bag.num_features < 0 || bag.num_indices < 0 || bag.num_offsets < 0 ||
      bag.num_per_sample_weights < 0 || CountFloats(bag.total_rows, bag.width, 1) < 0) {
    return std::string("a size is negative or too large to address");
  }
  if ((bag.weights == nullptr && CountFloats(bag.total_rows, bag.width, 1) > 0) ||
      (bag.indices == nullptr && bag.num_indices > 0) ||
      (bag.pooled == nullptr && bag.pooled_floats > 0)) {
    return std::string("weights, indices or pooled is NULL");
  }
  for (const int64_t rows : {bag.rows_fp16, bag.rows_bf16, bag.rows_int8, bag.rows_int4}) {
    // No row takes more than width + 4 floats.
    if (bag.width > kMostFloats || CountFloats(rows, bag.width + 4, 1) < 0) {
      return std::string("a number of rows is negative or too large to address");
    }
  }
  return {};
}

// The operator and the inputs of one call.
struct BagCall {
  EmbeddingBag bag;
  EmbeddingBagInputs inputs;
  int64_t batch = 0;
};

Error ReadBag(const dlrm_deploy_embedding_bag& c, BagCall* call) {
  EmbeddingBagAttributes attributes;
  attributes.num_features = c.num_features;
  attributes.features = Values(c.features, c.num_slots);
  attributes.row_starts = Values(c.row_starts, c.num_slots);
  attributes.rows = Values(c.rows, c.num_slots);
  attributes.ids = Values(c.ids, c.num_slots);
  attributes.moduli = Values(c.moduli, c.num_slots);
  attributes.divisors = Values(c.divisors, c.num_slots);
  attributes.divisions = Values(c.divisions, c.num_slots);
  attributes.mean = Values(c.mean, c.num_slots);
  attributes.formats = Values(c.formats, c.num_slots);
  if (c.formats != nullptr) attributes.width = c.width;
  attributes.pooling_factors = Values(c.pooling_factors, c.num_features);
  const std::string policy = c.index_policy == nullptr ? "error" : c.index_policy;
  if (Error error = ParseIndexPolicy(policy, &attributes.index_policy)) return error;
  if (c.feature_names != nullptr) attributes.feature_names = c.feature_names;

  if (Error error = EmbeddingBag::Create(std::move(attributes), &call->bag)) return error;

  EmbeddingBagInputs& inputs = call->inputs;
  inputs.matrix(RowFormat::kFp32) = {c.weights != nullptr || c.formats == nullptr, c.weights,
                                     c.total_rows};
  inputs.matrix(RowFormat::kFp16) = {c.weights_fp16 != nullptr, c.weights_fp16, c.rows_fp16};
  inputs.matrix(RowFormat::kBf16) = {c.weights_bf16 != nullptr, c.weights_bf16, c.rows_bf16};
  inputs.matrix(RowFormat::kInt8) = {c.weights_int8 != nullptr, c.weights_int8, c.rows_int8};
  inputs.matrix(RowFormat::kInt4) = {c.weights_int4 != nullptr, c.weights_int4, c.rows_int4};
  inputs.width = c.width;
  inputs.id_type = c.id_bytes == 4 ? IdType::kInt32 : IdType::kInt64;
  inputs.indices = c.indices;
  inputs.num_indices = c.num_indices;
  inputs.has_offsets = c.offsets != nullptr;
  inputs.offsets = c.offsets;
  inputs.num_offsets = c.num_offsets;
  inputs.has_per_sample_weights = c.per_sample_weights != nullptr;
  inputs.per_sample_weights = c.per_sample_weights;
  inputs.num_per_sample_weights = c.num_per_sample_weights;

  return call->bag.BatchSize(inputs, &call->batch);
}

Error CheckPooled(const dlrm_deploy_embedding_bag& c, const BagCall& call) {
  const int64_t needed = CountFloats(call.batch, call.bag.slots(), c.width);
  if (needed >= 0 && needed <= c.pooled_floats) return {};
  return "pooled holds " + std::to_string(c.pooled_floats) + " floats, expected at least " +
         std::to_string(call.batch) + " x " + std::to_string(call.bag.slots()) + " x " +
         std::to_string(c.width);
}

Error RunBag(const dlrm_deploy_embedding_bag* from, const KernelPath& path, int threads) {
  dlrm_deploy_embedding_bag c;
  BagCall call;
  if (Error error = CopyBag(from, &c)) return error;
  if (Error error = CheckBag(c)) return error;
  if (Error error = ReadBag(c, &call)) return error;
  if (Error error = CheckPooled(c, call)) return error;
  return call.bag.Run(call.inputs, call.batch, path, ThreadRunner(threads), c.pooled);
}

Error RunBagAndInteraction(const dlrm_deploy_bag_interaction* from, const KernelPath& path,
                           int threads) {
  if (from == nullptr || from->struct_size < sizeof(dlrm_deploy_bag_interaction)) {
    return std::string("struct_size is smaller than this library's dlrm_deploy_bag_interaction");
  }
  dlrm_deploy_embedding_bag c;
  BagCall call;
  if (Error error = CopyBag(from->bag, &c)) return error;
  if (Error error = CheckBag(c)) return error;
  if (Error error = ReadBag(c, &call)) return error;
  if (c.pooled != nullptr) {
    if (Error error = CheckPooled(c, call)) return error;
  }
  if (from->batch != call.batch) {
    return "dense has " + std::to_string(from->batch) + " samples, expected that of the bags, " +
           std::to_string(call.batch);
  }
  InteractionShape shape;
  if (Error error =
          MakeInteractionShape(call.bag.slots(), c.width, from->self_interaction != 0, &shape)) {
    return error;
  }
  const int64_t needed = CountFloats(call.batch, shape.output_width, 1);
  if (needed < 0 || needed > from->interactions_floats) {
    return "interactions holds " + std::to_string(from->interactions_floats) +
           " floats, expected at least " + std::to_string(call.batch) + " x " +
           std::to_string(shape.output_width);
  }
  if (needed > 0 && (from->interactions == nullptr || (c.width > 0 && from->dense == nullptr))) {
    return std::string("dense or interactions is NULL");
  }
  return RunBagInteraction(call.bag, call.inputs, shape, from->dense, call.batch, path,
                           ThreadRunner(threads), from->interactions, c.pooled);
}

Error RunInteraction(const dlrm_deploy_dot_interaction* c, const KernelPath& path, int threads) {
  if (c == nullptr || c->struct_size < sizeof(dlrm_deploy_dot_interaction)) {
    return std::string("struct_size is smaller than this library's dlrm_deploy_dot_interaction");
  }
  InteractionShape shape;
  if (Error error =
          MakeInteractionShape(c->num_slots, c->width, c->self_interaction != 0, &shape)) {
    return error;
  }
  const int64_t inputs = CountFloats(c->batch, shape.vectors, c->width);
  const int64_t needed = CountFloats(c->batch, shape.output_width, 1);
  if (inputs < 0 || needed < 0 || needed > c->interactions_floats) {
    return "interactions holds " + std::to_string(c->interactions_floats) +
           " floats, expected at least " + std::to_string(c->batch) + " x " +
           std::to_string(shape.output_width);
  }
  if (needed > 0 && (c->interactions == nullptr || (c->width > 0 && c->dense == nullptr) ||
                     (c->width > 0 && c->num_slots > 0 && c->embeddings == nullptr))) {
    return std::string("dense, embeddings or interactions is NULL");
  }
  return RunDotInteraction(shape, c->dense, c->embeddings, c->batch, path, ThreadRunner(threads),
                           c->interactions);
}

}  // namespace
}  // namespace dlrm_deploy

using namespace dlrm_deploy;

const char* dlrm_deploy_last_error(void) { return LastError().c_str(); }

const char* dlrm_deploy_kernel_path(void) {
  const KernelPath* path = nullptr;
  const auto choose = [&] { return ChoosePath(nullptr, &path); };
  return Guarded(choose) == DLRM_DEPLOY_OK ? path->name : nullptr;
}

const char* dlrm_deploy_kernel_paths(void) {
  const char* text = nullptr;
  Guarded([&] {
    static const std::string* const names = [] {
      auto* joined = new std::string;
      for (const KernelPath& path : AllKernelPaths()) {
        if (!path.supported()) continue;
        if (!joined->empty()) *joined += ",";
        *joined += path.name;
      }
      return joined;
    }();
    text = names->c_str();
    return DLRM_DEPLOY_OK;
  });
  return text;
}

dlrm_deploy_status dlrm_deploy_run_embedding_bag(const dlrm_deploy_embedding_bag* bag,
                                                 const char* path_name, int32_t threads) {
  return Guarded([&] {
    const KernelPath* path = nullptr;
    if (const auto status = ChoosePath(path_name, &path)) return status;
    Error error = CheckThreads(threads);
    if (!error) error = RunBag(bag, *path, threads);
    return error ? Fail(DLRM_DEPLOY_BAD_INPUT, *error) : DLRM_DEPLOY_OK;
  });
}

dlrm_deploy_status dlrm_deploy_run_dot_interaction(const dlrm_deploy_dot_interaction* interaction,
                                                   const char* path_name, int32_t threads) {
  return Guarded([&] {
    const KernelPath* path = nullptr;
    if (const auto status = ChoosePath(path_name, &path)) return status;
    Error error = CheckThreads(threads);
    if (!error) error = RunInteraction(interaction, *path, threads);
    return error ? Fail(DLRM_DEPLOY_BAD_INPUT, *error) : DLRM_DEPLOY_OK;
  });
}

dlrm_deploy_status dlrm_deploy_run_bag_interaction(const dlrm_deploy_bag_interaction* interaction,
                                                   const char* path_name, int32_t threads) {
  return Guarded([&] {
    const KernelPath* path = nullptr;
    if (const auto status = ChoosePath(path_name, &path)) return status;
    Error error = CheckThreads(threads);
    if (!error) error = RunBagAndInteraction(interaction, *path, threads);
    return error ? Fail(DLRM_DEPLOY_BAD_INPUT, *error) : DLRM_DEPLOY_OK;
  });
}

dlrm_deploy_status dlrm_deploy_calibrate_fma(int32_t threads, double duration_ms, double* result) {
  return Guarded([&] {
    if (Error error = CheckCalibration(threads, duration_ms, result)) {
      return Fail(DLRM_DEPLOY_BAD_INPUT, *error);
    }
    const KernelPath* path = nullptr;
    if (const auto status = ChoosePath(nullptr, &path)) return status;
    *result = MeasureFmaGflops(*path, threads, duration_ms);
    return DLRM_DEPLOY_OK;
  });
}

dlrm_deploy_status dlrm_deploy_calibrate_read(int64_t bytes, int32_t threads, double duration_ms,
                                              double* result) {
  return Guarded([&] {
    Error error = CheckCalibration(threads, duration_ms, result);
    if (!error && bytes / 4096 < threads) {
      error = "bytes is " + std::to_string(bytes) + ", expected at least 4096 a thread";
    }
    if (error) return Fail(DLRM_DEPLOY_BAD_INPUT, *error);
    *result = MeasureReadGbps(bytes, threads, duration_ms);
    return DLRM_DEPLOY_OK;
  });
}

dlrm_deploy_status dlrm_deploy_calibrate_gather(int64_t row_bytes, int64_t table_bytes,
                                                int32_t threads, double duration_ms,
                                                double* result) {
  return Guarded([&] {
    Error error = CheckCalibration(threads, duration_ms, result);
    if (!error && (row_bytes < 4 || row_bytes % 4 != 0 || table_bytes < row_bytes)) {
      error = "row_bytes is " + std::to_string(row_bytes) +
              ", expected a multiple of 4 that is at most table_bytes, " +
              std::to_string(table_bytes);
    }
    if (error) return Fail(DLRM_DEPLOY_BAD_INPUT, *error);
    const KernelPath* path = nullptr;
    if (const auto status = ChoosePath(nullptr, &path)) return status;
    *result = MeasureGatherGbps(*path, row_bytes, table_bytes, threads, duration_ms);
    return DLRM_DEPLOY_OK;
  });
}
