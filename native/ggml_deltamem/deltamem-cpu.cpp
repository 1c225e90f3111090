// CPU forward of GGML_OP_DELTAMEM: divides the work of a node among the threads (deltamem-share.h). Compiled into ggml-cpu,
// so once per CPU variant, with that variant's flags.

#include "deltamem-cpu.h"

#include "deltamem-bf16.h"
#include "deltamem-kernel.h"
#include "deltamem-norm.h"
#include "deltamem-share.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace deltamem {

static constexpr int64_t CACHE_LINE = 64 / sizeof(float);

bool takes_tiles(const struct ggml_tensor * weight) {
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

struct deltamem_head_args head_args(const struct ggml_tensor * dst, int64_t i_seq, int64_t head) {
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

void forward_read(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_deltamem_params p = ggml_deltamem_get_params(dst);

    const int64_t n_items = (int64_t) p.n_seqs * p.n_head;
    for (int64_t item = params->ith; item < n_items; item += params->nth) {
        const struct deltamem_head_args args = head_args(dst, item / p.n_head, item % p.n_head);
        deltamem_head_forward(&args);
    }
}

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

bool is_by_tokens(const struct ggml_compute_params * params, const struct ggml_tensor * correction) {
    const int64_t n_tokens = correction->ne[1];
    return n_tokens > FEW_TOKENS && !takes_tiles(correction->src[1]) &&
           (n_tokens >= 4 * params->nth || ggml_cpu_deltamem_bf16_takes(params, correction));
}

void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                     const float * reads, size_t read_stride, const struct followers & next, struct ggml_tensor * dst,
                     int64_t together) {
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

void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                     const struct followers & next, struct ggml_tensor * dst) {
    const struct ggml_tensor * read = correction->src[2];
    forward_correct(params, correction, (const float *) read->data, read->nb[1] / sizeof(float), next, dst);
}

void forward_project(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
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

} // namespace deltamem

void ggml_compute_forward_deltamem(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    ggml_deltamem_check(dst);
    switch (ggml_deltamem_get_kind(dst)) {
        case GGML_DELTAMEM_READ:    deltamem::forward_read(params, dst); break;
        case GGML_DELTAMEM_CORRECT: deltamem::forward_correct(params, dst, {}, dst); break;
    }
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
