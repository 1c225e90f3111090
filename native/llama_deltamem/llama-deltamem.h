// δ-mem for llama.cpp: load an adapter, attach it to a context, and work with the states of its sequences.
//
// Threads: as for llama.h; one context is used by one thread at a time.
// Errors:  functions that can fail return NULL, a negative number or 0 bytes as documented. They log the reason through
//          llama_log_set's callback and keep it for llama_deltamem_last_error(), as llama_decode does where the memory
//          refuses its batch. None aborts on bad input. A handle or an array that is NULL is bad input where its comment
//          does not say what it means; functions that only ask return 0, false or -1 for it.
//
// What is said of llama_decode holds for llama_process, too.
//
#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The newest version of adapter files that this library loads (key deltamem.version).
#define LLAMA_DELTAMEM_VERSION 1

// when a state is written (key deltamem.write_granularity)
enum llama_deltamem_granularity {
    LLAMA_DELTAMEM_TOKEN          = 0, // TSW, MSW: every token writes
    LLAMA_DELTAMEM_MESSAGE_MEAN   = 1, // SSW: one write per segment, of the mean over its tokens
    LLAMA_DELTAMEM_SENTENCE_MEAN  = 2, // SSW, segments are sentences
    LLAMA_DELTAMEM_TOKEN_DEFERRED = 3, // every token writes, and is read from the next turn on
    LLAMA_DELTAMEM_REPLY_DEFERRED = 4, // every token writes; a reply reads what was written before its turn
};

struct llama_deltamem_adapter;

// The reason of the calling thread's last failure, "" if there was none. Valid until the thread's next call.
LLAMA_API const char * llama_deltamem_last_error(void);

//
// adapters
//

// Loads an adapter for `model` from its GGUF or from a packed model, onto the devices of the model's layers. Checks
// architecture, version, shapes and that all weights are finite. Returns NULL on failure.
// The model must outlive the adapter.
LLAMA_API struct llama_deltamem_adapter * llama_deltamem_adapter_load(const struct llama_model * model,
                                                                      const char *               path);

// As llama_deltamem_adapter_load; replies read what was written before their turn (LLAMA_DELTAMEM_REPLY_DEFERRED). Fails for an
// adapter that writes per segment, and changes nothing where all writes are deferred.
LLAMA_API struct llama_deltamem_adapter * llama_deltamem_adapter_load_deferring(const struct llama_model * model,
                                                                                const char *               path);

// Frees the handle, if it is not NULL. Contexts that the adapter is attached to keep its weights.
LLAMA_API void llama_deltamem_adapter_free(struct llama_deltamem_adapter * adapter);

// The layers with memory, in order: their number, and the model layer of the i-th (-1 if there is none).
LLAMA_API int32_t llama_deltamem_n_layer(const struct llama_deltamem_adapter * adapter);
LLAMA_API int32_t llama_deltamem_layer(const struct llama_deltamem_adapter * adapter, int32_t i);

LLAMA_API int32_t llama_deltamem_n_head(const struct llama_deltamem_adapter * adapter); // state heads H
LLAMA_API int32_t llama_deltamem_rank(const struct llama_deltamem_adapter * adapter);   // r

LLAMA_API enum llama_deltamem_granularity
llama_deltamem_write_granularity(const struct llama_deltamem_adapter * adapter);

// Copies a metadata value of the adapter's file to `buf` as text, arrays as ["q", "o"] and [0, 1], and returns its length,
// or -1 if there is no such key, as llama_adapter_meta_val_str does. `buf` is always terminated; a longer value is cut. A
// `buf` that is NULL gets nothing. A packed model has the keys of the adapter's own file, under the same names.
LLAMA_API int32_t llama_deltamem_meta_val_str(const struct llama_deltamem_adapter * adapter, const char * key,
                                              char * buf, size_t buf_size);

// bytes that the adapter's weights occupy on all devices
LLAMA_API size_t llama_deltamem_n_bytes(const struct llama_deltamem_adapter * adapter);

