// The CUDA kernels of GGML_OP_DELTAMEM on raw pointers. The equations are ggml-deltamem.h's. The kernels use nothing of
// ggml-cuda's internals, so that a test runs them on a CPU, thread by thread (tests/native/cuda-emulation.h).
//
// A read has one block per head and sequence. Its warps are of two kinds: some stage a chunk of tokens in shared memory
// (loads, tanh, norms, gates), while others run the recurrence over the chunk staged before; they swap buffers at one
// barrier per chunk. In the recurrence a lane has a row of the state: no row depends on another, so no value crosses
// lanes, and for r = 8 and 16 the row stays in registers from the first token to the last.
//
// Why the plain recurrence and no chunked (WY) form. Sequential are, per token, S k, u = write v - erase S k and S <-
// keep S + u kᵀ: for a row 3 r + 1 = 25 arithmetic instructions at r = 8, of which r/2 + 3 depend on one another, 28
// cycles. With loads and the loop a warp issues about 45 (counted in the SASS for sm_90), so issue limits it, not
// latency. A chunk of C tokens would solve u_t = write_t v_t - Σ_s<t M_ts u_s instead, with (C - 1)/2 products and as
// many decays per token and row, and update and multiply the state once per chunk: about C + 4 r/C + r instructions per
// token, 20 at C = 8, before the coefficients M, which differ from row to row because gates do. At r = 8 that gains
// nothing; from r = 32 on it would. 45 cycles are 26 ns at 1.75 GHz: 53 µs for 2,048 tokens on one multiprocessor,
// while a layer of a 4B model takes about 3 ms for them on all of an H100's.
//
// A read S q is not sequential, but needs the state of its token. So several warps run the same recurrence, one per
// scheduler, and each computes S q for its share of the tokens: 16 instructions less per warp.
#pragma once

#include "deltamem-simd.h"
#include "ggml-deltamem.h"

#include <type_traits>

// waits, in a kernel that was launched before its predecessor has ended
#ifndef DELTAMEM_WAIT_FOR_PREDECESSOR
    #define DELTAMEM_WAIT_FOR_PREDECESSOR()
#endif

namespace deltamem {

static constexpr int    WARP         = 32;
static constexpr int    RECUR_WARPS  = 4; // warps that run the recurrence, one per scheduler; a power of two
static constexpr int    STAGE_WARPS  = 8;
static constexpr int    STAGE_TOKENS = 2; // tokens that a lane stages at a time, so that their loads overlap
static constexpr int    MAX_CHUNK    = 64;
static constexpr size_t MAX_SHARED   = 48 * 1024; // bytes that a block has on every GPU without an opt-in

//
// shared memory of a read: two chunks, then the arrays for segments, and for ranks without a kernel of their own
//

static inline bool has_kernel_for(int rank) {
    return rank == 8 || rank == 16;
}

static inline int round_up(int n, int to) {
    return (n + to - 1) / to * to;
}

// Offsets in floats, each a multiple of 4. `registers`: this rank has its own kernel, which keeps states in registers.
struct read_layout {
    int n_vector; // floats of a staged q or k
    int n_raw;    // floats of a token's raw projections of one head, q, k, v, β, λ; 0 without segments
    int q, k, gates, raw, entries, chunk_size; // within a chunk
    int state, pending, mean, mean_q, mean_k, mean_gates, size;

    static read_layout of(const ggml_deltamem_params & p, int n_chunk, bool registers) {
        const bool segments = p.flags & GGML_DELTAMEM_SEGMENTS;
        const int  n_state  = registers ? 0 : round_up(p.rank * p.rank, 4);

        read_layout l;
        l.n_vector   = round_up(p.rank, 4);
        l.n_raw      = segments ? 3 * p.rank + (int) ggml_deltamem_n_gates_head(&p) : 0;
        l.q          = 0;
        l.k          = l.q + n_chunk * l.n_vector;
        l.gates      = l.k + n_chunk * l.n_vector;
        l.raw        = l.gates + n_chunk * p.rank * 4;
        l.entries    = l.raw + round_up(n_chunk * l.n_raw, 4);
        l.chunk_size = l.entries + round_up(n_chunk * GGML_DELTAMEM_PLAN_TOKEN, 4);
        l.state      = 2 * l.chunk_size;
        l.pending    = l.state + n_state;
        l.mean       = l.pending + (segments ? n_state : 0);
        l.mean_q     = l.mean + round_up(l.n_raw, 4);
        l.mean_k     = l.mean_q + (segments ? l.n_vector : 0);
        l.mean_gates = l.mean_k + (segments ? l.n_vector : 0);
        l.size       = l.mean_gates + (segments ? p.rank * 4 : 0);
        return l;
    }
};

struct cuda_read_args {
    ggml_deltamem_params params;

