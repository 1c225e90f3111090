// The graph of a composite (deltamem-composite.h). Compiled into ggml-base.
//
// The recurrence is GGML_OP_GATED_DELTA_NET, which llama.cpp's models have brought to every backend, and which keeps
// float32 where a backend multiplies matrices in half precision:
//
//     M <- e^g M;  M <- M + (v' - M k) b kᵀ;  out = M q / sqrt(width)                       one g and one b per head
//
// Ours is that with
//
//     e^g = keep    b = erase / keep    v' = v write / b
//
//     standard         g = log λ    b = β / λ    v' = λ v
//     lambda_outside   g = log λ    b = β        v' = v
//     no_lambda        g = 0        b = β        v' = v
//
//     coupled          λ = σ(-x)    log λ = -softplus(x)     β / λ = e^x         β = σ(x)
//     separate         λ = σ(y)     log λ = -softplus(-y)    β / λ = σ(x) / σ(y)
//
// Three things differ. It reads after it has written, we before: its step t writes token t - 1 and reads for token t.
// Its gates are one per head: with one per row, each row of S is a head, of which only the first row is not zero. And
// its states are as wide as its kernels want them: zeros fill the rest.

#include "deltamem-composite.h"

#include <cfloat>
#include <cmath>

// λ is at least e^-30: products with β / λ stay finite, and what is kept of a state in that case is less than float32
// resolves
static constexpr float MAX_LOGIT = 30.0f;

ggml_deltamem_composite_inputs ggml_deltamem_new_composite_inputs(ggml_context *                 ctx,
                                                                  const ggml_deltamem_schedule & schedule) {
    ggml_deltamem_composite_inputs in;

    in.shape.n_tokens  = schedule.n_tokens;
    in.shape.n_seqs    = schedule.n_seqs;
    in.shape.n_records = schedule.n_records;
    in.shape.n_means   = schedule.n_means;
    in.shape.n_runs    = schedule.n_runs;
    in.shape.n_steps   = schedule.n_steps;
    in.shape.n_each    = schedule.n_each;

    const auto matrices = [ctx](ggml_type type, int64_t n, int64_t rows, int64_t n_matrices, const char * what) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, n, rows, n_matrices);
        ggml_set_input(t);
        ggml_format_name(t, "deltamem_%s", what);
        return t;
    };
    const auto matrix = [&](ggml_type type, int64_t n, int64_t rows, const char * what) {
        return matrices(type, n, rows, 1, what);
    };
    const auto vector = [&](ggml_type type, int64_t n, const char * what) { return matrix(type, n, 1, what); };
    in.slot           = vector(GGML_TYPE_I32, schedule.n_records, "slot");
    in.source         = vector(GGML_TYPE_I32, schedule.n_runs, "source");
    in.write          = vector(GGML_TYPE_I32, schedule.n_runs * schedule.n_steps, "write");
    in.read           = vector(GGML_TYPE_I32, schedule.n_runs * schedule.n_steps, "read");
    in.out            = vector(GGML_TYPE_I32, schedule.n_tokens, "out");
    if (schedule.n_means > 0) {
        const int64_t n_sums = schedule.n_means + schedule.n_records;

        in.first  = vector(GGML_TYPE_I32, schedule.n_seqs, "first");
        in.weight = matrices(GGML_TYPE_F32, schedule.n_each, n_sums, schedule.n_seqs, "weight");
        if (schedule.n_seqs > 1) {
            in.member = vector(GGML_TYPE_I32, schedule.n_seqs * schedule.n_each, "member");
            in.pick   = vector(GGML_TYPE_I32, n_sums, "pick");
        }
        in.carry = vector(GGML_TYPE_I32, n_sums, "carry");
        in.one   = matrix(GGML_TYPE_F32, 1, schedule.n_tokens, "one");
        in.count = matrix(GGML_TYPE_F32, 1, n_sums, "count");
    }
    return in;
}

template <typename T> static void set(ggml_tensor * t, const std::vector<T> & values) {
    if (t && t->buffer) { // else no node needs it
        GGML_ASSERT(ggml_nelements(t) == (int64_t) values.size());
        ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    }
}

