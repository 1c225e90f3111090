// Tests GGML_OP_DELTAMEM through ggml: constructor, names, and a backend's forward against the naive reference.
//
//     test-op        the CPU with 1 to 4 threads, which must not change a bit
//     test-op gpu    every GPU whose backend has the operator; exits with 77 if there is none

#include "ggml-deltamem.h"
#include "reference.h"
#include "shape.h"
#include "testing.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <csignal>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>

#include <sys/wait.h>
#include <unistd.h>

// a backend, and in how many ways it is to compute the same: numbers of threads of a CPU
struct tested {
    ggml_backend_dev_t       device;
    ggml_backend_t           backend;
    int                      n_ways;
    std::function<void(int)> set_way;
    double                   tol; // greatest NMSE of reads and states
    bool takes_float; // a packed projection of up to four tokens takes its activation as it is, not rounded to the weights' type
    bool takes_blocks; // corrections may have weights in Q8_0
    bool defers;       // writes may be deferred
};

// A graph that the allocator of llama.cpp's has laid out, which may put a node in the place of a source of its shape. `first`
// comes before all nodes that it does not need.
class allocated_graph {
public:
    allocated_graph(ggml_backend_t backend, ggml_context * ctx, ggml_tensor * node, ggml_tensor * first = nullptr) :
        backend(backend),
        cgraph(ggml_new_graph(ctx)),
        galloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend))) {
        ggml_set_output(node);
        if (first) {
            ggml_build_forward_expand(cgraph, first);
        }
        ggml_build_forward_expand(cgraph, node);
        check(ggml_gallocr_alloc_graph(galloc.get(), cgraph), "the graph cannot be allocated");
    }

    bool compute() { return ggml_backend_graph_compute(backend, cgraph) == GGML_STATUS_SUCCESS; }

    ggml_tensor * node(int i) { return ggml_graph_node(cgraph, i); }

private:
    struct deleter {
        void operator()(ggml_gallocr * g) const { ggml_gallocr_free(g); }
    };

    ggml_backend_t                         backend;
    ggml_cgraph *                          cgraph;
    std::unique_ptr<ggml_gallocr, deleter> galloc;
};

// One graph with one node. The state is a view of a wider tensor with more slots than sequences; slots and columns are
// dealt out at random; the sequences are of different lengths. The gate bias is the graph's own, as where the scheduler
// copies it to the node's device: for one token it has the shape of the result, and is needed after its first store.
class graph {
public:
    graph(ggml_backend_t backend, const shape & s, uint64_t seed) : random(seed) {
        p = params_of(s);

        n_tokens = s.n_tokens;
        n_slots  = s.n_seqs + 2;
        n_row    = s.n_head * ggml_deltamem_n_record(&p);

        ctx.reset(ggml_init({ ggml_tensor_overhead() * 8, nullptr, true }));
        nodes.reset(ggml_init({ ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true }));

        proj  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_proj(&p), n_tokens);
        bias  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_gates(&p));
        state = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_row + PADDING, n_slots);
        plan  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, ggml_deltamem_n_plan(s.n_seqs, n_tokens));

        ggml_tensor * rows = ggml_view_2d(ctx.get(), state, n_row, n_slots, state->nb[1], 0);
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));

        node = ggml_deltamem(nodes.get(), proj, ggml_cont(nodes.get(), bias), rows, plan, p);
        allocated.reset(new allocated_graph(backend, nodes.get(), node));

        make_inputs();
        set_inputs();
    }

    void set_inputs() {
        ggml_backend_tensor_set(proj, proj_data.data(), 0, ggml_nbytes(proj));
        ggml_backend_tensor_set(bias, bias_data.data(), 0, ggml_nbytes(bias));
        ggml_backend_tensor_set(state, state_data.data(), 0, ggml_nbytes(state));
        ggml_backend_tensor_set(plan, plan_data.data(), 0, ggml_nbytes(plan));
    }

    bool compute() { return allocated->compute(); }

    std::vector<float> reads() const { return values(node); }
    std::vector<float> states() const { return values(state); }

    const ggml_tensor * op() const { return node; }

    bool is_supported(ggml_backend_dev_t device) const { return ggml_backend_dev_supports_op(device, node); }

    // the reference over the same inputs, `times` in a row
    void compare(int times, double tol, const char * name) {
        std::vector<double> read((size_t) p.n_head * p.rank * n_tokens);
        const size_t        n_record = ggml_deltamem_n_record(&p);

        const std::vector<float> got_reads = reads(), got_states = states();
        std::vector<float>       others = got_states; // after this: what the operator had no business with

        nmse            e_reads, e_states;
        const int32_t * entries = plan_data.data() + GGML_DELTAMEM_PLAN_SEQ * p.n_seqs;
        for (int seq = 0; seq < p.n_seqs; ++seq) {
            const int32_t * range = plan_data.data() + GGML_DELTAMEM_PLAN_SEQ * seq;
            for (int head = 0; head < p.n_head; ++head) {
                const size_t at = range[0] * (n_row + PADDING) + head * n_record;

                reference_head ref(p, head, state_data.data() + at);
                for (int i = 0; i < times; ++i) {
                    ref.forward(proj_data.data(), proj->ne[0], bias_data.data(),
                                entries + GGML_DELTAMEM_PLAN_TOKEN * range[1], range[2], read.data(),
                                p.n_head * p.rank);
                }
                for (size_t i = 0; i < n_record; ++i) {
                    e_states.add(got_states[at + i], ref.record[i]);
                    others[at + i] = state_data[at + i];
                }
            }
        }
        for (size_t i = 0; i < read.size(); ++i) {
            e_reads.add(got_reads[i], read[i]);
        }
        check(e_reads.value() <= tol, "%s: NMSE of reads is %g, allowed %g", name, e_reads.value(), tol);
        check(e_states.value() <= tol, "%s: NMSE of states is %g, allowed %g", name, e_states.value(), tol);
        check(same_bits(others, state_data), "%s: another slot or the space between slots was written", name);
        printf("%-64s NMSE of reads %.1e, states %.1e\n", name, e_reads.value(), e_states.value());
    }

