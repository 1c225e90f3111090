// Tests that a graph which ggml-cpu knows (deltamem-known.h) is computed as it is: by other numbers of threads than before, in
// turn with more graphs than a thread keeps, by another thread, and after its scheduler was given another graph.
//
// All graphs have as many nodes, of which other ones are computed as one: what is known of one is wrong for another.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-deltamem.h"
#include "testing.h"

#include <atomic>
#include <thread>

static constexpr int64_t N_OUT = 64, N_READ = 8;
static constexpr int     N_GRAPHS = 20; // more than a thread keeps

static std::atomic<int> n_threads_seen;

static void count_threads(ggml_tensor * dst, const ggml_tensor * a, int ith, int nth, void *) {
    if (ith == 0) {
        n_threads_seen = nth;
        memcpy(dst->data, a->data, ggml_nbytes(a));
    }
}

static void set_threads(ggml_backend_t cpu, int n_threads) {
    ggml_backend_dev_t device = ggml_backend_get_device(cpu);
    const auto         set    = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads");
    set(cpu, n_threads);
}

// Of a correction c, by one token or more: (c + x) x, (c x) x, (c - x) x, and (c + x) c, for which c must be kept.
class graph {
public:
    enum follower {
        ADDED,
        MULTIPLIED,
        SUBTRACTED,
        ADDED_AND_USED,
        N_FOLLOWERS
    };

    graph(ggml_backend_t cpu, int i) : kind((follower) (i % N_FOLLOWERS)), n_tokens(1 + i / N_FOLLOWERS), random(i) {
        given.reset(ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true }));
        nodes.reset(ggml_init({ 16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        out    = ggml_new_tensor_2d(given.get(), GGML_TYPE_F32, N_OUT, n_tokens);
        weight = ggml_new_tensor_2d(given.get(), GGML_TYPE_F32, N_OUT, N_READ);
        read   = ggml_new_tensor_2d(given.get(), GGML_TYPE_F32, N_READ, n_tokens);
        other  = ggml_new_tensor_2d(given.get(), GGML_TYPE_F32, N_OUT, n_tokens);
        buffer.reset(ggml_backend_alloc_ctx_tensors(given.get(), cpu));

        ggml_context * ctx       = nodes.get();
        ggml_tensor *  counted   = ggml_map_custom1(ctx, read, count_threads, GGML_N_TASKS_MAX, nullptr);
        ggml_tensor *  corrected = ggml_deltamem_correct(ctx, out, weight, counted);
        switch (kind) {
            case ADDED:
            case ADDED_AND_USED: result = ggml_add(ctx, corrected, other); break;
            case MULTIPLIED:     result = ggml_mul(ctx, corrected, other); break;
            default:             result = ggml_sub(ctx, corrected, other); break;
        }
        result = ggml_mul(ctx, result, kind == ADDED_AND_USED ? corrected : other);
        ggml_set_output(result);
        cgraph = ggml_new_graph(ctx);
        ggml_build_forward_expand(cgraph, result);

        for (ggml_tensor * t : { out, weight, read, other }) {
            std::vector<float> x(ggml_nelements(t));
            for (float & value : x) {
                value = random.normal();
            }
            ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
        }
    }

    // as the scheduler has allocated it
    bool compute(ggml_backend_sched_t sched) {
        return ggml_backend_sched_graph_compute(sched, cgraph) == GGML_STATUS_SUCCESS;
    }

    double error() const {
        const auto *W = (const float *) weight->data, *r = (const float *) read->data, *x = (const float *) other->data;
        std::vector<float> got(ggml_nelements(result));
        ggml_backend_tensor_get(result, got.data(), 0, ggml_nbytes(result));
        nmse error;
        for (int64_t i = 0; i < (int64_t) got.size(); ++i) {
            double c = ((const float *) out->data)[i];
            for (int64_t j = 0; j < N_READ; ++j) {
                c += (double) W[j * N_OUT + i % N_OUT] * r[i / N_OUT * N_READ + j];
            }
            const double y = kind == MULTIPLIED ? c * x[i] : kind == SUBTRACTED ? c - x[i] : c + x[i];
            error.add(got[i], y * (kind == ADDED_AND_USED ? c : x[i]));
        }
        return error.value();
    }

    void clear() { ggml_backend_tensor_memset(result, 0xff, 0, ggml_nbytes(result)); }

    ggml_cgraph * cgraph;

private:
    const follower          kind;
    const int64_t           n_tokens;
    random_source           random;
    ggml_context_ptr        given, nodes;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           out, *weight, *read, *other, *result;
};

static ggml_backend_sched_ptr scheduler(ggml_backend_t cpu) {
    return ggml_backend_sched_ptr(ggml_backend_sched_new(&cpu, nullptr, 1, GGML_DEFAULT_GRAPH_SIZE, false, false));
}

static void compute(graph & g, ggml_backend_sched_t sched, const char * what) {
    g.clear();
    check(g.compute(sched), "%s: computing failed", what);
    check(g.error() <= 1e-12, "%s: NMSE is %g", what, g.error());
}

static void test_threads(ggml_backend_t cpu) {
    graph g(cpu, 0);
    auto  sched = scheduler(cpu);
    check(ggml_backend_sched_alloc_graph(sched.get(), g.cgraph), "a graph cannot be allocated");
    for (const int n_threads : { 1, 3, 1, 8, 2, 8 }) {
        set_threads(cpu, n_threads);
        compute(g, sched.get(), "a known graph");
        check(n_threads_seen == n_threads, "%d threads compute a known graph, %d were asked for", n_threads_seen.load(),
              n_threads);
    }
}

static void test_many(ggml_backend_t cpu) {
    std::vector<std::unique_ptr<graph>> graphs;
    std::vector<ggml_backend_sched_ptr> scheds;
    for (int i = 0; i < N_GRAPHS; ++i) {
        graphs.emplace_back(new graph(cpu, i));
        scheds.push_back(scheduler(cpu));
        check(ggml_backend_sched_alloc_graph(scheds[i].get(), graphs[i]->cgraph), "a graph cannot be allocated");
    }
    random_source random(1);
    for (int n = 0; n < 20 * N_GRAPHS; ++n) {
        const int n_recent = n % 40 < 20 ? 4 : N_GRAPHS; // known for long, then hardly any
        const int i        = random.below(n_recent);
        set_threads(cpu, 1 + random.below(3));
        compute(*graphs[i], scheds[i].get(), "one of many graphs");
        if (n % 50 == 0) {
            std::thread([&] { compute(*graphs[i], scheds[i].get(), "a graph of another thread"); }).join();
        }
    }
}

// One scheduler for all: the next graph lies where the one before did.
static void test_replaced(ggml_backend_t cpu) {
    auto sched = scheduler(cpu);
    set_threads(cpu, 2);
    for (int i = 0; i < N_GRAPHS; ++i) {
        graph g(cpu, i);
        ggml_backend_sched_reset(sched.get());
        check(ggml_backend_sched_alloc_graph(sched.get(), g.cgraph), "a graph cannot be allocated");
        for (int turn = 0; turn < 2; ++turn) {
            compute(g, sched.get(), "a graph in the place of another");
        }
    }
}

int main() {
    ggml_backend_load_all();
    ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    test_threads(cpu.get());
    test_many(cpu.get());
    test_replaced(cpu.get());
    return finish("known");
}
