// What a plan of the tests asks of the operator, and the parameters that say so to it.
#pragma once

#include "ggml-deltamem.h"

struct shape {
    int rank, n_head, n_seqs, n_tokens, lambda, flags;
    int n_checkpoints = 0;
};

inline ggml_deltamem_params params_of(const shape & s) {
    ggml_deltamem_params p = {};
    p.rank                 = s.rank;
    p.n_head               = s.n_head;
    p.n_seqs               = s.n_seqs;
    p.lambda               = s.lambda;
    p.flags                = s.flags;
    return p;
}
