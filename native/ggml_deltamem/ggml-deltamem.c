// Graph constructors of GGML_OP_DELTAMEM. Compiled into ggml-base.

#include "ggml-deltamem.h"

#include "ggml-impl.h"

#include <stddef.h>
#include <string.h>

// the op_params of a node
struct op_params {
    int32_t                     kind; // enum ggml_deltamem_kind
    struct ggml_deltamem_params read; // zero for a correction
};

// not ggml_is_contiguous_rows, which takes rows of one value however far apart their values were to be
bool ggml_deltamem_is_matrix_of_rows(const struct ggml_tensor * t) {
    return ggml_is_matrix(t) && t->nb[0] == ggml_type_size(t->type) && t->nb[1] % t->nb[0] == 0;
}

static void check_read(const struct ggml_tensor * node) {
    const struct ggml_tensor * proj      = node->src[0];
    const struct ggml_tensor * gate_bias = node->src[1];
    const struct ggml_tensor * state     = node->src[2];
    const struct ggml_tensor * plan      = node->src[3];
    GGML_ASSERT(proj && gate_bias && state && plan);

    const struct ggml_deltamem_params params = ggml_deltamem_get_params(node);
    GGML_ASSERT(params.rank >= 1 && params.rank <= GGML_DELTAMEM_MAX_RANK);
    GGML_ASSERT(params.n_head >= 1);
    GGML_ASSERT(params.n_seqs >= 1);
    GGML_ASSERT(params.lambda >= GGML_DELTAMEM_LAMBDA_COUPLED && params.lambda <= GGML_DELTAMEM_LAMBDA_NONE);

    GGML_ASSERT(!(params.flags & GGML_DELTAMEM_SEGMENTS) || !(params.flags & GGML_DELTAMEM_DEFERRED));

    GGML_ASSERT(node->type == GGML_TYPE_F32);
    GGML_ASSERT(proj->type == GGML_TYPE_F32);
    GGML_ASSERT(gate_bias->type == GGML_TYPE_F32);
    GGML_ASSERT(state->type == GGML_TYPE_F32);
    GGML_ASSERT(plan->type == GGML_TYPE_I32);

    GGML_ASSERT(ggml_deltamem_is_matrix_of_rows(node));
    GGML_ASSERT(ggml_deltamem_is_matrix_of_rows(proj));
    GGML_ASSERT(ggml_is_vector(gate_bias) && ggml_is_contiguous(gate_bias));
    GGML_ASSERT(ggml_deltamem_is_matrix_of_rows(state));
    GGML_ASSERT(ggml_is_vector(plan) && ggml_is_contiguous(plan));

    GGML_ASSERT(node->ne[1] <= INT32_MAX && state->ne[1] <= INT32_MAX); // a plan is I32
    GGML_ASSERT(node->ne[0] == (int64_t) params.n_head * params.rank);
    GGML_ASSERT(proj->ne[0] == ggml_deltamem_n_proj(&params));
    GGML_ASSERT(proj->ne[1] == node->ne[1]);
    GGML_ASSERT(gate_bias->ne[0] == ggml_deltamem_n_gates(&params));
    GGML_ASSERT(state->ne[0] == params.n_head * ggml_deltamem_n_record(&params));
    GGML_ASSERT(plan->ne[0] >= ggml_deltamem_n_plan(params.n_seqs, node->ne[1]));
}

static void check_correct(const struct ggml_tensor * node) {
    const struct ggml_tensor * out    = node->src[0];
    const struct ggml_tensor * weight = node->src[1];
    const struct ggml_tensor * read   = node->src[2];
    GGML_ASSERT(out && weight && read);

    GGML_ASSERT(node->type == GGML_TYPE_F32);
    GGML_ASSERT(out->type == GGML_TYPE_F32);
    GGML_ASSERT(weight->type == GGML_TYPE_F32 || weight->type == GGML_TYPE_F16 || weight->type == GGML_TYPE_BF16 ||
                weight->type == GGML_TYPE_Q8_0);
    GGML_ASSERT(read->type == GGML_TYPE_F32);

    GGML_ASSERT(ggml_deltamem_is_matrix_of_rows(node));
    GGML_ASSERT(ggml_deltamem_is_matrix_of_rows(out));
    GGML_ASSERT(ggml_deltamem_is_matrix_of_rows(weight));
    GGML_ASSERT(ggml_deltamem_is_matrix_of_rows(read));

    GGML_ASSERT(ggml_are_same_shape(node, out));
    const int by_rows = weight->type == GGML_TYPE_Q8_0;
    GGML_ASSERT(weight->ne[by_rows ? 1 : 0] == out->ne[0]);
    GGML_ASSERT(weight->ne[by_rows ? 0 : 1] == read->ne[0]);
    GGML_ASSERT(read->ne[1] == out->ne[1]);
}

