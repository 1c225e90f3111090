// Tests the composite of deltamem-composite.h against the naive reference and, on the CPU, against the operator.
//
//     test-composite        the CPU
//     test-composite gpu    every GPU that computes all nodes of the composite; exits with 77 if there is none
//     test-composite metal  what a Metal device would get, on the CPU, each node by ggml-metal's rules; exits with 77 if
//                           its source is not here
//     test-composite time   tests nothing: how much longer than the operator it takes on one core

#include "deltamem-composite.h"
#include "reference.h"
#include "shape.h"
#include "testing.h"

#ifdef DELTAMEM_METAL_RULES
    #include "metal-device.h"
#endif

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>

struct freeing {
    void operator()(ggml_context * c) const { ggml_free(c); }
    void operator()(ggml_backend_buffer * b) const { ggml_backend_buffer_free(b); }
    void operator()(ggml_gallocr * g) const { ggml_gallocr_free(g); }
};

using context_ptr = std::unique_ptr<ggml_context, freeing>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, freeing>;
using galloc_ptr  = std::unique_ptr<ggml_gallocr, freeing>;

static std::vector<float> values(const ggml_tensor * t) {
    std::vector<float> x(ggml_nelements(t));
    ggml_backend_tensor_get(t, x.data(), 0, ggml_nbytes(t));
    return x;
}

static void set(ggml_tensor * t, const void * data) {
    ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
}

// Whether the rows of a source begin where ggml-metal's kernels want them that take four floats at once: they are chosen by
// the length of a row alone.
static bool is_aligned_for_metal(const ggml_tensor * node) {
    const bool binary = node->op == GGML_OP_ADD || node->op == GGML_OP_MUL || node->op == GGML_OP_DIV;
    const bool unary  = node->op == GGML_OP_UNARY || node->op == GGML_OP_SCALE || node->op == GGML_OP_CLAMP ||
                        node->op == GGML_OP_L2_NORM;
    if (!binary && !unary) {
        return true;
    }
    const int n = binary ? 2 : 1;
    for (int i = 0; i < n; ++i) {
        if (node->src[i]->ne[0] % 4 != 0) {
            return true;
        }
    }
    for (int i = 0; i < n; ++i) {
        const ggml_tensor * src = node->src[i];
        for (const size_t at : { src->view_offs, src->nb[1], src->nb[2], src->nb[3] }) {
            if (at % (4 * sizeof(float)) != 0) {
                return false;
            }
        }
    }
    return true;
}

