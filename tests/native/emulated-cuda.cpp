// The functions of deltamem-kernel.h by the CUDA kernels, run on the CPU: test-kernel.cpp linked with this tests them.

#include "cuda-emulation.h"
#include "deltamem-kernel.h"
#include "deltamem-simd.h"

static inline float to_float(float x) {
    return x;
}

static inline float to_float(deltamem::float16 x) {
    return widen(x);
}

#include "deltamem-cuda-kernel.cuh"

#include <algorithm>
#include <climits>
#include <cstdlib>

using namespace deltamem;

alignas(16) float4 deltamem::deltamem_shared[cuda_emulation::MAX_SHARED / sizeof(float4)];

// values that begin where CUDA's loads of 16 bytes may
template <typename T> class aligned_values {
public:
    explicit aligned_values(size_t n) : all(n + 16 / sizeof(T)) {}

    T * data() { return (T *) (((uintptr_t) all.data() + 15) / 16 * 16); }

    T & operator[](size_t i) { return data()[i]; }

private:
    std::vector<T> all;
};

// x as a weight, rounded towards zero
static void narrow_to(float x, float & to) {
    to = x;
}

static void narrow_to(float x, float16 & to) {
    if (!(std::fabs(x) < 65536.0f)) {
        to.bits = 0x7e00; // NaN, which equals nothing
        return;
    }
    const int exponent = x == 0.0f ? -14 : std::max(-14, std::ilogb(x));
    const int mantissa = (int) std::ldexp(std::fabs(x), 10 - exponent);
    to.bits            = (uint16_t) ((x < 0.0f ? 0x8000 : 0) + ((exponent + 14) << 10) + mantissa);
}

// A projection whose result is the column, to the bit, although every input and nearly all weights count: in the lanes' first
// eights of weights products cancel, and the last eight has the value in parts that one type of weights can hold. Returns
// false if they cannot, with nothing done.
template <typename W, bool SEGMENTS> static bool run_project_read(const cuda_read_args & args, const float * column) {
    constexpr int n_embd = 520, last = n_embd - 8; // two eights for every lane and a third for the first

    aligned_values<W>     weight((size_t) args.n_proj * n_embd);
    aligned_values<float> input(n_embd);
    for (int i = 0; i < n_embd; ++i) {
        input[i] = i < last ? std::ldexp(1.0f, i % 3) : std::ldexp(1.0f, -11 * (i - last));
    }
    for (int row = 0; row < args.n_proj; ++row) {
        W * weights = &weight[(size_t) row * n_embd];
        for (int i = 0; i < last; i += 2) {
            const float product = (float) ((7 * row + i) % 23 - 11);
            narrow_to(product / input[i], weights[i]);
            narrow_to(-product / input[i + 1], weights[i + 1]);
        }
        float rest = column[row];
        for (int i = last; i < n_embd; ++i) {
            const bool is_part = i < last + (sizeof(W) == 2 ? 3 : 1);
            narrow_to(is_part ? rest / input[i] : 0.0f, weights[i]);
            rest -= is_part ? to_float(weights[i]) * input[i] : 0.0f;
        }
        if (sizeof(W) == 2 && rest != 0.0f) {
            return false;
        }
    }

    const size_t shared = (n_embd + round_up(args.n_proj, 4) + args.layout.size) * sizeof(float);
    cuda_emulation::launch({ 1, 1 }, { PROJECT_WARPS * WARP }, deltamem_shared, shared, [&] {
        project_read_kernel<W, 8, SEGMENTS>(weight.data(), n_embd, input.data(), n_embd, args);
    });
    return true;
}

template <int R, bool SEGMENTS> static void run_read(cuda_read_args & args, int head, int64_t n_tokens) {
    const ggml_deltamem_params & p = args.params;

    if (n_tokens == 1 && p.n_head == 1 && R == 8) {
        const int * entry  = args.plan + GGML_DELTAMEM_PLAN_SEQ * p.n_seqs;
        const auto  column = args.proj + entry[0] * args.proj_stride;
        if (!run_project_read<float16, SEGMENTS>(args, column)) {
            run_project_read<float, SEGMENTS>(args, column);
        }
        return;
    }

    // the grid of one head; other sequences have nothing to do
    const unsigned threads = (args.n_recur_warps + args.n_stage_warps) * WARP;
    cuda_emulation::launch({ 1, (unsigned) p.n_seqs }, { threads }, deltamem_shared, args.layout.size * sizeof(float),
                           [&] {
                               blockIdx.x = head;
                               read_kernel<R, SEGMENTS>(args);
                           });
}