private:
    static constexpr int PADDING = 7; // floats between the slots' rows

    struct deleter {
        void operator()(ggml_context * c) const { ggml_free(c); }
        void operator()(ggml_backend_buffer * b) const { ggml_backend_buffer_free(b); }
    };

    static std::vector<float> values(const ggml_tensor * t) {
        std::vector<float> x(ggml_nelements(t));
        ggml_backend_tensor_get(t, x.data(), 0, ggml_nbytes(t));
        return x;
    }

    void make_inputs() {
        const bool   segments = (p.flags & GGML_DELTAMEM_SEGMENTS) != 0;
        const bool   deferred = (p.flags & GGML_DELTAMEM_DEFERRED) != 0;
        const size_t n_qk     = 2 * (size_t) p.n_head * p.rank;
        const float  raw      = 1.0f / sqrtf((float) p.rank); // |k| <= 1

        for (int64_t i = 0; i < ggml_nelements(proj); ++i) {
            const bool raw_qk = (size_t) (i % proj->ne[0]) < n_qk && !(p.flags & GGML_DELTAMEM_NORMALIZE_QK);
            proj_data.push_back(raw_qk ? random.uniform(-raw, raw) : random.normal());
        }
        for (int64_t i = 0; i < ggml_nelements(bias); ++i) {
            bias_data.push_back(random.normal());
        }
        state_data.assign(ggml_nelements(state), guard_value());
        for (int slot = 0; slot < n_slots; ++slot) {
            for (int head = 0; head < p.n_head; ++head) {
                float * record = &state_data[slot * (n_row + PADDING) + head * ggml_deltamem_n_record(&p)];
                std::fill(record, record + ggml_deltamem_n_record(&p), 0.0f);
                for (int i = 0; i < p.rank * p.rank * (segments || deferred ? 2 : 1); ++i) {
                    record[i] = 0.5f * random.normal();
                }
            }
        }

        std::vector<int32_t> slots, columns;
        for (int i = 0; i < n_slots; ++i) {
            slots.push_back(i);
        }
        for (int i = 0; i < n_tokens; ++i) {
            columns.push_back(i);
        }
        random.shuffle(slots);
        random.shuffle(columns);

        // every sequence one token, the rest to the first ones more than to the last
        std::vector<int> counts(p.n_seqs, 1);
        for (int left = n_tokens - p.n_seqs; left > 0; --left) {
            counts[random.below(1 + random.below(p.n_seqs))]++;
        }
        for (int seq = 0, first = 0; seq < p.n_seqs; first += counts[seq++]) {
            plan_data.insert(plan_data.end(), { slots[seq], first, counts[seq] });
        }
        const int ingest = GGML_DELTAMEM_TOKEN_BEGIN | GGML_DELTAMEM_TOKEN_ACCUMULATE | GGML_DELTAMEM_TOKEN_COMMIT;
        for (int column : columns) {
            const int turn = !deferred             ? 0
                             : random.chance(0.1f) ? GGML_DELTAMEM_TOKEN_TURN
                             : random.chance(0.3f) ? GGML_DELTAMEM_TOKEN_PRESENT
                                                   : 0;
            plan_data.insert(plan_data.end(), { column, segments && n_tokens == 1 ? ingest
                                                        : segments                ? random.below(32)
                                                        : random.chance(0.8f)     ? GGML_DELTAMEM_TOKEN_WRITE | turn
                                                                                  : turn });
        }
    }

    random_source        random;
    ggml_deltamem_params p = {};
    int                  n_tokens, n_slots;
    int64_t              n_row;

    std::unique_ptr<ggml_context, deleter>        ctx, nodes; // what is given, what is computed
    std::unique_ptr<ggml_backend_buffer, deleter> buffer;
    std::unique_ptr<allocated_graph>              allocated;
    ggml_tensor *                                 proj, *bias, *state, *plan, *node;

    std::vector<float>   proj_data, bias_data, state_data;
    std::vector<int32_t> plan_data;
};

// Stores values in the tensor's type; they become what is stored.
static void set_weights(ggml_tensor * weight, std::vector<float> & values) {
    if (weight->type == GGML_TYPE_F32) {
        ggml_backend_tensor_set(weight, values.data(), 0, ggml_nbytes(weight));
        return;
    }
    std::vector<uint8_t> bytes(ggml_nbytes(weight));
    ggml_quantize_chunk(weight->type, values.data(), bytes.data(), 0, weight->ne[1], weight->ne[0], nullptr);
    ggml_get_type_traits(weight->type)->to_float(bytes.data(), values.data(), values.size());
    ggml_backend_tensor_set(weight, bytes.data(), 0, bytes.size());
}

// What follows a correction: c, c + x, x + c; and two that must not be computed with it, c + x for one x of all tokens and
// (c + x) c.
enum addition {
    NOTHING,
    ADDED_BEHIND,
    ADDED_BEFORE,
    ADDED_ROW,
    ADDED_AND_USED
};

// NMSE of products of many tokens and weights in blocks: both factors may be rounded to bfloat16, so each is off by 2^-9 of
// itself at most; twice that in a product
static constexpr double MANY_BLOCKS = 1.6e-5;

// The same of a packed projection of many tokens. Without tiles it is ggml's product, which rounds the activation to steps of
// 1/127 of the largest value of a block: of these inputs, 1.6e-5 of their square. A read multiplies four rows of it: a query
// with a key, a value and a gate of the turn before.
static constexpr double MANY_BLOCKS_READ = 4 * 1.6e-5;

static constexpr float EPSILON = 1e-6f; // of norms