    const float * proj; // as in ggml_deltamem; strides in floats
    size_t        proj_stride;
    const float * gate_bias;
    float *       state;
    size_t        slot_stride;
    int           n_slots;
    int           n_tokens; // columns of proj and of the result
    const int *   plan;
    float *       read;
    size_t        read_stride;

    // from prepare()
    int         n_gate;        // gates of a head
    int         n_proj;        // rows of the projection
    int         n_record;      // floats of a head's record
    int         n_chunk;       // tokens that are staged at a time
    int         n_recur_warps; // warps that run the recurrence, then those that stage
    int         n_stage_warps;
    read_layout layout;

    // Sets what follows from the parameters and the number of tokens of all sequences: chunks that fit shared memory,
    // and no more warps than there is work for.
    void prepare(const ggml_deltamem_params & p, int64_t n_tokens_all) {
        // of the longest sequence, if each has at least one; a plan with empty sequences is computed correctly, but
        // slower
        const int64_t n_tokens   = n_tokens_all - p.n_seqs >= 0 ? n_tokens_all - p.n_seqs + 1 : 1;
        const bool    registers  = has_kernel_for(p.rank);
        const int64_t n_per_warp = STAGE_TOKENS * (registers ? WARP / p.rank : 1);
        const int64_t n_warps    = (n_tokens + n_per_warp - 1) / n_per_warp;

        params   = p;
        n_gate   = p.flags & GGML_DELTAMEM_RANKWISE_GATES ? p.rank : 1;
        n_proj   = (int) ggml_deltamem_n_proj(&p);
        n_record = (int) ggml_deltamem_n_record(&p);
        // only one warp may update a state in shared memory, or a running sum
        const bool alone = !registers || (p.flags & GGML_DELTAMEM_SEGMENTS) || n_tokens < 2 * RECUR_WARPS;
        n_recur_warps    = alone ? 1 : RECUR_WARPS;
        n_stage_warps    = n_warps < STAGE_WARPS ? (int) n_warps : STAGE_WARPS;

        n_chunk = n_tokens > 1 ? MAX_CHUNK : 1;
        layout  = read_layout::of(p, n_chunk, registers);
        while (n_chunk > 1 && layout.size * sizeof(float) > MAX_SHARED) {
            n_chunk /= 2;
            layout = read_layout::of(p, n_chunk, registers);
        }
    }
};

// launch(integral_constant<R>, bool_constant<SEGMENTS>), R being 0 for ranks that have no kernel of their own
template <typename F> static void for_rank(const ggml_deltamem_params & p, F launch) {
    const auto with_segments = [&](auto rank) {
        if (p.flags & GGML_DELTAMEM_SEGMENTS) {
            launch(rank, std::true_type());
        } else {
            launch(rank, std::false_type());
        }
    };
    switch (p.rank) {
        case 8:  with_segments(std::integral_constant<int, 8>()); break;
        case 16: with_segments(std::integral_constant<int, 16>()); break;
        default: with_segments(std::integral_constant<int, 0>()); break;
    }
}

//
// a lane's rows of a state
//

// rank R: one row, in registers
template <int R> class state_rows {
public:
    static constexpr int N = 1; // rows per lane

    __device__ state_rows(float *, int) {}

    __device__ void load(const float * record, int i) {
#pragma unroll
        for (int j = 0; j < R; ++j) {
            s[j] = record[j * R + i];
        }
    }

    __device__ void store(float * record, int i) const {
#pragma unroll
        for (int j = 0; j < R; ++j) {
            record[j * R + i] = s[j];
        }
    }

    __device__ void copy(const state_rows & other, int) {
#pragma unroll
        for (int j = 0; j < R; ++j) {
            s[j] = other.s[j];
        }
    }

    // (S x)_i, x in shared memory; two sums, so that additions do not wait for each other
    __device__ float times(const float * x, int) const {
        const float4 * x4   = reinterpret_cast<const float4 *>(x);
        float          even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < R / 4; ++j) {
            const float4 v = x4[j];
            even += s[4 * j] * v.x;
            odd += s[4 * j + 1] * v.y;
            even += s[4 * j + 2] * v.z;
            odd += s[4 * j + 3] * v.w;
        }
        return even + odd;
    }

