// Kernels that `deltamem train` runs on a CPU: the recurrence over runs of tokens, and the element-wise work between a frozen
// decoder's products, each with its gradient. PyTorch does the products. pydeltamem/train/kernels.py calls them and has
// each of them once more in plain PyTorch, as the reference of the tests.
//
// Activations are float32 or bfloat16, arithmetic is float32. Arrays are contiguous, the last dimension first in memory.
// Nothing is allocated; no argument may be NULL unless it says so; results may not overlap arguments.
#pragma once

#include <stdint.h>

#ifdef _WIN32
    #define DELTAMEM_TRAIN_API __declspec(dllexport)
#else
    #define DELTAMEM_TRAIN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Runs: run j is the tokens [begin[j], end[j]). It starts from the state that run parent[j] < j ended with; -1: from an
// empty one. Runs do not share tokens.
struct deltamem_train_runs {
    int64_t         n_runs;
    const int32_t * begin;
    const int32_t * end;
    const int32_t * parent;
    int64_t         n_heads;
    int64_t         rank; // 1 to 64
};

// The recurrence of design section 1. q, k, v, keep, erase, write, reads, change: [n_tokens][n_heads][rank];
// states: [n_tokens][n_heads][rank][rank], column by column, as each token read it; last: [n_runs][n_heads][rank][rank].
// states, change and last are what the gradient needs.
DELTAMEM_TRAIN_API void deltamem_train_recurrence(const struct deltamem_train_runs * runs, const float * q,
                                                  const float * k, const float * v, const float * keep,
                                                  const float * erase, const float * write, float * reads,
                                                  float * states, float * change, float * last);

// Its gradient. d_last [n_runs][n_heads][rank][rank] is work space that the caller fills with zeros.
DELTAMEM_TRAIN_API void deltamem_train_recurrence_back(const struct deltamem_train_runs * runs, const float * q,
                                                       const float * k, const float * v, const float * keep,
                                                       const float * erase, const float * write, const float * states,
                                                       const float * change, const float * d_reads, float * d_last,
                                                       float * d_q, float * d_k, float * d_v, float * d_keep,
                                                       float * d_erase, float * d_write);

// Below, `half` says that activations are bfloat16, and n_threads how many threads share the rows.

// y = x / rms(x) * weight, x and y [n_rows][n]; scale [n_rows] is 1 / rms(x), which the gradient needs.
DELTAMEM_TRAIN_API void deltamem_train_rms_norm(const void * x, const void * weight, void * y, float * scale,
                                                int64_t n_rows, int64_t n, float eps, int half, int n_threads);
DELTAMEM_TRAIN_API void deltamem_train_rms_norm_back(const void * d_y, const void * x, const void * weight,
                                                     const float * scale, void * d_x, int64_t n_rows, int64_t n,
                                                     int half, int n_threads);

// y = silu(gate) * up, [n]
DELTAMEM_TRAIN_API void deltamem_train_swiglu(const void * gate, const void * up, void * y, int64_t n, int half,
                                              int n_threads);
DELTAMEM_TRAIN_API void deltamem_train_swiglu_back(const void * d_y, const void * gate, const void * up, void * d_gate,
                                                   void * d_up, int64_t n, int half, int n_threads);

// Rotary positions: x and y [n_rows][n_heads][2 * n_half], of which the first 2 * n_half features turn in pairs (i, i + n_half); cosine and
// sine [n_rows][n_half]. sign -1 turns back, which is the gradient.
DELTAMEM_TRAIN_API void deltamem_train_rotate(const void * x, const float * cosine, const float * sine, void * y,
                                              int64_t n_rows, int64_t n_heads, int64_t n_half, float sign, int half,
                                              int n_threads);

// The element-wise part of attention's gradient for one sequence. On entry scores [n_heads][n][n] holds q k^T, not
// scaled, and d_probs what arrives at the probabilities. log_sum [n_heads][n] is the logarithm of each row's sum of exponentials,
// inner [n_heads][n] the inner product of a row's output with its gradient. visible [n][n] says who sees whom, NULL:
// all before and itself. On return scores holds the probabilities, d_probs the gradient of q k^T.
DELTAMEM_TRAIN_API void deltamem_train_attention_back(void * scores, void * d_probs, const float * log_sum,
                                                      const float * inner, const uint8_t * visible, int64_t n_heads,
                                                      int64_t n, float scale, int half, int n_threads);

#ifdef __cplusplus
}
#endif
