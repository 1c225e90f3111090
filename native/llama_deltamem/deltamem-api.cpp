// The C API: argument checks, and exceptions turned into return values.

#include "deltamem-api.h"

#include "deltamem-context.h"
#include "deltamem-logits.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

static thread_local std::string last_error;

void llama_deltamem_set_error(const std::string & what) {
    last_error = what;
    LLAMA_LOG_ERROR("δ-mem: %s\n", what.c_str());
}

const char * llama_deltamem_last_error(void) {
    return last_error.c_str();
}

// Runs f, which returns an int32_t or throws; -1 if it throws.
template <typename F> static int32_t guarded(F f) {
    try {
        return f();
    } catch (const std::exception & err) {
        llama_deltamem_set_error(err.what());
    } catch (...) {
        llama_deltamem_set_error("unknown error");
    }
    return -1;
}

static void check_given(const void * pointer, const char * what) {
    if (!pointer) {
        throw std::runtime_error(format("%s is NULL", what));
    }
}

static llama_deltamem_context & attached(const llama_context * ctx) {
    check_given(ctx, "the context");
    if (!ctx->deltamem) {
        throw std::runtime_error("no adapter is attached to this context");
    }
    return *ctx->deltamem;
}

static llama_deltamem_context & attached(const llama_context * ctx, llama_seq_id seq_id) {
    llama_deltamem_context & deltamem = attached(ctx);
    if (seq_id < 0 || (uint32_t) seq_id >= deltamem.n_seqs()) {
        throw std::runtime_error(format("there is no sequence %d, this context has %u", seq_id, deltamem.n_seqs()));
    }
    return deltamem;
}

// visit(deltamem, seq_id) for one sequence, or for all if seq_id < 0
template <typename F> static int32_t for_sequences(const llama_context * ctx, llama_seq_id seq_id, F visit) {
    return guarded([&] {
        if (seq_id >= 0) {
            visit(attached(ctx, seq_id), seq_id);
            return 0;
        }
        llama_deltamem_context & deltamem = attached(ctx);
        for (uint32_t s = 0; s < deltamem.n_seqs(); ++s) {
            visit(deltamem, (llama_seq_id) s);
        }
        return 0;
    });
}

//
// adapters
//

static llama_deltamem_adapter * load_adapter(const llama_model * model, const char * path, bool defers_replies) {
    llama_deltamem_adapter * adapter = nullptr;
    guarded([&] {
        check_given(model, "the model to load an adapter for");
        check_given(path, "the path of the adapter to load");
        adapter = new llama_deltamem_adapter { std::make_shared<llama_deltamem_weights>(*model, path, defers_replies) };
        return 0;
    });
    return adapter;
}

llama_deltamem_adapter * llama_deltamem_adapter_load(const llama_model * model, const char * path) {
    return load_adapter(model, path, false);
}

llama_deltamem_adapter * llama_deltamem_adapter_load_deferring(const llama_model * model, const char * path) {
    return load_adapter(model, path, true);
}

void llama_deltamem_adapter_free(llama_deltamem_adapter * adapter) {
    delete adapter;
}

// null for a handle that is NULL
static const llama_deltamem_weights * weights_of(const llama_deltamem_adapter * adapter) {
    return adapter ? adapter->weights.get() : nullptr;
}

int32_t llama_deltamem_n_layer(const llama_deltamem_adapter * adapter) {
    const auto * weights = weights_of(adapter);
    return weights ? (int32_t) weights->layers.size() : 0;
}

int32_t llama_deltamem_layer(const llama_deltamem_adapter * adapter, int32_t i) {
    return i >= 0 && i < llama_deltamem_n_layer(adapter) ? adapter->weights->layers[i].il : -1;
}

int32_t llama_deltamem_n_head(const llama_deltamem_adapter * adapter) {
    const auto * weights = weights_of(adapter);
    return weights ? weights->params.n_head : 0;
}

int32_t llama_deltamem_rank(const llama_deltamem_adapter * adapter) {
    const auto * weights = weights_of(adapter);
    return weights ? weights->params.rank : 0;
}