void ggml_deltamem_set_composite_inputs(const ggml_deltamem_composite_inputs & inputs,
                                        const ggml_deltamem_schedule &         schedule) {
    set(inputs.slot, schedule.slot);
    set(inputs.source, schedule.source);
    set(inputs.write, schedule.write);
    set(inputs.read, schedule.read);
    set(inputs.out, schedule.out);
    set(inputs.member, schedule.member);
    set(inputs.weight, schedule.weight);
    set(inputs.pick, schedule.pick);
    set(inputs.first, schedule.first);
    set(inputs.carry, schedule.carry);
    set(inputs.one, schedule.one);
    set(inputs.count, schedule.count);
}

namespace {

// The composite of one layer. Comments give the dimensions of tensors, the first one contiguous; i is a row of S, j a
// column, h a state head.
class composite {
public:
    composite(ggml_context * ctx, ggml_tensor * proj, ggml_tensor * gate_bias, ggml_tensor * state,
              const ggml_deltamem_composite_inputs & in, const ggml_deltamem_params & p, int width) :
        ctx(ctx),
        in(in),
        p(p),
        proj(proj),
        gate_bias(gate_bias),
        state(state),
        r(p.rank),
        n_head(p.n_head),
        width(width),
        by_rows(has(GGML_DELTAMEM_RANKWISE_GATES) && p.rank > 1),
        heads(n_head * (by_rows ? r : 1)),
        n_runs(in.shape.n_runs),
        n_steps(in.shape.n_steps) {
        GGML_ASSERT(r >= 1 && r <= width && n_head >= 1);
        GGML_ASSERT(has(GGML_DELTAMEM_SEGMENTS) == (in.shape.n_means > 0));
        GGML_ASSERT(proj->type == GGML_TYPE_F32 && gate_bias->type == GGML_TYPE_F32 && state->type == GGML_TYPE_F32);
        GGML_ASSERT(proj->ne[0] == ggml_deltamem_n_proj(&p) && proj->ne[1] == in.shape.n_tokens);
        GGML_ASSERT(ggml_is_matrix(proj) && ggml_is_contiguous(proj));
        GGML_ASSERT(gate_bias->ne[0] == ggml_deltamem_n_gates(&p) && ggml_is_vector(gate_bias));
        GGML_ASSERT(state->ne[0] == n_head * ggml_deltamem_n_record(&p) && ggml_is_matrix(state));
    }

    ggml_deltamem_composite_result build() {
        ggml_tensor * states = has(GGML_DELTAMEM_SEGMENTS) ? begin_segments() : ggml_get_rows(ctx, state, in.source);

        activate();

        // M = Sᵀ: [j, i, h], or [j, 1, (h, i)] by rows
        ggml_tensor * S0 = ggml_reshape_4d(ctx, states, r, r, n_head, n_runs);                   // i, j, h
        S0 = by_rows ? ggml_cont_4d(ctx, ggml_permute(ctx, S0, 2, 0, 1, 3), r, 1, heads, n_runs) // j, h, i
                     : ggml_cont(ctx, ggml_permute(ctx, S0, 1, 0, 2, 3));                        // j, i, h
        if (S0->ne[0] < width || S0->ne[1] < width) {
            S0 = ggml_pad(ctx, S0, width - S0->ne[0], width - S0->ne[1], 0, 0);
        }

        ggml_tensor * scan = ggml_gated_delta_net(ctx, steps(q, in.read, width, n_head),
                                                  steps(k, in.write, width, n_head), steps(v, in.write, width, heads),
                                                  steps(g, in.write, 1, heads), steps(b, in.write, 1, heads), S0, 1);

        return { reads(scan), write(after(scan)) };
    }

private:
    ggml_context *                         ctx;
    const ggml_deltamem_composite_inputs & in;
    const ggml_deltamem_params             p;
    ggml_tensor *                          proj; // [n_proj, rows]: tokens, then means
    ggml_tensor *                          gate_bias;
    ggml_tensor *                          state;
    const int64_t                          r, n_head, width;
    const bool                             by_rows; // a head of the recurrence is a row of S
    const int64_t                          heads;   // of the recurrence
    const int64_t                          n_runs, n_steps;

