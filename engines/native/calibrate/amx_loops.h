// amx_loops.h: the loops that amx.h times. Free of inline functions, see kernels/kernel_path.h.
#ifndef DLRM_DEPLOY_CALIBRATE_AMX_LOOPS_H_
#define DLRM_DEPLOY_CALIBRATE_AMX_LOOPS_H_

#include <stdint.h>

namespace dlrm_deploy {

// Steps of four independent tile products; they return how many operations they did.
double Bf16TileLoop(int64_t iterations);
double Int8TileLoop(int64_t iterations);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_CALIBRATE_AMX_LOOPS_H_
