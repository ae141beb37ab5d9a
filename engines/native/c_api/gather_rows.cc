// gather_rows.cc: the plain C function of dlrm_deploy/gather_rows.h. Nothing throws past this file.
#include "dlrm_deploy/gather_rows.h"

#include <cstdint>
#include <string>
#include <utility>

#include "c_api/checks.h"
#include "c_api/status.h"
#include "calibrate/gather_rows.h"

dlrm_deploy_status dlrm_deploy_calibrate_gather_rows(const void* table, int64_t table_bytes,
                                                     int64_t row_bytes, const uint32_t* rows,
                                                     int64_t count, int32_t threads,
                                                     double duration_ms, double* result) {
  using dlrm_deploy::Fail;
  return dlrm_deploy::Guarded([&] {
    const auto bad = [](std::string message) {
      return Fail(DLRM_DEPLOY_BAD_INPUT, std::move(message));
    };
    if (dlrm_deploy::Error error = dlrm_deploy::CheckCalibration(threads, duration_ms, result)) {
      return bad(*error);
    }
    if (table == nullptr || rows == nullptr) return bad("table or rows is NULL");
    if (count < 1) return bad("count is " + std::to_string(count) + ", expected at least 1");
    if (row_bytes < 1 || table_bytes < row_bytes) {
      return bad("row_bytes is " + std::to_string(row_bytes) + ", expected 1 to table_bytes, " +
                 std::to_string(table_bytes));
    }
    const int64_t table_rows = table_bytes / row_bytes;
    for (int64_t i = 0; i < count; ++i) {
      if (int64_t{rows[i]} >= table_rows) {
        return bad("row " + std::to_string(rows[i]) + " at position " + std::to_string(i) +
                   " is outside [0, " + std::to_string(table_rows) + ")");
      }
    }
    *result =
        dlrm_deploy::MeasureGatherRowsGbps(table, row_bytes, rows, count, threads, duration_ms);
    return DLRM_DEPLOY_OK;
  });
}