    // S_i,: <- keep S_i,: + u kᵀ
    __device__ void write(float keep, float u, const float * k, int) {
        const float4 * k4 = reinterpret_cast<const float4 *>(k);
#pragma unroll
        for (int j = 0; j < R / 4; ++j) {
            const float4 v = k4[j];
            s[4 * j]       = keep * s[4 * j] + u * v.x;
            s[4 * j + 1]   = keep * s[4 * j + 1] + u * v.y;
            s[4 * j + 2]   = keep * s[4 * j + 2] + u * v.z;
            s[4 * j + 3]   = keep * s[4 * j + 3] + u * v.w;
        }
    }

private:
    float s[R];
};

// any rank: in shared memory, column-major as in the record, so that the rows of neighbouring lanes are contiguous
template <> class state_rows<0> {
public:
    static constexpr int N = (GGML_DELTAMEM_MAX_RANK + WARP - 1) / WARP;

    __device__ state_rows(float * s, int r) : s(s), r(r) {}

    __device__ void load(const float * record, int i) {
        for (int j = 0; j < r; ++j) {
            s[j * r + i] = record[j * r + i];
        }
    }

    __device__ void store(float * record, int i) const {
        for (int j = 0; j < r; ++j) {
            record[j * r + i] = s[j * r + i];
        }
    }

    __device__ void copy(const state_rows & other, int i) { load(other.s, i); }

    __device__ float times(const float * x, int i) const {
        float even = 0.0f, odd = 0.0f;
        for (int j = 0; j < r; j += 2) {
            even += s[j * r + i] * x[j];
            odd += j + 1 < r ? s[(j + 1) * r + i] * x[j + 1] : 0.0f;
        }
        return even + odd;
    }

    __device__ void write(float keep, float u, const float * k, int i) {
        for (int j = 0; j < r; ++j) {
            s[j * r + i] = keep * s[j * r + i] + u * k[j];
        }
    }

private:
    float * s;
    int     r;
};

//
// staging
//

// one head's rows in a column of the packed projections, or in a mean of them
struct raw_token {
    const float *q, *k, *v, *beta, *lambda;
};

// row i of one token, before the activations
struct raw_row {
    float q, k, v, beta, lambda;
};

static __device__ __forceinline__ raw_row load_row(const cuda_read_args & args, const raw_token & token, int i) {
    const int gate = args.n_gate > 1 ? i : 0;

    raw_row row;
    row.q      = token.q[i];
    row.k      = token.k[i];
    row.v      = token.v[i];
    row.beta   = token.beta[gate];
    row.lambda = args.params.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE ? token.lambda[gate] : 0.0f;
    return row;
}

// the biases of row i
struct gate_biases {
    float beta, lambda;
};

static __device__ __forceinline__ gate_biases load_biases(const cuda_read_args & args, int head, int i) {
    const int n_gates = args.params.n_head * args.n_gate;
    const int gate    = head * args.n_gate + (args.n_gate > 1 ? i : 0);

    gate_biases bias = { 0.0f, 0.0f };
    if (i < args.params.rank) {
        bias.beta   = args.gate_bias[gate];
        bias.lambda = args.params.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE ? args.gate_bias[n_gates + gate] : 0.0f;
    }
    return bias;
}

// { keep_i, erase_i, write_i v_i, 0 } of one row
static __device__ __forceinline__ float4 activate_gates(const ggml_deltamem_params & p, const raw_row & row,
                                                        const gate_biases & bias) {
    // β = sigmoid(β + b_β)
    const float beta = sigmoid(scalar { row.beta + bias.beta }).v;

    // keep = λ = 1, sigmoid(λ + b_λ) or 1 - β
    const float keep = p.lambda == GGML_DELTAMEM_LAMBDA_NONE       ? 1.0f
                       : p.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE ? sigmoid(scalar { row.lambda + bias.lambda }).v
                                                                   : 1.0f - beta;

    // erase = λ β or β, write v = β v
    return make_float4(keep, p.flags & GGML_DELTAMEM_LAMBDA_OUTSIDE ? keep * beta : beta, beta * row.v, 0.0f);
}

// x <- x / max(|x|, 1e-6) for a vector spread over groups of G lanes; every lane of the warp must call
template <int G, int N> static __device__ __forceinline__ void l2_normalize(float (&x)[N]) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        sum += x[n] * x[n];
    }
#pragma unroll
    for (int offset = G / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, offset);
    }
    const float factor = (scalar { 1.0f } / scalar { fmaxf(1e-6f, sqrtf(sum)) }).v;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        x[n] *= factor;
    }
}

