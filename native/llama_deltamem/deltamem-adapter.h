// The weights of an adapter GGUF (docs/reference/formats.md) on their devices, checked against a model.
#pragma once

#include "ggml-cpp.h"
#include "ggml-deltamem.h"
#include "llama-arch.h"
#include "llama-deltamem.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

// the low-rank correction of one projection's output, null if the adapter has none
struct llama_deltamem_correction {
    ggml_tensor * weight   = nullptr;
    bool          one_node = false; // weights for ggml_deltamem_correct; else [H*r, n_out] for ggml_mul_mat
    int64_t       n_out    = 0;

    explicit operator bool() const { return weight; }
};

// the weights of one layer with memory
struct llama_deltamem_layer_weights {
    int                il     = -1;      // the model's layer
    ggml_backend_dev_t device = nullptr; // where its state is: the layer's device if that can compute it, else the CPU
    int composite_width = 0; // of the composite that computes it (deltamem-composite.h), 0 for the operator itself

    ggml_tensor * in        = nullptr; // [n_embd, n_proj]
    ggml_tensor * gate_bias = nullptr; // [n_gates]
    ggml_tensor * o_norm    = nullptr; // [n_embd], null if Δo is not normalised

    llama_deltamem_correction q, k, v, o;
    llama_deltamem_correction qkv; // instead of q, k, v if the model's projection is fused; zero for those without one
};

struct llama_deltamem_weights {
    const llama_model & model;

    ggml_deltamem_params       params      = {};
    llama_deltamem_granularity granularity = LLAMA_DELTAMEM_TOKEN;
    float                      o_norm_eps  = 0.0f;

    std::vector<llama_deltamem_layer_weights> layers; // ascending il
    std::map<std::string, std::string>        meta;   // general.*, adapter.*, deltamem.*

    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;

    // Throws std::runtime_error with a sentence that names the file.
    llama_deltamem_weights(const llama_model & model, const std::string & path, bool defers_replies);

    size_t n_bytes() const;
};

using llama_deltamem_weights_ptr = std::shared_ptr<const llama_deltamem_weights>;

// Throw std::runtime_error with the sentence that refuses an architecture: if it has no attention, or for the reason
// `why`.
void              llama_deltamem_check_attention(llm_arch arch);
[[noreturn]] void llama_deltamem_refuse(llm_arch arch, const std::string & why);
[[noreturn]] void llama_deltamem_refuse(llm_arch arch, int il, const std::string & why);

// the C API's handle
struct llama_deltamem_adapter {
    llama_deltamem_weights_ptr weights;
};
