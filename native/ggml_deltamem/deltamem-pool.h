// The threads of graphs whose caller brings none: kept from graph to graph. Included by ggml-cpu.c, whose pools these are.
//
// ggml starts such threads for each graph and joins them at its end. Here they wait for the next one (deltamem-wait.h). Whoever
// computes takes a pool that nobody computes with, so each of several callers at once has one of its own, and a pool belongs to
// no context. With OpenMP the threads are OpenMP's, and a pool is nothing that is worth keeping.
#pragma once

#ifdef GGML_USE_OPENMP

static struct ggml_threadpool * ggml_cpu_deltamem_take_pool(struct ggml_threadpool_params * params) {
    return ggml_threadpool_new(params);
}

static void ggml_cpu_deltamem_give_back(struct ggml_threadpool * pool) {
    ggml_threadpool_free(pool);
}

#else

// More than contexts that compute at once, or numbers of threads, are seldom.
    #define GGML_CPU_DELTAMEM_MAX_POOLS 16

static struct {
    ggml_mutex_t             mutex;
    int                      n_pools;
    struct ggml_threadpool * pools[GGML_CPU_DELTAMEM_MAX_POOLS]; // the one used last is last
} g_deltamem_pools = { .mutex = GGML_CPU_DELTAMEM_MUTEX };

    #if !defined(_WIN32)
// A process that was forked has one thread: whoever it would wait for is not there, nor who holds a lock.
static void ggml_cpu_deltamem_forked(void) {
    ggml_mutex_init(&g_deltamem_pools.mutex);
    g_deltamem_pools.n_pools = 0;
    ggml_cpu_deltamem_wait_forked();
}

static void ggml_cpu_deltamem_watch_forks(void) {
    const int error = pthread_atfork(NULL, NULL, ggml_cpu_deltamem_forked);
    GGML_ASSERT(error == 0);
}
    #endif

// A pool of params->n_threads that the caller has for itself.
static struct ggml_threadpool * ggml_cpu_deltamem_take_pool(struct ggml_threadpool_params * params) {
    #if !defined(_WIN32)
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ggml_cpu_deltamem_watch_forks);
    #endif
    ggml_cpu_deltamem_know();
    struct ggml_threadpool * pool = NULL;
    ggml_mutex_lock(&g_deltamem_pools.mutex);
    for (int i = g_deltamem_pools.n_pools; pool == NULL && i-- > 0;) {
        if (g_deltamem_pools.pools[i]->n_threads == params->n_threads) {
            pool = g_deltamem_pools.pools[i];
            g_deltamem_pools.n_pools--;
            memmove(g_deltamem_pools.pools + i, g_deltamem_pools.pools + i + 1,
                    (g_deltamem_pools.n_pools - i) * sizeof(pool));
        }
    }
    ggml_mutex_unlock(&g_deltamem_pools.mutex);
    if (pool == NULL) {
        params->poll = GGML_CPU_DELTAMEM_POLL;
        pool         = ggml_threadpool_new(params);
    }
    return pool;
}

// Keeps it for whoever comes next. Ends the threads of the pool that was not used for the longest time if there are too many.
static void ggml_cpu_deltamem_give_back(struct ggml_threadpool * pool) {
    struct ggml_threadpool * oldest = NULL;
    ggml_mutex_lock(&g_deltamem_pools.mutex);
    if (g_deltamem_pools.n_pools == GGML_CPU_DELTAMEM_MAX_POOLS) {
        oldest = g_deltamem_pools.pools[0];
        g_deltamem_pools.n_pools--;
        memmove(g_deltamem_pools.pools, g_deltamem_pools.pools + 1, g_deltamem_pools.n_pools * sizeof(pool));
    }
    g_deltamem_pools.pools[g_deltamem_pools.n_pools++] = pool;
    ggml_mutex_unlock(&g_deltamem_pools.mutex);
    ggml_threadpool_free(oldest); // NULL is none
}

#endif
