// How ggml's threads wait: for each other between two nodes, and for the next graph. Included by ggml-cpu.c, whose atomics and
// locks it uses.
//
// A node is short, so a thread that is done spins until the others are. OpenMP's runtimes do so for milliseconds and ggml for
// ever, and then a machine with one busy core crawls: a thread that spins keeps its core from the one that it waits for, or
// uses up its slice of time and loses the core itself when it would go on, hundreds of times a graph. Here a thread soon sleeps.
// The system runs one that is woken at once (docs/lab/threads.md).
#pragma once

#include "deltamem-cores.h"

// A spin in vain: longer than nearly all waits on an idle machine, and shorter than a slice of time.
#define GGML_CPU_DELTAMEM_SPIN_US 1000
// One between nodes that paid: about what it takes to sleep and be woken.
#define GGML_CPU_DELTAMEM_SHORT_US 50

// After so long a thread checks whether it keeps another one from its core.
#define GGML_CPU_DELTAMEM_LOOK_US 200

// After a spin in vain so many waits sleep without one. Twice as many after the next, half as many after one that paid.
#define GGML_CPU_DELTAMEM_MIN_SKIPPED        16
#define GGML_CPU_DELTAMEM_MAX_SKIPPED        4096
#define GGML_CPU_DELTAMEM_MAX_SKIPPED_GRAPHS 64

#if defined(_WIN32)
    #define GGML_CPU_DELTAMEM_MUTEX SRWLOCK_INIT
    #define GGML_CPU_DELTAMEM_COND  CONDITION_VARIABLE_INIT
#else
    #define GGML_CPU_DELTAMEM_MUTEX PTHREAD_MUTEX_INITIALIZER
    #define GGML_CPU_DELTAMEM_COND  PTHREAD_COND_INITIALIZER
#endif

// What one kind of wait has learned.
struct ggml_cpu_deltamem_learned {
    atomic_int n_skip;    // waits to come that do not spin
    atomic_int n_skipped; // what n_skip began with after the latest spin
    int        max_skipped;
    int        short_us; // a spin of less paid
};

// of all pools: others tell as well that the machine is busy, and one that is woken for nothing looks and sleeps again
static struct {
    struct ggml_cpu_deltamem_learned nodes;
    struct ggml_cpu_deltamem_learned graphs;
    ggml_mutex_t                     mutex;
    ggml_cond_t                      cond;
    atomic_int                       n_asleep;
} g_deltamem_wait = {
    .nodes  = { 0, 0, GGML_CPU_DELTAMEM_MAX_SKIPPED, GGML_CPU_DELTAMEM_SHORT_US },
    .graphs = { 0, 0, GGML_CPU_DELTAMEM_MAX_SKIPPED_GRAPHS, GGML_CPU_DELTAMEM_SPIN_US },
    .mutex  = GGML_CPU_DELTAMEM_MUTEX,
    .cond   = GGML_CPU_DELTAMEM_COND,
};

static bool ggml_cpu_deltamem_look(atomic_int * counter, int value, int n) {
    for (int i = 0; i < n; ++i) {
        if (atomic_load_explicit(counter, memory_order_relaxed) != value) {
            return true;
        }
        if (i + 1 < n) {
            ggml_thread_cpu_relax();
        }
    }
    return false;
}

// Spins if that may pay. Returns whether the counter is no longer `value`.
static bool ggml_cpu_deltamem_spin(struct ggml_cpu_deltamem_learned * learned, atomic_int * counter, int value) {
    const int n_skip = atomic_load_explicit(&learned->n_skip, memory_order_relaxed);
    if (n_skip > 0) {
        atomic_store_explicit(&learned->n_skip, n_skip - 1, memory_order_relaxed);
        return ggml_cpu_deltamem_look(counter, value, 1);
    }
    if (ggml_cpu_deltamem_look(counter, value, 16)) {
        return true; // most waits: no clock, and nothing shared is written
    }
    const int n_skipped = atomic_load_explicit(&learned->n_skipped, memory_order_relaxed);
    int64_t   begin     = ggml_time_us();
    int64_t   t         = 0;
    bool      looked    = false;
    do {
        if (ggml_cpu_deltamem_look(counter, value, 16)) {
            if (n_skipped > 0 && t < learned->short_us) {
                atomic_store_explicit(&learned->n_skipped, n_skipped / 2, memory_order_relaxed);
            }
            return true;
        }
        t = ggml_time_us() - begin;
        if (!looked && t >= GGML_CPU_DELTAMEM_LOOK_US) {
            looked = true;
            begin  = ggml_cpu_deltamem_make_way() ? ggml_time_us() : begin;
        }
    } while (t < GGML_CPU_DELTAMEM_SPIN_US);
    const int n = MIN(MAX(2 * n_skipped, GGML_CPU_DELTAMEM_MIN_SKIPPED), learned->max_skipped);
    atomic_store_explicit(&learned->n_skipped, n, memory_order_relaxed);
    atomic_store_explicit(&learned->n_skip, n, memory_order_relaxed);
    return false;
}

// Returns when the counter is no longer `value`.
static void ggml_cpu_deltamem_wait(atomic_int * counter, int value) {
    if (ggml_cpu_deltamem_spin(&g_deltamem_wait.nodes, counter, value)) {
        return;
    }
    ggml_mutex_lock_shared(&g_deltamem_wait.mutex);
    atomic_fetch_add(&g_deltamem_wait.n_asleep, 1);
    while (atomic_load(counter) == value) {
        ggml_cond_wait(&g_deltamem_wait.cond, &g_deltamem_wait.mutex);
    }
    atomic_fetch_add(&g_deltamem_wait.n_asleep, -1);
    ggml_mutex_unlock_shared(&g_deltamem_wait.mutex);
}

// After a counter was changed, sequentially consistent: wakes whoever sleeps. A thread that is about to sleep counts itself before
// it looks at its counter, under the lock, so either it sees the change or it is seen here.
static void ggml_cpu_deltamem_wake(void) {
    if (atomic_load(&g_deltamem_wait.n_asleep) > 0) {
        ggml_mutex_lock(&g_deltamem_wait.mutex);
        ggml_mutex_unlock(&g_deltamem_wait.mutex);
        ggml_cond_broadcast(&g_deltamem_wait.cond);
    }
}

#ifndef GGML_USE_OPENMP

    // The polling level of a pool whose threads wait for the next graph as follows.
    #define GGML_CPU_DELTAMEM_POLL UINT32_MAX

// A thread that has no graph: spins if the next one may come at once and the core is nobody else's. Its pool has where to sleep.
// A caller that takes its time says nothing of the machine, so nodes and graphs learn apart. Returns 0: how long to poll on.
static uint64_t ggml_cpu_deltamem_poll(atomic_int * n_graph, int last) {
    ggml_cpu_deltamem_know();
    if (atomic_load_explicit(&g_deltamem_wait.nodes.n_skipped, memory_order_relaxed) == 0) {
        ggml_cpu_deltamem_spin(&g_deltamem_wait.graphs, n_graph, last);
    }
    return 0;
}

    #if !defined(_WIN32)
// In a process that was just forked: its one thread has learned nothing and waits for nobody.
static void ggml_cpu_deltamem_wait_forked(void) {
        #if defined(__gnu_linux__)
    ggml_cpu_deltamem_know_nobody();
        #endif
    ggml_mutex_init(&g_deltamem_wait.mutex);
    ggml_cond_init(&g_deltamem_wait.cond);
    atomic_store(&g_deltamem_wait.n_asleep, 0);
}
    #endif

#endif
