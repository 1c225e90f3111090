// RMS norms on a CPU with AVX-512: bit for bit what ggml computes, 16 rows at a time.
//
// ggml adds the squares of a row in double, one after the other, and each addition waits for the one before. The sums of 16
// rows do not wait for each other. Not for rows that are no whole vectors: these stay ggml's.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// Computes a GGML_OP_RMS_NORM, and the multiplication by weights that follows it unless `mul` is NULL; false: nothing was
// done, ggml computes it. All threads call it.
bool ggml_cpu_deltamem_norm(const struct ggml_compute_params * params, struct ggml_tensor * norm,
                            struct ggml_tensor * mul);

// Whether it would compute these; mul may be NULL.
bool ggml_cpu_deltamem_takes_norm(const struct ggml_tensor * norm, const struct ggml_tensor * mul);

// Rows [begin, end) of those that ggml_cpu_deltamem_takes_norm takes, by the thread that calls it.
void ggml_cpu_deltamem_norm_rows(const struct ggml_tensor * norm, struct ggml_tensor * mul, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
