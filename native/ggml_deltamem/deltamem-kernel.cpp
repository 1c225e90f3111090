// The read of GGML_OP_DELTAMEM on a CPU: gates, normalisation and the delta-rule recurrence of one head. The equations are
// ggml-deltamem.h's.
//
// It takes the entries in short chunks. It computes the activations of a chunk first, over contiguous arrays, so in
// full vectors whatever the rank. The recurrence then runs over the chunk with the rows of the state as lanes: no row
// depends on another, so neither S q nor S k sums over lanes, and for r = 8 and 16 a block of rows stays in registers.

#include "deltamem-kernel.h"

#include "deltamem-simd.h"

#include <algorithm>
#include <initializer_list>

namespace deltamem {

static constexpr int MAX_RANK = GGML_DELTAMEM_MAX_RANK;
static constexpr int PAD      = 16; // floats that a vector may reach past the last row

// What the recurrence needs of each token, after the activations; token t, row i at [t*r + i]. Gates are per row here
// even if the adapter's are per head. R is the rank if it is known at compile time, else 0. An array of a chunk takes 2
// KB if R is known: all of a head's fit a first-level cache.
template <int R> struct chunk {
    static constexpr int N    = R ? 512 / R : 16; // entries
    static constexpr int SIZE = N * (R ? R : MAX_RANK) + PAD;

    alignas(64) float q[SIZE];
    alignas(64) float k[SIZE];
    alignas(64) float keep[SIZE];
    alignas(64) float erase[SIZE];
    alignas(64) float value[SIZE]; // write v
};

// one head's rows in a column of the packed projections, or in a running sum
struct token {
    const float * q;
    const float * k;
    const float * v;
    const float * beta;
    const float * lambda;
};

static inline void zero(float * dst, int n) {
    for (int i = 0; i < n; ++i) {
        dst[i] = 0.0f;
    }
}

static inline void copy(float * dst, const float * src, int n) {
    memcpy(dst, src, n * sizeof(float));
}

static inline void add(float * dst, const float * a, const float * b, int n) {
    int i = 0;
    for (; i + narrow::width <= n; i += narrow::width) {
        (narrow::load(a + i) + narrow::load(b + i)).store(dst + i);
    }
    for (; i < n; ++i) {
        dst[i] = a[i] + b[i];
    }
}

static inline void scale(float * x, float factor, int n) {
    int i = 0;
    for (; i + narrow::width <= n; i += narrow::width) {
        (narrow::load(x + i) * narrow::splat(factor)).store(x + i);
    }
    for (; i < n; ++i) {
        x[i] *= factor;
    }
}

static inline float sum_of_squares(const float * x, int n) {
    float sum = 0.0f;
    int   i   = 0;
    for (; i + narrow::width <= n; i += narrow::width) {
        const narrow v = narrow::load(x + i);
        sum += (v * v).sum();
    }
    for (; i < n; ++i) {
        sum += x[i] * x[i];
    }
    return sum;
}

// S x = Σ_j S_:,j x_j for a block of rows, s(j) being its column j. Two sums, so that additions do not wait for each
// other.
template <typename V, typename Column> static inline V state_times(Column s, const float * x, int r) {
    V   even = s(0) * V::splat(x[0]);
    V   odd  = V::splat(0.0f);
    int j    = 1;
    for (; j + 1 < r; j += 2) {
        odd  = V::fma(s(j), V::splat(x[j]), odd);
        even = V::fma(s(j + 1), V::splat(x[j + 1]), even);
    }
    if (j < r) {
        odd = V::fma(s(j), V::splat(x[j]), odd);
    }
    return even + odd;
}

// a read of one head
template <int R> class head {
public:
    explicit head(const deltamem_head_args & args) :
        args(args),
        rank(args.params.rank),
        n_gate((args.params.flags & GGML_DELTAMEM_RANKWISE_GATES) ? rank : 1),
        has_lambda(args.params.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE),
        keep_all(args.params.lambda == GGML_DELTAMEM_LAMBDA_NONE),
        erase_lambda(args.params.flags & GGML_DELTAMEM_LAMBDA_OUTSIDE),
        normalize(args.params.flags & GGML_DELTAMEM_NORMALIZE_QK),
        segments(args.params.flags & GGML_DELTAMEM_SEGMENTS),
        deferred(args.params.flags & GGML_DELTAMEM_DEFERRED),
        bias_beta(args.gate_bias + (size_t) args.head * n_gate),
        bias_lambda(bias_beta + (size_t) args.params.n_head * n_gate),
        state(args.record),
        pending(state + rank * rank),
        base(state + rank * rank),
        sum(pending + rank * rank),
        count(sum + 3 * rank + n_gate * (has_lambda ? 2 : 1)) {}

    void forward() {
        for (int64_t at = 0; at < args.n_entries;) {
            const int32_t * run = args.entries + at * GGML_DELTAMEM_PLAN_TOKEN;
            const int       n   = gather_run(run, args.n_entries - at);

            // pending <- S, sum <- 0, count <- 0
            if (segments && (run[1] & GGML_DELTAMEM_TOKEN_BEGIN)) {
                copy(pending, state, r() * r());
                clear_sum();
            }

            // B <- S
            if (deferred && (run[1] & GGML_DELTAMEM_TOKEN_TURN)) {
                copy(base, state, r() * r());
            }

            activate(n);
            float * const read = args.read + (size_t) args.head * r();
            if (deferred) {
                recur<true>(state, run, n, read, args.read_stride);
            } else {
                recur<false>(state, run, n, read, args.read_stride);
            }

            if (segments) {
                write_segments(run, n);
            }
            at += n;
        }
    }

private:
    const deltamem_head_args & args;

    const int  rank;
    const int  n_gate;       // floats per gate: r, or 1 if gates are per head
    const bool has_lambda;   // λ has a projection of its own
    const bool keep_all;     // λ = 1
    const bool erase_lambda; // erase = λ β
    const bool normalize;
    const bool segments;
    const bool deferred; // writes

    const float * const bias_beta;
    const float * const bias_lambda;

    // the record, see ggml-deltamem.h: it has the others with segments or with deferred writes only
    float * const state;
    float * const pending;
    float * const base; // B
    float * const sum;  // q, k, v, β, λ
    float * const count;

    chunk<R> c;

    // of the chunk, before the sigmoid
    alignas(64) float beta[chunk<R>::SIZE];
    alignas(64) float lambda[chunk<R>::SIZE];

    int r() const { return R ? R : rank; }

    token projected(const int32_t * entry) const {
        const float * column = args.proj + entry[0] * args.proj_stride;
        const size_t  n      = (size_t) args.params.n_head * r();

        token t;
        t.q      = column + (size_t) args.head * r();
        t.k      = t.q + n;
        t.v      = t.k + n;
        t.beta   = column + 3 * n + (size_t) args.head * n_gate;
        t.lambda = t.beta + (size_t) args.params.n_head * n_gate;
        return t;
    }

    // where a checkpoint of the state goes after this entry, nullptr for most
    float * checkpoint(const int32_t * entry) const {
        const int32_t slot = GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(entry[1]);
        return slot >= 0 ? args.slots + slot * args.slot_stride : nullptr;
    }

    //
    // activations
    //

    // Gathers a run of entries, between which only token writes change the state: it ends before BEGIN and TURN, and
    // after COMMIT. Returns its length.
    int gather_run(const int32_t * run, int64_t n_max) {
        int n = 0;
        while (n < chunk<R>::N && n < n_max) {
            const int32_t * entry = run + n * GGML_DELTAMEM_PLAN_TOKEN;
            if (n > 0 && (entry[1] & (GGML_DELTAMEM_TOKEN_BEGIN | GGML_DELTAMEM_TOKEN_TURN))) {
                break;
            }
            gather(projected(entry), n);
            n++;
            if (entry[1] & GGML_DELTAMEM_TOKEN_COMMIT) {
                break;
            }
        }
        return n;
    }

    void gather(const token & src, int t) {
        copy(c.q + t * r(), src.q, r());
        copy(c.k + t * r(), src.k, r());
        copy(c.value + t * r(), src.v, r());
        gather_gate(beta + t * r(), src.beta, bias_beta);
        if (has_lambda) {
            gather_gate(lambda + t * r(), src.lambda, bias_lambda);
        }
    }

    // β + b_β or λ + b_λ, for each row
    void gather_gate(float * dst, const float * src, const float * bias) {
        if (n_gate == 1) {
            const float gate = src[0] + bias[0];
            for (int i = 0; i < r(); ++i) {
                dst[i] = gate;
            }
        } else {
            add(dst, src, bias, r());
        }
    }

    void activate(int n_tokens) {
        const int n = n_tokens * r();

        // vectors reach past the last row, where values must be finite
        float * const arrays[] = { c.q, c.k, c.keep, c.erase, c.value, beta, lambda };
        for (float * array : arrays) {
            zero(array + n, PAD);
        }

        // q, k <- norm(tanh(q)), norm(tanh(k))
        if (normalize) {
            for (int i = 0; i < n; i += wide::width) {
                tanh(wide::load(c.q + i)).store(c.q + i);
                tanh(wide::load(c.k + i)).store(c.k + i);
            }
            l2_normalize(c.q, n_tokens);
            l2_normalize(c.k, n_tokens);
        }

        const wide one = wide::splat(1.0f);
        for (int i = 0; i < n; i += wide::width) {
            // β = sigmoid(β + b_β)
            const wide b = sigmoid(wide::load(beta + i));

            // λ = 1, sigmoid(λ + b_λ) or 1 - β
            const wide l = keep_all ? one : has_lambda ? sigmoid(wide::load(lambda + i)) : one - b;

            // keep = λ, erase = λ β or β, write v = β v
            l.store(c.keep + i);
            (erase_lambda ? l * b : b).store(c.erase + i);
            (b * wide::load(c.value + i)).store(c.value + i);
        }
    }

    // x <- x / max(|x|, 1e-6) for each token
    void l2_normalize(float * x, int n_tokens) {
        alignas(64) float factor[chunk<R>::N + PAD];
        zero(factor + n_tokens, PAD);
        for (int t = 0; t < n_tokens; ++t) {
            factor[t] = sum_of_squares(x + t * r(), r());
        }
        for (int t = 0; t < n_tokens; t += wide::width) {
            const wide norm = wide::max(wide::splat(1e-6f), wide::sqrt(wide::load(factor + t)));
            (wide::splat(1.0f) / norm).store(factor + t);
        }
        for (int t = 0; t < n_tokens; ++t) {
            scale(x + t * r(), factor[t], r());
        }
    }

    //
    // the recurrence
    //

    // DEFERRED: reads are of B, but those of PRESENT.
    template <bool DEFERRED> void recur(float * s, const int32_t * entries, int n, float * read, size_t read_stride) {
        if constexpr (R == 0) {
            recur_any<DEFERRED, narrow>(s, entries, n, read, read_stride);
        } else if constexpr (R % wide::width == 0) {
            recur_fixed<DEFERRED, wide>(s, entries, n, read, read_stride);
        } else {
            recur_fixed<DEFERRED, narrow>(s, entries, n, read, read_stride);
        }
    }

    // keep_i, erase_i and write_i v_i for a block of rows of one token
    template <typename V> struct row_block {
        V keep, erase, value;

        row_block(const chunk<R> & c, int at) :
            keep(V::load(c.keep + at)), erase(V::load(c.erase + at)), value(V::load(c.value + at)) {}
    };

    // Rank R: a block of rows stays in R vectors for the whole chunk.
    template <bool DEFERRED, typename V>
    void recur_fixed(float * state, const int32_t * entries, int n, float * read, size_t read_stride) {
        static_assert(R % V::width == 0, "rows come in full vectors");

        for (int i0 = 0; i0 < R; i0 += V::width) {
            V s[R];
            for (int j = 0; j < R; ++j) {
                s[j] = V::load(state + j * R + i0);
            }
            const auto column         = [&s](int j) { return s[j]; };
            const auto column_of_base = [this, i0](int j) { return V::load(base + j * R + i0); };

            for (int t = 0; t < n; ++t) {
                const int32_t * entry = entries + t * GGML_DELTAMEM_PLAN_TOKEN;

                // read = S q, or B q
                if (DEFERRED && !(entry[1] & GGML_DELTAMEM_TOKEN_PRESENT)) {
                    state_times<V>(column_of_base, c.q + t * R, R).store(read + entry[0] * read_stride + i0);
                } else {
                    state_times<V>(column, c.q + t * R, R).store(read + entry[0] * read_stride + i0);
                }

                if (entry[1] & GGML_DELTAMEM_TOKEN_WRITE) {
                    const float * k = c.k + t * R;

                    // u_i = write_i v_i - erase_i (S k)_i
                    const row_block<V> row(c, t * R + i0);
                    const V            u = row.value - row.erase * state_times<V>(column, k, R);

                    // S_i,: <- keep_i S_i,: + u_i kᵀ
                    for (int j = 0; j < R; ++j) {
                        s[j] = V::fma(u, V::splat(k[j]), row.keep * s[j]);
                    }
                }

                if (float * kept = checkpoint(entry)) {
                    for (int j = 0; j < R; ++j) {
                        s[j].store(kept + j * R + i0);
                    }
                }
            }

            for (int j = 0; j < R; ++j) {
                s[j].store(state + j * R + i0);
            }
        }
    }

    // Any rank: the same on a copy of the state whose columns are padded to full vectors.
    template <bool DEFERRED, typename V>
    void recur_any(float * state, const int32_t * entries, int n, float * read, size_t read_stride) {
        const int rows = (rank + V::width - 1) / V::width * V::width;

        alignas(64) float s[MAX_RANK * MAX_RANK];
        alignas(64) float b[DEFERRED ? MAX_RANK * MAX_RANK : 1];
        alignas(64) float out[V::width];

        for (int j = 0; j < rank; ++j) {
            copy(s + j * rows, state + j * rank, rank);
            zero(s + j * rows + rank, rows - rank);
            if constexpr (DEFERRED) {
                copy(b + j * rows, base + j * rank, rank);
                zero(b + j * rows + rank, rows - rank);
            }
        }

        for (int i0 = 0; i0 < rank; i0 += V::width) {
            const auto column         = [&s, rows, i0](int j) { return V::load(s + j * rows + i0); };
            const auto column_of_base = [&b, rows, i0](int j) { return V::load(b + j * rows + i0); };

            for (int t = 0; t < n; ++t) {
                const int32_t * entry = entries + t * GGML_DELTAMEM_PLAN_TOKEN;

                // read = S q, or B q
                if (DEFERRED && !(entry[1] & GGML_DELTAMEM_TOKEN_PRESENT)) {
                    state_times<V>(column_of_base, c.q + t * rank, rank).store(out);
                } else {
                    state_times<V>(column, c.q + t * rank, rank).store(out);
                }
                copy(read + entry[0] * read_stride + i0, out, rank - i0 < V::width ? rank - i0 : V::width);

                if (entry[1] & GGML_DELTAMEM_TOKEN_WRITE) {
                    const float * k = c.k + t * rank;

                    // u_i = write_i v_i - erase_i (S k)_i; rows past the last compute with the next token's, for
                    // nothing
                    const row_block<V> row(c, t * rank + i0);
                    const V            u = row.value - row.erase * state_times<V>(column, k, rank);

                    // S_i,: <- keep_i S_i,: + u_i kᵀ
                    for (int j = 0; j < rank; ++j) {
                        V::fma(u, V::splat(k[j]), row.keep * column(j)).store(s + j * rows + i0);
                    }
                }

                if (float * kept = checkpoint(entry)) {
                    for (int j = 0; j < rank; ++j) {
                        copy(kept + j * rank + i0, s + j * rows + i0, rank - i0 < V::width ? rank - i0 : V::width);
                    }
                }
            }
        }

        for (int j = 0; j < rank; ++j) {
            copy(state + j * rank, s + j * rows, rank);
        }
    }

    //
    // segment writes
    //

    void write_segments(const int32_t * run, int n) {
        for (int t = 0; t < n; ++t) {
            const int32_t * entry = run + t * GGML_DELTAMEM_PLAN_TOKEN;

            if (entry[1] & GGML_DELTAMEM_TOKEN_SEGMENT) {
                write_mean();
            }

            // sum <- sum + (q, k, v, β, λ), count <- count + 1
            if (entry[1] & GGML_DELTAMEM_TOKEN_ACCUMULATE) {
                accumulate(projected(entry));
            }

            // S <- pending
            if (entry[1] & GGML_DELTAMEM_TOKEN_COMMIT) {
                write_mean();
                copy(state, pending, r() * r());
                if (float * kept = checkpoint(entry)) {
                    copy(kept, state, r() * r());
                }
            }
        }
    }

    void clear_sum() {
        zero(sum, (int) (count - sum));
        *count = 0.0f;
    }

    void accumulate(const token & t) {
        float * dst = sum;
        for (const float * src : { t.q, t.k, t.v }) {
            add(dst, dst, src, r());
            dst += r();
        }
        add(dst, dst, t.beta, n_gate);
        if (has_lambda) {
            add(dst + n_gate, dst + n_gate, t.lambda, n_gate);
        }
        *count += 1.0f;
    }

    // Writes the mean of a segment's tokens to pending. W mean(h) = mean(W h): the mean of projections is the
    // projection of the mean.
    void write_mean() {
        if (*count == 0.0f) {
            return;
        }

        // mean = sum / count
        for (float * x = sum; x < count; ++x) {
            *x /= *count;
        }

        const token   mean = { sum, sum + r(), sum + 2 * r(), sum + 3 * r(), sum + 3 * r() + n_gate };
        const int32_t entry[GGML_DELTAMEM_PLAN_TOKEN] = { 0, GGML_DELTAMEM_TOKEN_WRITE };
        float         unused[MAX_RANK];

        // pending_i,: <- keep_i pending_i,: + (write_i v_i - erase_i (pending k)_i) kᵀ
        gather(mean, 0);
        activate(1);
        recur<false>(pending, entry, 1, unused, 0);
        clear_sum();
    }
};

} // namespace deltamem

