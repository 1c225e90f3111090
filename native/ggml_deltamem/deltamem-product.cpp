// The products of GGML_OP_DELTAMEM on a CPU: corrections, by columns of the weights or by rows, and the projection that is
// computed with a read.

#include "deltamem-kernel.h"

#include "deltamem-pairs.h"
#include "deltamem-simd.h"

#include <algorithm>
#include <type_traits>

#if defined(DELTAMEM_AVX512) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
    #define DELTAMEM_TILES
    #include <sys/syscall.h>
    #include <unistd.h>
#endif

namespace deltamem {

//
// corrections by columns
//

// n vectors of outputs of T tokens, in registers for all columns of the correction; W is the type of the weights
template <typename V, int n, int T, typename W>
static inline void correct_block(const deltamem_correct_args & args, int64_t t0, int64_t i) {
    // acc = out + added
    V acc[T][n];
    for (int t = 0; t < T; ++t) {
        const float * out = args.out + (t0 + t) * args.out_stride + i;
        for (int b = 0; b < n; ++b) {
            acc[t][b] = V::load(out + b * V::width);
        }
        if (args.added) {
            const float * added = args.added + (t0 + t) * args.added_stride + i;
            for (int b = 0; b < n; ++b) {
                acc[t][b] = acc[t][b] + V::load(added + b * V::width);
            }
        }
    }
    // acc <- acc + weight_:,j read_j
    const float * read = args.read + t0 * args.read_stride;
    for (int64_t j = 0; j < args.n_read; ++j) {
        const W * w = (const W *) args.weight + j * args.weight_stride + i;
        V         column[n];
        for (int b = 0; b < n; ++b) {
            column[b] = V::load(w + b * V::width);
        }
        for (int t = 0; t < T; ++t) {
            const V x = V::splat(read[t * args.read_stride + j]);
            for (int b = 0; b < n; ++b) {
                acc[t][b] = V::fma(column[b], x, acc[t][b]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int b = 0; b < n; ++b) {
            acc[t][b].store(args.dst + (t0 + t) * args.dst_stride + i + b * V::width);
        }
    }
}

template <int T, typename W> static void correct_tokens(const deltamem_correct_args & args, int64_t t) {
    int64_t i = 0;
    for (; i + 4 * wide::width <= args.n_out; i += 4 * wide::width) {
        correct_block<wide, 4, T, W>(args, t, i);
    }
    for (; i + narrow::width <= args.n_out; i += narrow::width) {
        correct_block<narrow, 1, T, W>(args, t, i);
    }
    for (; i < args.n_out; ++i) {
        correct_block<scalar, 1, T, W>(args, t, i);
    }
}

template <typename W> static void correct(const deltamem_correct_args & args) {
    constexpr int T = wide::width == 16 ? 4 : 2; // as many as 32 or 16 registers hold sums of

    int64_t t = 0;
    for (; t + T <= args.n_tokens; t += T) {
        correct_tokens<T, W>(args, t);
    }
    for (; t < args.n_tokens; ++t) {
        correct_tokens<1, W>(args, t);
    }
}

//
// products by rows
//

static constexpr int SUMS = 4; // of a dot product, so that additions do not wait for each other

// the sum over the lanes of all sums
static inline float sum_of(const wide (&acc)[SUMS]) {
    alignas(64) float lanes[wide::width];
    ((acc[0] + acc[1]) + (acc[2] + acc[3])).store(lanes);
    narrow lower = narrow::load(lanes);
    for (int j = narrow::width; j < wide::width; j += narrow::width) {
        lower = lower + narrow::load(lanes + j);
    }
    return lower.sum();
}

// Σ_i w_i x_i
template <typename W> static float dot(const W * w, const float * x, int64_t n) {
    wide acc[SUMS] = { wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f) };

    int64_t i = 0;
    for (; i + SUMS * wide::width <= n; i += SUMS * wide::width) {
        for (int b = 0; b < SUMS; ++b) {
            acc[b] = wide::fma(wide::load(w + i + b * wide::width), wide::load(x + i + b * wide::width), acc[b]);
        }
    }
    for (; i + wide::width <= n; i += wide::width) {
        acc[0] = wide::fma(wide::load(w + i), wide::load(x + i), acc[0]);
    }

    float sum = sum_of(acc);
    for (; i < n; ++i) {
        sum += scalar::load(w + i).v * x[i];
    }
    return sum;
}

// Σ_i q_i x_i for a block
static inline wide block_dot(const q8_0 & w, const float * x) {
    wide sum = wide::load(w.q) * wide::load(x);
    for (int i = wide::width; i < q8_0::n; i += wide::width) {
        sum = wide::fma(wide::load(w.q + i), wide::load(x + i), sum);
    }
    return sum;
}

// Σ_blocks d Σ_i q_i x_i
static float dot(const q8_0 * w, const float * x, int64_t n) {
    const int64_t n_blocks = n / q8_0::n;

    wide acc[SUMS] = { wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f), wide::splat(0.0f) };

    int64_t i = 0;
    for (; i + SUMS <= n_blocks; i += SUMS) {
        for (int b = 0; b < SUMS; ++b) {
            acc[b] = wide::fma(block_dot(w[i + b], x + (i + b) * q8_0::n), wide::splat(w[i + b].d), acc[b]);
        }
    }
    for (; i < n_blocks; ++i) {
        acc[0] = wide::fma(block_dot(w[i], x + i * q8_0::n), wide::splat(w[i].d), acc[0]);
    }
    return sum_of(acc);
}

static constexpr size_t AHEAD =
        2048; // bytes by which blocks are prefetched; of other weights the processor does as well

// dst = out + added + weight in, row by row: the first token loads a row's weights from memory, the others find them in
// the cache.
template <typename W> static void product(const deltamem_product_args & args) {
    for (int64_t row = 0; row < args.n_out; ++row) {
        const W * w = (const W *) args.weight + row * args.weight_stride;
        if constexpr (std::is_same_v<W, q8_0>) {
            prefetch((const char *) w + AHEAD, args.weight_stride * sizeof(W));
        }
        for (int64_t t = 0; t < args.n_tokens; ++t) {
            float sum = args.out ? args.out[t * args.out_stride + row] : 0.0f;
            if (args.added) {
                sum += args.added[t * args.added_stride + row];
            }
            args.dst[t * args.dst_stride + row] = sum + dot(w, args.in + t * args.in_stride, args.n_in);
        }
    }
}

//
// products by tiles
//

#if defined(DELTAMEM_TILES)
// Tiles of AMX: 16 tokens or 16 outputs by 32 inputs in bfloat16, 16 tokens by 16 outputs in float32. A tile of weights
// has pairs of inputs as rows and outputs as columns.
class tiles {
public:
    void forward(const deltamem_product_args & args, int ith, int nth) {
        load_config();

        // many tokens: more outputs at a time, so that inputs are packed less often
        const int64_t width = args.n_tokens > BLOCK ? WIDTH : BLOCK;

        for (int64_t k = 0; k < args.n_in; k += DEPTH) {
            const int n_steps = (int) std::min<int64_t>(DEPTH, args.n_in - k) / K;

            // blocks of outputs by blocks of tokens, in this order
            const int64_t n_blocks = (args.n_tokens + BLOCK - 1) / BLOCK;
            const int64_t n_items  = (args.n_out + width - 1) / width * n_blocks;
            const int64_t begin    = n_items * ith / nth;
            for (int64_t item = begin; item < n_items * (ith + 1) / nth; ++item) {
                const int64_t i0 = item / n_blocks * width, i1 = std::min(i0 + width, args.n_out);
                const int64_t t0 = item % n_blocks * BLOCK;
                if (t0 == 0 || item == begin) {
                    pack_weights(args, i0, i1, k, n_steps);
                }
                pack_inputs(args, t0, k, n_steps);
                for (int64_t i = i0; i < i1; i += BLOCK) {
                    multiply(n_steps, (int) (i - i0) / N, t0 + N < args.n_tokens);
                    store(args, i, t0, k == 0);
                }
            }
        }
    }

private:
    static constexpr int N = 16, K = 32, BLOCK = 2 * N, WIDTH = 128;
    static constexpr int DEPTH = 384; // inputs at a time

