// GGML_OP_DELTAMEM: the delta-rule memory of δ-mem (arXiv 2605.12357) as one ggml operator.
//
// Gate activations, key/query normalisation, the read and the state update happen in one kernel. Per token and head,
// with q, k, v, β (and λ) taken from the packed projections and the state S of shape [r, r]:
//
//     read   = S q                                          the state before this token's write
//     S_i,: <- keep_i S_i,: - erase_i (S k)_i kᵀ + write_i v_i kᵀ
//
// Rows i of S evolve independently, so S is stored column-major (i contiguous): a column is one vector load.
//
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_DELTAMEM_MAX_RANK 64

// where keep comes from
enum ggml_deltamem_lambda {
    GGML_DELTAMEM_LAMBDA_COUPLED  = 0, // keep = 1 - β
    GGML_DELTAMEM_LAMBDA_SEPARATE = 1, // keep = λ = sigmoid of its own projection
    GGML_DELTAMEM_LAMBDA_NONE     = 2, // keep = 1
};

enum ggml_deltamem_flags {
    GGML_DELTAMEM_NORMALIZE_QK   = 1 << 0, // q, k <- l2normalize(tanh(.)) per head; raw otherwise
    GGML_DELTAMEM_RANKWISE_GATES = 1 << 1, // one gate per row [H, r]; one per head [H] otherwise
    GGML_DELTAMEM_LAMBDA_OUTSIDE = 1 << 2, // erase = λ β; β otherwise
    GGML_DELTAMEM_SEGMENTS       = 1 << 3, // the record has room for segment writes (see below)
};

struct ggml_deltamem_params {
    int32_t rank;   // r, 1 .. GGML_DELTAMEM_MAX_RANK
    int32_t n_head; // H, state heads
    int32_t n_seqs; // sequences described by the plan
    int32_t lambda; // enum ggml_deltamem_lambda
    int32_t flags;  // enum ggml_deltamem_flags
};

// What one token of the plan does, after it has read. Bits combine; the order below is the order of execution.
enum ggml_deltamem_token {
    GGML_DELTAMEM_TOKEN_BEGIN = 1 << 0, // an ingest begins: pending <- S, the running sum is emptied (before the read)
    GGML_DELTAMEM_TOKEN_WRITE = 1 << 1, // token write: S takes this token's projections
    GGML_DELTAMEM_TOKEN_SEGMENT = 1
            << 2, // a new segment begins: what the running sum holds is written to pending first
    GGML_DELTAMEM_TOKEN_ACCUMULATE = 1 << 3, // this token's packed projections join the running sum
    GGML_DELTAMEM_TOKEN_COMMIT = 1 << 4, // the ingest ends: the running sum is written to pending, then S <- pending
};

// Above those bits: 1 + the slot that S is copied to when all this is done, 0 for none. No other sequence of the plan may
// have that slot.
#define GGML_DELTAMEM_TOKEN_CHECKPOINT(slot)      (((slot) + 1) << 8)
#define GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(bits) (((bits) >> 8) - 1)

// Record of one head in one slot, floats:
//     S        r*r      S[i, j] at [j*r + i]
//     pending  r*r      only with GGML_DELTAMEM_SEGMENTS: the state that the next ingest will read
//     sum      3r + g   only with GGML_DELTAMEM_SEGMENTS: running sum of the projections: q, k, v, gates before bias
//     count    1        only with GGML_DELTAMEM_SEGMENTS: tokens in the sum
// A slot is H such records.
static inline int64_t ggml_deltamem_n_gates_head(const struct ggml_deltamem_params * p) {
    const int64_t per_gate = (p->flags & GGML_DELTAMEM_RANKWISE_GATES) ? p->rank : 1;
    return per_gate * (p->lambda == GGML_DELTAMEM_LAMBDA_SEPARATE ? 2 : 1);
}

static inline int64_t ggml_deltamem_n_gates(const struct ggml_deltamem_params * p) {
    return p->n_head * ggml_deltamem_n_gates_head(p);
}

