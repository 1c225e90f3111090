// Kernels that `deltamem train` runs on a CPU: the recurrence over runs of tokens, and the element-wise work between a
// frozen decoder's products, each with its gradient. PyTorch computes the products. pydeltamem/train/kernels.py calls
// the kernels, and has each of them in plain PyTorch too, as the reference for the tests.
//
// Activations are float32 or bfloat16, arithmetic is float32. Arrays are contiguous and row-major. The kernels allocate
// nothing; no argument may be NULL unless its comment says so; results may not overlap arguments.
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

// Runs of tokens: run j has the tokens [begin[j], end[j]). It starts from the last state of run parent[j] < j, or from
// an empty one if parent[j] is -1. Runs do not share tokens.
struct deltamem_train_runs {
    int64_t         n_runs;
    const int32_t * begin;
    const int32_t * end;
    const int32_t * parent;
    int64_t         n_heads;
    int64_t         rank; // 1 to 64
};

// The recurrence of ggml-deltamem.h. q, k, v, keep, erase, write, reads and change: [n_tokens][n_heads][rank]; states,
// column-major, before each token's write: [n_tokens][n_heads][rank][rank]; last: [n_runs][n_heads][rank][rank]. The
// gradient needs states, change and last.
DELTAMEM_TRAIN_API void deltamem_train_recurrence(const struct deltamem_train_runs * runs, const float * q,
                                                  const float * k, const float * v, const float * keep,
                                                  const float * erase, const float * write, float * reads,
                                                  float * states, float * change, float * last);

// Its gradient. d_last [n_runs][n_heads][rank][rank] is workspace, which the caller fills with zeros.
DELTAMEM_TRAIN_API void deltamem_train_recurrence_back(const struct deltamem_train_runs * runs, const float * q,
                                                       const float * k, const float * v, const float * keep,
                                                       const float * erase, const float * write, const float * states,
                                                       const float * change, const float * d_reads, float * d_last,
                                                       float * d_q, float * d_k, float * d_v, float * d_keep,
                                                       float * d_erase, float * d_write);

// Below, activations are bfloat16 if `half` is not zero, and n_threads threads share the rows.

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

// Rotary positions: rotates the pairs of features (i, i + n_half) of x into y, both [n_rows][n_heads][2 * n_half];
// cosine and sine [n_rows][n_half]. sign -1 rotates back, which is the gradient.
DELTAMEM_TRAIN_API void deltamem_train_rotate(const void * x, const float * cosine, const float * sine, void * y,
                                              int64_t n_rows, int64_t n_heads, int64_t n_half, float sign, int half,
                                              int n_threads);

// The element-wise part of attention's gradient for one sequence. On entry, scores [n_heads][n][n] holds q kᵀ, not
// scaled, less what makes the exponentials of a row sum to one: the logarithm of their sum over scale. d_probs
// [n_heads][n][n] holds the gradient of the probabilities, less the inner product of the row's output with its
// gradient. (Whoever takes these off in the products loses little of them by bfloat16.) visible [n][n] is non-zero
// where a token attends to an earlier one or itself, NULL: to all of them. On return, scores holds the probabilities,
// and d_probs the gradient of q kᵀ.
DELTAMEM_TRAIN_API void deltamem_train_attention_back(void * scores, void * d_probs, const uint8_t * visible,
                                                      int64_t n_heads, int64_t n, float scale, int half, int n_threads);

#ifdef __cplusplus
}
#endif
