// The C API from loading to freeing, everything twice in one process, and its answers to bad input. Meant for valgrind and
// the sanitizers, too: it frees all it makes.
//
//     test-lifecycle BASE.gguf ADAPTER.gguf [OTHER.gguf | GRANULARITY COPY.gguf]
//
// OTHER is an adapter of another architecture. GRANULARITY, token_deferred or reply_deferred: writes COPY, the same adapter
// with that, and tests it. A context with three sequences serves.

#include "gguf.h"
#include "llama-deltamem.h"
#include "decoding.h"
#include "testing.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

static constexpr int N_PROMPT   = 24;
static constexpr int N_GENERATE = 16;
static constexpr int N_SEQ      = 3;

static std::string logged_errors;

static void keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        logged_errors += text;
    }
}

// a call has failed: it must have said why, and logged it
static void expect_reason(bool failed, const char * what) {
    const std::string reason = llama_deltamem_last_error();
    check(failed, "%s: accepted", what);
    check(!reason.empty(), "%s: no reason given", what);
    check(logged_errors.find(reason) != std::string::npos, "%s: the reason was not logged: %s", what, reason.c_str());
    printf("  %-44s %s\n", what, reason.c_str());
    logged_errors.clear();
}

static std::vector<llama_token> prompt(int n_vocab, int seed) {
    std::vector<llama_token> tokens;
    for (int i = 0; i < N_PROMPT; ++i) {
        tokens.push_back((37 * i + 11 * seed + 5) % n_vocab);
    }
    return tokens;
}

static std::vector<llama_token> generate(llama_context * ctx, int n_vocab, llama_seq_id seq_id) {
    llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
    check(decode(ctx, prompt(n_vocab, 1), 0, seq_id), "the prompt does not decode");

    std::vector<llama_token> generated;
    int64_t                  n_graphs = 0;
    for (int i = 0; i < N_GENERATE; ++i) {
        const float * logits = llama_get_logits_ith(ctx, -1);
        llama_token   best   = 0;
        bool          finite = true;
        for (int token = 0; token < n_vocab; ++token) {
            finite = finite && std::isfinite(logits[token]);
            best   = logits[token] > logits[best] ? token : best;
        }
        check(finite, "token %d: logits are not finite", i);
        generated.push_back(best);
        check(decode(ctx, { best }, N_PROMPT + i, seq_id), "token %d does not decode", i);

        if (i == 4) {
            n_graphs = llama_deltamem_n_graphs(ctx);
        }
    }
    check(llama_deltamem_n_graphs(ctx) == n_graphs, "graphs are not reused while generating");
    return generated;
}

static std::vector<float> get_state(llama_context * ctx, llama_seq_id seq_id) {
    std::vector<float> state(llama_deltamem_state_size(ctx), guard_value());
    check(llama_deltamem_state_get(ctx, seq_id, state.data(), state.size()) == 0, "state_get fails for sequence %d",
          seq_id);
    return state;
}

static bool is_empty(const std::vector<float> & state) {
    for (float x : state) {
        if (x != 0.0f) {
            return false;
        }
    }
    return !state.empty();
}

static bool is_finite(const std::vector<float> & state) {
    for (float x : state) {
        if (!std::isfinite(x)) {
            return false;
        }
    }
    return true;
}

static llama_context * make_context(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256 * N_SEQ;
    params.n_batch              = 64;
    params.n_ubatch             = 16; // the prompt takes two
    params.n_seq_max            = N_SEQ;
    params.n_threads            = 2;
    params.n_threads_batch      = 2;
    return llama_init_from_model(model, params);
}

// What an assertion of llama.cpp would refuse is refused by an error.
static void test_refused_contexts(llama_model * model) {
    const auto made = [model](void (*change)(llama_context_params &)) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = 256;
        params.n_threads            = 1;
        change(params);
        logged_errors.clear();
        llama_context * ctx = llama_init_from_model(model, params);
        check((ctx == nullptr) == !logged_errors.empty(), "a context is refused without a reason, or made with one");
        llama_free(ctx);
        return ctx != nullptr;
    };
    using type = llama_context_params;

    check(!made([](type & p) { p.n_batch = 2, p.n_seq_max = 3; }), "a batch of fewer tokens than sequences");
    check(made([](type & p) { p.n_batch = 3, p.n_seq_max = 3; }), "a batch of as many tokens as sequences is refused");
    check(!made([](type & p) { p.n_batch = 0; }), "a batch of no tokens");
    check(!made([](type & p) { p.n_outputs_max = 2, p.n_seq_max = 3; }), "fewer outputs than sequences");
    check(!made([](type & p) { p.flash_attn_type = (llama_flash_attn_type) 2; }), "an unknown type of flash attention");
    check(!made([](type & p) { p.type_k = (ggml_type) 1000; }), "an unknown type of keys");

    // the mean of what a micro-batch holds of each sequence
    check(!made([](type & p) { p.embeddings = true, p.pooling_type = LLAMA_POOLING_TYPE_MEAN, p.n_seq_max = 3; }),
          "means of micro-batches that are no multiple of the sequences");
    check(made([](type & p) { p.embeddings = true, p.pooling_type = LLAMA_POOLING_TYPE_MEAN, p.n_seq_max = 2; }),
          "means of micro-batches that are a multiple of the sequences are refused");
    check(made([](type & p) { p.embeddings = true, p.pooling_type = LLAMA_POOLING_TYPE_LAST, p.n_seq_max = 3; }),
          "last tokens of micro-batches that are no multiple of the sequences are refused");
    logged_errors.clear();
}

