// See deltamem-train.h. Loops are written so that the compiler vectorises them; no instruction set is named.
#include "deltamem-train.h"

#include <cmath>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float x) {
    return x;
}

inline float load(bf16 x) {
    const uint32_t bits = (uint32_t) x.bits << 16;
    float          value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline void store(float & to, float value) {
    to = value;
}

inline void store(bf16 & to, float value) { // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    to.bits = (uint16_t) ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp with a relative error of 2e-7. A call of the library's would keep the compiler from vectorising the loop.
inline float exponential(float x) {
    x                 = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float whole = nearbyintf(x * 1.44269504f);
    const float rest  = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    const float series =
            0.5f + rest * (0.166666667f + rest * (0.0416666667f + rest * (0.00833333333f + rest * 0.00138888889f)));
    const float   power = 1.0f + rest + rest * rest * series;
    const int32_t bits  = ((int32_t) whole + 127) << 23;
    float         scale;
    memcpy(&scale, &bits, sizeof(scale));
    return power * scale;
}

inline float sigmoid(float x) {
    return 1.0f / (1.0f + exponential(-x));
}

//
// the recurrence: S is column-major, so that its rows, which do not depend on each other, are lanes
//

// R is the rank if it is known at compile time; 0: any up to MAX_RANK
constexpr int MAX_RANK = 64;

template <int R> void recurrence(const deltamem_train_runs & runs, const float * q, const float * k, const float * v,
                                 const float * keep, const float * erase, const float * write, float * reads,
                                 float * states, float * change, float * last) {
    constexpr int M    = R ? R : MAX_RANK;
    const int64_t r    = R ? R : runs.rank;
    const int64_t size = r * r;

    for (int64_t j = 0; j < runs.n_runs; ++j) {
        for (int64_t h = 0; h < runs.n_heads; ++h) {
            float S[M * M];
            if (runs.parent[j] < 0) {
                memset(S, 0, size * sizeof(float));
            } else {
                memcpy(S, last + (runs.parent[j] * runs.n_heads + h) * size, size * sizeof(float));
            }
            for (int64_t t = runs.begin[j]; t < runs.end[j]; ++t) {
                const int64_t at = (t * runs.n_heads + h) * r;
                memcpy(states + at * r, S, size * sizeof(float));

                // read = S q, predicted = S k
                float read[M] = {}, predicted[M] = {}, added[M];
                for (int64_t c = 0; c < r; ++c) {
                    for (int64_t i = 0; i < r; ++i) {
                        read[i] += S[c * r + i] * q[at + c];
                        predicted[i] += S[c * r + i] * k[at + c];
                    }
                }
                // added_i = write_i v_i - erase_i (S k)_i
                for (int64_t i = 0; i < r; ++i) {
                    added[i]       = write[at + i] * v[at + i] - erase[at + i] * predicted[i];
                    reads[at + i]  = read[i];
                    change[at + i] = added[i];
                }
                // S_i,: <- keep_i S_i,: + added_i kᵀ
                for (int64_t c = 0; c < r; ++c) {
                    for (int64_t i = 0; i < r; ++i) {
                        S[c * r + i] = keep[at + i] * S[c * r + i] + added[i] * k[at + c];
                    }
                }
            }
            memcpy(last + (j * runs.n_heads + h) * size, S, size * sizeof(float));
        }
    }
}

template <int R>
void recurrence_back(const deltamem_train_runs & runs, const float * q, const float * k, const float * v,
                     const float * keep, const float * erase, const float * write, const float * states,
                     const float * change, const float * d_reads, float * d_last, float * d_q, float * d_k, float * d_v,
                     float * d_keep, float * d_erase, float * d_write) {
    constexpr int M    = R ? R : MAX_RANK;
    const int64_t r    = R ? R : runs.rank;
    const int64_t size = r * r;

    for (int64_t j = runs.n_runs - 1; j >= 0; --j) { // the runs that start from a run come after it
        for (int64_t h = 0; h < runs.n_heads; ++h) {
            float D[M * M]; // the gradient of the state after the token
            memcpy(D, d_last + (j * runs.n_heads + h) * size, size * sizeof(float));
            for (int64_t t = runs.end[j] - 1; t >= runs.begin[j]; --t) {
                const int64_t at = (t * runs.n_heads + h) * r;
                const float * S  = states + at * r;

                // d_added = D k, predicted = S k, kept_i = Σ_c D_i,c S_i,c
                float d_added[M] = {}, predicted[M] = {}, kept[M] = {}, d_predicted[M];
                for (int64_t c = 0; c < r; ++c) {
                    for (int64_t i = 0; i < r; ++i) {
                        d_added[i] += D[c * r + i] * k[at + c];
                        predicted[i] += S[c * r + i] * k[at + c];
                        kept[i] += D[c * r + i] * S[c * r + i];
                    }
                }
                // added = write v - erase predicted
                for (int64_t i = 0; i < r; ++i) {
                    d_predicted[i]  = -erase[at + i] * d_added[i];
                    d_v[at + i]     = write[at + i] * d_added[i];
                    d_write[at + i] = v[at + i] * d_added[i];
                    d_erase[at + i] = -predicted[i] * d_added[i];
                    d_keep[at + i]  = kept[i];
                }
                // d_q = Sᵀ d_reads, d_k = Dᵀ added + Sᵀ d_predicted
                for (int64_t c = 0; c < r; ++c) {
                    float of_q = 0, of_k = 0;
                    for (int64_t i = 0; i < r; ++i) {
                        of_q += S[c * r + i] * d_reads[at + i];
                        of_k += D[c * r + i] * change[at + i] + S[c * r + i] * d_predicted[i];
                    }
                    d_q[at + c] = of_q;
                    d_k[at + c] = of_k;
                }
                // D <- keep D + d_reads qᵀ + d_predicted kᵀ
                for (int64_t c = 0; c < r; ++c) {
                    for (int64_t i = 0; i < r; ++i) {
                        D[c * r + i] =
                                D[c * r + i] * keep[at + i] + d_reads[at + i] * q[at + c] + d_predicted[i] * k[at + c];
                    }
                }
            }
            if (runs.parent[j] >= 0) {
                float * before = d_last + (runs.parent[j] * runs.n_heads + h) * size;
                for (int64_t i = 0; i < size; ++i) {
                    before[i] += D[i];
                }
            }
        }
    }
}

//
// element-wise
//

template <typename T> void rms_norm(const T * x, const T * weight, T * y, float * scale, int64_t n_rows, int64_t n,
                                    float eps, [[maybe_unused]] int n_threads) {
#pragma omp                parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t row = 0; row < n_rows; ++row) {
        const T * from = x + row * n;
        T *       to   = y + row * n;
        float     sum  = 0;
        for (int64_t i = 0; i < n; ++i) {
            sum += load(from[i]) * load(from[i]);
        }
        const float factor = 1.0f / sqrtf(sum / (float) n + eps);
        for (int64_t i = 0; i < n; ++i) {
            store(to[i], load(from[i]) * factor * load(weight[i]));
        }
        scale[row] = factor;
    }
}

// d_x = scale (w d_y) - x scale^3 mean(w d_y x)
template <typename T> void rms_norm_back(const T * d_y, const T * x, const T * weight, const float * scale, T * d_x,
                                         int64_t n_rows, int64_t n, [[maybe_unused]] int n_threads) {
#pragma omp                parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t row = 0; row < n_rows; ++row) {
        const T *   from  = x + row * n;
        const T *   above = d_y + row * n;
        T *         to    = d_x + row * n;
        const float f     = scale[row];
        float       sum   = 0;
        for (int64_t i = 0; i < n; ++i) {
            sum += load(above[i]) * load(weight[i]) * load(from[i]);
        }
        const float along = sum * f * f * f / (float) n;
        for (int64_t i = 0; i < n; ++i) {
            store(to[i], load(above[i]) * load(weight[i]) * f - load(from[i]) * along);
        }
    }
}

