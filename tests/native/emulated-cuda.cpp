// The functions of deltamem-kernel.h by the CUDA kernels, run on the CPU: test-kernel.cpp linked with this tests them.

#include "cuda-emulation.h"
#include "deltamem-kernel.h"

static inline float to_float(float x) {
    return x;
}

#include "deltamem-cuda-kernel.cuh"

#include <algorithm>

using namespace deltamem;

alignas(16) float4 deltamem::deltamem_shared[cuda_emulation::MAX_SHARED / sizeof(float4)];

template <int R, bool SEGMENTS> static void run_read(cuda_read_args & args, int head, int64_t n_tokens) {
    const ggml_deltamem_params & p = args.params;

    if (n_tokens == 1 && p.n_head == 1 && R == 8) {
        // a projection whose result is the column: its first weights are the column's values, its input is (1, 0, ..)
        constexpr int      n_embd = 8;
        std::vector<float> weight(args.n_proj * n_embd + 4, 0.0f), input(n_embd + 4, 0.0f);
        const auto aligned = [](std::vector<float> & x) { return (float *) (((uintptr_t) x.data() + 15) / 16 * 16); };

        const int * entry = args.plan + GGML_DELTAMEM_PLAN_SEQ * p.n_seqs;
        for (int row = 0; row < args.n_proj; ++row) {
            aligned(weight)[row * n_embd] = args.proj[entry[0] * args.proj_stride + row];
        }
        aligned(input)[0] = 1.0f;

        const size_t shared = (n_embd + round_up(args.n_proj, 4) + args.layout.size) * sizeof(float);
        cuda_emulation::launch({ 1, 1 }, { PROJECT_WARPS * WARP }, deltamem_shared, shared, [&] {
            project_read_kernel<float, 8, SEGMENTS>(aligned(weight), n_embd, aligned(input), n_embd, args);
        });
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
    args.prepare(params, head->n_entries);
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

void deltamem_correct_forward(const deltamem_correct_args * a) {
    cuda_correct_args args = {};
    args.out               = a->out;
    args.out_stride        = a->out_stride;
    args.weight_stride     = a->weight_stride;
    args.read              = a->read;
    args.read_stride       = a->read_stride;
    args.dst               = a->dst;
    args.dst_stride        = a->dst_stride;
    args.n_out             = (int) a->n_out;
    args.n_read            = (int) a->n_read;
    args.n_tokens          = (int) a->n_tokens;

    args.for_shape(a->weight, [&](auto outputs, auto tokens) {
        constexpr int V = decltype(outputs)::value, T = decltype(tokens)::value;
        const dim3    grid = { (unsigned) args.n_blocks_x<V, T>(), (unsigned) args.n_blocks_y<V, T>() };
        cuda_emulation::launch(grid, { CORRECT_THREADS }, deltamem_shared, T * CORRECT_COLUMNS * sizeof(float),
                               [&] { correct_kernel<float, V, T>(a->weight, args); });
    });
}

const char * deltamem_simd_name(void) {
    return "CUDA";
}
