// GGML_OP_DELTAMEM: the delta-rule memory of δ-mem (arXiv 2605.12357) as one ggml operator.
//
// One kernel computes the gates, the normalisation, the read and the state update. Per token and state head, with the
// projections q, k, v, β (and λ) of rank r and the state S of shape [r, r]:
//
//     q, k  <- norm(tanh(q)), norm(tanh(k))                 with NORMALIZE_QK; norm(x) = x / max(|x|, 1e-6)
//     β     <- sigmoid(β + b_β)
//     λ     <- 1 - β; sigmoid(λ + b_λ); 1                   COUPLED; SEPARATE; NONE
//     keep = λ    erase = β, or λ β with LAMBDA_OUTSIDE    write = β
//
//     read   = S q                                          the state before this token's write
//     S_i,: <- keep_i S_i,: + (write_i v_i - erase_i (S k)_i) kᵀ
//
// With DEFERRED, read = B q, where B is the state as it was when the token's turn began; but of tokens that read the
// PRESENT, as above.
//
// No row i of S depends on another, so S is stored column-major (i contiguous): a column is one vector load.
//
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_DELTAMEM_MAX_RANK 64

// what λ is
enum ggml_deltamem_lambda {
    GGML_DELTAMEM_LAMBDA_COUPLED  = 0, // 1 - β
    GGML_DELTAMEM_LAMBDA_SEPARATE = 1, // sigmoid of a projection of its own
    GGML_DELTAMEM_LAMBDA_NONE     = 2, // 1
};

enum ggml_deltamem_flags {
    GGML_DELTAMEM_NORMALIZE_QK   = 1 << 0, // q, k <- norm(tanh(.)) per head; unchanged otherwise
    GGML_DELTAMEM_RANKWISE_GATES = 1 << 1, // one gate per row [H, r]; one per head [H] otherwise
    GGML_DELTAMEM_LAMBDA_OUTSIDE = 1 << 2, // erase = λ β; β otherwise
    GGML_DELTAMEM_SEGMENTS       = 1 << 3, // the record has room for segment writes (see below)
    GGML_DELTAMEM_DEFERRED       = 1 << 4, // the record has room for what a turn reads; not with SEGMENTS
};

struct ggml_deltamem_params {
    int32_t rank;   // r, 1 .. GGML_DELTAMEM_MAX_RANK
    int32_t n_head; // H, state heads
    int32_t n_seqs; // sequences described by the plan
    int32_t lambda; // enum ggml_deltamem_lambda
    int32_t flags;  // enum ggml_deltamem_flags
};

// What a token of the plan does besides reading. Bits combine. In the order of execution, with the read after BEGIN:
//     TURN        a turn begins: B <- S
//     PRESENT     the read is S q, not B q
//     BEGIN       an ingest begins: pending <- S, sum <- 0, count <- 0
//     WRITE       a token write: S <- the update above with this token's projections
//     SEGMENT     a new segment begins: write the mean, sum / count, to pending; sum <- 0, count <- 0
//     ACCUMULATE  sum <- sum + this token's projections, count <- count + 1
//     COMMIT      the ingest ends: as SEGMENT, then S <- pending
enum ggml_deltamem_token {
    GGML_DELTAMEM_TOKEN_BEGIN      = 1 << 0,
    GGML_DELTAMEM_TOKEN_WRITE      = 1 << 1,
    GGML_DELTAMEM_TOKEN_SEGMENT    = 1 << 2,
    GGML_DELTAMEM_TOKEN_ACCUMULATE = 1 << 3,
    GGML_DELTAMEM_TOKEN_COMMIT     = 1 << 4,
    GGML_DELTAMEM_TOKEN_TURN       = 1 << 5,
    GGML_DELTAMEM_TOKEN_PRESENT    = 1 << 6,
};

// The bits above those: 1 + the slot that S is copied to at the end, a checkpoint; 0 for none. No other sequence of the
// plan may use that slot.
#define GGML_DELTAMEM_TOKEN_CHECKPOINT(slot)      (((slot) + 1) << 8)
#define GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(bits) (((bits) >> 8) - 1)

// The record of one head in one slot, in floats:
//     S        r*r      S[i, j] at [j*r + i]
// with GGML_DELTAMEM_SEGMENTS also
//     pending  r*r      the state that the next ingest reads
//     sum      3r + g   sum of the projections q, k, v and gates (before their bias) of the segment's tokens
//     count    1        tokens in the sum
// with GGML_DELTAMEM_DEFERRED also
//     B        r*r      the state that the turn reads
// A slot is H records.
static inline int64_t ggml_deltamem_n_gates_head(const struct ggml_deltamem_params * p) {
    const int64_t per_gate = (p->flags & GGML_DELTAMEM_RANKWISE_GATES) ? p->rank : 1;
    return per_gate * (p->lambda == GGML_DELTAMEM_LAMBDA_SEPARATE ? 2 : 1);
}