// Several batches in a row over the same slots, computed by `backend`; `device` must take each node. With segments, ingests
// begin and end anywhere, also in another batch than they began in, and some sequences write token by token. With `any_bits`,
// tokens do what no context asks for, such as to write within an ingest that another batch commits.
class conversation {
public:
    conversation(ggml_backend_t backend, ggml_backend_dev_t device, const shape & s, int width, double tol,
                 bool with_kernel) :
        backend(backend),
        device(device),
        s(s),
        width(width),
        tol(tol),
        random(s.rank + 100 * s.n_head + 1000 * s.n_seqs + s.n_tokens + s.flags + 64 * s.lambda + width),
        with_kernel(with_kernel),
        p(params_of(s)) {
        snprintf(name, sizeof(name), "%s, rank %d, heads %d, sequences %d, tokens %d, lambda %d, flags %d, width %d",
                 ggml_backend_dev_name(device), s.rank, s.n_head, s.n_seqs, s.n_tokens, s.lambda, s.flags, width);

        n_slots = s.n_seqs + s.n_checkpoints + 2;
        n_row   = s.n_head * ggml_deltamem_n_record(&p);

        ctx.reset(ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true }));
        for (ggml_tensor *& t : state) {
            t = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_row + PADDING, n_slots);
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));

        now.assign(n_slots * (n_row + PADDING), guard_value());
        for (int slot = 0; slot < n_slots; ++slot) {
            float * row = &now[slot * (n_row + PADDING)];
            std::fill(row, row + n_row, 0.0f);
            for (int head = 0; head < s.n_head; ++head) {
                for (int i = 0; i < s.rank * s.rank; ++i) {
                    row[head * ggml_deltamem_n_record(&p) + i] = 0.5f * random.normal();
                }
            }
        }
        set_states();
        open.assign(s.n_seqs, false);
        filled.assign(s.n_seqs, false);
        for (int i = 0; i < n_slots; ++i) {
            slots.push_back(i);
        }
        random.shuffle(slots);
    }

    // `infected`: a sequence of whose projections one is not finite, which no other one may notice; -1: none
    void batch(int n_tokens, bool any_bits = false, int infected = -1) {
        const std::vector<int32_t> plan = make_plan(n_tokens, any_bits);

        std::vector<float> proj_data(ggml_deltamem_n_proj(&p) * n_tokens), bias_data(ggml_deltamem_n_gates(&p));
        const int64_t      n_qk = 2 * s.n_head * s.rank;
        for (size_t i = 0; i < proj_data.size(); ++i) {
            const bool raw = (int64_t) i % ggml_deltamem_n_proj(&p) < n_qk && !(s.flags & GGML_DELTAMEM_NORMALIZE_QK);
            proj_data[i]   = raw ? random.normal() / sqrtf((float) s.rank) / 2 : random.normal();
        }
        for (float & b : bias_data) {
            b = random.normal();
        }
        if (s.n_tokens > 60) { // gates that are all but closed or open
            for (int64_t i = 3 * s.n_head * s.rank; i < ggml_deltamem_n_proj(&p); ++i) {
                proj_data[i] = 90.0f * random.sign();
            }
        }

        if (infected >= 0) {
            const int32_t entry = plan[GGML_DELTAMEM_PLAN_SEQ * infected + 1];
            const int32_t token = plan[GGML_DELTAMEM_PLAN_SEQ * s.n_seqs + GGML_DELTAMEM_PLAN_TOKEN * entry];
            std::fill_n(&proj_data[token * ggml_deltamem_n_proj(&p)], ggml_deltamem_n_proj(&p), NAN);
        }

        const ggml_deltamem_schedule schedule = ggml_deltamem_make_schedule(p, plan.data(), n_tokens);

        context_ptr nodes(
                ggml_init({ (GGML_DELTAMEM_COMPOSITE_NODES + 64) * ggml_tensor_overhead() + ggml_graph_overhead(),
                            nullptr, true }));
        const auto input = [&](ggml_type type, int64_t n, int64_t rows) {
            ggml_tensor * t = ggml_new_tensor_2d(nodes.get(), type, n, rows);
            ggml_set_input(t);
            return t;
        };
        ggml_tensor * proj   = input(GGML_TYPE_F32, ggml_deltamem_n_proj(&p), n_tokens);
        ggml_tensor * bias   = input(GGML_TYPE_F32, (int64_t) bias_data.size(), 1);
        ggml_tensor * plan_t = input(GGML_TYPE_I32, (int64_t) plan.size(), 1);

        const auto inputs = ggml_deltamem_new_composite_inputs(nodes.get(), schedule);
        const auto rows   = [&](ggml_tensor * t) { return ggml_view_2d(nodes.get(), t, n_row, n_slots, t->nb[1], 0); };
        const auto result = ggml_deltamem_composite(nodes.get(), proj, bias, rows(state[0]), inputs, p, width);
        ggml_set_output(result.reads);

        ggml_cgraph * graph = ggml_new_graph(nodes.get());
        ggml_build_forward_expand(graph, result.reads);
        ggml_build_forward_expand(graph, result.written);
        n_nodes = ggml_graph_n_nodes(graph);
        check(n_nodes <= GGML_DELTAMEM_COMPOSITE_NODES, "%s: %d nodes, more than was promised", name, n_nodes);
        for (int i = 0; i < n_nodes; ++i) {
            const ggml_tensor * node = ggml_graph_node(graph, i);
            check(ggml_backend_dev_supports_op(device, node), "%s: node %d, %s, is refused", name, i,
                  ggml_op_desc(node));
            check(is_aligned_for_metal(node), "%s: the rows of node %d, %s, begin anywhere", name, i,
                  ggml_op_desc(node));
        }

        ggml_tensor * kernel = nullptr;
        if (with_kernel) {
            kernel = ggml_deltamem(nodes.get(), proj, bias, rows(state[1]), plan_t, p);
            ggml_set_output(kernel);
            ggml_build_forward_expand(graph, kernel);
        }

        galloc_ptr galloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
        check(ggml_gallocr_alloc_graph(galloc.get(), graph), "%s: the graph cannot be allocated", name);
        set(proj, proj_data.data());
        set(bias, bias_data.data());
        if (kernel) {
            set(plan_t, plan.data());
        }
        ggml_deltamem_set_composite_inputs(inputs, schedule);
        check(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, "%s: computing failed", name);

        compare(plan, n_tokens, any_bits, infected, proj_data, bias_data, values(result.reads),
                kernel ? values(kernel) : std::vector<float>());
    }

    void report() const { printf("%-92s NMSE %.1e, %d nodes\n", name, worst, n_nodes); }

    int nodes() const { return n_nodes; }

