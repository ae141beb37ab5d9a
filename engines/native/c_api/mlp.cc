// mlp.cc: the plain C functions of dlrm_deploy/mlp.h. Nothing throws past this file.
#include "dlrm_deploy/mlp.h"

#include <string>
#include <vector>

#include "c_api/checks.h"
#include "c_api/status.h"
#include "c_api/thread_runner.h"
#include "calibrate/amx.h"
#include "kernels/dispatch.h"
#include "kernels/mlp.h"

namespace dlrm_deploy {
namespace {

constexpr int64_t kMostLayers = 1024;

Error RunCall(const dlrm_deploy_mlp* c, const KernelPath& path, int threads) {
  if (c == nullptr || c->struct_size < sizeof(dlrm_deploy_mlp)) {
    return std::string("struct_size is smaller than this library's dlrm_deploy_mlp");
  }
  if (c->num_layers < 1 || c->num_layers > kMostLayers) {
    return "num_layers is " + std::to_string(c->num_layers) + ", expected 1 to " +
           std::to_string(kMostLayers);
  }
  if (c->widths == nullptr || c->weights == nullptr || c->biases == nullptr) {
    return std::string("widths, weights or biases is NULL");
  }
  std::vector<MlpWeights> layers;
  for (int64_t l = 0; l < c->num_layers; ++l) {
    if (c->weights[l] == nullptr || c->biases[l] == nullptr) {
      return "weights or biases of layer " + std::to_string(l) + " is NULL";
    }
    layers.push_back({c->weights[l], c->biases[l], c->widths[l + 1]});
  }
  PackedMlp mlp;
  if (Error error = PackedMlp::Create(c->widths[0], layers, c->relu_last != 0, &mlp)) return error;
  if (c->batch < 0) return "batch is " + std::to_string(c->batch) + ", expected at least 0";
  const int64_t needed = CountFloats(c->batch, mlp.outputs(), 1);
  if (needed < 0 || needed > c->y_floats || CountFloats(c->batch, mlp.inputs(), 1) < 0) {
    return "y holds " + std::to_string(c->y_floats) + " floats, expected at least " +
           std::to_string(c->batch) + " x " + std::to_string(mlp.outputs());
  }
  if (c->batch > 0 && (c->x == nullptr || c->y == nullptr)) return std::string("x or y is NULL");
  return mlp.Run(path, c->x, c->batch, ThreadRunner(threads), c->y);
}

dlrm_deploy_status CalibrateAmx(double (*measure)(int, double), int32_t threads, double duration_ms,
                                double* result) {
  return Guarded([&] {
    if (Error error = CheckCalibration(threads, duration_ms, result)) {
      return Fail(DLRM_DEPLOY_BAD_INPUT, *error);
    }
    if (!CanMeasureAmx()) {
      return Fail(DLRM_DEPLOY_NO_PATH,
                  "this CPU has no AMX with bf16 and int8, or the system does not grant it");
    }
    *result = measure(threads, duration_ms);
    return DLRM_DEPLOY_OK;
  });
}

}  // namespace
}  // namespace dlrm_deploy

using namespace dlrm_deploy;

dlrm_deploy_status dlrm_deploy_run_mlp(const dlrm_deploy_mlp* mlp, const char* path_name,
                                       int32_t threads) {
  return Guarded([&] {
    std::string no_path;
    const KernelPath* path = path_name != nullptr ? ChooseKernelPath(path_name, &no_path)
                                                  : ChooseKernelPathFromEnvironment(&no_path);
    if (path == nullptr) return Fail(DLRM_DEPLOY_NO_PATH, no_path);
    Error error = CheckThreads(threads);
    if (!error) error = RunCall(mlp, *path, threads);
    return error ? Fail(DLRM_DEPLOY_BAD_INPUT, *error) : DLRM_DEPLOY_OK;
  });
}

dlrm_deploy_status dlrm_deploy_calibrate_amx_bf16(int32_t threads, double duration_ms,
                                                  double* result) {
  return CalibrateAmx(MeasureAmxBf16Gflops, threads, duration_ms, result);
}

dlrm_deploy_status dlrm_deploy_calibrate_amx_int8(int32_t threads, double duration_ms,
                                                  double* result) {
  return CalibrateAmx(MeasureAmxInt8Gops, threads, duration_ms, result);
}
