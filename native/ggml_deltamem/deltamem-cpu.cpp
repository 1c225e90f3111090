// CPU forward of GGML_OP_DELTAMEM: divides the work among the threads. Compiled into ggml-cpu, so once per CPU variant,
// with that variant's flags.

#include "deltamem-cpu.h"

#include "deltamem-bf16.h"
#include "deltamem-kernel.h"
#include "deltamem-norm.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

// Up to so many tokens, a correction takes weights as they are stored, and a projection is computed with its read. For
// more, a correction converts its weights to float32 first, and a projection is left to ggml's product. With AMX, tiles
// multiply more tokens and weights in Q8_0.
static constexpr int64_t FEW_TOKENS = 4;

static constexpr int64_t CACHE_LINE = 64 / sizeof(float);
static constexpr int64_t UNIT       = 64; // outputs of a correction: whole cache lines, whole blocks of vectors

static bool takes_tiles(const struct ggml_tensor * weight) {
    return weight->type == GGML_TYPE_Q8_0 && deltamem_has_tiles();
}

// weights by rows
static struct deltamem_product_args product_args(const struct ggml_tensor * weight) {
    struct deltamem_product_args args = {};
    args.weight                       = weight->data;
    args.weights                      = weight->type == GGML_TYPE_F32   ? DELTAMEM_WEIGHTS_F32
                                        : weight->type == GGML_TYPE_F16 ? DELTAMEM_WEIGHTS_F16
                                                                        : DELTAMEM_WEIGHTS_Q8_0;
    args.weight_stride                = weight->nb[1] / weight->nb[0];
    args.n_in                         = weight->ne[0];
    return args;
}

// Computes a product: of few tokens, each thread has a range of whole units of outputs.
static void forward_product(const struct ggml_compute_params * params, struct deltamem_product_args args,
                            size_t weight_row, int64_t n_out, int64_t unit) {
    args.n_out = n_out;
    if (args.n_tokens > FEW_TOKENS) {
        deltamem_tiles_forward(&args, params->ith, params->nth);
        return;
    }
    const int64_t n_units = (n_out + unit - 1) / unit;
    const int64_t begin   = unit * (n_units * params->ith / params->nth);
    const int64_t end     = std::min(n_out, unit * (n_units * (params->ith + 1) / params->nth));

    args.weight = (const char *) args.weight + begin * weight_row;
    args.out    = args.out ? args.out + begin : nullptr;
    args.added  = args.added ? args.added + begin : nullptr;
    args.dst += begin;
    args.n_out = end - begin;
    deltamem_product_forward(&args);
}

static struct deltamem_head_args head_args(const struct ggml_tensor * dst, int64_t i_seq, int64_t head) {
    const struct ggml_tensor * proj      = dst->src[0];
    const struct ggml_tensor * gate_bias = dst->src[1];
    const struct ggml_tensor * state     = dst->src[2];
    const struct ggml_tensor * plan      = dst->src[3];

    const struct ggml_deltamem_params p = ggml_deltamem_get_params(dst);

    const int32_t * seqs    = (const int32_t *) plan->data;
    const int32_t * seq     = seqs + GGML_DELTAMEM_PLAN_SEQ * i_seq;
    const int32_t * entries = seqs + (int64_t) GGML_DELTAMEM_PLAN_SEQ * p.n_seqs;

    GGML_ASSERT(deltamem_sequence_fits(seqs, p.n_seqs, i_seq, dst->ne[1], state->ne[1]));

    struct deltamem_head_args args;
    args.params      = p;
    args.head        = (int32_t) head;
    args.proj        = (const float *) proj->data;
    args.proj_stride = proj->nb[1] / sizeof(float);
    args.gate_bias   = (const float *) gate_bias->data;
    args.slots       = (float *) state->data + head * ggml_deltamem_n_record(&p);
    args.slot_stride = state->nb[1] / sizeof(float);
    args.record      = args.slots + seq[0] * args.slot_stride;
    args.read        = (float *) dst->data;
    args.read_stride = dst->nb[1] / sizeof(float);
    args.entries     = entries + (int64_t) GGML_DELTAMEM_PLAN_TOKEN * seq[1];
    args.n_entries   = seq[2];
    return args;
}