static void test_adapter(const llama_deltamem_adapter * adapter, int n_model_layer) {
    const int32_t n_layer = llama_deltamem_n_layer(adapter);
    check(n_layer >= 1 && n_layer <= n_model_layer, "the adapter has %d layers", n_layer);
    for (int32_t i = 0; i < n_layer; ++i) {
        const int32_t layer = llama_deltamem_layer(adapter, i);
        check(layer >= 0 && layer < n_model_layer && (i == 0 || layer > llama_deltamem_layer(adapter, i - 1)),
              "memory %d is in layer %d", i, layer);
    }
    check(llama_deltamem_layer(adapter, -1) == -1 && llama_deltamem_layer(adapter, n_layer) == -1,
          "there are more layers");
    check(llama_deltamem_rank(adapter) >= 1 && llama_deltamem_n_head(adapter) >= 1,
          "the adapter has no rank or no heads");
    check(llama_deltamem_n_bytes(adapter) > 0, "the adapter's weights take no memory");

    char          value[64], cut[4];
    const int32_t length = llama_deltamem_meta_val_str(adapter, "adapter.type", value, sizeof(value));
    check(length == 8 && strcmp(value, "deltamem") == 0, "adapter.type is %s", value);
    check(llama_deltamem_meta_val_str(adapter, "adapter.type", cut, sizeof(cut)) == 8 && strcmp(cut, "del") == 0,
          "a long value is not cut");
    check(llama_deltamem_meta_val_str(adapter, "no.such.key", value, sizeof(value)) == -1 && value[0] == '\0',
          "a missing key has a value");
}

static void test_states(llama_context * ctx, const llama_deltamem_adapter * adapter, int n_vocab) {
    const std::vector<float> state = get_state(ctx, 0);
    check(is_finite(state) && !is_empty(state), "nothing was written while generating");
    check(is_empty(get_state(ctx, 1)), "a sequence without tokens has a state");

    check(llama_deltamem_state_set(ctx, 1, state.data(), state.size()) == 0, "state_set fails");
    check(same_bits(get_state(ctx, 1), state), "state_set and state_get differ");
    check(llama_deltamem_state_copy(ctx, 1, 2) == 0, "state_copy fails");
    check(same_bits(get_state(ctx, 2), state), "the copy differs");
    check(llama_deltamem_state_reset(ctx, 1) == 0, "state_reset fails");
    check(is_empty(get_state(ctx, 1)), "state_reset leaves something");
    check(same_bits(get_state(ctx, 0), state) && same_bits(get_state(ctx, 2), state),
          "state_reset of one touches others");

    // reading without writing; text and memory are independent
    check(llama_deltamem_get_write(ctx, 0), "writes are off by default");
    check(llama_deltamem_set_write(ctx, 0, false) == 0 && !llama_deltamem_get_write(ctx, 0), "writes do not go off");
    check(llama_deltamem_get_write(ctx, 1), "writes go off for another sequence");
    llama_memory_clear(llama_get_memory(ctx), true);
    check(decode(ctx, prompt(n_vocab, 2), 0, 0), "reading does not decode");
    check(same_bits(get_state(ctx, 0), state), "reading or clearing the text changes the state");
    check(llama_deltamem_set_write(ctx, -1, true) == 0 && llama_deltamem_get_write(ctx, 0), "writes do not go on");

    // the same step from the same state gives the same state
    if (llama_deltamem_write_granularity(adapter) >= LLAMA_DELTAMEM_TOKEN_DEFERRED) {
        check(llama_deltamem_begin_turn(ctx, 0) == 0, "begin_turn fails"); // as to copy a state over does
    }
    llama_memory_clear(llama_get_memory(ctx), true);
    check(decode(ctx, prompt(n_vocab, 2), 0, 0), "writing does not decode");
    const std::vector<float> next = get_state(ctx, 0);
    check(is_finite(next) && !same_bits(next, state), "writing does not change the state");
    check(llama_deltamem_state_copy(ctx, 2, 0) == 0, "state_copy fails");
    llama_memory_clear(llama_get_memory(ctx), true);
    check(decode(ctx, prompt(n_vocab, 2), 0, 0) && same_bits(get_state(ctx, 0), next),
          "going back does not repeat the step");

    check(llama_deltamem_state_reset(ctx, -1) == 0, "state_reset of all fails");
    for (llama_seq_id seq_id = 0; seq_id < N_SEQ; ++seq_id) {
        check(is_empty(get_state(ctx, seq_id)), "state_reset of all leaves sequence %d", seq_id);
    }
}