// rows of the packed projection: q [H, r], k [H, r], v [H, r], β [H, r or 1], then λ likewise if separate
static inline int64_t ggml_deltamem_n_proj(const struct ggml_deltamem_params * p) {
    return 3 * (int64_t) p->n_head * p->rank + ggml_deltamem_n_gates(p);
}

static inline int64_t ggml_deltamem_n_record(const struct ggml_deltamem_params * p) {
    const int64_t n_state = (int64_t) p->rank * p->rank;
    return (p->flags & GGML_DELTAMEM_SEGMENTS) ? 2 * n_state + 3 * p->rank + ggml_deltamem_n_gates_head(p) + 1
                                               : n_state;
}

// Plan: which tokens belong to which sequence, and what each does. I32, in this order:
//     n_seqs   times { slot, first, count }   the sequence's slot; its entries are [first, first + count) below
//     n_tokens times { token, bits }          column of proj and of the result; enum ggml_deltamem_token
// Entries of a sequence stand in the order in which it reads them. Slots are distinct.
#define GGML_DELTAMEM_PLAN_SEQ   3
#define GGML_DELTAMEM_PLAN_TOKEN 2

static inline int64_t ggml_deltamem_n_plan(int64_t n_seqs, int64_t n_tokens) {
    return GGML_DELTAMEM_PLAN_SEQ * n_seqs + GGML_DELTAMEM_PLAN_TOKEN * n_tokens;
}

// proj       F32 [n_proj, n_tokens]     packed projections of the attention input, without the gate bias
// gate_bias  F32 [n_gates]              b_β, then b_λ if separate
// state      F32 [H*n_record, n_slots]  rows may be strided; UPDATED IN PLACE, so it must live where the operator runs
// plan       I32 [n_plan or more]       what stands behind the n_plan values is not read
// returns    F32 [H*r, n_tokens]        the reads
GGML_API struct ggml_tensor * ggml_deltamem(struct ggml_context * ctx, struct ggml_tensor * proj,
                                            struct ggml_tensor * gate_bias, struct ggml_tensor * state,
                                            struct ggml_tensor * plan, struct ggml_deltamem_params params);

// ggml_mul_mat whose sums are in float32 on every backend: CUDA adds products with half-precision weights in half
// precision otherwise.
GGML_API struct ggml_tensor * ggml_deltamem_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a,
                                                    struct ggml_tensor * b);

// Which of its op_params says that a product is one of these: a backend that asks every node whether it belongs to a memory
// must not touch anything else, which would be in no cache.
#define GGML_DELTAMEM_MUL_MAT_MARK 15

// out + weight^T read: a correction and its addition in one pass over `out`, where a product of so few columns followed by
// an addition would take three.
//
// out        F32 [n_out, n_tokens]          the result may be allocated in its place
// weight     F32, F16 or BF16 [n_out, H*r]  by columns of the correction, so that outputs are lanes
// read       F32 [H*r, n_tokens]
// returns    F32 [n_out, n_tokens]
GGML_API struct ggml_tensor * ggml_deltamem_correct(struct ggml_context * ctx, struct ggml_tensor * out,
                                                    struct ggml_tensor * weight, struct ggml_tensor * read);

// Both are GGML_OP_DELTAMEM; a node says which. The allocator (patched) puts a result in the place of its first source at most:
// the others are needed after it begins to be written.
enum ggml_deltamem_kind {
    GGML_DELTAMEM_READ    = 0,
    GGML_DELTAMEM_CORRECT = 1,
};

GGML_API enum ggml_deltamem_kind ggml_deltamem_get_kind(const struct ggml_tensor * node);

// Aborts, as ggml's operators do, if a node is not as the functions above make it: the graph of an RPC client comes as tensors.
// Every backend asks before it computes one. Its data must be there by then; what a plan holds is looked at where it is used.
GGML_API void ggml_deltamem_check(const struct ggml_tensor * node);

// the parameters that a read was made with
GGML_API struct ggml_deltamem_params ggml_deltamem_get_params(const struct ggml_tensor * node);

#ifdef __cplusplus
}
#endif
