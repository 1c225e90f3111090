// Graph constructors of GGML_OP_DELTAMEM. Compiled into ggml-base.

#include "ggml-deltamem.h"

#include "ggml-impl.h"

#include <string.h>

// op_params: the kind, then the parameters of a read
static void set_op_params(struct ggml_tensor * node, enum ggml_deltamem_kind kind,
                          const struct ggml_deltamem_params * params) {
    GGML_ASSERT(sizeof(int32_t) + sizeof(*params) <= sizeof(node->op_params));

    node->op_params[0] = kind;
    if (params) {
        memcpy(node->op_params + 1, params, sizeof(*params));
    }
}

struct ggml_tensor * ggml_deltamem(struct ggml_context * ctx, struct ggml_tensor * proj, struct ggml_tensor * gate_bias,
                                   struct ggml_tensor * state, struct ggml_tensor * plan,
                                   struct ggml_deltamem_params params) {
    const int64_t n_tokens = proj->ne[1];

    GGML_ASSERT(params.rank >= 1 && params.rank <= GGML_DELTAMEM_MAX_RANK);
    GGML_ASSERT(params.n_head >= 1);
    GGML_ASSERT(params.n_seqs >= 1);
    GGML_ASSERT(params.lambda >= GGML_DELTAMEM_LAMBDA_COUPLED && params.lambda <= GGML_DELTAMEM_LAMBDA_NONE);

    GGML_ASSERT(proj->type == GGML_TYPE_F32);
    GGML_ASSERT(gate_bias->type == GGML_TYPE_F32);
    GGML_ASSERT(state->type == GGML_TYPE_F32);
    GGML_ASSERT(plan->type == GGML_TYPE_I32);

    GGML_ASSERT(ggml_is_matrix(proj) && ggml_is_contiguous_rows(proj));
    GGML_ASSERT(ggml_is_vector(gate_bias) && ggml_is_contiguous(gate_bias));
    GGML_ASSERT(ggml_is_matrix(state) && ggml_is_contiguous_rows(state));
    GGML_ASSERT(ggml_is_vector(plan) && ggml_is_contiguous(plan));

    GGML_ASSERT(proj->ne[0] == ggml_deltamem_n_proj(&params));
    GGML_ASSERT(gate_bias->ne[0] == ggml_deltamem_n_gates(&params));
    GGML_ASSERT(state->ne[0] == params.n_head * ggml_deltamem_n_record(&params));
    GGML_ASSERT(plan->ne[0] >= ggml_deltamem_n_plan(params.n_seqs, n_tokens));

    struct ggml_tensor * result =
            ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) params.n_head * params.rank, n_tokens);

    result->op     = GGML_OP_DELTAMEM;
    result->src[0] = proj;
    result->src[1] = gate_bias;
    result->src[2] = state;
    result->src[3] = plan;

    set_op_params(result, GGML_DELTAMEM_READ, &params);

    return result;
}

struct ggml_tensor * ggml_deltamem_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b) {
    struct ggml_tensor * result = ggml_mul_mat(ctx, a, b);
    // what ggml_mul_mat_set_prec does, or ggml_prec_set_acc, as later releases call it
    ggml_set_op_params_i32(result, 0, GGML_PREC_F32);
    result->op_params[GGML_DELTAMEM_MUL_MAT_MARK] = GGML_OP_DELTAMEM;
    return result;
}

struct ggml_tensor * ggml_deltamem_correct(struct ggml_context * ctx, struct ggml_tensor * out,
                                           struct ggml_tensor * weight, struct ggml_tensor * read) {
    GGML_ASSERT(out->type == GGML_TYPE_F32);
    GGML_ASSERT(weight->type == GGML_TYPE_F32 || weight->type == GGML_TYPE_F16 || weight->type == GGML_TYPE_BF16);
    GGML_ASSERT(read->type == GGML_TYPE_F32);

    GGML_ASSERT(ggml_is_matrix(out) && ggml_is_contiguous_rows(out));
    GGML_ASSERT(ggml_is_matrix(weight) && ggml_is_contiguous_rows(weight));
    GGML_ASSERT(ggml_is_matrix(read) && ggml_is_contiguous_rows(read));

    GGML_ASSERT(weight->ne[0] == out->ne[0]);
    GGML_ASSERT(weight->ne[1] == read->ne[0]);
    GGML_ASSERT(read->ne[1] == out->ne[1]);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, out->ne[0], out->ne[1]);

    result->op     = GGML_OP_DELTAMEM;
    result->src[0] = out;
    result->src[1] = weight;
    result->src[2] = read;

    set_op_params(result, GGML_DELTAMEM_CORRECT, NULL);

    return result;
}

enum ggml_deltamem_kind ggml_deltamem_get_kind(const struct ggml_tensor * node) {
    GGML_ASSERT(node->op == GGML_OP_DELTAMEM);
    return (enum ggml_deltamem_kind) node->op_params[0];
}

struct ggml_deltamem_params ggml_deltamem_get_params(const struct ggml_tensor * node) {
    GGML_ASSERT(ggml_deltamem_get_kind(node) == GGML_DELTAMEM_READ);

    struct ggml_deltamem_params params;
    memcpy(&params, node->op_params + 1, sizeof(params));
    return params;
}