// read = S q and the state update: each thread has (sequence, head) pairs
static void forward_read(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_deltamem_params p = ggml_deltamem_get_params(dst);

    const int64_t n_items = (int64_t) p.n_seqs * p.n_head;
    for (int64_t item = params->ith; item < n_items; item += params->nth) {
        const struct deltamem_head_args args = head_args(dst, item / p.n_head, item % p.n_head);
        deltamem_head_forward(&args);
    }
}

// What follows a correction and is computed with it, by the same threads.
struct followers {
    const struct ggml_tensor * added = nullptr; // dst = out + weight read + added
    const struct ggml_tensor * norm  = nullptr; // of the rows of dst
    struct ggml_tensor *       mul   = nullptr; // the norm's rows times weights
};

// The correction's outputs [begin, end) of tokens [t0, t1), by one thread. It takes the outputs in tiles: a tile's weights,
// as float32 and by columns, stay in the first-level cache for all tokens. For a few tokens the conversion costs more than it
// saves, and the kernels take weights as they are.
static void correct_range(const struct ggml_tensor * correction, const float * reads, size_t read_stride,
                          const struct ggml_tensor * added, struct ggml_tensor * dst, int64_t t0, int64_t t1,
                          int64_t begin, int64_t end) {
    const struct ggml_tensor * out    = correction->src[0];
    const struct ggml_tensor * weight = correction->src[1];

    constexpr int64_t TILE = 256; // outputs
    constexpr int64_t COLS = 32;  // columns of the correction at a time: a block of Q8_0

    const bool    by_rows = weight->type == GGML_TYPE_Q8_0;
    const int64_t n_read  = weight->ne[by_rows ? 0 : 1];

    // adds columns [j0, j0 + nj) of the weights to outputs [i0, i0 + ni) of these tokens; `weights` begins there
    const auto correct = [&](int64_t i0, int64_t ni, int64_t j0, int64_t nj, const void * weights, size_t stride,
                             bool half) {
        // the first columns are added to `out`, the others to the sum so far
        const struct ggml_tensor * base = j0 == 0 ? out : dst;

        struct deltamem_correct_args args = {};
        args.out                          = (const float *) ((const char *) base->data + t0 * base->nb[1]) + i0;
        args.out_stride                   = base->nb[1] / sizeof(float);
        args.weight                       = weights;
        args.weight_stride                = stride;
        args.read                         = reads + t0 * read_stride + j0;
        args.read_stride                  = read_stride;
        if (added && j0 == 0) {
            args.added        = (const float *) ((const char *) added->data + t0 * added->nb[1]) + i0;
            args.added_stride = added->nb[1] / sizeof(float);
        }
        args.dst        = (float *) ((char *) dst->data + t0 * dst->nb[1]) + i0;
        args.dst_stride = dst->nb[1] / sizeof(float);
        args.n_out      = ni;
        args.n_read     = nj;
        args.n_tokens   = t1 - t0;
        args.half       = half;
        deltamem_correct_forward(&args);
    };

    if (t1 - t0 <= FEW_TOKENS && weight->type == GGML_TYPE_F16) {
        if (begin < end) {
            const char * column = (const char *) weight->data + begin * weight->nb[0];
            correct(begin, end - begin, 0, n_read, column, weight->nb[1] / weight->nb[0], true);
        }
        return;
    }

    float scratch[COLS * TILE];

    for (int64_t i0 = begin; i0 < end; i0 += TILE) {
        const int64_t ni = std::min(TILE, end - i0);

        for (int64_t j0 = 0; j0 < n_read; j0 += COLS) {
            const int64_t nj = std::min(COLS, n_read - j0);
            if (by_rows) {
                const char * blocks = (const char *) weight->data + i0 * weight->nb[1] + j0 / COLS * weight->nb[0];
                for (int64_t i = 0; i < ni; ++i) {
                    float block[COLS];
                    ggml_get_type_traits(weight->type)->to_float(blocks + i * weight->nb[1], block, COLS);
                    for (int64_t j = 0; j < COLS; ++j) {
                        scratch[j * TILE + i] = block[j];
                    }
                }
                correct(i0, ni, j0, nj, scratch, TILE, false);
                continue;
            }

            const char * columns = (const char *) weight->data + j0 * weight->nb[1] + i0 * weight->nb[0];
            if (weight->type == GGML_TYPE_F32) {
                correct(i0, ni, j0, nj, columns, weight->nb[1] / sizeof(float), false);
                continue;
            }
            for (int64_t j = 0; j < nj; ++j) {
                const char * column = columns + j * weight->nb[1];
                if (weight->type == GGML_TYPE_F16) {
                    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) column, scratch + j * TILE, ni);
                } else {
                    ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) column, scratch + j * TILE, ni);
                }
            }
            correct(i0, ni, j0, nj, scratch, TILE, false);
        }
    }
}