enum llama_deltamem_granularity llama_deltamem_write_granularity(const llama_deltamem_adapter * adapter) {
    const auto * weights = weights_of(adapter);
    return weights ? weights->granularity : LLAMA_DELTAMEM_TOKEN;
}

int32_t llama_deltamem_meta_val_str(const llama_deltamem_adapter * adapter, const char * key, char * buf,
                                    size_t buf_size) {
    const std::string * value = nullptr;
    if (adapter && key) {
        const auto it = adapter->weights->meta.find(key);
        value         = it == adapter->weights->meta.end() ? nullptr : &it->second;
    }
    const int32_t length = snprintf(buf, buf ? buf_size : 0, "%s", value ? value->c_str() : "");
    return value ? length : -1;
}

size_t llama_deltamem_n_bytes(const llama_deltamem_adapter * adapter) {
    const auto * weights = weights_of(adapter);
    return weights ? weights->n_bytes() : 0;
}

//
// contexts
//

// Throws if the model's graph does not pass a layer or a correction of the adapter through the hooks; names the first
// one.
static void check_coverage(const llama_deltamem_context & deltamem) {
    const auto & weights = *deltamem.weights;

    for (size_t i = 0; i < weights.layers.size(); ++i) {
        const auto & lw   = weights.layers[i];
        const auto & seen = deltamem.covered[i];

        const std::pair<bool, llama_deltamem_target> needed[] = {
            { (bool) lw.q, LLAMA_DELTAMEM_Q },     { (bool) lw.k, LLAMA_DELTAMEM_K }, { (bool) lw.v, LLAMA_DELTAMEM_V },
            { (bool) lw.qkv, LLAMA_DELTAMEM_QKV }, { (bool) lw.o, LLAMA_DELTAMEM_O },
        };

        std::string problem = seen.problem;
        if (problem.empty() && !seen.read) {
            problem = "its attention does not go through the common q, k, v projections";
        }
        for (const auto & [present, target] : needed) {
            if (problem.empty() && present && !(seen.targets & (1u << target))) {
                problem = target == LLAMA_DELTAMEM_O
                                  ? "its attention does not go through the common output projection"
                                  : "its attention does not go through the common q, k, v projections";
            }
        }
        if (!problem.empty()) {
            llama_deltamem_refuse(weights.model.arch, lw.il, problem);
        }
    }
}

void llama_context::set_deltamem(llama_deltamem_context_ptr value) {
    if (value == deltamem) {
        return;
    }
    synchronize();
    deltamem = std::move(value);
    // the reserved graphs and buffers are of the adapter before
    sched_need_reserve = true;
}

int32_t llama_deltamem_attach(llama_context * ctx, llama_deltamem_adapter * adapter) {
    return guarded([&] {
        check_given(ctx, "the context");
        check_given(adapter, "the adapter to attach");
        if (&adapter->weights->model != &ctx->get_model()) {
            throw std::runtime_error("the adapter was loaded for another model than this context's");
        }
        const llama_model & model = ctx->get_model();
        if (!ctx->get_memory() || llama_model_has_encoder(&model)) {
            llama_deltamem_refuse(model.arch, ctx->get_memory() ? "it has an encoder" : "it is no decoder");
        }

        const auto before = ctx->deltamem;
        try {
            ctx->set_deltamem(std::make_shared<llama_deltamem_context>(adapter->weights, ctx->n_seq_max()));
            ctx->sched_reserve(); // builds the graphs
            check_coverage(*ctx->deltamem);
        } catch (...) {
            ctx->set_deltamem(before);
            ctx->sched_reserve();
            throw;
        }
        ctx->deltamem->n_graphs = 0;
        return 0;
    });
}

int32_t llama_deltamem_detach(llama_context * ctx) {
    return guarded([&] {
        check_given(ctx, "the context");
        ctx->set_deltamem(nullptr);
        return 0;
    });
}

bool llama_deltamem_is_attached(const llama_context * ctx) {
    return ctx && ctx->deltamem;
}

