// CPU forward of GGML_OP_DELTAMEM, called by ggml-cpu's dispatch.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;
struct ggml_tensor;

void ggml_compute_forward_deltamem(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Computes node i of the graph together with the next one where that spares a synchronisation of all threads: a packed
// projection of a few tokens with its read, a correction with the addition that follows. Returns the nodes computed beside
// i: 1, or 0 if nothing was done.
int ggml_cpu_deltamem_fuse(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph, int i);

#ifdef __cplusplus
}
#endif
