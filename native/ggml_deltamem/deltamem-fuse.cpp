// Nodes of a graph that the CPU computes as one (deltamem-cpu.h): which may be, and how. Compiled into ggml-cpu, as
// deltamem-cpu.cpp.
//
// One thread decides it for all nodes before they are computed, and deltamem-known.cpp keeps it for the next token: after a layer's
// weights, the tensors that it asks are in no cache.
//
// Threads of a node that is computed with the one before it have not waited for each other in between. So a result that the
// allocator gave memory of what another thread still reads keeps nodes apart.

#include "deltamem-bf16.h"
#include "deltamem-cpu.h"
#include "deltamem-known.h"
#include "deltamem-norm.h"
#include "deltamem-share.h"
#include "deltamem-simd.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <initializer_list>

namespace deltamem {

// Whether forward_project computes this product. Those that no constructor of ggml makes are left to ggml, which
// refuses them.
static bool takes_projection(const struct ggml_tensor * mul_mat) {
    const struct ggml_tensor * weight = mul_mat->src[0];
    const struct ggml_tensor * in     = mul_mat->src[1];
    if (!weight || !in || !mul_mat->data || !weight->data || !in->data) {
        return false;
    }
    const bool takes_type =
            weight->type == GGML_TYPE_F16 || weight->type == GGML_TYPE_F32 || weight->type == GGML_TYPE_Q8_0;
    return takes_type && !weight->extra && (mul_mat->ne[1] <= FEW_TOKENS || takes_tiles(weight)) &&
           in->type == GGML_TYPE_F32 && mul_mat->type == GGML_TYPE_F32 && ggml_deltamem_is_matrix_of_rows(in) &&
           ggml_deltamem_is_matrix_of_rows(weight) && ggml_deltamem_is_matrix_of_rows(mul_mat) &&
           weight->ne[0] == in->ne[0] && weight->ne[1] == mul_mat->ne[0] && in->ne[1] == mul_mat->ne[1];
}

static bool apart(const struct ggml_tensor * a, const struct ggml_tensor * b) {
    const char * pa = (const char *) a->data;
    const char * pb = (const char *) b->data;
    return pa + ggml_nbytes(a) <= pb || pb + ggml_nbytes(b) <= pa;
}

// of an addition or a multiplication, what it has besides this source
static const struct ggml_tensor * other_source(const struct ggml_tensor * node, const struct ggml_tensor * source) {
    return node->src[node->src[0] == source ? 1 : 0];
}

// whether a thread may write its elements of dst while others still read theirs of src, of the same shape
static bool in_place_or_apart(const struct ggml_tensor * dst, const struct ggml_tensor * src) {
    return (dst->data == src->data && dst->nb[1] == src->nb[1]) || apart(dst, src);
}

static bool takes_addition(const struct ggml_tensor * correction, const struct ggml_tensor * add,
                           const struct ggml_tensor * added) {
    // the allocator may have given `add` the memory of what only the correction reads
    return added && added->data && add->data && added->type == GGML_TYPE_F32 && add->type == GGML_TYPE_F32 &&
           ggml_are_same_shape(added, correction) && ggml_deltamem_is_matrix_of_rows(added) &&
           ggml_deltamem_is_matrix_of_rows(add) && in_place_or_apart(add, correction->src[0]) &&
           in_place_or_apart(add, added) && apart(add, correction->src[1]) && apart(add, correction->src[2]);
}

// A read and its correction, of one token. Each thread computes S q (or B q) of all heads for its own corrections, instead of
// waiting for the thread that has the head; only that one writes the state.
static constexpr int64_t OWN_HEADS  = 8,
                         OWN_STATES = 1024; // the most heads, and floats of S, for which a thread does so

// a thread's copy of what is read, from before the synchronisation after which it is written
alignas(64) static thread_local float own_states[OWN_STATES];

static void copy_states(const struct ggml_tensor * read) {
    const struct ggml_deltamem_params p       = ggml_deltamem_get_params(read);
    const int64_t                     n_state = (int64_t) p.rank * p.rank;
    for (int64_t head = 0; head < p.n_head; ++head) {
        const struct deltamem_head_args args = head_args(read, 0, head);
        // the token reads B, unless it reads the present, or a turn begins with it, which is the same
        const int  present = GGML_DELTAMEM_TOKEN_PRESENT | GGML_DELTAMEM_TOKEN_TURN;
        const bool of_turn = (p.flags & GGML_DELTAMEM_DEFERRED) && !(args.entries[1] & present);
        memcpy(own_states + head * n_state, args.record + (of_turn ? n_state : 0), n_state * sizeof(float));
    }
}

// A read, its correction, and perhaps a norm, of which a thread has the rows that it has corrected.
static void forward_read_correct(const struct ggml_compute_params * params, struct ggml_tensor * read,
                                 struct ggml_tensor * correction, const struct followers & next) {
    const struct ggml_deltamem_params p = ggml_deltamem_get_params(read);

