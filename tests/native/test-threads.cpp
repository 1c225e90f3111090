// Several threads at once in the library, for the thread sanitizer (make tsan): two contexts of one model and one adapter, each
// used by its own thread; and one context that two threads use in turn under a lock, as those of a Python program do.
//
//     test-threads BASE.gguf ADAPTER.gguf

#include "llama-deltamem.h"
#include "decoding.h"
#include "testing.h"

#include <atomic>
#include <mutex>
#include <thread>

static constexpr int N_PROMPT   = 20;
static constexpr int N_GENERATE = 12;
static constexpr int N_SEQ      = 3;
static constexpr int N_TURNS    = 3;

static std::atomic<int> n_errors_logged { 0 };

static void count_errors(ggml_log_level level, const char *, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        n_errors_logged++;
    }
}

// `check` is one thread's: what others find is counted here first
static std::atomic<int> n_wrong { 0 };

static void expect(bool ok) {
    n_wrong += ok ? 0 : 1;
}

static llama_context * make_context(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256 * N_SEQ;
    params.n_batch              = 64;
    params.n_ubatch             = 16;
    params.n_seq_max            = N_SEQ;
    params.n_threads            = 2;
    params.n_threads_batch      = 2;
    return llama_init_from_model(model, params);
}

// What a thread does with a sequence: a prompt with checkpoints, a reply token by token, its state out and in, bad calls.
// `lock` is held for each call, or none is needed.
static std::vector<float> converse(llama_context * ctx, llama_seq_id seq_id, int n_vocab, std::mutex * lock) {
    const auto locked = [lock](const auto & f) {
        std::unique_lock<std::mutex> held;
        if (lock) {
            held = std::unique_lock<std::mutex>(*lock);
        }
        return f();
    };

    std::vector<llama_token> prompt;
    for (int i = 0; i < N_PROMPT; ++i) {
        prompt.push_back((37 * i + 11 * seq_id + 5) % n_vocab);
    }
    std::vector<float> state(llama_deltamem_state_size(ctx)), kept(state.size());
    const int32_t      mark = N_PROMPT - 1;

    for (int turn = 0; turn < N_TURNS; ++turn) {
        locked([&] {
            llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
            expect(llama_deltamem_state_reset(ctx, seq_id) == 0);
            expect(llama_deltamem_set_checkpoints(ctx, &mark, 1) == 0);
            expect(decode(ctx, prompt, 0, seq_id));
            expect(llama_deltamem_checkpoint_get(ctx, 0, kept.data(), kept.size()) == 0);
            expect(llama_deltamem_state_get(ctx, seq_id, state.data(), state.size()) == 0);
            expect(same_bits(kept, state));
        });
        llama_token token = prompt.back();
        for (int i = 0; i < N_GENERATE; ++i) {
            locked([&] {
                expect(decode(ctx, { token }, N_PROMPT + i, seq_id));
                const float * logits = llama_get_logits_ith(ctx, -1);
                for (int t = 0; t < n_vocab; ++t) {
                    token = logits[t] > logits[token] ? t : token;
                }
            });
            std::this_thread::yield();
        }
        locked([&] {
            expect(llama_deltamem_state_get(ctx, seq_id, state.data(), state.size()) == 0);
            expect(llama_deltamem_state_set(ctx, seq_id, state.data(), state.size()) == 0);
            expect(llama_deltamem_set_write(ctx, seq_id, turn % 2 == 0) == 0);
            expect(llama_deltamem_set_write(ctx, seq_id, true) == 0);
        });
        // the reason of a failure is the thread's own
        const int size = 1000 + seq_id;
        locked([&] { expect(llama_deltamem_state_get(ctx, seq_id, state.data(), size) < 0); });
        std::this_thread::yield();
        expect(std::string(llama_deltamem_last_error()).find(std::to_string(size)) != std::string::npos);
    }
    return state;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        printf("usage: %s BASE.gguf ADAPTER.gguf\n", argv[0]);
        return EXIT_SKIPPED;
    }
    llama_log_set(count_errors, nullptr);
    llama_backend_init();

    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = 0;

    llama_model *            model   = llama_model_load_from_file(argv[1], model_params);
    llama_deltamem_adapter * adapter = model ? llama_deltamem_adapter_load(model, argv[2]) : nullptr;
    if (!check(model && adapter, "%s or %s does not load", argv[1], argv[2])) {
        return finish("threads");
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    // as one thread alone has it
    std::vector<float> alone[N_SEQ];
    {
        llama_context * ctx = make_context(model);
        check(llama_deltamem_attach(ctx, adapter) == 0, "attach fails");
        for (int s = 0; s < N_SEQ; ++s) {
            alone[s] = converse(ctx, s, n_vocab, nullptr);
        }
        llama_free(ctx);
    }

    // a context each; attached, detached and freed while the other one computes
    std::vector<float>       of_own[2];
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&, i] {
            llama_context * ctx = make_context(model);
            expect(llama_deltamem_attach(ctx, adapter) == 0);
            of_own[i] = converse(ctx, i, n_vocab, nullptr);
            expect(llama_deltamem_detach(ctx) == 0);
            expect(llama_deltamem_attach(ctx, adapter) == 0);
            expect(same_bits(converse(ctx, i, n_vocab, nullptr), of_own[i]));
            llama_free(ctx);
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    threads.clear();

    // one context for two, which decode in turn; a third loads adapters meanwhile
    std::vector<float> of_both[2];
    llama_context *    ctx = make_context(model);
    check(llama_deltamem_attach(ctx, adapter) == 0, "attach fails");
    std::mutex lock;
    for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&, i] { of_both[i] = converse(ctx, i, n_vocab, &lock); });
    }
    threads.emplace_back([&] {
        for (int i = 0; i < N_TURNS; ++i) {
            llama_deltamem_adapter * other = llama_deltamem_adapter_load(model, argv[2]);
            expect(other != nullptr);
            expect(llama_deltamem_adapter_load(model, argv[1]) == nullptr);
            expect(std::string(llama_deltamem_last_error()).find(argv[1]) != std::string::npos);
            llama_deltamem_adapter_free(other);
        }
    });
    for (std::thread & thread : threads) {
        thread.join();
    }
    llama_free(ctx);
    llama_deltamem_adapter_free(adapter);
    llama_model_free(model);
    llama_backend_free();

    check(n_wrong == 0, "%d calls of threads went wrong", n_wrong.load());
    check(n_errors_logged > 0, "the failures were not logged");
    for (int i = 0; i < 2; ++i) {
        check(same_bits(of_own[i], alone[i]), "a context of its own: thread %d has another state", i);
        check(same_bits(of_both[i], alone[i]), "a context for two: thread %d has another state", i);
    }
    return finish("threads");
}