static bool writes_by_token(const llama_deltamem_adapter * adapter) {
    const llama_deltamem_granularity granularity = llama_deltamem_write_granularity(adapter);
    return granularity != LLAMA_DELTAMEM_MESSAGE_MEAN && granularity != LLAMA_DELTAMEM_SENTENCE_MEAN;
}

// the logits after tokens of a text that begins
static std::vector<float> logits_after(llama_context * ctx, int n_vocab, const std::vector<llama_token> & tokens,
                                       llama_seq_id seq_id) {
    llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
    check(decode(ctx, tokens, 0, seq_id), "tokens do not decode");
    const float * logits = llama_get_logits_ith(ctx, -1);
    return { logits, logits + n_vocab };
}

// Which state a text reads, by its logits. Batches are of the same shape, so that the same state gives the same bits.
static void test_turns(llama_context * ctx, const llama_deltamem_adapter * adapter, int n_vocab) {
    std::vector<float>               state       = get_state(ctx, 0);
    const llama_deltamem_granularity granularity = llama_deltamem_write_granularity(adapter);
    if (granularity != LLAMA_DELTAMEM_REPLY_DEFERRED) {
        expect_reason(llama_deltamem_set_replies(ctx, 0, true) < 0, "replies of an adapter that has none");
    } else {
        check(llama_deltamem_set_replies(ctx, N_SEQ, true) < 0, "replies of no sequence");
        logged_errors.clear();
        for (llama_seq_id seq_id = 0; seq_id < N_SEQ; ++seq_id) {
            check(llama_deltamem_set_replies(ctx, seq_id, true) == 0, "set_replies fails");
        }
    }
    if (granularity != LLAMA_DELTAMEM_TOKEN_DEFERRED && granularity != LLAMA_DELTAMEM_REPLY_DEFERRED) {
        expect_reason(llama_deltamem_begin_turn(ctx, 0) < 0, "a turn of an adapter that has none");
        expect_reason(llama_deltamem_turn_set(ctx, 0, state.data(), state.size()) < 0, "the same, to be set");
        return;
    }
    const std::vector<llama_token> text = prompt(n_vocab, 5), other = prompt(n_vocab, 6);

    check(llama_deltamem_state_reset(ctx, -1) == 0, "state_reset fails");
    const std::vector<float> empty = logits_after(ctx, n_vocab, text, 0);
    check(!is_empty(get_state(ctx, 0)), "a turn writes nothing");
    check(same_bits(logits_after(ctx, n_vocab, text, 0), empty), "a turn reads what it wrote");

    // what the turns before it wrote is read by the next one, and by no other sequence
    state = get_state(ctx, 0);
    check(llama_deltamem_begin_turn(ctx, 0) == 0, "begin_turn fails");
    const std::vector<float> told = logits_after(ctx, n_vocab, text, 0);
    check(!same_bits(told, empty), "a turn does not read the turn before it");
    check(same_bits(logits_after(ctx, n_vocab, text, 0), told), "it begins twice");
    check(same_bits(logits_after(ctx, n_vocab, text, 1), empty), "a turn of another sequence begins");

    // a copy reads what its source reads; a state that is set is read at once, as is an empty one
    check(llama_deltamem_state_copy(ctx, 0, 2) == 0, "state_copy fails");
    check(same_bits(logits_after(ctx, n_vocab, text, 2), told), "a copy reads something else");
    check(llama_deltamem_state_set(ctx, 2, state.data(), state.size()) == 0, "state_set fails");
    check(same_bits(logits_after(ctx, n_vocab, text, 2), told), "a state that was set is not read");
    check(llama_deltamem_state_reset(ctx, 2) == 0, "state_reset fails");
    check(same_bits(logits_after(ctx, n_vocab, text, 2), empty), "an empty state is not read");

    // what a turn reads can be set alone
    logits_after(ctx, n_vocab, other, 2);
    const std::vector<float> after = get_state(ctx, 2);
    check(llama_deltamem_begin_turn(ctx, 2) == 0, "begin_turn fails");
    check(llama_deltamem_turn_set(ctx, 2, state.data(), state.size()) == 0, "turn_set fails");
    check(same_bits(get_state(ctx, 2), after), "turn_set changes the state");
    check(same_bits(logits_after(ctx, n_vocab, text, 2), told), "what a turn reads is not what was set");

    state[0] = NAN;
    expect_reason(llama_deltamem_turn_set(ctx, 0, state.data(), state.size()) < 0, "a turn that reads NaN");
    expect_reason(llama_deltamem_turn_set(ctx, 0, nullptr, state.size()) < 0, "a turn that reads nothing");
    expect_reason(llama_deltamem_turn_set(ctx, 0, state.data(), state.size() - 1) < 0, "a turn that reads too little");
    expect_reason(llama_deltamem_begin_turn(ctx, N_SEQ) < 0, "a turn of no sequence");

    // a message reads the present, its reply what the turn reads
    if (granularity == LLAMA_DELTAMEM_REPLY_DEFERRED) {
        check(llama_deltamem_state_reset(ctx, 1) == 0, "state_reset fails");
        check(same_bits(logits_after(ctx, n_vocab, text, 1), empty), "a reply reads itself");
        check(llama_deltamem_set_replies(ctx, 1, false) == 0, "set_replies fails");
        check(!same_bits(logits_after(ctx, n_vocab, text, 1), empty), "a message does not read the present");
        for (llama_seq_id seq_id = 0; seq_id < N_SEQ; ++seq_id) {
            check(llama_deltamem_set_replies(ctx, seq_id, false) == 0, "set_replies fails");
        }
    }
    llama_memory_clear(llama_get_memory(ctx), true);
}

