// RMS norms of many rows (deltamem-norm.h). Compiled into ggml-cpu, so once per CPU variant, with its flags.
//
//     dst = x / sqrt(mean(x²) + eps) [* weight]

#include "deltamem-norm.h"

#include "deltamem-pairs.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(DELTAMEM_TRANSPOSES)

static constexpr int64_t LANES = 16; // rows at a time, and float32 of a register
static constexpr int64_t FEW   = 4;  // fewer rows are summed one by one

// The row of t at row r of x, in their order; a smaller t repeats its rows, as ggml repeats weights.
static float * row_of(const struct ggml_tensor * t, const struct ggml_tensor * x, int64_t r) {
    const int64_t i1 = r % x->ne[1], i2 = r / x->ne[1] % x->ne[2], i3 = r / (x->ne[1] * x->ne[2]);
    return (float *) ((char *) t->data + i1 % t->ne[1] * t->nb[1] + i2 % t->ne[2] * t->nb[2] +
                      i3 % t->ne[3] * t->nb[3]);
}

// sums[k] = Σ_i rows[k][i]²: squares in float32, added in double in their order.
static void sum_squares(const float * const (&rows)[LANES], int64_t n, double (&sums)[LANES]) {
    __m512d first = _mm512_setzero_pd(), last = _mm512_setzero_pd();
    for (int64_t i = 0; i < n; i += LANES) {
        __m512i squares[LANES];
        for (int64_t k = 0; k < LANES; k++) {
            const __m512 x = _mm512_loadu_ps(rows[k] + i);
            squares[k]     = _mm512_castps_si512(_mm512_mul_ps(x, x));
        }
        deltamem::transpose_pairs(squares);
        for (int64_t j = 0; j < LANES; j++) { // element i + j of all rows
            const __m256i low = _mm512_castsi512_si256(squares[j]), high = _mm512_extracti64x4_epi64(squares[j], 1);
            first = _mm512_add_pd(first, _mm512_cvtps_pd(_mm256_castsi256_ps(low)));
            last  = _mm512_add_pd(last, _mm512_cvtps_pd(_mm256_castsi256_ps(high)));
        }
    }
    _mm512_storeu_pd(sums, first);
    _mm512_storeu_pd(sums + LANES / 2, last);
}

static double sum_squares(const float * row, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double) (row[i] * row[i]);
    }
    return sum;
}

// y = x * scale [* w]
static void scale_row(const float * x, float scale, const float * w, int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale));
        _mm512_storeu_ps(y + i, w ? _mm512_mul_ps(scaled, _mm512_loadu_ps(w + i)) : scaled);
    }
}

static const struct ggml_tensor * weights_of(const struct ggml_tensor * norm, const struct ggml_tensor * mul) {
    return mul ? mul->src[mul->src[0] == norm ? 1 : 0] : nullptr;
}

bool ggml_cpu_deltamem_takes_norm(const struct ggml_tensor * norm, const struct ggml_tensor * mul) {
    const struct ggml_tensor * x       = norm->src[0];
    const struct ggml_tensor * weights = weights_of(norm, mul);
    const struct ggml_tensor * dst     = mul ? mul : norm;
    return x->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && x->ne[0] % LANES == 0 &&
           x->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float) && ggml_are_same_shape(x, dst) &&
           (!weights || (weights->type == GGML_TYPE_F32 && weights->nb[0] == sizeof(float)));
}

// the norms of n rows, from `first` on and `step` apart
static void norm_rows(const struct ggml_tensor * norm, const struct ggml_tensor * weights, struct ggml_tensor * dst,
                      int64_t first, int64_t step, int64_t n) {
    const struct ggml_tensor * x = norm->src[0];

    float eps;
    memcpy(&eps, norm->op_params, sizeof(eps));
    const auto row = [&](int64_t k) { return first + k * step; };

    for (int64_t begin = 0; begin < n; begin += LANES) {
        const int64_t n_here = std::min(n - begin, LANES);
        const float * rows[LANES];
        double        sums[LANES];
        for (int64_t k = 0; k < LANES; k++) { // those that are missing repeat the last one
            rows[k] = row_of(x, x, row(begin + std::min(k, n_here - 1)));
        }
        if (n_here < FEW) {
            for (int64_t k = 0; k < n_here; k++) {
                sums[k] = sum_squares(rows[k], x->ne[0]);
            }
        } else {
            sum_squares(rows, x->ne[0], sums);
        }
        for (int64_t k = 0; k < n_here; k++) {
            const float mean  = sums[k] / x->ne[0];
            const float scale = 1.0f / sqrtf(mean + eps);
            scale_row(rows[k], scale, weights ? row_of(weights, x, row(begin + k)) : nullptr, x->ne[0],
                      row_of(dst, x, row(begin + k)));
        }
    }
}

bool ggml_cpu_deltamem_norm(const struct ggml_compute_params * params, struct ggml_tensor * norm,
                            struct ggml_tensor * mul) {
    if (params->use_ref || !ggml_cpu_deltamem_takes_norm(norm, mul)) {
        return false;
    }
    // every nth row, as ggml shares out those of a matrix
    const int64_t n_rows = ggml_nrows(norm->src[0]);
    const int64_t own    = n_rows > params->ith ? (n_rows - params->ith + params->nth - 1) / params->nth : 0;
    norm_rows(norm, weights_of(norm, mul), mul ? mul : norm, params->ith, params->nth, own);
    return true;
}

void ggml_cpu_deltamem_norm_rows(const struct ggml_tensor * norm, struct ggml_tensor * mul, int64_t begin,
                                 int64_t end) {
    norm_rows(norm, weights_of(norm, mul), mul, begin, 1, end - begin);
}

#else

bool ggml_cpu_deltamem_norm(const struct ggml_compute_params *, struct ggml_tensor *, struct ggml_tensor *) {
    return false;
}

bool ggml_cpu_deltamem_takes_norm(const struct ggml_tensor *, const struct ggml_tensor *) {
    return false;
}

void ggml_cpu_deltamem_norm_rows(const struct ggml_tensor *, struct ggml_tensor *, int64_t begin, int64_t end) {
    GGML_ASSERT(begin == end); // no row is taken here
}

#endif