    using tile = uint32_t[N][N]; // pairs of bfloat16

    // 126 KB, which the second-level cache holds
    alignas(64) tile weights[DEPTH / K][WIDTH / N];
    alignas(64) tile inputs[DEPTH / K][BLOCK / N];
    alignas(64) float sums[BLOCK][BLOCK];

    // ggml loads its own before each of its products (cmake/amx.cmake)
    static void load_config() {
        struct {
            uint8_t  palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = { 64, 64, 64, 64, 64, 64, 64, 64 };
            uint8_t  rows[16]  = { N, N, N, N, N, N, N, N };
        } config;
        static_assert(sizeof(config) == 64, "a tile configuration has 64 bytes");
        // not _tile_loadconfig: GCC up to 12.3 tells its optimiser that this reads 8 bytes
        __asm__ volatile("ldtilecfg\t%0" : : "m"(config));
    }

    // tiles of outputs [i0, i1), with zeros after the last
    void pack_weights(const deltamem_product_args & args, int64_t i0, int64_t i1, int64_t k, int n_steps) {
        for (int at = 0; i0 + at * N < i1; ++at) {
            for (int step = 0; step < n_steps; ++step) {
                __m512i row[N];
                for (int i = 0; i < N; ++i) {
                    const int64_t output = i0 + at * N + i;
                    row[i]               = _mm512_setzero_si512();
                    if (output < args.n_out) {
                        const q8_0 & w = ((const q8_0 *) args.weight)[output * args.weight_stride + k / K + step];
                        const wide   d = wide::splat(w.d);
                        row[i]         = pairs_of((d * wide::load(w.q)).v, (d * wide::load(w.q + N)).v);
                    }
                }
                transpose_pairs(row);
                for (int i = 0; i < N; ++i) {
                    _mm512_store_si512(weights[step][at][i], row[i]);
                }
            }
        }
    }