static void test_segments(llama_context * ctx, const llama_deltamem_adapter * adapter, int n_vocab) {
    std::vector<int32_t> segments(N_PROMPT);
    for (int i = 0; i < N_PROMPT; ++i) {
        segments[i] = i % 5 == 0 ? -1 : i / 8;
    }
    if (writes_by_token(adapter)) {
        expect_reason(llama_deltamem_set_segments(ctx, segments.data(), nullptr, N_PROMPT) < 0,
                      "segments for a token adapter");
        return;
    }

    // one ingest over one batch, and the same over two
    std::vector<float> whole;
    for (int n_first : { N_PROMPT, N_PROMPT / 3 }) {
        llama_memory_clear(llama_get_memory(ctx), true);
        check(llama_deltamem_state_reset(ctx, -1) == 0, "state_reset fails");

        const std::vector<llama_token> tokens = prompt(n_vocab, 3);
        std::vector<int8_t>            ends(N_PROMPT, 0);
        ends.back() = 1;
        check(llama_deltamem_set_segments(ctx, segments.data(), ends.data(), n_first) == 0, "set_segments fails");
        check(decode(ctx, { tokens.begin(), tokens.begin() + n_first }, 0, 0), "segments do not decode");
        if (n_first < N_PROMPT) {
            check(is_empty(get_state(ctx, 0)), "an ingest writes before it ends");
            check(llama_deltamem_set_segments(ctx, &segments[n_first], &ends[n_first], N_PROMPT - n_first) == 0,
                  "set_segments fails");
            check(decode(ctx, { tokens.begin() + n_first, tokens.end() }, n_first, 0), "segments do not decode");
        }
        const std::vector<float> state = get_state(ctx, 0);
        check(is_finite(state) && !is_empty(state), "segments write nothing");
        if (whole.empty()) {
            whole = state;
        } else {
            nmse e;
            for (size_t i = 0; i < state.size(); ++i) {
                e.add(state[i], whole[i]);
            }
            check(e.value() <= 1e-10, "an ingest over two batches differs: NMSE %g",
                  e.value()); // other matrix products: 1e-5 each
        }
    }

    // an abandoned ingest leaves no trace
    const std::vector<int8_t> never(N_PROMPT, 0);
    llama_memory_clear(llama_get_memory(ctx), true);
    check(llama_deltamem_set_segments(ctx, segments.data(), never.data(), N_PROMPT) == 0, "set_segments fails");
    check(decode(ctx, prompt(n_vocab, 4), 0, 0), "segments do not decode");
    check(llama_deltamem_abandon_ingest(ctx, 0) == 0, "abandon_ingest fails");
    check(same_bits(get_state(ctx, 0), whole), "an abandoned ingest changes the state");
}

// ends a computation after so many nodes; -1: never
struct node_limit {
    int  n_left = -1;
    int  n_seen = 0;
    bool over() {
        n_seen++;
        return n_left >= 0 && n_left-- == 0;
    }
};

static bool is_over(void * limit) {
    return ((node_limit *) limit)->over();
}