    // with one more row, of zeros
    ggml_tensor *q, *k, *v, *g, *b;

    // with segments
    ggml_tensor * means_count = nullptr; // [1, n_means], at most 1
    ggml_tensor * left_sum    = nullptr; // [n_proj, n_records]
    ggml_tensor * left_count  = nullptr; // [1, n_records]

    bool has(int flag) const { return (p.flags & flag) != 0; }

    int64_t n_rows() const { return proj->ne[1]; }

    // x [(i, h), rows] in the order of the recurrence's heads, [h, i, rows]
    ggml_tensor * by_head(ggml_tensor * x) {
        if (!by_rows || n_head == 1) {
            return x;
        }
        x = ggml_view_3d(ctx, x, r, n_head, x->ne[1], r * x->nb[0], x->nb[1], 0);
        return ggml_cont_2d(ctx, ggml_permute(ctx, x, 1, 0, 2, 3), heads, x->ne[2]);
    }

    // e^g = keep, b = erase / keep, v = v write / b, of every row; q and k
    void activate() {
        const size_t f = sizeof(float);

        // q, k <- norm(tanh(q)), norm(tanh(k)): [j, (q or k, h), rows]
        ggml_tensor * qk = ggml_view_3d(ctx, proj, r, 2 * n_head, n_rows(), r * f, proj->nb[1], 0);
        if (has(GGML_DELTAMEM_NORMALIZE_QK)) {
            qk = ggml_l2_norm(ctx, ggml_tanh(ctx, aligned(qk)), 1e-6f);
        }
        qk = ggml_pad(ctx, qk, width - r, 0, 1, 0);
        q  = ggml_view_2d(ctx, qk, width * n_head, n_rows() + 1, qk->nb[2], 0);
        k  = ggml_view_2d(ctx, qk, width * n_head, n_rows() + 1, qk->nb[2], width * n_head * f);

        // x = gates + b_β, and y if λ is separate
        const int64_t n_gates = ggml_deltamem_n_gates(&p);
        const bool    is_sep  = p.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE;
        const int64_t n_gate  = is_sep ? n_gates / 2 : n_gates;

        ggml_tensor * gates = ggml_view_2d(ctx, proj, n_gates, n_rows(), proj->nb[1], 3 * n_head * r * f);
        gates               = ggml_add(ctx, aligned(gates), gate_bias);

        ggml_tensor * x = by_head(is_sep ? ggml_view_2d(ctx, gates, n_gate, n_rows(), gates->nb[1], 0) : gates);
        ggml_tensor * y =
                is_sep ? by_head(ggml_view_2d(ctx, gates, n_gate, n_rows(), gates->nb[1], n_gate * f)) : nullptr;

        ggml_tensor * lambda = nullptr; // what v is multiplied with
        const bool    inside = p.lambda != GGML_DELTAMEM_LAMBDA_NONE && !has(GGML_DELTAMEM_LAMBDA_OUTSIDE);
        switch (p.lambda) {
            case GGML_DELTAMEM_LAMBDA_COUPLED: {
                x = clamped(x, -FLT_MAX, MAX_LOGIT);
                g = ggml_neg(ctx, ggml_softplus(ctx, x));
                b = inside ? ggml_exp(ctx, x) : ggml_sigmoid(ctx, x);
                if (inside) {
                    lambda = ggml_sigmoid(ctx, ggml_neg(ctx, x));
                }
                break;
            }
            case GGML_DELTAMEM_LAMBDA_SEPARATE: {
                y = clamped(y, -MAX_LOGIT, FLT_MAX);
                g = ggml_neg(ctx, ggml_softplus(ctx, ggml_neg(ctx, y)));
                b = ggml_sigmoid(ctx, x);
                if (inside) {
                    lambda = ggml_sigmoid(ctx, y);
                    b      = ggml_div(ctx, b, lambda);
                }
                break;
            }
            default: {
                b = ggml_sigmoid(ctx, x);
                g = ggml_scale(ctx, b, 0.0f);
                break;
            }
        }
        if (means_count) {
            // the mean of no token writes nothing
            ggml_tensor * factor = ggml_concat(ctx, in.one, means_count, 1);
            g                    = ggml_mul(ctx, g, factor);
            b                    = ggml_mul(ctx, b, factor);
        }
        g = ggml_pad(ctx, ggml_reshape_2d(ctx, g, heads, n_rows()), 0, 1, 0, 0);
        b = ggml_pad(ctx, ggml_reshape_2d(ctx, b, heads, n_rows()), 0, 1, 0, 0);

        // [1, (h, i), rows] by rows, [i, h, rows] otherwise
        const int64_t n = by_rows ? 1 : r;

        v = by_head(ggml_view_2d(ctx, proj, n_head * r, n_rows(), proj->nb[1], 2 * n_head * r * f));
        v = ggml_view_3d(ctx, v, n, heads, n_rows(), n * f, v->nb[1], 0);
        if (lambda) {
            v = ggml_mul(ctx, v, ggml_reshape_3d(ctx, lambda, 1, heads, n_rows()));
        }
        v = ggml_pad(ctx, v, width - n, 0, 1, 0);
        v = ggml_reshape_2d(ctx, v, width * heads, n_rows() + 1);
    }