// Whether each thread has all outputs of a range of tokens: a norm of its rows then waits for nobody.
static bool is_by_tokens(const struct ggml_compute_params * params, const struct ggml_tensor * correction) {
    const int64_t n_tokens = correction->ne[1];
    return n_tokens > FEW_TOKENS && !takes_tiles(correction->src[1]) &&
           (n_tokens >= 4 * params->nth || ggml_cpu_deltamem_bf16_takes(params, correction));
}

// A correction and its followers. `reads` are those of correction->src[2], rows read_stride floats apart.
//
// A thread has a range of outputs for all tokens, or, if there are many, a range of tokens for all outputs. Then it
// normalises as many tokens as its second-level cache holds, before it corrects the next.
//
// `together`: of a few tokens, a range begins and ends with so many outputs, a multiple of UNIT; 0: as is best.
static void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                            const float * reads, size_t read_stride, const struct followers & next,
                            struct ggml_tensor * dst, int64_t together = 0) {
    const struct ggml_tensor * out    = correction->src[0];
    const struct ggml_tensor * weight = correction->src[1];
    const struct ggml_tensor * added  = next.added;

    const int64_t n_out    = out->ne[0];
    const int64_t n_tokens = out->ne[1];

    struct deltamem_product_args args = {};
    if (weight->type == GGML_TYPE_Q8_0) { // by rows
        args              = product_args(weight);
        args.in           = reads;
        args.in_stride    = read_stride;
        args.out          = (const float *) out->data;
        args.out_stride   = out->nb[1] / sizeof(float);
        args.added        = added ? (const float *) added->data : nullptr;
        args.added_stride = added ? added->nb[1] / sizeof(float) : 0;
        args.dst          = (float *) dst->data;
        args.dst_stride   = dst->nb[1] / sizeof(float);
        args.n_out        = n_out;
        args.n_tokens     = n_tokens;
        if (n_tokens <= FEW_TOKENS || takes_tiles(weight)) {
            forward_product(params, args, weight->nb[1], n_out, together ? together : CACHE_LINE);
            return;
        }
    }

    // the first of range k, if n are divided into nth ranges
    const auto bound = [params](int64_t n, int64_t k) { return n * k / params->nth; };

    if (!is_by_tokens(params, correction)) {
        const int64_t unit    = together ? together : UNIT;
        const int64_t n_units = (n_out + unit - 1) / unit;
        correct_range(correction, reads, read_stride, added, dst, 0, n_tokens, unit * bound(n_units, params->ith),
                      std::min(n_out, unit * bound(n_units, params->ith + 1)));
        return;
    }

    constexpr int64_t CACHED = 512 * 1024 / sizeof(float);

    const bool    in_bf16 = ggml_cpu_deltamem_bf16_takes(params, correction);
    const int64_t last    = bound(n_tokens, params->ith + 1);
    const int64_t block   = next.norm ? std::max<int64_t>(16, CACHED / n_out) : n_tokens;
    for (int64_t t0 = bound(n_tokens, params->ith), t1; t0 < last; t0 = t1) {
        t1 = std::min(last, t0 + block);
        if (in_bf16) {
            ggml_cpu_deltamem_bf16_correct(weight, &args, t0, t1);
        } else {
            correct_range(correction, reads, read_stride, added, dst, t0, t1, 0, n_out);
        }
        if (next.norm) {
            const int64_t n_rows = ggml_nrows(next.norm) / n_tokens; // of a token
            ggml_cpu_deltamem_norm_rows(next.norm, next.mul, t0 * n_rows, t1 * n_rows);
        }
    }
}

