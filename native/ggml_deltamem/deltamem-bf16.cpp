// Products of many tokens in BF16 (deltamem-bf16.h). Compiled into ggml-cpu, so once per CPU variant, with its flags.
//
//     dst[token][row] = sum over i of weight[row][i] * x[token][i]
//
// Every thread takes panels of 32 rows. It unpacks a panel to BF16, two elements of a row beside each other,
//
//     panel[i / 2][row][i % 2]
//
// and multiplies it with twelve tokens at a time: 24 registers of sums, which stay there for all of n_in. One product
// instruction adds 16 rows' products of two elements. Zen 5 begins two of them a cycle, which is the floor: 64
// multiply-adds a cycle. Loads (two of the panel, twelve of pairs of x, for 24 products) go on beside it.
//
// A narrow weight, such as an adapter's projection, has fewer panels than keep the threads busy. These unpack all of it
// together, and then each has tokens of its own, which it converts on the way.
//
// A correction has few elements in a row, and is bound by the memory that its tokens lie in. There eight panels are unpacked
// at once, and a thread takes twelve tokens at a time through them.

#include "deltamem-bf16.h"

#include "deltamem-kernel.h"
#include "deltamem-unpack.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

using deltamem::pairs_of;
using deltamem::transpose_pairs;
using deltamem::unpack_elements;

static constexpr int64_t LANES  = 16;        // float32 of a register: rows of half a panel
static constexpr int64_t ROWS   = 2 * LANES; // of a panel
static constexpr int64_t TOKENS = 12;        // multiplied at a time
static constexpr int64_t CHUNK  = 256;       // elements of a row unpacked at a time: whole blocks of every type
static constexpr int64_t FEW    = 8;         // fewer tokens are left to others
static constexpr size_t  LINE   = 64;

// Bytes of all panels of a narrow weight: they share the second-level cache with twelve tokens.
static constexpr size_t NARROW = 512 * 1024;

// Of a correction, whose panels lie on the stack: at most 32 KiB.
static constexpr int64_t CORRECTED  = 8 * ROWS; // outputs at a time
static constexpr int64_t MOST_READS = 64;       // columns

static size_t lines(size_t n_bytes) {
    return (n_bytes + LINE - 1) / LINE * LINE;
}

// Bytes from one token of x to the next: an odd number of lines, so that twelve tokens do not share a set of the cache.
static size_t x_stride(int64_t n_in) {
    return lines(n_in * sizeof(ggml_bf16_t)) | LINE;
}

static size_t x_size(const struct ggml_tensor * dst) {
    return x_stride(dst->src[0]->ne[0]) * dst->ne[1];
}

static size_t panel_size(int64_t n_in) {
    return ROWS * n_in * sizeof(ggml_bf16_t);
}

static int64_t n_panels(const struct ggml_tensor * weight) {
    return (weight->ne[1] + ROWS - 1) / ROWS;
}

static bool is_narrow(const struct ggml_tensor * weight) {
    return n_panels(weight) * panel_size(weight->ne[0]) <= NARROW;
}

static bool is_ours(const struct ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    return buffer && buffer->buft == ggml_backend_deltamem_bf16_buffer_type();
}

// Tokens from which on unpacking pays; 0: ggml's product is as fast (K-quants, by tiles of integers), or more exact.
static int64_t least_tokens(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q6_K: return FEW;
        case GGML_TYPE_BF16: return 64;
        default:             return 0;
    }
}

static bool takes(const struct ggml_tensor * dst) {
    const struct ggml_tensor * weight = dst->src[0];
    const struct ggml_tensor * x      = dst->src[1];
    if (!is_ours(weight)) {
        return false;
    }
    const int64_t least = least_tokens(weight->type);
    return least > 0 && x->ne[1] >= least && weight->ne[0] % ROWS == 0 &&
           weight->nb[0] == ggml_type_size(weight->type) && ggml_is_matrix(weight) && x->type == GGML_TYPE_F32 &&
           x->nb[0] == sizeof(float) && ggml_is_matrix(x) && dst->nb[0] == sizeof(float);
}