// Computes q, k and the gates of one token per group of G lanes, and stores them if `valid`. Every lane of the warp
// must call. A token that does not write gets gates that leave the state as it is: keep 1, erase 0, k 0.
template <int G, int N>
static __device__ __forceinline__ void activate(const ggml_deltamem_params & p, const raw_row (&rows)[N],
                                                const gate_biases (&bias)[N], bool valid, bool writes, float * q,
                                                float * k, float4 * gates) {
    const int lane = threadIdx.x % G;
    float     qs[N], ks[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        qs[n] = rows[n].q;
        ks[n] = rows[n].k;
    }
    // q, k <- norm(tanh(q)), norm(tanh(k))
    if (p.flags & GGML_DELTAMEM_NORMALIZE_QK) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            qs[n] = tanh(scalar { qs[n] }).v;
            ks[n] = tanh(scalar { ks[n] }).v;
        }
        l2_normalize<G>(qs);
        l2_normalize<G>(ks);
    }
    if (!valid) {
        return;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int i = lane + n * G;
        if (i < p.rank) {
            q[i]     = qs[n];
            k[i]     = writes ? ks[n] : 0.0f;
            gates[i] = writes ? activate_gates(p, rows[n], bias[n]) : make_float4(1.0f, 0.0f, 0.0f, 0.0f);
        }
    }
}

//
// a read
//

extern __shared__ float4 deltamem_shared[];

// A plan may come from an RPC client: one that reaches beyond the tensors ends the kernel, as GGML_ASSERT of
// deltamem_sequence_fits ends the CPU's.
static __device__ __forceinline__ void require(bool fits) {
    if (!fits) {
        __trap();
    }
}