void deltamem_head_forward(const deltamem_head_args * head) {
    // the sequence is the second of two, unless it could be fused
    const bool    fused = head->n_entries == 1 && head->params.n_head == 1 && head->params.rank == 8;
    constexpr int n     = 2;

    ggml_deltamem_params params = head->params;
    params.n_seqs               = fused ? 1 : n;

    cuda_read_args args = {};
    args.prepare(params, head->n_entries); // the other sequence is empty
    args.proj        = head->proj;
    args.proj_stride = head->proj_stride;
    args.gate_bias   = head->gate_bias;
    args.read        = head->read;
    args.read_stride = head->read_stride;

    // slots: one per sequence, then those of the checkpoints
    int n_checkpoints = 0;
    for (int64_t i = 0; i < head->n_entries; ++i) {
        n_checkpoints = std::max(n_checkpoints, GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(head->entries[2 * i + 1]) + 1);
    }
    const size_t       n_record = args.n_record, at = head->head * n_record, stride = params.n_head * n_record;
    std::vector<float> state((params.n_seqs + n_checkpoints) * stride);
    const int          slot = fused ? 0 : 1;
    std::copy(head->record, head->record + n_record, state.begin() + slot * stride + at);
    for (int i = 0; i < n_checkpoints; ++i) {
        const float * kept = head->slots + i * head->slot_stride;
        std::copy(kept, kept + n_record, state.begin() + (params.n_seqs + i) * stride + at);
    }
    args.state       = state.data();
    args.slot_stride = stride;
    args.n_slots     = params.n_seqs + n_checkpoints;
    args.n_tokens    = INT_MAX; // the columns are the caller's business

    std::vector<int> plan;
    for (int seq = 0; seq < params.n_seqs; ++seq) {
        plan.insert(plan.end(), { seq, 0, seq == slot ? (int) head->n_entries : 0 });
    }
    for (int64_t i = 0; i < head->n_entries; ++i) {
        const int32_t * entry = head->entries + GGML_DELTAMEM_PLAN_TOKEN * i;
        const int32_t   kept  = GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(entry[1]);
        plan.insert(plan.end(),
                    { entry[0],
                      kept < 0 ? entry[1] : (entry[1] & 0xff) | GGML_DELTAMEM_TOKEN_CHECKPOINT(kept + params.n_seqs) });
    }
    args.plan = plan.data();

    for_rank(params, [&](auto rank, auto segments) {
        run_read<rank.value, segments.value>(args, head->head, head->n_entries);
    });

    std::copy_n(state.begin() + slot * stride + at, n_record, head->record);
    for (int i = 0; i < n_checkpoints; ++i) {
        std::copy_n(state.begin() + (params.n_seqs + i) * stride + at, n_record, head->slots + i * head->slot_stride);
    }
}

// What the kernel says: it ends before it follows a plan that does not fit, or it touches nothing but the tensors.
bool deltamem_sequence_fits(const int32_t * plan, int64_t n_seqs, int64_t i, int64_t n_tokens, int64_t n_slots) {
    ggml_deltamem_params params = {};
    params.rank                 = 8;
    params.n_head               = 1;
    params.n_seqs               = (int32_t) n_seqs;
    params.flags                = GGML_DELTAMEM_RANKWISE_GATES;

    cuda_read_args args = {};
    args.prepare(params, n_tokens);

    std::vector<float> proj(n_tokens * args.n_proj), bias(8), state(n_slots * args.n_record), read(n_tokens * 8);
    args.proj        = proj.data();
    args.proj_stride = args.n_proj;
    args.gate_bias   = bias.data();
    args.state       = state.data();
    args.slot_stride = args.n_record;
    args.n_slots     = (int) n_slots;
    args.n_tokens    = (int) n_tokens;
    args.plan        = plan;
    args.read        = read.data();
    args.read_stride = 8;

    cuda_emulation::launch({ 1, 1 }, { (unsigned) (args.n_recur_warps + args.n_stage_warps) * WARP }, deltamem_shared,
                           args.layout.size * sizeof(float), [&] {
                               blockIdx.y = (unsigned) i;
                               read_kernel<8, false>(args);
                           });
    return !cuda_emulation::trapped;
}

template <typename W> static void run_correct_strided(const deltamem_correct_args * a) {
    const W *         weight = (const W *) a->weight;
    cuda_correct_args args   = {};
    args.out                 = a->out;
    args.out_stride          = a->out_stride;
    args.weight_stride       = a->weight_stride;
    args.read                = a->read;
    args.read_stride         = a->read_stride;
    args.dst                 = a->dst;
    args.dst_stride          = a->dst_stride;
    args.n_out               = (int) a->n_out;
    args.n_read              = (int) a->n_read;
    args.n_tokens            = (int) a->n_tokens;

    args.for_shape(weight, [&](auto outputs, auto tokens) {
        constexpr int V = decltype(outputs)::value, T = decltype(tokens)::value;
        const dim3    grid = { (unsigned) args.n_blocks_x<V, T>(), (unsigned) args.n_blocks_y<V, T>() };
        cuda_emulation::launch(grid, { CORRECT_THREADS }, deltamem_shared, T * CORRECT_COLUMNS * sizeof(float),
                               [&] { correct_kernel<W, V, T>(weight, args); });
    });
}

// Where four outputs may be taken at a time, all is copied to where they are.
template <typename W> static void run_correct(const deltamem_correct_args * a) {
    if (a->n_out % 4 != 0) {
        return run_correct_strided<W>(a);
    }
    aligned_values<W>     weight(a->n_read * a->n_out);
    aligned_values<float> out(a->n_tokens * a->n_out);
    for (int64_t j = 0; j < a->n_read; ++j) {
        std::copy_n((const W *) a->weight + j * a->weight_stride, a->n_out, &weight[j * a->n_out]);
    }
    for (int64_t t = 0; t < a->n_tokens; ++t) {
        std::copy_n(a->out + t * a->out_stride, a->n_out, &out[t * a->n_out]);
    }
    deltamem_correct_args moved = *a;
    moved.weight                = weight.data();
    moved.out = moved.dst = out.data();
    moved.weight_stride = moved.out_stride = moved.dst_stride = a->n_out;
    run_correct_strided<W>(&moved);
    for (int64_t t = 0; t < a->n_tokens; ++t) {
        std::copy_n(&out[t * a->n_out], a->n_out, a->dst + t * a->dst_stride);
    }
}

void deltamem_correct_forward(const deltamem_correct_args * args) {
    if (args->half) {
        run_correct<float16>(args);
    } else {
        run_correct<float>(args);
    }
}

// no kernel of its own: a part of the one that reads
void deltamem_product_forward(const deltamem_product_args *) {
    abort();
}

void deltamem_tiles_forward(const deltamem_product_args *, int, int) {
    abort();
}

bool deltamem_has_tiles() {
    return false;
}

const char * deltamem_simd_name(void) {
    return "CUDA";
}