size_t llama_deltamem_state_n_bytes(const llama_context * ctx) {
    return llama_deltamem_is_attached(ctx) ? ctx->deltamem->state.n_bytes() : 0;
}

int64_t llama_deltamem_n_graphs(const llama_context * ctx) {
    return llama_deltamem_is_attached(ctx) ? ctx->deltamem->n_graphs : 0;
}

//
// states
//

size_t llama_deltamem_state_size(const llama_context * ctx) {
    return llama_deltamem_is_attached(ctx) ? ctx->deltamem->state.size() : 0;
}

static void check_array(const llama_deltamem_context & deltamem, const float * values, size_t n) {
    check_given(values, "the array of a state");
    if (n != deltamem.state.size()) {
        throw std::runtime_error(format("a state of this adapter has %zu values, not %zu", deltamem.state.size(), n));
    }
}

static void check_finite(const llama_deltamem_context & deltamem, const float * values, size_t n) {
    check_array(deltamem, values, n);
    for (size_t i = 0; i < n; ++i) {
        if (!std::isfinite(values[i])) {
            throw std::runtime_error(format("the state has a value that is not finite, at position %zu", i));
        }
    }
}

// as `attached`, for an adapter whose writes are deferred
static llama_deltamem_context & deferring(const llama_context * ctx, llama_seq_id seq_id) {
    llama_deltamem_context & deltamem = attached(ctx, seq_id);
    if (!deltamem.defers()) {
        throw std::runtime_error("this adapter's writes are read at once: it has no turns");
    }
    return deltamem;
}

int32_t llama_deltamem_state_get(llama_context * ctx, llama_seq_id seq_id, float * dst, size_t n) {
    return guarded([&] {
        const llama_deltamem_context & deltamem = attached(ctx, seq_id);
        check_array(deltamem, dst, n);
        deltamem.check_whole(seq_id);
        ctx->synchronize();
        deltamem.state.get(seq_id, dst);
        return 0;
    });
}

int32_t llama_deltamem_take_result(llama_context * ctx, llama_seq_id seq_id, int32_t i, float * dst, size_t n) {
    return guarded([&]() -> int32_t {
        check_given(ctx, "the context");
        if (dst) {
            if (const int32_t status = llama_deltamem_state_get(ctx, seq_id, dst, n); status != 0) {
                return status;
            }
            if (!std::all_of(dst, dst + n, [](float value) { return std::isfinite(value); })) {
                return LLAMA_DELTAMEM_STATE_NOT_FINITE;
            }
        }
        if (i < 0) {
            return 0;
        }
        const float * logits = llama_get_logits_ith(ctx, i);
        if (!logits) {
            throw std::runtime_error(format("the batch has no logits of token %d", i));
        }
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(&ctx->get_model()));
        return llama_deltamem_is_usable(logits, n_vocab) ? 0 : LLAMA_DELTAMEM_LOGITS_NOT_FINITE;
    });
}

int32_t llama_deltamem_state_set(llama_context * ctx, llama_seq_id seq_id, const float * src, size_t n) {
    return guarded([&] {
        llama_deltamem_context & deltamem = attached(ctx, seq_id);
        check_finite(deltamem, src, n);
        ctx->synchronize();
        deltamem.state.set(seq_id, src);
        deltamem.renew(seq_id);
        return 0;
    });
}

int32_t llama_deltamem_turn_set(llama_context * ctx, llama_seq_id seq_id, const float * src, size_t n) {
    return guarded([&] {
        llama_deltamem_context & deltamem = deferring(ctx, seq_id);
        check_finite(deltamem, src, n);
        ctx->synchronize();
        deltamem.state.set_turn(seq_id, src);
        deltamem.set_begins_turn(seq_id, false);
        return 0;
    });
}

int32_t llama_deltamem_state_reset(llama_context * ctx, llama_seq_id seq_id) {
    return for_sequences(ctx, seq_id, [ctx](llama_deltamem_context & deltamem, llama_seq_id s) {
        ctx->synchronize();
        deltamem.state.reset(s);
        deltamem.renew(s);
    });
}