// Unpacks rows [begin, end) of a weight, at most 32, to a panel; rows that are missing are zero.
static void unpack(const struct ggml_tensor * weight, int64_t begin, int64_t end, uint32_t * panel) {
    alignas(LINE) __m512i chunk[LANES][CHUNK / ROWS];

    const int64_t n_in = weight->ne[0];
    for (int64_t half = 0; half < ROWS; half += LANES) {
        const int64_t first = begin + half;
        const int64_t n     = std::min(std::max<int64_t>(end - first, 0), LANES);
        memset(chunk, 0, sizeof(chunk));
        for (int64_t i = 0; i < n_in; i += CHUNK) {
            const int64_t n_elements = std::min(CHUNK, n_in - i);
            const char *  from = (const char *) weight->data + first * weight->nb[1] + ggml_row_size(weight->type, i);
            for (int64_t row = 0; row < n; row++) {
                unpack_elements(weight->type, from + row * weight->nb[1], n_elements, chunk[row]);
            }
            for (int64_t j = 0; j < n_elements / ROWS; j++) {
                __m512i pairs[LANES];
                for (int64_t row = 0; row < LANES; row++) {
                    pairs[row] = chunk[row][j];
                }
                transpose_pairs(pairs);
                uint32_t * to = panel + (i / 2 + j * LANES) * ROWS + half;
                for (int64_t pair = 0; pair < LANES; pair++) {
                    _mm512_store_si512(to + pair * ROWS, pairs[pair]);
                }
            }
        }
    }
}

// Converts x of a token to BF16, rounded to nearest even.
static void convert(const float * x, int64_t n_in, ggml_bf16_t * to) {
    for (int64_t i = 0; i < n_in; i += 2 * LANES) {
        _mm512_store_si512(to + i, pairs_of(_mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i + LANES)));
    }
}

// Floats of a panel's rows and of N tokens, `stride` bytes apart; zeros if there are none.
struct summand {
    const float * first;
    size_t        stride;

    summand after(int64_t n_tokens) const {
        return { first ? (const float *) ((const char *) first + n_tokens * stride) : nullptr, stride };
    }
    template <int N> void add_to(__m512 (&low)[N], __m512 (&high)[N], uint32_t mask) const {
        for (int t = 0; first && t < N; t++) {
            const float * row = after(t).first;
            low[t]            = _mm512_add_ps(low[t], _mm512_maskz_loadu_ps((__mmask16) mask, row));
            high[t]           = _mm512_add_ps(high[t], _mm512_maskz_loadu_ps((__mmask16) (mask >> LANES), row + LANES));
        }
    }
};

// What a correction adds its product to.
struct summands {
    summand out, added;

    summands after(int64_t n_tokens) const { return { out.after(n_tokens), added.after(n_tokens) }; }
};

// Multiplies a panel with N tokens of x.
template <int N>
static void multiply(const uint32_t * panel, const char * x, size_t x_stride, int64_t n_in, const summands & to,
                     float * dst, size_t dst_stride, int64_t n_rows) {
    const uint32_t mask = n_rows < ROWS ? (1u << n_rows) - 1 : ~0u;

    __m512 low[N], high[N];
    for (int t = 0; t < N; t++) {
        low[t] = high[t] = _mm512_setzero_ps();
    }
    to.out.add_to<N>(low, high, mask);
    to.added.add_to<N>(low, high, mask);
    for (int64_t i = 0; i < n_in / 2; i++, panel += ROWS, x += sizeof(uint32_t)) {
        const __m512bh a = (__m512bh) _mm512_load_si512(panel);
        const __m512bh b = (__m512bh) _mm512_load_si512(panel + LANES);
    #pragma GCC unroll 12
        for (int t = 0; t < N; t++) {
            const __m512bh pair = (__m512bh) _mm512_set1_epi32(*(const int32_t *) (x + t * x_stride));
            low[t]              = _mm512_dpbf16_ps(low[t], a, pair);
            high[t]             = _mm512_dpbf16_ps(high[t], b, pair);
        }
    }
    for (int t = 0; t < N; t++, dst = (float *) ((char *) dst + dst_stride)) {
        _mm512_mask_storeu_ps(dst, (__mmask16) mask, low[t]);
        _mm512_mask_storeu_ps(dst + LANES, (__mmask16) (mask >> LANES), high[t]);
    }
}