private:
    static constexpr int PADDING = 7; // floats between the slots' rows

    ggml_backend_t       backend;
    ggml_backend_dev_t   device;
    shape                s;
    int                  width;
    double               tol, worst = 0.0;
    random_source        random;
    bool                 with_kernel;
    ggml_deltamem_params p;
    char                 name[200];
    int                  n_slots, n_nodes = 0;
    int64_t              n_row;
    context_ptr          ctx;
    buffer_ptr           buffer;
    ggml_tensor *        state[2]; // the composite's, the operator's
    std::vector<float>   now;      // what the composite's holds
    std::vector<int32_t> slots;
    std::vector<bool>    open, filled; // of each sequence: an ingest, a segment with tokens in it

    void set_states() {
        set(state[0], in_order(now, true).data());
        set(state[1], now.data());
    }

    // Slots with their sums in the composite's order, or from that in the operator's, which has a head's in its record.
    std::vector<float> in_order(const std::vector<float> & x, bool composite) const {
        if (!(s.flags & GGML_DELTAMEM_SEGMENTS)) {
            return x;
        }
        const int64_t n_record = ggml_deltamem_n_record(&p);
        const int64_t n_gate   = s.flags & GGML_DELTAMEM_RANKWISE_GATES ? s.rank : 1;
        const int64_t first    = 2 * s.rank * s.rank;
        const int64_t n_sum    = n_record - first - 1;

        std::vector<float> y = x;
        for (int slot = 0; slot < n_slots; ++slot) {
            int64_t flat = 0; // row of the packed projections
            int64_t part = 0; // row of a head's
            while (part < n_sum) {
                const int64_t n = part < 3 * s.rank ? s.rank : n_gate;
                for (int64_t head = 0; head < s.n_head; ++head) {
                    for (int64_t i = 0; i < n; ++i, ++flat) {
                        const int64_t row    = slot * (n_row + PADDING) + first;
                        const int64_t a      = row + flat / n_sum * n_record + flat % n_sum;
                        const int64_t b      = row + head * n_record + part + i;
                        y[composite ? a : b] = x[composite ? b : a];
                    }
                }
                part += n;
            }
        }
        return y;
    }

    // What a token may do besides reading, but end an ingest in which tokens wrote. `wrote`: they did since the pending state was
    // S, or -1 if that was in another batch.
    int32_t make_bits(int & wrote) {
        int32_t bits = random.below(32);
        if (bits & GGML_DELTAMEM_TOKEN_BEGIN) {
            wrote = 0;
        }
        if ((bits & GGML_DELTAMEM_TOKEN_WRITE) && wrote == 0) {
            wrote = 1;
        }
        if (wrote == 1) {
            bits &= ~GGML_DELTAMEM_TOKEN_COMMIT;
        }
        if (bits & GGML_DELTAMEM_TOKEN_COMMIT) {
            wrote = 0;
        }
        return bits;
    }

    std::vector<int32_t> make_plan(int n_tokens, bool any_bits) {
        const bool segments = (s.flags & GGML_DELTAMEM_SEGMENTS) != 0;

        std::vector<int32_t> columns, plan;
        for (int i = 0; i < n_tokens; ++i) {
            columns.push_back(i);
        }
        random.shuffle(columns);

        std::vector<int> counts(s.n_seqs, 0);
        for (int i = 0; i < n_tokens; ++i) {
            counts[i < s.n_seqs ? i : random.below(1 + random.below(s.n_seqs))]++;
        }
        for (int seq = 0, first = 0; seq < s.n_seqs; first += counts[seq++]) {
            plan.insert(plan.end(), { slots[seq], first, counts[seq] });
        }
        int n_left = s.n_checkpoints;
        for (int seq = 0, at = 0; seq < s.n_seqs; ++seq) {
            const bool by_token = segments && !open[seq] && random.chance(0.2f);
            int        wrote    = -1;
            for (int i = 0; i < counts[seq]; ++i, ++at) {
                int32_t bits = 0;
                if (any_bits) {
                    bits = make_bits(wrote);
                } else if (!segments || by_token) {
                    bits = random.chance(0.8f) ? GGML_DELTAMEM_TOKEN_WRITE : 0;
                } else {
                    if (!open[seq]) {
                        bits |= GGML_DELTAMEM_TOKEN_BEGIN;
                        open[seq]   = true;
                        filled[seq] = false;
                    }
                    if (filled[seq] && random.chance(0.2f)) {
                        bits |= GGML_DELTAMEM_TOKEN_SEGMENT;
                        filled[seq] = false;
                    }
                    if (random.chance(0.7f)) {
                        bits |= GGML_DELTAMEM_TOKEN_ACCUMULATE;
                        filled[seq] = true;
                    }
                    if (random.chance(0.15f)) {
                        bits |= GGML_DELTAMEM_TOKEN_COMMIT;
                        open[seq] = filled[seq] = false;
                    }
                }
                if (n_left > 0 && random.chance(0.4f)) {
                    bits |= GGML_DELTAMEM_TOKEN_CHECKPOINT(slots[s.n_seqs + --n_left]);
                }
                plan.insert(plan.end(), { columns[at], bits });
            }
        }
        return plan;
    }

    void compare(const std::vector<int32_t> & plan, int n_tokens, bool any_bits, int infected,
                 const std::vector<float> & proj_data, const std::vector<float> & bias_data,
                 const std::vector<float> & reads, const std::vector<float> & kernel_reads) {
        const bool   segments = (s.flags & GGML_DELTAMEM_SEGMENTS) != 0;
        const size_t n_record = ggml_deltamem_n_record(&p), n_state = (size_t) s.rank * s.rank;
        const size_t stride = n_row + PADDING, n_read = (size_t) s.n_head * s.rank;

        std::vector<float> after = in_order(values(state[0]), false), others = after, kernel_after = values(state[1]);
        nmse               e_reads, e_states, e_kernel;

        std::vector<double> expected(n_read * n_tokens);
        const int32_t *     entries = plan.data() + GGML_DELTAMEM_PLAN_SEQ * s.n_seqs;
        const auto          same    = [&](size_t at, size_t n, const double * record) {
            for (size_t i = 0; i < n; ++i) {
                e_states.add(after[at + i], record[i]);
                others[at + i] = now[at + i];
            }
        };
        for (int seq = 0; seq < s.n_seqs; ++seq) {
            const int32_t * range = plan.data() + GGML_DELTAMEM_PLAN_SEQ * seq;
            if (seq == infected) { // goes on as it was, and so do its checkpoints
                for (int e = range[1]; e < range[1] + range[2]; ++e) {
                    const int32_t * entry = entries + GGML_DELTAMEM_PLAN_TOKEN * e;
                    if (const int slot = GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(entry[1]); slot >= 0) {
                        std::copy_n(&now[slot * stride], n_row, &others[slot * stride]);
                        std::copy_n(&now[slot * stride], n_row, &after[slot * stride]);
                    }
                    std::fill_n(&expected[entry[0] * n_read], n_read, NAN);
                }
                std::copy_n(&now[range[0] * stride], n_row, &others[range[0] * stride]);
                std::copy_n(&now[range[0] * stride], n_row, &after[range[0] * stride]);
                open[seq] = filled[seq] = false;
                continue;
            }
            for (int head = 0; head < s.n_head; ++head) {
                const size_t   at = range[0] * stride + head * n_record;
                reference_head ref(p, head, &now[at]);
                for (int e = range[1]; e < range[1] + range[2]; ++e) {
                    const int32_t * entry = entries + GGML_DELTAMEM_PLAN_TOKEN * e;
                    ref.forward(proj_data.data(), ggml_deltamem_n_proj(&p), bias_data.data(), entry, 1, expected.data(),
                                n_read);
                    if (const int slot = GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(entry[1]); slot >= 0) {
                        const size_t kept = slot * stride + head * n_record;
                        same(kept, n_state, ref.record.data());
                        check(!segments || std::all_of(&after[kept + 2 * n_state], &after[kept + n_record],
                                                       [](float x) { return x == 0.0f; }),
                              "%s: the sums of a checkpoint are not zero", name);
                        std::copy(&now[kept], &now[kept] + n_record, &others[kept]);
                    }
                }
                same(at, n_state, ref.record.data());
                for (size_t i = 0; i < n_state && with_kernel; ++i) {
                    e_kernel.add(after[at + i], kernel_after[at + i]);
                }
                if (segments && (any_bits || open[seq])) { // what the next batch needs
                    same(at + n_state, n_record - n_state, ref.record.data() + n_state);
                }
                std::copy(&now[at], &now[at] + n_record, &others[at]);
                // all go on from what the reference has computed
                for (size_t i = 0; i < n_record; ++i) {
                    after[at + i] = (float) ref.record[i];
                }
            }
        }
        for (size_t i = 0; i < reads.size(); ++i) {
            if (std::isnan(expected[i])) {
                continue;
            }
            e_reads.add(reads[i], expected[i]);
            if (with_kernel) {
                e_kernel.add(reads[i], kernel_reads[i]);
            }
        }
        check(e_reads.value() <= tol, "%s: NMSE of reads is %g, allowed %g", name, e_reads.value(), tol);
        check(e_states.value() <= tol, "%s: NMSE of states is %g, allowed %g", name, e_states.value(), tol);
        check(e_kernel.value() <= tol, "%s: NMSE against the operator is %g, allowed %g", name, e_kernel.value(), tol);
        check(same_bits(others, now), "%s: another slot or the space between slots was written", name);
        worst = std::max({ worst, e_reads.value(), e_states.value(), e_kernel.value() });

        now = after;
        set_states();
    }
};