// A correction of one type against double precision; every number of threads gives the same bits. Weights and reads are the
// graph's own, as the gate bias above. An addition may be computed with it, and the norm of rows of n_row outputs, which is
// then multiplied by weights; 0: none. What is normalised is used again, as the residual stream is.
static void test_correction(const tested & on, ggml_type type, int n_out, int n_read, int n_tokens, addition add,
                            int n_row = 0) {
    ggml_backend_t backend = on.backend;
    random_source  random(n_out + 7 * n_read + 31 * n_tokens);

    ggml_context * ctx    = ggml_init({ ggml_tensor_overhead() * 8, nullptr, true });
    ggml_context * nodes  = ggml_init({ ggml_tensor_overhead() * 12 + ggml_graph_overhead(), nullptr, true });
    ggml_tensor *  out    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_out, n_tokens);
    const bool     rows   = ggml_is_quantized(type);
    ggml_tensor *  scales = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, std::max(n_row, 1));
    ggml_tensor *  weight = ggml_new_tensor_2d(ctx, type, rows ? n_read : n_out, rows ? n_out : n_read);
    ggml_tensor *  read   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_read, n_tokens);
    ggml_tensor *  other  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_out, add == ADDED_ROW ? 1 : n_tokens);
    ggml_tensor *  node   = ggml_deltamem_correct(nodes, out, ggml_cont(nodes, weight), ggml_cont(nodes, read));
    switch (add) {
        case NOTHING:        break;
        case ADDED_BEHIND:
        case ADDED_ROW:      node = ggml_add(nodes, node, other); break;
        case ADDED_BEFORE:   node = ggml_add(nodes, ggml_cont(nodes, other), node); break;
        case ADDED_AND_USED: node = ggml_mul(nodes, ggml_add(nodes, node, other), node); break;
    }
    ggml_tensor * sum = node;
    if (n_row > 0) {
        node = ggml_rms_norm(nodes, ggml_reshape_3d(nodes, sum, n_row, n_out / n_row, n_tokens), EPSILON);
        node = ggml_reshape_2d(nodes, ggml_mul(nodes, node, scales), n_out, n_tokens);
        node = ggml_sub(nodes, node, sum);
    }

    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    allocated_graph       graph(backend, nodes, node);

    const auto fill = [&random](ggml_tensor * t) {
        std::vector<float> x(ggml_nelements(t));
        for (float & value : x) {
            value = random.normal();
        }
        return x;
    };
    const std::vector<float> out_data = fill(out), read_data = fill(read);
    std::vector<float>       weight_data = fill(weight), other_data(ggml_nelements(other), 0.0f);
    if (add != NOTHING) {
        other_data = fill(other);
    }
    const std::vector<float> scale_data = fill(scales);

    ggml_backend_tensor_set(scales, scale_data.data(), 0, ggml_nbytes(scales));
    ggml_backend_tensor_set(out, out_data.data(), 0, ggml_nbytes(out));
    ggml_backend_tensor_set(read, read_data.data(), 0, ggml_nbytes(read));
    ggml_backend_tensor_set(other, other_data.data(), 0, ggml_nbytes(other));
    set_weights(weight, weight_data);

    nmse               error;
    std::vector<float> first;
    for (int way = 1; way <= on.n_ways; ++way) {
        on.set_way(way);
        check(graph.compute(), "computing a correction failed");
        std::vector<float> got(out_data.size());
        ggml_backend_tensor_get(node, got.data(), 0, ggml_nbytes(node));
        if (way == 1) {
            first = got;
            std::vector<double> expected(got.size());
            for (size_t k = 0; k < expected.size(); ++k) {
                const size_t t = k / n_out, i = k % n_out;
                double       value = out_data[k];
                for (int j = 0; j < n_read; ++j) {
                    value += (double) weight_data[rows ? i * n_read + j : (size_t) j * n_out + i] *
                             read_data[t * n_read + j];
                }
                const double added = value + other_data[add == ADDED_ROW ? i : k];
                expected[k]        = add == ADDED_AND_USED ? added * value : added;
            }
            for (size_t k = 0; k < expected.size(); ++k) {
                double normed = 0.0;
                if (n_row > 0) {
                    const double * row = &expected[k / n_row * n_row];
                    normed             = expected[k] * scale_data[k % n_row] /
                                         std::sqrt(std::inner_product(row, row + n_row, row, 0.0) / n_row + EPSILON);
                }
                error.add(got[k], n_row > 0 ? normed - expected[k] : expected[k]);
            }
        }
        check(same_bits(got, first), "correction: %d threads change the result", way);
    }
    const char * name = n_row > 0 ? "correction, norm" : add == NOTHING ? "correction" : "correction, addition";
    // sums of up to 130 terms, twice in a product: an rms error of some 12 u, 17 u allowed; with many tokens, blocks of
    // weights may be rounded to bfloat16, and so may reads
    check(error.value() <= (rows && n_tokens > 4 ? MANY_BLOCKS : 1e-12),
          "%s %s, outputs %d, columns %d, tokens %d: NMSE is %g", name, ggml_type_name(type), n_out, n_read, n_tokens,
          error.value());
    printf("%-20s %-5s outputs %5d, columns %3d, tokens %4d %5s NMSE %.1e\n", name, ggml_type_name(type), n_out, n_read,
           n_tokens, "", error.value());

    ggml_backend_buffer_free(buffer);
    ggml_free(nodes);
    ggml_free(ctx);
}

// A packed projection, the read of its tokens, one of each sequence, and a correction by it, which a backend may compute as
// one: against double precision, twice in a row; every number of threads gives the same bits. Where a backend may round, its
// inputs are multiples of 1/32 and its weights of half precision, which no type of a product rounds. What is corrected is the
// graph's own, so that the result takes its place, or it must stay and is as large as the projection, whose place the result
// then takes: there the three cannot be computed as one. Or it is a product of the same input, as in a layer: a backend may
// compute the projection together with that.
enum correction {
    NO_CORRECTION,
    CORRECTION,
    CORRECTION_IN_THE_PLACE_OF_THE_PROJECTION,
    CORRECTION_OF_A_PRODUCT,
    NORMED_CORRECTION_OF_A_PRODUCT, // in rows of 128 outputs, then multiplied by weights, like the queries of many models
};

