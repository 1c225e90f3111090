// The CPU kernel of GGML_OP_DELTAMEM: gate activations, normalisation and the delta-rule recurrence of one head.
//
// Entries are taken in short chunks. The activations of a chunk are computed first, over contiguous arrays and so in full
// vectors whatever the rank. The recurrence then walks the chunk with lanes over the rows of the state: rows evolve
// independently, so neither the read S q nor S k needs a sum over lanes, and for r = 8 and 16 a block of rows stays in
// registers for the whole chunk.

#include "deltamem-kernel.h"

#include "deltamem-simd.h"

#include <initializer_list>

namespace deltamem {

static constexpr int MAX_RANK = GGML_DELTAMEM_MAX_RANK;
static constexpr int CHUNK    = 16; // entries: the five arrays below fit a first-level cache at any rank
static constexpr int PAD      = 16; // floats that a vector may reach past the last row

// What the recurrence needs of a token, activated. Token t, row i at [t*r + i]. Gates are per row here in any case.
struct chunk {
    alignas(64) float q    [CHUNK*MAX_RANK + PAD];
    alignas(64) float k    [CHUNK*MAX_RANK + PAD];
    alignas(64) float keep [CHUNK*MAX_RANK + PAD];
    alignas(64) float erase[CHUNK*MAX_RANK + PAD];
    alignas(64) float value[CHUNK*MAX_RANK + PAD]; // write * v

    // gate pre-activations while gathering, gates thereafter
    alignas(64) float beta  [CHUNK*MAX_RANK + PAD];
    alignas(64) float lambda[CHUNK*MAX_RANK + PAD];
};

// what every entry of a head shares
struct head {
    int  rank;
    int  n_head;
    int  index;
    int  n_gate;       // floats per gate: r, or 1 if gates are per head
    bool has_lambda;   // λ has a projection of its own
    bool keep_all;     // keep = 1
    bool erase_lambda; // erase = λ β
    bool normalize;