// Multiplies a panel with all tokens.
static void multiply_all(const uint32_t * panel, const char * x, size_t x_stride, int64_t n_in, int64_t n_tokens,
                         summands to, float * dst, size_t dst_stride, int64_t n_rows) {
    for (int64_t n; n_tokens > 0; n_tokens -= n, x += n * x_stride, dst = (float *) ((char *) dst + n * dst_stride)) {
        n = std::min(n_tokens, TOKENS);
        switch (n) {
    #define CASE(N)                                                                                                    \
        case N: multiply<N>(panel, x, x_stride, n_in, to, dst, dst_stride, n_rows); break
            CASE(1);
            CASE(2);
            CASE(3);
            CASE(4);
            CASE(5);
            CASE(6);
            CASE(7);
            CASE(8);
            CASE(9);
            CASE(10);
            CASE(11);
            CASE(12);
    #undef CASE
        }
        to = to.after(n);
    }
}

size_t ggml_cpu_deltamem_bf16_size(int n_tasks, const struct ggml_tensor * dst) {
    if (!takes(dst)) {
        return 0;
    }
    const struct ggml_tensor * weight = dst->src[0];
    const int64_t              n_in   = weight->ne[0];
    return is_narrow(weight) ? n_panels(weight) * panel_size(n_in) + n_tasks * TOKENS * x_stride(n_in)
                             : x_size(dst) + n_tasks * panel_size(n_in);
}

// All panels, then each thread's tokens: every nth, as ggml shares out the rows of a norm, so that x is in its cache.
static void multiply_narrow(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * weight = dst->src[0];
    const struct ggml_tensor * x      = dst->src[1];
    const int64_t              n_in   = weight->ne[0];
    const int64_t              n_out  = weight->ne[1];
    const size_t               stride = x_stride(n_in);
    const size_t               panel  = panel_size(n_in);

    char * panels    = (char *) params->wdata;
    char * converted = panels + n_panels(weight) * panel + params->ith * TOKENS * stride;

    for (int64_t i = params->ith; i < n_panels(weight); i += params->nth) {
        unpack(weight, i * ROWS, std::min(n_out, (i + 1) * ROWS), (uint32_t *) (panels + i * panel));
    }
    ggml_barrier(params->threadpool);

    for (int64_t first = params->ith, n; first < x->ne[1]; first += n * params->nth) {
        n = std::min(TOKENS, (x->ne[1] - first + params->nth - 1) / params->nth);
        for (int64_t t = 0; t < n; t++) {
            const char * token = (const char *) x->data + (first + t * params->nth) * x->nb[1];
            convert((const float *) token, n_in, (ggml_bf16_t *) (converted + t * stride));
        }
        for (int64_t i = 0; i < n_panels(weight); i++) {
            multiply_all((const uint32_t *) (panels + i * panel), converted, stride, n_in, n, {},
                         (float *) ((char *) dst->data + first * dst->nb[1]) + i * ROWS, params->nth * dst->nb[1],
                         std::min(n_out - i * ROWS, ROWS));
        }
    }
}

// Multiplies panel i of a product's weight with all tokens of x, which are at `all`; `panel` is the thread's own.
static void multiply_panel(struct ggml_tensor * dst, int64_t i, const char * all, uint32_t * panel) {
    const struct ggml_tensor * weight = dst->src[0];
    const int64_t              n_in   = weight->ne[0];
    const int64_t              begin = i * ROWS, end = std::min(weight->ne[1], begin + ROWS);
    unpack(weight, begin, end, panel);
    multiply_all(panel, all, x_stride(n_in), n_in, dst->ne[1], {}, (float *) dst->data + begin, dst->nb[1],
                 end - begin);
}

