// CPU forward of GGML_OP_DELTAMEM: spreads (sequence, head) pairs over the threads. Compiled into ggml-cpu, and so once
// per CPU variant with that variant's flags.

#include "deltamem-cpu.h"

#include "deltamem-kernel.h"
#include "ggml-cpu-impl.h"

void ggml_compute_forward_deltamem(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * proj      = dst->src[0];
    const struct ggml_tensor * gate_bias = dst->src[1];
    const struct ggml_tensor * state     = dst->src[2];
    const struct ggml_tensor * plan      = dst->src[3];

    const struct ggml_deltamem_params p = ggml_deltamem_get_params(dst);

    const int32_t * seqs    = (const int32_t *) plan->data;
    const int32_t * entries = seqs + (int64_t) GGML_DELTAMEM_PLAN_SEQ*p.n_seqs;

    const int64_t n_record = ggml_deltamem_n_record(&p);
    const int64_t n_items  = (int64_t) p.n_seqs*p.n_head;

    for (int64_t item = params->ith; item < n_items; item += params->nth) {
        const int64_t head  = item % p.n_head;
        const int32_t * seq = seqs + GGML_DELTAMEM_PLAN_SEQ*(item / p.n_head);

        const int32_t slot = seq[0];
        GGML_ASSERT(slot >= 0 && slot < state->ne[1]);
        GGML_ASSERT(seq[1] >= 0 && seq[2] >= 0 && (int64_t) seq[1] + seq[2] <= dst->ne[1]);

        struct deltamem_head_args args;
        args.params      = p;
        args.head        = (int32_t) head;
        args.proj        = (const float *) proj->data;
        args.proj_stride = proj->nb[1]/sizeof(float);
        args.gate_bias   = (const float *) gate_bias->data;
        args.record      = (float *) ((char *) state->data + slot*state->nb[1]) + head*n_record;
        args.read        = (float *) dst->data;
        args.read_stride = dst->nb[1]/sizeof(float);
        args.entries     = entries + (int64_t) GGML_DELTAMEM_PLAN_TOKEN*seq[1];
        args.n_entries   = seq[2];

        deltamem_head_forward(&args);
    }
}