// The composite that `device` gets, computed by `backend`.
static void test_device(ggml_backend_dev_t device, ggml_backend_t backend) {
    const bool cpu  = ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
    const int  norm = GGML_DELTAMEM_NORMALIZE_QK, rows = GGML_DELTAMEM_RANKWISE_GATES;
    const int  outside = GGML_DELTAMEM_LAMBDA_OUTSIDE, segments = GGML_DELTAMEM_SEGMENTS;

    std::vector<shape> shapes = {
        { 8, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, norm | rows, 0 },
        { 8, 1, 1, 48, GGML_DELTAMEM_LAMBDA_COUPLED, norm | rows, 3 },
        { 8, 1, 1, 200, GGML_DELTAMEM_LAMBDA_COUPLED, norm | rows, 0 },
        { 8, 1, 1, 40, GGML_DELTAMEM_LAMBDA_COUPLED, norm | rows | segments, 3 },
        { 5, 3, 1, 40, GGML_DELTAMEM_LAMBDA_SEPARATE, norm | rows | segments, 3 },
        { 1, 1, 2, 20, GGML_DELTAMEM_LAMBDA_COUPLED, norm | rows, 0 },
        { 64, 2, 2, 20, GGML_DELTAMEM_LAMBDA_SEPARATE, norm, 2 },
        { 14, 1, 2, 20, GGML_DELTAMEM_LAMBDA_SEPARATE, norm | rows, 0 }, // gates begin at no multiple of four floats,
        { 5, 2, 2, 20, GGML_DELTAMEM_LAMBDA_SEPARATE, norm, 0 },         // and are a multiple of four
    };
    for (const int lambda :
         { GGML_DELTAMEM_LAMBDA_COUPLED, GGML_DELTAMEM_LAMBDA_SEPARATE, GGML_DELTAMEM_LAMBDA_NONE }) {
        for (const int flags : { 0, norm, rows, norm | rows, norm | outside, rows | outside }) {
            for (const int n_head : { 1, 3 }) {
                shapes.push_back({ n_head == 1 ? 8 : 5, n_head, 3, 31, lambda, flags, 4 });
                shapes.push_back({ n_head == 1 ? 8 : 5, n_head, 3, 31, lambda, flags | segments, 4 });
            }
        }
    }
    for (const shape & s : shapes) {
        const int width = ggml_deltamem_composite_width(device, params_of(s));
        if (!check(width >= s.rank, "a device that has a composite has none of rank %d, flags %d", s.rank, s.flags)) {
            continue;
        }
        std::vector<int> widths = { width };
        if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU && s.rank < 16) {
            widths.push_back(16); // as on other devices
        }
        for (const int w : widths) {
            // of a GPU, which may multiply in half precision, for the means of segments
            const double tol = cpu ? 1e-11 : s.flags & segments ? 1e-5 : 1e-10;

            conversation c(backend, device, s, w, tol, cpu);
            for (const int n_tokens : { s.n_tokens, s.n_seqs, s.n_tokens, 2 * s.n_seqs }) {
                c.batch(n_tokens);
            }
            if (s.flags & segments) {
                for (const int n_tokens : { s.n_tokens, s.n_seqs, std::max(1, s.n_seqs - 1), s.n_tokens }) {
                    c.batch(n_tokens, true);
                }
            }
            if (s.n_seqs > 1) {
                for (int infected = 0; infected < s.n_seqs; ++infected) {
                    c.batch(s.n_tokens, false, infected);
                    c.batch(s.n_seqs, false, infected);
                }
            }
            c.report();
        }
    }

    // as many nodes for a long prompt as for a token
    const shape one = shapes.front();
    if (const int width = ggml_deltamem_composite_width(device, params_of(one))) {
        conversation c(backend, device, one, width, 1.0, false);
        c.batch(1);
        const int n = c.nodes();
        c.batch(512);
        check(c.nodes() == n, "%d nodes for a prompt, %d for a token", c.nodes(), n);
    }
}

