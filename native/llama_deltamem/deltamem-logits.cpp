// A row of logits: whether it can be used, and its likeliest tokens, so that a sampler need not copy and sort the vocabulary.

#include "deltamem-logits.h"

#include "llama-deltamem.h"

#include <algorithm>
#include <cmath>

// values compared at once: most blocks have none above the bound, and their loop compiles to vector code
static constexpr int32_t N_BLOCK = 64;

// values looked at together: their loop compiles to vector code, which adds to several sums at once
static constexpr size_t N_SUMS = 32;

// Whether a row has neither NaN nor an infinite value.
static bool is_finite(const float * logits, size_t n) {
    float  sums[N_SUMS] = {};
    size_t i            = 0;
    for (; i + N_SUMS <= n; i += N_SUMS) {
        for (size_t j = 0; j < N_SUMS; ++j) {
            sums[j] += logits[i + j] * 0.0f; // NaN if the value is not finite
        }
    }
    for (; i < n; ++i) {
        sums[0] += logits[i] * 0.0f;
    }
    return std::all_of(sums, sums + N_SUMS, [](float sum) { return sum == 0.0f; });
}

bool llama_deltamem_is_usable(const float * logits, size_t n) {
    const auto is_finite_other_than_zero = [](float value) { return std::isfinite(value) && value != 0.0f; };
    if (!is_finite(logits, n)) { // -inf is a token that cannot be
        const auto is_bad = [](float value) { return !(value < INFINITY); };
        if (std::any_of(logits, logits + n, is_bad)) {
            return false;
        }
    }
    return std::any_of(logits, logits + n, is_finite_other_than_zero);
}

int32_t llama_deltamem_candidates(const float * logits, int32_t n, int32_t k, llama_token_data * dst) {
    if (!logits || !dst || k < 1 || n < 1) {
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