static void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                            const struct followers & next, struct ggml_tensor * dst) {
    const struct ggml_tensor * read = correction->src[2];
    forward_correct(params, correction, (const float *) read->data, read->nb[1] / sizeof(float), next, dst);
}

void ggml_compute_forward_deltamem(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    ggml_deltamem_check(dst);
    switch (ggml_deltamem_get_kind(dst)) {
        case GGML_DELTAMEM_READ:    forward_read(params, dst); break;
        case GGML_DELTAMEM_CORRECT: forward_correct(params, dst, {}, dst); break;
    }
}

//
// fused nodes
//

// dst = weight in. Of few tokens, `in` stays float32; ggml's product would convert it to the weights' type, and
// synchronise the threads once more.
static void forward_project(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * weight = dst->src[0];
    const struct ggml_tensor * in     = dst->src[1];

    struct deltamem_product_args args = product_args(weight);
    args.in                           = (const float *) in->data;
    args.in_stride                    = in->nb[1] / sizeof(float);
    args.dst                          = (float *) dst->data;
    args.dst_stride                   = dst->nb[1] / sizeof(float);
    args.n_tokens                     = dst->ne[1];
    forward_product(params, args, weight->nb[1], dst->ne[0], 1);
}

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

// A read and its correction, of one token. Each thread computes S q of all heads for its own corrections, instead of
// waiting for the thread that has the head; only that one writes the state.
static constexpr int64_t OWN_HEADS  = 8,
                         OWN_STATES = 1024; // the most heads, and floats of S, for which a thread does so

// a thread's copy of S from before the synchronisation after which it is written
alignas(64) static thread_local float own_states[OWN_STATES];

static void copy_states(const struct ggml_tensor * read) {
    const struct ggml_deltamem_params p       = ggml_deltamem_get_params(read);
    const int64_t                     n_state = (int64_t) p.rank * p.rank;
    for (int64_t head = 0; head < p.n_head; ++head) {
        memcpy(own_states + head * n_state, head_args(read, 0, head).record, n_state * sizeof(float));
    }
}