    void pack_inputs(const deltamem_product_args & args, int64_t t0, int64_t k, int n_steps) {
        for (int t = 0; t < BLOCK; ++t) {
            // a token too many repeats the last one, and nobody takes its sums
            const float * x = args.in + std::min(t0 + t, args.n_tokens - 1) * args.in_stride + k;
            for (int step = 0; step < n_steps; ++step) {
                _mm512_store_si512(inputs[step][t / N][t % N],
                                   pairs_of(_mm512_loadu_ps(x + step * K), _mm512_loadu_ps(x + step * K + N)));
            }
        }
    }

    // two tiles of outputs, tile `at` and the next, by one or two of tokens
    void multiply(int n_steps, int at, bool both) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int step = 0; step < n_steps; ++step) {
            _tile_loadd(4, inputs[step][0], sizeof(tile) / N);
            _tile_loadd(6, weights[step][at], sizeof(tile) / N);
            _tile_loadd(7, weights[step][at + 1], sizeof(tile) / N);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (both) {
                _tile_loadd(5, inputs[step][1], sizeof(tile) / N);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, &sums[0][0], sizeof(sums[0]));
        _tile_stored(1, &sums[0][N], sizeof(sums[0]));
        _tile_stored(2, &sums[N][0], sizeof(sums[0]));
        _tile_stored(3, &sums[N][N], sizeof(sums[0]));
    }

    // dst = out + added + sums, or dst + sums after the first inputs
    void store(const deltamem_product_args & args, int64_t i0, int64_t t0, bool first) const {
        const int64_t n_out = args.n_out;
        for (int64_t t = t0; t < std::min(t0 + BLOCK, args.n_tokens); ++t) {
            float * dst = args.dst + t * args.dst_stride;
            for (int64_t i = i0; i < std::min(i0 + BLOCK, n_out); i += N) {
                const __mmask16 mask = (__mmask16) (n_out - i < N ? (1 << (n_out - i)) - 1 : 0xffff);

                __m512 x = _mm512_load_ps(&sums[t - t0][i - i0]);
                if (!first) {
                    x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, dst + i));
                } else {
                    if (args.out) {
                        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, args.out + t * args.out_stride + i));
                    }
                    if (args.added) {
                        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, args.added + t * args.added_stride + i));
                    }
                }
                _mm512_mask_storeu_ps(dst + i, mask, x);
            }
        }
    }
};
#endif

} // namespace deltamem

void deltamem_correct_forward(const struct deltamem_correct_args * args) {
    if (args->half) {
        deltamem::correct<deltamem::float16>(*args);
    } else {
        deltamem::correct<float>(*args);
    }
}

void deltamem_product_forward(const struct deltamem_product_args * args) {
    switch (args->weights) {
        case DELTAMEM_WEIGHTS_F32:  deltamem::product<float>(*args); break;
        case DELTAMEM_WEIGHTS_F16:  deltamem::product<deltamem::float16>(*args); break;
        case DELTAMEM_WEIGHTS_Q8_0: deltamem::product<deltamem::q8_0>(*args); break;
    }
}

#if defined(DELTAMEM_TILES)
bool deltamem_has_tiles(void) {
    // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA: Linux lets a process use tiles that has asked for them
    static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return permitted;
}

void deltamem_tiles_forward(const struct deltamem_product_args * args, int ith, int nth) {
    static thread_local deltamem::tiles tiles;
    tiles.forward(*args, ith, nth);
}
#else
bool deltamem_has_tiles(void) {
    return false;
}

void deltamem_tiles_forward(const struct deltamem_product_args *, int, int) {}
#endif