//
// contexts
//

// Attaches the adapter to the context, with one empty state per sequence (n_seq_max of them), apart from the KV cache.
// Replaces an adapter attached before, and its states. Returns 0; or -1, and leaves the context as it was, if the
// model's graph does not pass through the hooks in every layer that the adapter names.
//
// From then on each token of a batch belongs to one sequence, below n_seq_max even where the KV cache is unified;
// llama_decode refuses others with -1. Tokens that only warm the model up write like all others: decode them before.
LLAMA_API int32_t llama_deltamem_attach(struct llama_context * ctx, struct llama_deltamem_adapter * adapter);

// Detaches the adapter and frees the states. Returns 0, or -1 if the device failed while the call waited for it.
LLAMA_API int32_t llama_deltamem_detach(struct llama_context * ctx);

LLAMA_API bool llama_deltamem_is_attached(const struct llama_context * ctx);

// Whether positions in the KV cache can be shifted: llama_memory_can_shift, but false where llama.cpp would abort at
// the next llama_decode, because one of the model's caches has no layer with rotated positions, or keys that cannot be
// rotated: in bf16, or quantised where a part of each head has no position. In a model whose layers all have sliding
// windows, the cache of full attention has no layer.
LLAMA_API bool llama_deltamem_can_shift(const struct llama_context * ctx);

// bytes of all states of the context and its checkpoints; constant while the adapter is attached
LLAMA_API size_t llama_deltamem_state_n_bytes(const struct llama_context * ctx);

// How many graphs with memory were built since the adapter was attached. llama.cpp reuses a graph while the shape of
// the batch stays the same.
LLAMA_API int64_t llama_deltamem_n_graphs(const struct llama_context * ctx);

//
// states: independent of the text; llama_memory_seq_rm and related functions do not change them
//
// Nor do llama_state_get_data and the functions like it save or restore them: keep what llama_deltamem_state_get copies
// beside the text. To set, reset or copy over a state ends an unfinished ingest of its sequence. Where writes are deferred,
// to set or reset a state begins a turn, which reads it; a copy reads what its source reads.
//
// A llama_decode that fails while it computes may have written the states of some layers, or for some tokens, of the
// sequences in its batch. Such a state is incomplete: llama_deltamem_state_get, llama_deltamem_state_copy from it and
// llama_decode with it fail until it is set, reset or copied over. An unfinished ingest in that batch is lost too:
// llama_deltamem_abandon_ingest ends it. The states of other sequences, and of those that only read, stay as they were;
// so do all if the batch was refused before anything was computed (llama_decode returns 1 or -1).
//

// floats of one sequence's state, L*H*r*r; 0 if no adapter is attached
LLAMA_API size_t llama_deltamem_state_size(const struct llama_context * ctx);

// Copies a state out or in, [L, H, r, r] with S[i, j] = [row (value), column (key)]. `n` must be
// llama_deltamem_state_size. Return 0 or -1: getting refuses an incomplete state, setting refuses values that are not
// finite and then changes nothing.
LLAMA_API int32_t llama_deltamem_state_get(struct llama_context * ctx, llama_seq_id seq_id, float * dst, size_t n);
LLAMA_API int32_t llama_deltamem_state_set(struct llama_context * ctx, llama_seq_id seq_id, const float * src,
                                           size_t n);

// What the last llama_decode left of a sequence: copies its state to `dst`, [L, H, r, r]. Checks that the state and the
// logits of token i of the batch are finite. dst NULL: not the state; i < 0: not the logits. Without an adapter, dst must
// be NULL. Returns 0, -1, or what is not finite: the weights are damaged or far too large.
#define LLAMA_DELTAMEM_STATE_NOT_FINITE  1
#define LLAMA_DELTAMEM_LOGITS_NOT_FINITE 2
LLAMA_API int32_t llama_deltamem_take_result(struct llama_context * ctx, llama_seq_id seq_id, int32_t i, float * dst,
                                             size_t n);

