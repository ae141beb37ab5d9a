/* dlrm_deploy/ops.h: what libdlrm_deploy_ops.so exports. Plain C.
 *
 * RegisterCustomOps is for ONNX Runtime: name this library to register_custom_ops_library() and the
 * operators of the domain "dlrm_deploy" run on its kernels. The rest is for tests and benchmarks:
 * it runs the same kernels and measures the machine without ONNX Runtime.
 *
 * Ownership: buffers you pass in stay yours, and no pointer to them is kept after a call returns.
 *            Strings returned are the library's; those of dlrm_deploy_last_error() live until this
 *            thread's next call, all others as long as the library.
 * Errors:    calls return dlrm_deploy_status. None throws, aborts or prints. On an error the
 *            content of the output buffers is unspecified, and dlrm_deploy_last_error() says why.
 * Threads:   any call may run on any thread. Calls that ask for more than one thread start the
 *            others themselves and join them before they return.
 * Versions:  structs grow only at the end; set struct_size to sizeof so that older callers keep
 *            working. */
#ifndef DLRM_DEPLOY_OPS_H_
#define DLRM_DEPLOY_OPS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define DLRM_DEPLOY_API __attribute__((visibility("default")))
#else
#define DLRM_DEPLOY_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct OrtSessionOptions;
struct OrtApiBase;
struct OrtStatus;

/* Called by ONNX Runtime. Fails when DLRM_DEPLOY_KERNEL names a path this CPU cannot run. */
DLRM_DEPLOY_API struct OrtStatus* RegisterCustomOps(struct OrtSessionOptions* options,
                                                    const struct OrtApiBase* api);

typedef enum dlrm_deploy_status {
  DLRM_DEPLOY_OK = 0,
  DLRM_DEPLOY_BAD_INPUT = 1, /* an argument breaks a rule below or of docs/operators.md */
  DLRM_DEPLOY_NO_PATH = 2,   /* the kernel path is unknown or this CPU lacks it */
  DLRM_DEPLOY_FAILED = 3     /* out of memory or threads */
} dlrm_deploy_status;

/* This thread's latest error, or "" if it has had none. */
DLRM_DEPLOY_API const char* dlrm_deploy_last_error(void);

/* The kernel path that the operators use: the one DLRM_DEPLOY_KERNEL names, else the fastest this
 * CPU supports. NULL when the variable names one that cannot be used. */
DLRM_DEPLOY_API const char* dlrm_deploy_kernel_path(void);

/* The paths this CPU supports, fastest first, joined by commas, e.g. "avx512,avx2,scalar". NULL
 * when memory ran out. */
DLRM_DEPLOY_API const char* dlrm_deploy_kernel_paths(void);

/* TableBatchedEmbeddingBag: inputs and attributes as in docs/operators.md. F features, T slots. */
typedef struct dlrm_deploy_embedding_bag {
  uint32_t struct_size; /* sizeof(dlrm_deploy_embedding_bag) */
  int32_t id_bytes;     /* of each index and offset: 4 or 8, signed */
  const float* weights; /* [total_rows, width] */
  int64_t total_rows;
  int64_t width;
  const void* indices; /* [num_indices] */
  int64_t num_indices;
  const void* offsets; /* [num_offsets]; NULL in the fixed form */
  int64_t num_offsets;
  const float* per_sample_weights; /* [num_per_sample_weights], or NULL */
  int64_t num_per_sample_weights;
  int64_t num_features;           /* F */
  int64_t num_slots;              /* T */
  const int64_t* features;        /* [T] */
  const int64_t* row_starts;      /* [T] */
  const int64_t* rows;            /* [T] */
  const int64_t* mean;            /* [T] */
  const int64_t* pooling_factors; /* [F]; NULL in the CSR form */
  const char* index_policy;       /* NULL: "error" */
  const char* feature_names;      /* F names joined by newlines, or NULL */
  float* pooled;                  /* output [B, T, width] */
  int64_t pooled_floats;          /* size of the buffer `pooled`, at least B * T * width */
  const int64_t* ids;             /* [T], or NULL: rows */
  const int64_t* moduli;          /* [T], or NULL: 0 */
  const int64_t* divisors;        /* [T], or NULL: 1 */
  const int64_t* divisions;       /* [T], or NULL: 0 */
  /* Tables in other formats. A slot's row_starts count rows of its format's matrix. */
  const int64_t* formats;   /* [T]: 0 fp32, 1 fp16, 2 bf16, 3 int8, 4 int4; or NULL: 0 */
  const void* weights_fp16; /* [rows_fp16, width] float16 */
  int64_t rows_fp16;
  const void* weights_bf16; /* [rows_bf16, width] bfloat16 */
  int64_t rows_bf16;
  const void* weights_int8; /* [rows_int8, width + 4] bytes: codes, scale, bias */
  int64_t rows_int8;
  const void* weights_int4; /* [rows_int4, (width + 1) / 2 + 4] bytes */
  int64_t rows_int4;
} dlrm_deploy_embedding_bag;