int32_t llama_deltamem_state_copy(llama_context * ctx, llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    return guarded([&] {
        llama_deltamem_context & deltamem = attached(ctx, seq_id_src);
        attached(ctx, seq_id_dst);
        deltamem.check_whole(seq_id_src);
        if (seq_id_src != seq_id_dst) {
            ctx->synchronize();
            deltamem.state.copy(seq_id_src, seq_id_dst);
            deltamem.renew(seq_id_dst);
            deltamem.set_begins_turn(seq_id_dst, deltamem.begins_turn(seq_id_src));
        }
        return 0;
    });
}

//
// checkpoints
//

int32_t llama_deltamem_set_checkpoints(llama_context * ctx, const int32_t * tokens, int32_t n_tokens) {
    return guarded([&] {
        llama_deltamem_context & deltamem = attached(ctx);
        if (n_tokens < 0 || n_tokens > LLAMA_DELTAMEM_MAX_CHECKPOINTS) {
            throw std::runtime_error(format("%d checkpoints were asked for, a batch keeps 0 to %d", n_tokens,
                                            LLAMA_DELTAMEM_MAX_CHECKPOINTS));
        }
        if (n_tokens > 0) {
            check_given(tokens, "the array of the tokens that leave checkpoints");
        }
        for (int32_t i = 0; i < n_tokens; ++i) {
            if (tokens[i] < 0 || (i > 0 && tokens[i] <= tokens[i - 1])) {
                throw std::runtime_error("the tokens that leave checkpoints must ascend from 0");
            }
        }
        deltamem.set_checkpoints(tokens, n_tokens);
        return 0;
    });
}

int32_t llama_deltamem_checkpoint_get(llama_context * ctx, int32_t i, float * dst, size_t n) {
    return guarded([&] {
        const llama_deltamem_context & deltamem = attached(ctx);
        check_array(deltamem, dst, n);
        const uint32_t slot = deltamem.checkpoint_slot(i);
        ctx->synchronize();
        deltamem.state.get(slot, dst);
        return 0;
    });
}

//
// writes
//

int32_t llama_deltamem_set_write(llama_context * ctx, llama_seq_id seq_id, bool write) {
    return for_sequences(ctx, seq_id,
                         [write](llama_deltamem_context & deltamem, llama_seq_id s) { deltamem.set_write(s, write); });
}

bool llama_deltamem_get_write(const llama_context * ctx, llama_seq_id seq_id) {
    bool write = false;
    guarded([&] {
        write = attached(ctx, seq_id).get_write(seq_id);
        return 0;
    });
    return write;
}

int32_t llama_deltamem_set_replies(llama_context * ctx, llama_seq_id seq_id, bool replies) {
    return guarded([&] {
        llama_deltamem_context & deltamem = attached(ctx, seq_id);
        if (!deltamem.defers_replies()) {
            throw std::runtime_error("this adapter's replies read as its messages do");
        }
        deltamem.set_replies(seq_id, replies);
        return 0;
    });
}

int32_t llama_deltamem_begin_turn(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] {
        deferring(ctx, seq_id).set_begins_turn(seq_id, true);
        return 0;
    });
}

int32_t llama_deltamem_set_segments(llama_context * ctx, const int32_t * segments, const int8_t * ends,
                                    int32_t n_tokens) {
    return guarded([&] {
        llama_deltamem_context & deltamem = attached(ctx);
        if (!deltamem.has_segments()) {
            throw std::runtime_error("this adapter writes per token and takes no segments");
        }
        if (n_tokens < 0) {
            throw std::runtime_error(format("segments were given for %d tokens", n_tokens));
        }
        if (n_tokens > 0) {
            check_given(segments, "the array of segments");
        }
        deltamem.set_segments(segments, ends, n_tokens);
        return 0;
    });
}

int32_t llama_deltamem_abandon_ingest(llama_context * ctx, llama_seq_id seq_id) {
    return for_sequences(ctx, seq_id,
                         [](llama_deltamem_context & deltamem, llama_seq_id s) { deltamem.abandon_ingest(s); });
}
