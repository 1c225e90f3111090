// See deltamem-architectures.h.

#include "deltamem-architectures.h"

#include "common.h"
#include "deltamem-adapter.h"
#include "deltamem-api.h"
#include "ggml-backend.h"
#include "gguf.h"
#include "llama-arch.h"
#include "llama-cpp.h"
#include "llama-model-saver.h"
#include "llama-model.h"
#include "log.h"

#include <cinttypes>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <random>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// llama.cpp's test file, unchanged, for get_gguf_ctx and moe_mandatory: the hyperparameters that each architecture
// needs. What it includes is included above, outside of the namespace. The compiler drops the functions that nothing
// here calls.
namespace {
#include "test-llama-archs.cpp"

// The hyperparameters of a tiny model, with those that the tests lack for the architectures that they skip.
gguf_context_ptr tiny_metadata(llm_arch arch) {
    gguf_context_ptr      metadata = get_gguf_ctx(arch, moe_mandatory(arch) || arch == LLM_ARCH_DEEPSEEK2OCR);
    llama_model_saver     ms(arch, metadata.get());
    std::vector<uint32_t> swa(LLAMA_MAX_LAYERS, 1);

    switch (arch) {
        case LLM_ARCH_BERT:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE: ms.add_kv(LLM_KV_TOKENIZER_TOKEN_TYPE_COUNT, uint32_t(1)); break;
        case LLM_ARCH_GEMMA4:
            swa.resize(gguf_get_val_u32(metadata.get(), gguf_find_key(metadata.get(), "gemma4.block_count")));
            swa.back() = 0;
            ms.add_kv(LLM_KV_ATTENTION_SLIDING_WINDOW_PATTERN, swa);
            break;
        default: break;
    }
    return metadata;
}
} // namespace

const char * deltamem_architecture_name(int32_t i) {
    int32_t n = 0;
    for (const llm_arch arch : llm_arch_all()) {
        if (arch != LLM_ARCH_UNKNOWN && n++ == i) {
            return llm_arch_name(arch);
        }
    }
    return nullptr;
}

llama_model * deltamem_tiny_model(const char * name) {
    try {
        if (!name) {
            throw std::runtime_error("no architecture is named");
        }
        const llm_arch arch = llm_arch_from_string(name);
        if (arch == LLM_ARCH_UNKNOWN) {
            throw std::runtime_error(std::string("llama.cpp knows no architecture '") + name + "'");
        }

        llama_deltamem_check_attention(arch);

        ggml_backend_dev_t no_device = nullptr;

        llama_model_params params = llama_model_default_params();
        params.devices            = &no_device;
        params.progress_callback  = [](float, void *) { return true; };

        const auto zero = [](ggml_tensor * tensor, void *) {
            ggml_backend_tensor_memset(tensor, 0, 0, ggml_nbytes(tensor));
        };

        const gguf_context_ptr metadata = tiny_metadata(arch);

        llama_model * model = llama_model_init_from_user(metadata.get(), zero, nullptr, params);
        if (!model) {
            throw std::runtime_error(std::string("llama.cpp makes no tiny model of architecture '") + name + "'");
        }
        return model;
    } catch (const std::exception & err) {
        llama_deltamem_set_error(err.what());
        return nullptr;
    }
}

int32_t deltamem_tiny_adapter(const llama_model * model, int32_t il, const char * heads, const char * path) {
    try {
        if (!model || !heads || !path) {
            throw std::runtime_error("model, heads or path is NULL");
        }
        if (il < 0 || il >= (int32_t) model->hparams.n_layer()) {
            throw std::runtime_error("the model has no layer " + std::to_string(il));
        }
        const llama_layer & layer  = model->layers[il];
        const int64_t       n_embd = model->hparams.n_embd;

        const gguf_context_ptr file(gguf_init_empty());
        gguf_set_val_str(file.get(), "general.type", "adapter");
        gguf_set_val_str(file.get(), "general.architecture", llm_arch_name(model->arch));
        gguf_set_val_str(file.get(), "adapter.type", "deltamem");
        gguf_set_val_u32(file.get(), "deltamem.version", LLAMA_DELTAMEM_VERSION);
        gguf_set_val_u32(file.get(), "deltamem.rank", 1);
        gguf_set_val_u32(file.get(), "deltamem.head_count", 1);
        gguf_set_val_str(file.get(), "deltamem.update_mode", "standard");
        gguf_set_val_bool(file.get(), "deltamem.couple_lambda", true);
        gguf_set_val_bool(file.get(), "deltamem.rankwise_gates", true);
        gguf_set_val_bool(file.get(), "deltamem.normalize_qk", true);
        gguf_set_val_str(file.get(), "deltamem.write_granularity", "token");
        gguf_set_val_u32(file.get(), "deltamem.base.embedding_length", (uint32_t) n_embd);
        gguf_set_val_u32(file.get(), "deltamem.base.block_count", model->hparams.n_layer());
        gguf_set_arr_data(file.get(), "deltamem.layers", GGUF_TYPE_UINT32, &il, 1);

        // of a fused projection the rows are told apart as the loader does; a layer without projections has one row
        // each
        const int64_t n_k = layer.wqkv ? model->hparams.n_embd_k_gqa(il) : layer.wk ? layer.wk->ne[1] : 1;
        const int64_t n_v = layer.wqkv ? model->hparams.n_embd_v_gqa(il) : layer.wv ? layer.wv->ne[1] : 1;
        const int64_t n_q = layer.wqkv ? layer.wqkv->ne[1] - n_k - n_v : layer.wq ? layer.wq->ne[1] : 1;
        const int64_t n_o = layer.wo ? layer.wo->ne[1] : 1;

        std::vector<std::string>                                  names;
        std::vector<const char *>                                 pointers;
        std::vector<std::pair<std::string, std::vector<int64_t>>> shapes = {
            { "in.weight", { n_embd, 4 } }, // q, k, v and one gate
            { "gate.bias", { 1 } },
        };
        for (const char * head = heads; *head; ++head) {
            names.emplace_back(1, *head);
            shapes.push_back({ names.back() + ".weight",
                               { 1, *head == 'q'   ? n_q
                                    : *head == 'k' ? n_k
                                    : *head == 'v' ? n_v
                                                   : n_o } });
        }
        for (const std::string & head : names) {
            pointers.push_back(head.c_str());
        }
        gguf_set_arr_str(file.get(), "deltamem.delta_heads", pointers.data(), pointers.size());

        size_t size = 0;
        for (const auto & [what, ne] : shapes) {
            size += ggml_tensor_overhead() +
                    GGML_PAD(ne[0] * (ne.size() > 1 ? ne[1] : 1) * sizeof(float), GGML_MEM_ALIGN);
        }
        const ggml_context_ptr ctx(ggml_init({ size, nullptr, /*.no_alloc =*/false }));
        for (const auto & [what, ne] : shapes) {
            ggml_tensor * tensor = ggml_new_tensor(ctx.get(), GGML_TYPE_F32, (int) ne.size(), ne.data());
            memset(tensor->data, 0, ggml_nbytes(tensor));
            ggml_format_name(tensor, "blk.%d.deltamem_%s", il, what.c_str());
            gguf_add_tensor(file.get(), tensor);
        }
        if (!gguf_write_to_file(file.get(), path, /*only_meta =*/false)) {
            throw std::runtime_error(std::string(path) + " cannot be written");
        }
        return 0;
    } catch (const std::exception & err) {
        llama_deltamem_set_error(err.what());
        return -1;
    }
}
