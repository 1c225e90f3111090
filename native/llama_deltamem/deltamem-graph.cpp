// Builds the memory's part of llama.cpp's graphs: per layer one packed projection, one read, and one node for each
// corrected projection (a product and an addition if the device has no operator, or if Δo is normalised). A device
// without the operator gets the composite instead of the read.

#include "deltamem-graph.h"

#include "deltamem-api.h"
#include "deltamem-composite.h"
#include "deltamem-context.h"
#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

// the plan of the micro-batch, for all layers: a tensor for the operator, and the schedule for composites
class llm_graph_input_deltamem : public llm_graph_input_i {
public:
    explicit llm_graph_input_deltamem(llama_deltamem_context & deltamem) : deltamem(deltamem) {}

    ggml_tensor * plan = nullptr; // I32, see ggml-deltamem.h; null if nothing needs it
    std::unique_ptr<ggml_deltamem_composite_inputs> composite;

    // a whole number of cache lines: docs/explanation/where-time-goes.md, "Alignment"
    static int64_t size(const llama_ubatch & ubatch) {
        return GGML_PAD(ggml_deltamem_n_plan(std::max(1u, ubatch.n_seqs_unq), ubatch.n_tokens),
                        CACHE_LINE / sizeof(int32_t));
    }

    // of the micro-batch that the graph is built for
    static ggml_deltamem_schedule schedule(llama_deltamem_context & deltamem, const llama_ubatch & ubatch) {
        std::vector<int32_t> plan;
        deltamem.preview_plan(ubatch, plan);
        return ggml_deltamem_make_schedule(params_of(deltamem, ubatch), plan.data(), ubatch.n_tokens);
    }

    static ggml_deltamem_params params_of(const llama_deltamem_context & deltamem, const llama_ubatch & ubatch) {
        ggml_deltamem_params params = deltamem.weights->params;
        params.n_seqs               = std::max(1u, ubatch.n_seqs_unq);
        return params;
    }

    void set_input(const llama_ubatch * ubatch) override {
        deltamem.make_plan(*ubatch, values);
        if (composite) {
            ggml_deltamem_set_composite_inputs(
                    *composite,
                    ggml_deltamem_make_schedule(params_of(deltamem, *ubatch), values.data(), ubatch->n_tokens));
        }
        if (plan) {
            values.resize(plan->ne[0]);
            ggml_backend_tensor_set(plan, values.data(), 0, ggml_nbytes(plan));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        return params.deltamem == &deltamem && (!plan || size(params.ubatch) == plan->ne[0]) &&
               (!composite || composite->shape.has_shape_of(schedule(deltamem, params.ubatch)));
    }

private:
    static constexpr size_t CACHE_LINE = 64; // bytes

    llama_deltamem_context & deltamem;
    std::vector<int32_t>     values;
};

struct llama_deltamem_graph {
    llama_deltamem_context & deltamem;

    ggml_context *       ctx0;
    ggml_cgraph *        gf;
    ggml_backend_sched_t sched;
    llm_graph_result *   res;

    const llama_ubatch & ubatch;

    llm_graph_input_deltamem * input = nullptr;
    std::vector<ggml_tensor *> reads; // per memory layer, F32 [H*r, n_tokens]

    llama_deltamem_graph(const llm_graph_params & params) :
        deltamem(*params.deltamem),
        ctx0(params.res->get_ctx()),
        gf(params.res->get_gf()),
        sched(params.sched),
        res(params.res),
        ubatch(params.ubatch),
        reads(deltamem.weights->layers.size(), nullptr) {
        deltamem.covered.assign(reads.size(), {});
        deltamem.n_graphs++;
    }

    // Remembers why a layer cannot have a memory; such a layer gets no nodes, and attaching refuses the adapter.
    bool expect(int i, bool ok, const char * problem) {
        std::string & known = deltamem.covered[i].problem;
        if (!ok && known.empty()) {
            known = problem;
        }
        return known.empty();
    }