template <int R, bool SEGMENTS> class read_block {
public:
    __device__ read_block(const cuda_read_args & args, float * shared, int head, int sequence) :
        args(args),
        p(args.params),
        layout(args.layout),
        shared(shared),
        head(head),
        warp(threadIdx.x / WARP),
        lane(threadIdx.x % WARP),
        entries(args.plan + GGML_DELTAMEM_PLAN_SEQ * p.n_seqs +
                GGML_DELTAMEM_PLAN_TOKEN * args.plan[GGML_DELTAMEM_PLAN_SEQ * sequence + 1]),
        n_entries(args.plan[GGML_DELTAMEM_PLAN_SEQ * sequence + 2]),
        slots(args.state + head * args.n_record),
        record(slots + args.plan[GGML_DELTAMEM_PLAN_SEQ * sequence] * args.slot_stride),
        state(shared + layout.state, p.rank),
        pending(shared + layout.pending, p.rank) {
        const int slot  = args.plan[GGML_DELTAMEM_PLAN_SEQ * sequence];
        const int first = args.plan[GGML_DELTAMEM_PLAN_SEQ * sequence + 1];
        require(slot >= 0 && slot < args.n_slots && first >= 0 && n_entries >= 0 && n_entries <= args.n_tokens - first);
    }

    __device__ void forward() {
        const bool recurs = warp < args.n_recur_warps;

        bool checkpoints = false; // in the chunk that is staged
        if (recurs) {
            load();
        } else {
            checkpoints = stage(0);
        }
        checkpoints = __syncthreads_or(checkpoints);

        for (int at = 0, turn = 0; at < n_entries; at += args.n_chunk, ++turn) {
            bool next = false;
            if (recurs) {
                if (SEGMENTS || checkpoints) {
                    recur<false>(at, turn);
                } else {
                    recur<true>(at, turn);
                }
            } else if (at + args.n_chunk < n_entries) {
                next = stage(turn + 1);
            }
            checkpoints = __syncthreads_or(next);
        }

        if (warp == 0) {
            store();
        }
    }

private:
    static constexpr int ROWS  = state_rows<R>::N;
    static constexpr int GROUP = R ? R : WARP; // lanes that stage a token
    static constexpr int SUMS  = SEGMENTS ? ((R ? 5 * R : 5 * GGML_DELTAMEM_MAX_RANK) + WARP - 1) / WARP : 1;

    const cuda_read_args &       args;
    const ggml_deltamem_params & p;
    const read_layout &          layout;
    float * const                shared;
    const int                    head, warp, lane;

    const int * const entries;
    const int         n_entries;
    float * const     slots;
    float * const     record;

    // the record while the recurrence runs, see ggml-deltamem.h
    state_rows<R> state;
    state_rows<R> pending;
    float         sum[SUMS]; // lane c has values c, c + 32, ..
    float         count;

    __device__ int r() const { return R ? R : p.rank; }

    __device__ int vector_size() const { return R ? R : layout.n_vector; }

    __device__ float * chunk(int turn) const { return shared + (turn % 2) * layout.chunk_size; }

    // The rows of this lane. Lanes beyond the rank compute the same as others, which saves a branch; they store
    // nothing.
    template <typename F> __device__ void for_each_row(F visit) const {
        if constexpr (R != 0) {
            visit(lane % R);
        } else {
#pragma unroll
            for (int n = 0; n < ROWS; ++n) {
                if (lane + n * WARP < p.rank) {
                    visit(lane + n * WARP);
                }
            }
        }
    }

    template <typename F> __device__ void for_each_stored_row(F visit) const {
        if (R == 0 || lane < R) {
            for_each_row(visit);
        }
    }

    template <typename F> __device__ void for_each_sum(F visit) {
#pragma unroll
        for (int n = 0; n < SUMS; ++n) {
            if (lane + n * WARP < layout.n_raw) {
                visit(lane + n * WARP, sum[n]);
            }
        }
    }

    __device__ void load() {
        for_each_row([&](int i) { state.load(record, i); });
        if constexpr (SEGMENTS) {
            for_each_row([&](int i) { pending.load(record + r() * r(), i); });
            for_each_sum([&](int c, float & x) { x = record[2 * r() * r() + c]; });
            count = record[2 * r() * r() + layout.n_raw];
        }
    }

    __device__ void store() {
        for_each_stored_row([&](int i) { state.store(record, i); });
        if constexpr (SEGMENTS) {
            for_each_stored_row([&](int i) { pending.store(record + r() * r(), i); });
            for_each_sum([&](int c, float & x) { record[2 * r() * r() + c] = x; });
            if (lane == 0) {
                record[2 * r() * r() + layout.n_raw] = count;
            }
        }
    }

    __device__ raw_token projected(int token) const {
        const float * column = args.proj + token * args.proj_stride;
        const int     n      = p.n_head * r();

        raw_token t;
        t.q      = column + head * r();
        t.k      = t.q + n;
        t.v      = t.k + n;
        t.beta   = column + 3 * n + head * args.n_gate;
        t.lambda = t.beta + p.n_head * args.n_gate;
        return t;
    }

    // Stages the chunk of one turn, a group of lanes per token; called by the warps that do not run the recurrence.
    // Returns whether one of this thread's tokens leaves a checkpoint.
    __device__ bool stage(int turn) {
        constexpr int T = STAGE_TOKENS;

        const int * from  = entries + GGML_DELTAMEM_PLAN_TOKEN * turn * args.n_chunk;
        const int   n     = min(args.n_chunk, n_entries - turn * args.n_chunk);
        float *     to    = chunk(turn);
        const int   row   = threadIdx.x % GROUP;
        const int   group = (threadIdx.x - args.n_recur_warps * WARP) / GROUP;
        const int   step  = (blockDim.x - args.n_recur_warps * WARP) / GROUP;

        gate_biases bias[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            bias[i] = load_biases(args, head, row + i * GROUP);
        }

        bool checkpoints = false;
        // all groups of a warp run as often as its first one
        for (int t0 = 0; t0 + group / (WARP / GROUP) * (WARP / GROUP) < n; t0 += T * step) {
            int     token[T], bits[T];
            raw_row rows[T][ROWS] = {};
#pragma unroll
            for (int m = 0; m < T; ++m) {
                const int t = t0 + m * step + group;
                token[m]    = t < n ? from[GGML_DELTAMEM_PLAN_TOKEN * t] : -1;
                bits[m]     = t < n ? from[GGML_DELTAMEM_PLAN_TOKEN * t + 1] : 0;
                require(t >= n || (token[m] >= 0 && token[m] < args.n_tokens && bits[m] >= 0 &&
                                   GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(bits[m]) < args.n_slots));
                checkpoints |= GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(bits[m]) >= 0;
            }
#pragma unroll
            for (int m = 0; m < T; ++m) {
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    if (token[m] >= 0 && row + i * GROUP < r()) {
                        rows[m][i] = load_row(args, projected(token[m]), row + i * GROUP);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < T; ++m) {
                const int t = t0 + m * step + group;
                activate<GROUP>(p, rows[m], bias, t < n, bits[m] & GGML_DELTAMEM_TOKEN_WRITE,
                                to + layout.q + t * vector_size(), to + layout.k + t * vector_size(),
                                reinterpret_cast<float4 *>(to + layout.gates) + t * r());
                if (t < n && row == 0) {
                    int * entry = reinterpret_cast<int *>(to + layout.entries) + GGML_DELTAMEM_PLAN_TOKEN * t;
                    entry[0]    = token[m];
                    entry[1]    = bits[m];
                }
                if constexpr (SEGMENTS) {
                    if (t < n) {
                        stage_raw(to + layout.raw + t * layout.n_raw, rows[m], row);
                    }
                }
            }
        }
        return checkpoints;
    }

    __device__ void stage_raw(float * to, const raw_row (&rows)[ROWS], int row) const {
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
            const int i = row + n * GROUP;
            if (i < r()) {
                to[i]           = rows[n].q;
                to[r() + i]     = rows[n].k;
                to[2 * r() + i] = rows[n].v;
                if (i < args.n_gate) {
                    to[3 * r() + i] = rows[n].beta;
                    if (p.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE) {
                        to[3 * r() + args.n_gate + i] = rows[n].lambda;
                    }
                }
            }
        }
    }

    // The recurrence over the staged tokens of one turn. PLAIN: without segments and checkpoints.
    template <bool PLAIN> __device__ void recur(int at, int turn) {
        const float *  q      = chunk(turn) + layout.q;
        const float *  k      = chunk(turn) + layout.k;
        const float4 * gates  = reinterpret_cast<const float4 *>(chunk(turn) + layout.gates);
        const float *  raw    = chunk(turn) + layout.raw;
        const int *    staged = reinterpret_cast<const int *>(chunk(turn) + layout.entries);
        const int      n      = min(args.n_chunk, n_entries - at);

#pragma unroll 4
        for (int t = 0; t < n; ++t) {
            const int bits = PLAIN ? 0 : staged[GGML_DELTAMEM_PLAN_TOKEN * t + 1];

            // pending <- S, sum <- 0, count <- 0
            if (SEGMENTS && (bits & GGML_DELTAMEM_TOKEN_BEGIN)) {
                for_each_row([&](int i) { pending.copy(state, i); });
                clear_sum();
            }

            // read = S q
            if ((t & (args.n_recur_warps - 1)) == warp) {
                const int token = staged[GGML_DELTAMEM_PLAN_TOKEN * t];
                for_each_row([&](int i) {
                    const float read = state.times(q + t * vector_size(), i);
                    if (R == 0 || lane < R) {
                        args.read[token * args.read_stride + head * r() + i] = read;
                    }
                });
            }

            // S_i,: <- keep_i S_i,: + (write_i v_i - erase_i (S k)_i) kᵀ; without a write keep is 1 and k is 0
            if (!SEGMENTS || (bits & GGML_DELTAMEM_TOKEN_WRITE)) {
                write(state, k + t * vector_size(), gates + t * r());
            }

            if constexpr (SEGMENTS) {
                if (bits & GGML_DELTAMEM_TOKEN_SEGMENT) {
                    write_mean();
                }

                // sum <- sum + (q, k, v, β, λ), count <- count + 1
                if (bits & GGML_DELTAMEM_TOKEN_ACCUMULATE) {
                    for_each_sum([&](int c, float & x) { x += raw[t * layout.n_raw + c]; });
                    count += 1.0f;
                }

                // S <- pending
                if (bits & GGML_DELTAMEM_TOKEN_COMMIT) {
                    write_mean();
                    for_each_row([&](int i) { state.copy(pending, i); });
                }
            }

            const int slot = GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(bits);
            if (!PLAIN && slot >= 0 && warp == 0) {
                for_each_stored_row([&](int i) { state.store(slots + slot * args.slot_stride, i); });
            }
        }
    }

    __device__ void write(state_rows<R> & s, const float * k, const float4 * gates) const {
        for_each_row([&](int i) {
            const float4 gate = gates[i]; // keep, erase, write v

            // u_i = write_i v_i - erase_i (S k)_i
            const float u = gate.z - gate.y * s.times(k, i);

            // S_i,: <- keep_i S_i,: + u_i kᵀ
            s.write(gate.x, u, k, i);
        });
    }

    __device__ void clear_sum() {
        for_each_sum([](int, float & x) { x = 0.0f; });
        count = 0.0f;
    }

    // Writes the mean of a segment's tokens to pending. W mean(h) = mean(W h): the mean of projections is the
    // projection of the mean.
    __device__ void write_mean() {
        if (count == 0.0f) {
            return;
        }

        // mean = sum / count
        float * mean = shared + layout.mean;
        for_each_sum([&](int c, float & x) { mean[c] = (scalar { x } / scalar { count }).v; });
        __syncwarp();

        const int       row   = lane % GROUP;
        const raw_token token = { mean, mean + r(), mean + 2 * r(), mean + 3 * r(), mean + 3 * r() + args.n_gate };

        raw_row     rows[ROWS] = {};
        gate_biases bias[ROWS];
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
            bias[n] = load_biases(args, head, row + n * GROUP);
            if (row + n * GROUP < r()) {
                rows[n] = load_row(args, token, row + n * GROUP);
            }
        }
        float4 * gates = reinterpret_cast<float4 *>(shared + layout.mean_gates);
        activate<GROUP>(p, rows, bias, lane < GROUP, true, shared + layout.mean_q, shared + layout.mean_k, gates);
        __syncwarp();

        // pending_i,: <- keep_i pending_i,: + (write_i v_i - erase_i (pending k)_i) kᵀ
        write(pending, shared + layout.mean_k, gates);
        clear_sum();
        __syncwarp();
    }
};

