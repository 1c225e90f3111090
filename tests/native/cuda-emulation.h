// Runs a CUDA kernel on the CPU, a block at a time, every thread as a fiber: enough of CUDA for deltamem-cuda-kernel.cuh.
// Between two barriers the threads run in random order, one after the other, and shared memory begins as NaN: a missing
// barrier or an uninitialised value shows as a wrong result, a barrier that not all threads reach as an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(n)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

inline float4 make_float4(float x, float y, float z, float w) {
    return { x, y, z, w };
}

inline int min(int a, int b) {
    return a < b ? a : b;
}

inline dim3 threadIdx, blockIdx, blockDim; // of the fiber that runs

class cuda_emulation {
public:
    static constexpr int    WARP       = 32;
    static constexpr size_t MAX_SHARED = 48 * 1024;

    // Calls kernel() in every thread of every block; `shared` is what the kernel has for shared memory, and `bytes` of it
    // it may use.
    static void launch(dim3 grid, dim3 block, void * shared, size_t bytes, const std::function<void()> & kernel) {
        if (bytes > MAX_SHARED || block.x % WARP != 0 || block.x > 1024) {
            fail("a launch that CUDA would refuse");
        }
        trapped = false;
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = { x, y };
                blockDim = block;
                memset(shared, 0xff, MAX_SHARED); // NaN
                cuda_emulation(block.x, kernel).run();
                for (size_t i = bytes; i < MAX_SHARED; ++i) {
                    if (((unsigned char *) shared)[i] != 0xff) {
                        fail("a write behind the shared memory of the launch");
                    }
                }
            }
        }
    }

    // a barrier for the block; true if `vote` is for one of its threads
    static bool sync_threads(bool vote) {
        current->votes[threadIdx.x] = vote;
        current->wait(AT_BARRIER);
        return current->voted;
    }

    // ends the thread and, once all that can run have, the launch
    static void trap() {
        trapped = true;
        current->wait(DONE);
    }

    static inline bool trapped = false; // was the last launch

    static void sync_warp() { current->wait(AT_WARP); }

    static float shuffle_xor(float value, int mask) {
        const unsigned self   = threadIdx.x;
        current->values[self] = value;
        current->wait(AT_WARP);
        const float other = current->values[self ^ mask];
        current->wait(AT_WARP);
        return other;
    }

private:
    enum status {
        READY,
        AT_BARRIER,
        AT_WARP,
        DONE
    };

    static constexpr size_t STACK = 64 * 1024;

    static inline cuda_emulation * current = nullptr;
    static inline std::mt19937     random  = std::mt19937(1);

    struct fiber {
        ucontext_t              context; // for the first time; jumps are faster, they leave the signal mask alone
        jmp_buf                 place;
        bool                    begun; // it has a place to go on from: also after a launch, for the next one
        std::unique_ptr<char[]> stack;
    };

    const unsigned                n;
    const std::function<void()> & kernel;
    std::vector<status>           statuses;
    std::vector<float>            values;
    std::vector<char>             votes;
    bool                          voted     = false;
    unsigned                      n_barrier = 0; // that wait at the barrier
    std::vector<unsigned>         n_warp;        // at that of each warp
    std::vector<unsigned>         ready;
    jmp_buf                       scheduler;

    static std::vector<fiber> & fibers() {
        static std::vector<fiber> all(1024);
        return all;
    }

    cuda_emulation(unsigned n, const std::function<void()> & kernel) :
        n(n), kernel(kernel), statuses(n, READY), values(n), votes(n), n_warp(n / WARP) {}

    [[noreturn]] static void fail(const char * what) {
        fprintf(stderr, "FAILED: %s\n", what);
        exit(1);
    }

    static void begin() {
        while (true) { // once in each launch
            current->kernel();
            current->wait(DONE);
        }
    }

    void wait(status s) {
        const unsigned self = threadIdx.x;
        statuses[self]      = s;
        if (_setjmp(fibers()[self].place) == 0) {
            _longjmp(scheduler, 1);
        }
    }

    void go_on(unsigned i) {
        fiber & f = fibers()[i];
        threadIdx = { i };
        if (_setjmp(scheduler) != 0) {
            return;
        }
        if (f.begun) {
            _longjmp(f.place, 1);
        }
        f.begun = true;
        setcontext(&f.context);
    }

    void run() {
        current = this;
        for (unsigned i = 0; i < n; ++i) {
            fiber & f = fibers()[i];
            if (!f.begun) {
                if (!f.stack) {
                    f.stack.reset(new char[STACK]);
                }
                getcontext(&f.context);
                f.context.uc_stack.ss_sp   = f.stack.get();
                f.context.uc_stack.ss_size = STACK;
                f.context.uc_link          = nullptr;
                makecontext(&f.context, begin, 0);
            }
            ready.push_back(i);
        }
        while (!ready.empty()) {
            // in random order; what becomes ready joins
            const size_t at = random() % ready.size();
            std::swap(ready[at], ready.back());
            const unsigned i = ready.back();
            ready.pop_back();

            go_on(i);

            if (statuses[i] == AT_WARP && ++n_warp[i / WARP] == WARP) {
                n_warp[i / WARP] = 0;
                release(i / WARP * WARP, WARP);
            } else if (statuses[i] == AT_BARRIER && ++n_barrier == n) {
                n_barrier = 0;
                voted     = std::find(votes.begin(), votes.end(), 1) != votes.end();
                release(0, n);
            }
        }
        for (unsigned i = 0; i < n; ++i) {
            if (statuses[i] != DONE && !trapped) {
                fail("a barrier that not all threads reach");
            }
            if (trapped) { // it stands somewhere in the kernel
                fibers()[i].begun = false;
            }
        }
    }

    // lets go of so many threads from `begin`
    void release(unsigned begin, unsigned count) {
        for (unsigned i = begin; i < begin + count; ++i) {
            statuses[i] = READY;
            ready.push_back(i);
        }
    }
};

inline void __syncthreads() {
    cuda_emulation::sync_threads(false);
}

inline int __syncthreads_or(int vote) {
    return cuda_emulation::sync_threads(vote != 0);
}

inline void __trap() {
    cuda_emulation::trap();
}

inline void __syncwarp() {
    cuda_emulation::sync_warp();
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return cuda_emulation::shuffle_xor(value, mask);
}