    const int64_t n_state                             = (int64_t) p.rank * p.rank;
    const int32_t only_read[GGML_DELTAMEM_PLAN_TOKEN] = { 0, 0 };

    alignas(64) float reads[OWN_HEADS * GGML_DELTAMEM_MAX_RANK];

    for (int64_t head = 0; head < p.n_head; ++head) {
        struct deltamem_head_args args = head_args(read, 0, head);
        if (head % params->nth == params->ith) {
            deltamem_head_forward(&args);
            memcpy(reads + head * p.rank, args.read + head * p.rank, p.rank * sizeof(float));
            continue;
        }
        args.params.flags &= ~GGML_DELTAMEM_DEFERRED;
        args.record  = own_states + head * n_state;
        args.read    = reads;
        args.entries = only_read;
        deltamem_head_forward(&args);
    }
    const int64_t n_row = next.norm ? next.norm->ne[0] : 0;
    forward_correct(params, correction, reads, p.n_head * p.rank, {}, correction, n_row);
    if (next.norm) {
        const int64_t n_rows = ggml_nrows(next.norm);
        ggml_cpu_deltamem_norm_rows(next.norm, next.mul, n_rows * params->ith / params->nth,
                                    n_rows * (params->ith + 1) / params->nth);
    }
}

static bool takes_correction(const struct ggml_tensor * read, const struct ggml_tensor * correction) {
    if (!(correction->flags & GGML_TENSOR_FLAG_COMPUTE) || correction->op != GGML_OP_DELTAMEM ||
        ggml_deltamem_get_kind(correction) != GGML_DELTAMEM_CORRECT || correction->src[2] != read) {
        return false;
    }
    ggml_deltamem_check(correction);
    for (int i = 0; i < 4; ++i) {
        if (!apart(correction, read->src[i])) {
            return false; // the allocator gave the correction the memory of what only the read needs
        }
    }
    if (!apart(read->src[0], read->src[2]) || !apart(read->src[0], read->src[3])) {
        return false; // the plan is followed, and states are copied, while other threads still write the projection
    }
    const struct ggml_tensor * written[] = { read, read->src[2] };
    for (const struct ggml_tensor * t : written) {
        if (!apart(t, correction->src[0]) || !apart(t, correction->src[1])) {
            return false; // the correction needs what other threads still write
        }
    }
    const struct ggml_deltamem_params p = ggml_deltamem_get_params(read);
    return read->ne[1] == 1 && p.n_seqs == 1 && p.n_head <= OWN_HEADS && p.n_head * p.rank * p.rank <= OWN_STATES;
}

// whether nodes [begin, end) are in the graph and have something to compute
static bool are_computed(const struct ggml_cgraph * cgraph, int begin, int end) {
    if (end > cgraph->n_nodes) {
        return false;
    }
    return std::all_of(cgraph->nodes + begin, cgraph->nodes + end, [](const struct ggml_tensor * node) {
        return (node->flags & GGML_TENSOR_FLAG_COMPUTE) && !ggml_is_empty(node);
    });
}

// whether nodes i and i + 1 are a projection that forward_project computes, and its read
static bool takes_projection(const struct ggml_cgraph * cgraph, int i) {
    if (i + 1 >= cgraph->n_nodes) {
        return false;
    }
    const struct ggml_tensor * projection = cgraph->nodes[i];
    const struct ggml_tensor * read       = cgraph->nodes[i + 1];
    if (projection->op != GGML_OP_MUL_MAT || read->op != GGML_OP_DELTAMEM || read->src[0] != projection ||
        !are_computed(cgraph, i, i + 2) || ggml_deltamem_get_kind(read) != GGML_DELTAMEM_READ ||
        !takes_projection(projection)) {
        return false;
    }
    ggml_deltamem_check(read);
    return true;
}

// whether node i, the correction that follows a projection and its read, is computed with the read
static bool takes_correction(const struct ggml_cgraph * cgraph, int i) {
    return i < cgraph->n_nodes && takes_correction(cgraph->nodes[i - 1], cgraph->nodes[i]);
}

// Where the norm of node i's rows is, which lie one after the other in it, if it and the multiplication by weights after it may be
// computed with node i, by threads that are at different nodes; else 0. Of `by_rows`, a thread reads rows that it normalises; of
// `whole`, all.
static int find_norm(const struct ggml_cgraph * cgraph, int i,
                     std::initializer_list<const struct ggml_tensor *> by_rows,
                     std::initializer_list<const struct ggml_tensor *> whole) {
    const struct ggml_tensor * node = cgraph->nodes[i];

    int j = i + 1;
    while (j < cgraph->n_nodes && ggml_op_is_empty(cgraph->nodes[j]->op)) { // the node as rows
        ++j;
    }
    if (j + 2 > cgraph->n_nodes || !are_computed(cgraph, j, j + 2) ||
        !ggml_can_fuse(cgraph, j, { GGML_OP_RMS_NORM, GGML_OP_MUL })) {
        return 0;
    }
    const struct ggml_tensor * norm    = cgraph->nodes[j];
    const struct ggml_tensor * mul     = cgraph->nodes[j + 1];
    const struct ggml_tensor * rows    = norm->src[0];
    const struct ggml_tensor * weights = other_source(mul, norm);
    if (rows->data != node->data || !ggml_is_contiguous(rows) || !ggml_is_contiguous(node) ||
        !ggml_is_contiguous(mul) || ggml_nelements(rows) != ggml_nelements(node) || rows->ne[0] % UNIT != 0 ||
        node->ne[0] % rows->ne[0] != 0 || !weights->data || !mul->data || weights->ne[0] != rows->ne[0] ||
        !ggml_cpu_deltamem_takes_norm(norm, mul) || !apart(mul, weights) || !apart(node, weights)) {
        return 0;
    }
    // the result may have the memory of its own rows
    const bool sound = std::all_of(by_rows.begin(), by_rows.end(), [&](const struct ggml_tensor * t) {
        return (mul->data == t->data && ggml_is_contiguous(t)) || apart(mul, t);
    });
    const bool alone = std::all_of(whole.begin(), whole.end(),
                                   [&](const struct ggml_tensor * t) { return apart(mul, t) && apart(weights, t); });
    return sound && alone ? j : 0;
}

// whether nodes i and i + 1 are products of the same input, neither of which needs the other's memory
static bool share_input(const struct ggml_cgraph * cgraph, int i) {
    if (i < 0 || !are_computed(cgraph, i, i + 2)) {
        return false;
    }
    const struct ggml_tensor * first  = cgraph->nodes[i];
    const struct ggml_tensor * second = cgraph->nodes[i + 1];
    return first->op == GGML_OP_MUL_MAT && second->op == GGML_OP_MUL_MAT && first->src[1] == second->src[1] &&
           apart(second, first) && apart(second, first->src[0]) && apart(second, first->src[1]) &&
           apart(first, second->src[0]);
}

// Whether the projection at node i, which takes_projection takes, is computed ahead of the product at node i - 1: the
// synchronisation after that product is then the projection's, too. The plan may be followed and states copied before that
// product, so they are no result of it.
static bool joins_product(const struct ggml_cgraph * cgraph, int i) {
    if (cgraph->nodes[i]->ne[1] > FEW_TOKENS || !share_input(cgraph, i - 1)) {
        return false;
    }
    const struct ggml_tensor * product = cgraph->nodes[i - 1];
    const struct ggml_tensor * read    = cgraph->nodes[i + 1];
    return apart(product, read->src[2]) && apart(product, read->src[3]);
}

//
// decisions, by one thread
//

using fusion = struct ggml_cpu_deltamem_fusion;

static uint8_t distance(int from, int to) {
    return to > from && to - from <= UINT8_MAX ? to - from : 0;
}

static bool is_correction(const struct ggml_tensor * node) {
    return node->op == GGML_OP_DELTAMEM && ggml_deltamem_get_kind(node) == GGML_DELTAMEM_CORRECT;
}

static fusion decide(const struct ggml_cgraph * cgraph, int i) {
    struct ggml_tensor ** nodes = cgraph->nodes + i;
    fusion                with  = {}; // skipped

    if (!are_computed(cgraph, i, i + 1) || ggml_op_is_empty(nodes[0]->op)) {
        return with;
    }
    with.kind = DELTAMEM_SINGLE;
    if (nodes[0]->op == GGML_OP_MUL_MAT && takes_projection(cgraph, i + 1) && joins_product(cgraph, i + 1)) {
        with.kind       = DELTAMEM_PRODUCT;
        with.correction = takes_correction(cgraph, i + 3) ? 3 : 0;
        return with;
    }
    if (takes_projection(cgraph, i)) {
        with.kind       = joins_product(cgraph, i) ? DELTAMEM_JOINED : DELTAMEM_PROJECTION;
        with.correction = takes_correction(cgraph, i + 2) ? 2 : 0;
        if (with.correction) {
            const struct ggml_tensor * read       = nodes[1];
            const struct ggml_tensor * correction = nodes[2];

            const int norm =
                    find_norm(cgraph, i + 2, { correction, correction->src[0] },
                              { correction->src[1], read, read->src[0], read->src[1], read->src[2], read->src[3] });
            with.norm = distance(i, norm);
        }
        return with;
    }
    if (is_correction(nodes[0])) {
        const struct ggml_tensor * correction = nodes[0];
        const struct ggml_tensor * dst        = nodes[0];
        const struct ggml_tensor * added      = nullptr;
        ggml_deltamem_check(correction);
        if (are_computed(cgraph, i, i + 2) && ggml_can_fuse(cgraph, i, { GGML_OP_DELTAMEM, GGML_OP_ADD })) {
            added = other_source(nodes[1], correction);
            if (takes_addition(correction, nodes[1], added)) {
                dst           = nodes[1];
                with.addition = 1;
            }
        }
        const int norm = find_norm(cgraph, i + with.addition, { dst, correction->src[0], with.addition ? added : dst },
                                   { correction->src[1], correction->src[2] });
        with.norm      = distance(i, norm);
        with.kind      = with.addition || with.norm ? DELTAMEM_CORRECTION : DELTAMEM_SINGLE;
        return with;
    }
    if (nodes[0]->op == GGML_OP_MUL_MAT && are_computed(cgraph, i, i + 2) && is_correction(nodes[1]) &&
        nodes[1]->ne[1] <= FEW_TOKENS && decide(cgraph, i + 1).addition) {
        with.kind = DELTAMEM_AHEAD;
    }
    if (nodes[0]->ne[1] > FEW_TOKENS && share_input(cgraph, i)) {
        with.kind = DELTAMEM_PRODUCTS;
    }
    return with;
}

//
// computation, by all threads
//

// whether a read, for which a correction was found, is of one token of the ingest: its plan changes with every token
static bool is_of_one_token(const struct ggml_tensor * read) {
    return ((const int32_t *) read->src[3]->data)[2] == 1;
}

// Asks for tensors that this thread needs after the next product, which loads its weights meanwhile. Inlined, because GCC leaves out
// calls of functions that only prefetch.
[[gnu::always_inline]] static inline void load_ahead(std::initializer_list<const struct ggml_tensor *> tensors) {
    for (const struct ggml_tensor * t : tensors) {
        prefetch((const char *) t, offsetof(struct ggml_tensor, name));
    }
}

// A projection, ahead of the product before it, whose own computation is ggml's. `next`: what is then computed with the projection.
static void fuse_product(const struct ggml_compute_params * params, struct ggml_tensor ** nodes, const fusion & with,
                         const fusion & next) {
    if (with.correction && is_of_one_token(nodes[2])) {
        copy_states(nodes[2]);
    }
    forward_project(params, nodes[1]);
    if (with.correction) {
        const struct ggml_tensor * correction = nodes[with.correction];
        load_ahead({ correction, correction->src[1] });
    }
    if (next.norm) {
        const struct ggml_tensor * norm    = nodes[1 + next.norm];
        const struct ggml_tensor * mul     = nodes[1 + next.norm + 1];
        const struct ggml_tensor * weights = other_source(mul, norm);
        load_ahead({ norm, mul, weights });
        prefetch((const char *) weights->data, weights->ne[0] * sizeof(float));
    }
}

// Each of these returns the distance of the last node computed.

static int fuse_projection(const struct ggml_compute_params * params, struct ggml_tensor ** nodes,
                           const fusion & with) {
    struct ggml_tensor * projection = nodes[0];
    struct ggml_tensor * read       = nodes[1];
    const bool           corrects   = with.correction && is_of_one_token(read);
    if (with.kind == DELTAMEM_PROJECTION) {
        if (corrects) {
            copy_states(read);
        }
        forward_project(params, projection);
        ggml_barrier(params->threadpool);
    }
    if (!corrects) {
        forward_read(params, read);
        return 1;
    }
    struct followers next;
    int              last = with.correction;
    if (with.norm) {
        last      = with.norm + 1;
        next.norm = nodes[with.norm];
        next.mul  = nodes[last];
    }
    forward_read_correct(params, read, nodes[with.correction], next);
    return last;
}

static int fuse_correction(const struct ggml_compute_params * params, struct ggml_tensor ** nodes,
                           const fusion & with) {
    const struct ggml_tensor * correction = nodes[0];
    struct ggml_tensor *       dst        = nodes[with.addition];
    struct followers           next;
    int                        last = with.addition;
    if (with.addition) {
        next.added = other_source(dst, correction);
    }
    if (with.norm && is_by_tokens(params, correction)) {
        last      = with.norm + 1;
        next.norm = nodes[with.norm];
        next.mul  = nodes[last];
    }
    if (last) {
        forward_correct(params, correction, next, dst);
    }
    return last;
}

} // namespace deltamem

