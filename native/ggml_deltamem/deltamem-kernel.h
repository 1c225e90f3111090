// The CPU kernels of GGML_OP_DELTAMEM on raw pointers. They use nothing of ggml's internals, so that tests compile them
// for every instruction set and compare them with a naive reference.
#pragma once

#include "ggml-deltamem.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Whether sequence i of a plan stays within the tensors: its slot and those of its checkpoints below n_slots, its
// entries and the tokens that they name below n_tokens. Called before a plan is followed, which may come from an RPC
// client.
bool deltamem_sequence_fits(const int32_t * plan, int64_t n_seqs, int64_t i, int64_t n_tokens, int64_t n_slots);

struct deltamem_head_args {
    struct ggml_deltamem_params params;

    int32_t head; // which head of the projections, gates and reads

    const float * proj; // [n_tokens][n_proj], rows proj_stride floats apart
    size_t        proj_stride;
    const float * gate_bias; // [n_gates]
    float *       record;    // this head's record in the sequence's slot, updated in place
    float *       slots;     // this head's record in slot 0, for checkpoints; slots slot_stride floats apart
    size_t        slot_stride;
    float *       read; // [n_tokens][H*r], rows read_stride floats apart
    size_t        read_stride;

    const int32_t * entries; // [n_entries]{token, bits}, see ggml-deltamem.h
    int64_t         n_entries;
};

// The read of one head of one sequence, entry by entry. Uses less than 64 KiB of stack and allocates nothing.
void deltamem_head_forward(const struct deltamem_head_args * args);

struct deltamem_correct_args {
    const float * out; // [n_tokens][n_out], rows out_stride floats apart
    size_t        out_stride;
    const void *  weight; // [n_read][n_out] of float32, or of float16 if `half`; rows weight_stride values apart
    size_t        weight_stride;
    const float * read; // [n_tokens][n_read], rows read_stride floats apart
    size_t        read_stride;
    const float * added; // [n_tokens][n_out], rows added_stride floats apart; or NULL for zero
    size_t        added_stride;
    float *       dst; // [n_tokens][n_out], rows dst_stride floats apart; may be `out` or `added`
    size_t        dst_stride;

    int64_t n_out;
    int64_t n_read;
    int64_t n_tokens;
    bool    half;
};

// A correction: dst = out + added + weight read.
void deltamem_correct_forward(const struct deltamem_correct_args * args);

enum deltamem_weights {
    DELTAMEM_WEIGHTS_F32,
    DELTAMEM_WEIGHTS_F16,
    DELTAMEM_WEIGHTS_Q8_0, // ggml's blocks of 32
};

struct deltamem_product_args {
    const void *          weight; // [n_out][n_in], rows weight_stride values or blocks apart
    enum deltamem_weights weights;
    size_t                weight_stride;
    const float *         in; // [n_tokens][n_in], rows in_stride floats apart
    size_t                in_stride;
    const float *         out; // [n_tokens][n_out], rows out_stride floats apart; or NULL for zero
    size_t                out_stride;
    const float *         added; // likewise
    size_t                added_stride;
    float *               dst; // [n_tokens][n_out], rows dst_stride floats apart; may be `out` or `added`
    size_t                dst_stride;

    int64_t n_out;
    int64_t n_in; // whole blocks
    int64_t n_tokens;
};

// A projection of a few tokens, or their correction by weights that lie by rows: dst = out + added + weight in, in
// float32.
void deltamem_product_forward(const struct deltamem_product_args * args);

// The same for many tokens and weights in Q8_0, by AMX: inputs and weights are rounded to bfloat16, products are summed
// in float32. A result depends on its own token and output alone. This is the share of thread ith of nth.
void deltamem_tiles_forward(const struct deltamem_product_args * args, int ith, int nth);

// whether this translation unit was compiled for AMX, and the system permits it
bool deltamem_has_tiles(void);

// "AVX-512", "AVX2", "NEON" or "scalar": what this translation unit was compiled for
const char * deltamem_simd_name(void);

#ifdef __cplusplus
}
#endif