static void test_projected_read(const tested & on, ggml_type type, int n_embd, const shape & s, correction corrected) {
    random_source random(n_embd + s.flags + 10 * s.n_seqs + 100 * s.rank);

    const ggml_deltamem_params p = params_of(s);

    const int64_t n_proj = ggml_deltamem_n_proj(&p), n_record = ggml_deltamem_n_record(&p), n_slots = s.n_seqs + 1;
    const int64_t n_read = s.n_head * s.rank, n_slot = s.n_head * n_record;

    ggml_context * ctx    = ggml_init({ ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true });
    ggml_tensor *  weight = ggml_new_tensor_2d(ctx, type, n_embd, n_proj);
    ggml_tensor *  input  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, s.n_seqs);
    ggml_tensor *  bias   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_deltamem_n_gates(&p));
    ggml_tensor *  state  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_slot, n_slots);
    ggml_tensor *  plan   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ggml_deltamem_n_plan(s.n_seqs, s.n_seqs));
    const int64_t  n_out  = corrected == CORRECTION_IN_THE_PLACE_OF_THE_PROJECTION ? n_proj
                            : corrected == NORMED_CORRECTION_OF_A_PRODUCT          ? 1024
                                                                                   : 1000;
    ggml_tensor *  out    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_out, s.n_seqs);
    const bool     rows   = ggml_is_quantized(type) && n_read % ggml_blck_size(type) == 0; // else no such weights exist
    ggml_tensor * delta = rows ? ggml_new_tensor_2d(ctx, type, n_read, n_out)
                               : ggml_new_tensor_2d(ctx, ggml_is_quantized(type) ? GGML_TYPE_F16 : type, n_out, n_read);
    ggml_context * nodes  = ggml_init({ ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true });
    ggml_tensor *  proj_t = ggml_deltamem_mul_mat(nodes, weight, input);
    ggml_tensor *  node   = ggml_deltamem(nodes, proj_t, bias, state, plan, p);
    ggml_tensor *  wide   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n_out);
    ggml_tensor *  own    = corrected == CORRECTION                ? ggml_cont(nodes, out)
                            : corrected >= CORRECTION_OF_A_PRODUCT ? ggml_deltamem_mul_mat(nodes, wide, input)
                                                                   : out;
    ggml_tensor *  last   = corrected ? ggml_deltamem_correct(nodes, own, delta, node) : node;
    constexpr int  N_ROW  = 128;
    ggml_tensor *  scales = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, N_ROW);
    if (corrected == NORMED_CORRECTION_OF_A_PRODUCT) {
        last = ggml_reshape_3d(nodes, last, N_ROW, n_out / N_ROW, s.n_seqs);
        last = ggml_mul(nodes, ggml_rms_norm(nodes, last, EPSILON), scales);
    }
    ggml_set_output(node);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, on.backend);
    allocated_graph       graph(on.backend, nodes, last);
    check(corrected != CORRECTION || last->data == own->data, "the correction is not in place: the test tests nothing");
    if (corrected == CORRECTION_IN_THE_PLACE_OF_THE_PROJECTION) {
        check(last->data == proj_t->data,
              "the correction has another place than the projection: the test tests nothing");
    }

    check(corrected < CORRECTION_OF_A_PRODUCT || (graph.node(0) == own && graph.node(1) == proj_t),
          "the product is not right before the projection: the test tests nothing");

    const auto set = [&](ggml_tensor * t, const std::vector<float> & x) {
        ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
    };
    const bool exact = on.takes_float && s.n_seqs <= 4 && type != GGML_TYPE_BF16;

    std::vector<float> weights(n_embd * n_proj), x(n_embd * s.n_seqs), biases(ggml_nelements(bias));
    std::vector<float> slots(n_slot * n_slots, 0.0f);
    for (float & w : weights) {
        w = random.normal() / sqrtf((float) n_embd);
        w = exact ? w : ggml_fp16_to_fp32(ggml_fp32_to_fp16(w));
    }
    for (float & value : x) {
        value = exact ? random.normal() : (random.below(65) - 32) / 32.0f;
    }
    for (float & b : biases) {
        b = random.normal();
    }
    for (int64_t i = 0; i < n_slots * s.n_head; ++i) {
        for (int j = 0; j < p.rank * p.rank * (s.flags & GGML_DELTAMEM_DEFERRED ? 2 : 1); ++j) {
            slots[i * n_record + j] = random.normal();
        }
    }

    // sequence i has slot i + 1 and token i; nobody has slot 0
    const bool    segments = s.flags & GGML_DELTAMEM_SEGMENTS;
    const bool    begins   = (s.flags & GGML_DELTAMEM_DEFERRED) && random.chance(0.5f);
    const int32_t bits =
            segments ? GGML_DELTAMEM_TOKEN_BEGIN | GGML_DELTAMEM_TOKEN_ACCUMULATE | GGML_DELTAMEM_TOKEN_COMMIT
            : begins ? GGML_DELTAMEM_TOKEN_WRITE |
                               (random.chance(0.5f) ? GGML_DELTAMEM_TOKEN_TURN : GGML_DELTAMEM_TOKEN_PRESENT)
                     : GGML_DELTAMEM_TOKEN_WRITE;
    std::vector<int32_t> plan_data;
    for (int seq = 0; seq < s.n_seqs; ++seq) {
        plan_data.insert(plan_data.end(), { seq + 1, seq, 1 });
    }
    for (int seq = 0; seq < s.n_seqs; ++seq) {
        plan_data.insert(plan_data.end(), { seq, bits });
    }
    const int32_t * entries = plan_data.data() + GGML_DELTAMEM_PLAN_SEQ * s.n_seqs;

    std::vector<float> outs(n_out * s.n_seqs), deltas(n_out * n_read), wides(n_embd * n_out);
    for (float & value : wides) {
        value = (random.below(65) - 32) / 256.0f;
    }
    for (int64_t i = 0; i < n_out * s.n_seqs; ++i) {
        double sum = random.normal();
        if (corrected >= CORRECTION_OF_A_PRODUCT) {
            sum = std::inner_product(&x[i / n_out * n_embd], &x[i / n_out * n_embd] + n_embd,
                                     &wides[i % n_out * n_embd], 0.0);
        }
        outs[i] = (float) sum;
    }
    for (float & value : deltas) {
        value = random.normal();
    }

    set(input, x);
    set(bias, biases);
    std::vector<float> scale_data(N_ROW);
    for (float & value : scale_data) {
        value = random.normal();
    }

    set(out, outs);
    set(wide, wides);
    set(scales, scale_data);
    set_weights(delta, deltas);
    ggml_backend_tensor_set(plan, plan_data.data(), 0, ggml_nbytes(plan));
    set_weights(weight, weights);

    std::vector<float> proj(n_proj * s.n_seqs);
    for (int64_t i = 0; i < n_proj * s.n_seqs; ++i) {
        const float * row = &weights[i % n_proj * n_embd];
        const float * in  = &x[i / n_proj * n_embd];
        double        sum = 0.0;
        for (int j = 0; j < n_embd; ++j) {
            sum += (double) row[j] * in[j];
        }
        proj[i] = (float) sum;
    }

    char name[128];
    snprintf(name, sizeof(name), "projection %s of %d, read%s: rank %d, heads %d, sequences %d, flags %d",
             ggml_type_name(type), n_embd,
             corrected == NORMED_CORRECTION_OF_A_PRODUCT ? ", correction of a product, norm"
             : corrected == CORRECTION_OF_A_PRODUCT      ? ", correction of a product"
             : corrected                                 ? ", correction"
                                                         : "",
             s.rank, s.n_head, s.n_seqs, s.flags);

    nmse               error;
    std::vector<float> first[2];
    for (int way = 1; way <= on.n_ways; ++way) {
        on.set_way(way);
        set(state, slots);
        std::vector<reference_head> references;
        for (int i = 0; i < s.n_seqs * s.n_head; ++i) {
            references.emplace_back(p, i % s.n_head, &slots[n_slot + i * n_record]);
        }
        for (int turn = 0; turn < 2; ++turn) {
            check(graph.compute(), "%s: computing failed", name);
            std::vector<float> got(n_read * s.n_seqs), got_slots(slots.size()), got_outs(outs.size());
            ggml_backend_tensor_get(node, got.data(), 0, ggml_nbytes(node));
            if (corrected) {
                ggml_backend_tensor_get(last, got_outs.data(), 0, ggml_nbytes(last));
            }
            ggml_backend_tensor_get(state, got_slots.data(), 0, ggml_nbytes(state));
            check(std::equal(slots.begin(), slots.begin() + n_slot, got_slots.begin()), "%s: another slot was written",
                  name);
            if (way == 1) {
                std::vector<double> read(got.size());
                for (int i = 0; i < s.n_seqs * s.n_head; ++i) {
                    references[i].forward(proj.data(), n_proj, biases.data(),
                                          entries + GGML_DELTAMEM_PLAN_TOKEN * (i / s.n_head), 1, read.data(), n_read);
                    for (int j = 0; j < p.rank * p.rank; ++j) {
                        error.add(got_slots[n_slot + i * n_record + j], references[i].record[j]);
                    }
                }
                for (size_t i = 0; i < got.size(); ++i) {
                    error.add(got[i], read[i]);
                }
                std::vector<double> expected(corrected ? n_out * s.n_seqs : 0);
                for (int64_t i = 0; i < (int64_t) expected.size(); ++i) {
                    expected[i] = outs[i];
                    for (int64_t j = 0; j < n_read; ++j) {
                        expected[i] += (double) deltas[rows ? i % n_out * n_read + j : j * n_out + i % n_out] *
                                       read[i / n_out * n_read + j];
                    }
                }
                for (int64_t i = 0; i < (int64_t) expected.size(); ++i) {
                    double scale = 1.0;
                    if (corrected == NORMED_CORRECTION_OF_A_PRODUCT) {
                        const double * row = &expected[i / N_ROW * N_ROW];
                        scale = scale_data[i % N_ROW] /
                                std::sqrt(std::inner_product(row, row + N_ROW, row, 0.0) / N_ROW + EPSILON);
                    }
                    error.add(got_outs[i], expected[i] * scale);
                }
            }
            got.insert(got.end(), got_slots.begin(), got_slots.end());
            got.insert(got.end(), got_outs.begin(), got_outs.end());
            if (way == 1) {
                first[turn] = got;
            }
            check(same_bits(got, first[turn]), "%s: %d threads change the result", name, way);
        }
    }
    // sums of thousands of products: an rms error of some sqrt(n) u
    check(error.value() <= (ggml_is_quantized(type) && !exact ? MANY_BLOCKS_READ : 1e-10), "%s: NMSE is %g", name,
          error.value());
    printf("%-72s NMSE %.1e\n", name, error.value());

    ggml_backend_buffer_free(buffer);
    ggml_free(nodes);
    ggml_free(ctx);
}