    llm_graph_input_deltamem & get_input() {
        if (!input) {
            auto made = std::make_unique<llm_graph_input_deltamem>(deltamem);
            input     = made.get();
            res->add_input(std::move(made));
        }
        return *input;
    }

    ggml_tensor * get_plan() {
        ggml_tensor *& plan = get_input().plan;
        if (!plan) {
            plan = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, llm_graph_input_deltamem::size(ubatch));
            ggml_set_input(plan);
            ggml_set_name(plan, "deltamem_plan");
        }
        return plan;
    }

    const ggml_deltamem_composite_inputs & get_composite_inputs() {
        auto & composite = get_input().composite;
        if (!composite) {
            composite = std::make_unique<ggml_deltamem_composite_inputs>(
                    ggml_deltamem_new_composite_inputs(ctx0, llm_graph_input_deltamem::schedule(deltamem, ubatch)));
        }
        return *composite;
    }

    // The name contains the type of the weights. CUDA launches a captured graph again if names, shapes and addresses
    // are equal, and those of two adapters may differ in nothing else.
    static void name(ggml_tensor * node, const char * what, ggml_type type, int il) {
        ggml_format_name(node, "deltamem_%s-%d (%s)", what, il, ggml_type_name(type));
    }

    // Has the scheduler compute a node on `device`: the operator updates the state in place, so it must run where the
    // state is. False if the context does not use that device.
    bool pin(ggml_tensor * node, ggml_backend_dev_t device) {
        for (int b = 0; b < ggml_backend_sched_get_n_backends(sched); ++b) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(sched, b);
            if (ggml_backend_get_device(backend) == device) {
                ggml_backend_sched_set_tensor_backend(sched, node, backend);
                return true;
            }
        }
        return false;
    }

    void read(ggml_tensor * cur, int i) {
        const auto & lw = deltamem.weights->layers[i];

        if (!expect(i, !reads[i], "it runs more than once per token") ||
            !expect(i,
                    cur->ne[0] == lw.in->ne[0] && ggml_nrows(cur) == ubatch.n_tokens && cur->ne[1] == ubatch.n_tokens,
                    "its attention input is not one vector per token")) {
            return;
        }

        const ggml_deltamem_params params = llm_graph_input_deltamem::params_of(deltamem, ubatch);

        ggml_tensor * proj = ggml_deltamem_mul_mat(ctx0, lw.in, cur);
        name(proj, "in", lw.in->type, lw.il);

        ggml_tensor * written = nullptr;
        if (lw.composite_width) {
            const auto composite = ggml_deltamem_composite(ctx0, proj, lw.gate_bias, deltamem.state.tensor(i),
                                                           get_composite_inputs(), params, lw.composite_width);
            reads[i]             = composite.reads;
            written              = composite.written;
        } else {
            reads[i] = ggml_deltamem(ctx0, proj, lw.gate_bias, deltamem.state.tensor(i), get_plan(), params);
        }
        ggml_format_name(reads[i], "deltamem_read-%d", lw.il);

        if (!expect(i, pin(written ? written : reads[i], lw.device),
                    "the context does not compute on the device of its memory")) {
            return;
        }
        if (written) {
            ggml_build_forward_expand(gf, reads[i]);
            ggml_build_forward_expand(gf, written);
        } else if (!lw.q && !lw.qkv) {
            ggml_build_forward_expand(gf, reads[i]); // it writes the state, even if nothing depends on its read
        } // else the graph places it right before the correction, and the CPU may fuse the two

        deltamem.covered[i].read = true;
    }

    ggml_tensor * correct(llama_deltamem_target target, ggml_tensor * out, int i) {
        const auto & lw = deltamem.weights->layers[i];

        llama_deltamem_correction correction;
        switch (target) {
            case LLAMA_DELTAMEM_Q:   correction = lw.q; break;
            case LLAMA_DELTAMEM_K:   correction = lw.k; break;
            case LLAMA_DELTAMEM_V:   correction = lw.v; break;
            case LLAMA_DELTAMEM_QKV: correction = lw.qkv; break;
            case LLAMA_DELTAMEM_O:   correction = lw.o; break;
        }
        if (!correction) {
            return out;
        }
        if (!reads[i]) {
            return out; // read() has remembered why, so attaching refuses the adapter
        }
        if (!expect(i,
                    out->ne[0] == correction.n_out && out->ne[1] == ubatch.n_tokens &&
                            ggml_nrows(out) == ubatch.n_tokens,
                    "a projection's output does not have one row per token")) {
            ggml_build_forward_expand(gf, reads[i]);
            return out;
        }
        deltamem.covered[i].targets |= 1u << target;

        if (correction.one_node) {
            ggml_tensor * corrected = ggml_deltamem_correct(ctx0, out, correction.weight, reads[i]);
            name(corrected, "corrected", correction.weight->type, lw.il);
            return corrected;
        }

        ggml_tensor * delta = ggml_deltamem_mul_mat(ctx0, correction.weight, reads[i]);
        if (target == LLAMA_DELTAMEM_O && lw.o_norm) {
            delta = ggml_mul(ctx0, ggml_rms_norm(ctx0, delta, deltamem.weights->o_norm_eps), lw.o_norm);
        }
        name(delta, "delta", correction.weight->type, lw.il);
        return ggml_add(ctx0, out, delta);
    }
};

