// What the native tests of models share: a batch of one sequence.
#pragma once

#include "llama.h"

#include <vector>

// Decodes the tokens of a sequence from a position on, with the logits of the last one. Returns whether it succeeded.
inline bool decode(llama_context * ctx, const std::vector<llama_token> & tokens, llama_pos pos, llama_seq_id seq_id) {
    llama_batch batch = llama_batch_init((int32_t) tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = pos + (llama_pos) i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq_id;
        batch.logits[i]    = i + 1 == tokens.size();
    }
    batch.n_tokens = (int32_t) tokens.size();

    const bool ok = llama_decode(ctx, batch) == 0;
    llama_batch_free(batch);
    return ok;
}
