// calibrate.h: what the machine can do at this moment, measured with the kernels' own loops.
// Units and arguments are those of dlrm_deploy/ops.h. May throw std::bad_alloc or
// std::system_error.
#ifndef DLRM_DEPLOY_CALIBRATE_CALIBRATE_H_
#define DLRM_DEPLOY_CALIBRATE_CALIBRATE_H_

#include <cstdint>

#include "kernels/dispatch.h"

namespace dlrm_deploy {

double MeasureFmaGflops(const KernelPath& path, int threads, double duration_ms);
double MeasureReadGbps(int64_t bytes, int threads, double duration_ms);
double MeasureGatherGbps(const KernelPath& path, int64_t row_bytes, int64_t table_bytes,
                         int threads, double duration_ms);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_CALIBRATE_CALIBRATE_H_