    // ggml-metal takes four floats of a row at once where a row is a multiple of four long, wherever it begins
    ggml_tensor * aligned(ggml_tensor * x) {
        const size_t four = 4 * sizeof(float);
        const bool   is   = x->view_offs % four == 0 && x->nb[1] % four == 0 && x->nb[2] % four == 0;
        return x->ne[0] % 4 != 0 || is ? x : ggml_cont(ctx, x);
    }

    // ggml_clamp writes to its source, which nothing else may need
    ggml_tensor * clamped(ggml_tensor * x, float min, float max) {
        return ggml_clamp(ctx, ggml_is_contiguous(x) ? x : ggml_cont(ctx, x), min, max);
    }

    // the rows of x [n * n_heads, rows + 1] that the steps take
    ggml_tensor * steps(ggml_tensor * x, ggml_tensor * rows, int64_t n, int64_t n_heads) {
        return ggml_reshape_4d(ctx, ggml_get_rows(ctx, x, rows), n, n_heads, n_steps, n_runs);
    }

    // [(i, h), n_tokens]
    ggml_tensor * reads(ggml_tensor * scan) {
        const size_t  f   = sizeof(float);
        const int64_t n   = width * heads;
        ggml_tensor * out = ggml_view_2d(ctx, scan, n, n_steps * n_runs, n * f, 0);
        out               = ggml_get_rows(ctx, out, in.out);

        const int64_t n_tokens = in.shape.n_tokens;
        if (by_rows) {
            out = ggml_view_4d(ctx, out, 1, n_head, r, n_tokens, width * f, width * n_head * f, n * f, 0); // -, h, i
            out = ggml_cont_2d(ctx, ggml_permute(ctx, out, 3, 1, 0, 2), r * n_head, n_tokens);
        } else if (width > r) {
            out = ggml_view_3d(ctx, out, r, n_head, n_tokens, width * f, n * f, 0);
            out = ggml_cont_2d(ctx, out, r * n_head, n_tokens);
        }
        return ggml_scale(ctx, out, sqrtf((float) width)); // GGML_OP_GATED_DELTA_NET divides by it
    }

    // the states after the runs: [(i, j, h), n_runs]
    ggml_tensor * after(ggml_tensor * scan) {
        const size_t f  = sizeof(float);
        const size_t at = width * heads * n_steps * n_runs * f;
        const size_t w2 = width * width * f;
        if (by_rows) {
            ggml_tensor * S = ggml_view_4d(ctx, scan, r, n_head, r, n_runs, w2, w2 * n_head, w2 * heads, at); // j, h, i
            return ggml_cont_2d(ctx, ggml_permute(ctx, S, 1, 2, 0, 3), r * r * n_head, n_runs);
        }
        ggml_tensor * S = ggml_view_4d(ctx, scan, r, r, n_head, n_runs, width * f, w2, w2 * heads, at); // j, i, h
        return ggml_cont_2d(ctx, ggml_permute(ctx, S, 1, 0, 2, 3), r * r * n_head, n_runs);
    }