bool deltamem_sequence_fits(const int32_t * plan, int64_t n_seqs, int64_t i, int64_t n_tokens, int64_t n_slots) {
    const int32_t * seq   = plan + GGML_DELTAMEM_PLAN_SEQ * i;
    const int64_t   first = seq[1], count = seq[2];
    if (seq[0] < 0 || seq[0] >= n_slots || first < 0 || count < 0 || first + count > n_tokens) {
        return false;
    }
    const int32_t * entries = plan + GGML_DELTAMEM_PLAN_SEQ * n_seqs + GGML_DELTAMEM_PLAN_TOKEN * first;

    // As unsigned numbers, negative ones are too large. Bits below those of a checkpoint in slot n_slots name a slot
    // that exists, or none.
    const uint32_t token_end = (uint32_t) std::min<int64_t>(n_tokens, INT32_MAX);
    const uint32_t bits_end  = (uint32_t) std::min<int64_t>(GGML_DELTAMEM_TOKEN_CHECKPOINT(n_slots), INT32_MAX);

    uint32_t n_wrong = 0; // without a branch, so that the compiler vectorises the loop
    for (int64_t e = 0; e < count; ++e) {
        const uint32_t token = (uint32_t) entries[GGML_DELTAMEM_PLAN_TOKEN * e];
        const uint32_t bits  = (uint32_t) entries[GGML_DELTAMEM_PLAN_TOKEN * e + 1];
        n_wrong |= (token >= token_end) | (bits >= bits_end);
    }
    return n_wrong == 0;
}

void deltamem_head_forward(const struct deltamem_head_args * args) {
    switch (args->params.rank) {
        case 8:  deltamem::head<8>(*args).forward(); break;
        case 16: deltamem::head<16>(*args).forward(); break;
        default: deltamem::head<0>(*args).forward(); break;
    }
}

const char * deltamem_simd_name(void) {
    return deltamem::simd_name;
}