// norm, mul: what follows the correction (following_norm), of which a thread then has the rows that it has corrected; or
// NULL
static void forward_read_correct(const struct ggml_compute_params * params, struct ggml_tensor * read,
                                 struct ggml_tensor * correction, const struct ggml_tensor * norm,
                                 struct ggml_tensor * mul) {
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
        args.record  = own_states + head * n_state;
        args.read    = reads;
        args.entries = only_read;
        deltamem_head_forward(&args);
    }
    const int64_t n_row = norm ? norm->ne[0] : 0;
    forward_correct(params, correction, reads, p.n_head * p.rank, {}, correction, n_row);
    if (norm) {
        const int64_t n_rows = ggml_nrows(norm);
        ggml_cpu_deltamem_norm_rows(norm, mul, n_rows * params->ith / params->nth,
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
    const struct ggml_deltamem_params p = ggml_deltamem_get_params(read);
    return read->ne[1] == 1 && p.n_seqs == 1 && ((const int32_t *) read->src[3]->data)[2] == 1 &&
           p.n_head <= OWN_HEADS && p.n_head * p.rank * p.rank <= OWN_STATES;
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

// Where the norm of node i's rows is, which lie one after the other in it, if it and the multiplication by weights after
// it may be computed with node i, by threads that are at different nodes; else 0. Of `by_rows`, a thread reads rows that
// it normalises; of `whole`, all.
static int following_norm(const struct ggml_cgraph * cgraph, int i,
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
    const struct ggml_tensor * weights = mul->src[mul->src[0] == norm ? 1 : 0];
    if (rows->data != node->data || !ggml_is_contiguous(rows) || !ggml_is_contiguous(node) ||
        !ggml_is_contiguous(mul) || ggml_nelements(rows) != ggml_nelements(node) || rows->ne[0] % UNIT != 0 ||
        node->ne[0] % rows->ne[0] != 0 || !weights->data || !mul->data || weights->ne[0] != rows->ne[0] ||
        !ggml_cpu_deltamem_takes_norm(norm, mul) || !apart(mul, weights)) {
        return 0;
    }
    // the result may have the memory of its own rows
    const bool sound = std::all_of(by_rows.begin(), by_rows.end(), [&](const struct ggml_tensor * t) {
        return (mul->data == t->data && ggml_is_contiguous(t)) || apart(mul, t);
    });
    return sound && std::all_of(whole.begin(), whole.end(), [&](const struct ggml_tensor * t) { return apart(mul, t); })
                   ? j
                   : 0;
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
// synchronisation after that product is then the projection's, too. Both nodes ask this, in turn.
static bool joins_product(const struct ggml_cgraph * cgraph, int i) {
    return cgraph->nodes[i]->ne[1] <= FEW_TOKENS && share_input(cgraph, i - 1);
}

int ggml_cpu_deltamem_fuse(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph, int i) {
    struct ggml_tensor ** nodes = cgraph->nodes + i;

    // a product, whose own computation is ggml's, and a projection
    if (nodes[0]->op == GGML_OP_MUL_MAT && takes_projection(cgraph, i + 1) && joins_product(cgraph, i + 1)) {
        if (takes_correction(cgraph, i + 3)) {
            copy_states(nodes[2]);
        }
        forward_project(params, nodes[1]);
        return 0;
    }

    // two products of the same input: of a layer's, one may be the packed projection
    if (nodes[0]->ne[1] > FEW_TOKENS && share_input(cgraph, i) &&
        ggml_cpu_deltamem_bf16_two(params, nodes[0], nodes[1])) {
        return 1;
    }

    // a projection, its read and perhaps a correction
    if (takes_projection(cgraph, i)) {
        const bool corrects = takes_correction(cgraph, i + 2);
        if (!joins_product(cgraph, i)) {
            if (corrects) {
                copy_states(nodes[1]);
            }
            forward_project(params, nodes[0]);
            ggml_barrier(params->threadpool);
        }
        if (corrects) {
            const struct ggml_tensor * read = nodes[1];
            const int                  norm =
                    following_norm(cgraph, i + 2, { nodes[2], nodes[2]->src[0] },
                                   { nodes[2]->src[1], read, read->src[0], read->src[1], read->src[2], read->src[3] });
            forward_read_correct(params, nodes[1], nodes[2], norm ? cgraph->nodes[norm] : nullptr,
                                 norm ? cgraph->nodes[norm + 1] : nullptr);
            return norm ? norm + 1 - i : 2;
        }
        forward_read(params, nodes[1]);
        return 1;
    }

    // a correction, an addition and a norm
    if (nodes[0]->op == GGML_OP_DELTAMEM && are_computed(cgraph, i, i + 1) &&
        ggml_deltamem_get_kind(nodes[0]) == GGML_DELTAMEM_CORRECT) {
        const struct ggml_tensor * correction = nodes[0];
        struct followers           next;
        int                        last = i;
        ggml_deltamem_check(correction);
        if (are_computed(cgraph, i, i + 2) && ggml_can_fuse(cgraph, i, { GGML_OP_DELTAMEM, GGML_OP_ADD })) {
            const struct ggml_tensor * added = nodes[1]->src[nodes[1]->src[0] == correction ? 1 : 0];
            if (takes_addition(correction, nodes[1], added)) {
                next.added = added;
                last       = i + 1;
            }
        }
        struct ggml_tensor * dst = cgraph->nodes[last];
        if (is_by_tokens(params, correction)) {
            const int norm = following_norm(cgraph, last, { dst, correction->src[0], next.added ? next.added : dst },
                                            { correction->src[1], correction->src[2] });
            if (norm) {
                next.norm = cgraph->nodes[norm];
                next.mul  = cgraph->nodes[norm + 1];
                last      = norm + 1;
            }
        }
        if (last > i) {
            forward_correct(params, correction, next, dst);
            return last - i;
        }
    }
    return 0;
}

bool ggml_cpu_deltamem_omp_waits(void) {
    // not at load time: ggml loads modules for processors that this one is not, to ask them whether they run here
    static const bool waits = [] {
        for (const char * name : { "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY" }) {
            if (std::getenv(name)) {
                return true;
            }
        }
        return false;
    }();
    return waits;
}