/* Runs it once on `threads` threads. `path` names a kernel path; NULL is the one in use. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_run_embedding_bag(
    const dlrm_deploy_embedding_bag* bag, const char* path, int32_t threads);

/* DotInteraction. */
typedef struct dlrm_deploy_dot_interaction {
  uint32_t struct_size;     /* sizeof(dlrm_deploy_dot_interaction) */
  int32_t self_interaction; /* 0 or 1 */
  const float* dense;       /* [batch, width] */
  const float* embeddings;  /* [batch, num_slots, width] */
  int64_t batch;
  int64_t num_slots;
  int64_t width;
  float* interactions;         /* output [batch, width + P] */
  int64_t interactions_floats; /* size of the buffer `interactions` */
} dlrm_deploy_dot_interaction;

DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_run_dot_interaction(
    const dlrm_deploy_dot_interaction* interaction, const char* path, int32_t threads);

/* EmbeddingBagDotInteraction. */
typedef struct dlrm_deploy_bag_interaction {
  uint32_t struct_size;                 /* sizeof(dlrm_deploy_bag_interaction) */
  int32_t self_interaction;             /* 0 or 1 */
  const dlrm_deploy_embedding_bag* bag; /* its `pooled` may be NULL: then it is not written */
  const float* dense;                   /* [batch, bag->width] */
  int64_t batch;                        /* samples in `dense`, as many as the bags have */
  float* interactions;                  /* output [batch, width + P] */
  int64_t interactions_floats;          /* size of the buffer `interactions` */
} dlrm_deploy_bag_interaction;

DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_run_bag_interaction(
    const dlrm_deploy_bag_interaction* interaction, const char* path, int32_t threads);

/* Calibration: what this machine can do at the moment, to be stated beside every measurement. Each
 * takes about `duration_ms` milliseconds plus filling its buffer, and writes one number to
 * `result`. Memory is freed before the call returns. */

/* fp32 fused multiply-adds from registers, in GFLOP/s (two a multiply-add), widest vectors. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_calibrate_fma(int32_t threads, double duration_ms,
                                                             double* result);
/* Reading a buffer of `bytes` from end to end, in GB/s (10^9). Choose it larger than the caches. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_calibrate_read(int64_t bytes, int32_t threads,
                                                              double duration_ms, double* result);
/* Reading rows of `row_bytes` (a multiple of 4) at random places of a table of `table_bytes`, with
 * prefetch, in GB/s of row bytes: the floor of an embedding bag. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_calibrate_gather(int64_t row_bytes,
                                                                int64_t table_bytes,
                                                                int32_t threads, double duration_ms,
                                                                double* result);

#ifdef __cplusplus
}
#endif

#endif /* DLRM_DEPLOY_OPS_H_ */