template <typename T> void swiglu(const T * gate, const T * up, T * y, int64_t n, [[maybe_unused]] int n_threads) {
#pragma omp                parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t i = 0; i < n; ++i) {
        const float x = load(gate[i]);
        store(y[i], x * sigmoid(x) * load(up[i]));
    }
}

template <typename T> void swiglu_back(const T * d_y, const T * gate, const T * up, T * d_gate, T * d_up, int64_t n,
                                       [[maybe_unused]] int n_threads) {
#pragma omp                parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t i = 0; i < n; ++i) {
        const float x = load(gate[i]), s = sigmoid(x), d = load(d_y[i]);
        store(d_up[i], d * x * s);
        store(d_gate[i], d * load(up[i]) * s * (1.0f + x * (1.0f - s)));
    }
}

template <typename T> void rotate(const T * x, const float * cosine, const float * sine, T * y, int64_t n_rows,
                                  int64_t n_heads, int64_t n_half, float sign, [[maybe_unused]] int n_threads) {
#pragma omp                parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t row = 0; row < n_rows; ++row) {
        const float * c = cosine + row * n_half;
        const float * s = sine + row * n_half;
        for (int64_t h = 0; h < n_heads; ++h) {
            const T * from = x + (row * n_heads + h) * 2 * n_half;
            T *       to   = y + (row * n_heads + h) * 2 * n_half;
            for (int64_t i = 0; i < n_half; ++i) {
                const float a = load(from[i]), b = load(from[i + n_half]), turn = sign * s[i];
                store(to[i], a * c[i] - b * turn);
                store(to[i + n_half], b * c[i] + a * turn);
            }
        }
    }
}

