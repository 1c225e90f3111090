// The CPU kernels of GGML_OP_DELTAMEM: a read (gates, normalisation and the delta-rule recurrence of one head), a
// correction, and the projection that is computed with a read. The equations are ggml-deltamem.h's.
//
// A read takes the entries in short chunks. It computes the activations of a chunk first, over contiguous arrays, so in
// full vectors whatever the rank. The recurrence then runs over the chunk with the rows of the state as lanes: no row
// depends on another, so neither S q nor S k sums over lanes, and for r = 8 and 16 a block of rows stays in registers.

#include "deltamem-kernel.h"

#include "deltamem-pairs.h"
#include "deltamem-simd.h"

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#if defined(DELTAMEM_AVX512) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
    #define DELTAMEM_TILES
    #include <sys/syscall.h>
    #include <unistd.h>
#endif

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
        bias_beta(args.gate_bias + (size_t) args.head * n_gate),
        bias_lambda(bias_beta + (size_t) args.params.n_head * n_gate),
        state(args.record),
        pending(state + rank * rank),
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

            activate(n);
            recur(state, run, n, args.read + (size_t) args.head * r(), args.read_stride);

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

    const float * const bias_beta;
    const float * const bias_lambda;

    // the record, see ggml-deltamem.h; without segments it holds the state only
    float * const state;
    float * const pending;
    float * const sum; // q, k, v, β, λ
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

    // Gathers a run of entries, between which only token writes change the state: it ends before BEGIN and after
    // COMMIT. Returns its length.
    int gather_run(const int32_t * run, int64_t n_max) {
        int n = 0;
        while (n < chunk<R>::N && n < n_max) {
            const int32_t * entry = run + n * GGML_DELTAMEM_PLAN_TOKEN;
            if (n > 0 && (entry[1] & GGML_DELTAMEM_TOKEN_BEGIN)) {
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

    void recur(float * s, const int32_t * entries, int n, float * read, size_t read_stride) {
        if constexpr (R == 0) {
            recur_any<narrow>(s, entries, n, read, read_stride);
        } else if constexpr (R % wide::width == 0) {
            recur_fixed<wide>(s, entries, n, read, read_stride);
        } else {
            recur_fixed<narrow>(s, entries, n, read, read_stride);
        }
    }

    // keep_i, erase_i and write_i v_i for a block of rows of one token
    template <typename V> struct row_block {
        V keep, erase, value;

        row_block(const chunk<R> & c, int at) :
            keep(V::load(c.keep + at)), erase(V::load(c.erase + at)), value(V::load(c.value + at)) {}
    };

    // Rank R: a block of rows stays in R vectors for the whole chunk.
    template <typename V>
    void recur_fixed(float * state, const int32_t * entries, int n, float * read, size_t read_stride) {
        static_assert(R % V::width == 0, "rows come in full vectors");

        for (int i0 = 0; i0 < R; i0 += V::width) {
            V s[R];
            for (int j = 0; j < R; ++j) {
                s[j] = V::load(state + j * R + i0);
            }
            const auto column = [&s](int j) { return s[j]; };

            for (int t = 0; t < n; ++t) {
                const int32_t * entry = entries + t * GGML_DELTAMEM_PLAN_TOKEN;

                // read = S q
                state_times<V>(column, c.q + t * R, R).store(read + entry[0] * read_stride + i0);

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
    template <typename V>
    void recur_any(float * state, const int32_t * entries, int n, float * read, size_t read_stride) {
        const int rows = (rank + V::width - 1) / V::width * V::width;

        alignas(64) float s[MAX_RANK * MAX_RANK];
        alignas(64) float out[V::width];

        for (int j = 0; j < rank; ++j) {
            copy(s + j * rows, state + j * rank, rank);
            zero(s + j * rows + rank, rows - rank);
        }

        for (int i0 = 0; i0 < rank; i0 += V::width) {
            const auto column = [&s, rows, i0](int j) { return V::load(s + j * rows + i0); };

            for (int t = 0; t < n; ++t) {
                const int32_t * entry = entries + t * GGML_DELTAMEM_PLAN_TOKEN;

                // read = S q
                state_times<V>(column, c.q + t * rank, rank).store(out);
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
        recur(pending, entry, 1, unused, 0);
        clear_sum();
    }
};

//
// corrections
//

// n vectors of outputs of T tokens, in registers for all columns of the correction; W is the type of the weights
template <typename V, int n, int T, typename W>
static inline void correct_block(const deltamem_correct_args & args, int64_t t0, int64_t i) {
    // acc = out + added
    V acc[T][n];
    for (int t = 0; t < T; ++t) {
        const float * out = args.out + (t0 + t) * args.out_stride + i;
        for (int b = 0; b < n; ++b) {
            acc[t][b] = V::load(out + b * V::width);
        }
        if (args.added) {
            const float * added = args.added + (t0 + t) * args.added_stride + i;
            for (int b = 0; b < n; ++b) {
                acc[t][b] = acc[t][b] + V::load(added + b * V::width);
            }
        }
    }
    // acc <- acc + weight_:,j read_j
    const float * read = args.read + t0 * args.read_stride;
    for (int64_t j = 0; j < args.n_read; ++j) {
        const W * w = (const W *) args.weight + j * args.weight_stride + i;
        V         column[n];
        for (int b = 0; b < n; ++b) {
            column[b] = V::load(w + b * V::width);
        }
        for (int t = 0; t < T; ++t) {
            const V x = V::splat(read[t * args.read_stride + j]);
            for (int b = 0; b < n; ++b) {
                acc[t][b] = V::fma(column[b], x, acc[t][b]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int b = 0; b < n; ++b) {
            acc[t][b].store(args.dst + (t0 + t) * args.dst_stride + i + b * V::width);
        }
    }
}

template <int T, typename W> static void correct_tokens(const deltamem_correct_args & args, int64_t t) {
    int64_t i = 0;
    for (; i + 4 * wide::width <= args.n_out; i += 4 * wide::width) {
        correct_block<wide, 4, T, W>(args, t, i);
    }
    for (; i + narrow::width <= args.n_out; i += narrow::width) {
        correct_block<narrow, 1, T, W>(args, t, i);
    }
    for (; i < args.n_out; ++i) {
        correct_block<scalar, 1, T, W>(args, t, i);
    }
}

template <typename W> static void correct(const deltamem_correct_args & args) {
    constexpr int T = wide::width == 16 ? 4 : 2; // as many as 32 or 16 registers hold sums of

    int64_t t = 0;
    for (; t + T <= args.n_tokens; t += T) {
        correct_tokens<T, W>(args, t);
    }
    for (; t < args.n_tokens; ++t) {
        correct_tokens<1, W>(args, t);
    }
}

//
// products by rows
//

static constexpr int SUMS = 4; // of a dot product, so that additions do not wait for each other

// the sum over the lanes of all sums
static inline float sum_of(const wide (&acc)[SUMS]) {
    alignas(64) float lanes[wide::width];
    ((acc[0] + acc[1]) + (acc[2] + acc[3])).store(lanes);
    narrow lower = narrow::load(lanes);
    for (int j = narrow::width; j < wide::width; j += narrow::width) {
        lower = lower + narrow::load(lanes + j);
    }
    return lower.sum();
}

// Σ_i w_i x_i
template <typename W> static float dot(const W * w, const float * x, int64_t n) {
    wide acc[SUMS] = { wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f) };

    int64_t i = 0;
    for (; i + SUMS * wide::width <= n; i += SUMS * wide::width) {
        for (int b = 0; b < SUMS; ++b) {
            acc[b] = wide::fma(wide::load(w + i + b * wide::width), wide::load(x + i + b * wide::width), acc[b]);
        }
    }
    for (; i + wide::width <= n; i += wide::width) {
        acc[0] = wide::fma(wide::load(w + i), wide::load(x + i), acc[0]);
    }

    float sum = sum_of(acc);
    for (; i < n; ++i) {
        sum += scalar::load(w + i).v * x[i];
    }
    return sum;
}

// Σ_i q_i x_i for a block
static inline wide block_dot(const q8_0 & w, const float * x) {
    wide sum = wide::load(w.q) * wide::load(x);
    for (int i = wide::width; i < q8_0::n; i += wide::width) {
        sum = wide::fma(wide::load(w.q + i), wide::load(x + i), sum);
    }
    return sum;
}

// Σ_blocks d Σ_i q_i x_i
static float dot(const q8_0 * w, const float * x, int64_t n) {
    const int64_t n_blocks = n / q8_0::n;

    wide acc[SUMS] = { wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f) };

    int64_t i = 0;
    for (; i + SUMS <= n_blocks; i += SUMS) {
        for (int b = 0; b < SUMS; ++b) {
            acc[b] = wide::fma(block_dot(w[i + b], x + (i + b) * q8_0::n), wide::splat(w[i + b].d), acc[b]);
        }
    }
    for (; i < n_blocks; ++i) {
        acc[0] = wide::fma(block_dot(w[i], x + i * q8_0::n), wide::splat(w[i].d), acc[0]);
    }
    return sum_of(acc);
}

static constexpr size_t AHEAD =
        2048; // bytes by which blocks are prefetched; of other weights the processor does as well

// dst = out + added + weight in, row by row: the first token loads a row's weights from memory, the others find them in
// the cache.
template <typename W> static void product(const deltamem_product_args & args) {
    for (int64_t row = 0; row < args.n_out; ++row) {
        const W * w = (const W *) args.weight + row * args.weight_stride;
        if constexpr (std::is_same_v<W, q8_0>) {
            prefetch((const char *) w + AHEAD, args.weight_stride * sizeof(W));
        }
        for (int64_t t = 0; t < args.n_tokens; ++t) {
            float sum = args.out ? args.out[t * args.out_stride + row] : 0.0f;
            if (args.added) {
                sum += args.added[t * args.added_stride + row];
            }
            args.dst[t * args.dst_stride + row] = sum + dot(w, args.in + t * args.in_stride, args.n_in);
        }
    }
}

//
// products by tiles
//

#if defined(DELTAMEM_TILES)
// Tiles of AMX: 16 tokens or 16 outputs by 32 inputs in bfloat16, 16 tokens by 16 outputs in float32. A tile of weights
// has pairs of inputs as rows and outputs as columns.
class tiles {
public:
    void forward(const deltamem_product_args & args, int ith, int nth) {
        load_config();

        // many tokens: more outputs at a time, so that inputs are packed less often
        const int64_t width = args.n_tokens > BLOCK ? WIDTH : BLOCK;

        for (int64_t k = 0; k < args.n_in; k += DEPTH) {
            const int n_steps = (int) std::min<int64_t>(DEPTH, args.n_in - k) / K;

            // blocks of outputs by blocks of tokens, in this order
            const int64_t n_blocks = (args.n_tokens + BLOCK - 1) / BLOCK;
            const int64_t n_items  = (args.n_out + width - 1) / width * n_blocks;
            const int64_t begin    = n_items * ith / nth;
            for (int64_t item = begin; item < n_items * (ith + 1) / nth; ++item) {
                const int64_t i0 = item / n_blocks * width, i1 = std::min(i0 + width, args.n_out);
                const int64_t t0 = item % n_blocks * BLOCK;
                if (t0 == 0 || item == begin) {
                    pack_weights(args, i0, i1, k, n_steps);
                }
                pack_inputs(args, t0, k, n_steps);
                for (int64_t i = i0; i < i1; i += BLOCK) {
                    multiply(n_steps, (int) (i - i0) / N, t0 + N < args.n_tokens);
                    store(args, i, t0, k == 0);
                }
            }
        }
    }

private:
    static constexpr int N = 16, K = 32, BLOCK = 2 * N, WIDTH = 128;
    static constexpr int DEPTH = 384; // inputs at a time

    using tile = uint32_t[N][N]; // pairs of bfloat16

    // 126 KB, which the second-level cache holds
    alignas(64) tile weights[DEPTH / K][WIDTH / N];
    alignas(64) tile inputs[DEPTH / K][BLOCK / N];
    alignas(64) float sums[BLOCK][BLOCK];

    // ggml loads its own before each of its products (cmake/amx.cmake)
    static void load_config() {
        struct {
            uint8_t  palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = { 64, 64, 64, 64, 64, 64, 64, 64 };
            uint8_t  rows[16]  = { N, N, N, N, N, N, N, N };
        } config;
        static_assert(sizeof(config) == 64, "a tile configuration has 64 bytes");
        // not _tile_loadconfig: GCC up to 12.3 tells its optimiser that this reads 8 bytes
        __asm__ volatile("ldtilecfg\t%0" : : "m"(config));
    }

    // tiles of outputs [i0, i1), with zeros after the last
    void pack_weights(const deltamem_product_args & args, int64_t i0, int64_t i1, int64_t k, int n_steps) {
        for (int at = 0; i0 + at * N < i1; ++at) {
            for (int step = 0; step < n_steps; ++step) {
                __m512i row[N];
                for (int i = 0; i < N; ++i) {
                    const int64_t output = i0 + at * N + i;
                    row[i]               = _mm512_setzero_si512();
                    if (output < args.n_out) {
                        const q8_0 & w = ((const q8_0 *) args.weight)[output * args.weight_stride + k / K + step];
                        const wide   d = wide::splat(w.d);
                        row[i]         = pairs_of((d * wide::load(w.q)).v, (d * wide::load(w.q + N)).v);
                    }
                }
                transpose_pairs(row);
                for (int i = 0; i < N; ++i) {
                    _mm512_store_si512(weights[step][at][i], row[i]);
                }
            }
        }
    }

    void pack_inputs(const deltamem_product_args & args, int64_t t0, int64_t k, int n_steps) {
        for (int t = 0; t < BLOCK; ++t) {
            // a token too many repeats the last one, and nobody takes its sums
            const float * x = args.in + std::min(t0 + t, args.n_tokens - 1) * args.in_stride + k;
            for (int step = 0; step < n_steps; ++step) {
                _mm512_store_si512(inputs[step][t / N][t % N],
                                   pairs_of(_mm512_loadu_ps(x + step * K), _mm512_loadu_ps(x + step * K + N)));
            }
        }
    }

    // two tiles of outputs, tile `at` and the next, by one or two of tokens
    void multiply(int n_steps, int at, bool both) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int step = 0; step < n_steps; ++step) {
            _tile_loadd(4, inputs[step][0], sizeof(tile) / N);
            _tile_loadd(6, weights[step][at], sizeof(tile) / N);
            _tile_loadd(7, weights[step][at + 1], sizeof(tile) / N);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (both) {
                _tile_loadd(5, inputs[step][1], sizeof(tile) / N);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, &sums[0][0], sizeof(sums[0]));
        _tile_stored(1, &sums[0][N], sizeof(sums[0]));
        _tile_stored(2, &sums[N][0], sizeof(sums[0]));
        _tile_stored(3, &sums[N][N], sizeof(sums[0]));
    }

    // dst = out + added + sums, or dst + sums after the first inputs
    void store(const deltamem_product_args & args, int64_t i0, int64_t t0, bool first) const {
        const int64_t n_out = args.n_out;
        for (int64_t t = t0; t < std::min(t0 + BLOCK, args.n_tokens); ++t) {
            float * dst = args.dst + t * args.dst_stride;
            for (int64_t i = i0; i < std::min(i0 + BLOCK, n_out); i += N) {
                const __mmask16 mask = (__mmask16) (n_out - i < N ? (1 << (n_out - i)) - 1 : 0xffff);

                __m512 x = _mm512_load_ps(&sums[t - t0][i - i0]);
                if (!first) {
                    x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, dst + i));
                } else {
                    if (args.out) {
                        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, args.out + t * args.out_stride + i));
                    }
                    if (args.added) {
                        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, args.added + t * args.added_stride + i));
                    }
                }
                _mm512_mask_storeu_ps(dst + i, mask, x);
            }
        }
    }
};
#endif

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

void deltamem_correct_forward(const struct deltamem_correct_args * args) {
    if (args->half) {
        deltamem::correct<deltamem::float16>(*args);
    } else {
        deltamem::correct<float>(*args);
    }
}

void deltamem_product_forward(const struct deltamem_product_args * args) {
    switch (args->weights) {
        case DELTAMEM_WEIGHTS_F32:  deltamem::product<float>(*args); break;
        case DELTAMEM_WEIGHTS_F16:  deltamem::product<deltamem::float16>(*args); break;
        case DELTAMEM_WEIGHTS_Q8_0: deltamem::product<deltamem::q8_0>(*args); break;
    }
}

#if defined(DELTAMEM_TILES)
bool deltamem_has_tiles(void) {
    // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA: Linux lets a process use tiles that has asked for them
    static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return permitted;
}

void deltamem_tiles_forward(const struct deltamem_product_args * args, int ith, int nth) {
    static thread_local deltamem::tiles tiles;
    tiles.forward(*args, ith, nth);
}
#else
bool deltamem_has_tiles(void) {
    return false;
}

void deltamem_tiles_forward(const struct deltamem_product_args *, int, int) {}
#endif

const char * deltamem_simd_name(void) {
    return deltamem::simd_name;
}