template <int R, bool SEGMENTS>
static __global__ void __launch_bounds__((RECUR_WARPS + STAGE_WARPS) * WARP) read_kernel(const cuda_read_args args) {
    DELTAMEM_WAIT_FOR_PREDECESSOR();
    read_block<R, SEGMENTS>(args, reinterpret_cast<float *>(deltamem_shared), blockIdx.x, blockIdx.y).forward();
}

//
// a projection and its read, of one token: one launch instead of two
//

// eight elements of a row of weights
template <typename W> static __device__ __forceinline__ void load8(const W * from, float (&to)[8]) {
    alignas(16) W bytes[8];
    if constexpr (sizeof(bytes) == 16) {
        *reinterpret_cast<uint4 *>(bytes) = *reinterpret_cast<const uint4 *>(from);
    } else {
        reinterpret_cast<uint4 *>(bytes)[0] = reinterpret_cast<const uint4 *>(from)[0];
        reinterpret_cast<uint4 *>(bytes)[1] = reinterpret_cast<const uint4 *>(from)[1];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        to[i] = to_float(bytes[i]);
    }
}

static constexpr int    PROJECT_WARPS     = 32;
static constexpr size_t PROJECT_MAX_BYTES = 512 * 1024;

// One block, one head, one token. One multiprocessor loads 32 rows of 2,560 half-precision weights, 164 KB, in about
// 1.5 µs, less than a launch takes. Weight rows are 16-byte aligned and n_embd is a multiple of 8.
template <typename W, int R, bool SEGMENTS>
static __global__ void __launch_bounds__(PROJECT_WARPS * WARP)
        project_read_kernel(const W * weight, size_t weight_stride, const float * x, int n_embd, cuda_read_args args) {
    DELTAMEM_WAIT_FOR_PREDECESSOR();

    float * shared = reinterpret_cast<float *>(deltamem_shared);
    float * input  = shared;
    float * proj   = input + n_embd;
    float * rest   = proj + (args.n_proj + 3) / 4 * 4;

    for (int i = 4 * threadIdx.x; i < n_embd; i += 4 * blockDim.x) {
        *reinterpret_cast<float4 *>(input + i) = *reinterpret_cast<const float4 *>(x + i);
    }
    __syncthreads();

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // proj = weight x
    for (int row = warp; row < args.n_proj; row += blockDim.x / WARP) {
        float dot = 0.0f;
#pragma unroll 4
        for (int i = 8 * lane; i < n_embd; i += 8 * WARP) {
            float w[8];
            load8(weight + row * weight_stride + i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                dot += w[j] * input[i + j];
            }
        }
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            dot += __shfl_xor_sync(0xffffffff, dot, offset);
        }
        if (lane == 0) {
            proj[row] = dot;
        }
    }
    __syncthreads();

    args.proj        = proj;
    args.proj_stride = 0;
    read_block<R, SEGMENTS>(args, rest, 0, 0).forward();
}

