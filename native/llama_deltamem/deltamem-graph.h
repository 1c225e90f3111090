// The hooks that llama.cpp's graph builder and decoder call (native/patches). Every one is a no-op without an adapter.
// llama-graph.h includes this file, so it only declares.
#pragma once

#include <cstdint>
#include <memory>

struct ggml_tensor;
struct llama_context_params;
struct llama_model;
struct llm_graph_params;

struct llama_deltamem_context; // an attached adapter with the states of one llama_context: deltamem-context.h
struct llama_deltamem_graph;   // the memory's part of one graph while it is built

using llama_deltamem_context_ptr = std::shared_ptr<llama_deltamem_context>;
using llama_deltamem_graph_ptr   = std::shared_ptr<llama_deltamem_graph>;

// which projection's output is being corrected
enum llama_deltamem_target {
    LLAMA_DELTAMEM_Q,
    LLAMA_DELTAMEM_K,
    LLAMA_DELTAMEM_V,
    LLAMA_DELTAMEM_QKV, // fused: q, k and v rows in one tensor
    LLAMA_DELTAMEM_O,
};

// null if no adapter is attached
llama_deltamem_graph_ptr llama_deltamem_graph_init(const llm_graph_params & params);

// Builds the read (and the write) of the memory of layer il, from its attention input `cur` [n_embd, n_tokens].
void llama_deltamem_read(const llama_deltamem_graph_ptr & graph, ggml_tensor * cur, int il);

// Returns `out` [rows, n_tokens] plus the layer's correction for that projection, `out` itself if there is none.
ggml_tensor * llama_deltamem_correct(const llama_deltamem_graph_ptr & graph, llama_deltamem_target target,
                                     ggml_tensor * out, int il);

// Called for each llama_decode before anything is computed. Logs the reason and returns false to refuse the batch.
// Instantiated once, for the type of batch that this llama.cpp's decoder takes.
template <typename batch_type>
bool llama_deltamem_begin_batch(const llama_deltamem_context_ptr & deltamem, const batch_type & batch);

// Called after the batch was computed; not called if that failed.
void llama_deltamem_end_batch(const llama_deltamem_context_ptr & deltamem);

// Called before a context is made, with an adapter or without. Logs the reason and returns false for parameters that an
// assertion of llama.cpp would fail on.
bool llama_deltamem_check_params(const llama_model & model, const llama_context_params & params);

// an upper bound of the nodes that the hooks add to a graph
uint32_t llama_deltamem_n_nodes(const llama_deltamem_context_ptr & deltamem);
