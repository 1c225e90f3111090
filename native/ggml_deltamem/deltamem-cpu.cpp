// CPU forward of GGML_OP_DELTAMEM: divides the work among the threads. Compiled into ggml-cpu, so once per CPU variant,
// with that variant's flags.

#include "deltamem-cpu.h"

#include "deltamem-bf16.h"
#include "deltamem-kernel.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

// Up to so many tokens, a correction takes weights as they are stored, and a projection is computed with its read. For
// more, a correction converts its weights to float32 first, and a projection is left to ggml's product. With AMX, tiles
// multiply more tokens and weights in Q8_0.
static constexpr int64_t FEW_TOKENS = 4;

static constexpr int64_t CACHE_LINE = 64 / sizeof(float);

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

// dst = out + weight read + added: a correction, and the addition that follows it unless `added` is NULL; then dst is
// the correction itself. `reads` are those of correction->src[2], rows read_stride floats apart.
//
// A thread has a range of outputs for all tokens, or, if there are many, a range of tokens for all outputs. It takes
// the outputs in tiles: a tile's weights, as float32 and by columns, stay in the first-level cache for all tokens. For a
// few tokens the conversion costs more than it saves, and the kernels take weights as they are.
static void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                            const float * reads, size_t read_stride, const struct ggml_tensor * added,
                            struct ggml_tensor * dst) {
    const struct ggml_tensor * out    = correction->src[0];
    const struct ggml_tensor * weight = correction->src[1];

    constexpr int64_t UNIT = 64;  // outputs that one thread has together: whole cache lines, whole blocks of vectors
    constexpr int64_t TILE = 256; // outputs
    constexpr int64_t COLS = 32;  // columns of the correction at a time: a block of Q8_0

    const bool by_rows = weight->type == GGML_TYPE_Q8_0;

    const int64_t n_out    = out->ne[0];
    const int64_t n_read   = weight->ne[by_rows ? 0 : 1];
    const int64_t n_tokens = out->ne[1];

    if (by_rows) {
        struct deltamem_product_args args = product_args(weight);
        args.in                           = reads;
        args.in_stride                    = read_stride;
        args.out                          = (const float *) out->data;
        args.out_stride                   = out->nb[1] / sizeof(float);
        args.added                        = added ? (const float *) added->data : nullptr;
        args.added_stride                 = added ? added->nb[1] / sizeof(float) : 0;
        args.dst                          = (float *) dst->data;
        args.dst_stride                   = dst->nb[1] / sizeof(float);
        args.n_tokens                     = n_tokens;
        if (n_tokens <= FEW_TOKENS || takes_tiles(weight)) {
            forward_product(params, args, weight->nb[1], n_out, CACHE_LINE);
            return;
        }
        if (ggml_cpu_deltamem_bf16_correct(params, weight, &args)) {
            return;
        }
    }

    const bool by_tokens = n_tokens >= 4 * params->nth;

    // the first of range k, if n are divided into nth ranges
    const auto bound = [params](int64_t n, int64_t k) { return n * k / params->nth; };

    const int64_t n_units = (n_out + UNIT - 1) / UNIT;
    const int64_t t0      = by_tokens ? bound(n_tokens, params->ith) : 0;
    const int64_t t1      = by_tokens ? bound(n_tokens, params->ith + 1) : n_tokens;
    const int64_t begin   = by_tokens ? 0 : UNIT * bound(n_units, params->ith);
    const int64_t end     = by_tokens ? n_out : std::min(n_out, UNIT * bound(n_units, params->ith + 1));

    // adds columns [j0, j0 + nj) of the weights to outputs [i0, i0 + ni) of this thread's tokens; `weights` begins
    // there
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

static void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                            const struct ggml_tensor * added, struct ggml_tensor * dst) {
    const struct ggml_tensor * read = correction->src[2];
    forward_correct(params, correction, (const float *) read->data, read->nb[1] / sizeof(float), added, dst);
}