// A decode that ends in the middle: what it left is no state, and no checkpoint, until somebody says what the state is.
static void test_failed_decode(llama_context * ctx, int n_vocab) {
    const std::vector<llama_token> tokens  = prompt(n_vocab, 5);
    const int32_t                  marks[] = { 3, N_PROMPT - 1 };

    const auto start = [&](const std::vector<float> & state) {
        llama_memory_clear(llama_get_memory(ctx), true);
        check(llama_deltamem_state_set(ctx, 0, state.data(), state.size()) == 0, "state_set fails");
        check(llama_deltamem_set_checkpoints(ctx, marks, 2) == 0, "set_checkpoints fails");
    };

    check(llama_deltamem_state_reset(ctx, -1) == 0, "state_reset fails");
    check(decode(ctx, prompt(n_vocab, 6), 0, 1), "another sequence does not decode");
    const std::vector<float> before(llama_deltamem_state_size(ctx), 0.01f), other = get_state(ctx, 1);
    std::vector<float>       state = before;
    const size_t             n     = state.size();

    // as it should be, and how many nodes that takes
    node_limit limit;
    llama_set_abort_callback(ctx, is_over, &limit);
    start(before);
    check(decode(ctx, tokens, 0, 0), "the prompt does not decode");
    const std::vector<float> after   = get_state(ctx, 0);
    const int                n_nodes = limit.n_seen;
    check(n_nodes > 20, "the computation had %d nodes", n_nodes);
    check(llama_deltamem_checkpoint_get(ctx, 1, state.data(), n) == 0 && same_bits(state, after),
          "the last checkpoint is not the state");

    // ends in the first micro-batch, between layers, and in the second one
    for (int n_left : { n_nodes / 8, n_nodes / 4, 3 * n_nodes / 4, n_nodes - 1 }) {
        start(before);
        limit.n_left = n_left;
        check(!decode(ctx, tokens, 0, 0), "a decode that was aborted after %d nodes succeeds", n_left);
        limit.n_left = -1;
        logged_errors.clear();

        expect_reason(llama_deltamem_checkpoint_get(ctx, 0, state.data(), n) < 0, "checkpoint_get after a failure");
        expect_reason(llama_deltamem_state_get(ctx, 0, state.data(), n) < 0, "state_get after a failure");
        expect_reason(llama_deltamem_state_copy(ctx, 0, 2) < 0, "state_copy after a failure");
        expect_reason(!decode(ctx, tokens, N_PROMPT, 0), "decoding on after a failure");
        check(same_bits(get_state(ctx, 1), other), "a failure touches another sequence");
        expect_reason(llama_deltamem_checkpoint_get(ctx, 0, state.data(), n) < 0, "checkpoint_get after a refusal");

        // other sequences go on, and so does this one from a state that is known
        check(llama_deltamem_set_write(ctx, 1, false) == 0 && decode(ctx, { 1 }, N_PROMPT, 1),
              "another sequence does not decode after a failure");
        check(llama_deltamem_set_write(ctx, 1, true) == 0, "set_write fails");
        expect_reason(llama_deltamem_state_get(ctx, 0, state.data(), n) < 0, "state_get, others decoded since");
        start(before);
        check(decode(ctx, tokens, 0, 0) && same_bits(get_state(ctx, 0), after),
              "from the state before, it comes to another one");
        check(llama_deltamem_checkpoint_get(ctx, 1, state.data(), n) == 0 && same_bits(state, after),
              "no checkpoint after a failure");
        check(decode(ctx, prompt(n_vocab, 6), 0, 1), "another sequence does not decode");
        check(llama_deltamem_state_set(ctx, 1, other.data(), n) == 0, "state_set fails");
        llama_memory_clear(llama_get_memory(ctx), true);
    }

    // a state copied over, or emptied, is whole too
    for (const bool copied : { true, false }) {
        start(before);
        limit.n_left = n_nodes / 2;
        check(!decode(ctx, tokens, 0, 0), "an aborted decode succeeds");
        limit.n_left = -1;
        check((copied ? llama_deltamem_state_copy(ctx, 1, 0) : llama_deltamem_state_reset(ctx, 0)) == 0,
              "no state after a failure");
        check(same_bits(get_state(ctx, 0), copied ? other : std::vector<float>(n, 0.0f)), "another state");
    }

    // what only reads changes nothing, however it ends
    start(before);
    check(llama_deltamem_set_write(ctx, 0, false) == 0, "set_write fails");
    limit.n_left = n_nodes / 2;
    check(!decode(ctx, tokens, 0, 0), "an aborted decode succeeds");
    limit.n_left = -1;
    check(same_bits(get_state(ctx, 0), before), "a failed decode without writes changes the state");
    check(llama_deltamem_set_write(ctx, 0, true) == 0, "set_write fails");

    // a decode that is refused before it begins touches no state, and leaves no checkpoints of an earlier one
    start(before);
    check(decode(ctx, tokens, 0, 0), "the prompt does not decode");
    check(llama_deltamem_set_checkpoints(ctx, marks, 2) == 0, "set_checkpoints fails");
    logged_errors.clear();
    expect_reason(!decode(ctx, { 1 }, N_PROMPT, 0), "a checkpoint after a token that the batch has not");
    expect_reason(llama_deltamem_checkpoint_get(ctx, 0, state.data(), n) < 0, "checkpoint_get after a refusal");
    check(same_bits(get_state(ctx, 0), after), "a refused decode changes the state");

    llama_set_abort_callback(ctx, nullptr, nullptr);
    llama_memory_clear(llama_get_memory(ctx), true);
    check(llama_deltamem_state_reset(ctx, -1) == 0, "state_reset fails");
}

