// How threads wait for each other between two nodes (deltamem-wait.h): nobody goes on too early and nobody is left asleep,
// whoever is late and by how much, with several pools at once. Where the library was built with GCC's OpenMP it is counted, too,
// whether OpenMP waits: only where the environment asked for it.
//
// And what becomes of threads after a graph (deltamem-pool.h): they are there for the next one, of whichever context, and a
// process that was forked starts its own.
//
//     test-wait own|omp|pool

#include "ggml-backend.h"
#include "ggml.h"
#include "testing.h"

#include <atomic>
#include <chrono>
#include <thread>

#ifdef DELTAMEM_TEST_GOMP
    #include <dlfcn.h>
#endif

#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__) // which ends a process that starts threads after a fork
    #define DELTAMEM_TEST_FORK
    #include <sys/wait.h>
    #include <unistd.h>
#endif

static constexpr int N_NODES   = 400;
static constexpr int N_THREADS = 4;
static constexpr int N_POOLS   = 2;
static constexpr int N_VALUES  = 64;

static std::atomic<int> n_barriers { 0 };

#ifdef DELTAMEM_TEST_GOMP
// stands before OpenMP's own, which it counts
extern "C" void GOMP_barrier(void) {
    static const auto barrier = (void (*)()) dlsym(RTLD_NEXT, "GOMP_barrier");
    n_barriers++;
    barrier();
}
#endif

// threads that computed something
static std::atomic<int> n_seen { 0 };

// Each thread has some of the values, of which a node makes the next node's from another thread's. One is late.
static void shift(ggml_tensor * dst, const ggml_tensor * a, int ith, int nth, void * late) {
    thread_local const int number = n_seen++;
    (void) number;
    if ((intptr_t) late % nth == ith) {
        // on both sides of how long a thread spins
        std::this_thread::sleep_for(std::chrono::microseconds((intptr_t) late * 7 % 300));
    }
    for (int i = ith; i < N_VALUES; i += nth) {
        ((float *) dst->data)[i] = ((const float *) a->data)[(i + 1) % N_VALUES] + 1.0f;
    }
}

static void compute(ggml_backend_dev_t device, int n_threads, std::atomic<int> * n_wrong) {
    const ggml_init_params params = { N_NODES * 2 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context *         ctx    = ggml_init(params);
    ggml_tensor *          first  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, N_VALUES);
    ggml_tensor *          last   = first;
    for (intptr_t i = 0; i < N_NODES; ++i) {
        last = ggml_map_custom1(ctx, last, shift, GGML_N_TASKS_MAX, (void *) i);
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, last);

    ggml_backend_t        backend = ggml_backend_dev_init(device, nullptr);
    ggml_backend_buffer_t buffer  = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ((ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"))(backend, n_threads);

    std::vector<float> values(N_VALUES);
    for (int i = 0; i < N_VALUES; ++i) {
        values[i] = (float) (i * i);
    }
    ggml_backend_tensor_set(first, values.data(), 0, ggml_nbytes(first));
    *n_wrong += ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS ? 0 : 1;
    ggml_backend_tensor_get(last, values.data(), 0, ggml_nbytes(last));
    for (int i = 0; i < N_VALUES; ++i) {
        const int from = (i + N_NODES) % N_VALUES;
        *n_wrong += values[i] == (float) (from * from + N_NODES) ? 0 : 1;
    }
    ggml_backend_buffer_free(buffer);
    ggml_backend_free(backend);
    ggml_free(ctx);
}

static void test_waits(ggml_backend_dev_t device, [[maybe_unused]] bool omp) {
    std::atomic<int>         n_wrong { 0 };
    std::vector<std::thread> threads;
    for (int i = 0; i < N_POOLS; ++i) {
        threads.emplace_back(compute, device, N_THREADS, &n_wrong);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    check(n_wrong == 0, "%d values are wrong", n_wrong.load());
#ifdef DELTAMEM_TEST_GOMP
    // OpenMP's own of each graph, before the first node, are a few
    check(omp == (n_barriers > N_NODES), "OpenMP waits %d times", n_barriers.load());
#endif
}

static void test_pools(ggml_backend_dev_t device) {
    std::atomic<int> n_wrong { 0 };

    // each time another backend
    for (int i = 0; i < 3; ++i) {
        compute(device, N_THREADS, &n_wrong);
    }
    check(n_seen == N_THREADS, "%d threads computed, %d at once", n_seen.load(), N_THREADS);

    // more numbers of threads than pools are kept
    for (int n_threads = 1; n_threads <= 20; ++n_threads) {
        compute(device, n_threads, &n_wrong);
    }
    check(n_wrong == 0, "%d values are wrong", n_wrong.load());

#ifdef DELTAMEM_TEST_FORK
    const pid_t child = fork();
    if (child == 0) {
        alarm(120); // or it might wait for ever
        compute(device, N_THREADS, &n_wrong);
        _exit(n_wrong == 0 ? 0 : 1);
    }
    int        status = -1;
    const bool ended  = waitpid(child, &status, 0) == child;
    check(ended && status == 0, "a process that was forked ends with status %d", status);
    compute(device, N_THREADS, &n_wrong);
    check(n_wrong == 0, "%d values are wrong after a fork", n_wrong.load());
#endif
}

int main(int argc, char ** argv) {
    const std::string  what   = argc > 1 ? argv[1] : "own";
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (what == "pool") {
        test_pools(device);
    } else {
        test_waits(device, what == "omp");
    }
    return finish("wait");
}