template <typename T> void attention_back(T * scores, T * d_probs, const uint8_t * visible, int64_t n_heads, int64_t n,
                                          float scale, [[maybe_unused]] int n_threads) {
#pragma omp                parallel for num_threads(n_threads) if (n_threads > 1)
    for (int64_t row = 0; row < n_heads * n; ++row) {
        const int64_t   i     = row % n;
        T *             score = scores + row * n;
        T *             d     = d_probs + row * n;
        const uint8_t * seen  = visible ? visible + i * n : nullptr;
        if (seen) {
            for (int64_t j = 0; j <= i; ++j) {
                const float p = seen[j] ? exponential(load(score[j]) * scale) : 0.0f;
                store(score[j], p);
                store(d[j], p * load(d[j]) * scale);
            }
        } else {
            for (int64_t j = 0; j <= i; ++j) {
                const float p = exponential(load(score[j]) * scale);
                store(score[j], p);
                store(d[j], p * load(d[j]) * scale);
            }
        }
        for (int64_t j = i + 1; j < n; ++j) {
            store(score[j], 0.0f);
            store(d[j], 0.0f);
        }
    }
}

} // namespace

// calls the function for the type of the activations
#define DISPATCH(half, function, ...)                                                                                  \
    do {                                                                                                               \
        if (half) {                                                                                                    \
            using T = bf16;                                                                                            \
            function(__VA_ARGS__);                                                                                     \
        } else {                                                                                                       \
            using T = float;                                                                                           \
            function(__VA_ARGS__);                                                                                     \
        }                                                                                                              \
    } while (0)

void deltamem_train_recurrence(const deltamem_train_runs * runs, const float * q, const float * k, const float * v,
                               const float * keep, const float * erase, const float * write, float * reads,
                               float * states, float * change, float * last) {
    const auto run = runs->rank == 8 ? recurrence<8> : runs->rank == 16 ? recurrence<16> : recurrence<0>;
    run(*runs, q, k, v, keep, erase, write, reads, states, change, last);
}

void deltamem_train_recurrence_back(const deltamem_train_runs * runs, const float * q, const float * k, const float * v,
                                    const float * keep, const float * erase, const float * write, const float * states,
                                    const float * change, const float * d_reads, float * d_last, float * d_q,
                                    float * d_k, float * d_v, float * d_keep, float * d_erase, float * d_write) {
    const auto run = runs->rank == 8 ? recurrence_back<8> : runs->rank == 16 ? recurrence_back<16> : recurrence_back<0>;
    run(*runs, q, k, v, keep, erase, write, states, change, d_reads, d_last, d_q, d_k, d_v, d_keep, d_erase, d_write);
}

void deltamem_train_rms_norm(const void * x, const void * weight, void * y, float * scale, int64_t n_rows, int64_t n,
                             float eps, int half, int n_threads) {
    DISPATCH(half, rms_norm, (const T *) x, (const T *) weight, (T *) y, scale, n_rows, n, eps, n_threads);
}

void deltamem_train_rms_norm_back(const void * d_y, const void * x, const void * weight, const float * scale,
                                  void * d_x, int64_t n_rows, int64_t n, int half, int n_threads) {
    DISPATCH(half, rms_norm_back, (const T *) d_y, (const T *) x, (const T *) weight, scale, (T *) d_x, n_rows, n,
             n_threads);
}

void deltamem_train_swiglu(const void * gate, const void * up, void * y, int64_t n, int half, int n_threads) {
    DISPATCH(half, swiglu, (const T *) gate, (const T *) up, (T *) y, n, n_threads);
}

void deltamem_train_swiglu_back(const void * d_y, const void * gate, const void * up, void * d_gate, void * d_up,
                                int64_t n, int half, int n_threads) {
    DISPATCH(half, swiglu_back, (const T *) d_y, (const T *) gate, (const T *) up, (T *) d_gate, (T *) d_up, n,
             n_threads);
}

void deltamem_train_rotate(const void * x, const float * cosine, const float * sine, void * y, int64_t n_rows,
                           int64_t n_heads, int64_t n_half, float sign, int half, int n_threads) {
    DISPATCH(half, rotate, (const T *) x, cosine, sine, (T *) y, n_rows, n_heads, n_half, sign, n_threads);
}

void deltamem_train_attention_back(void * scores, void * d_probs, const uint8_t * visible, int64_t n_heads, int64_t n,
                                   float scale, int half, int n_threads) {
    DISPATCH(half, attention_back, (T *) scores, (T *) d_probs, visible, n_heads, n, scale, n_threads);
}