// Pairs of runs, one of the composite and one of the operator: their median ratio, and its quartiles.
static void print_times(ggml_backend_t backend, int n_head, int n_tokens) {
    random_source        random(1);
    ggml_deltamem_params p = {};
    p.rank                 = 8;
    p.n_head               = n_head;
    p.n_seqs               = 1;
    p.flags                = GGML_DELTAMEM_NORMALIZE_QK | GGML_DELTAMEM_RANKWISE_GATES;

    std::vector<int32_t> plan = { 0, 0, n_tokens };
    for (int i = 0; i < n_tokens; ++i) {
        plan.insert(plan.end(), { i, GGML_DELTAMEM_TOKEN_WRITE });
    }
    const ggml_deltamem_schedule schedule = ggml_deltamem_make_schedule(p, plan.data(), n_tokens);

    context_ptr ctx(
            ggml_init({ (GGML_DELTAMEM_COMPOSITE_NODES + 64) * ggml_tensor_overhead() + 2 * ggml_graph_overhead(),
                        nullptr, true }));
    ggml_tensor * proj   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_proj(&p), n_tokens);
    ggml_tensor * bias   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_gates(&p));
    ggml_tensor * state  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_head * ggml_deltamem_n_record(&p), 1);
    ggml_tensor * plan_t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, (int64_t) plan.size());
    const auto    inputs = ggml_deltamem_new_composite_inputs(ctx.get(), schedule);
    const auto    result = ggml_deltamem_composite(ctx.get(), proj, bias, state, inputs, p, p.rank);
    ggml_tensor * kernel = ggml_deltamem(ctx.get(), proj, bias, state, plan_t, p);
    buffer_ptr    buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));

    ggml_cgraph * graphs[] = { ggml_new_graph(ctx.get()), ggml_new_graph(ctx.get()) };
    ggml_build_forward_expand(graphs[0], result.reads);
    ggml_build_forward_expand(graphs[0], result.written);
    ggml_build_forward_expand(graphs[1], kernel);

    std::vector<float> x(ggml_nelements(proj)), b(ggml_nelements(bias)), s(ggml_nelements(state), 0.0f);
    for (float & value : x) {
        value = random.normal();
    }
    set(proj, x.data());
    set(bias, b.data());
    set(state, s.data());
    set(plan_t, plan.data());
    ggml_deltamem_set_composite_inputs(inputs, schedule);

    std::vector<double> ratios, times[2];
    for (int pair = 0; pair < 400; ++pair) {
        for (int i = 0; i < 2; ++i) {
            const auto begin = std::chrono::steady_clock::now();
            ggml_backend_graph_compute(backend, graphs[i]);
            times[i].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
        }
        ratios.push_back(times[0].back() / times[1].back());
    }
    for (std::vector<double> * each : { &ratios, &times[0], &times[1] }) {
        std::sort(each->begin(), each->end());
    }
    printf("heads %d, tokens %3d: %.1f times (quartiles %.1f, %.1f); fastest %.1f and %.1f us, %d nodes\n", n_head,
           n_tokens, ratios[200], ratios[100], ratios[300], 1e6 * times[0][0], 1e6 * times[1][0],
           ggml_graph_n_nodes(graphs[0]));
}