    // S, and with segments the whole record, into the slots
    ggml_tensor * write(ggml_tensor * S) {
        if (has(GGML_DELTAMEM_SEGMENTS)) {
            S = end_segments(S);
        }
        return ggml_set_rows(ctx, state, S, in.slot);
    }

    //
    // segments
    //

    // The means of the segments become rows of `proj`. Returns the states that the runs begin with.
    ggml_tensor * begin_segments() {
        const size_t  f        = sizeof(float);
        const int64_t n_seqs   = in.shape.n_seqs;
        const int64_t n_means  = in.shape.n_means;
        const int64_t n_record = ggml_deltamem_n_record(&p);
        const int64_t n_sum    = 3 * r + ggml_deltamem_n_gates_head(&p);

        ggml_tensor * records = ggml_get_rows(ctx, state, in.first);

        const auto part = [&](int64_t n, int64_t at) {
            return ggml_view_3d(ctx, records, n, n_head, n_seqs, n_record * f, records->nb[1], at * f);
        };
        ggml_tensor * S       = ggml_cont_2d(ctx, part(r * r, 0), r * r * n_head, n_seqs);
        ggml_tensor * pending = ggml_cont_2d(ctx, part(r * r, r * r), r * r * n_head, n_seqs);
        ggml_tensor * sum     = ggml_cont_2d(ctx, part(n_sum, 2 * r * r), n_sum * n_head, n_seqs);
        ggml_tensor * count   = ggml_view_2d(ctx, records, 1, n_seqs, records->nb[1], (2 * r * r + n_sum) * f);

        // sums = those of the records + projections of tokens
        sum   = ggml_get_rows(ctx, ggml_pad(ctx, sum, 0, 1, 0, 0), in.carry);
        count = ggml_get_rows(ctx, ggml_pad(ctx, count, 0, 1, 0, 0), in.carry);

        sum   = ggml_add(ctx, sums_of_tokens(), sum);
        count = ggml_add(ctx, in.count, count);

        left_sum   = ggml_view_2d(ctx, sum, sum->ne[0], in.shape.n_records, sum->nb[1], n_means * sum->nb[1]);
        left_count = ggml_view_2d(ctx, count, 1, in.shape.n_records, f, n_means * f);

        // mean = sum / count
        ggml_tensor * n = ggml_view_2d(ctx, count, 1, n_means, f, 0);
        means_count     = clamped(ggml_scale(ctx, n, 1.0f), 0.0f, 1.0f);
        sum             = ggml_view_2d(ctx, sum, sum->ne[0], n_means, sum->nb[1], 0);
        proj = ggml_concat(ctx, proj, ggml_div(ctx, sum, clamped(ggml_scale(ctx, n, 1.0f), 1.0f, FLT_MAX)), 1);

        return ggml_get_rows(ctx, ggml_concat(ctx, S, pending, 1), in.source);
    }

    // of projections: [n_proj, n_means + n_records]
    ggml_tensor * sums_of_tokens() {
        const int64_t n_seqs = in.shape.n_seqs, n_each = in.shape.n_each;

        ggml_tensor * rows = proj;
        if (in.member) {
            rows = ggml_get_rows(ctx, ggml_pad(ctx, proj, 0, 1, 0, 0), in.member);
            rows = ggml_reshape_3d(ctx, rows, proj->ne[0], n_each, n_seqs);
        }
        ggml_tensor * tokens = ggml_cont(ctx, ggml_transpose(ctx, rows)); // [n_each, n_proj, n_seqs]
        ggml_tensor * sums   = ggml_deltamem_mul_mat(ctx, tokens, in.weight);
        if (in.pick) {
            sums = ggml_reshape_2d(ctx, sums, sums->ne[0], sums->ne[1] * n_seqs);
            sums = ggml_get_rows(ctx, sums, in.pick);
        }
        return sums;
    }