// An ingest that fails in the middle has written nothing; what it had gathered is to be dropped.
static void test_failed_ingest(llama_context * ctx, const llama_deltamem_adapter * adapter, int n_vocab) {
    if (writes_by_token(adapter)) {
        return;
    }
    const std::vector<llama_token> tokens = prompt(n_vocab, 7);
    const std::vector<int32_t>     segments(N_PROMPT, 0);
    std::vector<int8_t>            ends(N_PROMPT, 0);

    const std::vector<float> before(llama_deltamem_state_size(ctx), 0.01f);
    std::vector<float>       state = before;
    check(llama_deltamem_state_set(ctx, 0, before.data(), before.size()) == 0, "state_set fails");

    node_limit limit;
    llama_set_abort_callback(ctx, is_over, &limit);
    for (const bool whole : { false, true }) {
        ends.back() = whole;
        llama_memory_clear(llama_get_memory(ctx), true);
        check(llama_deltamem_set_segments(ctx, segments.data(), ends.data(), N_PROMPT) == 0, "set_segments fails");
        limit.n_seen = 0;
        limit.n_left = 0; // in the first of two micro-batches: none has ended the ingest
        check(!decode(ctx, tokens, 0, 0), "an aborted ingest succeeds");
        limit.n_left = -1;
        logged_errors.clear();
        check(same_bits(get_state(ctx, 0), before), "an ingest that failed has written");
        check(llama_deltamem_set_segments(ctx, segments.data(), ends.data(), N_PROMPT) == 0, "set_segments fails");
        expect_reason(!decode(ctx, tokens, 0, 0), "an ingest that goes on after a failure");
        check(llama_deltamem_abandon_ingest(ctx, 0) == 0, "abandon_ingest fails");
        check(same_bits(get_state(ctx, 0), before), "an abandoned ingest has written");
    }

    // what writes nothing, because its sequence only reads or because it has no segments, leaves the state, however it ends
    for (const bool writes : { false, true }) {
        const std::vector<int32_t> none(N_PROMPT, -1);
        check(llama_deltamem_set_write(ctx, 0, writes) == 0, "set_write fails");
        limit.n_seen = 0;
        for (const bool aborted : { false, true }) {
            llama_memory_clear(llama_get_memory(ctx), true);
            check(llama_deltamem_set_segments(ctx, (writes ? none : segments).data(), ends.data(), N_PROMPT) == 0,
                  "set_segments fails");
            limit.n_left = aborted ? limit.n_seen - 1 : -1; // the last node, after the ingest has ended in each layer
            check(decode(ctx, tokens, 0, 0) != aborted, "an aborted ingest succeeds, or another one fails");
            limit.n_left = -1;
            check(same_bits(get_state(ctx, 0), before), "an ingest without writes changes the state");
        }
        check(llama_deltamem_abandon_ingest(ctx, 0) == 0, "abandon_ingest fails");
    }
    llama_set_abort_callback(ctx, nullptr, nullptr);

    llama_memory_clear(llama_get_memory(ctx), true);
    check(llama_deltamem_set_segments(ctx, segments.data(), ends.data(), N_PROMPT) == 0, "set_segments fails");
    check(decode(ctx, tokens, 0, 0), "an ingest after an abandoned one does not decode");
    llama_memory_clear(llama_get_memory(ctx), true);
    check(llama_deltamem_state_reset(ctx, -1) == 0, "state_reset fails");
}

static void test_bad_calls(llama_context * ctx, llama_deltamem_adapter * adapter) {
    std::vector<float>       state  = get_state(ctx, 0);
    const std::vector<float> before = state;
    const size_t             n      = state.size();
    logged_errors.clear();

    expect_reason(llama_deltamem_state_get(ctx, 0, state.data(), n - 1) < 0, "state_get, a value less");
    expect_reason(llama_deltamem_state_set(ctx, 0, state.data(), n + 1) < 0, "state_set, a value more");
    expect_reason(llama_deltamem_state_get(ctx, N_SEQ, state.data(), n) < 0, "state_get, sequence 3 of 3");
    expect_reason(llama_deltamem_state_get(ctx, -1, state.data(), n) < 0, "state_get, sequence -1");
    expect_reason(llama_deltamem_state_set(ctx, 1000, state.data(), n) < 0, "state_set, sequence 1000");
    expect_reason(llama_deltamem_state_reset(ctx, N_SEQ) < 0, "state_reset, sequence 3 of 3");
    expect_reason(llama_deltamem_state_copy(ctx, 0, N_SEQ) < 0, "state_copy to sequence 3 of 3");
    expect_reason(llama_deltamem_state_copy(ctx, -1, 0) < 0, "state_copy from sequence -1");
    expect_reason(llama_deltamem_set_write(ctx, N_SEQ, false) < 0, "set_write, sequence 3 of 3");
    expect_reason(llama_deltamem_abandon_ingest(ctx, N_SEQ) < 0, "abandon_ingest, sequence 3 of 3");

    state[n / 2] = NAN;
    expect_reason(llama_deltamem_state_set(ctx, 0, state.data(), n) < 0, "state_set, a NaN");
    state[n / 2] = INFINITY;
    expect_reason(llama_deltamem_state_set(ctx, 0, state.data(), n) < 0, "state_set, an infinite value");
    expect_reason(llama_deltamem_attach(ctx, nullptr) < 0, "attach, an adapter that was not loaded");
    expect_reason(llama_deltamem_adapter_load(llama_get_model(ctx), nullptr) == nullptr, "adapter_load, no file");
    expect_reason(llama_deltamem_adapter_load(nullptr, "no-such-file.gguf") == nullptr, "adapter_load, no model");
    check(same_bits(get_state(ctx, 0), before), "a refused call changes the state");

    // arrays and handles that are NULL
    expect_reason(llama_deltamem_state_get(ctx, 0, nullptr, n) < 0, "state_get, no array");
    expect_reason(llama_deltamem_state_set(ctx, 0, nullptr, n) < 0, "state_set, no array");
    expect_reason(llama_deltamem_checkpoint_get(ctx, 0, nullptr, n) < 0, "checkpoint_get, no array");
    expect_reason(llama_deltamem_set_checkpoints(ctx, nullptr, 1) < 0, "set_checkpoints, no array");
    expect_reason(llama_deltamem_set_segments(ctx, nullptr, nullptr, 1) < 0, "set_segments, no array");
    expect_reason(llama_deltamem_attach(nullptr, adapter) < 0, "attach, no context");
    expect_reason(llama_deltamem_detach(nullptr) < 0, "detach, no context");
    expect_reason(llama_deltamem_state_get(nullptr, 0, state.data(), n) < 0, "state_get, no context");
    expect_reason(llama_deltamem_state_reset(nullptr, -1) < 0, "state_reset, no context");
    expect_reason(llama_deltamem_take_result(nullptr, 0, 0, nullptr, 0) < 0, "take_result, no context");
    expect_reason(!llama_deltamem_get_write(nullptr, 0), "get_write, no context");
    check(!llama_deltamem_is_attached(nullptr) && !llama_deltamem_can_shift(nullptr) &&
                  llama_deltamem_state_size(nullptr) == 0 && llama_deltamem_state_n_bytes(nullptr) == 0 &&
                  llama_deltamem_n_graphs(nullptr) == 0,
          "a context that is NULL has something");

    char buf[] = "full";
    check(llama_deltamem_n_layer(nullptr) == 0 && llama_deltamem_layer(nullptr, 0) == -1 &&
                  llama_deltamem_n_head(nullptr) == 0 && llama_deltamem_rank(nullptr) == 0 &&
                  llama_deltamem_n_bytes(nullptr) == 0 &&
                  llama_deltamem_write_granularity(nullptr) == LLAMA_DELTAMEM_TOKEN,
          "an adapter that is NULL has something");
    check(llama_deltamem_meta_val_str(nullptr, "adapter.type", buf, sizeof(buf)) == -1 && buf[0] == '\0',
          "an adapter that is NULL has a key");
    check(llama_deltamem_meta_val_str(adapter, nullptr, buf, sizeof(buf)) == -1, "a key that is NULL has a value");
    check(llama_deltamem_meta_val_str(adapter, "adapter.type", nullptr, sizeof(buf)) == 8, "a length needs a buffer");
    llama_deltamem_adapter_free(nullptr);

    llama_token_data candidate;
    check(llama_deltamem_candidates(nullptr, 1, 1, &candidate) == 0, "candidates of no logits");
    check(llama_deltamem_candidates(before.data(), 1, 1, nullptr) == 0, "candidates to no array");
}

