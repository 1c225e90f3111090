// δ-mem for llama.cpp: load a memory adapter, attach it to a context, and work with the states of its sequences.
//
// Threads: as for llama.h; one context is used by one thread at a time.
// Errors:  functions that can fail return NULL, a negative number or 0 bytes as documented. They log the reason through
//          llama_log_set's callback and keep it for llama_deltamem_last_error(). None aborts on bad input.
//
#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The newest adapter file version that this library reads (key deltamem.version).
#define LLAMA_DELTAMEM_VERSION 1

// when a state is written (key deltamem.write_granularity)
enum llama_deltamem_granularity {
    LLAMA_DELTAMEM_TOKEN         = 0, // TSW, MSW: every token writes
    LLAMA_DELTAMEM_MESSAGE_MEAN  = 1, // SSW: one write per segment, of the mean over its tokens
    LLAMA_DELTAMEM_SENTENCE_MEAN = 2, // SSW, segments are sentences
};

struct llama_deltamem_adapter;

// The reason of the calling thread's last failure, "" if there was none. Valid until the thread's next call.
LLAMA_API const char * llama_deltamem_last_error(void);

//
// adapters
//

// Loads an adapter GGUF, or a packed model's memory, for `model`, onto the devices where the model's layers live.
// Checks architecture, version, shapes and that all weights are finite. Returns NULL on failure.
// The model must outlive the adapter.
LLAMA_API struct llama_deltamem_adapter * llama_deltamem_adapter_load(const struct llama_model * model,
                                                                      const char *               path);

// Frees the handle. Contexts that the adapter is attached to keep what they need.
LLAMA_API void llama_deltamem_adapter_free(struct llama_deltamem_adapter * adapter);

// Layers that carry memory, in order: their number, and the model layer of the i-th (-1 if there is none).
LLAMA_API int32_t llama_deltamem_n_layer(const struct llama_deltamem_adapter * adapter);
LLAMA_API int32_t llama_deltamem_layer(const struct llama_deltamem_adapter * adapter, int32_t i);

LLAMA_API int32_t llama_deltamem_n_head(const struct llama_deltamem_adapter * adapter); // state heads H
LLAMA_API int32_t llama_deltamem_rank(const struct llama_deltamem_adapter * adapter);   // r

LLAMA_API enum llama_deltamem_granularity
llama_deltamem_write_granularity(const struct llama_deltamem_adapter * adapter);

// A metadata value of the adapter's file as text (arrays: comma-separated), as llama_adapter_meta_val_str: returns the
// length, or -1 if there is no such key. `buf` is always terminated; a longer value is cut.
LLAMA_API int32_t llama_deltamem_meta_val_str(const struct llama_deltamem_adapter * adapter, const char * key,
                                              char * buf, size_t buf_size);

// bytes that the adapter's weights occupy on all devices
LLAMA_API size_t llama_deltamem_n_bytes(const struct llama_deltamem_adapter * adapter);

//
// contexts
//

// Attaches the adapter to the context: one empty state per sequence (n_seq_max of them), beside the KV cache. Replaces an
// adapter attached before, and its states. Returns 0, or -1 if the model's graph does not pass through the hooks in
// every layer that the adapter names; the context is then as it was.
LLAMA_API int32_t llama_deltamem_attach(struct llama_context * ctx, struct llama_deltamem_adapter * adapter);

// Back to the plain model. The states are lost. Returns 0, or -1 if the device failed while it was waited for.
LLAMA_API int32_t llama_deltamem_detach(struct llama_context * ctx);

LLAMA_API bool llama_deltamem_is_attached(const struct llama_context * ctx);

// Whether tokens can be moved in the KV cache: what llama_memory_can_shift says, except where llama.cpp then aborts, at the next
// llama_decode: a cache of the model has no layer with positions, as that of full attention where all layers slide.
LLAMA_API bool llama_deltamem_can_shift(const struct llama_context * ctx);

// bytes of all states of the context, checkpoints among them; nothing else grows or shrinks with use
LLAMA_API size_t llama_deltamem_state_n_bytes(const struct llama_context * ctx);