// Empties a state; all of them if seq_id < 0. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_state_reset(struct llama_context * ctx, llama_seq_id seq_id);

// Copies one sequence's state over another's, on the device; refuses to copy an incomplete one. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_state_copy(struct llama_context * ctx, llama_seq_id seq_id_src,
                                            llama_seq_id seq_id_dst);

//
// checkpoints: copies of states within a batch
//

#define LLAMA_DELTAMEM_MAX_CHECKPOINTS 16

// Sets after which tokens of the next llama_decode the state of their sequence is kept: indices in its batch,
// ascending, at most LLAMA_DELTAMEM_MAX_CHECKPOINTS. Holds for one llama_decode, even if it fails. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_set_checkpoints(struct llama_context * ctx, const int32_t * tokens, int32_t n_tokens);

// Copies out checkpoint i of the last llama_decode. `n` as for llama_deltamem_state_get. Returns 0 or -1; a
// llama_decode that failed leaves no checkpoints.
LLAMA_API int32_t llama_deltamem_checkpoint_get(struct llama_context * ctx, int32_t i, float * dst, size_t n);

//
// writes
//

// Whether tokens of the sequence write (the default) or only read; all sequences if seq_id < 0. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_set_write(struct llama_context * ctx, llama_seq_id seq_id, bool write);
LLAMA_API bool    llama_deltamem_get_write(const struct llama_context * ctx, llama_seq_id seq_id);

// Describes the next llama_decode to an adapter that writes per segment, one entry per token of its batch:
//     segments  the segment that the token belongs to, -1 for none; ids must not decrease within a sequence's ingest
//     ends      non-zero for the token that ends its sequence's ingest. NULL: the last token of each sequence in the batch
// All tokens of an ingest read the state as it was before the ingest; by its end, each segment has written the mean of
// its tokens once, in order. An ingest may span many batches. Holds for one llama_decode, even if it fails; without it,
// every token writes by itself. Returns 0, or -1 for an adapter that writes per token.
LLAMA_API int32_t llama_deltamem_set_segments(struct llama_context * ctx, const int32_t * segments, const int8_t * ends,
                                              int32_t n_tokens);

// For an adapter whose writes are deferred: the next token of the sequence begins a turn. Tokens that read the turn's state
// read the state as it is before that one, until another turn begins. Call it before each message that is to read those
// before it. Returns 0, or -1 for any other adapter.
LLAMA_API int32_t llama_deltamem_begin_turn(struct llama_context * ctx, llama_seq_id seq_id);

// For LLAMA_DELTAMEM_REPLY_DEFERRED: whether tokens of the sequence read the turn's state, as those of a reply, or the present
// one, as those of a message (the default). Returns 0, or -1 for any other adapter.
LLAMA_API int32_t llama_deltamem_set_replies(struct llama_context * ctx, llama_seq_id seq_id, bool replies);

// What the present turn of a sequence reads, as llama_deltamem_state_set: for a text that goes back into a turn. Returns 0,
// or -1 for an adapter whose writes are not deferred.
LLAMA_API int32_t llama_deltamem_turn_set(struct llama_context * ctx, llama_seq_id seq_id, const float * src, size_t n);

// Ends an unfinished ingest of the sequence, or of all if seq_id < 0, without writing: the state is as it was before
// the ingest. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_abandon_ingest(struct llama_context * ctx, llama_seq_id seq_id);

//
// sampling
//

// Writes the k likeliest tokens of a row of logits, [n], to dst, [k], ascending by id, as a llama_sampler whose first
// step keeps the k likeliest takes them; of equal logits the first. Leaves out -inf and NaN. Returns how many.
LLAMA_API int32_t llama_deltamem_candidates(const float * logits, int32_t n, int32_t k, llama_token_data * dst);

#ifdef __cplusplus
}
#endif