void ggml_cpu_deltamem_decide(const struct ggml_cgraph * cgraph, struct ggml_cpu_deltamem_fusion * fusions) {
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        fusions[i] = deltamem::decide(cgraph, i);
    }
}

int ggml_cpu_deltamem_fuse(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph,
                           const struct ggml_cpu_deltamem_fusion * fusions, int i) {
    using namespace deltamem;

    struct ggml_tensor ** nodes = cgraph->nodes + i;
    const fusion &        with  = fusions[i];

    switch (with.kind) {
        case DELTAMEM_SKIPPED:
        case DELTAMEM_SINGLE:  return 0;
        case DELTAMEM_AHEAD:   {
            const struct ggml_tensor * correction = nodes[1];
            const struct ggml_tensor * add        = nodes[2];
            load_ahead({ correction, correction->src[1], correction->src[2], add, other_source(add, correction) });
            return 0;
        }
        case DELTAMEM_PRODUCT:    fuse_product(params, nodes, with, fusions[i + 1]); return 0;
        case DELTAMEM_PRODUCTS:   return ggml_cpu_deltamem_bf16_two(params, nodes[0], nodes[1]) ? 1 : 0;
        case DELTAMEM_PROJECTION:
        case DELTAMEM_JOINED:     return fuse_projection(params, nodes, with);
        case DELTAMEM_CORRECTION: return fuse_correction(params, nodes, with);
    }
    return 0;
}
