// How the threads share the nodes of GGML_OP_DELTAMEM: of deltamem-cpu.cpp, which computes them one by one, for deltamem-fuse.cpp,
// which computes several as one. All threads call a function with the same arguments; none waits for another.
#pragma once

#include "deltamem-kernel.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>

struct ggml_compute_params;

namespace deltamem {

// Up to so many tokens, a correction takes weights as they are stored, and a projection is computed with its read. For
// more, a correction converts its weights to float32 first, and a projection is left to ggml's product. With AMX, tiles
// multiply more tokens and weights in Q8_0.
constexpr int64_t FEW_TOKENS = 4;

// outputs of a correction that a thread has together: whole cache lines, whole blocks of vectors
constexpr int64_t UNIT = 64;

// whether AMX multiplies many tokens and these weights
bool takes_tiles(const struct ggml_tensor * weight);

// the kernel's arguments for one head of one sequence of a read
struct deltamem_head_args head_args(const struct ggml_tensor * dst, int64_t i_seq, int64_t head);

// read = S q and the state update: each thread has (sequence, head) pairs
void forward_read(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// dst = weight in. Of few tokens, `in` stays float32; ggml's product would convert it to the weights' type, and
// synchronise the threads once more.
void forward_project(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// What follows a correction and is computed with it, by the same threads.
struct followers {
    const struct ggml_tensor * added = nullptr; // dst = out + weight read + added
    const struct ggml_tensor * norm  = nullptr; // of the rows of dst
    struct ggml_tensor *       mul   = nullptr; // the norm's rows times weights
};

// Whether each thread has all outputs of a range of tokens: a norm of its rows then waits for nobody.
bool is_by_tokens(const struct ggml_compute_params * params, const struct ggml_tensor * correction);

// A correction and its followers. `reads` are those of correction->src[2], rows read_stride floats apart.
//
// A thread has a range of outputs for all tokens, or, if there are many, a range of tokens for all outputs. Then it
// normalises as many tokens as its second-level cache holds, before it corrects the next.
//
// `together`: of a few tokens, a range begins and ends with so many outputs, a multiple of UNIT; 0: as is best.
void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                     const float * reads, size_t read_stride, const struct followers & next, struct ggml_tensor * dst,
                     int64_t together = 0);

// the same by the reads that the node has
void forward_correct(const struct ggml_compute_params * params, const struct ggml_tensor * correction,
                     const struct followers & next, struct ggml_tensor * dst);

} // namespace deltamem
