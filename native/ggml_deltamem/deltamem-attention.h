// Flash attention of prompts on a CPU with AVX-512: bit for bit what ggml computes by its tiles, in half the time.
//
// ggml multiplies tiles of 64 queries by tiles of 64 keys in full vectors, but lays keys out for that, reads the mask, and
// takes maxima one value at a time, which together take as long as its products. This is the same computation with
// vectors for all of it. Not with ALiBi, a soft cap, attention sinks or heads that are no whole vectors: these stay ggml's.
#pragma once

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// Computes a GGML_OP_FLASH_ATTN_EXT in the work memory that ggml plans for it; false: nothing was done, ggml computes it.
// All threads call it.
bool ggml_cpu_deltamem_attention(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