static void check_shapes(const struct ggml_tensor * node) {
    switch (ggml_deltamem_get_kind(node)) {
        case GGML_DELTAMEM_READ:    check_read(node); break;
        case GGML_DELTAMEM_CORRECT: check_correct(node); break;
        default:                    GGML_ABORT("GGML_OP_DELTAMEM has no kind %d", ggml_get_op_params_i32(node, 0));
    }
}

// the end of a matrix of rows: ggml_nbytes takes longer than all other checks of a node
static const char * end_of(const struct ggml_tensor * t) {
    return (const char *) t->data + (t->ne[1] - 1) * t->nb[1] + t->ne[0] * t->nb[0];
}

static bool are_apart(const struct ggml_tensor * a, const struct ggml_tensor * b) {
    return end_of(a) <= (const char *) b->data || end_of(b) <= (const char *) a->data;
}

void ggml_deltamem_check(const struct ggml_tensor * node) {
    check_shapes(node);
    GGML_ASSERT(node->data);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        GGML_ASSERT(!node->src[i] || node->src[i]->data);
    }
    if (ggml_deltamem_get_kind(node) == GGML_DELTAMEM_READ) {
        // else what was written could be followed as a plan that nobody has checked
        const struct ggml_tensor * plan = node->src[3];
        GGML_ASSERT(are_apart(plan, node) && are_apart(plan, node->src[2]));
    }
}

struct ggml_tensor * ggml_deltamem(struct ggml_context * ctx, struct ggml_tensor * proj, struct ggml_tensor * gate_bias,
                                   struct ggml_tensor * state, struct ggml_tensor * plan,
                                   struct ggml_deltamem_params params) {
    struct ggml_tensor * result =
            ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) params.n_head * params.rank, proj->ne[1]);

    const struct op_params op = { GGML_DELTAMEM_READ, params };
    ggml_set_op_params(result, &op, sizeof(op));

    result->op     = GGML_OP_DELTAMEM;
    result->src[0] = proj;
    result->src[1] = gate_bias;
    result->src[2] = state;
    result->src[3] = plan;

    check_shapes(result);

    return result;
}

struct ggml_tensor * ggml_deltamem_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b) {
    struct ggml_tensor * result = ggml_mul_mat(ctx, a, b);
    // as ggml_mul_mat_set_prec, which later releases call ggml_prec_set_acc
    ggml_set_op_params_i32(result, 0, GGML_PREC_F32);
    return result;
}

struct ggml_tensor * ggml_deltamem_correct(struct ggml_context * ctx, struct ggml_tensor * out,
                                           struct ggml_tensor * weight, struct ggml_tensor * read) {
    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, out->ne[0], out->ne[1]);

    const struct op_params op = { GGML_DELTAMEM_CORRECT, { 0 } };
    ggml_set_op_params(result, &op, sizeof(op));

    result->op     = GGML_OP_DELTAMEM;
    result->src[0] = out;
    result->src[1] = weight;
    result->src[2] = read;

    check_shapes(result);

    return result;
}

enum ggml_deltamem_kind ggml_deltamem_get_kind(const struct ggml_tensor * node) {
    GGML_ASSERT(node->op == GGML_OP_DELTAMEM);
    return (enum ggml_deltamem_kind) ggml_get_op_params_i32(node, 0);
}

struct ggml_deltamem_params ggml_deltamem_get_params(const struct ggml_tensor * node) {
    GGML_ASSERT(ggml_deltamem_get_kind(node) == GGML_DELTAMEM_READ);

    struct ggml_deltamem_params params;
    memcpy(&params, (const char *) node->op_params + offsetof(struct op_params, read), sizeof(params));
    return params;
}