// Runs f in a child. Whether it ended by abort(), as a failed GGML_ASSERT ends a process, and by nothing worse.
static bool aborts(const std::function<void()> & f) {
    fflush(stdout);
    const pid_t pid = fork();
    if (pid == 0) {
        if (!freopen("/dev/null", "w", stderr)) { // GGML_ASSERT says what was wrong
            _exit(1);
        }
        f();
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

// What an RPC client may send and no constructor makes: a plan that points out of its tensors, a node that is not what it
// says. With one token of a single sequence, the backend computes projection, read and correction as one.
static void test_malformed(const tested & on, bool fused) {
    setenv("GGML_NO_BACKTRACE", "1", 1); // of every abort otherwise

    constexpr int n_embd = 64, n_out = 96, n_slots = 4;
    const int     n_tokens = fused ? 1 : 6;

    ggml_deltamem_params p = {};
    p.rank                 = 8;
    p.n_head               = 1;
    p.n_seqs               = 1;
    p.flags                = GGML_DELTAMEM_RANKWISE_GATES;

    ggml_context * ctx    = ggml_init({ ggml_tensor_overhead() * 8, nullptr, true });
    ggml_context * nodes  = ggml_init({ ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true });
    ggml_tensor *  weight = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, ggml_deltamem_n_proj(&p));
    ggml_tensor *  input  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n_tokens);
    ggml_tensor *  bias   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_deltamem_n_gates(&p));
    ggml_tensor *  state  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ggml_deltamem_n_record(&p), n_slots);
    ggml_tensor *  plan   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ggml_deltamem_n_plan(1, n_tokens));
    ggml_tensor *  out    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_out, n_tokens);
    ggml_tensor *  delta  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_out, p.rank);

    ggml_tensor * proj    = ggml_deltamem_mul_mat(nodes, weight, input);
    ggml_tensor * read    = ggml_deltamem(nodes, proj, bias, state, plan, p);
    ggml_tensor * correct = ggml_deltamem_correct(nodes, out, delta, read);

    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, on.backend);
    ggml_backend_buffer_clear(buffer, 0);
    allocated_graph graph(on.backend, nodes, correct);

    std::vector<int32_t> plan_data = { 1, 0, n_tokens };
    for (int i = 0; i < n_tokens; ++i) {
        plan_data.insert(plan_data.end(), { i, GGML_DELTAMEM_TOKEN_WRITE | GGML_DELTAMEM_TOKEN_CHECKPOINT(3) });
    }
    const auto compute = [&] {
        ggml_backend_tensor_set(plan, plan_data.data(), 0, ggml_nbytes(plan));
        on.set_way(1);
        graph.compute();
    };
    compute(); // as it should be

    const auto with = [&](const char * what, const std::function<void()> & change) {
        check(aborts([&] {
                  change();
                  compute();
              }),
              "%s: computed, or worse", what);
    };
    const auto number = [&](const char * what, int at, int32_t value) { with(what, [&] { plan_data[at] = value; }); };
    number("a slot too many", 0, n_slots);
    number("a negative slot", 0, -1);
    number("a negative first entry", 1, -1);
    number("an entry too many", 2, n_tokens + 1);
    number("a huge number of entries", 2, INT32_MAX);
    number("a negative number of entries", 2, -1);
    number("a token too many", 3, n_tokens);
    number("a huge token", 3, INT32_MAX);
    number("a negative token", 3, -1);
    number("a checkpoint too many", 4, GGML_DELTAMEM_TOKEN_CHECKPOINT(n_slots));
    number("a huge checkpoint", 4, INT32_MAX);
    number("a negative checkpoint", 4, INT32_MIN);
    number("a token too many in the last entry", 3 + 2 * (n_tokens - 1), 1 << 20);

    with("another kind", [&] { read->op_params[0] = 7; });
    with("a read that is a correction", [&] { read->op_params[0] = GGML_DELTAMEM_CORRECT; });
    with("a correction that is a read", [&] { correct->op_params[0] = GGML_DELTAMEM_READ; });
    with("rank 0", [&] { read->op_params[1] = 0; });
    with("a rank too high", [&] { read->op_params[1] = GGML_DELTAMEM_MAX_RANK + 1; });
    with("another rank", [&] { read->op_params[1] = 16; });
    with("another number of heads", [&] { read->op_params[2] = 2; });
    with("no heads", [&] { read->op_params[2] = 0; });
    with("a huge number of heads", [&] { read->op_params[2] = INT32_MAX; });
    with("more sequences than the plan has", [&] { read->op_params[3] = 1000; });
    with("no sequences", [&] { read->op_params[3] = 0; });
    with("another lambda", [&] { read->op_params[4] = 3; });
    with("segments without room", [&] { read->op_params[5] |= GGML_DELTAMEM_SEGMENTS; });
    with("deferred writes without room", [&] { read->op_params[5] |= GGML_DELTAMEM_DEFERRED; });
    with("deferred writes of segments", [&] {
        read->op_params[5] |= GGML_DELTAMEM_SEGMENTS | GGML_DELTAMEM_DEFERRED;
        state->ne[0] = 2 * 64 + 3 * 8 + 8 + 1;
    });
    for (int i = 0; i < 4; ++i) {
        with("a read without a source", [&] { read->src[i] = nullptr; });
        with("a source that is short", [&] { read->src[i]->ne[0] = 3; });
        with("a source of another type", [&] { read->src[i]->type = GGML_TYPE_I16; });
    }
    for (int i = 1; i < 4; ++i) { // the first is ggml's product
        with("a source without data", [&] { read->src[i]->data = nullptr; });
    }
    for (int i = 0; i < 3; ++i) {
        with("a correction without a source", [&] { correct->src[i] = nullptr; });
        with("a source of a correction that is short", [&] { correct->src[i]->ne[0] = 3; });
        with("a source of a correction of another type", [&] { correct->src[i]->type = GGML_TYPE_I16; });
    }
    with("a result in the place of the plan", [&] { read->data = plan->data; });
    with("a state in the place of the plan", [&] { state->data = plan->data; });
    with("a longer result", [&] { read->ne[1] = 1000; });
    with("a wider correction", [&] { correct->ne[0] = 1000; });
    with("a wider projection", [&] { proj->ne[0] = 1000; });

    // rows of one value, of which no kernel asks how far apart their values were to be
    ggml_tensor * value = ggml_new_tensor_2d(nodes, GGML_TYPE_F32, 1, n_tokens);
    for (const size_t distance : { 2 * sizeof(float), (size_t) 0 }) {
        ggml_tensor * thin = ggml_new_tensor_2d(nodes, GGML_TYPE_F32, 1, p.rank);
        thin->nb[0]        = distance;
        thin->nb[1]        = 2 * distance;
        check(aborts([&] { ggml_deltamem_correct(nodes, value, thin, read); }),
              "weights %zu bytes apart within rows of one: accepted, or worse", distance);
    }

    ggml_backend_buffer_free(buffer);
    ggml_free(nodes);
    ggml_free(ctx);
}

