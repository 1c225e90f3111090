// CPU forward of GGML_OP_DELTAMEM, called by ggml-cpu's dispatch.
#pragma once

#include "ggml-deltamem.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;

void ggml_compute_forward_deltamem(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Whether ggml_cpu_deltamem_fuse has anything to do with a node.
static inline bool ggml_cpu_deltamem_fuses(const struct ggml_tensor * node) {
    return node->op == GGML_OP_DELTAMEM ||
           (node->op == GGML_OP_MUL_MAT && node->op_params[GGML_DELTAMEM_MUL_MAT_MARK] == GGML_OP_DELTAMEM);
}

// For those: computes node i of the graph together with the next ones where that spares a synchronisation of all threads: a packed
// projection of a few tokens with its read, of one token also with the correction that follows; a correction with the
// addition that follows. Returns the nodes computed beside i: 1 or 2, or 0 if nothing was done.
int ggml_cpu_deltamem_fuse(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph, int i);

// Whether threads wait for each other as OpenMP has it instead of as deltamem-wait.h has it: where the environment said how when
// this library was loaded, which is when OpenMP looks, too.
bool ggml_cpu_deltamem_omp_waits(void);

#ifdef __cplusplus
}
#endif