void ggml_compute_forward_deltamem(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    ggml_deltamem_check(dst);
    switch (ggml_deltamem_get_kind(dst)) {
        case GGML_DELTAMEM_READ:    forward_read(params, dst); break;
        case GGML_DELTAMEM_CORRECT: forward_correct(params, dst, nullptr, dst); break;
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
           in->type == GGML_TYPE_F32 && mul_mat->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(in) &&
           ggml_is_contiguous_rows(weight) && ggml_is_contiguous_rows(mul_mat) && ggml_is_matrix(in) &&
           ggml_is_matrix(weight) && ggml_is_matrix(mul_mat) && weight->ne[0] == in->ne[0] &&
           weight->ne[1] == mul_mat->ne[0] && in->ne[1] == mul_mat->ne[1];
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
           ggml_are_same_shape(added, correction) && added->nb[0] == sizeof(float) && add->nb[0] == sizeof(float) &&
           in_place_or_apart(add, correction->src[0]) && in_place_or_apart(add, added) &&
           apart(add, correction->src[1]) && apart(add, correction->src[2]);
}

// A projection, its read and its correction, of one token. Each thread computes S q of all heads for its own
// corrections, instead of waiting for the thread that has the head; only that one writes the state.
static constexpr int64_t OWN_HEADS  = 8,
                         OWN_STATES = 1024; // the most heads, and floats of S, for which a thread does so

static void forward_project_read_correct(const struct ggml_compute_params * params, struct ggml_tensor * proj,
                                         struct ggml_tensor * read, struct ggml_tensor * correction) {
    const struct ggml_deltamem_params p = ggml_deltamem_get_params(read);

    const int64_t n_state = (int64_t) p.rank * p.rank;

    alignas(64) float states[OWN_STATES];
    alignas(64) float reads[OWN_HEADS * GGML_DELTAMEM_MAX_RANK];

    struct deltamem_head_args heads[OWN_HEADS];

    // a copy of S from before the barrier, after which it is written
    for (int64_t head = 0; head < p.n_head; ++head) {
        heads[head] = head_args(read, 0, head);
        memcpy(states + head * n_state, heads[head].record, n_state * sizeof(float));
    }
    forward_project(params, proj);
    ggml_barrier(params->threadpool);

    const int32_t only_read[GGML_DELTAMEM_PLAN_TOKEN] = { 0, 0 };
    for (int64_t head = 0; head < p.n_head; ++head) {
        struct deltamem_head_args & args = heads[head];
        if (head % params->nth == params->ith) {
            deltamem_head_forward(&args);
            memcpy(reads + head * p.rank, args.read + head * p.rank, p.rank * sizeof(float));
            continue;
        }
        args.record  = states + head * n_state;
        args.read    = reads;
        args.entries = only_read;
        deltamem_head_forward(&args);
    }
    forward_correct(params, correction, reads, p.n_head * p.rank, nullptr, correction);
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

int ggml_cpu_deltamem_fuse(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph, int i) {
    if (i + 1 >= cgraph->n_nodes) {
        return 0;
    }
    struct ggml_tensor * node = cgraph->nodes[i];
    struct ggml_tensor * next = cgraph->nodes[i + 1];

    const bool is_projection = node->op == GGML_OP_MUL_MAT && next->op == GGML_OP_DELTAMEM && next->src[0] == node;
    const bool is_correction = node->op == GGML_OP_DELTAMEM && next->op == GGML_OP_ADD;
    if (!(is_projection || is_correction) || !(node->flags & next->flags & GGML_TENSOR_FLAG_COMPUTE) ||
        ggml_is_empty(node) || ggml_is_empty(next)) {
        return 0;
    }

    if (is_projection && ggml_deltamem_get_kind(next) == GGML_DELTAMEM_READ && takes_projection(node)) {
        ggml_deltamem_check(next);
        if (i + 2 < cgraph->n_nodes && takes_correction(next, cgraph->nodes[i + 2])) {
            forward_project_read_correct(params, node, next, cgraph->nodes[i + 2]);
            return 2;
        }
        forward_project(params, node);
        ggml_barrier(params->threadpool);
        forward_read(params, next);
        return 1;
    }

    if (is_correction && ggml_deltamem_get_kind(node) == GGML_DELTAMEM_CORRECT &&
        ggml_can_fuse(cgraph, i, { GGML_OP_DELTAMEM, GGML_OP_ADD })) {
        const struct ggml_tensor * added = next->src[next->src[0] == node ? 1 : 0];
        ggml_deltamem_check(node);
        if (takes_addition(node, next, added)) {
            forward_correct(params, node, added, next);
            return 1;
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