// How often a graph with memory was built since the adapter was attached. llama.cpp reuses graphs: while one shape of
// batch repeats, this stands still.
LLAMA_API int64_t llama_deltamem_n_graphs(const struct llama_context * ctx);

//
// states: independent of the text; llama_memory_seq_rm and the like never touch them
//
// A llama_decode that fails in the middle has written the states of some layers, or of some tokens, of the sequences in its
// batch: such a state is not the one before and not the one after. Until it is set, reset or copied over,
// llama_deltamem_state_get, llama_deltamem_state_copy from it and llama_decode with it fail. Sequences that were not in the
// batch, or only read, and batches that were refused before anything was computed (llama_decode returns 1 or -1) leave
// states as they were. What an unfinished ingest had gathered is lost likewise: llama_deltamem_abandon_ingest goes on.
//

// floats of one sequence's state, L*H*r*r; 0 if no adapter is attached
LLAMA_API size_t llama_deltamem_state_size(const struct llama_context * ctx);

// Copies a state out or in, [L, H, r, r] with S[i, j] = [row (value), column (key)]. `n` must be llama_deltamem_state_size.
// Getting refuses a state that a failed llama_decode left, setting refuses non-finite values and changes nothing then.
// Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_state_get(struct llama_context * ctx, llama_seq_id seq_id, float * dst, size_t n);
LLAMA_API int32_t llama_deltamem_state_set(struct llama_context * ctx, llama_seq_id seq_id, const float * src,
                                           size_t n);

// Empties a state; all of them if seq_id < 0. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_state_reset(struct llama_context * ctx, llama_seq_id seq_id);

// Copies one sequence's state over another's, on the device; not one that a failed llama_decode left. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_state_copy(struct llama_context * ctx, llama_seq_id seq_id_src,
                                            llama_seq_id seq_id_dst);

//
// checkpoints: states in the middle of a batch
//

#define LLAMA_DELTAMEM_MAX_CHECKPOINTS 16

// Tokens of the next llama_decode after which the state of their sequence is kept: indices in its batch, ascending, at
// most LLAMA_DELTAMEM_MAX_CHECKPOINTS. Holds for one llama_decode, also for one that fails. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_set_checkpoints(struct llama_context * ctx, const int32_t * tokens, int32_t n_tokens);

// Copies out the state that the i-th of them left, until the next llama_decode. `n` as for llama_deltamem_state_get.
// Returns 0, or -1, also after a llama_decode that failed: it leaves none.
LLAMA_API int32_t llama_deltamem_checkpoint_get(struct llama_context * ctx, int32_t i, float * dst, size_t n);

//
// writes
//

// Whether tokens of the sequence write (the default) or only read; all sequences if seq_id < 0. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_set_write(struct llama_context * ctx, llama_seq_id seq_id, bool write);
LLAMA_API bool    llama_deltamem_get_write(const struct llama_context * ctx, llama_seq_id seq_id);

// Describes the next llama_decode for a segment adapter, one entry per token of its batch:
//     segments  segment that the token writes into, -1 for none; must not fall within one sequence's ingest
//     ends      non-zero on the token that ends its sequence's ingest. NULL: the last token of each sequence in the batch
// All tokens of an ingest read the state as it was before the ingest; when it ends, each segment has written the mean of
// its tokens once, in order. An ingest may span many batches. Holds for one llama_decode, also for one that fails;
// without it every token writes by itself. Returns 0, or -1 for an adapter that writes per token.
LLAMA_API int32_t llama_deltamem_set_segments(struct llama_context * ctx, const int32_t * segments, const int8_t * ends,
                                              int32_t n_tokens);

// Drops what an unfinished ingest of the sequence has gathered, all sequences if seq_id < 0. Its state is as it was
// before the ingest. Returns 0 or -1.
LLAMA_API int32_t llama_deltamem_abandon_ingest(struct llama_context * ctx, llama_seq_id seq_id);

#ifdef __cplusplus
}
#endif
