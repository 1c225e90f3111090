// CPU forward of GGML_OP_DELTAMEM, called by ggml-cpu's dispatch.
#pragma once

#include "ggml-deltamem.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;
struct ggml_cpu_deltamem_fusion; // deltamem-known.h

void ggml_compute_forward_deltamem(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Computes node i of the graph together with the nodes that follow it, where that saves a synchronisation of all
// threads, or a pass over memory:
//     product, packed projection               up to four tokens: the projection only, ahead of the product
//     packed projection, read [, correction [, norm of its rows, weights]]
//                                              up to four tokens, or more by AMX; with the correction, one token
//     product, product of the same input       as ggml_cpu_deltamem_bf16_two
//     correction [, addition] [, norm of its rows, weights]
//                                              a norm: more than four tokens
// as fusions[i] says. Returns the number of nodes besides i that are done, or 0 if node i itself is still to be
// computed.
int ggml_cpu_deltamem_fuse(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph,
                           const struct ggml_cpu_deltamem_fusion * fusions, int i);

// Whether threads wait at OpenMP's barrier instead of deltamem-wait.h's: if the environment said how OpenMP waits at the
// first call. OpenMP reads it when it is loaded.
bool ggml_cpu_deltamem_omp_waits(void);

#ifdef __cplusplus
}
#endif