static void test_bad_files(const llama_model * model, const char * base, const char * adapter, const char * other) {
    namespace fs = std::filesystem;

    const auto refused = [model](const std::string & path, const char * what) {
        llama_deltamem_adapter * loaded = llama_deltamem_adapter_load(model, path.c_str());
        expect_reason(loaded == nullptr, what);
        if (loaded) {
            llama_deltamem_adapter_free(loaded);
        }
    };
    logged_errors.clear();

    refused("no-such-file.gguf", "a missing file");
    refused(fs::temp_directory_path().string(), "a folder");
    refused(base, "the base model as an adapter");
    if (other) {
        refused(other, "an adapter of another architecture");
    }

    std::ifstream     in(adapter, std::ios::binary);
    const std::string content { std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>() };
    check(content.size() > 1000, "%s cannot be read", adapter);

    const fs::path bad =
            fs::temp_directory_path() / ("deltamem-test-" + std::to_string(std::random_device()()) + ".gguf");
    const auto refused_content = [&](const std::string & bytes, const char * what) {
        std::ofstream(bad, std::ios::binary | std::ios::trunc).write(bytes.data(), (std::streamsize) bytes.size());
        refused(bad.string(), what);
    };
    refused_content("", "an empty file");
    refused_content("no GGUF at all, but text", "another format");
    refused_content(content.substr(0, 100), "cut in the metadata");
    refused_content(content.substr(0, content.size() / 2), "cut in the middle");
    refused_content(content.substr(0, content.size() - 1), "cut by one byte");
    fs::remove(bad);
}

