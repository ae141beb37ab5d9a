/* dlrm_deploy/trace.h: stack distances of traffic, as in section 4 of the DLRM paper. Plain C.
 *
 * A stack holds every line (row of a table, say) accessed so far, the latest on top. The distance
 * of an access is the place of its line in the stack, counted from the top and from 1: 1 is an
 * immediate repeat. It is 0 where the line was not accessed before. Either direction takes O(log n)
 * an access.
 *
 * Ownership, errors and versions: as in dlrm_deploy/ops.h. What dlrm_deploy_stack_create() gives is
 * yours until dlrm_deploy_stack_free(). Threads: one call at a time for each stack. */
#ifndef DLRM_DEPLOY_TRACE_H_
#define DLRM_DEPLOY_TRACE_H_

#include "dlrm_deploy/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* distances[i] of the access to lines[i], for i in [0, count). Lines are in [0, num_lines). */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_stack_distances(const int64_t* lines, int64_t count,
                                                               int64_t num_lines,
                                                               int64_t* distances);

typedef struct dlrm_deploy_stack dlrm_deploy_stack;

/* A stack for a trace over the lines 0 .. lines - 1, at most 2^31 of them; 9 bytes of memory a
 * line. `warm` 1: all lines are on the stack from the beginning, line 0 at the bottom. `warm` 0: it
 * is empty. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_stack_create(int64_t lines, int32_t warm,
                                                            dlrm_deploy_stack** stack);

/* Goes on with the trace: writes the lines that are accessed with these distances. 0, or a distance
 * greater than the number of lines on the stack, accesses the next new line; where all have been
 * accessed, the line at the bottom. `effective` (or NULL) gets the distances as they came out:
 * those that dlrm_deploy_stack_distances() gives back, but for the first access to each line of a
 * warm stack. A negative distance fails, and the stack stays as it was. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_stack_replay(dlrm_deploy_stack* stack,
                                                            const int64_t* distances, int64_t count,
                                                            int64_t* lines, int64_t* effective);

/* NULL does nothing. */
DLRM_DEPLOY_API void dlrm_deploy_stack_free(dlrm_deploy_stack* stack);

#ifdef __cplusplus
}
#endif

#endif /* DLRM_DEPLOY_TRACE_H_ */
