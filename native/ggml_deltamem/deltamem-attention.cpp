// Flash attention of prompts (deltamem-attention.h). Compiled into ggml-cpu, so once per CPU variant, with its flags.
//
// For a tile of queries q and each tile of keys k and values v (https://arxiv.org/abs/2112.05682):
//
//     s    = scale * q k^T + mask
//     m'   = max(m, max of s)            per query
//     sum  = sum * exp(m - m') + sum of exp(s - m')
//     acc  = acc * exp(m - m') + exp(s - m') v
//
// and at the end acc / sum. A query's result depends on no other of its tile, so threads take tiles as they come.

#include "deltamem-attention.h"

#include "deltamem-pairs.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#if defined(DELTAMEM_TRANSPOSES)

    #include "common.h"
    #include "simd-gemm.h"
    #include "vec.h"

    #include <algorithm>
    #include <cmath>
    #include <cstring>

static constexpr int64_t LANES   = 16;
static constexpr int64_t QUERIES = GGML_FA_TILE_Q;
static constexpr int64_t KEYS    = GGML_FA_TILE_KV;
static constexpr int64_t ROWS    = 4; // of simd_gemm

static_assert(KEYS % LANES == 0 && QUERIES % ROWS == 0);

static const char * at(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return (const char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

static __m512 load(const char * row, int64_t i, bool half) {
    return half ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (row + i * sizeof(ggml_fp16_t))))
                : _mm512_loadu_ps(row + i * sizeof(float));
}

// A head of one sequence, and the work memory of one thread.
class attention {
public:
    attention(const ggml_tensor * dst, int64_t head, int64_t seq, float * work) :
        q(dst->src[0]),
        k(dst->src[1]),
        v(dst->src[2]),
        mask(dst->src[3]),
        dst(dst),
        head(head),
        seq(seq),
        n_qk(k->ne[0]),
        n_v(v->ne[0]),
        half(k->type == GGML_TYPE_F16),
        queries(work),
        scores(queries + QUERIES * n_qk),
        masks(scores + QUERIES * KEYS),
        sums(masks + QUERIES * KEYS),
        values(sums + QUERIES * n_v),
        keys(values + KEYS * n_v) {}

    // floats of work memory
    static int64_t n_work(const ggml_tensor * dst) {
        const int64_t n_qk = dst->src[1]->ne[0], n_v = dst->src[2]->ne[0];
        return QUERIES * (n_qk + n_v) + 2 * QUERIES * KEYS + KEYS * (n_qk + n_v);
    }

    // queries [first, first + n)
    void tile(int64_t first, int64_t n) {
        const int64_t n_rows = (n + ROWS - 1) / ROWS * ROWS;
        const int64_t head_k = head / (q->ne[2] / k->ne[2]), seq_k = seq / (q->ne[3] / k->ne[3]);
        const int64_t head_v = head / (q->ne[2] / v->ne[2]), seq_v = seq / (q->ne[3] / v->ne[3]);
        const float   scale = ggml_get_op_params_f32(dst, 0);

        for (int64_t i = 0; i < n; i++) {
            memcpy(queries + i * n_qk, at(q, first + i, head, seq), n_qk * sizeof(float));
            sum[i]      = 0.0f;
            greatest[i] = -INFINITY;
        }
        memset(queries + n * n_qk, 0, (n_rows - n) * n_qk * sizeof(float));
        memset(sums, 0, n_rows * n_v * sizeof(float));

        for (int64_t begin = 0; begin < k->ne[1]; begin += KEYS) {
            const int64_t n_keys = std::min(KEYS, k->ne[1] - begin);
            if (!read_masks(first, n, begin, n_keys)) {
                continue;
            }
            read_keys(at(k, begin, head_k, seq_k), n_keys);
            memset(scores, 0, n_rows * KEYS * sizeof(float));
            simd_gemm(scores, queries, keys, n_rows, n_qk, KEYS);
            for (int64_t i = 0; i < n; i++) {
                weigh(i, scale);
            }
            memset(scores + n * KEYS, 0, (n_rows - n) * KEYS * sizeof(float));
            read_values(at(v, begin, head_v, seq_v), n_keys);
            simd_gemm(sums, scores, values, n_rows, KEYS, n_v);
        }
        for (int64_t i = 0; i < n; i++) {
            ggml_vec_scale_f32(n_v, sums + i * n_v, sum[i] == 0.0f ? 0.0f : 1.0f / sum[i]);
            const int64_t row = (seq * dst->ne[2] + first + i) * dst->ne[1] + head;
            memcpy((char *) dst->data + row * dst->nb[1], sums + i * n_v, n_v * sizeof(float));
        }
    }

private:
    // The masks of these queries and keys as float32; false: no query sees any of the keys.
    bool read_masks(int64_t first, int64_t n, int64_t begin, int64_t n_keys) {
        const __m512 nothing = _mm512_set1_ps(-INFINITY);
        __mmask16    seen    = mask ? 0 : 1;
        for (int64_t i = 0; i < n; i++) {
            float *      to  = masks + i * KEYS;
            const char * row = mask ? at(mask, first + i, head % mask->ne[2], seq % mask->ne[3]) : nullptr;
            for (int64_t j = 0; j < KEYS; j += LANES) {
                const int64_t   left = std::min(std::max<int64_t>(n_keys - j, 0), LANES);
                const __mmask16 some = (__mmask16) ((1u << left) - 1);
                __m512          x    = _mm512_setzero_ps();
                if (row && left == LANES) {
                    x = load(row, begin + j, true);
                } else if (row) {
                    ggml_fp16_t part[LANES] = {};
                    memcpy(part, row + (begin + j) * sizeof(ggml_fp16_t), left * sizeof(ggml_fp16_t));
                    x = load((const char *) part, 0, true);
                }
                x = _mm512_mask_mov_ps(nothing, some, x);
                seen |= _mm512_cmp_ps_mask(x, nothing, _CMP_NEQ_UQ);
                _mm512_storeu_ps(to + j, x);
            }
        }
        return seen != 0;
    }