// Nodes that a backend may compute as one, though one of them reads what all threads write in another: a correction of the read
// itself, weights of a norm that are a row of what is normalised, and a state that is a product of the projection's input. A copy
// in between keeps them apart: the same bits.
enum dependence {
    CORRECTED_READ,
    NORMED_ROW,
    STATE_OF_A_PRODUCT
};

static void test_dependent(const tested & on, dependence kind) {
    constexpr int N_EMBD = 64, N_OUT = 64;
    const int     n_tokens = kind == NORMED_ROW ? 40 : 1;

    const ggml_deltamem_params p =
            params_of({ 8, N_OUT / 8, 1, n_tokens, GGML_DELTAMEM_LAMBDA_COUPLED, GGML_DELTAMEM_NORMALIZE_QK });

    random_source  random(n_tokens);
    ggml_context * ctx    = ggml_init({ ggml_tensor_overhead() * 8, nullptr, true });
    ggml_tensor *  weight = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_EMBD, ggml_deltamem_n_proj(&p));
    ggml_tensor *  input  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_EMBD, n_tokens);
    ggml_tensor *  bias   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_deltamem_n_gates(&p));
    ggml_tensor *  state  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.n_head * ggml_deltamem_n_record(&p), 1);
    ggml_tensor *  plan   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ggml_deltamem_n_plan(1, n_tokens));
    ggml_tensor *  delta  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_OUT, N_OUT);
    ggml_tensor *  out    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_OUT, n_tokens);
    ggml_tensor *  other  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_EMBD, state->ne[0]);

    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, on.backend);

    const auto fill = [&](ggml_tensor * t) {
        std::vector<float> x(ggml_nelements(t));
        for (float & value : x) {
            value = random.normal();
        }
        ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
        return x;
    };
    for (ggml_tensor * t : { weight, input, bias, delta, out, other }) {
        fill(t);
    }
    const std::vector<float> before    = fill(state);
    std::vector<int32_t>     plan_data = { 0, 0, n_tokens };
    for (int i = 0; i < n_tokens; ++i) {
        plan_data.insert(plan_data.end(), { i, GGML_DELTAMEM_TOKEN_WRITE });
    }
    ggml_backend_tensor_set(plan, plan_data.data(), 0, ggml_nbytes(plan));

    std::vector<float> expected;
    for (const bool copied : { true, false }) {
        ggml_context * nodes = ggml_init({ ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true });
        const auto     copy  = [&](ggml_tensor * t) { return copied ? ggml_cont(nodes, t) : t; };
        ggml_tensor *  proj  = ggml_deltamem_mul_mat(nodes, weight, input);
        ggml_tensor *  first = kind == STATE_OF_A_PRODUCT ? copy(ggml_deltamem_mul_mat(nodes, other, input)) : nullptr;
        ggml_tensor *  read  = ggml_deltamem(nodes, proj, bias, first ? first : state, plan, p);
        ggml_tensor *  last  = ggml_deltamem_correct(nodes, kind == CORRECTED_READ ? copy(read) : out, delta, read);
        ggml_tensor *  used  = first ? first : kind == NORMED_ROW ? last : read; // by nodes that must wait for it
        if (kind == NORMED_ROW) {
            first = copy(ggml_view_2d(nodes, last, N_OUT, 1, last->nb[1], 0));
            last  = ggml_mul(nodes, ggml_rms_norm(nodes, last, EPSILON), first);
        }
        for (ggml_tensor * t : { proj, read, first }) {
            if (t) {
                ggml_set_output(t); // no result takes its memory
            }
        }
        allocated_graph graph(on.backend, nodes, last, first);
        for (int i = 0; i < 50; ++i) {
            on.set_way(1 + i % on.n_ways);
            ggml_backend_tensor_set(state, before.data(), 0, ggml_nbytes(state));
            const std::vector<float> guards(ggml_nelements(used), guard_value());
            ggml_backend_tensor_set(used, guards.data(), 0, ggml_nbytes(used));
            check(graph.compute(), "computing nodes that depend on each other failed");
            std::vector<float> got(ggml_nelements(last));
            ggml_backend_tensor_get(last, got.data(), 0, ggml_nbytes(last));
            if (expected.empty()) {
                expected = got;
            }
            check(same_bits(got, expected), "nodes that depend on each other, kind %d: other bits than with a copy",
                  kind);
        }
        ggml_free(nodes);
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

// Nodes that a backend computes as one, and then, in the same graph, as two: the correction gets other reads. What a backend keeps
// of a graph, it keeps by the graph's identifier, which this one has not.
static void test_changed(const tested & on) {
    constexpr int N_EMBD = 32, N_OUT = 64;

    const ggml_deltamem_params p = params_of({ 8, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, GGML_DELTAMEM_NORMALIZE_QK });

    random_source  random(8);
    ggml_context * ctx    = ggml_init({ ggml_tensor_overhead() * 8, nullptr, true });
    ggml_tensor *  weight = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_EMBD, ggml_deltamem_n_proj(&p));
    ggml_tensor *  input  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_EMBD, 1);
    ggml_tensor *  bias   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_deltamem_n_gates(&p));
    ggml_tensor *  state  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ggml_deltamem_n_record(&p), 1);
    ggml_tensor *  plan   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ggml_deltamem_n_plan(1, 1));
    ggml_tensor *  delta  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_OUT, p.rank);
    ggml_tensor *  out    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_OUT, 1);
    ggml_tensor *  other  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.rank, 1);

    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, on.backend);
    for (ggml_tensor * t : { weight, input, bias, state, delta, out, other }) {
        std::vector<float> x(ggml_nelements(t));
        for (float & value : x) {
            value = random.normal();
        }
        ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
    }
    const std::vector<int32_t> plan_data = { 0, 0, 1, 0, GGML_DELTAMEM_TOKEN_WRITE };
    ggml_backend_tensor_set(plan, plan_data.data(), 0, plan_data.size() * sizeof(plan_data[0]));

    ggml_context * nodes = ggml_init({ ggml_tensor_overhead() * 16 + ggml_graph_overhead() * 2, nullptr, true });
    ggml_tensor *  alone = ggml_deltamem_correct(nodes, out, delta, other);
    ggml_tensor *  read  = ggml_deltamem(nodes, ggml_deltamem_mul_mat(nodes, weight, input), bias, state, plan, p);
    ggml_tensor *  last  = ggml_deltamem_correct(nodes, out, delta, read);

    allocated_graph expected(on.backend, nodes, alone);
    allocated_graph changed(on.backend, nodes, last);

    const auto result = [](allocated_graph & graph, ggml_tensor * node) {
        check(graph.compute(), "computing a graph that changes failed");
        std::vector<float> x(ggml_nelements(node));
        ggml_backend_tensor_get(node, x.data(), 0, ggml_nbytes(node));
        return x;
    };
    on.set_way(1);
    const std::vector<float> by_other = result(expected, alone);
    check(!same_bits(result(changed, last), by_other), "a correction by two reads is the same");
    last->src[2] = other;
    check(same_bits(result(changed, last), by_other), "a graph that changed was computed as before");

    ggml_free(nodes);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

