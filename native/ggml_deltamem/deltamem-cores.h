// Two of ggml's threads on one core, and another core idle. Included by ggml-cpu.c. OpenMP's threads are not known here.
//
// Linux likes to wake a thread where it slept, or on the core of whoever wakes it. Two that wait for each other then stay on one
// core: if they sleep by turns, it never has too much to do, and if both want to run, it takes up to 40 ms until one is moved
// (docs/lab/threads.md). So a thread that waited in vain checks whether it keeps another one from running, and leaves.
#pragma once

#if defined(__gnu_linux__) && !defined(GGML_USE_OPENMP)
    #include <fcntl.h>
    #include <limits.h>
    #include <sys/syscall.h>

    #define GGML_CPU_DELTAMEM_MAX_KNOWN 64

// The threads that computed last.
static struct {
    atomic_int n; // ever
    atomic_int ids[GGML_CPU_DELTAMEM_MAX_KNOWN];
} g_deltamem_known;

static _Thread_local bool g_deltamem_is_known;

// Called by each thread before it computes.
static void ggml_cpu_deltamem_know(void) {
    if (!g_deltamem_is_known) {
        g_deltamem_is_known = true;
        const int i         = atomic_fetch_add(&g_deltamem_known.n, 1);
        atomic_store(&g_deltamem_known.ids[i % GGML_CPU_DELTAMEM_MAX_KNOWN], (int) syscall(SYS_gettid));
    }
}

// In a process that was just forked, whose one thread has another number.
static void ggml_cpu_deltamem_know_nobody(void) {
    g_deltamem_is_known = false;
    atomic_store(&g_deltamem_known.n, 0);
}

// The beginning of a file of /proc as text; empty if it cannot be read.
static const char * ggml_cpu_deltamem_proc(const char * path, char * text, size_t size) {
    const int     file = open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t n    = file < 0 ? -1 : read(file, text, size - 1);
    if (file >= 0) {
        close(file);
    }
    text[n < 0 ? 0 : n] = '\0';
    return text;
}

// Whether another of our threads wants to run on this core.
static bool ggml_cpu_deltamem_shares(int core) {
    const int n    = MIN(atomic_load(&g_deltamem_known.n), GGML_CPU_DELTAMEM_MAX_KNOWN);
    const int self = (int) syscall(SYS_gettid);
    for (int i = 0; i < n; ++i) {
        const int id = atomic_load(&g_deltamem_known.ids[i]);
        char      path[64];
        char      text[1024];
        snprintf(path, sizeof(path), "/proc/self/task/%d/stat", id);
        const char * rest = id == self ? NULL : strrchr(ggml_cpu_deltamem_proc(path, text, sizeof(text)), ')');
        if (rest == NULL || strncmp(rest, ") R", 3) != 0) {
            continue;
        }
        for (int field = 2; field < 39 && rest != NULL; ++field) { // proc(5): the 39th is the core
            rest = strchr(rest + 1, ' ');
        }
        if (rest != NULL && atoi(rest) == core) {
            return true;
        }
    }
    return false;
}

// Moves this thread to another core if it keeps another one from running, and if there is an idle core for it: that is, if the
// whole system has a core for each thread that wants to run. Returns whether it moved.
static bool ggml_cpu_deltamem_make_way(void) {
    cpu_set_t cores;
    char      text[128];
    int       n_running = INT_MAX;
    const int core      = sched_getcpu();
    sscanf(ggml_cpu_deltamem_proc("/proc/loadavg", text, sizeof(text)), "%*s %*s %*s %d/", &n_running);
    if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof(cores), &cores) != 0 ||
        n_running > CPU_COUNT(&cores) || CPU_COUNT(&cores) < 2 || !ggml_cpu_deltamem_shares(core)) {
        return false;
    }
    cpu_set_t others = cores;
    CPU_CLR(core, &others);
    const bool moved = sched_setaffinity(0, sizeof(others), &others) == 0; // at once
    sched_setaffinity(0, sizeof(cores), &cores);
    return moved;
}

#else

static void ggml_cpu_deltamem_know(void) {}

static bool ggml_cpu_deltamem_make_way(void) {
    return false;
}

#endif
