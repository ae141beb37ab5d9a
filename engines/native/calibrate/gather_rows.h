// gather_rows.h: how fast given rows of a table can be read at this moment. May throw
// std::bad_alloc or std::system_error.
#ifndef DLRM_DEPLOY_CALIBRATE_GATHER_ROWS_H_
#define DLRM_DEPLOY_CALIBRATE_GATHER_ROWS_H_

#include <cstdint>

namespace dlrm_deploy {

// The arguments are those of dlrm_deploy_calibrate_gather_rows; every row has to be inside the
// table.
double MeasureGatherRowsGbps(const void* table, int64_t row_bytes, const uint32_t* rows,
                             int64_t count, int threads, double duration_ms);

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_CALIBRATE_GATHER_ROWS_H_