// plans that no context makes
static void test_refusals() {
    ggml_deltamem_params p = {};
    p.rank                 = 8;
    p.n_head               = 1;
    p.n_seqs               = 1;
    p.flags                = GGML_DELTAMEM_SEGMENTS;

    const auto refuses = [&](const std::vector<int32_t> & plan, const char * what) {
        try {
            ggml_deltamem_make_schedule(p, plan.data(), 2);
            check(false, "%s was not refused", what);
        } catch (const std::runtime_error & error) {
            check(error.what()[0] != '\0', "%s was refused without a reason", what);
        }
    };
    const int write = GGML_DELTAMEM_TOKEN_WRITE;
    const int begin = GGML_DELTAMEM_TOKEN_BEGIN | GGML_DELTAMEM_TOKEN_ACCUMULATE;
    refuses({ 0, 0, 2, 0, write, 2, write }, "a token that there is not");
    refuses({ 0, 0, 2, -1, write, 1, write }, "a negative token");
    refuses({ 0, 1, 2, 0, write, 1, write }, "an entry that there is not");
    refuses({ 0, 0, 2, 0, begin | write, 1, GGML_DELTAMEM_TOKEN_COMMIT }, "a token write within an ingest");
}

#ifdef DELTAMEM_METAL_RULES
// The rest of a layer's memory: the projection, the correction, its norm. And what a Metal device refuses.
static void test_metal_device(ggml_backend_dev_t device) {
    ggml_deltamem_params p = {};
    p.rank                 = 8;
    p.n_head               = 1;
    p.n_seqs               = 1;
    p.flags                = GGML_DELTAMEM_NORMALIZE_QK | GGML_DELTAMEM_RANKWISE_GATES;

    check(ggml_deltamem_composite_width(device, p) == 32, "a Metal device has a width of %d, not 32",
          ggml_deltamem_composite_width(device, p));
    check(!ggml_deltamem_composite_width(metal_device(false), p),
          "a GPU without SIMD-group reductions has a composite");

    context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead(), nullptr, true }));

    const int64_t n_tokens = 3;
    ggml_tensor * state    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_record(&p), 2);
    ggml_tensor * bias     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_gates(&p));
    ggml_tensor * plan     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, ggml_deltamem_n_plan(1, n_tokens));
    ggml_tensor * proj     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_proj(&p), n_tokens);
    check(!ggml_backend_dev_supports_op(device, ggml_deltamem(ctx.get(), proj, bias, state, plan, p)),
          "a Metal device takes the operator");

    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
        ggml_tensor * weight = ggml_new_tensor_2d(ctx.get(), type, 64, 128);
        ggml_tensor * cur    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 64, n_tokens);
        ggml_tensor * delta  = ggml_deltamem_mul_mat(ctx.get(), weight, cur);
        ggml_tensor * normed = ggml_rms_norm(ctx.get(), delta, 1e-6f);
        ggml_tensor * sum    = ggml_add(ctx.get(), ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 128, n_tokens), normed);
        for (const ggml_tensor * node : { delta, normed, sum }) {
            check(ggml_backend_dev_supports_op(device, node), "a Metal device refuses %s with weights of type %s",
                  ggml_op_desc(node), ggml_type_name(type));
        }
    }
}
#endif