    const float * bias_beta;
    const float * bias_lambda;
};

static head make_head(const deltamem_head_args & args) {
    const ggml_deltamem_params & p = args.params;

    head h;
    h.rank         = p.rank;
    h.n_head       = p.n_head;
    h.index        = args.head;
    h.n_gate       = (p.flags & GGML_DELTAMEM_RANKWISE_GATES) ? p.rank : 1;
    h.has_lambda   = p.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE;
    h.keep_all     = p.lambda == GGML_DELTAMEM_LAMBDA_NONE;
    h.erase_lambda = p.flags & GGML_DELTAMEM_LAMBDA_OUTSIDE;
    h.normalize    = p.flags & GGML_DELTAMEM_NORMALIZE_QK;
    h.bias_beta    = args.gate_bias + (size_t) h.index*h.n_gate;
    h.bias_lambda  = h.bias_beta + (size_t) h.n_head*h.n_gate;
    return h;
}

// this head's rows in a column of the packed projections
struct token {
    const float * q;
    const float * k;
    const float * v;
    const float * beta;
    const float * lambda;
};

static token projected_token(const head & h, const float * column) {
    const size_t n = (size_t) h.n_head*h.rank;

    token t;
    t.q      = column + (size_t) h.index*h.rank;
    t.k      = t.q + n;
    t.v      = t.k + n;
    t.beta   = column + 3*n + (size_t) h.index*h.n_gate;
    t.lambda = t.beta + (size_t) h.n_head*h.n_gate;
    return t;
}

static inline void copy(float * dst, const float * src, int n) {
    for (int i = 0; i < n; ++i) {
        dst[i] = src[i];
    }
}

static inline void copy_add(float * dst, const float * src, const float * bias, int n) {
    for (int i = 0; i < n; ++i) {
        dst[i] = src[i] + bias[i];
    }
}

static inline void zero(float * dst, int n) {
    for (int i = 0; i < n; ++i) {
        dst[i] = 0.0f;
    }
}

// Applies f in full vectors; up to PAD floats past n are overwritten with f of what stood there.
template <typename F> static inline void map(float * x, int n, F f) {
    for (int i = 0; i < n; i += wide::width) {
        f(wide::load(x + i)).store(x + i);
    }
}

static void gather(const head & h, const token & src, chunk & c, int t) {
    const int r = h.rank;

    copy(c.q     + t*r, src.q, r);
    copy(c.k     + t*r, src.k, r);
    copy(c.value + t*r, src.v, r);

    copy_add(c.beta + t*h.n_gate, src.beta, h.bias_beta, h.n_gate);
    if (h.has_lambda) {
        copy_add(c.lambda + t*h.n_gate, src.lambda, h.bias_lambda, h.n_gate);
    }
}

// x <- x / max(|x|, 1e-6) per token
static void l2_normalize(float * x, int r, int n_tokens) {
    for (int t = 0; t < n_tokens; ++t) {
        float * row = x + t*r;

        float sum = 0.0f;
        int   i   = 0;
        for (; i + narrow::width <= r; i += narrow::width) {
            const narrow v = narrow::load(row + i);
            sum += (v*v).sum();
        }
        for (; i < r; ++i) {
            sum += row[i]*row[i];
        }

        const float norm  = sqrtf(sum);
        const float scale = 1.0f/(norm > 1e-6f ? norm : 1e-6f);
        for (i = 0; i < r; ++i) {
            row[i] *= scale;
        }
    }
}

static void activate(const head & h, chunk & c, int n_tokens) {
    const int r = h.rank;
    const int n = n_tokens*r;

    // vectors reach past the last row: what they find there must be finite
    for (float * tail : { c.q + n, c.k + n, c.value + n, c.keep + n, c.erase + n }) {
        zero(tail, PAD);
    }
    zero(c.beta   + n_tokens*h.n_gate, PAD);
    zero(c.lambda + n_tokens*h.n_gate, PAD);

    if (h.normalize) {
        map(c.q, n, [](wide x) { return tanh(x); });
        map(c.k, n, [](wide x) { return tanh(x); });
        l2_normalize(c.q, r, n_tokens);
        l2_normalize(c.k, r, n_tokens);
    }

    map(c.beta, n_tokens*h.n_gate, [](wide x) { return sigmoid(x); });
    if (h.has_lambda) {
        map(c.lambda, n_tokens*h.n_gate, [](wide x) { return sigmoid(x); });
    }

    const bool per_row = h.n_gate == r;
    for (int i = 0; i < n; ++i) {
        const int   g      = per_row ? i : i/r;
        const float beta   = c.beta[g];
        const float lambda = h.keep_all ? 1.0f : h.has_lambda ? c.lambda[g] : 1.0f - beta;

        c.keep[i]   = lambda;
        c.erase[i]  = h.erase_lambda ? lambda*beta : beta;
        c.value[i] *= beta;
    }
}

// One token in a block of V::width rows, columns of the state in s[0 .. r).
template <typename V> struct row_block {
    V keep, erase, value;

    static row_block load(const chunk & c, int at) {
        return { V::load(c.keep + at), V::load(c.erase + at), V::load(c.value + at) };
    }
};

// S x with two chains of additions, to halve their latency
template <typename V, typename Column> static inline V state_times(Column s, const float * x, int r) {
    V even = s(0)*V::splat(x[0]);
    V odd  = V::splat(0.0f);
    int j = 1;
    for (; j + 1 < r; j += 2) {
        odd  = V::fma(s(j),     V::splat(x[j]),     odd);
        even = V::fma(s(j + 1), V::splat(x[j + 1]), even);
    }
    if (j < r) {
        odd = V::fma(s(j), V::splat(x[j]), odd);
    }
    return even + odd;
}

// The recurrence for a rank known at compile time: a block of rows lives in R vectors across the chunk.
template <typename V, int R>
static void recur(float * state, const chunk & c, const int32_t * entries, int n, float * read, size_t read_stride) {
    static_assert(R % V::width == 0, "rows come in full vectors");

    for (int i0 = 0; i0 < R; i0 += V::width) {
        V s[R];
        for (int j = 0; j < R; ++j) {
            s[j] = V::load(state + j*R + i0);
        }
        const auto column = [&s](int j) { return s[j]; };

        for (int t = 0; t < n; ++t) {
            const int32_t * entry = entries + t*GGML_DELTAMEM_PLAN_TOKEN;

            state_times<V>(column, c.q + t*R, R).store(read + entry[0]*read_stride + i0);

            if (entry[1] & GGML_DELTAMEM_TOKEN_WRITE) {
                const float * k = c.k + t*R;

                const row_block<V> row = row_block<V>::load(c, t*R + i0);
                const V u = row.value - row.erase*state_times<V>(column, k, R);
                for (int j = 0; j < R; ++j) {
                    s[j] = V::fma(u, V::splat(k[j]), row.keep*s[j]);
                }
            }
        }

        for (int j = 0; j < R; ++j) {
            s[j].store(state + j*R + i0);
        }
    }
}

// The recurrence for any rank: the state in a copy whose columns are padded to full vectors.
template <typename V>
static void recur(float * state, const chunk & c, const int32_t * entries, int n, float * read, size_t read_stride, int r) {
    const int rows = (r + V::width - 1)/V::width*V::width;

    alignas(64) float s[MAX_RANK*MAX_RANK];
    alignas(64) float out[V::width];

    for (int j = 0; j < r; ++j) {
        copy(s + j*rows, state + j*r, r);
        zero(s + j*rows + r, rows - r);
    }

    for (int i0 = 0; i0 < r; i0 += V::width) {
        const auto column = [&s, rows, i0](int j) { return V::load(s + j*rows + i0); };

        for (int t = 0; t < n; ++t) {
            const int32_t * entry = entries + t*GGML_DELTAMEM_PLAN_TOKEN;

            state_times<V>(column, c.q + t*r, r).store(out);
            copy(read + entry[0]*read_stride + i0, out, r - i0 < V::width ? r - i0 : V::width);

            if (entry[1] & GGML_DELTAMEM_TOKEN_WRITE) {
                const float * k = c.k + t*r;

                // rows past r take what follows in the chunk; they are never copied back
                const row_block<V> row = row_block<V>::load(c, t*r + i0);
                const V u = row.value - row.erase*state_times<V>(column, k, r);
                for (int j = 0; j < r; ++j) {
                    V::fma(u, V::splat(k[j]), row.keep*column(j)).store(s + j*rows + i0);
                }
            }
        }
    }

    for (int j = 0; j < r; ++j) {
        copy(state + j*r, s + j*rows, r);
    }
}

static void recur(const head & h, float * state, const chunk & c, const int32_t * entries, int n, float * read,
                  size_t read_stride) {
    switch (h.rank) {
        case 8:  recur<narrow, 8>(state, c, entries, n, read, read_stride); break;
        case 16: recur<wide, 16> (state, c, entries, n, read, read_stride); break;
        default: recur<narrow>   (state, c, entries, n, read, read_stride, h.rank); break;
    }
}

//
// segment writes: the tail of a record, see ggml-deltamem.h
//

struct segment {
    const head & h;
    float * state;
    float * pending;
    float * sum; // q, k, v, β, λ
    float * count;

