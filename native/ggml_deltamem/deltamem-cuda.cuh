// GGML_OP_DELTAMEM in the CUDA backend: the functions that ggml-cuda.cu calls.
#pragma once

#include "ggml-deltamem.h"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    #define DELTAMEM_NO_CUDA // the kernels are untested there: the composite or the CPU computes the memory
#endif

struct ggml_backend_cuda_context;

#ifdef DELTAMEM_NO_CUDA

static inline bool ggml_cuda_deltamem_supports(const ggml_tensor *) {
    return false;
}

static inline bool ggml_cuda_op_deltamem(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

static inline int ggml_cuda_deltamem_fuse(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

#else

// whether the CUDA backend computes this node
bool ggml_cuda_deltamem_supports(const ggml_tensor * node);

// launches the kernel of a node; returns true
bool ggml_cuda_op_deltamem(ggml_backend_cuda_context & ctx, ggml_tensor * node);

// Computes node i, a packed projection, together with the read that follows it, if one launch can do both. Returns the
// number of nodes to skip: 1, or 0 if nothing was done.
int ggml_cuda_deltamem_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);

#endif
