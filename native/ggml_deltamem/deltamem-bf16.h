// Prompts multiplied in BF16: products of many tokens with quantised weights, where the processor multiplies BF16.
//
// ggml multiplies weights in Q4_0 to Q8_0 and Q6_K as integers, block by block. Where the processor has AVX512-BF16, it is
// faster to unpack 32 rows of weights to BF16, once for all tokens of the micro-batch, and to multiply these: a product
// then costs as much as with weights in BF16, and keeps more of the activations (8 bits of mantissa each, where ggml gives
// a block of 32 of them 8 bits and one scale). Weights in BF16 gain a quarter. Other K-quants gain nothing: ggml has tiles.
//
// Only for weights in the buffer type below, so that each model chooses when it is loaded. They stay as they are in the
// file; a product of fewer than eight tokens is ggml's own. An adapter's weights lie there where some of its model's do,
// and its corrections by weights in Q8_0 are multiplied likewise.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct deltamem_product_args;

// Host memory, named DELTAMEM_BF16. In ggml-base.
GGML_API ggml_backend_buffer_type_t ggml_backend_deltamem_bf16_buffer_type(void);

// Bytes of the work buffer that n_tasks threads need for a product; 0: ggml computes it.
size_t ggml_cpu_deltamem_bf16_size(int n_tasks, const struct ggml_tensor * dst);

// Computes a GGML_OP_MUL_MAT; false: nothing was done, ggml computes it. All threads call it.
bool ggml_cpu_deltamem_bf16(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Computes two GGML_OP_MUL_MAT of the same input together: it is converted once, and threads wait once. Results are those of
// ggml_cpu_deltamem_bf16; false: nothing was done. All threads call it.
bool ggml_cpu_deltamem_bf16_two(const struct ggml_compute_params * params, struct ggml_tensor * first,
                                struct ggml_tensor * second);

// Whether ggml_cpu_deltamem_bf16_correct computes a correction.
bool ggml_cpu_deltamem_bf16_takes(const struct ggml_compute_params * params, const struct ggml_tensor * correction);

// Computes tokens [begin, end) of a correction by weights in Q8_0, [n_out][n_in] as args->weight, by the thread that calls
// it.
void ggml_cpu_deltamem_bf16_correct(const struct ggml_tensor * weight, const struct deltamem_product_args * args,
                                    int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
