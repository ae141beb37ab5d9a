// mlp.cc: the plain C functions of dlrm_deploy/mlp.h. Nothing throws past this file.
#include "dlrm_deploy/mlp.h"

#include <string>
#include <vector>

#include "c_api/checks.h"
#include "c_api/status.h"
#include "c_api/thread_runner.h"
#include "calibrate/amx.h"
#include "kernels/dispatch.h"
#include "kernels/int8_mlp.h"
#include "kernels/mlp.h"

namespace dlrm_deploy {
namespace {

constexpr int64_t kMostLayers = 1024;

Error MakeLayer(const dlrm_deploy_mlp& c, int64_t l, MlpWeights* layer) {
  if (c.weights[l] == nullptr || c.biases[l] == nullptr) {
    return "weights or biases of layer " + std::to_string(l) + " is NULL";
  }
  *layer = {c.weights[l], c.biases[l], c.widths[l + 1]};
  return {};
}

Error MakeLayer(const dlrm_deploy_mlp_int8& c, int64_t l, Int8Weights* layer) {
  if (c.scales == nullptr) return std::string("scales is NULL");
  if (c.weights[l] == nullptr || c.scales[l] == nullptr || c.biases[l] == nullptr) {
    return "weights, scales or biases of layer " + std::to_string(l) + " is NULL";
  }
  *layer = {c.weights[l], c.scales[l], c.biases[l], c.widths[l + 1]};
  return {};
}

// One of the operators: its C struct, the class that packs it, and what that takes for a layer.
template <class Call, class Packed, class Layer>
Error RunCall(const Call* c, const char* struct_name, const KernelPath& path, int threads) {
  if (c == nullptr || c->struct_size < sizeof(Call)) {
    return std::string("struct_size is smaller than this library's ") + struct_name;
  }
  if (c->num_layers < 1 || c->num_layers > kMostLayers) {
    return "num_layers is " + std::to_string(c->num_layers) + ", expected 1 to " +
           std::to_string(kMostLayers);
  }
  if (c->widths == nullptr || c->weights == nullptr || c->biases == nullptr) {
    return std::string("widths, weights or biases is NULL");
  }
  std::vector<Layer> layers(static_cast<size_t>(c->num_layers));
  for (int64_t l = 0; l < c->num_layers; ++l) {
    if (Error error = MakeLayer(*c, l, &layers[static_cast<size_t>(l)])) return error;
  }
  Packed mlp;
  if (Error error = Packed::Create(c->widths[0], layers, c->relu_last != 0, &mlp)) return error;
  if (c->batch < 0) return "batch is " + std::to_string(c->batch) + ", expected at least 0";
  const int64_t needed = CountFloats(c->batch, mlp.outputs(), 1);
  if (needed < 0 || needed > c->y_floats || CountFloats(c->batch, mlp.inputs(), 1) < 0) {
    return "y holds " + std::to_string(c->y_floats) + " floats, expected at least " +
           std::to_string(c->batch) + " x " + std::to_string(mlp.outputs());
  }
  if (c->batch > 0 && (c->x == nullptr || c->y == nullptr)) return std::string("x or y is NULL");
  return mlp.Run(path, c->x, c->batch, ThreadRunner(threads), c->y);
}

// Runs `call(path)`, which gives an Error, on the kernel path of that name.
template <class Body>
dlrm_deploy_status OnPath(const char* path_name, int32_t threads, const Body& call) {
  return Guarded([&] {
    std::string no_path;
    const KernelPath* path = path_name != nullptr ? ChooseKernelPath(path_name, &no_path)
                                                  : ChooseKernelPathFromEnvironment(&no_path);
    if (path == nullptr) return Fail(DLRM_DEPLOY_NO_PATH, no_path);
    Error error = CheckThreads(threads);
    if (!error) error = call(*path);
    return error ? Fail(DLRM_DEPLOY_BAD_INPUT, *error) : DLRM_DEPLOY_OK;
  });
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
  return OnPath(path_name, threads, [&](const KernelPath& path) {
    return RunCall<dlrm_deploy_mlp, PackedMlp, MlpWeights>(mlp, "dlrm_deploy_mlp", path, threads);
  });
}

dlrm_deploy_status dlrm_deploy_run_mlp_int8(const dlrm_deploy_mlp_int8* mlp, const char* path_name,
                                            int32_t threads) {
  return OnPath(path_name, threads, [&](const KernelPath& path) {
    return RunCall<dlrm_deploy_mlp_int8, PackedInt8Mlp, Int8Weights>(mlp, "dlrm_deploy_mlp_int8",
                                                                     path, threads);
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