// All tokens of x, then panel after panel, each by the next thread that is free; `second` as well unless it is NULL.
static void multiply_wide(const struct ggml_compute_params * params, struct ggml_tensor * dst,
                          struct ggml_tensor * second) {
    const struct ggml_tensor * x      = dst->src[1];
    const int64_t              n_in   = x->ne[0];
    const size_t               stride = x_stride(n_in);

    char *     all   = (char *) params->wdata; // at a cache line: the patch sees to it
    uint32_t * panel = (uint32_t *) (all + x_size(dst) + params->ith * panel_size(n_in));

    for (int64_t t = params->ith; t < x->ne[1]; t += params->nth) {
        convert((const float *) ((const char *) x->data + t * x->nb[1]), n_in, (ggml_bf16_t *) (all + t * stride));
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_first = n_panels(dst->src[0]), n_all = n_first + (second ? n_panels(second->src[0]) : 0);
    for (int64_t i = params->ith; i < n_all; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        if (i < n_first) {
            multiply_panel(dst, i, all, panel);
        } else {
            multiply_panel(second, i - n_first, all, panel);
        }
    }
}

bool ggml_cpu_deltamem_bf16(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (params->use_ref || !takes(dst)) {
        return false;
    }
    GGML_ASSERT(params->wsize >= ggml_cpu_deltamem_bf16_size(params->nth, dst));
    if (is_narrow(dst->src[0])) {
        multiply_narrow(params, dst);
    } else {
        multiply_wide(params, dst, nullptr);
    }
    return true;
}

bool ggml_cpu_deltamem_bf16_two(const struct ggml_compute_params * params, struct ggml_tensor * first,
                                struct ggml_tensor * second) {
    if (params->use_ref || first->src[1] != second->src[1] || !takes(first) || !takes(second) ||
        is_narrow(first->src[0])) {
        return false;
    }
    GGML_ASSERT(params->wsize >= ggml_cpu_deltamem_bf16_size(params->nth, first));
    multiply_wide(params, first, second);
    return true;
}

bool ggml_cpu_deltamem_bf16_takes(const struct ggml_compute_params * params, const struct ggml_tensor * correction) {
    const struct ggml_tensor * weight = correction->src[1];
    return !params->use_ref && is_ours(weight) && weight->type == GGML_TYPE_Q8_0 && weight->ne[0] % ROWS == 0 &&
           weight->ne[0] <= MOST_READS && correction->ne[1] >= FEW;
}

void ggml_cpu_deltamem_bf16_correct(const struct ggml_tensor * weight, const struct deltamem_product_args * args,
                                    int64_t begin, int64_t end) {
    const int64_t n_in = args->n_in, n_out = weight->ne[1];

    alignas(LINE) uint32_t    panels[CORRECTED / ROWS][MOST_READS / 2 * ROWS];
    alignas(LINE) ggml_bf16_t reads[TOKENS][MOST_READS];

    const auto at = [](const float * base, size_t row, int64_t t, int64_t i) {
        return base ? base + t * row + i : base;
    };
    const auto bytes = [](size_t n_floats) { return n_floats * sizeof(float); };

    for (int64_t i0 = 0; i0 < n_out; i0 += CORRECTED) {
        const int64_t i1 = std::min(n_out, i0 + CORRECTED);
        for (int64_t i = i0; i < i1; i += ROWS) {
            unpack(weight, i, std::min(i1, i + ROWS), panels[(i - i0) / ROWS]);
        }
        for (int64_t t = begin, n; t < end; t += n) {
            n = std::min(TOKENS, end - t);
            for (int64_t j = 0; j < n; j++) {
                convert(args->in + (t + j) * args->in_stride, n_in, reads[j]);
            }
            for (int64_t i = i0; i < i1; i += ROWS) {
                const summands to = { { at(args->out, args->out_stride, t, i), bytes(args->out_stride) },
                                      { at(args->added, args->added_stride, t, i), bytes(args->added_stride) } };
                multiply_all(panels[(i - i0) / ROWS], (const char *) reads, sizeof(reads[0]), n_in, n, to,
                             args->dst + t * args->dst_stride + i, bytes(args->dst_stride), std::min(i1 - i, ROWS));
            }
        }
    }
}

#else

size_t ggml_cpu_deltamem_bf16_size(int, const struct ggml_tensor *) {
    return 0;
}

bool ggml_cpu_deltamem_bf16(const struct ggml_compute_params *, struct ggml_tensor *) {
    return false;
}

bool ggml_cpu_deltamem_bf16_two(const struct ggml_compute_params *, struct ggml_tensor *, struct ggml_tensor *) {
    return false;
}

bool ggml_cpu_deltamem_bf16_takes(const struct ggml_compute_params *, const struct ggml_tensor *) {
    return false;
}

void ggml_cpu_deltamem_bf16_correct(const struct ggml_tensor *, const struct deltamem_product_args *, int64_t begin,
                                    int64_t end) {
    GGML_ASSERT(begin == end); // no token is taken here
}

#endif
