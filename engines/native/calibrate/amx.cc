#include "calibrate/amx.h"

#include "calibrate/amx_loops.h"
#include "calibrate/measure_rate.h"
#include "kernels/amx_support.h"

namespace dlrm_deploy {

#if defined(DLRM_DEPLOY_HAS_AMX)
namespace {

constexpr int64_t kIterations = 2000;  // about 50 microseconds

}  // namespace

bool CanMeasureAmx() { return SupportsAmx(); }

double MeasureAmxBf16Gflops(int threads, double duration_ms) {
  return MeasureRate(threads, duration_ms, [](int) { return Bf16TileLoop(kIterations); }) / 1e9;
}

double MeasureAmxInt8Gops(int threads, double duration_ms) {
  return MeasureRate(threads, duration_ms, [](int) { return Int8TileLoop(kIterations); }) / 1e9;
}
#else
bool CanMeasureAmx() { return false; }
double MeasureAmxBf16Gflops(int, double) { return 0.0; }
double MeasureAmxInt8Gops(int, double) { return 0.0; }
#endif

}  // namespace dlrm_deploy