static void test_read(const tested & on, const shape & s, uint64_t seed) {
    char name[160];
    snprintf(name, sizeof(name), "rank %d, heads %d, sequences %d, tokens %d, lambda %d, flags %d", s.rank, s.n_head,
             s.n_seqs, s.n_tokens, s.lambda, s.flags);

    graph g(on.backend, s, seed);

    check(strcmp(ggml_op_name(GGML_OP_DELTAMEM), "DELTAMEM") == 0, "the operator's name is %s",
          ggml_op_name(GGML_OP_DELTAMEM));
    check(strcmp(ggml_op_desc(g.op()), "DELTAMEM") == 0, "the node's description is %s", ggml_op_desc(g.op()));
    check(strncmp(ggml_op_symbol(GGML_OP_DELTAMEM), "deltamem", 8) == 0, "the operator's symbol is %s",
          ggml_op_symbol(GGML_OP_DELTAMEM));
    check(g.op()->type == GGML_TYPE_F32 && g.op()->ne[0] == s.n_head * s.rank && g.op()->ne[1] == s.n_tokens &&
                  g.op()->ne[2] == 1,
          "%s: the result has another shape", name);
    check(g.is_supported(on.device), "%s: the backend does not support the operator", name);

    const ggml_deltamem_params p = ggml_deltamem_get_params(g.op());
    check(p.rank == s.rank && p.n_head == s.n_head && p.n_seqs == s.n_seqs && p.lambda == s.lambda &&
                  p.flags == s.flags,
          "%s: the node has other parameters", name);

    // twice in a row; every number of threads gives the same bits
    std::vector<float> first_reads, first_states, second_reads, second_states;
    for (int way = 1; way <= on.n_ways; ++way) {
        on.set_way(way);
        g.set_inputs();

        check(g.compute(), "%s: computing failed", name);
        if (way == 1) {
            g.compare(1, on.tol, name);
            first_reads  = g.reads();
            first_states = g.states();
        }
        check(same_bits(g.reads(), first_reads) && same_bits(g.states(), first_states),
              "%s: %d threads change the result", name, way);

        check(g.compute(), "%s: computing again failed", name);
        if (way == 1) {
            g.compare(2, on.tol, name);
            second_reads  = g.reads();
            second_states = g.states();
        }
        check(same_bits(g.reads(), second_reads) && same_bits(g.states(), second_states),
              "%s: %d threads change the second result", name, way);
    }
}

