// amx.h: what the matrix unit can do at this moment. Units and arguments are those of
// dlrm_deploy/mlp.h. May throw std::bad_alloc or std::system_error.
#ifndef DLRM_DEPLOY_CALIBRATE_AMX_H_
#define DLRM_DEPLOY_CALIBRATE_AMX_H_

namespace dlrm_deploy {

// Whether this build, CPU and operating system have AMX; else the others must not be called.
bool CanMeasureAmx();

double MeasureAmxBf16Gflops(int threads, double duration_ms);
double MeasureAmxInt8Gops(int threads, double duration_ms);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_CALIBRATE_AMX_H_