    segment(const head & h, float * record) : h(h) {
        state   = record;
        pending = state + h.rank*h.rank;
        sum     = pending + h.rank*h.rank;
        count   = sum + n_sum();
    }

    int n_sum() const { return 3*h.rank + h.n_gate*(h.has_lambda ? 2 : 1); }

    void clear() {
        zero(sum, n_sum());
        *count = 0.0f;
    }

    void begin() {
        copy(pending, state, h.rank*h.rank);
        clear();
    }

    void accumulate(const token & t) {
        float * dst = sum;
        const auto add = [&dst](const float * src, int n) {
            for (int i = 0; i < n; ++i) {
                dst[i] += src[i];
            }
            dst += n;
        };
        add(t.q, h.rank);
        add(t.k, h.rank);
        add(t.v, h.rank);
        add(t.beta, h.n_gate);
        if (h.has_lambda) {
            add(t.lambda, h.n_gate);
        }
        *count += 1.0f;
    }

    // one write of the mean. W mean(h) = mean(W h): the mean of projections is the projection of the mean.
    void flush(chunk & c) {
        if (*count == 0.0f) {
            return;
        }
        for (int i = 0; i < n_sum(); ++i) {
            sum[i] /= *count;
        }

        const token mean = { sum, sum + h.rank, sum + 2*h.rank, sum + 3*h.rank, sum + 3*h.rank + h.n_gate };
        const int32_t entry[GGML_DELTAMEM_PLAN_TOKEN] = { 0, GGML_DELTAMEM_TOKEN_WRITE };
        float unused[MAX_RANK];

        gather(h, mean, c, 0);
        activate(h, c, 1);
        recur(h, pending, c, entry, 1, unused, 0);
        clear();
    }

    void commit(chunk & c) {
        flush(c);
        copy(state, pending, h.rank*h.rank);
    }
};

} // namespace deltamem

void deltamem_head_forward(const struct deltamem_head_args * args) {
    using namespace deltamem;

    const head h = make_head(*args);
    const bool segments = args->params.flags & GGML_DELTAMEM_SEGMENTS;

    float * state = args->record;
    float * read  = args->read + (size_t) h.index*h.rank;

    chunk c;

    const auto column = [args](const int32_t * entry) { return args->proj + entry[0]*args->proj_stride; };

    for (int64_t at = 0; at < args->n_entries;) {
        const int32_t * run = args->entries + at*GGML_DELTAMEM_PLAN_TOKEN;

        // a run reads one state, changed by its own token writes alone: it ends before BEGIN and after COMMIT
        int n = 0;
        while (n < CHUNK && at + n < args->n_entries) {
            const int32_t * entry = run + n*GGML_DELTAMEM_PLAN_TOKEN;
            if (n > 0 && (entry[1] & GGML_DELTAMEM_TOKEN_BEGIN)) {
                break;
            }
            gather(h, projected_token(h, column(entry)), c, n);
            n++;
            if (entry[1] & GGML_DELTAMEM_TOKEN_COMMIT) {
                break;
            }
        }

        if (segments && (run[1] & GGML_DELTAMEM_TOKEN_BEGIN)) {
            segment(h, args->record).begin();
        }

        activate(h, c, n);
        recur(h, state, c, run, n, read, args->read_stride);

        if (segments) {
            segment seg(h, args->record);
            for (int t = 0; t < n; ++t) {
                const int32_t * entry = run + t*GGML_DELTAMEM_PLAN_TOKEN;
                if (entry[1] & GGML_DELTAMEM_TOKEN_SEGMENT) {
                    seg.flush(c);
                }
                if (entry[1] & GGML_DELTAMEM_TOKEN_ACCUMULATE) {
                    seg.accumulate(projected_token(h, column(entry)));
                }
                if (entry[1] & GGML_DELTAMEM_TOKEN_COMMIT) {
                    seg.commit(c);
                }
            }
        }

        at += n;
    }
}

const char * deltamem_simd_name(void) {
    return deltamem::simd_name;
}
