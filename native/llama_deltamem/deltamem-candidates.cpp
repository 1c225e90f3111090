// The likeliest tokens of a row of logits, so that a sampler need not copy and sort the vocabulary.

#include "llama-deltamem.h"

#include <algorithm>
#include <cmath>

// values compared at once: most blocks have none above the bound, and their loop compiles to vector code
static constexpr int32_t N_BLOCK = 64;

int32_t llama_deltamem_candidates(const float * logits, int32_t n, int32_t k, llama_token_data * dst) {
    if (k < 1 || n < 1) {
        return 0;
    }
    const auto likelier = [](const llama_token_data & a, const llama_token_data & b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    int32_t n_found = 0; // dst is a heap of the k likeliest so far, the least likely first
    float   bound   = -INFINITY;
    for (int32_t begin = 0; begin < n; begin += N_BLOCK) {
        const int32_t end     = std::min(begin + N_BLOCK, n);
        int32_t       n_above = 0;
        for (int32_t i = begin; i < end; ++i) {
            n_above += logits[i] > bound;
        }
        if (n_above == 0) {
            continue;
        }
        for (int32_t i = begin; i < end; ++i) {
            if (!(logits[i] > bound)) {
                continue; // so is NaN
            }
            if (n_found == k) {
                std::pop_heap(dst, dst + k, likelier);
                --n_found;
            }
            dst[n_found++] = { i, logits[i], 0.0f };
            std::push_heap(dst, dst + n_found, likelier);
            if (n_found == k) {
                bound = dst[0].logit;
            }
        }
    }
    std::sort(dst, dst + n_found, [](const llama_token_data & a, const llama_token_data & b) { return a.id < b.id; });
    return n_found;
}