static std::vector<llama_token> run(const char * base, const char * adapter_path, const char * other) {
    llama_backend_init();

    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = 0;

    llama_model * model = llama_model_load_from_file(base, model_params);
    if (!check(model != nullptr, "%s does not load", base)) {
        return {};
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_context *          ctx     = make_context(model);
    llama_deltamem_adapter * adapter = llama_deltamem_adapter_load(model, adapter_path);
    if (!check(ctx && adapter, "%s does not load: %s", adapter_path, llama_deltamem_last_error())) {
        llama_free(ctx);
        llama_model_free(model);
        return {};
    }
    test_adapter(adapter, llama_model_n_layer(model));
    test_refused_contexts(model);

    // without an adapter attached
    float nothing = 0.0f;
    logged_errors.clear();
    check(!llama_deltamem_is_attached(ctx) && llama_deltamem_state_size(ctx) == 0, "attached from the start");
    expect_reason(llama_deltamem_state_get(ctx, 0, &nothing, 1) < 0, "state_get, nothing attached");
    expect_reason(llama_deltamem_state_reset(ctx, -1) < 0, "state_reset, nothing attached");
    check(llama_deltamem_detach(ctx) == 0, "detach fails, nothing attached"); // does nothing

    // attached
    check(llama_deltamem_attach(ctx, adapter) == 0, "attach fails: %s", llama_deltamem_last_error());
    check(llama_deltamem_is_attached(ctx), "attached, but not attached");
    const size_t n_state = (size_t) llama_deltamem_n_layer(adapter) * llama_deltamem_n_head(adapter) *
                           llama_deltamem_rank(adapter) * llama_deltamem_rank(adapter);
    check(llama_deltamem_state_size(ctx) == n_state, "a state has %zu floats, not %zu", llama_deltamem_state_size(ctx),
          n_state);
    check(llama_deltamem_state_n_bytes(ctx) >= N_SEQ * n_state * sizeof(float), "the states take too little memory");
    check(is_empty(get_state(ctx, 0)), "the first state is not empty");

    const size_t                   n_bytes   = llama_deltamem_state_n_bytes(ctx);
    const std::vector<llama_token> generated = generate(ctx, n_vocab, 0);
    test_states(ctx, adapter, n_vocab);
    test_segments(ctx, adapter, n_vocab);
    test_turns(ctx, adapter, n_vocab);
    test_failed_decode(ctx, n_vocab);
    test_failed_ingest(ctx, adapter, n_vocab);
    test_bad_calls(ctx, adapter);
    check(llama_deltamem_state_n_bytes(ctx) == n_bytes, "the states grow with use");

    // detached, and attached again: an empty memory and the same answer
    check(llama_deltamem_detach(ctx) == 0, "detach fails");
    check(!llama_deltamem_is_attached(ctx) && llama_deltamem_state_size(ctx) == 0, "detached, but attached");
    llama_memory_clear(llama_get_memory(ctx), true);
    generate(ctx, n_vocab, 0);

    check(llama_deltamem_attach(ctx, adapter) == 0, "attach fails the second time: %s", llama_deltamem_last_error());
    check(is_empty(get_state(ctx, 0)), "the state survives a detach");
    llama_memory_clear(llama_get_memory(ctx), true);
    check(generate(ctx, n_vocab, 0) == generated, "the second attach answers differently");

    // attached over what is attached: a new, empty state
    check(llama_deltamem_attach(ctx, adapter) == 0, "attach fails the third time: %s", llama_deltamem_last_error());
    check(is_empty(get_state(ctx, 0)), "a state survives an attach");

    test_bad_files(model, base, adapter_path, other);

    // an adapter of another instance of the model is none of this context's
    llama_model *            twin    = llama_model_load_from_file(base, model_params);
    llama_deltamem_adapter * of_twin = twin ? llama_deltamem_adapter_load(twin, adapter_path) : nullptr;
    if (check(of_twin != nullptr, "the model or the adapter does not load again")) {
        logged_errors.clear();
        expect_reason(llama_deltamem_attach(ctx, of_twin) < 0, "an adapter loaded for another model");
        check(llama_deltamem_is_attached(ctx), "a refused attach detaches");
        llama_deltamem_adapter_free(of_twin);
    }
    llama_model_free(twin);

    // the context keeps what it needs
    llama_deltamem_adapter_free(adapter);
    llama_memory_clear(llama_get_memory(ctx), true);
    check(generate(ctx, n_vocab, 0) == generated, "the freed adapter answers differently");

    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return generated;
}

// Copies an adapter file; the copy writes and reads otherwise.
static bool write_copy(const char * path, const char * granularity, const char * copy) {
    ggml_context *         data   = nullptr;
    const gguf_init_params params = { /*.no_alloc =*/false, /*.ctx =*/&data };
    gguf_context *         file   = gguf_init_from_file(path, params);
    if (!file) {
        return false;
    }
    gguf_context * made = gguf_init_empty();
    gguf_set_kv(made, file);
    gguf_set_val_str(made, "deltamem.write_granularity", granularity);
    for (int64_t i = 0; i < gguf_get_n_tensors(file); ++i) {
        gguf_add_tensor(made, ggml_get_tensor(data, gguf_get_tensor_name(file, i)));
    }
    const bool done = gguf_write_to_file(made, copy, /*only_meta =*/false);
    gguf_free(made);
    gguf_free(file);
    ggml_free(data);
    return done;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        printf("usage: %s BASE.gguf ADAPTER.gguf [OTHER.gguf | GRANULARITY COPY.gguf]\n", argv[0]);
        return EXIT_SKIPPED;
    }
    llama_log_set(keep_errors, nullptr);

    const char * other = argc == 4 ? argv[3] : nullptr;
    if (argc > 4 && check(write_copy(argv[2], argv[3], argv[4]), "%s is not written", argv[4])) {
        argv[2] = argv[4];
    }

    printf("first time\n");
    const std::vector<llama_token> first = run(argv[1], argv[2], other);
    printf("second time\n");
    const std::vector<llama_token> second = run(argv[1], argv[2], other);
    check(first == second && !first.empty(), "the second time answers differently");

    return finish("lifecycle");
}
