/* mlp.h: plain C, the operators Mlp and MlpInt8 without ONNX Runtime, and what the matrix unit can
 * do. Ownership, errors, threads and versions are as ops.h says. */
#ifndef DLRM_DEPLOY_MLP_H_
#define DLRM_DEPLOY_MLP_H_

#include "dlrm_deploy/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Mlp: inputs and attribute as in docs/operators.md. Weights are packed in every call: this is for
 * tests, not for speed. */
typedef struct dlrm_deploy_mlp {
  uint32_t struct_size; /* sizeof(dlrm_deploy_mlp) */
  int32_t relu_last;    /* 0: no ReLU behind the last layer */
  int64_t num_layers;
  const int64_t* widths;          /* [num_layers + 1]: inputs, then the outputs of each layer */
  const uint16_t* const* weights; /* [num_layers] of [widths[l + 1], widths[l]] bfloat16 */
  const float* const* biases;     /* [num_layers] of [widths[l + 1]] */
  const float* x;                 /* [batch, widths[0]] */
  int64_t batch;
  float* y;         /* [batch, widths[num_layers]] */
  int64_t y_floats; /* how many floats y holds */
} dlrm_deploy_mlp;

/* MlpInt8, likewise. */
typedef struct dlrm_deploy_mlp_int8 {
  uint32_t struct_size; /* sizeof(dlrm_deploy_mlp_int8) */
  int32_t relu_last;    /* 0: no ReLU behind the last layer */
  int64_t num_layers;
  const int64_t* widths;        /* [num_layers + 1]: inputs, then the outputs of each layer */
  const int8_t* const* weights; /* [num_layers] of [widths[l + 1], widths[l]] */
  const float* const* scales;   /* [num_layers] of [widths[l + 1]] */
  const float* const* biases;   /* [num_layers] of [widths[l + 1]] */
  const float* x;               /* [batch, widths[0]] */
  int64_t batch;
  float* y;         /* [batch, widths[num_layers]] */
  int64_t y_floats; /* how many floats y holds */
} dlrm_deploy_mlp_int8;

/* `path` is a name of dlrm_deploy_kernel_paths(), or NULL for the one that operators use. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_run_mlp(const dlrm_deploy_mlp* mlp, const char* path,
                                                       int32_t threads);
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_run_mlp_int8(const dlrm_deploy_mlp_int8* mlp,
                                                            const char* path, int32_t threads);

/* Products of AMX tiles that stay in registers: bf16 in GFLOP/s, int8 in GOP/s (two a
 * multiply-add). DLRM_DEPLOY_NO_PATH where the CPU has no AMX or the system does not let this
 * process use it. */
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_calibrate_amx_bf16(int32_t threads,
                                                                  double duration_ms,
                                                                  double* result);
DLRM_DEPLOY_API dlrm_deploy_status dlrm_deploy_calibrate_amx_int8(int32_t threads,
                                                                  double duration_ms,
                                                                  double* result);

#ifdef __cplusplus
}
#endif

#endif /* DLRM_DEPLOY_MLP_H_ */