static int test_metal() {
#ifdef DELTAMEM_METAL_RULES
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    test_metal_device(metal_device(true));
    test_device(metal_device(true), backend);
    ggml_backend_free(backend);
    return finish("composite for Metal");
#else
    printf("the source of ggml-metal is not here\n");
    return EXIT_SKIPPED;
#endif
}

int main(int argc, char ** argv) {
    ggml_backend_load_all();

    if (argc > 1 && std::string(argv[1]) == "time") {
        ggml_backend_t backend     = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, "1");
        const auto     set_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                ggml_backend_dev_backend_reg(ggml_backend_get_device(backend)), "ggml_backend_set_n_threads");
        set_threads(backend, 1);
        for (const int n_head : { 1, 4 }) {
            for (const int n_tokens : { 1, 32, 512 }) {
                print_times(backend, n_head, n_tokens);
            }
        }
        ggml_backend_free(backend);
        return 0;
    }

    if (argc > 1 && std::string(argv[1]) == "metal") {
        return test_metal();
    }

    const bool gpu = argc > 1 && std::string(argv[1]) == "gpu";
    int        n   = 0;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        const bool         cpu    = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
        if (cpu == gpu || (!cpu && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_ACCEL)) {
            continue;
        }
        ggml_deltamem_params p = {};
        p.rank                 = 8;
        p.n_head               = 1;
        p.n_seqs               = 1;
        if (!ggml_deltamem_composite_width(device, p)) {
            continue;
        }
        ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
        if (check(backend, "%s cannot be used", ggml_backend_dev_name(device))) {
            test_device(device, backend);
            ggml_backend_free(backend);
            n++;
        }
    }
    if (n == 0) {
        printf("no device computes a composite\n");
        return gpu ? EXIT_SKIPPED : 1;
    }
    test_refusals();
    return finish("composite");
}