    // keys[i][key]: transposed, 16 by 16
    void read_keys(const char * first, int64_t n_keys) {
        for (int64_t key = 0; key < KEYS; key += LANES) {
            for (int64_t i = 0; i < n_qk; i += LANES) {
                __m512i block[LANES];
                for (int64_t j = 0; j < LANES; j++) {
                    const bool is_there = key + j < n_keys;
                    block[j]            = is_there ? _mm512_castps_si512(load(first + (key + j) * k->nb[1], i, half))
                                                   : _mm512_setzero_si512();
                }
                deltamem::transpose_pairs(block);
                for (int64_t j = 0; j < LANES; j++) {
                    _mm512_storeu_si512(keys + (i + j) * KEYS + key, block[j]);
                }
            }
        }
    }

    void read_values(const char * first, int64_t n_keys) {
        for (int64_t key = 0; key < n_keys; key++) {
            for (int64_t i = 0; i < n_v; i += LANES) {
                _mm512_storeu_ps(values + key * n_v + i, load(first + key * v->nb[1], i, half));
            }
        }
        memset(values + n_keys * n_v, 0, (KEYS - n_keys) * n_v * sizeof(float));
    }

    // The scores of query i become weights; what it has summed is scaled to the greatest score so far.
    void weigh(int64_t i, float scale) {
        float *      row = scores + i * KEYS;
        const __m512 by  = _mm512_set1_ps(scale);
        __m512       max = _mm512_set1_ps(-INFINITY);
        for (int64_t j = 0; j < KEYS; j += LANES) {
            // rounded twice, as by ggml: of plain functions the compiler makes one multiply-add
            const __m512 scaled = _mm512_mul_round_ps(_mm512_loadu_ps(row + j), by, _MM_FROUND_CUR_DIRECTION);
            const __m512 s      = _mm512_add_ps(scaled, _mm512_loadu_ps(masks + i * KEYS + j));
            _mm512_storeu_ps(row + j, s);
            max = _mm512_max_ps(max, s);
        }
        const float now = _mm512_reduce_max_ps(max);
        if (now == -INFINITY) {
            memset(row, 0, KEYS * sizeof(float));
            return;
        }
        if (now > greatest[i]) {
            const float factor = expf(greatest[i] - now);
            ggml_vec_scale_f32(n_v, sums + i * n_v, factor);
            sum[i] *= factor;
            greatest[i] = now;
        }
        sum[i] += ggml_vec_soft_max_f32(KEYS, row, row, greatest[i]);
    }

    const ggml_tensor *q, *k, *v, *mask, *dst;
    const int64_t      head, seq, n_qk, n_v;
    const bool         half; // keys and values are float16

    float * queries;        // [QUERIES][n_qk]
    float * scores, *masks; // [QUERIES][KEYS]
    float * sums;           // [QUERIES][n_v]
    float * values;         // [KEYS][n_v]
    float * keys;           // [n_qk][KEYS]
    float   sum[QUERIES], greatest[QUERIES];
};

static bool takes(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    const bool         plain =
            ggml_get_op_params_f32(dst, 1) == 0.0f && ggml_get_op_params_f32(dst, 2) == 0.0f; // no ALiBi, no cap
    return plain && !dst->src[4] && q->type == GGML_TYPE_F32 && k->type == v->type &&
           (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_F32) && q->ne[1] >= QUERIES && k->ne[0] % LANES == 0 &&
           v->ne[0] % LANES == 0 && q->ne[0] == k->ne[0] && q->nb[0] == sizeof(float) &&
           k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type) &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(ggml_fp16_t)));
}

bool ggml_cpu_deltamem_attention(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !takes(dst)) {
        return false;
    }
    const ggml_tensor * q       = dst->src[0];
    const int64_t       n_tiles = (q->ne[1] + QUERIES - 1) / QUERIES;
    const int64_t       n_work  = attention::n_work(dst);
    GGML_ASSERT(params->wsize >= params->nth * n_work * sizeof(float));

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < n_tiles * q->ne[2] * q->ne[3];
         i         = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t first = i % n_tiles * QUERIES, head = i / n_tiles % q->ne[2], seq = i / n_tiles / q->ne[2];
        attention(dst, head, seq, (float *) params->wdata + params->ith * n_work)
                .tile(first, std::min(QUERIES, q->ne[1] - first));
    }
    return true;
}

#else

bool ggml_cpu_deltamem_attention(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
