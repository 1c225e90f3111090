// Checks parameters that a caller may pass and that fail an assertion of llama.cpp, which would end the process.

#include "deltamem-graph.h"
#include "ggml.h"
#include "llama-context.h"
#include "llama-deltamem.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>

// The number of an enum that C code has set, which may be one that C++ does not let the enum have.
template <typename E> static int number_of(const E & value) {
    static_assert(sizeof(E) == sizeof(int), "C's enums are ints");
    int number;
    memcpy(&number, &value, sizeof(number));
    return number;
}

// Whether a KV cache may have this type. The others have no conversion from float32 or no product, or no longer exist.
static bool is_cache_type(int type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_MXFP4:
        case GGML_TYPE_NVFP4:  return true;
        default:               return false;
    }
}

// why the cache cannot have this type, "" if it can; n_embd_head(il) is the values of a head in layer il
static std::string cache_problem(const llama_hparams & hparams, const char * option, int type,
                                 const std::function<uint32_t(uint32_t)> & n_embd_head) {
    if (!is_cache_type(type)) {
        return format("%s = %d is no type of a KV cache: it is f32, f16, bf16, q8_0, q5_0, q5_1, q4_0, q4_1, iq4_nl, "
                      "mxfp4 or "
                      "nvfp4",
                      option, type);
    }
    const uint32_t n_block = (uint32_t) ggml_blck_size((ggml_type) type);
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.has_kv(il) && n_embd_head(il) % n_block != 0) {
            return format("%s = %s takes heads of a multiple of %u values, this model's have %u: use f16", option,
                          ggml_type_name((ggml_type) type), n_block, n_embd_head(il));
        }
    }
    return "";
}

// why llama.cpp cannot reserve memory for so many sequences, "" if it can
static std::string sequences_problem(const llama_model & model, const llama_context_params & params) {
    const llama_hparams & hparams = model.hparams;
    if (hparams.vocab_only) {
        return "";
    }
    // as llama_context computes them
    const bool causal = number_of(params.attention_type) == LLAMA_ATTENTION_TYPE_UNSPECIFIED
                                ? hparams.causal_attn
                                : number_of(params.attention_type) == LLAMA_ATTENTION_TYPE_CAUSAL;
    const int  pooling =
            params.pooling_type == LLAMA_POOLING_TYPE_UNSPECIFIED ? hparams.pooling_type : params.pooling_type;
    const uint32_t n_seqs  = std::max(1u, params.n_seq_max);
    const uint32_t n_ctx   = params.n_ctx ? params.n_ctx : hparams.n_ctx_train;
    const uint32_t n_batch = causal ? std::min(n_ctx, params.n_batch) : params.n_batch;
    const uint32_t n_outputs =
            params.n_outputs_max && !llama_model_has_encoder(&model) ? params.n_outputs_max : n_batch;
    const uint32_t n_cells  = GGML_PAD(n_ctx, 256);
    const uint32_t n_held   = params.kv_unified ? n_cells : GGML_PAD(n_cells / n_seqs, 256) * n_seqs;
    const uint32_t n_tokens = std::min({ n_held, n_batch, params.n_ubatch ? params.n_ubatch : n_batch });

    if (n_batch == 0 || n_outputs < n_seqs) {
        return format("a batch has at most %u tokens with logits, and n_seq_max = %u: raise n_ctx, n_batch or "
                      "n_outputs_max, or lower n_seq_max",
                      std::min(n_batch, n_outputs), n_seqs);
    }
    // it reserves as many tokens for each sequence, but not as many outputs
    if (params.embeddings && pooling == LLAMA_POOLING_TYPE_MEAN && (n_tokens % n_seqs != 0 || n_outputs < n_tokens)) {
        return format("means of micro-batches of %u tokens need a multiple of n_seq_max = %u, and as many outputs: "
                      "change n_ubatch or n_seq_max",
                      n_tokens, n_seqs);
    }
    return "";
}

bool llama_deltamem_check_params(const llama_model & model, const llama_context_params & params) {
    const llama_hparams & hparams = model.hparams;

    std::string problem = cache_problem(hparams, "type_k", number_of(params.type_k),
                                        [&hparams](uint32_t il) { return hparams.n_embd_head_k(il); });
    if (problem.empty()) {
        problem = cache_problem(hparams, "type_v", number_of(params.type_v),
                                [&hparams](uint32_t il) { return hparams.n_embd_head_v(il); });
    }
    const auto check_one_of = [&problem](const char * option, int number, int first, int last) {
        if (problem.empty() && (number < first || number > last)) {
            problem = format("%s = %d is none: it is %d to %d", option, number, first, last);
        }
    };
    check_one_of("pooling_type", number_of(params.pooling_type), LLAMA_POOLING_TYPE_UNSPECIFIED,
                 LLAMA_POOLING_TYPE_RANK);
    check_one_of("flash_attn_type", number_of(params.flash_attn_type), LLAMA_FLASH_ATTN_TYPE_AUTO,
                 LLAMA_FLASH_ATTN_TYPE_ENABLED);
    if (problem.empty()) {
        problem = sequences_problem(model, params);
    }
    if (!problem.empty()) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, problem.c_str());
    }
    return problem.empty();
}

// Whether llama.cpp can build and compute the graph that shifts a cache, in which these layers are. There must be a layer
// with rotated positions. It rotates keys in float32 and float16, and makes quantised ones float32: only those of a whole
// head can be written back.
static bool can_rotate(const llama_kv_cache & cache, const llama_hparams & hparams,
                       const std::function<bool(uint32_t)> & in_cache) {
    bool rotates = false;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || !hparams.has_rope(il) || !in_cache(il)) {
            continue;
        }
        const ggml_type type = cache.type_k();
        if (ggml_is_quantized(type) ? hparams.n_rot(il) != hparams.n_embd_head_k(il) : type == GGML_TYPE_BF16) {
            return false;
        }
        rotates = true;
    }
    return rotates;
}

bool llama_deltamem_can_shift(const llama_context * ctx) {
    if (!ctx) {
        return false;
    }
    const llama_memory_t  memory  = ctx->get_memory();
    const llama_hparams & hparams = ctx->get_model().hparams;
    if (!memory || !memory->get_can_shift() || hparams.n_pos_per_embd() != 1) {
        return false;
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return true; // a shift changes the positions only, and no key
    }
    const auto all     = [&hparams](uint32_t il) { return !hparams.is_recr(il); };
    const auto full    = [&hparams](uint32_t il) { return !hparams.is_recr(il) && !hparams.is_swa(il); };
    const auto sliding = [&hparams](uint32_t il) { return !hparams.is_recr(il) && hparams.is_swa(il); };

    const auto * hybrid      = dynamic_cast<llama_memory_hybrid *>(memory);
    const auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(memory);
    const auto * iswa        = hybrid_iswa ? hybrid_iswa->get_mem_attn() : dynamic_cast<llama_kv_cache_iswa *>(memory);
    const auto * plain       = hybrid ? hybrid->get_mem_attn() : dynamic_cast<llama_kv_cache *>(memory);
    if (iswa) {
        return can_rotate(*iswa->get_base(), hparams, full) && can_rotate(*iswa->get_swa(), hparams, sliding);
    }
    return plain && can_rotate(*plain, hparams, all); // others have several parts, one of which may have no such layer
}