    // The records, [S, pending, sum, count] for each head: [H*n_record, n_records]
    ggml_tensor * end_segments(ggml_tensor * states) {
        const int64_t n     = in.shape.n_records;
        const int64_t n_sum = 3 * r + ggml_deltamem_n_gates_head(&p);
        const size_t  row   = states->nb[1];

        ggml_tensor * S       = ggml_view_3d(ctx, states, r * r, n_head, n, r * r * sizeof(float), row, 0);
        ggml_tensor * pending = ggml_view_3d(ctx, states, r * r, n_head, n, r * r * sizeof(float), row, n * row);

        ggml_tensor * sum   = ggml_reshape_3d(ctx, left_sum, n_sum, n_head, n);
        ggml_tensor * count = ggml_repeat_4d(ctx, ggml_reshape_3d(ctx, left_count, 1, 1, n), 1, n_head, n, 1);

        ggml_tensor * record = ggml_concat(ctx, ggml_concat(ctx, S, pending, 0), ggml_concat(ctx, sum, count, 0), 0);
        return ggml_reshape_2d(ctx, record, n_head * record->ne[0], n);
    }
};

} // namespace

ggml_deltamem_composite_result ggml_deltamem_composite(ggml_context * ctx, ggml_tensor * proj, ggml_tensor * gate_bias,
                                                       ggml_tensor *                          state,
                                                       const ggml_deltamem_composite_inputs & inputs,
                                                       ggml_deltamem_params params, int width) {
    return composite(ctx, proj, gate_bias, state, inputs, params, width).build();
}

// whether the device computes every node for two tokens of a sequence and one of another
static bool supports(ggml_backend_dev_t device, ggml_deltamem_params params, int width) {
    params.n_seqs = 2;

    const bool    segments = (params.flags & GGML_DELTAMEM_SEGMENTS) != 0;
    const int     write    = GGML_DELTAMEM_TOKEN_WRITE;
    const int     first    = GGML_DELTAMEM_TOKEN_BEGIN | GGML_DELTAMEM_TOKEN_ACCUMULATE;
    const int     last     = GGML_DELTAMEM_TOKEN_ACCUMULATE | GGML_DELTAMEM_TOKEN_COMMIT;
    const int32_t plan[]   = { 0, 0,
                               2, 1,
                               2, 1, // slots and entries, then tokens
                               0, segments ? first : write,
                               1, segments ? last : write,
                               2, segments ? first : write };

    const size_t   n_tensors = 2 * GGML_DELTAMEM_COMPOSITE_NODES;
    ggml_context * ctx       = ggml_init({ n_tensors * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true });
    GGML_ASSERT(ctx);

    const ggml_deltamem_composite_inputs inputs =
            ggml_deltamem_new_composite_inputs(ctx, ggml_deltamem_make_schedule(params, plan, 3));
    ggml_deltamem_composite(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ggml_deltamem_n_proj(&params), 3),
                            ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_deltamem_n_gates(&params)),
                            ggml_new_tensor_2d(ctx, GGML_TYPE_F32, params.n_head * ggml_deltamem_n_record(&params), 2),
                            inputs, params, width);
    bool all = true;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        all = all && (t->op == GGML_OP_NONE || ggml_backend_dev_supports_op(device, t));
    }
    ggml_free(ctx);
    return all;
}

int ggml_deltamem_composite_width(ggml_backend_dev_t device, ggml_deltamem_params params) {
    if (params.flags & GGML_DELTAMEM_DEFERRED) {
        return 0;
    }
    // only the CPU has a loop over any width; CUDA's and SYCL's backends say that they have, and abort
    if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU && supports(device, params, params.rank)) {
        return params.rank;
    }
    for (const int width : { 16, 32, 64 }) {
        if (width >= params.rank && supports(device, params, width)) {
            return width;
        }
    }
    return 0;
}