//
// a correction: dst = out + weight read
//

static constexpr int CORRECT_THREADS = 128;
static constexpr int CORRECT_TOKENS  = 8;  // tokens that share a load of the weights
static constexpr int CORRECT_COLUMNS = 32; // columns of the correction at a time

struct cuda_correct_args {
    const float * out; // strides in elements
    size_t        out_stride;
    size_t        weight_stride;
    const float * read;
    size_t        read_stride;
    float *       dst; // may be `out`
    size_t        dst_stride;
    int           n_out, n_read, n_tokens;

    // launch(integral_constant<V>, integral_constant<T>) with the V and T of correct_kernel
    template <typename W, typename F> void for_shape(const W * weight, F launch) const {
        const auto multiple = [](const void * data, size_t stride, size_t n) {
            return (uintptr_t) data % n == 0 && stride % n == 0;
        };
        const bool aligned     = n_out % 4 == 0 && multiple(out, sizeof(float) * out_stride, 16) &&
                                 multiple(dst, sizeof(float) * dst_stride, 16) &&
                                 multiple(weight, sizeof(W) * weight_stride, 4 * sizeof(W));
        const auto with_tokens = [&](auto outputs) {
            if (n_tokens == 1) {
                launch(outputs, std::integral_constant<int, 1>());
            } else {
                launch(outputs, std::integral_constant<int, CORRECT_TOKENS>());
            }
        };
        if (aligned) {
            with_tokens(std::integral_constant<int, 4>());
        } else {
            with_tokens(std::integral_constant<int, 1>());
        }
    }

