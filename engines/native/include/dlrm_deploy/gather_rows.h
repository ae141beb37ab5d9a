/* gather_rows.h: plain C, a calibration beside those of ops.h: reading given rows of a given table.
 *
 * What embedding bags can do at best depends on which rows they read: rows of small tables and hot
 * rows come from caches, those of large tables cost a miss in the TLB as well. So the benchmark
 * gives the very rows of its batches, and the mapped table of the bundle. */
#ifndef DLRM_DEPLOY_GATHER_ROWS_H_
#define DLRM_DEPLOY_GATHER_ROWS_H_

#include "dlrm_deploy/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Reads the rows rows[0 .. count), of `row_bytes` each, of a table of `table_bytes` that begins at
 * `table`, again and again for about `duration_ms`, each thread its own share; writes GB/s (10^9)
 * of row bytes to `result`. Fails where a row lies outside the table. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_calibrate_gather_rows(
    const void* table, int64_t table_bytes, int64_t row_bytes, const uint32_t* rows, int64_t count,
    int32_t threads, double duration_ms, double* result);

#ifdef __cplusplus
}
#endif

#endif /* DLRM_DEPLOY_GATHER_ROWS_H_ */