static inline int64_t ggml_deltamem_n_gates(const struct ggml_deltamem_params * p) {
    return p->n_head * ggml_deltamem_n_gates_head(p);
}

// rows of the packed projections: q [H, r], k [H, r], v [H, r], β [H, r or 1], and λ like β if separate
static inline int64_t ggml_deltamem_n_proj(const struct ggml_deltamem_params * p) {
    return 3 * (int64_t) p->n_head * p->rank + ggml_deltamem_n_gates(p);
}

static inline int64_t ggml_deltamem_n_record(const struct ggml_deltamem_params * p) {
    const int64_t n_state = (int64_t) p->rank * p->rank;
    if (p->flags & GGML_DELTAMEM_SEGMENTS) {
        return 2 * n_state + 3 * p->rank + ggml_deltamem_n_gates_head(p) + 1;
    }
    return (p->flags & GGML_DELTAMEM_DEFERRED) ? 2 * n_state : n_state;
}

// The plan: which tokens belong to which sequence, and what each does. I32, in this order:
//     n_seqs   times { slot, first, count }   the sequence's slot; its entries are [first, first + count) below
//     n_tokens times { token, bits }          column of proj and of the result; enum ggml_deltamem_token
// The entries of a sequence are in the order of its tokens. Slots are distinct.
#define GGML_DELTAMEM_PLAN_SEQ   3
#define GGML_DELTAMEM_PLAN_TOKEN 2

static inline int64_t ggml_deltamem_n_plan(int64_t n_seqs, int64_t n_tokens) {
    return GGML_DELTAMEM_PLAN_SEQ * n_seqs + GGML_DELTAMEM_PLAN_TOKEN * n_tokens;
}

// proj       F32 [n_proj, n_tokens]     packed projections of the attention input, without the gate bias
// gate_bias  F32 [n_gates]              b_β, then b_λ if separate
// state      F32 [H*n_record, n_slots]  rows may be strided; UPDATED IN PLACE, so it must live where the operator runs
// plan       I32 [n_plan or more]       values after the first n_plan are ignored
// returns    F32 [H*r, n_tokens]        the reads
GGML_API struct ggml_tensor * ggml_deltamem(struct ggml_context * ctx, struct ggml_tensor * proj,
                                            struct ggml_tensor * gate_bias, struct ggml_tensor * state,
                                            struct ggml_tensor * plan, struct ggml_deltamem_params params);

// ggml_mul_mat that accumulates in float32 on every backend: with half-precision weights, CUDA would accumulate in half
// precision.
GGML_API struct ggml_tensor * ggml_deltamem_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a,
                                                    struct ggml_tensor * b);

// A correction: out + weight read, in one pass over `out`; a product of so few columns and an addition would take
// three.
//
// out        F32 [n_out, n_tokens]          the result may take its memory
// weight     F32, F16 or BF16 [n_out, H*r]  column-major (outputs contiguous), so that outputs are lanes
//            or Q8_0 [H*r, n_out]           only on a CPU: its blocks of 32 lie along the reads
// read       F32 [H*r, n_tokens]
// returns    F32 [n_out, n_tokens]
GGML_API struct ggml_tensor * ggml_deltamem_correct(struct ggml_context * ctx, struct ggml_tensor * out,
                                                    struct ggml_tensor * weight, struct ggml_tensor * read);

// Reads and corrections are both nodes of GGML_OP_DELTAMEM. The patched allocator lets a result take the memory of its
// first source only: the kernels use the others after they have begun to write the result.
enum ggml_deltamem_kind {
    GGML_DELTAMEM_READ    = 0,
    GGML_DELTAMEM_CORRECT = 1,
};

GGML_API enum ggml_deltamem_kind ggml_deltamem_get_kind(const struct ggml_tensor * node);

// Aborts, as ggml's operators do, if a node is not as the functions above make it, or has no data: an RPC client sends
// tensors, not calls. Every backend calls this before it computes a node. The kernels check what the plan holds.
GGML_API void ggml_deltamem_check(const struct ggml_tensor * node);

// Whether a tensor is a matrix as the kernels take them: rows are contiguous, and begin a whole number of values or blocks
// apart.
GGML_API bool ggml_deltamem_is_matrix_of_rows(const struct ggml_tensor * t);

// the parameters of a read
GGML_API struct ggml_deltamem_params ggml_deltamem_get_params(const struct ggml_tensor * node);

#ifdef __cplusplus
}
#endif
