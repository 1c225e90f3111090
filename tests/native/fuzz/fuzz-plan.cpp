// libFuzzer: plans of any content. What deltamem_sequence_fits lets pass, the kernel computes within its tensors, which end
// where the address sanitizer sees it, and leaves the slots alone that the plan does not name.

#include "deltamem-kernel.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// Small numbers in a byte, others in the four behind a byte of 240 and up; zeros at the end.
class numbers {
public:
    numbers(const uint8_t * data, size_t size) : at(data), end(data + size) {}

    int below(int n) { return byte() % n; }

    int32_t any() {
        const int small = byte();
        if (small < 240) {
            return small - 8;
        }
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i) {
            value = value << 8 | byte();
        }
        return (int32_t) value;
    }

private:
    const uint8_t * at;
    const uint8_t * end;

    uint8_t byte() { return at < end ? *at++ : 0; }
};

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const int   ranks[]  = { 8, 16, 1, 5, 24, 64 };
    static const float values[] = { 0.0f, 1.0f, -2.5f, 1e-30f, -1e30f, NAN, INFINITY };

    numbers from(data, size);

    ggml_deltamem_params p = {};
    p.rank                 = ranks[from.below(6)];
    p.n_head               = 1 + from.below(3);
    p.n_seqs               = 1 + from.below(3);
    p.lambda               = from.below(3);
    p.flags                = from.below(32);
    if (p.flags & GGML_DELTAMEM_SEGMENTS) {
        p.flags &= ~GGML_DELTAMEM_DEFERRED; // GGML_ASSERT
    }

    const int64_t n_tokens = from.below(70), n_slots = 1 + from.below(6);
    const int64_t n_record = ggml_deltamem_n_record(&p), n_slot = p.n_head * n_record;
    const int64_t n_proj = ggml_deltamem_n_proj(&p), n_read = (int64_t) p.n_head * p.rank;
    const float   extreme = values[from.below(7)];

    std::vector<int32_t> plan(ggml_deltamem_n_plan(p.n_seqs, n_tokens));
    for (int32_t & number : plan) {
        number = from.any();
    }
    std::vector<float> proj(n_tokens * n_proj), bias(ggml_deltamem_n_gates(&p), 0.5f), state(n_slots * n_slot),
            read(n_tokens * n_read);
    for (size_t i = 0; i < proj.size(); ++i) {
        proj[i] = i % 11 == 0 ? extreme : (float) (i % 7) - 3.0f;
    }
    for (size_t i = 0; i < state.size(); ++i) {
        state[i] = (float) (i % 5) * 0.1f;
    }
    const std::vector<float> before = state;

    std::vector<bool> named(n_slots, false);
    for (int64_t i = 0; i < p.n_seqs; ++i) {
        if (!deltamem_sequence_fits(plan.data(), p.n_seqs, i, n_tokens, n_slots)) {
            continue; // GGML_ASSERT
        }
        const int32_t * seq = plan.data() + GGML_DELTAMEM_PLAN_SEQ * i;

        deltamem_head_args args = {};
        args.params             = p;
        args.proj               = proj.data();
        args.proj_stride        = n_proj;
        args.gate_bias          = bias.data();
        args.slot_stride        = n_slot;
        args.read               = read.data();
        args.read_stride        = n_read;
        args.entries   = plan.data() + GGML_DELTAMEM_PLAN_SEQ * p.n_seqs + GGML_DELTAMEM_PLAN_TOKEN * (int64_t) seq[1];
        args.n_entries = seq[2];
        for (args.head = 0; args.head < p.n_head; ++args.head) {
            args.slots  = state.data() + args.head * n_record;
            args.record = args.slots + seq[0] * n_slot;
            deltamem_head_forward(&args);
        }
        named[seq[0]] = true;
        for (int64_t e = 0; e < args.n_entries; ++e) {
            const int32_t slot = GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(args.entries[GGML_DELTAMEM_PLAN_TOKEN * e + 1]);
            if (slot >= 0) {
                named[slot] = true;
            }
        }
    }
    for (int64_t slot = 0; slot < n_slots; ++slot) {
        if (!named[slot] && memcmp(&state[slot * n_slot], &before[slot * n_slot], n_slot * sizeof(float)) != 0) {
            fprintf(stderr, "slot %d was written and is not in the plan\n", (int) slot);
            abort();
        }
    }
    return 0;
}