llama_deltamem_graph_ptr llama_deltamem_graph_init(const llm_graph_params & params) {
    return params.deltamem ? std::make_shared<llama_deltamem_graph>(params) : nullptr;
}

void llama_deltamem_read(const llama_deltamem_graph_ptr & graph, ggml_tensor * cur, int il) {
    const int i = graph ? graph->deltamem.find_layer(il) : -1;
    if (i >= 0) {
        graph->read(cur, i);
    }
}

ggml_tensor * llama_deltamem_correct(const llama_deltamem_graph_ptr & graph, llama_deltamem_target target,
                                     ggml_tensor * out, int il) {
    const int i = graph ? graph->deltamem.find_layer(il) : -1;
    return i >= 0 ? graph->correct(target, out, i) : out;
}

template <typename batch_type>
bool llama_deltamem_begin_batch(const llama_deltamem_context_ptr & deltamem, const batch_type & batch) {
    if (!deltamem) {
        return true;
    }
    try {
        std::vector<llama_deltamem_token> & tokens = deltamem->batch;
        tokens.clear();
        if constexpr (std::is_same_v<batch_type, llama_batch>) {
            for (int32_t i = 0; i < batch.n_tokens; ++i) {
                const int32_t n = batch.n_seq_id ? batch.n_seq_id[i] : 1;
                tokens.push_back({ (size_t) n, n > 0 && batch.seq_id ? batch.seq_id[i][0] : 0 });
            }
        } else { // llama_batch_ext of later releases
            for (const auto & token : batch.tokens) {
                tokens.push_back({ token.seq_ids.size(), token.seq_ids.empty() ? -1 : *token.seq_ids.begin() });
            }
        }
        deltamem->begin_batch();
        return true;
    } catch (const std::exception & err) {
        llama_deltamem_set_error(err.what());
        return false;
    }
}

void llama_deltamem_end_batch(const llama_deltamem_context_ptr & deltamem) {
    if (deltamem) {
        deltamem->end_batch();
    }
}

template <typename batch_type, typename... others>
batch_type batch_type_of(bool (llama_batch_allocr::*init)(const batch_type &, others...));

template bool llama_deltamem_begin_batch(const llama_deltamem_context_ptr &,
                                         const decltype(batch_type_of(&llama_batch_allocr::init)) &);

uint32_t llama_deltamem_n_nodes(const llama_deltamem_context_ptr & deltamem) {
    // projection, operator or composite, then product and addition for each of q, k, v, o, and the norm of o
    uint32_t n = 0;
    for (size_t i = 0; deltamem && i < deltamem->weights->layers.size(); ++i) {
        n += 2 + 4 * 2 + 2;
        n += deltamem->weights->layers[i].composite_width ? GGML_DELTAMEM_COMPOSITE_NODES : 0;
    }
    return n;
}