static void test(const tested & on) {
    const int NORMALIZE = GGML_DELTAMEM_NORMALIZE_QK, ROWS = GGML_DELTAMEM_RANKWISE_GATES,
              OUTSIDE  = GGML_DELTAMEM_LAMBDA_OUTSIDE;
    const int SEGMENTS = GGML_DELTAMEM_SEGMENTS, DEFERRED = GGML_DELTAMEM_DEFERRED;

    const shape shapes[] = {
        // rank, heads, sequences, tokens, lambda, flags
        { 8, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, NORMALIZE | ROWS },
        { 8, 1, 1, 512, GGML_DELTAMEM_LAMBDA_COUPLED, NORMALIZE | ROWS },
        { 8, 4, 3, 64, GGML_DELTAMEM_LAMBDA_COUPLED, NORMALIZE | ROWS },
        { 8, 2, 2, 4000, GGML_DELTAMEM_LAMBDA_SEPARATE, NORMALIZE | ROWS | OUTSIDE },
        { 16, 1, 8, 40, GGML_DELTAMEM_LAMBDA_SEPARATE, NORMALIZE },
        { 16, 16, 2, 33, GGML_DELTAMEM_LAMBDA_NONE, 0 },
        { 1, 3, 5, 50, GGML_DELTAMEM_LAMBDA_COUPLED, ROWS | OUTSIDE },
        { 5, 2, 1, 17, GGML_DELTAMEM_LAMBDA_SEPARATE, NORMALIZE | SEGMENTS },
        { 8, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, NORMALIZE | ROWS | SEGMENTS },
        { 2, 4, 1, 1, GGML_DELTAMEM_LAMBDA_SEPARATE, NORMALIZE | SEGMENTS },
        { 8, 2, 3, 1000, GGML_DELTAMEM_LAMBDA_COUPLED, NORMALIZE | ROWS | SEGMENTS },
        { 24, 3, 2, 90, GGML_DELTAMEM_LAMBDA_SEPARATE, ROWS | OUTSIDE | SEGMENTS },
        { 64, 2, 2, 70, GGML_DELTAMEM_LAMBDA_NONE, NORMALIZE | ROWS | SEGMENTS },
        { 8, 4, 3, 200, GGML_DELTAMEM_LAMBDA_NONE, NORMALIZE | ROWS | DEFERRED },
        { 5, 2, 2, 50, GGML_DELTAMEM_LAMBDA_SEPARATE, NORMALIZE | OUTSIDE | DEFERRED },
    };

    uint64_t seed = 1;
    for (const shape & s : shapes) {
        if (on.defers || !(s.flags & DEFERRED)) {
            test_read(on, s, seed++);
        }
    }
    for (dependence kind : { CORRECTED_READ, NORMED_ROW, STATE_OF_A_PRODUCT }) {
        test_changed(on);
        test_dependent(on, kind);
    }
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
        if (ggml_is_quantized(type) && !on.takes_blocks) {
            continue;
        }
        for (addition add : { NOTHING, ADDED_BEHIND, ADDED_BEFORE, ADDED_ROW, ADDED_AND_USED }) {
            for (int n_tokens : { 1, 3, 16, 100 }) {
                if (!ggml_is_quantized(type)) {
                    test_correction(on, type, 4096, 8, n_tokens, add);
                }
                test_correction(on, type, 97, 32, n_tokens, add);
                test_correction(on, type, 1000, 128, n_tokens, add);
            }
            test_correction(on, type, 1000, 32, 32, add);
            for (int n_tokens : { 3, 16, 100, 515 }) {
                test_correction(on, type, 1024, 32, n_tokens, add, 128);
                test_correction(on, type, 576, 64, n_tokens, add, 576);
            }
        }
        for (int flags : { NORMALIZE | ROWS, NORMALIZE | ROWS | SEGMENTS, NORMALIZE | ROWS | DEFERRED }) {
            if ((flags & DEFERRED) && !on.defers) {
                continue;
            }
            for (int n_embd : { 2560, ggml_is_quantized(type) ? 96 : 100 }) {
                for (correction c : { NO_CORRECTION, CORRECTION, CORRECTION_IN_THE_PLACE_OF_THE_PROJECTION,
                                      CORRECTION_OF_A_PRODUCT, NORMED_CORRECTION_OF_A_PRODUCT }) {
                    test_projected_read(on, type, n_embd, { 8, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, flags }, c);
                    test_projected_read(on, type, n_embd, { 8, 4, 1, 1, GGML_DELTAMEM_LAMBDA_SEPARATE, flags }, c);
                    test_projected_read(on, type, n_embd, { 7, 3, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, flags }, c);
                    test_projected_read(on, type, n_embd, { 8, 5, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, flags }, c);
                    test_projected_read(on, type, n_embd, { 8, 8, 1, 1, GGML_DELTAMEM_LAMBDA_NONE, flags }, c);
                    test_projected_read(on, type, n_embd, { 8, 9, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, flags }, c);
                    test_projected_read(on, type, n_embd, { 16, 4, 1, 1, GGML_DELTAMEM_LAMBDA_NONE, flags }, c);
                    test_projected_read(on, type, n_embd, { 32, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, flags }, c);
                    test_projected_read(on, type, n_embd, { 64, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, flags }, c);
                    test_projected_read(on, type, n_embd, { 8, 4, 4, 4, GGML_DELTAMEM_LAMBDA_NONE, flags }, c);
                    test_projected_read(on, type, n_embd, { 16, 2, 3, 3, GGML_DELTAMEM_LAMBDA_SEPARATE, flags }, c);
                    test_projected_read(on, type, n_embd, { 5, 3, 6, 6, GGML_DELTAMEM_LAMBDA_COUPLED, flags }, c);
                }
            }
        }
    }
}

int main(int argc, char ** argv) {
    ggml_backend_load_all();

    if (argc > 1 && strcmp(argv[1], "gpu") == 0) {
        int n_tested = 0;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_t device = ggml_backend_dev_get(i);
            if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
                continue;
            }
            ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
            if (!graph(backend, { 8, 1, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, 0 }, 1).is_supported(device)) {
                printf("%s has no such operator\n", ggml_backend_dev_description(device));
            } else {
                printf("%s\n", ggml_backend_dev_description(device));
                // fast-math: denormals are zero, square roots have one more unit of error
                test({ device, backend, 1, [](int) {}, 1e-10, false, false, false });
                n_tested++;
            }
            ggml_backend_free(backend);
        }
        if (n_tested == 0) {
            printf("skipped: there is no GPU whose backend has the operator\n");
            return EXIT_SKIPPED;
        }
        return finish("operator on GPUs");
    }

    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!check(device != nullptr, "no CPU backend")) {
        return finish("operator");
    }
    ggml_backend_t backend       = ggml_backend_dev_init(device, nullptr);
    const auto     set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads");

    const tested cpu { device, backend, 4,    [&](int n_threads) { set_n_threads(backend, n_threads); },
                       1e-11,  true,    true, true };

    // before there are other threads, which no child has
    test_malformed(cpu, false);
    test_malformed(cpu, true);
    test(cpu);

    ggml_backend_free(backend);
    return finish("operator");
}
