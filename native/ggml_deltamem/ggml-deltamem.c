// Graph constructor of GGML_OP_DELTAMEM. Compiled into ggml-base.

#include "ggml-deltamem.h"

#include <string.h>

struct ggml_tensor * ggml_deltamem(
        struct ggml_context       * ctx,
        struct ggml_tensor        * proj,
        struct ggml_tensor        * gate_bias,
        struct ggml_tensor        * state,
        struct ggml_tensor        * plan,
        struct ggml_deltamem_params params) {
    const int64_t n_tokens = proj->ne[1];

    GGML_ASSERT(params.rank >= 1 && params.rank <= GGML_DELTAMEM_MAX_RANK);
    GGML_ASSERT(params.n_head >= 1);
    GGML_ASSERT(params.n_seqs >= 1);
    GGML_ASSERT(params.lambda >= GGML_DELTAMEM_LAMBDA_COUPLED && params.lambda <= GGML_DELTAMEM_LAMBDA_NONE);

    GGML_ASSERT(proj->type      == GGML_TYPE_F32);
    GGML_ASSERT(gate_bias->type == GGML_TYPE_F32);
    GGML_ASSERT(state->type     == GGML_TYPE_F32);
    GGML_ASSERT(plan->type      == GGML_TYPE_I32);

    GGML_ASSERT(ggml_is_matrix(proj) && ggml_is_contiguous_rows(proj));
    GGML_ASSERT(ggml_is_vector(gate_bias) && ggml_is_contiguous(gate_bias));
    GGML_ASSERT(ggml_is_matrix(state) && ggml_is_contiguous_rows(state));
    GGML_ASSERT(ggml_is_vector(plan) && ggml_is_contiguous(plan));

    GGML_ASSERT(proj->ne[0]      == ggml_deltamem_n_proj(&params));
    GGML_ASSERT(gate_bias->ne[0] == ggml_deltamem_n_gates(&params));
    GGML_ASSERT(state->ne[0]     == params.n_head * ggml_deltamem_n_record(&params));
    GGML_ASSERT(plan->ne[0]      == ggml_deltamem_n_plan(params.n_seqs, n_tokens));

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) params.n_head*params.rank, n_tokens);

    result->op     = GGML_OP_DELTAMEM;
    result->src[0] = proj;
    result->src[1] = gate_bias;
    result->src[2] = state;
    result->src[3] = plan;

    GGML_ASSERT(sizeof(params) <= sizeof(result->op_params));
    memcpy(result->op_params, &params, sizeof(params));

    return result;
}

struct ggml_deltamem_params ggml_deltamem_get_params(const struct ggml_tensor * node) {
    GGML_ASSERT(node->op == GGML_OP_DELTAMEM);

    struct ggml_deltamem_params params;
    memcpy(&params, node->op_params, sizeof(params));
    return params;
}