    template <int V, int T> int n_blocks_x() const { return (n_out + V * CORRECT_THREADS - 1) / (V * CORRECT_THREADS); }

    template <int V, int T> int n_blocks_y() const { return (n_tokens + T - 1) / T; }
};

// A thread has V neighbouring outputs (1 or 4; 4 needs aligned rows and n_out a multiple of 4) of T tokens: it loads
// `out` and stores `dst` once, and loads the weights once per T tokens.
template <typename W, int V, int T>
static __global__ void __launch_bounds__(CORRECT_THREADS)
        correct_kernel(const W * weight, const cuda_correct_args args) {
    DELTAMEM_WAIT_FOR_PREDECESSOR();

    float *   reads = reinterpret_cast<float *>(deltamem_shared); // [T][CORRECT_COLUMNS]
    const int i     = V * (blockIdx.x * blockDim.x + threadIdx.x);
    const int t0    = T * blockIdx.y;
    const int n     = min(T, args.n_tokens - t0);

    // acc = out
    alignas(16) float acc[T][V];
#pragma unroll
    for (int t = 0; t < T; ++t) {
        const float * out = args.out + (t0 + t) * args.out_stride + i;
        if constexpr (V == 4) {
            *reinterpret_cast<float4 *>(acc[t]) =
                    t < n && i < args.n_out ? *reinterpret_cast<const float4 *>(out) : make_float4(0, 0, 0, 0);
        } else {
            acc[t][0] = t < n && i < args.n_out ? *out : 0.0f;
        }
    }

    // acc <- acc + weight_:,j read_j
    for (int j0 = 0; j0 < args.n_read; j0 += CORRECT_COLUMNS) {
        const int nj = min(CORRECT_COLUMNS, args.n_read - j0);
        __syncthreads();
        for (int at = threadIdx.x; at < T * CORRECT_COLUMNS; at += blockDim.x) {
            const int t = at / CORRECT_COLUMNS, j = at % CORRECT_COLUMNS;
            reads[at] = t < n && j < nj ? args.read[(t0 + t) * args.read_stride + j0 + j] : 0.0f;
        }
        __syncthreads();

        if (i < args.n_out) {
#pragma unroll 8
            for (int j = 0; j < nj; ++j) {
                const W *     from = weight + (j0 + j) * args.weight_stride + i;
                alignas(16) W w[V];
                if constexpr (V == 4 && sizeof(W) == 4) {
                    *reinterpret_cast<float4 *>(w) = *reinterpret_cast<const float4 *>(from);
                } else if constexpr (V == 4) {
                    *reinterpret_cast<uint2 *>(w) = *reinterpret_cast<const uint2 *>(from);
                } else {
                    w[0] = *from;
                }
#pragma unroll
                for (int t = 0; t < T; ++t) {
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        acc[t][v] += to_float(w[v]) * reads[t * CORRECT_COLUMNS + j];
                    }
                }
            }
        }
    }

    if (i < args.n_out) {
#pragma unroll
        for (int t = 0; t < T; ++t) {
            float * dst = args.dst + (t0 + t) * args.dst_stride + i;
            if (t < n) {
                if constexpr (V == 4) {
                    *reinterpret_cast<float4 *>(dst) = *reinterpret_cast<const float4 *>(acc[t]);
                } else {
                    *dst = acc[t][0];
                }
            }
        }
    }
}

} // namespace deltamem
